//! One queue worker: the thread that serves a request queue, and with the first one the high priority
//! queue as well.
//!
//! # Life of a request
//! Pop a chain, serve it at once without blocking ([`dispatch::serve`]), push its used entry. What
//! would block goes to [`Offload`] and comes back through the [`Mailbox`]. Used entries are published
//! and the DPU is interrupted in batches: when the available ring is drained, after [`BATCH`] of them,
//! and before anything that takes long.
//!
//! # Waiting
//! A worker without work spins for as long as its [`PollWindow`] says, with kicks switched off; then
//! it arms the kicks, looks once more, and sleeps in `epoll_wait`. Event descriptors are watched
//! edge-triggered and never read: each write wakes anew, and one system call per wake-up is saved.
//!
//! # Who owns a ring
//! The session hands a ring over by [`Worker::start`] and takes it back by [`Worker::pause`] at any
//! moment between two requests, or by [`Worker::stop`] when nothing is in flight. Chains that come back
//! while the ring is away are kept until it returns; those of a ring that is gone are ignored by the
//! new one.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SendError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec, eventfd};
use rustix::io::Errno;
use vring::chain::Chain;
use vring::poll::{PollWindow, parse_run_delay};
use vring::ring::Ring;

use crate::filesystem::FileSystem;
use crate::fuse::dispatch::{self, Blocked, Scratch, Served};
use crate::offload::{Job, Offload, serve_caught, spawn};

/// Completions after which used entries are published, even if there is more to do.
const BATCH: usize = 8;
/// Requests of one queue that are served before the worker looks at its other queue and its mailbox.
const ROUND: usize = 64;
/// A chain with more bytes than this takes long; what is finished is published before it.
const LARGE: usize = 32 << 10;
/// Looks at the rings between two looks at the clock while spinning.
const SPINS: u32 = 8;
/// Two looks at the clock this far apart while spinning: somebody else ran here in between.
const SPIN_GAP: Duration = Duration::from_micros(20);
/// How often a ring without a kick descriptor is looked at by a worker that does not spin.
const POLLED_RING_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
/// Rings of one worker: its request queue, and the high priority queue for the first.
const RINGS: usize = 2;
/// Round in which a queue that is to stop has its lock waiters interrupted again.
const INTERRUPT_ROUND: Duration = Duration::from_millis(20);

/// Tokens of the epoll set: a ring's place, or the mailbox.
const MAILBOX: u64 = u64::MAX;

/// A chain that was served on another thread.
#[derive(Debug)]
pub struct Done {
    /// Queue it belongs to.
    pub queue: u16,
    /// The chain, with its reply in place.
    pub chain: Chain,
    /// Bytes of the reply.
    pub written: usize,
}

#[derive(Debug)]
enum Command {
    Start(Box<Ring>),
    Pause(u16, SyncSender<Option<Ring>>),
    Stop(u16, SyncSender<Option<Ring>>),
    Quit,
}

#[derive(Debug, Default)]
struct Inbox {
    commands: Vec<Command>,
    done: Vec<Done>,
}

/// How other threads reach a worker.
#[derive(Debug)]
pub struct Mailbox {
    inbox: Mutex<Inbox>,
    /// There is something in the inbox; looked at between requests.
    pending: AtomicBool,
    /// Wakes the worker; written once per filled inbox, never read.
    event: OwnedFd,
}

impl Mailbox {
    fn new() -> io::Result<Mailbox> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox { inbox: Mutex::default(), pending: AtomicBool::new(false), event })
    }

    /// Gives a chain back to its ring.
    pub fn done(&self, done: Done) {
        self.put(|inbox| inbox.done.push(done));
    }

    fn command(&self, command: Command) {
        self.put(|inbox| inbox.commands.push(command));
    }

    fn put(&self, fill: impl FnOnce(&mut Inbox)) {
        fill(&mut self.lock());
        if !self.pending.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full, and then it is readable anyway.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }
}

/// A running worker thread.
#[derive(Debug)]
pub struct Worker {
    mailbox: Arc<Mailbox>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl Worker {
    /// Starts worker `number` (from 0).
    ///
    /// # Errors
    /// When there are no more descriptors or threads.
    pub fn spawn<F: FileSystem + 'static>(
        number: u16,
        offload: &Offload<F>,
        poll: PollWindow,
    ) -> io::Result<Worker> {
        let mailbox = Arc::new(Mailbox::new()?);
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let edge = EventFlags::IN | EventFlags::ET;
        epoll::add(&events, &mailbox.event, EventData::new_u64(MAILBOX), edge)?;
        let (alive, ended) = mpsc::sync_channel(0);
        let (offload, theirs) = (offload.clone(), Arc::clone(&mailbox));
        spawn(format!("fs-queue-{number}"), move || {
            let _alive: SyncSender<()> = alive;
            Service::new(offload, theirs, events, poll).run();
        })?;
        Ok(Worker { mailbox, ended })
    }

