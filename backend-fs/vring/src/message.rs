//! vhost-user messages: bytes to typed requests and replies to bytes. Pure.
//!
//! A message is a 12-byte header (request, flags, payload size), a payload, and file descriptors
//! that came as ancillary data. The header is checked first ([`Header::parse`]): a wrong version or
//! an oversized payload means that the stream cannot be followed any more and the connection ends.
//! Everything after that is recoverable: the payload was read, so the stream stays in step, and a
//! malformed request is an error *value* that the session answers with a negative acknowledgement.
//!
//! Layouts and numbers: QEMU `docs/interop/vhost-user.rst`. All numbers are in host byte order.
#![forbid(unsafe_code)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Size of a message header in bytes.
pub const HEADER_SIZE: usize = 12;

/// Largest payload that is read at all. A memory table of [`MAX_MEM_SLOTS`] regions fits.
pub const MAX_PAYLOAD: usize = 16 << 10;

/// Memory regions a front end may share (`VHOST_USER_GET_MAX_MEM_SLOTS`); what QEMU's own
/// library (libvhost-user, `VHOST_USER_MAX_RAM_SLOTS`) offers on x86.
pub const MAX_MEM_SLOTS: usize = 509;

/// Most file descriptors one message can carry: `SCM_MAX_FD` of the kernel (`include/net/scm.h`).
pub const MAX_FDS: usize = 253;

/// Largest device configuration space: `VHOST_USER_MAX_CONFIG_SIZE` of the specification.
pub const MAX_CONFIG: usize = 256;

/// Virtio and vhost feature bits (`VHOST_USER_SET_FEATURES`), as masks.
pub mod feature {
    /// `VHOST_F_LOG_ALL`: writes to DPU memory are recorded in the dirty log.
    pub const LOG_ALL: u64 = 1 << 26;
    /// `VIRTIO_RING_F_INDIRECT_DESC`, virtio 1.2 section 2.7.5.3.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_RING_F_EVENT_IDX`, virtio 1.2 section 2.7.7.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VHOST_USER_F_PROTOCOL_FEATURES`.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// `VIRTIO_F_VERSION_1`.
    pub const VERSION_1: u64 = 1 << 32;
}

bitflags::bitflags! {
    /// vhost-user protocol features (`VHOST_USER_SET_PROTOCOL_FEATURES`).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct ProtocolFeatures: u64 {
        /// Number of queues can be asked for.
        const MQ = 1 << 0;
        /// The dirty log comes as a file descriptor.
        const LOG_SHMFD = 1 << 1;
        /// Any request can ask for an acknowledgement.
        const REPLY_ACK = 1 << 3;
        /// Requests from the back end to the front end.
        const BACKEND_REQ = 1 << 5;
        /// Device configuration space.
        const CONFIG = 1 << 9;
        /// `VHOST_USER_RESET_DEVICE`.
        const RESET_DEVICE = 1 << 13;
        /// Memory regions are added and removed one by one.
        const CONFIGURE_MEM_SLOTS = 1 << 15;
        /// Device status is passed on.
        const STATUS = 1 << 16;
    }
}

/// Flags of a header: protocol version in the two lowest bits.
const VERSION_MASK: u32 = 0x3;
const VERSION: u32 = 0x1;
const FLAG_REPLY: u32 = 0x4;
const FLAG_NEED_REPLY: u32 = 0x8;

/// In the payload of `SET_VRING_{KICK,CALL,ERR}`: queue index and "no descriptor attached".
const VRING_INDEX_MASK: u64 = 0xff;
const VRING_NO_FD: u64 = 1 << 8;

/// Why the stream cannot be followed any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// Another protocol version than 1.
    #[error("message {request}: vhost-user protocol version {version}, only version 1 exists")]
    Version {
        /// Request number.
        request: u32,
        /// Version that was claimed.
        version: u32,
    },
    /// A payload that no request of the protocol has.
    #[error("message {request}: payload of {size} bytes, at most {MAX_PAYLOAD} are possible")]
    Oversize {
        /// Request number.
        request: u32,
        /// Size that was claimed.
        size: u32,
    },
    /// A reply on the channel where only requests come in.
    #[error("message {request}: a reply came where a request was expected")]
    Reply {
        /// Request number.
        request: u32,
    },
}

