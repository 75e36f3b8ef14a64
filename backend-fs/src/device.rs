//! The virtio-fs device (virtio 1.2 section 5.11): queues, configuration space, and its workers.
//!
//! | queue | served by |
//! |---|---|
//! | 0, high priority | worker 0 |
//! | 1 to N, requests | worker `queue - 1` |
//!
//! A worker's thread is started with the first queue it gets. [`serve_connection`] is what a daemon
//! calls for each front end: it returns when the front end is gone, with every thread ended and
//! everything released that the DPU held.
#![forbid(unsafe_code)]

mod memory;
mod syscalls;

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vring::memory::DpuMemory;
use vring::message::{MAX_CONFIG, MemoryRegion, feature};
use vring::poll::PollWindow;
use vring::ring::Ring;
use vring::session::{self, Device, End, SessionError, Stop};

use crate::config::{DeviceOptions, Tag};
use crate::filesystem::FileSystem;
use crate::fuse::session::Session;
use crate::offload::{Offload, OffloadLimits};
use crate::worker::Worker;

pub use syscalls::CALLS;

/// How long a queue that the front end stops waits for requests that are stuck in the host. The front
/// end waits as well, with the whole DPU, so this must end.
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// How long the end of a connection waits for threads that are stuck in the host.
const END_LIMIT: Duration = Duration::from_secs(2);

/// Queue number of the high priority queue.
const HIGH_PRIORITY: u16 = 0;

/// Serves one front end until it goes or `stop` is triggered. `fs` keeps nothing of this DPU then.
///
/// # Errors
/// [`SessionError`] when the session could not go on. The next front end can be served.
pub fn serve_connection<F: FileSystem + 'static>(
    stream: &UnixStream,
    fs: Arc<F>,
    session: Arc<Session>,
    options: &DeviceOptions,
    lock_waiters: usize,
    stop: &Stop,
) -> Result<End, SessionError> {
    let mut device = FsDevice::new(fs, session, options, lock_waiters);
    let end = session::run(stream, &mut device, stop);
    device.shut_down();
    end
}

/// A virtio-fs device that serves one front end.
pub struct FsDevice<F: FileSystem + 'static> {
    offload: Offload<F>,
    /// By request queue; started when first needed.
    workers: Vec<Option<Worker>>,
    queue_size: u32,
    poll: PollWindow,
    config: Option<[u8; MAX_CONFIG]>,
    memory: memory::SharedMemory,
}

impl<F: FileSystem + 'static> FsDevice<F> {
    /// A device that exports `fs`.
    pub fn new(
        fs: Arc<F>,
        session: Arc<Session>,
        options: &DeviceOptions,
        lock_waiters: usize,
    ) -> FsDevice<F> {
        let limits = OffloadLimits { pool: options.pool_size, lock_waiters };
        let cpus = processors();
        FsDevice {
            offload: Offload::new(fs, session, limits),
            workers: (0..options.request_queues).map(|_| None).collect(),
            queue_size: u32::from(options.queue_size),
            poll: PollWindow::new(options.poll_window, cpus),
            config: options.tag.as_ref().map(|tag| config_space(tag, options.request_queues)),
            memory: memory::SharedMemory::default(),
        }
    }

    /// Ends all threads and drops what the DPU holds. Called once, when the front end is gone.
    pub fn shut_down(&mut self) {
        for worker in self.workers.iter().flatten() {
            worker.quit();
        }
        let deadline = Instant::now() + END_LIMIT;
        let left = || deadline.saturating_duration_since(Instant::now());
        let stuck = self.workers.iter().flatten().filter(|worker| !worker.wait_ended(left())).count();
        self.workers.iter_mut().for_each(|worker| *worker = None);
        self.offload.session().close(&**self.offload.fs());
        let stuck = stuck + self.offload.stop(END_LIMIT);
        if stuck > 0 {
            tracing::error!("{stuck} requests of the DPU that is gone are stuck in the host");
        }
    }

    /// The worker that serves `queue`.
    fn worker(&self, queue: u16) -> Option<&Worker> {
        self.workers.get(worker_of(queue))?.as_ref()
    }
}

/// Processors of this machine. Not those this process may run on: a daemon that is bound to one of many
/// has it to itself as a rule, and polling is right there. Read once, at the first call, which must come
/// before the sandbox hides the answer.
pub fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| {
        std::fs::read_to_string("/sys/devices/system/cpu/online")
            .ok()
            .and_then(|list| count_processors(&list))
            .unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
    })
}

/// Length of a list like `0-3,8` (kernel `Documentation/admin-guide/cputopology.rst`).
fn count_processors(list: &str) -> Option<usize> {
    let mut count = 0;
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.parse::<usize>().ok()?, last.parse::<usize>().ok()?);
        count += last.checked_sub(first)? + 1;
    }
    Some(count)
}

/// Number of the worker that serves `queue`.
fn worker_of(queue: u16) -> usize {
    usize::from(queue.saturating_sub(HIGH_PRIORITY + 1))
}

/// `struct virtio_fs_config` (virtio 1.2 section 5.11.4), the rest of the space zero.
fn config_space(tag: &Tag, request_queues: u16) -> [u8; MAX_CONFIG] {
    let mut space = [0; MAX_CONFIG];
    let field = tag.field();
    space[..field.len()].copy_from_slice(&field);
    space[field.len()..field.len() + 4].copy_from_slice(&u32::from(request_queues).to_le_bytes());
    space
}

impl<F: FileSystem + 'static> Device for FsDevice<F> {
    fn features(&self) -> u64 {
        feature::VERSION_1 | feature::INDIRECT_DESC | feature::EVENT_IDX
    }

    fn queues(&self) -> u16 {
        self.workers.len() as u16 + HIGH_PRIORITY + 1
    }

    fn max_queue_size(&self) -> u32 {
        self.queue_size
    }

    fn config(&self) -> Option<&[u8]> {
        self.config.as_ref().map(<[u8; MAX_CONFIG]>::as_slice)
    }

    fn check_region(&mut self, region: &MemoryRegion, fd: BorrowedFd<'_>) -> Result<(), String> {
        self.memory.check(region, fd)
    }

    fn memory_changed(&mut self, memory: &DpuMemory) {
        self.memory.log(memory);
    }

    fn start(&mut self, index: u16, ring: Ring) -> io::Result<()> {
        let number = worker_of(index);
        let slot = self.workers.get_mut(number).ok_or(io::ErrorKind::InvalidInput)?;
        let worker = match slot {
            Some(worker) => worker,
            None => slot.insert(Worker::spawn(number as u16, &self.offload, self.poll.clone())?),
        };
        worker.start(ring);
        Ok(())
    }

    fn pause(&mut self, index: u16) -> Option<Ring> {
        self.worker(index)?.pause(index, DRAIN_LIMIT)
    }

    fn stop(&mut self, index: u16) -> Option<Ring> {
        self.worker(index)?.stop(index, DRAIN_LIMIT, || self.offload.interrupt_locks())
    }

    fn reset(&mut self) {
        self.offload.session().close(&**self.offload.fs());
    }
}

#[cfg(test)]
mod tests;
