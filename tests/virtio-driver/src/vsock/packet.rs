//! virtio-vsock packets (virtio 1.2, section 5.10.6), written down independently of the daemons.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Bytes of a header.
pub const HEADER_LEN: usize = 44;
/// Context id of the host.
pub const HOST_CID: u64 = 2;

/// Socket type: bytes.
pub const TYPE_STREAM: u16 = 1;
/// Socket type: records.
pub const TYPE_SEQPACKET: u16 = 2;

/// Asks for a connection.
pub const OP_REQUEST: u16 = 1;
/// Accepts one.
pub const OP_RESPONSE: u16 = 2;
/// Refuses or ends one.
pub const OP_RST: u16 = 3;
/// Ends directions.
pub const OP_SHUTDOWN: u16 = 4;
/// Carries payload.
pub const OP_RW: u16 = 5;
/// Tells the buffer space.
pub const OP_CREDIT_UPDATE: u16 = 6;
/// Asks for it.
pub const OP_CREDIT_REQUEST: u16 = 7;

/// The sender receives no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// The sender sends no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Last packet of a message.
pub const SEQ_EOM: u32 = 1;

/// `struct virtio_vsock_hdr`, little-endian.
#[repr(C, packed)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Payload bytes.
    pub len: u32,
    /// `TYPE_*`.
    pub kind: u16,
    /// `OP_*`.
    pub op: u16,
    /// Flags of the operation.
    pub flags: u32,
    /// Receive buffer of the sender.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of it.
    pub fwd_cnt: u32,
}

/// A packet that reached the DPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Header.
    pub header: Header,
    /// Payload.
    pub payload: Vec<u8>,
}