    /// Serves a ring from now on.
    pub fn start(&self, ring: Ring) {
        self.mailbox.command(Command::Start(Box::new(ring)));
    }

    /// Takes a ring back between two requests. `None` when the worker is still in one after `limit`;
    /// the ring then stays where it is.
    pub fn pause(&self, queue: u16, limit: Duration) -> Option<Ring> {
        let (reply, taken) = mpsc::sync_channel(0);
        self.mailbox.command(Command::Pause(queue, reply));
        taken.recv_timeout(limit).ok().flatten()
    }

    /// Takes a ring back when nothing of it is in flight, or after `limit`. `interrupt` is called now and
    /// then to end requests that would wait for ever.
    pub fn stop(&self, queue: u16, limit: Duration, mut interrupt: impl FnMut()) -> Option<Ring> {
        let deadline = Instant::now() + limit;
        let (reply, taken) = mpsc::sync_channel(0);
        self.mailbox.command(Command::Stop(queue, reply));
        while Instant::now() < deadline {
            match taken.recv_timeout(INTERRUPT_ROUND) {
                Ok(ring) => return ring,
                Err(RecvTimeoutError::Timeout) => interrupt(),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        // A worker that answers just now must not wait for this receiver.
        drop(taken);
        tracing::error!(queue, "requests are stuck in the host, the queue stops without them");
        self.pause(queue, limit)
    }

    /// Asks the thread to end after the request it serves now.
    pub fn quit(&self) {
        self.mailbox.command(Command::Quit);
    }

    /// Waits until the thread has ended; false when it is still stuck in the host after `limit`.
    pub fn wait_ended(&self, limit: Duration) -> bool {
        !matches!(self.ended.recv_timeout(limit), Err(RecvTimeoutError::Timeout))
    }
}

/// A queue of this worker.
#[derive(Debug)]
struct Slot {
    queue: u16,
    /// `None` while the session has it.
    ring: Option<Box<Ring>>,
    /// The DPU was asked to kick and has not done so.
    armed: bool,
    /// Came back while the ring was away.
    parked: Vec<Done>,
    /// Wants the ring when nothing is in flight any more.
    stopping: Option<SyncSender<Option<Ring>>>,
}

impl Slot {
    fn new(queue: u16) -> Slot {
        Slot { queue, ring: None, armed: false, parked: Vec::new(), stopping: None }
    }
}

/// What runs on the worker's thread.
struct Service<F> {
    offload: Offload<F>,
    mailbox: Arc<Mailbox>,
    /// The emptied half of the mailbox's buffers, to be swapped in.
    inbox: Inbox,
    events: OwnedFd,
    slots: ArrayVec<Slot, RINGS>,
    scratch: Scratch,
    poll: PollWindow,
    run_delay: RunDelay,
    started: Instant,
    quit: bool,
}

impl<F: FileSystem + 'static> Service<F> {
    fn new(offload: Offload<F>, mailbox: Arc<Mailbox>, events: OwnedFd, poll: PollWindow) -> Self {
        let scratch = Scratch::new(offload.session());
        Service {
            offload,
            mailbox,
            inbox: Inbox::default(),
            events,
            slots: ArrayVec::new(),
            scratch,
            run_delay: RunDelay::new(poll.is_enabled()),
            poll,
            started: Instant::now(),
            quit: false,
        }
    }

    fn run(mut self) {
        while !self.quit {
            if self.mailbox.is_pending() {
                // It may say that this was the last round.
                self.read_mail();
            } else if !self.serve_round() {
                self.idle();
            }
        }
    }

    /// Serves some requests of each queue; whether there were any.
    fn serve_round(&mut self) -> bool {
        let mut any = false;
        for place in 0..self.slots.len() {
            // The ring is out of its slot while it is served, so that everything else can be used.
            let Some(mut ring) = self.slots[place].ring.take() else { continue };
            any |= self.serve_ring(&mut ring);
            self.slots[place].ring = Some(ring);
        }
        any
    }

    fn serve_ring(&mut self, ring: &mut Ring) -> bool {
        let (mut taken, mut unpublished) = (0, 0);
        while taken < ROUND && !ring.is_broken() {
            let chain = match ring.pop() {
                Ok(Some(chain)) => chain,
                Ok(None) => break,
                Err(error) => {
                    tracing::error!("{error}");
                    ring.signal_error();
                    break;
                }
            };
            taken += 1;
            if unpublished > 0 && chain.readable_len() + chain.writable_len() > LARGE {
                flush(ring);
                unpublished = 0;
            }
            if self.serve(ring, chain) {
                unpublished += 1;
                if unpublished == BATCH {
                    flush(ring);
                    unpublished = 0;
                }
            }
        }
        // Malformed chains leave entries to publish, too.
        flush(ring);
        taken > 0
    }

    /// Serves one request; whether it is complete.
    fn serve(&mut self, ring: &mut Ring, mut chain: Chain) -> bool {
        let served = serve_caught(
            &**self.offload.fs(),
            self.offload.session(),
            &mut chain,
            &mut self.scratch,
            false,
            self.offload.counters(),
        );
        match served {
            Served::Reply(written) => {
                ring.push_used(chain, written);
                true
            }
            Served::Blocked(why) => self.hand_over(ring, chain, why),
        }
    }

    #[cold]
    fn hand_over(&self, ring: &mut Ring, chain: Chain, why: Blocked) -> bool {
        // Waking or starting a thread takes long.
        flush(ring);
        let job = Job { chain, queue: ring.index(), mailbox: Arc::clone(&self.mailbox) };
        match self.offload.submit(why, job) {
            Ok(()) => false,
            Err((mut job, errno)) => {
                let written = dispatch::refuse(&mut job.chain, errno);
                ring.push_used(job.chain, written);
                true
            }
        }
    }

    fn read_mail(&mut self) {
        self.mailbox.pending.store(false, Ordering::Release);
        std::mem::swap(&mut *self.mailbox.lock(), &mut self.inbox);
        let mut inbox = std::mem::take(&mut self.inbox);
        for command in inbox.commands.drain(..) {
            self.obey(command);
        }
        for done in inbox.done.drain(..) {
            let place = self.place(done.queue);
            match place.and_then(|place| self.slots.get_mut(place)) {
                Some(Slot { ring: Some(ring), .. }) => ring.push_used(done.chain, done.written),
                Some(slot) => slot.parked.push(done),
                None => {}
            }
        }
        self.inbox = inbox;
        for slot in &mut self.slots {
            if let Some(ring) = &mut slot.ring {
                flush(ring);
            }
        }
        self.finish_stops();
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Start(ring) => self.take_ring(ring),
            Command::Pause(queue, reply) => {
                let ring = self.place(queue).and_then(|place| {
                    self.slots[place].stopping = None;
                    self.give_ring(place)
                });
                // Nobody waits any more: the ring stays.
                if let Err(SendError(Some(ring))) = reply.send(ring) {
                    self.take_ring(Box::new(ring));
                }
            }
            Command::Stop(queue, reply) => match self.place(queue) {
                Some(place) => {
                    if let Some(ring) = &mut self.slots[place].ring {
                        ring.set_enabled(false);
                    }
                    self.slots[place].stopping = Some(reply);
                }
                None => {
                    let _ = reply.send(None);
                }
            },
            Command::Quit => self.quit = true,
        }
    }

