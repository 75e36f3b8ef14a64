//! A connected Unix socket of the host, of any of the three types, always non-blocking.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

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

/// A socket of the host.
#[derive(Debug)]
pub struct HostSocket {
    fd: OwnedFd,
    /// Keeps the bounds of what is sent (SEQPACKET, DGRAM).
    records: bool,
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
        let kind = rustix::net::sockopt::socket_type(&fd)?;
        Ok(Self { fd, records: kind != SocketType::STREAM })
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
        let inode = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&inode)?.st_mode) != FileType::Socket {
            return Err(Errno::NOTSOCK);
        }
        let address = SocketAddrUnix::new(format!("/proc/self/fd/{}", inode.as_raw_fd()))?;
        let mut last = Errno::PROTOTYPE;
        for socket_type in fitting(kind) {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let fd = rustix::net::socket_with(AddressFamily::UNIX, *socket_type, flags, None)?;
            match rustix::net::connect(&fd, &address) {
                Ok(()) => return Ok(Self { fd, records: *socket_type != SocketType::STREAM }),
                // The listener is of another type.
                Err(Errno::PROTOTYPE) => last = Errno::PROTOTYPE,
                Err(errno) => return Err(errno),
            }
        }
        Err(last)
    }

    /// Whether each send is a record of its own.
    pub fn keeps_records(&self) -> bool {
        self.records
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

    /// Bytes of the next record, or `EAGAIN`.
    ///
    /// # Errors
    /// Whatever receiving gives.
    pub fn next_record_len(&self) -> Result<usize, Errno> {
        let flags =
            rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::TRUNC | rustix::net::RecvFlags::DONTWAIT;
        let mut nothing = [0u8; 0];
        rustix::net::recv(&self.fd, &mut nothing[..], flags).map(|(_, len)| len)
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
