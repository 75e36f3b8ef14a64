//! Threads for requests that would block a queue worker.
//!
//! Two kinds, because they wait for different things:
//! - *I/O* ends by itself. It runs on a small pool of threads that are started when they are needed and
//!   end after a while without work.
//! - A *lock* is waited for until its holder lets go, perhaps for ever. Each waiting request has a thread
//!   of its own, up to a limit; beyond it the DPU is told `ENOLCK`.
//!
//! A finished chain goes back to the queue worker it came from by that worker's [`Mailbox`]; only the
//! worker touches the ring.
#![forbid(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::thread::UnshareFlags;
use vring::chain::Chain;

use crate::filesystem::FileSystem;
use crate::fuse::dispatch::{self, Blocked, Scratch, Served};
use crate::fuse::session::Session;
use crate::worker::{Done, Mailbox};

/// Size of the pool when none is given.
const DEFAULT_POOL: usize = 4;
/// A pool thread without work ends after this time.
const IDLE_LIMIT: Duration = Duration::from_secs(10);
/// Stack of the threads here and of queue workers: requests are served in bounded depth and with
/// buffers on the heap.
pub const STACK_SIZE: usize = 512 << 10;

/// A request that is to be served where it may block.
#[derive(Debug)]
pub struct Job {
    /// The request.
    pub chain: Chain,
    /// Queue it came from.
    pub queue: u16,
    /// Worker it goes back to.
    pub mailbox: Arc<Mailbox>,
}

/// How much may run beside the queue workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OffloadLimits {
    /// Threads for I/O; 0: a small number.
    pub pool: usize,
    /// Threads that wait for locks.
    pub lock_waiters: usize,
}

/// What happened beside the queue workers.
#[derive(Debug, Default)]
pub struct OffloadCounters {
    /// Requests whose service panicked; they were answered with `EIO`.
    pub panics: AtomicU64,
    /// Requests that waited for a lock.
    pub lock_waits: AtomicU64,
    /// Requests refused because too many waited for locks, or no thread could be started.
    pub refused: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Job>,
    /// Pool threads that exist, and those of them that wait for work.
    threads: usize,
    idle: usize,
    lock_waiters: usize,
    stopping: bool,
}

struct Shared<F> {
    fs: Arc<F>,
    session: Arc<Session>,
    limits: OffloadLimits,
    state: Mutex<State>,
    /// Work came, or the end.
    work: Condvar,
    /// A thread ended.
    ended: Condvar,
    counters: OffloadCounters,
}

impl<F> Shared<F> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads of one device.
pub struct Offload<F>(Arc<Shared<F>>);

impl<F> Clone for Offload<F> {
    fn clone(&self) -> Self {
        Offload(Arc::clone(&self.0))
    }
}

impl<F: FileSystem + 'static> Offload<F> {
    /// No threads yet.
    pub fn new(fs: Arc<F>, session: Arc<Session>, limits: OffloadLimits) -> Offload<F> {
        let pool = if limits.pool == 0 { DEFAULT_POOL } else { limits.pool };
        Offload(Arc::new(Shared {
            fs,
            session,
            limits: OffloadLimits { pool, ..limits },
            state: Mutex::default(),
            work: Condvar::new(),
            ended: Condvar::new(),
            counters: OffloadCounters::default(),
        }))
    }

    /// The file system that is served.
    pub fn fs(&self) -> &Arc<F> {
        &self.0.fs
    }

    /// The FUSE session that is served.
    pub fn session(&self) -> &Arc<Session> {
        &self.0.session
    }

    /// Counters.
    pub fn counters(&self) -> &OffloadCounters {
        &self.0.counters
    }

    /// Has a request served on another thread.
    ///
    /// # Errors
    /// The job and what the DPU is to be told, when there is no thread for it.
    #[allow(clippy::result_large_err, reason = "the chain comes back")]
    pub fn submit(&self, why: Blocked, job: Job) -> Result<(), (Job, Errno)> {
        let result = match why {
            Blocked::Io => self.submit_io(job),
            Blocked::Lock => self.submit_lock(job),
        };
        if result.is_err() {
            self.0.counters.refused.fetch_add(1, Ordering::Relaxed);
        }
        result
    }

    #[allow(clippy::result_large_err, reason = "as in `submit`")]
    fn submit_io(&self, job: Job) -> Result<(), (Job, Errno)> {
        let mut state = self.0.lock();
        if state.stopping {
            return Err((job, Errno::IO));
        }
        let wanted = state.queue.len() >= state.idle && state.threads < self.0.limits.pool;
        if wanted {
            let shared = Arc::clone(&self.0);
            let name = format!("fs-io-{}", state.threads);
            match spawn(name, move || run_pool_thread(&shared)) {
                Ok(()) => state.threads += 1,
                Err(error) if state.threads == 0 => {
                    tracing::error!("cannot start a thread for blocking requests: {error}");
                    return Err((job, Errno::AGAIN));
                }
                // The threads there are will get to it.
                Err(_) => {}
            }
        }
        state.queue.push_back(job);
        drop(state);
        self.0.work.notify_one();
        Ok(())
    }

    #[allow(clippy::result_large_err, reason = "as in `submit`")]
    fn submit_lock(&self, job: Job) -> Result<(), (Job, Errno)> {
        {
            let mut state = self.0.lock();
            if state.stopping || state.lock_waiters >= self.0.limits.lock_waiters {
                return Err((job, Errno::NOLCK));
            }
            state.lock_waiters += 1;
        }
        self.0.counters.lock_waits.fetch_add(1, Ordering::Relaxed);
        let shared = Arc::clone(&self.0);
        // The job waits in a slot that both sides reach, to have it back when there is no thread.
        let slot = Arc::new(Mutex::new(Some(job)));
        let theirs = Arc::clone(&slot);
        let spawned = spawn("fs-lock".to_owned(), move || {
            let _ended = Ended { shared: &shared, kind: Blocked::Lock };
            let job = theirs.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(job) = job {
                serve_blocking(&shared, job, &mut Scratch::new(&shared.session));
            }
        });
        let Err(error) = spawned else { return Ok(()) };
        tracing::warn!("cannot start a thread that waits for a lock: {error}");
        self.0.lock().lock_waiters -= 1;
        match slot.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(job) => Err((job, Errno::NOLCK)),
            None => Ok(()),
        }
    }

    /// Makes every request that waits for a lock fail with `EINTR`.
    pub fn interrupt_locks(&self) {
        if self.0.lock().lock_waiters > 0 {
            self.0.fs.interrupt_locks();
        }
    }

    /// Ends all threads. Requests that wait for a thread are dropped; those that run may take until
    /// `limit`. Returns the number of threads that are still stuck in the host then; they end when
    /// the host lets them go.
    pub fn stop(&self, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        {
            let mut state = self.0.lock();
            state.stopping = true;
            state.queue.clear();
        }
        self.0.work.notify_all();
        loop {
            self.interrupt_locks();
            let state = self.0.lock();
            let running = state.threads + state.lock_waiters;
            let left = deadline.saturating_duration_since(Instant::now());
            if running == 0 || left.is_zero() {
                return running;
            }
            // A waiter that was not waiting yet when it was interrupted is interrupted again.
            let round = left.min(Duration::from_millis(20));
            drop(self.0.ended.wait_timeout(state, round));
        }
    }
}