    fn place(&self, queue: u16) -> Option<usize> {
        self.slots.iter().position(|slot| slot.queue == queue)
    }

    fn take_ring(&mut self, mut ring: Box<Ring>) {
        let queue = ring.index();
        let place = match self.place(queue) {
            Some(place) => place,
            None => {
                if self.slots.try_push(Slot::new(queue)).is_err() {
                    tracing::error!(queue, "queue was given to a worker that has its queues already");
                    return;
                }
                self.slots.len() - 1
            }
        };
        if let Some(kick) = ring.kick() {
            let edge = EventFlags::IN | EventFlags::ET;
            if let Err(error) = epoll::add(&self.events, kick, EventData::new_u64(place as u64), edge) {
                tracing::warn!(queue, "kick descriptor cannot be waited for ({error}), the queue is polled");
                ring.set_kick(vring::ring::Kick::Poll);
            }
        }
        let slot = &mut self.slots[place];
        for done in slot.parked.drain(..) {
            ring.push_used(done.chain, done.written);
        }
        flush(&mut ring);
        slot.armed = false;
        slot.ring = Some(ring);
    }

    fn give_ring(&mut self, place: usize) -> Option<Ring> {
        let ring = self.slots[place].ring.take()?;
        if let Some(kick) = ring.kick() {
            // Must go explicitly: the front end keeps the same open file alive.
            let _ = epoll::delete(&self.events, kick);
        }
        Some(*ring)
    }

