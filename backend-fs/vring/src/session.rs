//! One front end, from connect to disconnect: negotiation, memory and queue set-up, start and stop.
//!
//! # Roles
//! The front end (QEMU, or a DPU's device model) sends requests; a [`Device`] is called downward to
//! do what follows from them. All of it happens on the thread that calls [`run`]; queues run on
//! threads of the device, which get a [`Ring`] by [`Device::start`] and give it back by
//! [`Device::pause`] (chains in flight stay out) or [`Device::stop`] (after they came back).
//!
//! # A queue's states
//! ```text
//!           size, addresses, kick, enabled          GET_VRING_BASE, reset
//! stopped ────────────────────────────────► running ───────────────────────► stopped
//!                                           │  ▲
//!                                           └──┘ pause, change, start: memory table, kick, call,
//!                                                err, log, enable
//! ```
//! While a queue runs, its size, base and addresses are fixed; a request that changes them is refused.
//! A queue is enabled by `SET_VRING_ENABLE`, or by `SET_FEATURES` without `PROTOCOL_FEATURES`.
//!
//! # Refusals
//! A request that is malformed, not legal now, or impossible is *refused*: nothing changes, it is
//! logged, its descriptors are closed, and it is answered with a negative acknowledgement where one
//! was asked for. The session ends only when the stream cannot be followed, when memory is lost, or
//! when a memory region is refused and the front end would not learn of it.
#![forbid(unsafe_code)]

mod queues;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::connection::{Connection, ConnectionError, Received};
use crate::memory::{DirtyLog, DpuMemory, MemoryError};
use crate::message::{
    self, ConfigRange, MAX_MEM_SLOTS, MemoryRegion, PayloadBuffer, ProtocolFeatures, Reply, Request,
    RequestError, feature,
};
use crate::ring::{Ring, RingError};

pub use crate::connection::Stop;

/// Most queues of a device: queue numbers have eight bits in `SET_VRING_KICK`.
pub const MAX_QUEUES: u16 = 256;

/// Refused requests of one session that are logged; the rest is only counted.
const LOGGED_REFUSALS: u64 = 100;

/// `VIRTIO_CONFIG_S_FEATURES_OK`.
const STATUS_FEATURES_OK: u8 = 8;

/// A virtio device: what it offers, and its queues.
pub trait Device {
    /// Virtio feature bits this device offers, ring features included. The session adds the bits that
    /// belong to vhost-user itself.
    fn features(&self) -> u64;

    /// Number of queues, at most [`MAX_QUEUES`].
    fn queues(&self) -> u16;

    /// Largest size of a queue, a power of two.
    fn max_queue_size(&self) -> u32;

    /// Configuration space; `None` leaves it to the front end (`CONFIG` is then not offered).
    fn config(&self) -> Option<&[u8]>;

    /// Looks at a region before it is mapped.
    ///
    /// # Errors
    /// Why the device cannot work in it, and what to change in the front end. The region is refused.
    fn check_region(&mut self, region: &MemoryRegion, fd: BorrowedFd<'_>) -> Result<(), String>;

    /// The memory table changed; for logs.
    fn memory_changed(&mut self, memory: &DpuMemory);

    /// Serves a queue from now on. It may have work already.
    ///
    /// # Errors
    /// When no thread can be had for it; the ring is gone then.
    fn start(&mut self, index: u16, ring: Ring) -> io::Result<()>;

    /// Takes a queue's ring back between two requests; `None` when that takes too long, and the ring stays
    /// where it is. Chains in flight are completed after it is started again.
    fn pause(&mut self, index: u16) -> Option<Ring>;

    /// Takes a queue's ring back when no chain is in flight any more (within a time limit).
    fn stop(&mut self, index: u16) -> Option<Ring>;

    /// The DPU reset the device: all of its state goes. Queues were stopped before.
    fn reset(&mut self);
}

/// Why a session ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The front end closed the connection.
    Disconnected,
    /// [`Stop`] was triggered.
    Stopped,
}

