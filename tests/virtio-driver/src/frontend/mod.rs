//! vhost-user front end: what QEMU does on the socket, one method per message.
//!
//! Every message without a reply of its own asks for an acknowledgement once `REPLY_ACK` is negotiated, so a refusal
//! is seen where it happens ([`Error::Refused`]) and the next step starts after the daemon has taken the last one.
//! Every wait has a limit. Malformed traffic goes through [`Frontend::send_raw`] on the same connection.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use zerocopy::{FromBytes, Immutable, IntoBytes};

pub mod wire;

use crate::memory::{DpuMemory, Region};
use crate::ring::Ring;
use crate::{Error, Result};
use wire::{FLAG_NEED_REPLY, FLAG_REPLY, MemRegion, Message, Reply, Request, VringAddr, VringState};

/// `VIRTIO_RING_F_INDIRECT_DESC`.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_RING_F_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// `VIRTIO_F_VERSION_1`.
pub const F_VERSION_1: u64 = 1 << 32;

/// `VHOST_USER_PROTOCOL_F_MQ`.
pub const P_MQ: u64 = 1 << 0;
/// `VHOST_USER_PROTOCOL_F_LOG_SHMFD`.
pub const P_LOG_SHMFD: u64 = 1 << 1;
/// `VHOST_USER_PROTOCOL_F_REPLY_ACK`.
pub const P_REPLY_ACK: u64 = 1 << 3;
/// `VHOST_USER_PROTOCOL_F_BACKEND_REQ`.
pub const P_BACKEND_REQ: u64 = 1 << 5;
/// `VHOST_USER_PROTOCOL_F_CONFIG`.
pub const P_CONFIG: u64 = 1 << 9;
/// `VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`.
pub const P_INFLIGHT_SHMFD: u64 = 1 << 12;
/// `VHOST_USER_PROTOCOL_F_RESET_DEVICE`.
pub const P_RESET_DEVICE: u64 = 1 << 13;
/// `VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`.
pub const P_CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
/// `VHOST_USER_PROTOCOL_F_STATUS`.
pub const P_STATUS: u64 = 1 << 16;
/// `VHOST_USER_PROTOCOL_F_DEVICE_STATE`.
pub const P_DEVICE_STATE: u64 = 1 << 19;

/// Device status `ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK` (virtio 1.2, section 2.1).
pub const STATUS_RUNNING: u64 = 1 | 2 | 8 | 4;

/// Longest wait for one answer of the daemon.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A connection to a daemon.
#[derive(Debug)]
pub struct Frontend {
    socket: UnixStream,
    /// Protocol features in force.
    protocol: u64,
}

impl Frontend {
    /// Takes over a connected socket.
    pub fn new(socket: UnixStream) -> Result<Self> {
        socket
            .set_read_timeout(Some(ANSWER_LIMIT))
            .and_then(|()| socket.set_write_timeout(Some(ANSWER_LIMIT)))
            .map_err(|e| Error::os("set the socket's time limits", e))?;
        Ok(Frontend { socket, protocol: 0 })
    }

    /// The socket itself.
    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Protocol features in force.
    pub fn protocol(&self) -> u64 {
        self.protocol
    }

    /// Sends a message exactly as it is and does not wait for anything.
    pub fn send_raw(&self, message: &Message<'_>) -> Result<()> {
        wire::send(&self.socket, &message.to_bytes(), &message.fds, &format!("message {}", message.request))
    }

    /// Waits for whatever message the daemon sends next.
    pub fn receive_raw(&self) -> Result<Reply> {
        wire::receive(&self.socket, "a raw message", ANSWER_LIMIT)
    }

    /// Sends a request that has no reply of its own, and waits for the acknowledgement if one can be had.
    pub fn send(&self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut message = Message::new(request, payload);
        let acknowledged = self.protocol & P_REPLY_ACK != 0;
        if acknowledged {
            message.flags |= FLAG_NEED_REPLY;
        }
        let name = format!("{request:?}");
        wire::send(&self.socket, &message.to_bytes(), fds, &name)?;
        if !acknowledged {
            return Ok(());
        }
        match self.reply_to::<u64>(request)? {
            0 => Ok(()),
            code => Err(Error::Refused { request: name, code }),
        }
    }

