//! virtio-vsock packet headers (virtio 1.2, section 5.10.6): bytes to a typed header and back.
//!
//! A header is copied out of DPU memory once and decoded from the copy. Decoding never fails for a
//! field the device can answer: an unknown operation or socket type is a value ([`Op::Unknown`],
//! [`Kind::Unknown`]) because the specification wants an RST for it, not silence.
#![forbid(unsafe_code)]

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a header (`struct virtio_vsock_hdr`).
pub const HEADER_LEN: usize = 44;

/// Context id of the host (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;

/// Largest payload of one packet that a driver sends (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`, Linux).
pub const MAX_PAYLOAD: u32 = 64 * 1024;

/// `VIRTIO_VSOCK_SHUTDOWN_RCV`: the sender of the packet will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_SEND`: the sender of the packet will send no more.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both directions: the sender closes.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `VIRTIO_VSOCK_SEQ_EOM`: last packet of a message.
pub const SEQ_EOM: u32 = 1;
/// `VIRTIO_VSOCK_SEQ_EOR`: the message ends a record (`MSG_EOR`).
pub const SEQ_EOR: u32 = 2;

/// The wire layout.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
struct Wire {
    src_cid: U64,
    dst_cid: U64,
    src_port: U32,
    dst_port: U32,
    len: U32,
    kind: U16,
    op: U16,
    flags: U32,
    buf_alloc: U32,
    fwd_cnt: U32,
}

const _: () = assert!(size_of::<Wire>() == HEADER_LEN);

/// Operation of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Accepts one.
    Response,
    /// Refuses or ends one at once.
    Rst,
    /// Ends one or both directions; see the `SHUTDOWN_*` flags.
    Shutdown,
    /// Carries payload.
    Rw,
    /// Tells the buffer space.
    CreditUpdate,
    /// Asks for a [`Op::CreditUpdate`].
    CreditRequest,
    /// Anything else, `VIRTIO_VSOCK_OP_INVALID` (0) included.
    Unknown(u16),
}

impl Op {
    fn from_wire(op: u16) -> Self {
        match op {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            other => Op::Unknown(other),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Op::Request => 1,
            Op::Response => 2,
            Op::Rst => 3,
            Op::Shutdown => 4,
            Op::Rw => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
            Op::Unknown(other) => other,
        }
    }
}

/// Socket type of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Bytes (`VIRTIO_VSOCK_TYPE_STREAM`).
    Stream,
    /// Records (`VIRTIO_VSOCK_TYPE_SEQPACKET`).
    SeqPacket,
    /// Anything else.
    Unknown(u16),
}

impl Kind {
    fn from_wire(kind: u16) -> Self {
        match kind {
            1 => Kind::Stream,
            2 => Kind::SeqPacket,
            other => Kind::Unknown(other),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Kind::Stream => 1,
            Kind::SeqPacket => 2,
            Kind::Unknown(other) => other,
        }
    }
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Context id of the sender.
    pub src_cid: u64,
    /// Context id of the receiver.
    pub dst_cid: u64,
    /// Port of the sender.
    pub src_port: u32,
    /// Port of the receiver.
    pub dst_port: u32,
    /// Payload bytes that follow the header.
    pub len: u32,
    /// Socket type.
    pub kind: Kind,
    /// Operation.
    pub op: Op,
    /// Flags of the operation.
    pub flags: u32,
    /// Receive buffer space of the sender, bytes.
    pub buf_alloc: u32,
    /// Bytes the sender has taken out of its receive buffer, wrapping.
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes a header.
    pub fn decode(bytes: &[u8; HEADER_LEN]) -> Self {
        let wire: Wire = zerocopy::transmute!(*bytes);
        Self {
            src_cid: wire.src_cid.get(),
            dst_cid: wire.dst_cid.get(),
            src_port: wire.src_port.get(),
            dst_port: wire.dst_port.get(),
            len: wire.len.get(),
            kind: Kind::from_wire(wire.kind.get()),
            op: Op::from_wire(wire.op.get()),
            flags: wire.flags.get(),
            buf_alloc: wire.buf_alloc.get(),
            fwd_cnt: wire.fwd_cnt.get(),
        }
    }

    /// Encodes the header.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let wire = Wire {
            src_cid: self.src_cid.into(),
            dst_cid: self.dst_cid.into(),
            src_port: self.src_port.into(),
            dst_port: self.dst_port.into(),
            len: self.len.into(),
            kind: self.kind.to_wire().into(),
            op: self.op.to_wire().into(),
            flags: self.flags.into(),
            buf_alloc: self.buf_alloc.into(),
            fwd_cnt: self.fwd_cnt.into(),
        };
        zerocopy::transmute!(wire)
    }

    /// The RST that answers this packet, or `None` when it is an RST itself: an RST is never
    /// answered, or two peers would reset each other's next connection on the same ports.
    pub fn refusal(&self) -> Option<Header> {
        if self.op == Op::Rst {
            return None;
        }
        Some(Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            len: 0,
            kind: self.kind,
            op: Op::Rst,
            flags: 0,
            buf_alloc: 0,
            fwd_cnt: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn request() -> Header {
        Header {
            src_cid: 3,
            dst_cid: HOST_CID,
            src_port: 1024,
            dst_port: 22,
            len: 0,
            kind: Kind::Stream,
            op: Op::Request,
            flags: 0,
            buf_alloc: 262_144,
            fwd_cnt: 0,
        }
    }

    #[test]
    fn a_request_has_the_bytes_of_the_specification() {
        let bytes = request().encode();
        assert_eq!(bytes[0..8], 3u64.to_le_bytes());
        assert_eq!(bytes[8..16], 2u64.to_le_bytes());
        assert_eq!(bytes[16..20], 1024u32.to_le_bytes());
        assert_eq!(bytes[20..24], 22u32.to_le_bytes());
        assert_eq!(bytes[28..30], 1u16.to_le_bytes());
        assert_eq!(bytes[30..32], 1u16.to_le_bytes());
        assert_eq!(bytes[36..40], 262_144u32.to_le_bytes());
    }

    #[test]
    fn a_refusal_turns_the_addresses_round() {
        let rst = request().refusal().expect("a request is answered");
        assert_eq!((rst.src_cid, rst.dst_cid, rst.src_port, rst.dst_port), (HOST_CID, 3, 22, 1024));
        assert_eq!(rst.op, Op::Rst);
    }

    #[test]
    fn an_rst_is_never_answered() {
        assert_eq!(Header { op: Op::Rst, ..request() }.refusal(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_survive_decode_and_encode(bytes in proptest::array::uniform32(any::<u8>()), tail in proptest::array::uniform12(any::<u8>())) {
            let mut all = [0u8; HEADER_LEN];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&tail);
            prop_assert_eq!(Header::decode(&all).encode(), all);
        }
    }
}