/// Why a session ended badly.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The stream cannot be followed.
    #[error(transparent)]
    Connection(#[from] ConnectionError),
    /// The front end shrank a file whose memory it had shared.
    #[error("the front end took shared DPU memory away; requests may have seen zeroes, so the session ends")]
    MemoryLost,
    /// Memory was refused and the front end did not ask for an answer.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

impl From<io::Error> for SessionError {
    fn from(error: io::Error) -> Self {
        SessionError::Connection(error.into())
    }
}

/// Why a request was refused.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Malformed(#[from] RequestError),
    #[error("it comes before SET_OWNER")]
    NoOwner,
    #[error("protocol feature {0:?} was not negotiated")]
    NotNegotiated(ProtocolFeatures),
    #[error("bits {0:#x} were not offered")]
    NotOffered(u64),
    #[error("bits {0:#x} cannot change while queues run")]
    FeaturesFixed(u64),
    #[error("it came without a file descriptor")]
    NoFd,
    #[error("there is no queue {0}")]
    NoQueue(u32),
    #[error("queue {0} runs")]
    Running(u16),
    #[error("queue {0} is stuck in a request")]
    Stuck(u16),
    #[error("{0} is not a possible value")]
    Value(u64),
    #[error("the configuration space is read-only")]
    ReadOnlyConfig,
    #[error("the range lies outside of the configuration space")]
    OutsideConfig,
    #[error("there is no usable dirty log")]
    NoLog,
    #[error(transparent)]
    Ring(#[from] RingError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error("cannot start the queue: {0}")]
    Start(io::Error),
    #[error("this back end does not know the request")]
    Unknown,
}

/// A reply of the request's own, ready to send; `None`: an acknowledgement, if one was asked for.
type Answer = Option<ReplyBytes>;
type ReplyBytes = arrayvec::ArrayVec<u8, { message::MAX_REPLY }>;

struct Session<'d, D: Device> {
    device: &'d mut D,
    memory: Arc<DpuMemory>,
    queues: Vec<queues::Queue>,
    owner: bool,
    features: u64,
    features_set: bool,
    protocol: ProtocolFeatures,
    status: u8,
    log: Option<Arc<DirtyLog>>,
    log_failed: bool,
    refusals: u64,
}

/// Serves one connected front end until it goes or `stop` is triggered. Queues that run at the end are
/// left to the device.
///
/// # Errors
/// [`SessionError`] when the session could not go on.
pub fn run<D: Device>(stream: &UnixStream, device: &mut D, stop: &Stop) -> Result<End, SessionError> {
    let memory = Arc::new(DpuMemory::empty()?);
    let connection = Connection::new(stream, stop, memory.lost_event())?;
    let queues = (0..device.queues().min(MAX_QUEUES)).map(|_| queues::Queue::default()).collect();
    let mut session = Session {
        device,
        memory,
        queues,
        owner: false,
        features: 0,
        features_set: false,
        protocol: ProtocolFeatures::empty(),
        status: 0,
        log: None,
        log_failed: false,
        refusals: 0,
    };
    let end = session.follow(&connection);
    session.log_totals();
    end
}

impl<D: Device> Session<'_, D> {
    /// Serves requests until there are no more.
    fn follow(&mut self, connection: &Connection<'_>) -> Result<End, SessionError> {
        let mut payload = Box::new(PayloadBuffer([0; message::MAX_PAYLOAD]));
        let mut fds = Vec::new();
        loop {
            let header = match connection.receive(&mut payload, &mut fds)? {
                Received::Message(header) => header,
                other => return ended(other),
            };
            let reply = self.serve(&header, &payload.0[..header.size], &mut fds)?;
            fds.clear();
            if let Some(reply) = reply
                && let Some(other) = connection.send(&reply)?
            {
                return ended(other);
            }
        }
    }
}

fn ended(why: Received) -> Result<End, SessionError> {
    match why {
        Received::Stopped => Ok(End::Stopped),
        Received::Watched => Err(SessionError::MemoryLost),
        Received::Closed | Received::Message(_) => Ok(End::Disconnected),
    }
}

