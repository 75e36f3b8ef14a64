//! The socket of one front end: whole messages in, whole replies out, file descriptors kept safe.
//!
//! Every wait can be ended by [`Stop`]. Received descriptors are owned from the first moment on, so
//! that each error path closes them.
#![forbid(unsafe_code)]

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

use crate::message::{HEADER_SIZE, Header, HeaderError, MAX_FDS, PayloadBuffer};

/// Ends sessions from outside: every session that was given a clone ends soon after
/// [`Stop::trigger`], and so does every later one.
#[derive(Clone, Debug)]
pub struct Stop {
    /// Readable for ever once triggered.
    event: Arc<OwnedFd>,
}

impl Stop {
    /// Not triggered yet.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new() -> io::Result<Stop> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Stop { event: Arc::new(event) })
    }

    /// Ends all sessions.
    pub fn trigger(&self) {
        // Fails only when the counter is full, and then it is triggered.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Whether it was triggered.
    pub fn is_triggered(&self) -> bool {
        let mut fds = [PollFd::new(&self.event, PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().is_empty()
    }
}

impl AsFd for Stop {
    /// Becomes readable when triggered.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// Why no further message can be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The header makes no sense.
    #[error("the front end does not speak vhost-user version 1: {0}")]
    Header(#[from] HeaderError),
    /// End of the stream within a message.
    #[error("the front end closed the connection in the middle of a message")]
    Truncated,
    /// More descriptors than fit a message.
    #[error("the front end sent more than {MAX_FDS} file descriptors with one message")]
    TooManyFds,
    /// The socket failed.
    #[error("front end socket: {0}")]
    Socket(#[from] io::Error),
}

/// What a wait for a message brought.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A message: header; payload and descriptors are in the buffers.
    Message(Header),
    /// The front end closed the connection between two messages.
    Closed,
    /// [`Stop`] was triggered.
    Stopped,
    /// The watched descriptor became readable.
    Watched,
}

/// One connected front end.
#[derive(Debug)]
pub(crate) struct Connection<'a> {
    stream: &'a UnixStream,
    stop: &'a Stop,
    watched: OwnedFd,
}

/// How far a buffer was filled.
enum Filled {
    Whole,
    Nothing,
    Part,
    Interrupted(Received),
}

impl<'a> Connection<'a> {
    /// `watched` ends waits, too, when it becomes readable.
    pub(crate) fn new(stream: &'a UnixStream, stop: &'a Stop, watched: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Self { stream, stop, watched: watched.try_clone_to_owned()? })
    }

    /// Waits for a message. Its payload is then in `payload`, its descriptors in `fds`.
    pub(crate) fn receive(
        &self,
        payload: &mut PayloadBuffer,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Received, ConnectionError> {
        fds.clear();
        let mut header = [0; HEADER_SIZE];
        match self.fill(&mut header, fds)? {
            Filled::Whole => {}
            Filled::Nothing => return Ok(Received::Closed),
            Filled::Part => return Err(ConnectionError::Truncated),
            Filled::Interrupted(why) => return Ok(why),
        }
        let header = Header::parse(&header)?;
        match self.fill(&mut payload.0[..header.size], fds)? {
            Filled::Whole => Ok(Received::Message(header)),
            Filled::Nothing | Filled::Part => Err(ConnectionError::Truncated),
            Filled::Interrupted(why) => Ok(why),
        }
    }

    /// Sends a whole reply. `Some` when something else came first.
    pub(crate) fn send(&self, mut bytes: &[u8]) -> Result<Option<Received>, ConnectionError> {
        while !bytes.is_empty() {
            match send(self.stream, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    if let Some(why) = self.wait(PollFlags::OUT)? {
                        return Ok(Some(why));
                    }
                }
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(None)
    }

    fn fill(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<Filled, ConnectionError> {
        let mut done = 0;
        while done < buffer.len() {
            match self.receive_some(&mut buffer[done..], fds) {
                Ok(0) if done == 0 => return Ok(Filled::Nothing),
                Ok(0) => return Ok(Filled::Part),
                Ok(count) => done += count,
                Err(ConnectionError::Socket(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Some(why) = self.wait(PollFlags::IN)? {
                        return Ok(Filled::Interrupted(why));
                    }
                }
                Err(ConnectionError::Socket(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                // A front end that was killed resets the connection: that is a disconnect like any.
                Err(ConnectionError::Socket(error)) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(if done == 0 { Filled::Nothing } else { Filled::Part });
                }
                Err(error) => return Err(error),
            }
        }
        Ok(Filled::Whole)
    }

    fn receive_some(&self, buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, ConnectionError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = recvmsg(self.stream, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags)
            .map_err(io::Error::from)?;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > MAX_FDS {
            return Err(ConnectionError::TooManyFds);
        }
        Ok(received.bytes)
    }

    /// Waits until the socket is ready, or something ends the wait.
    fn wait(&self, ready: PollFlags) -> Result<Option<Received>, ConnectionError> {
        let mut fds = [
            PollFd::new(self.stream, ready),
            PollFd::new(self.stop, PollFlags::IN),
            PollFd::new(&self.watched, PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, None) {
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        Ok(if !fds[1].revents().is_empty() {
            Some(Received::Stopped)
        } else if !fds[2].revents().is_empty() {
            Some(Received::Watched)
        } else {
            None
        })
    }
}
