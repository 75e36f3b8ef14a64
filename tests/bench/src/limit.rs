//! The limits: what the same work costs without a protocol between the two CPUs.
//!
//! A thread on the daemon's CPU makes the bare system calls. Where a row measures latency, the driver's CPU hands each
//! call over through a cache line and waits as the row's driver waits: by spinning on the answer, or by sleeping on an
//! eventfd. That is a daemon that needs no ring, no protocol and no table, so no daemon can be faster. Where a row
//! measures CPU time, the thread makes the calls in a loop.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fs::{AtFlags, Mode, OFlags, RawDir, StatxFlags};
use virtio_driver::memory::{Backing, DpuBuffer, DpuMemory};
use virtio_driver::ring::Completion;

use crate::fixture::{self, DATA_SIZE, Fixture};
use crate::load::Round;
use crate::measure::{DAEMON_CPU, Latencies, Random, pin_this_thread};

/// The system calls that a row cannot do without.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// `statx` of an open descriptor.
    Statx,
    /// `statx` of a name in an open directory.
    StatxAt,
    /// `pread` of so many bytes at random offsets.
    Pread(usize),
    /// `pwrite` of so many bytes at random offsets.
    Pwrite(usize),
    /// Opening by `/proc/self/fd`, then closing.
    OpenClose,
    /// `openat` that creates, `close`, `unlinkat`.
    CreateUnlink,
    /// `getdents64` of a whole directory and `statx` of every name. One operation is one entry.
    Getdents,
}

/// How the limit of a row is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// One call after the other in a loop; `times` of them are one operation.
    Loop {
        /// System calls.
        calls: Calls,
        /// Loops that make an operation: the queue depth, where each request waits for those before it.
        times: usize,
    },
    /// Each step handed over from the driver's CPU and its end waited for, in the row's way.
    HandOver(Calls),
    /// No limit is known.
    None,
}

/// Everything the calls work on.
#[derive(Debug)]
pub struct LimitRig {
    root: OwnedFd,
    listed: OwnedFd,
    small: OwnedFd,
    data: File,
    scratch: File,
    buffer: DpuBuffer,
}

impl LimitRig {
    /// Opens the same kind of files that the daemons work on.
    pub fn new(fixture: &Fixture) -> anyhow::Result<Self> {
        let memory = DpuMemory::new(4 << 20, Backing::Memfd)?;
        let buffer = memory.allocate(1 << 20)?;
        buffer.fill(1);
        let open = |path: &std::path::Path, flags: OFlags| {
            rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
                .with_context(|| format!("cannot open {}", path.display()))
        };
        let scratch = fixture.scratch("scratch-limit")?;
        Ok(LimitRig {
            root: open(fixture.path(), OFlags::PATH)?,
            listed: open(&fixture.path().join(fixture::LISTED_DIR), OFlags::RDONLY | OFlags::DIRECTORY)?,
            small: open(&fixture.path().join(fixture::small_name(0)), OFlags::PATH)?,
            data: File::open(fixture.path().join(fixture::DATA))?,
            scratch: std::fs::OpenOptions::new().read(true).write(true).open(scratch)?,
            buffer,
        })
    }

    /// Measures a limit for the length of a round. `None` if the row has none.
    pub fn run(
        &self,
        limit: Limit,
        completion: Completion,
        length: Duration,
        seed: u64,
    ) -> anyhow::Result<Option<Round>> {
        match limit {
            Limit::None => Ok(None),
            Limit::Loop { calls, times } => self.looped(calls, times, length, seed).map(Some),
            Limit::HandOver(calls) => self.handed_over(calls, completion, length, seed).map(Some),
        }
    }