/// A checked message header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Request number.
    pub request: u32,
    /// The front end asks for an acknowledgement (only with [`ProtocolFeatures::REPLY_ACK`]).
    pub need_reply: bool,
    /// Payload bytes that follow.
    pub size: usize,
}

#[repr(C)]
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
struct RawHeader {
    request: u32,
    flags: u32,
    size: u32,
}

impl Header {
    /// Checks the header of a request.
    ///
    /// # Errors
    /// [`HeaderError`]: the connection cannot go on.
    pub fn parse(bytes: &[u8; HEADER_SIZE]) -> Result<Header, HeaderError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        let request = raw.request;
        if raw.flags & VERSION_MASK != VERSION {
            return Err(HeaderError::Version { request, version: raw.flags & VERSION_MASK });
        }
        if raw.flags & FLAG_REPLY != 0 {
            return Err(HeaderError::Reply { request });
        }
        if raw.size as usize > MAX_PAYLOAD {
            return Err(HeaderError::Oversize { request, size: raw.size });
        }
        Ok(Header { request, need_reply: raw.flags & FLAG_NEED_REPLY != 0, size: raw.size as usize })
    }

    /// The header as bytes, as a front end sends it.
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let flags = VERSION | if self.need_reply { FLAG_NEED_REPLY } else { 0 };
        zerocopy::transmute!(RawHeader { request: self.request, flags, size: self.size as u32 })
    }
}

/// One region of DPU memory as the front end describes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryRegion {
    /// DPU physical address of the first byte.
    pub dpu_addr: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front end itself sees the region; ring addresses are given in these terms.
    pub user_addr: u64,
    /// Offset of the region in its file descriptor.
    pub mmap_offset: u64,
}

/// `VHOST_USER_SET_VRING_ADDR`: where a ring lies, in the front end's own addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VringAddress {
    /// Queue.
    pub index: u32,
    /// Bit 0: log writes to the used ring.
    pub flags: u32,
    /// Descriptor table.
    pub descriptor: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// DPU physical address of the used ring, for the dirty log.
    pub log: u64,
}

/// `VHOST_VRING_F_LOG` in [`VringAddress::flags`].
pub const VRING_F_LOG: u32 = 1;

/// A queue and a number that belongs to it (size, index of the next descriptor, enabled).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VringState {
    /// Queue.
    pub index: u32,
    /// The number.
    pub num: u32,
}

/// Size and place of the dirty log in its file descriptor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LogArea {
    /// Bytes of the log (one bit per 4 KiB page).
    pub size: u64,
    /// Offset in the descriptor.
    pub offset: u64,
}

/// Head of `GET_CONFIG` and `SET_CONFIG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ConfigRange {
    /// First byte of the configuration space.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// 0: ordinary access, 1: live migration.
    pub flags: u32,
}

/// A queue whose event descriptor is replaced; without a descriptor the queue is polled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VringFd {
    /// Queue.
    pub index: u8,
    /// A descriptor came with the message.
    pub has_fd: bool,
}

/// A parsed request. Descriptors travel beside it; their number was checked here.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "one variant per request of the specification, named after it")]
pub enum Request<'a> {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    /// One descriptor per region, in order.
    SetMemTable(&'a [MemoryRegion]),
    /// `None`: the old form without shared memory, which only names an address.
    SetLogBase(Option<LogArea>),
    SetLogFd,
    SetVringNum(VringState),
    SetVringAddr(VringAddress),
    SetVringBase(VringState),
    GetVringBase(VringState),
    SetVringKick(VringFd),
    SetVringCall(VringFd),
    SetVringErr(VringFd),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(VringState),
    SetBackendReqFd,
    GetConfig(ConfigRange),
    SetConfig(ConfigRange, &'a [u8]),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(MemoryRegion),
    RemMemReg(MemoryRegion),
    SetStatus(u64),
    GetStatus,
    /// A request this side does not know, by number.
    Unknown(u32),
}

/// Why a request is malformed. The stream is still in step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Payload too short, too long, or of the wrong inner length.
    #[error("{name}: payload of {size} bytes does not fit the request")]
    Payload {
        /// Request.
        name: &'static str,
        /// Payload bytes that came.
        size: usize,
    },
    /// Too few or too many file descriptors.
    #[error("{name}: {fds} file descriptors came with it, {expected} belong to it")]
    Fds {
        /// Request.
        name: &'static str,
        /// Descriptors that came.
        fds: usize,
        /// Descriptors the request has.
        expected: usize,
    },
    /// More regions than there are slots.
    #[error("{name}: {regions} memory regions, possible are 1 to {MAX_MEM_SLOTS}")]
    Regions {
        /// Request.
        name: &'static str,
        /// Regions announced.
        regions: usize,
    },
}