    /// Sends a request and returns the structure it is answered with.
    pub fn ask<T: FromBytes + IntoBytes>(&self, request: Request, payload: &[u8]) -> Result<T> {
        let message = Message::new(request, payload);
        wire::send(&self.socket, &message.to_bytes(), &[], &format!("{request:?}"))?;
        self.reply_to(request)
    }

    fn reply_to<T: FromBytes>(&self, request: Request) -> Result<T> {
        let name = format!("{request:?}");
        let reply = wire::receive(&self.socket, &name, ANSWER_LIMIT)?;
        let problem = |problem: String| Error::VhostUser { request: name.clone(), problem };
        if reply.request != request as u32 || reply.flags & FLAG_REPLY == 0 {
            return Err(problem(format!(
                "answered by message {} with flags {:#x}",
                reply.request, reply.flags
            )));
        }
        T::read_from_bytes(&reply.payload)
            .map_err(|_| problem(format!("answered with {} bytes", reply.payload.len())))
    }

    /// `GET_FEATURES`.
    pub fn get_features(&self) -> Result<u64> {
        self.ask(Request::GetFeatures, &[])
    }

    /// `SET_FEATURES`.
    pub fn set_features(&self, features: u64) -> Result<()> {
        self.send(Request::SetFeatures, features.as_bytes(), &[])
    }

    /// `GET_PROTOCOL_FEATURES`.
    pub fn get_protocol_features(&self) -> Result<u64> {
        self.ask(Request::GetProtocolFeatures, &[])
    }