    fn looped(&self, calls: Calls, times: usize, length: Duration, seed: u64) -> anyhow::Result<Round> {
        // Batches long enough that reading the clock does not count.
        let batch = match calls {
            Calls::Statx | Calls::StatxAt | Calls::Pread(..=4096) | Calls::Pwrite(..=4096) => 64,
            _ => 1,
        };
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| -> anyhow::Result<Round> {
                pin_this_thread(DAEMON_CPU)?;
                let mut random = Random::new(seed);
                let mut latencies = Latencies::default();
                let start = Instant::now();
                let mut operations = 0u64;
                while start.elapsed() < length {
                    let begin = Instant::now();
                    let mut done = 0;
                    for _ in 0..batch * times {
                        done += self.all_steps(calls, &mut random)?;
                    }
                    let each =
                        begin.elapsed() / u32::try_from((done / times as u64).max(1)).unwrap_or(u32::MAX);
                    latencies.push(each);
                    operations += done;
                }
                let p50_ns = latencies.percentile(0.5);
                Ok(Round {
                    operations,
                    p50_ns,
                    p99_ns: latencies.percentile(0.99),
                    cpu_ns: p50_ns,
                    cpu_share: 1.0,
                    signals: 0.0,
                })
            });
            worker.join().map_err(|_| anyhow::anyhow!("the limit's thread panicked"))?
        })
    }

    /// All steps of one operation; returns how many operations that was (more than one for a listing).
    fn all_steps(&self, calls: Calls, random: &mut Random) -> anyhow::Result<u64> {
        if calls == Calls::Getdents {
            return self.list();
        }
        let mut state = StepState::default();
        for step in 0..steps(calls) {
            self.step(calls, step, random, &mut state)?;
        }
        Ok(1)
    }

    fn handed_over(
        &self,
        calls: Calls,
        completion: Completion,
        length: Duration,
        seed: u64,
    ) -> anyhow::Result<Round> {
        let line = CacheLine::default();
        let call = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        std::thread::scope(|scope| {
            let server = scope.spawn(|| {
                let served = self.serve(&line, calls, completion, call.as_fd(), seed);
                line.answer.store(STOP, Ordering::Release); // Lets the driver go if the server failed.
                let _ = rustix::io::write(&call, &1u64.to_ne_bytes());
                served
            });
            let mut latencies = Latencies::default();
            let mut number = 0;
            let start = Instant::now();
            'round: while start.elapsed() < length {
                let begin = Instant::now();
                for _ in 0..steps(calls) {
                    number += 1;
                    line.request.store(number, Ordering::Release);
                    if !await_answer(&line, number, completion, call.as_fd())? {
                        break 'round;
                    }
                }
                latencies.push(begin.elapsed());
            }
            line.request.store(STOP, Ordering::Release);
            server.join().map_err(|_| anyhow::anyhow!("the limit's thread panicked"))??;
            Ok(Round {
                operations: latencies.len() as u64,
                p50_ns: latencies.percentile(0.5),
                p99_ns: latencies.percentile(0.99),
                ..Default::default()
            })
        })
    }

    /// Spins for requests on the daemon's CPU and makes one step for each.
    fn serve(
        &self,
        line: &CacheLine,
        calls: Calls,
        completion: Completion,
        call: BorrowedFd<'_>,
        seed: u64,
    ) -> anyhow::Result<()> {
        pin_this_thread(DAEMON_CPU)?;
        let mut random = Random::new(seed);
        let (mut last, mut state) = (0, StepState::default());
        loop {
            let request = line.request.load(Ordering::Acquire);
            if request == STOP {
                return Ok(());
            }
            if request == last {
                std::hint::spin_loop();
                continue;
            }
            last = request;
            self.step(calls, (request - 1) as usize % steps(calls), &mut random, &mut state)?;
            line.answer.store(request, Ordering::Release);
            if completion == Completion::Eventfd {
                rustix::io::write(call, &1u64.to_ne_bytes())?;
            }
        }
    }

    fn step(
        &self,
        calls: Calls,
        step: usize,
        random: &mut Random,
        state: &mut StepState,
    ) -> anyhow::Result<()> {
        const NEWBORN: &str = "newborn-limit";
        let basic = StatxFlags::BASIC_STATS;
        match calls {
            Calls::Statx => {
                rustix::fs::statx(&self.small, "", AtFlags::EMPTY_PATH, basic)?;
            }
            Calls::StatxAt => {
                rustix::fs::statx(&self.root, "file-00", AtFlags::SYMLINK_NOFOLLOW, basic)?;
            }
            Calls::Pread(size) => {
                let offset = random.below(DATA_SIZE / size as u64) * size as u64;
                let read = self.buffer.read_from_file(self.data.as_fd(), offset, size)?;
                ensure!(read == size, "a read of {size} bytes gave {read}");
            }
            Calls::Pwrite(size) => {
                let offset = random.below(DATA_SIZE / size as u64) * size as u64;
                let written = self.buffer.write_to_file(self.scratch.as_fd(), offset, size)?;
                ensure!(written == size, "a write of {size} bytes took {written}");
            }
            Calls::OpenClose if step == 0 => {
                use std::os::fd::AsRawFd;
                let path = format!("/proc/self/fd/{}", self.small.as_raw_fd());
                state.open = Some(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
            }
            Calls::CreateUnlink if step == 0 => {
                let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                state.open =
                    Some(rustix::fs::openat(&self.listed, NEWBORN, flags, Mode::from_raw_mode(0o644))?);
            }
            Calls::CreateUnlink if step == 2 => {
                rustix::fs::unlinkat(&self.listed, NEWBORN, AtFlags::empty())?;
            }
            Calls::OpenClose | Calls::CreateUnlink => state.open = None,
            Calls::Getdents => drop(self.list()?),
        }
        Ok(())
    }

    fn list(&self) -> anyhow::Result<u64> {
        rustix::fs::seek(&self.listed, rustix::fs::SeekFrom::Start(0))?;
        let mut space = [std::mem::MaybeUninit::uninit(); 32 << 10];
        let mut entries = RawDir::new(&self.listed, &mut space);
        let mut count = 0;
        while let Some(entry) = entries.next() {
            let entry = entry?;
            rustix::fs::statx(
                &self.listed,
                entry.file_name(),
                AtFlags::SYMLINK_NOFOLLOW,
                StatxFlags::BASIC_STATS,
            )?;
            count += 1;
        }
        ensure!(count >= fixture::LISTED as u64, "the directory has only {count} entries");
        Ok(count)
    }
}

/// What a step leaves for the next one.
#[derive(Debug, Default)]
struct StepState {
    open: Option<OwnedFd>,
}

/// Requests that a daemon gets for the calls: each is one hand-over.
fn steps(calls: Calls) -> usize {
    match calls {
        Calls::OpenClose => 2,
        Calls::CreateUnlink => 3,
        _ => 1,
    }
}

/// Ends the server.
const STOP: u64 = u64::MAX;

#[derive(Debug, Default)]
#[repr(align(128))]
struct CacheLine {
    request: AtomicU64,
    answer: AtomicU64,
}

/// Waits for an answer in the row's way; false if the server has stopped.
fn await_answer(
    line: &CacheLine,
    number: u64,
    completion: Completion,
    call: BorrowedFd<'_>,
) -> anyhow::Result<bool> {
    if completion == Completion::Eventfd {
        rustix::event::poll(&mut [PollFd::from_borrowed_fd(call, PollFlags::IN)], None)?;
        rustix::io::read(call, &mut [0; 8])?;
    }
    loop {
        match line.answer.load(Ordering::Acquire) {
            STOP => return Ok(false),
            answer if answer == number => return Ok(true),
            _ => std::hint::spin_loop(),
        }
    }
}