/// Number of the request, for replies and for tests that play the front end.
pub mod number {
    #![allow(missing_docs, reason = "the request numbers of the specification")]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
}

/// Name of a request number, for messages.
pub fn name(request: u32) -> &'static str {
    match request {
        number::GET_FEATURES => "GET_FEATURES",
        number::SET_FEATURES => "SET_FEATURES",
        number::SET_OWNER => "SET_OWNER",
        number::RESET_OWNER => "RESET_OWNER",
        number::SET_MEM_TABLE => "SET_MEM_TABLE",
        number::SET_LOG_BASE => "SET_LOG_BASE",
        number::SET_LOG_FD => "SET_LOG_FD",
        number::SET_VRING_NUM => "SET_VRING_NUM",
        number::SET_VRING_ADDR => "SET_VRING_ADDR",
        number::SET_VRING_BASE => "SET_VRING_BASE",
        number::GET_VRING_BASE => "GET_VRING_BASE",
        number::SET_VRING_KICK => "SET_VRING_KICK",
        number::SET_VRING_CALL => "SET_VRING_CALL",
        number::SET_VRING_ERR => "SET_VRING_ERR",
        number::GET_PROTOCOL_FEATURES => "GET_PROTOCOL_FEATURES",
        number::SET_PROTOCOL_FEATURES => "SET_PROTOCOL_FEATURES",
        number::GET_QUEUE_NUM => "GET_QUEUE_NUM",
        number::SET_VRING_ENABLE => "SET_VRING_ENABLE",
        number::SET_BACKEND_REQ_FD => "SET_BACKEND_REQ_FD",
        number::GET_CONFIG => "GET_CONFIG",
        number::SET_CONFIG => "SET_CONFIG",
        number::RESET_DEVICE => "RESET_DEVICE",
        number::GET_MAX_MEM_SLOTS => "GET_MAX_MEM_SLOTS",
        number::ADD_MEM_REG => "ADD_MEM_REG",
        number::REM_MEM_REG => "REM_MEM_REG",
        number::SET_STATUS => "SET_STATUS",
        number::GET_STATUS => "GET_STATUS",
        _ => "unknown request",
    }
}

/// Whether the request has a reply of its own, apart from acknowledgements.
pub fn has_own_reply(request: u32) -> bool {
    matches!(
        request,
        number::GET_FEATURES
            | number::GET_VRING_BASE
            | number::GET_PROTOCOL_FEATURES
            | number::GET_QUEUE_NUM
            | number::GET_CONFIG
            | number::GET_MAX_MEM_SLOTS
            | number::GET_STATUS
    )
}

/// Payload and descriptor count of one message, taken apart step by step.
struct Parts<'a> {
    name: &'static str,
    payload: &'a [u8],
    fds: usize,
}

impl<'a> Parts<'a> {
    fn fds(&self, expected: usize) -> Result<(), RequestError> {
        if self.fds == expected {
            Ok(())
        } else {
            Err(RequestError::Fds { name: self.name, fds: self.fds, expected })
        }
    }

    fn malformed(&self) -> RequestError {
        RequestError::Payload { name: self.name, size: self.payload.len() }
    }

