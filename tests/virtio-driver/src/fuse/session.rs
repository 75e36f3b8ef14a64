//! A mounted file system as the DPU's kernel has it: rings, INIT handshake, clients.

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use zerocopy::{FromBytes, IntoBytes};

use super::abi::{InitIn, InitOut, Opcode, init};
use super::client::{Client, ForgetQueue};
use super::request::Call;
use super::{FuseError, FuseResult};
use crate::Error;
use crate::device::{Device, DeviceOptions};

/// Ring 0 carries FORGET; requests start at ring 1 (virtio 1.2, section 5.11.2).
const FIRST_REQUEST_RING: usize = 1;

/// Whose INIT to send. Flags as in `fuse_send_init()` of the version, for a mount with auto-submounts and no DAX.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DpuKernel {
    /// Linux 6.1 (Debian 12): protocol 7.37.
    V6_1,
    /// Linux 6.12 (Debian 13, bookworm-backports): protocol 7.41.
    V6_12,
}

impl DpuKernel {
    /// The INIT argument.
    pub fn init(self) -> InitIn {
        let common = init::ASYNC_READ
            | init::POSIX_LOCKS
            | init::ATOMIC_O_TRUNC
            | init::EXPORT_SUPPORT
            | init::BIG_WRITES
            | init::DONT_MASK
            | init::SPLICE_WRITE
            | init::SPLICE_MOVE
            | init::SPLICE_READ
            | init::FLOCK_LOCKS
            | init::HAS_IOCTL_DIR
            | init::AUTO_INVAL_DATA
            | init::DO_READDIRPLUS
            | init::READDIRPLUS_AUTO
            | init::ASYNC_DIO
            | init::WRITEBACK_CACHE
            | init::NO_OPEN_SUPPORT
            | init::PARALLEL_DIROPS
            | init::HANDLE_KILLPRIV
            | init::POSIX_ACL
            | init::ABORT_ERROR
            | init::MAX_PAGES
            | init::CACHE_SYMLINKS
            | init::NO_OPENDIR_SUPPORT
            | init::EXPLICIT_INVAL_DATA
            | init::SUBMOUNTS
            | init::HANDLE_KILLPRIV_V2
            | init::SETXATTR_EXT
            | init::INIT_EXT
            | init::SECURITY_CTX;
        let (minor, flags) = match self {
            DpuKernel::V6_1 => (37, common),
            DpuKernel::V6_12 => (
                41,
                common
                    | init::CREATE_SUPP_GROUP
                    | init::HAS_EXPIRE_ONLY
                    | init::DIRECT_IO_ALLOW_MMAP
                    | init::NO_EXPORT_SUPPORT
                    | init::HAS_RESEND
                    | init::ALLOW_IDMAP,
            ),
        };
        InitIn {
            major: 7,
            minor,
            max_readahead: 128 << 10, // VM_READAHEAD_PAGES.
            flags: flags as u32,
            flags2: (flags >> 32) as u32,
            ..Default::default()
        }
    }
}

/// How to mount.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Rings and memory. `rings` is set from `request_queues`.
    pub device: DeviceOptions,
    /// Request queues.
    pub request_queues: u16,
    /// INIT to send.
    pub kernel: DpuKernel,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions { device: DeviceOptions::default(), request_queues: 1, kernel: DpuKernel::V6_12 }
    }
}

/// A device with a completed INIT.
#[derive(Debug)]
pub struct Session {
    device: Device,
    clients: Vec<Client>,
    forgets: Arc<Mutex<ForgetQueue>>,
    init: InitOut,
}

impl Session {
    /// Connects and mounts.
    pub fn mount(socket: UnixStream, options: SessionOptions) -> FuseResult<Self> {
        let mut session = Self::connect(socket, options)?;
        session.initialise(options.kernel.init())?;
        Ok(session)
    }

    /// Connects without INIT.
    pub fn connect(socket: UnixStream, options: SessionOptions) -> FuseResult<Self> {
        let rings = FIRST_REQUEST_RING as u16 + options.request_queues;
        let (device, rings) = Device::connect(socket, DeviceOptions { rings, ..options.device })?;
        let mut rings = rings.into_iter();
        let Some(hiprio) = rings.next() else {
            return Err(Error::NotOffered { feature: "a high-priority ring".into() }.into());
        };
        let forgets = Arc::new(Mutex::new(ForgetQueue::new(hiprio)));
        let indirect = options.device.indirect;
        let clients = rings
            .map(|ring| Client::new(ring, Arc::clone(device.memory()), indirect, Arc::clone(&forgets)))
            .collect();
        Ok(Session { device, clients, forgets, init: InitOut::default() })
    }

    /// Sends INIT and keeps what it is answered with.
    pub fn initialise(&mut self, request: InitIn) -> FuseResult<InitOut> {
        let client = self.client();
        let body = client
            .call(&Call::new(Opcode::Init, 0, &[request.as_bytes()], size_of::<InitOut>()).variable())?;
        let problem =
            |problem: String| FuseError::Driver(Error::FuseProtocol { operation: "Init".into(), problem });
        let answer = InitOut::read_from_bytes(&body).map_err(|_| {
            problem(format!("{} bytes, not the {} of 7.23 and later", body.len(), size_of::<InitOut>()))
        })?;
        let offered = u64::from(request.flags) | u64::from(request.flags2) << 32;
        let taken = u64::from(answer.flags) | u64::from(answer.flags2) << 32;
        if answer.major != 7 {
            return Err(problem(format!("protocol {}.{}", answer.major, answer.minor)));
        }
        if taken & !offered != 0 {
            return Err(problem(format!("takes flags {:#x} that were not offered", taken & !offered)));
        }
        self.init = answer;
        self.clients.iter_mut().for_each(|client| client.set_init(answer));
        Ok(answer)
    }

    /// Stops request queue `index` (from 0), throws its ring away and starts a fresh one, as a DPU's driver does to
    /// get out of a broken ring. Requests that were outstanding there are lost.
    pub fn restart_queue(&mut self, index: usize) -> FuseResult<()> {
        let number = (FIRST_REQUEST_RING + index) as u32;
        self.device.frontend().get_vring_base(number)?;
        let ring = self.device.new_ring()?;
        self.device.frontend().start_ring(number, &ring)?;
        self.clients[index].replace_ring(ring);
        Ok(())
    }

    /// The client of the first request queue.
    pub fn client(&mut self) -> &mut Client {
        &mut self.clients[0]
    }

    /// All clients, one per request queue.
    pub fn clients(&mut self) -> &mut [Client] {
        &mut self.clients
    }

    /// The FORGET queue.
    pub fn forgets(&self) -> &Arc<Mutex<ForgetQueue>> {
        &self.forgets
    }

    /// What INIT was answered with.
    pub fn init(&self) -> InitOut {
        self.init
    }

    /// The device below.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Gives device and clients away, for threads that drive one queue each.
    pub fn split(self) -> (Device, Vec<Client>) {
        (self.device, self.clients)
    }
}