impl<D: Device> Session<'_, D> {
    /// Serves one request. What is left in `fds` was not wanted.
    fn serve(
        &mut self,
        header: &message::Header,
        payload: &[u8],
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Option<ReplyBytes>, SessionError> {
        let number = header.request;
        let result = Request::parse(number, payload, fds.len())
            .map_err(Refused::from)
            .and_then(|request| self.handle(number, &request, fds));
        let acknowledge = header.need_reply && self.protocol.contains(ProtocolFeatures::REPLY_ACK);
        match result {
            Ok(Some(reply)) => Ok(Some(reply)),
            Ok(None) => Ok(acknowledge.then(|| Reply::U64(0).encode(number))),
            Err(refused) => {
                self.log_refusal(number, &refused);
                // With a shared log SET_LOG_BASE always has a reply, too.
                let log_reply = number == message::number::SET_LOG_BASE
                    && self.protocol.contains(ProtocolFeatures::LOG_SHMFD);
                if message::has_own_reply(number) || log_reply {
                    Ok(Some(Reply::Empty.encode(number)))
                } else if acknowledge {
                    Ok(Some(Reply::U64(1).encode(number)))
                } else if let Refused::Memory(error) = refused
                    && matches!(number, message::number::SET_MEM_TABLE | message::number::ADD_MEM_REG)
                {
                    // Without an answer the front end would wait for a device that cannot work.
                    Err(error.into())
                } else {
                    Ok(None)
                }
            }
        }
    }

    fn check_region(&mut self, region: &MemoryRegion, fd: BorrowedFd<'_>) -> Result<(), MemoryError> {
        let addr = region.dpu_addr;
        self.device.check_region(region, fd).map_err(|why| MemoryError::Unfit { addr, why })
    }

    fn log_refusal(&mut self, number: u32, refused: &Refused) {
        self.refusals += 1;
        if self.refusals <= LOGGED_REFUSALS {
            let name = message::name(number);
            tracing::warn!(request = number, "vhost-user {name} refused: {refused}");
        }
        if self.refusals == LOGGED_REFUSALS {
            tracing::warn!("further refused requests of this front end are not logged");
        }
    }

    fn handle(
        &mut self,
        number: u32,
        request: &Request<'_>,
        fds: &mut Vec<OwnedFd>,
    ) -> Result<Answer, Refused> {
        self.check_legal(request)?;
        let reply = |value: u64| Ok(Some(Reply::U64(value).encode(number)));
        match *request {
            Request::GetFeatures => return reply(self.offered()),
            Request::GetProtocolFeatures => return reply(self.offered_protocol().bits()),
            Request::GetQueueNum => return reply(self.queues.len() as u64),
            Request::GetMaxMemSlots => return reply(MAX_MEM_SLOTS as u64),
            Request::GetStatus => return reply(u64::from(self.status)),
            Request::GetConfig(range) => {
                return Ok(Some(Reply::Config(range, self.config(range)?).encode(number)));
            }
            Request::GetVringBase(state) => {
                let state = self.get_vring_base(state)?;
                return Ok(Some(Reply::Vring(state).encode(number)));
            }
            Request::SetLogBase(area) => {
                let area = self.set_log_base(area, fds)?;
                return Ok(area.map(|area| Reply::Log(area).encode(number)));
            }
            Request::SetFeatures(features) => self.set_features(features)?,
            Request::SetProtocolFeatures(bits) => {
                let refused = bits & !self.offered_protocol().bits();
                if refused != 0 {
                    return Err(Refused::NotOffered(refused));
                }
                self.protocol = ProtocolFeatures::from_bits_truncate(bits);
            }
            Request::SetOwner => self.owner = true,
            // Deprecated; the specification recommends to disable all rings.
            Request::ResetOwner => self.stop_all(),
            Request::SetMemTable(regions) => {
                let table = regions.iter().copied().zip(fds.iter().map(AsFd::as_fd));
                for (region, fd) in table.clone() {
                    self.check_region(&region, fd)?;
                }
                let memory = self.memory.with_regions(table)?;
                self.change_memory(memory);
            }
            Request::AddMemReg(region) => {
                let fd = fds.first().ok_or(Refused::NoFd)?;
                self.check_region(&region, fd.as_fd())?;
                let memory = self.memory.with_region(region, fd.as_fd())?;
                self.change_memory(memory);
            }
            Request::RemMemReg(region) => {
                let memory = self.memory.without_region(region)?;
                self.change_memory(memory);
            }
            // The front end may be told of changes to the log by an event; it reads the log anyway.
            Request::SetLogFd => {}
            Request::SetVringNum(state) => self.set_vring_num(state)?,
            Request::SetVringAddr(address) => self.set_vring_addr(&address)?,
            Request::SetVringBase(state) => self.set_vring_base(state)?,
            Request::SetVringKick(which) => self.set_vring_kick(which, fds.pop())?,
            Request::SetVringCall(which) => self.set_vring_call(which, fds.pop())?,
            Request::SetVringErr(which) => self.set_vring_err(which, fds.pop())?,
            Request::SetVringEnable(state) => self.set_vring_enable(state)?,
            // Nothing of the space is writable; a migration may write back what is there.
            Request::SetConfig(range, data) if self.config(range)? == data => {}
            Request::SetConfig(..) => return Err(Refused::ReadOnlyConfig),
            Request::SetStatus(status) => self.set_status(status)?,
            Request::ResetDevice => {
                self.stop_all();
                self.forget_queues();
                self.features = 0;
                self.features_set = false;
                self.status = 0;
                self.device.reset();
            }
            Request::SetBackendReqFd => return Err(Refused::NotNegotiated(ProtocolFeatures::BACKEND_REQ)),
            Request::Unknown(_) => return Err(Refused::Unknown),
        }
        Ok(None)
    }

    /// Whether the request may come in this state of the negotiation.
    fn check_legal(&self, request: &Request<'_>) -> Result<(), Refused> {
        let early = matches!(
            request,
            Request::GetFeatures
                | Request::SetOwner
                | Request::ResetOwner
                | Request::GetProtocolFeatures
                | Request::SetProtocolFeatures(_)
                | Request::GetQueueNum
                | Request::GetMaxMemSlots
                | Request::GetConfig(_)
                | Request::SetBackendReqFd
                | Request::Unknown(_)
        );
        if !early && !self.owner {
            return Err(Refused::NoOwner);
        }
        let needed = match request {
            Request::GetConfig(_) | Request::SetConfig(..) => ProtocolFeatures::CONFIG,
            Request::ResetDevice => ProtocolFeatures::RESET_DEVICE,
            Request::GetMaxMemSlots | Request::AddMemReg(_) | Request::RemMemReg(_) => {
                ProtocolFeatures::CONFIGURE_MEM_SLOTS
            }
            Request::SetStatus(_) | Request::GetStatus => ProtocolFeatures::STATUS,
            Request::SetLogBase(Some(_)) => ProtocolFeatures::LOG_SHMFD,
            _ => ProtocolFeatures::empty(),
        };
        if self.protocol.contains(needed) { Ok(()) } else { Err(Refused::NotNegotiated(needed)) }
    }

    fn offered(&self) -> u64 {
        self.device.features() | feature::LOG_ALL | feature::PROTOCOL_FEATURES
    }

    fn offered_protocol(&self) -> ProtocolFeatures {
        let mut offered = ProtocolFeatures::MQ
            | ProtocolFeatures::LOG_SHMFD
            | ProtocolFeatures::REPLY_ACK
            | ProtocolFeatures::RESET_DEVICE
            | ProtocolFeatures::CONFIGURE_MEM_SLOTS
            | ProtocolFeatures::STATUS;
        offered.set(ProtocolFeatures::CONFIG, self.device.config().is_some());
        offered
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refused> {
        let refused = features & !self.offered();
        if refused != 0 {
            return Err(Refused::NotOffered(refused));
        }
        if features & feature::LOG_ALL != 0 && self.log_failed {
            return Err(Refused::NoLog);
        }
        // Live migration switches logging on and off; everything else is fixed while a ring runs.
        let changed = (features ^ self.features) & !(feature::LOG_ALL | feature::PROTOCOL_FEATURES);
        if changed != 0 && self.queues.iter().any(|queue| queue.running) {
            return Err(Refused::FeaturesFixed(changed));
        }
        self.features = features;
        self.features_set = true;
        self.apply_logs()?;
        if features & feature::PROTOCOL_FEATURES == 0 {
            for index in 0..self.queues.len() as u16 {
                self.enable(index, true)?;
            }
        }
        Ok(())
    }

    fn set_status(&mut self, status: u64) -> Result<(), Refused> {
        let mut status = u8::try_from(status).map_err(|_| Refused::Value(status))?;
        if !self.features_set {
            status &= !STATUS_FEATURES_OK;
        }
        self.status = status;
        if status == 0 {
            // The front end stops the device, for a reset or only while the DPU pauses: queues go, what
            // the DPU built up on this device stays (RESET_DEVICE drops that).
            self.stop_all();
            self.forget_queues();
        }
        Ok(())
    }

    fn config(&self, range: ConfigRange) -> Result<&[u8], Refused> {
        let config = self.device.config().unwrap_or_default();
        let (start, end) = (range.offset as usize, range.offset as usize + range.size as usize);
        config.get(start..end).ok_or(Refused::OutsideConfig)
    }
}

#[cfg(test)]
mod tests;