    fn exactly<T: FromBytes + Immutable + KnownLayout>(&self) -> Result<T, RequestError> {
        T::read_from_bytes(self.payload).map_err(|_| self.malformed())
    }

    fn prefix<T: FromBytes + Immutable + KnownLayout>(&self) -> Result<(T, &'a [u8]), RequestError> {
        T::read_from_prefix(self.payload).map_err(|_| self.malformed())
    }

    /// A plain value with no descriptors.
    fn value<T: FromBytes + Immutable + KnownLayout>(&self) -> Result<T, RequestError> {
        self.fds(0)?;
        self.exactly()
    }

    fn nothing(&self, request: Request<'a>) -> Result<Request<'a>, RequestError> {
        self.fds(0)?;
        if self.payload.is_empty() { Ok(request) } else { Err(self.malformed()) }
    }

    fn vring_fd(&self) -> Result<VringFd, RequestError> {
        let value: u64 = self.exactly()?;
        let has_fd = value & VRING_NO_FD == 0;
        self.fds(usize::from(has_fd))?;
        Ok(VringFd { index: (value & VRING_INDEX_MASK) as u8, has_fd })
    }

    /// The padded single region of `ADD_MEM_REG` and `REM_MEM_REG`.
    fn single_region(&self) -> Result<MemoryRegion, RequestError> {
        let (_padding, rest) = self.prefix::<u64>()?;
        MemoryRegion::read_from_bytes(rest).map_err(|_| self.malformed())
    }

    fn mem_table(&self) -> Result<&'a [MemoryRegion], RequestError> {
        let ([count, _padding], rest) = self.prefix::<[u32; 2]>()?;
        let regions = count as usize;
        if regions == 0 || regions > MAX_MEM_SLOTS {
            return Err(RequestError::Regions { name: self.name, regions });
        }
        // Exactly the announced regions: some front ends send the unused rest of a fixed array, too.
        let table = rest.get(..regions * size_of::<MemoryRegion>()).ok_or_else(|| self.malformed())?;
        self.fds(regions)?;
        <[MemoryRegion]>::ref_from_bytes(table).map_err(|_| self.malformed())
    }

    fn config(&self) -> Result<(ConfigRange, &'a [u8]), RequestError> {
        self.fds(0)?;
        let (range, data) = self.prefix::<ConfigRange>()?;
        let end = range.offset.checked_add(range.size).ok_or_else(|| self.malformed())?;
        if range.size == 0 || end as usize > MAX_CONFIG {
            return Err(self.malformed());
        }
        Ok((range, data))
    }
}

/// A payload buffer that is aligned so that memory regions can be read in place.
#[repr(C, align(8))]
#[derive(Debug)]
pub struct PayloadBuffer(pub [u8; MAX_PAYLOAD]);

