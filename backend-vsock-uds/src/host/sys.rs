//! System calls on Unix sockets with iovecs that point into DPU memory, and epoll data words.
//!
//! One of the files with `unsafe` code: the iovecs come from [`vring::chain::Slices`] or from buffers
//! of this process, and the kernel checks them.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;

/// Most iovecs of one call (`UIO_MAXIOV`, Linux `include/uapi/linux/uio.h`).
pub const IOV_MAX: usize = 1024;

/// A vector of memory pieces. Whoever fills it keeps the memory mapped while it is used.
#[derive(Debug, Default)]
pub struct Pieces(Vec<libc::iovec>);

// SAFETY: the pointers are only used inside calls made while their memory is borrowed by the caller;
// between calls the vector is emptied, never read.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Forgets all pieces and keeps the storage.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Appends pieces of DPU memory.
    pub fn extend(&mut self, iovecs: &[libc::iovec]) {
        self.0.extend_from_slice(iovecs);
    }

    /// Appends as many pieces as one call still takes, and returns their bytes.
    pub fn extend_up_to_limit(&mut self, iovecs: &[libc::iovec]) -> usize {
        let room = IOV_MAX.saturating_sub(self.0.len()).min(iovecs.len());
        self.extend(&iovecs[..room]);
        iovecs[..room].iter().map(|piece| piece.iov_len).sum()
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn outcome(result: isize) -> Result<usize, Errno> {
    usize::try_from(result).map_err(|_| {
        let error = std::io::Error::last_os_error();
        Errno::from_io_error(&error).unwrap_or(Errno::IO)
    })
}

fn message(pieces: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: `msghdr` is plain data for which all zeroes is a valid value (no name, no control).
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len().min(IOV_MAX) as _;
    message
}

/// Sends the pieces without blocking and without SIGPIPE; bytes taken.
///
/// # Errors
/// `EAGAIN` when the socket is full, `EPIPE` and others when its peer is gone.
pub fn send(socket: BorrowedFd, pieces: &Pieces) -> Result<usize, Errno> {
    send_flags(socket, &pieces.0, 0)
}

/// Sends the pieces as one record; `eor` sets `MSG_EOR`.
///
/// # Errors
/// As [`send`]; `EMSGSIZE` when the record is larger than the socket's buffer.
pub fn send_pieces_as_record(socket: BorrowedFd, pieces: &Pieces, eor: bool) -> Result<usize, Errno> {
    send_flags(socket, &pieces.0, if eor { libc::MSG_EOR } else { 0 })
}

/// Sends one record; `eor` sets `MSG_EOR`.
///
/// # Errors
/// As [`send`]; `EMSGSIZE` when the record is larger than the socket's buffer.
pub fn send_record(socket: BorrowedFd, record: &[u8], eor: bool) -> Result<usize, Errno> {
    let piece = libc::iovec { iov_base: record.as_ptr().cast_mut().cast(), iov_len: record.len() };
    send_flags(socket, &[piece], if eor { libc::MSG_EOR } else { 0 })
}

/// Sends bytes of this process.
///
/// # Errors
/// As [`send`].
pub fn send_bytes(socket: BorrowedFd, first: &[u8], second: &[u8]) -> Result<usize, Errno> {
    let piece =
        |bytes: &[u8]| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    send_flags(socket, &[piece(first), piece(second)], 0)
}

fn send_flags(socket: BorrowedFd, pieces: &[libc::iovec], flags: libc::c_int) -> Result<usize, Errno> {
    let message = message(pieces);
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `message` points to `pieces`, which outlive the call; each piece is memory that its owner
    // keeps mapped (see `Pieces`), and the kernel answers EFAULT for what is not.
    outcome(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, flags) })
}

/// What one receive brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// Bytes; for a record, its whole length even if less was asked for.
    pub len: usize,
    /// Ancillary data came along and was dropped (`MSG_CTRUNC`).
    pub ancillary: bool,
}

/// Receives into the pieces without blocking; 0 bytes are the end of file on a stream. Descriptors that
/// come along are closed by the kernel.
///
/// # Errors
/// `EAGAIN` when nothing is there.
pub fn receive(socket: BorrowedFd, pieces: &mut Pieces) -> Result<Received, Errno> {
    receive_flags(socket, &pieces.0, 0)
}

/// Looks at the next record of a record socket without taking it.
///
/// # Errors
/// `EAGAIN` when nothing is there.
pub fn peek_record(socket: BorrowedFd) -> Result<Received, Errno> {
    receive_flags(socket, &[], libc::MSG_PEEK | libc::MSG_TRUNC)
}

fn receive_flags(socket: BorrowedFd, pieces: &[libc::iovec], flags: libc::c_int) -> Result<Received, Errno> {
    let mut message = message(pieces);
    // SAFETY: as in `send_flags`; the pieces are writable: DPU memory is mapped so.
    let result = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, flags | libc::MSG_DONTWAIT) };
    let len = outcome(result)?;
    Ok(Received { len, ancillary: message.msg_flags & libc::MSG_CTRUNC != 0 })
}
