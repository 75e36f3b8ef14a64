//! A connected Unix socket of the host, of any of the three types, always non-blocking.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::sys;
use crate::packet::Kind;

/// Socket types that a connection of this kind may end at, most fitting first. A stream of the DPU may
/// end at a record socket (each packet is a record), but records never at a stream: their bounds
/// would be lost in silence.
pub fn fitting(kind: Kind) -> &'static [SocketType] {
    match kind {
        Kind::SeqPacket => &[SocketType::SEQPACKET, SocketType::DGRAM],
        Kind::Stream | Kind::Unknown(_) => &[SocketType::STREAM, SocketType::SEQPACKET, SocketType::DGRAM],
    }
}

/// Send buffer asked for on sockets that keep records: the largest record of a DPU is as large as the
/// window it is given, and the socket must take it whole. The kernel doubles it, and bounds it by
/// `net.core.wmem_max`.
const RECORD_BUFFER: usize = 256 << 10;

/// Bytes of the send buffer that a record cannot use (`unix_dgram_sendmsg`, Linux `net/unix/af_unix.c`).
const RECORD_OVERHEAD: usize = 32;

/// A socket of the host.
#[derive(Debug)]
pub struct HostSocket {
    fd: OwnedFd,
    kind: SocketType,
}

/// What a record socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextRecord {
    /// A record of this many bytes, perhaps 0.
    Record(usize),
    /// The end: the program sends no more.
    End,
}

/// Outcome of an attempt to connect.
#[derive(Debug)]
pub enum Attempt {
    /// Connected.
    Connected(HostSocket),
    /// The listener's backlog is full; worth another try.
    Busy,
    /// No.
    Refused(Errno),
}

impl HostSocket {
    /// Takes a socket that a host program made.
    ///
    /// # Errors
    /// When its type cannot be asked for.
    pub fn accepted(fd: OwnedFd) -> Result<Self, Errno> {
        let kind = sockopt::socket_type(&fd)?;
        let socket = Self { fd, kind };
        socket.prepare()?;
        Ok(socket)
    }

    /// Records are received with credentials: those mark an empty record, which looks like the end of
    /// file otherwise. A datagram socket gets an address by it, so that its peer can answer.
    fn prepare(&self) -> Result<(), Errno> {
        if self.keeps_records() {
            sockopt::set_socket_passcred(&self.fd, true)?;
            sockopt::set_socket_send_buffer_size(&self.fd, RECORD_BUFFER)?;
        }
        Ok(())
    }

    /// Connects to the socket at `path`. The path is opened first and the socket reached through the
    /// descriptor: neither its length nor a rename in between matters.
    pub fn connect(path: &Path, kind: Kind) -> Attempt {
        match Self::try_connect(path, kind) {
            Ok(socket) => Attempt::Connected(socket),
            Err(Errno::AGAIN) => Attempt::Busy,
            Err(errno) => Attempt::Refused(errno),
        }
    }

    fn try_connect(path: &Path, kind: Kind) -> Result<Self, Errno> {
        let inode = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&inode)?.st_mode) != FileType::Socket {
            return Err(Errno::NOTSOCK);
        }
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", inode.as_raw_fd()))?;
        let mut last = Errno::PROTOTYPE;
        for socket_type in fitting(kind) {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let fd = rustix::net::socket_with(AddressFamily::UNIX, *socket_type, flags, None)?;
            let socket = Self { fd, kind: *socket_type };
            socket.prepare()?;
            match rustix::net::connect(&socket.fd, &address) {
                Ok(()) => return Ok(socket),
                // The listener is of another type.
                Err(Errno::PROTOTYPE) => last = Errno::PROTOTYPE,
                Err(errno) => return Err(errno),
            }
        }
        Err(last)
    }

    /// Whether each send is a record of its own.
    pub fn keeps_records(&self) -> bool {
        self.kind != SocketType::STREAM
    }

    /// Whether a peer that goes away leaves no end of file behind.
    pub fn is_datagram(&self) -> bool {
        self.kind == SocketType::DGRAM
    }

    /// Longest record the socket takes.
    pub fn max_record(&self) -> usize {
        let buffer = sockopt::socket_send_buffer_size(&self.fd).unwrap_or(RECORD_OVERHEAD);
        buffer.saturating_sub(RECORD_OVERHEAD)
    }

    /// Ends our sending direction: the program sees end of file.
    pub fn end_sending(&self) {
        // Fails only when the peer is gone already.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }

    /// Ends our receiving direction: the program's writes fail with `EPIPE`.
    pub fn end_receiving(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Read);
    }

    /// What comes next on a record socket.
    ///
    /// # Errors
    /// `EAGAIN` when nothing is there yet, and whatever else receiving gives.
    pub fn next_record(&self) -> Result<NextRecord, Errno> {
        let received = sys::peek_record(self.fd.as_fd())?;
        let is_record = received.ancillary || received.len > 0 || self.is_datagram();
        Ok(if is_record { NextRecord::Record(received.len) } else { NextRecord::End })
    }

    /// Receives the next record, which is at most `buffer.len()` bytes long.
    ///
    /// # Errors
    /// Whatever receiving gives.
    pub fn receive_record(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        rustix::net::recv(&self.fd, buffer, rustix::net::RecvFlags::DONTWAIT).map(|(len, _)| len)
    }
}

