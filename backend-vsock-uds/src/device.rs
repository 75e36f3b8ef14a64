//! The virtio-vsock device (virtio 1.2, section 5.10) of one DPU: features, configuration space, queues.
//!
//! A device lives as long as the daemon: host programs may call before the DPU is there. Front ends come
//! and go ([`VsockDevice::serve`]); what they leave behind is dropped, and told to the DPU when it returns.
#![forbid(unsafe_code)]

mod syscalls;

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vring::memory::DpuMemory;
use vring::message::{MemoryRegion, feature};
use vring::poll::PollWindow;
use vring::ring::Ring;
use vring::session::{self, Device, End, SessionError, Stop};

pub use self::syscalls::CALLS;
use crate::mux::Mux;
use crate::siblings::Callee;
use crate::worker::{QUEUES, Report, Worker};

/// `VIRTIO_VSOCK_F_STREAM`.
const F_STREAM: u64 = 1 << 0;
/// `VIRTIO_VSOCK_F_SEQPACKET`.
const F_SEQPACKET: u64 = 1 << 1;

/// Context ids that name nobody in particular, this host, or a reserved address
/// (`include/uapi/linux/vm_sockets.h`, virtio 1.2 section 5.10.4).
pub const FIRST_CID: u64 = 3;
/// `VMADDR_CID_ANY` is no address either, and the upper 32 bits are reserved.
pub const LAST_CID: u64 = u32::MAX as u64 - 1;

/// The device of one DPU.
#[derive(Debug)]
pub struct VsockDevice {
    worker: Worker,
    queue_size: u32,
    config: [u8; 8],
}

impl VsockDevice {
    /// Starts the device that serves `mux` for the DPU with context id `cid`.
    ///
    /// # Errors
    /// When its thread cannot be started.
    pub fn new(cid: u64, mux: Mux, queue_size: u16, poll: PollWindow) -> io::Result<Self> {
        Ok(Self {
            worker: Worker::spawn(&format!("vsock-{cid}"), mux, poll)?,
            queue_size: u32::from(queue_size),
            config: cid.to_le_bytes(),
        })
    }

    /// Serves one front end until it goes or `stop` is triggered.
    ///
    /// # Errors
    /// [`SessionError`] when the session could not go on. The next front end can be served.
    pub fn serve(&mut self, stream: &UnixStream, stop: &Stop) -> Result<End, SessionError> {
        let end = session::run(stream, self, stop);
        self.worker.front_end_gone();
        end
    }

    /// Where other DPUs of the process call this one.
    pub fn callee(&self) -> Arc<dyn Callee> {
        self.worker.callee()
    }

    /// State of the device; `None` when its thread has ended.
    pub fn report(&self) -> Option<Report> {
        self.worker.report()
    }

    /// Ends the device's thread, waiting at most for `limit`.
    pub fn shut_down(&self, limit: Duration) -> bool {
        self.worker.quit();
        self.worker.wait_ended(limit)
    }
}

impl Device for VsockDevice {
    fn features(&self) -> u64 {
        feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX | F_STREAM | F_SEQPACKET
    }

    fn queues(&self) -> u16 {
        QUEUES
    }

    fn max_queue_size(&self) -> u32 {
        self.queue_size
    }

    fn config(&self) -> Option<&[u8]> {
        Some(&self.config)
    }

    fn check_region(&mut self, _region: &MemoryRegion, _fd: BorrowedFd<'_>) -> Result<(), String> {
        // Whatever can be mapped will do.
        Ok(())
    }

    fn memory_changed(&mut self, memory: &DpuMemory) {
        let (mut regions, mut bytes) = (0, 0);
        for info in memory.regions() {
            regions += 1;
            bytes += info.region.size;
        }
        tracing::debug!("DPU memory: {} MiB in {regions} regions", bytes >> 20);
    }

    fn start(&mut self, _index: u16, ring: Ring) -> io::Result<()> {
        self.worker.start(ring);
        Ok(())
    }

    fn pause(&mut self, index: u16) -> Option<Ring> {
        self.worker.take(index)
    }

    fn stop(&mut self, index: u16) -> Option<Ring> {
        self.worker.take(index)
    }

    fn reset(&mut self) {
        self.worker.reset();
    }
}