    fn finish_stops(&mut self) {
        for place in 0..self.slots.len() {
            let slot = &mut self.slots[place];
            let drained = slot.ring.as_ref().is_none_or(|ring| ring.in_flight() == 0);
            if drained && let Some(reply) = slot.stopping.take() {
                let ring = self.give_ring(place);
                if let Err(SendError(Some(ring))) = reply.send(ring) {
                    self.take_ring(Box::new(ring));
                }
            }
        }
    }

    /// Nothing to do: spin, then sleep.
    fn idle(&mut self) {
        let since = self.started.elapsed();
        if self.poll.wants_sample(since) {
            let delay = self.run_delay.since_last();
            self.poll.sample(since, delay);
        }
        let window = self.poll.window(since);
        let found = if window.is_zero() {
            None
        } else {
            self.disarm();
            self.spin(since, window)
        };
        let now = match found {
            Some(now) => now,
            None if self.arm() => self.started.elapsed(),
            None => {
                self.sleep();
                self.started.elapsed()
            }
        };
        if self.has_work() {
            self.poll.work(since, now);
        }
    }

    #[inline]
    fn has_work(&self) -> bool {
        self.slots.iter().any(|slot| slot.ring.as_ref().is_some_and(|ring| ring.has_work()))
    }

    /// Looks at the rings until something comes (then: when) or `window` is over.
    fn spin(&mut self, since: Duration, window: Duration) -> Option<Duration> {
        let mut last = since;
        loop {
            for _ in 0..SPINS {
                if self.has_work() || self.mailbox.is_pending() {
                    return Some(last);
                }
                std::hint::spin_loop();
            }
            let now = self.started.elapsed();
            if now - last > SPIN_GAP {
                self.run_delay.count_gap(now - last);
            }
            if now - since >= window {
                return None;
            }
            last = now;
        }
    }

    fn disarm(&mut self) {
        for slot in &mut self.slots {
            if slot.armed
                && let Some(ring) = &mut slot.ring
            {
                ring.disarm_kick();
                slot.armed = false;
            }
        }
    }

    /// Asks the DPU for kicks; whether there is something to do already.
    fn arm(&mut self) -> bool {
        let mut work = self.mailbox.is_pending();
        for slot in &mut self.slots {
            if let Some(ring) = &mut slot.ring {
                work |= ring.arm_kick();
                slot.armed = true;
            }
        }
        work
    }

    fn sleep(&mut self) {
        let polled =
            self.slots.iter().any(|slot| slot.ring.as_ref().is_some_and(|ring| ring.kick().is_none()));
        let timeout = polled.then_some(&POLLED_RING_INTERVAL);
        let mut space = [MaybeUninit::uninit(); RINGS + 1];
        let events = match epoll::wait(&self.events, &mut space, timeout) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return,
            Err(error) => {
                tracing::error!("waiting for kicks failed, the worker ends: {error}");
                self.quit = true;
                return;
            }
        };
        for event in events {
            let place = event.data.u64() as usize;
            if let Some(slot) = self.slots.get(place)
                && let Some(ring) = &slot.ring
            {
                ring.count_kick();
            }
        }
    }
}

fn flush(ring: &mut Ring) {
    ring.publish();
    ring.signal_if_needed();
}

/// How long this thread waited for a processor. The kernel says it in `/proc/thread-self/schedstat`;
/// in a sandbox without `/proc`, gaps while spinning are counted instead.
#[derive(Debug)]
struct RunDelay {
    schedstat: Option<File>,
    last: Duration,
    gaps: Duration,
}

impl RunDelay {
    fn new(wanted: bool) -> RunDelay {
        let schedstat = if wanted { File::open("/proc/thread-self/schedstat").ok() } else { None };
        RunDelay { schedstat, last: Duration::ZERO, gaps: Duration::ZERO }
    }

    fn count_gap(&mut self, gap: Duration) {
        self.gaps += gap;
    }

    /// Delay since the last call.
    fn since_last(&mut self) -> Duration {
        let gaps = std::mem::take(&mut self.gaps);
        let mut text = [0; 96];
        let total = self
            .schedstat
            .as_ref()
            .and_then(|file| file.read_at(&mut text, 0).ok())
            .and_then(|len| parse_run_delay(&text[..len]));
        match total {
            Some(total) => total.saturating_sub(std::mem::replace(&mut self.last, total)),
            None => gaps,
        }
    }
}