impl AsFd for HostSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixListener};

    #[test]
    fn a_path_longer_than_an_address_is_reached() {
        let root = tempfile::tempdir().expect("a directory");
        let deep = root.path().join("d".repeat(200));
        std::fs::create_dir(&deep).expect("a deep directory");
        let short = root.path().join("s");
        let _listener = UnixListener::bind(&short).expect("a listener");
        let long = deep.join("socket");
        std::fs::rename(&short, &long).expect("the socket moves");
        assert!(
            matches!(HostSocket::connect(&long, Kind::Stream), Attempt::Connected(socket) if !socket.keeps_records())
        );
    }

    #[test]
    fn a_stream_finds_a_datagram_socket_and_knows_it_keeps_records() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("dgram");
        let _receiver = UnixDatagram::bind(&path).expect("a datagram socket");
        assert!(
            matches!(HostSocket::connect(&path, Kind::Stream), Attempt::Connected(socket) if socket.keeps_records())
        );
    }

    #[test]
    fn records_never_end_at_a_stream() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("stream");
        let _listener = UnixListener::bind(&path).expect("a listener");
        assert!(matches!(HostSocket::connect(&path, Kind::SeqPacket), Attempt::Refused(Errno::PROTOTYPE)));
    }

    #[test]
    fn an_empty_record_is_not_the_end() {
        for kind in [SocketType::SEQPACKET, SocketType::DGRAM] {
            let (program, ours) =
                rustix::net::socketpair(AddressFamily::UNIX, kind, SocketFlags::NONBLOCK, None)
                    .expect("a pair");
            let ours = HostSocket::accepted(ours).expect("a socket");
            assert_eq!(ours.next_record(), Err(Errno::AGAIN));
            for record in [&b""[..], b"x", b""] {
                rustix::net::send(&program, record, rustix::net::SendFlags::empty()).expect("sent");
            }
            drop(program);
            for len in [0, 1, 0] {
                assert_eq!(ours.next_record(), Ok(NextRecord::Record(len)));
                assert_eq!(ours.receive_record(&mut [0; 8]), Ok(len));
            }
            let end = if kind == SocketType::DGRAM { Err(Errno::AGAIN) } else { Ok(NextRecord::End) };
            assert_eq!(ours.next_record(), end, "{kind:?}");
        }
    }

    #[test]
    fn a_record_socket_takes_a_record_of_the_default_window() {
        let (_program, ours) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None)
                .expect("a pair");
        let ours = HostSocket::accepted(ours).expect("a socket");
        let record = vec![7; ours.max_record()];
        assert_eq!(sys::send_record(ours.as_fd(), &record, false), Ok(record.len()));
        let (_program, ours) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None)
                .expect("a pair");
        let ours = HostSocket::accepted(ours).expect("a socket");
        let record = vec![7; ours.max_record() + 1];
        assert_eq!(sys::send_record(ours.as_fd(), &record, false), Err(Errno::MSGSIZE));
    }

    #[test]
    fn what_is_no_listening_socket_is_refused() {
        let root = tempfile::tempdir().expect("a directory");
        let file = root.path().join("file");
        std::fs::write(&file, b"").expect("a file");
        let dead = root.path().join("dead");
        drop(UnixListener::bind(&dead).expect("a listener"));
        for (path, errno) in [
            (root.path().to_owned(), Errno::NOTSOCK),
            (file, Errno::NOTSOCK),
            (root.path().join("missing"), Errno::NOENT),
            (dead, Errno::CONNREFUSED),
        ] {
            assert!(
                matches!(HostSocket::connect(&path, Kind::Stream), Attempt::Refused(e) if e == errno),
                "{}",
                path.display()
            );
        }
    }

    #[test]
    fn a_full_backlog_is_worth_another_try() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("busy");
        let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).expect("an address")).expect("bound");
        rustix::net::listen(&listener, 0).expect("listening");
        let mut connected = Vec::new();
        loop {
            match HostSocket::connect(&path, Kind::Stream) {
                Attempt::Connected(socket) => connected.push(socket),
                Attempt::Busy => break,
                Attempt::Refused(errno) => panic!("refused: {errno}"),
            }
            assert!(connected.len() < 10, "the backlog never fills");
        }
    }
}