    /// `SET_PROTOCOL_FEATURES`; from here on messages use them.
    pub fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        self.send(Request::SetProtocolFeatures, features.as_bytes(), &[])?;
        self.protocol = features;
        Ok(())
    }

    /// `SET_OWNER`.
    pub fn set_owner(&self) -> Result<()> {
        self.send(Request::SetOwner, &[], &[])
    }

    /// `GET_QUEUE_NUM`: rings the daemon supports.
    pub fn get_queue_num(&self) -> Result<u64> {
        self.ask(Request::GetQueueNum, &[])
    }

    /// `RESET_DEVICE`.
    pub fn reset_device(&self) -> Result<()> {
        self.send(Request::ResetDevice, &[], &[])
    }

    /// `SET_MEM_TABLE` with all regions of `memory`.
    pub fn set_mem_table(&self, memory: &DpuMemory) -> Result<()> {
        let regions = memory.regions();
        let mut payload = [regions.len() as u32, 0].as_bytes().to_vec();
        for region in &regions {
            payload.extend_from_slice(describe(region).as_bytes());
        }
        let fds: Vec<_> = regions.iter().map(|region| region.fd()).collect();
        self.send(Request::SetMemTable, &payload, &fds)
    }

    /// `GET_MAX_MEM_SLOTS`.
    pub fn get_max_mem_slots(&self) -> Result<u64> {
        self.ask(Request::GetMaxMemSlots, &[])
    }

    /// `ADD_MEM_REG`: memory hot-add.
    pub fn add_mem_region(&self, region: &Region) -> Result<()> {
        self.send(Request::AddMemReg, &single(region), &[region.fd()])
    }

    /// `REM_MEM_REG`: memory hot-remove. QEMU sends the descriptor here too; the specification lets the daemon ignore
    /// it.
    pub fn remove_mem_region(&self, region: &Region) -> Result<()> {
        self.send(Request::RemMemReg, &single(region), &[])
    }

    /// `SET_VRING_NUM`.
    pub fn set_vring_num(&self, index: u32, size: u32) -> Result<()> {
        self.send(Request::SetVringNum, VringState { index, num: size }.as_bytes(), &[])
    }

    /// `SET_VRING_ADDR` with user addresses.
    pub fn set_vring_addr(&self, address: VringAddr) -> Result<()> {
        self.send(Request::SetVringAddr, address.as_bytes(), &[])
    }

    /// `SET_VRING_BASE`: available index to start from.
    pub fn set_vring_base(&self, index: u32, base: u32) -> Result<()> {
        self.send(Request::SetVringBase, VringState { index, num: base }.as_bytes(), &[])
    }

    /// `GET_VRING_BASE`: stops the ring and tells the next available index.
    pub fn get_vring_base(&self, index: u32) -> Result<u32> {
        let state: VringState = self.ask(Request::GetVringBase, VringState { index, num: 0 }.as_bytes())?;
        Ok(state.num)
    }

    /// `SET_VRING_KICK`.
    pub fn set_vring_kick(&self, index: u32, fd: BorrowedFd<'_>) -> Result<()> {
        self.send(Request::SetVringKick, u64::from(index).as_bytes(), &[fd])
    }

    /// `SET_VRING_CALL`.
    pub fn set_vring_call(&self, index: u32, fd: BorrowedFd<'_>) -> Result<()> {
        self.send(Request::SetVringCall, u64::from(index).as_bytes(), &[fd])
    }

    /// `SET_VRING_ERR`.
    pub fn set_vring_err(&self, index: u32, fd: BorrowedFd<'_>) -> Result<()> {
        self.send(Request::SetVringErr, u64::from(index).as_bytes(), &[fd])
    }

    /// `SET_VRING_ENABLE`.
    pub fn set_vring_enable(&self, index: u32, enable: bool) -> Result<()> {
        self.send(Request::SetVringEnable, VringState { index, num: enable.into() }.as_bytes(), &[])
    }

    /// `SET_STATUS`: the driver's device status.
    pub fn set_status(&self, status: u64) -> Result<()> {
        self.send(Request::SetStatus, status.as_bytes(), &[])
    }

    /// `GET_STATUS`.
    pub fn get_status(&self) -> Result<u64> {
        self.ask(Request::GetStatus, &[])
    }

    /// `GET_CONFIG`: `len` bytes of device configuration space from `offset`.
    pub fn get_config(&self, offset: u32, len: u32) -> Result<Vec<u8>> {
        let mut payload = [offset, len, 0].as_bytes().to_vec();
        payload.resize(12 + len as usize, 0);
        let message = Message::new(Request::GetConfig, &payload);
        wire::send(&self.socket, &message.to_bytes(), &[], "GetConfig")?;
        let reply = wire::receive(&self.socket, "GetConfig", ANSWER_LIMIT)?;
        match reply.payload.get(12..) {
            Some(bytes) if bytes.len() == len as usize => Ok(bytes.to_vec()),
            _ => Err(Error::VhostUser {
                request: "GetConfig".into(),
                problem: format!("answered with {} bytes", reply.payload.len()),
            }),
        }
    }

    /// `SET_LOG_BASE`: shares a dirty-page log; the daemon answers when it uses it.
    pub fn set_log_base(&self, size: u64, offset: u64, log: &OwnedFd) -> Result<()> {
        let payload = [size, offset];
        wire::send(
            &self.socket,
            &Message::new(Request::SetLogBase, payload.as_bytes()).to_bytes(),
            &[log.as_fd()],
            "SetLogBase",
        )?;
        wire::receive(&self.socket, "SetLogBase", ANSWER_LIMIT).map(drop)
    }

    /// Hands a ring to the daemon: size, addresses, base, eventfds, and enables it.
    pub fn start_ring(&self, index: u32, ring: &Ring) -> Result<()> {
        let [descriptor, available, used] = ring.addresses();
        self.set_vring_num(index, u32::from(ring.config().size))?;
        self.set_vring_addr(VringAddr { index, flags: 0, descriptor, used, available, log: 0 })?;
        self.set_vring_base(index, u32::from(ring.base()))?;
        self.set_vring_call(index, ring.call_fd())?;
        self.set_vring_kick(index, ring.kick_fd())?;
        self.set_vring_enable(index, true)
    }
}

/// A region as the daemon is told of it.
pub fn describe(region: &Region) -> MemRegion {
    MemRegion { gpa: region.gpa(), size: region.size() as u64, user: region.user_address(), offset: 0 }
}

/// Payload of `ADD_MEM_REG` and `REM_MEM_REG`: padding and one region.
fn single(region: &Region) -> Vec<u8> {
    let mut payload = vec![0; 8];
    payload.extend_from_slice(describe(region).as_bytes());
    payload
}

/// Structures as payload bytes, for raw messages.
pub fn payload<T: IntoBytes + Immutable>(value: &T) -> Vec<u8> {
    value.as_bytes().to_vec()
}