impl<'a> Request<'a> {
    /// Parses a request whose header was accepted. `payload` must lie 8-byte aligned
    /// ([`PayloadBuffer`]); `fds` is the number of descriptors that came with the message.
    ///
    /// # Errors
    /// [`RequestError`]: answer with a negative acknowledgement, the stream is in step.
    pub fn parse(request: u32, payload: &'a [u8], fds: usize) -> Result<Request<'a>, RequestError> {
        let p = Parts { name: name(request), payload, fds };
        match request {
            number::GET_FEATURES => p.nothing(Request::GetFeatures),
            number::SET_FEATURES => p.value().map(Request::SetFeatures),
            number::SET_OWNER => p.nothing(Request::SetOwner),
            number::RESET_OWNER => p.nothing(Request::ResetOwner),
            number::SET_MEM_TABLE => p.mem_table().map(Request::SetMemTable),
            number::SET_LOG_BASE if payload.len() == size_of::<LogArea>() => {
                p.fds(1)?;
                p.exactly().map(|area| Request::SetLogBase(Some(area)))
            }
            number::SET_LOG_BASE => p.value::<u64>().map(|_| Request::SetLogBase(None)),
            number::SET_LOG_FD => {
                p.fds(1)?;
                if payload.is_empty() { Ok(Request::SetLogFd) } else { Err(p.malformed()) }
            }
            number::SET_VRING_NUM => p.value().map(Request::SetVringNum),
            number::SET_VRING_ADDR => p.value().map(Request::SetVringAddr),
            number::SET_VRING_BASE => p.value().map(Request::SetVringBase),
            number::GET_VRING_BASE => p.value().map(Request::GetVringBase),
            number::SET_VRING_KICK => p.vring_fd().map(Request::SetVringKick),
            number::SET_VRING_CALL => p.vring_fd().map(Request::SetVringCall),
            number::SET_VRING_ERR => p.vring_fd().map(Request::SetVringErr),
            number::GET_PROTOCOL_FEATURES => p.nothing(Request::GetProtocolFeatures),
            number::SET_PROTOCOL_FEATURES => p.value().map(Request::SetProtocolFeatures),
            number::GET_QUEUE_NUM => p.nothing(Request::GetQueueNum),
            number::SET_VRING_ENABLE => p.value().map(Request::SetVringEnable),
            number::SET_BACKEND_REQ_FD => {
                p.fds(1)?;
                if payload.is_empty() { Ok(Request::SetBackendReqFd) } else { Err(p.malformed()) }
            }
            number::GET_CONFIG => {
                let (range, data) = p.config()?;
                // The front end sends a buffer of the size it asks for, or none.
                if !data.is_empty() && data.len() != range.size as usize {
                    return Err(p.malformed());
                }
                Ok(Request::GetConfig(range))
            }
            number::SET_CONFIG => {
                let (range, data) = p.config()?;
                if data.len() != range.size as usize {
                    return Err(p.malformed());
                }
                Ok(Request::SetConfig(range, data))
            }
            number::RESET_DEVICE => p.nothing(Request::ResetDevice),
            number::GET_MAX_MEM_SLOTS => p.nothing(Request::GetMaxMemSlots),
            number::ADD_MEM_REG => {
                p.fds(1)?;
                p.single_region().map(Request::AddMemReg)
            }
            number::REM_MEM_REG => {
                // The specification wants none, older front ends send one; it is closed unused.
                if fds > 1 {
                    return p.fds(0).map(|()| Request::Unknown(request));
                }
                p.single_region().map(Request::RemMemReg)
            }
            number::SET_STATUS => p.value().map(Request::SetStatus),
            number::GET_STATUS => p.nothing(Request::GetStatus),
            other => Ok(Request::Unknown(other)),
        }
    }
}

/// Payload of a reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply<'a> {
    /// A number; also the form of acknowledgements (0 success, 1 failure).
    U64(u64),
    /// Answer to `GET_VRING_BASE`.
    Vring(VringState),
    /// Answer to `SET_LOG_BASE`: the area as it was asked for.
    Log(LogArea),
    /// Answer to `GET_CONFIG`.
    Config(ConfigRange, &'a [u8]),
    /// No payload: how requests with a reply of their own fail.
    Empty,
}

/// Bytes of the longest reply.
pub const MAX_REPLY: usize = HEADER_SIZE + size_of::<ConfigRange>() + MAX_CONFIG;

impl Reply<'_> {
    /// The whole reply message to `request`.
    pub fn encode(&self, request: u32) -> arrayvec::ArrayVec<u8, MAX_REPLY> {
        let mut payload = arrayvec::ArrayVec::<u8, { MAX_REPLY - HEADER_SIZE }>::new();
        match self {
            Reply::U64(value) => payload.extend(value.as_bytes().iter().copied()),
            Reply::Vring(state) => payload.extend(state.as_bytes().iter().copied()),
            Reply::Log(area) => payload.extend(area.as_bytes().iter().copied()),
            Reply::Config(range, data) => {
                payload.extend(range.as_bytes().iter().copied());
                payload.extend(data.iter().copied().take(MAX_CONFIG));
            }
            Reply::Empty => {}
        }
        let header = RawHeader { request, flags: VERSION | FLAG_REPLY, size: payload.len() as u32 };
        let mut message = arrayvec::ArrayVec::new();
        message.extend(header.as_bytes().iter().copied());
        message.extend(payload);
        message
    }
}

#[cfg(test)]
mod tests;
