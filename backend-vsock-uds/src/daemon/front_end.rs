//! The front ends of one DPU, one after the other.
//!
//! A second front end waits in the socket's backlog until the first is gone: that is what a front end
//! wants that was restarted faster than its predecessor's end was noticed.
#![forbid(unsafe_code)]

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vring::session::{End, Stop};

use crate::device::VsockDevice;
use crate::listener::Socket;

/// Pause after a failed accept, when the process has no descriptors left.
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// What serves the front ends of a DPU.
#[derive(Debug)]
pub struct FrontEnds {
    /// Context id of the DPU.
    pub cid: u64,
    /// Where front ends come from; a listener does not block.
    pub socket: Socket,
    /// The device, which outlives them.
    pub device: VsockDevice,
    /// Ends everything.
    pub stop: Stop,
    /// Written when no front end can come any more.
    pub over: Arc<OwnedFd>,
}

impl FrontEnds {
    /// Serves until stopped, or until a connected socket is closed. Gives the device back.
    pub fn serve(mut self) -> VsockDevice {
        match self.socket {
            Socket::Listening(listener) => {
                while let Some(stream) = next(&listener, &self.stop) {
                    if !one(&mut self.device, self.cid, &stream, &self.stop) {
                        break;
                    }
                }
            }
            Socket::Connected(stream) => {
                one(&mut self.device, self.cid, &stream, &self.stop);
            }
        }
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = rustix::io::write(&self.over, &1u64.to_ne_bytes());
        self.device
    }
}

/// Serves one front end; whether there may be another.
fn one(device: &mut VsockDevice, cid: u64, stream: &UnixStream, stop: &Stop) -> bool {
    tracing::info!(cid, "front end connected");
    match device.serve(stream, stop) {
        Ok(End::Disconnected) => tracing::info!(cid, "front end disconnected"),
        Ok(End::Stopped) => return false,
        Err(error) => tracing::error!(cid, "front end dropped: {error}"),
    }
    true
}

/// The next front end, or `None` when stopped.
fn next(listener: &UnixListener, stop: &Stop) -> Option<UnixStream> {
    let mut resting = false;
    loop {
        let mut fds = [PollFd::new(stop, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        // While the process has no descriptors left, the listener is readable all the time.
        let outcome = if resting { poll(&mut fds[..1], Some(&ACCEPT_PAUSE)) } else { poll(&mut fds, None) };
        if stop.is_triggered() {
            return None;
        }
        resting = false;
        if outcome.is_err() {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => return Some(stream),
            Err(error) if may_try_again(&error) => {}
            Err(error) => {
                tracing::warn!("a front end has to wait: {error}");
                resting = true;
            }
        }
    }
}

fn may_try_again(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}