/// Starts a thread that leaves the process's umask and working directory alone: it has its own.
pub fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name).stack_size(STACK_SIZE).spawn(move || {
        own_fs_attributes();
        body();
    })?;
    Ok(())
}

/// Gives this thread a umask and a working directory of its own (`CLONE_FS`), which requests change.
#[allow(deprecated, reason = "the replacement is unsafe because of CLONE_FILES, which is not used here")]
fn own_fs_attributes() {
    if let Err(error) = rustix::thread::unshare(UnshareFlags::FS) {
        tracing::error!("cannot give a thread its own umask, permissions of new files may be wrong: {error}");
    }
}

/// Takes a thread off the books when it ends, however it ends.
struct Ended<'a, F> {
    shared: &'a Shared<F>,
    kind: Blocked,
}

impl<F> Drop for Ended<'_, F> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        match self.kind {
            Blocked::Io => state.threads -= 1,
            Blocked::Lock => state.lock_waiters -= 1,
        }
        drop(state);
        self.shared.ended.notify_all();
    }
}

fn run_pool_thread<F: FileSystem>(shared: &Shared<F>) {
    let _ended = Ended { shared, kind: Blocked::Io };
    let mut scratch = Scratch::new(&shared.session);
    while let Some(job) = next_job(shared) {
        serve_blocking(shared, job, &mut scratch);
    }
}

/// The next request for this pool thread; `None` ends it.
fn next_job<F>(shared: &Shared<F>) -> Option<Job> {
    let deadline = Instant::now() + IDLE_LIMIT;
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.queue.pop_front() {
            return Some(job);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if state.stopping || left.is_zero() {
            return None;
        }
        state.idle += 1;
        state = shared
            .work
            .wait_timeout(state, left)
            .map_or_else(|error| error.into_inner().0, |(state, _)| state);
        state.idle -= 1;
    }
}

fn serve_blocking<F: FileSystem>(shared: &Shared<F>, job: Job, scratch: &mut Scratch) {
    let Job { mut chain, queue, mailbox } = job;
    let served = serve_caught(&*shared.fs, &shared.session, &mut chain, scratch, true, &shared.counters);
    let written = match served {
        Served::Reply(written) => written,
        // Only a file system that breaks its contract says so on a thread that may block.
        Served::Blocked(_) => dispatch::refuse(&mut chain, Errno::IO),
    };
    mailbox.done(Done { queue, chain, written });
}

/// Serves a request; a panic becomes `EIO` for the DPU and a count here.
pub fn serve_caught<F: FileSystem>(
    fs: &F,
    session: &Session,
    chain: &mut Chain,
    scratch: &mut Scratch,
    may_block: bool,
    counters: &OffloadCounters,
) -> Served {
    let result = catch_unwind(AssertUnwindSafe(|| dispatch::serve(fs, session, chain, scratch, may_block)));
    result.unwrap_or_else(|_| {
        counters.panics.fetch_add(1, Ordering::Relaxed);
        tracing::error!("serving a request panicked (a bug in this daemon); the DPU gets EIO");
        *scratch = Scratch::new(session);
        Served::Reply(dispatch::refuse(chain, Errno::IO))
    })
}
