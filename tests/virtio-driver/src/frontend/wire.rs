//! vhost-user messages as bytes and descriptors on a socket (QEMU `docs/interop/vhost-user.rst`).
//!
//! Nothing here knows what a message means or whether it is right: header fields are sent as given, so the same
//! functions carry a well-behaved session and a hostile one.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{Error, Result};

/// Requests of the front end, numbered as in the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
#[repr(u32)]
pub enum Request {
    GetFeatures = 1,
    SetFeatures = 2,
    SetOwner = 3,
    ResetOwner = 4,
    SetMemTable = 5,
    SetLogBase = 6,
    SetLogFd = 7,
    SetVringNum = 8,
    SetVringAddr = 9,
    SetVringBase = 10,
    GetVringBase = 11,
    SetVringKick = 12,
    SetVringCall = 13,
    SetVringErr = 14,
    GetProtocolFeatures = 15,
    SetProtocolFeatures = 16,
    GetQueueNum = 17,
    SetVringEnable = 18,
    SetBackendReqFd = 21,
    GetConfig = 24,
    SetConfig = 25,
    GetInflightFd = 31,
    SetInflightFd = 32,
    ResetDevice = 34,
    GetMaxMemSlots = 36,
    AddMemReg = 37,
    RemMemReg = 38,
    SetStatus = 39,
    GetStatus = 40,
    SetDeviceStateFd = 42,
    CheckDeviceState = 43,
}

/// Version bits every message carries.
pub const FLAG_VERSION: u32 = 1;
/// The message is a reply.
pub const FLAG_REPLY: u32 = 1 << 2;
/// The sender wants an acknowledgement (after `REPLY_ACK`).
pub const FLAG_NEED_REPLY: u32 = 1 << 3;

/// Size of the header: request, flags, payload size.
pub const HEADER: usize = 12;

/// Descriptors a reply may bring; more are closed by the kernel and reported as an error.
const MAX_FDS: usize = 8;

/// Payload a reply may have.
const MAX_PAYLOAD: u32 = 4096;

/// `struct vhost_vring_state`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
pub struct VringState {
    /// Ring index.
    pub index: u32,
    /// Size, base or enable flag.
    pub num: u32,
}

/// `struct vhost_vring_addr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
pub struct VringAddr {
    /// Ring index.
    pub index: u32,
    /// 1: log writes.
    pub flags: u32,
    /// User address of the descriptor table.
    pub descriptor: u64,
    /// User address of the used ring.
    pub used: u64,
    /// User address of the available ring.
    pub available: u64,
    /// Log address.
    pub log: u64,
}

/// One memory region as `SET_MEM_TABLE` and `ADD_MEM_REG` describe it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct MemRegion {
    /// DPU-physical address.
    pub gpa: u64,
    /// Size in bytes.
    pub size: u64,
    /// Address in the front end.
    pub user: u64,
    /// Where in the file it starts.
    pub offset: u64,
}

/// A message with every header field free to choose.
#[derive(Clone, Debug)]
pub struct Message<'a> {
    /// Request number.
    pub request: u32,
    /// Flags including the version.
    pub flags: u32,
    /// Size field; `None` means the true size.
    pub size: Option<u32>,
    /// Payload bytes actually sent.
    pub payload: &'a [u8],
    /// Descriptors sent along.
    pub fds: Vec<BorrowedFd<'a>>,
}

impl<'a> Message<'a> {
    /// A well-formed message.
    pub fn new(request: Request, payload: &'a [u8]) -> Self {
        Message { request: request as u32, flags: FLAG_VERSION, size: None, payload, fds: Vec::new() }
    }

    /// Adds a descriptor.
    pub fn with_fd(mut self, fd: BorrowedFd<'a>) -> Self {
        self.fds.push(fd);
        self
    }

    /// The bytes on the wire.
    pub fn to_bytes(&self) -> Vec<u8> {
        let size = self.size.unwrap_or(self.payload.len() as u32);
        [self.request, self.flags, size].as_bytes().iter().chain(self.payload).copied().collect()
    }
}

/// A message that came from the daemon.
#[derive(Debug)]
pub struct Reply {
    /// Request number.
    pub request: u32,
    /// Flags.
    pub flags: u32,
    /// Payload.
    pub payload: Vec<u8>,
    /// Descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

/// Sends bytes with descriptors attached to the first of them. A broken connection is [`Error::Disconnected`].
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>], during: &str) -> Result<()> {
    // The kernel takes at most SCM_MAX_FD (253) descriptors at a time.
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Error::os("attach descriptors to a message", Errno::INVAL));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)
        .map_err(|e| match e {
            Errno::PIPE | Errno::CONNRESET => Error::Disconnected { during: during.to_owned() },
            e => Error::os(format!("send {during}"), e),
        })?;
    if sent < bytes.len() {
        return send(socket, &bytes[sent..], &[], during);
    }
    Ok(())
}

/// Receives one message; the socket's receive timeout bounds the wait.
pub fn receive(socket: &UnixStream, during: &str, limit: Duration) -> Result<Reply> {
    let mut fds = Vec::new();
    let header = receive_exact(socket, HEADER, &mut fds, during, limit)?;
    let [request, flags, size] =
        <[u32; 3]>::read_from_bytes(&header).map_err(|_| bad(during, "the header is short"))?;
    if size > MAX_PAYLOAD {
        return Err(bad(during, &format!("the answer announces {size} bytes of payload")));
    }
    let payload = receive_exact(socket, size as usize, &mut fds, during, limit)?;
    Ok(Reply { request, flags, payload, fds })
}

fn receive_exact(
    socket: &UnixStream,
    len: usize,
    fds: &mut Vec<OwnedFd>,
    during: &str,
    limit: Duration,
) -> Result<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut have = 0;
    while have < len {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut iov = [std::io::IoSliceMut::new(&mut bytes[have..])];
        let received = match rustix::net::recvmsg(socket, &mut iov, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => received,
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => {
                return Err(Error::Timeout { what: format!("the answer to {during}"), waited: limit });
            }
            Err(Errno::CONNRESET) => return Err(Error::Disconnected { during: during.to_owned() }),
            Err(e) => return Err(Error::os(format!("receive the answer to {during}"), e)),
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(Error::Disconnected { during: during.to_owned() });
        }
        if received.flags.contains(ReturnFlags::CTRUNC) {
            return Err(bad(during, "the answer carries too many descriptors"));
        }
        have += received.bytes;
    }
    Ok(bytes)
}

fn bad(request: &str, problem: &str) -> Error {
    Error::VhostUser { request: request.to_owned(), problem: problem.to_owned() }
}
