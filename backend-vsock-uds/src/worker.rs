//! The thread that serves one DPU: its rx, tx and event queues and all of its connections.
//!
//! # One round
//! Packets of the tx queue go to the [`Mux`], which hands their payload to host sockets; then comes what
//! host sockets have reported; then buffers of the rx queue are filled. Each step is bounded, so none
//! keeps the others waiting, and used entries are published and the DPU is interrupted once per step.
//!
//! # Waiting
//! Without work the thread spins for as long as its [`PollWindow`] says, looking at the tx queue and at
//! host sockets in turn; then it arms the kicks it needs, looks once more, and sleeps until a kick, a
//! host socket, a command or the next deadline. The rx queue's kick is armed only while something waits
//! for buffers: a driver that refills its buffers wakes nobody.
//!
//! # Who owns a ring
//! The session hands a ring over by [`Worker::start`] and takes it back by [`Worker::take`]. Nothing stays
//! in flight in between: packets are done when their round is, and unused buffers go back to their ring.
//!
//! # DPUs that come and go
//! | what happens | connections | the DPU is told |
//! |---|---|---|
//! | the driver resets the device, or queues start at 0 again | dropped | nothing: it knows of none |
//! | the front end goes, another brings back the running DPU | dropped | an RST for each, and a transport reset event |
//! | queues stop and go on (a DPU that pauses) | stay | – |
#![forbid(unsafe_code)]

mod run_delay;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, eventfd};
use vring::poll::PollWindow;
use vring::ring::{Kick, Ring};

use self::run_delay::RunDelay;
use crate::mux::{Counters, Mux};
use crate::siblings::{Call, Callee};

/// Queue numbers (virtio 1.2, section 5.10.2).
pub const RX: u16 = 0;
/// Packets of the DPU.
pub const TX: u16 = 1;
/// Events for the DPU.
pub const EVENT: u16 = 2;
/// Queues of the device.
pub const QUEUES: u16 = 3;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.2, section 5.10.6.7), a little-endian 32-bit number.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

/// Packets of the DPU that are served before host sockets get their turn.
const ROUND: usize = 128;
/// Looks at the tx queue between two looks at host sockets and the clock while spinning.
const SPINS: u32 = 16;
/// Two looks at the clock this far apart while spinning: somebody else ran here in between.
const SPIN_GAP: Duration = Duration::from_micros(20);
/// How often a ring without a kick descriptor is looked at by a worker that does not spin.
const POLLED_RING_INTERVAL: Duration = Duration::from_millis(1);
/// Event buffers looked at for one that holds an event.
const EVENT_BUFFERS: usize = 16;

/// Calls of other DPUs that may wait.
const MAX_CALLS: usize = 256;

/// How often a caller that waits looks whether the thread still lives.
const LIFE_SIGN: Duration = Duration::from_millis(100);

/// Number of the mailbox among the mux's foreign descriptors; rings have their queue's number.
const MAILBOX: u32 = 31;

/// Sleep without a deadline; its length does not matter.
const LONGEST_SLEEP: Duration = Duration::from_secs(3600);

const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// State of a worker, for logs and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What happened so far.
    pub counters: Counters,
    /// Live connections.
    pub connections: usize,
    /// Bytes of the DPU that wait for host sockets.
    pub buffered: usize,
    /// Rounds of the loop, with or without work.
    pub rounds: u64,
    /// Times the thread slept.
    pub sleeps: u64,
}

#[derive(Debug)]
enum Command {
    Start(Box<Ring>),
    Take(u16, SyncSender<Option<Box<Ring>>>),
    Reset,
    FrontEndGone,
    Call(Call),
    Report(SyncSender<Report>),
    Quit,
}

/// How other threads reach a worker.
#[derive(Debug)]
struct Mailbox {
    commands: Mutex<Vec<Command>>,
    /// There is something inside; looked at between rounds.
    pending: AtomicBool,
    /// Wakes the worker; written once per filled mailbox, never read.
    event: OwnedFd,
}

impl Mailbox {
    fn put(&self, command: Command) {
        self.lock().push(command);
        if !self.pending.swap(true, Ordering::AcqRel) {
            // Fails only when the counter is full, and then it is readable anyway.
            let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Command>> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    fn is_pending(&self) -> bool {
        self.pending.load(Ordering::Relaxed)
    }
}

impl Callee for Mailbox {
    fn call(&self, call: Call) {
        // A caller that is faster than this DPU's thread is refused.
        let waiting = self.lock().iter().filter(|command| matches!(command, Command::Call(_))).count();
        if waiting < MAX_CALLS {
            self.put(Command::Call(call));
        }
    }
}

/// A running worker.
#[derive(Debug)]
pub struct Worker {
    mailbox: Arc<Mailbox>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl Worker {
    /// Starts the thread that serves `mux`; `name` is for logs and the thread's name.
    ///
    /// # Errors
    /// When there are no more descriptors or threads.
    pub fn spawn(name: &str, mux: Mux, poll: PollWindow) -> io::Result<Worker> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        mux.watch_foreign(&event, MAILBOX)?;
        let mailbox =
            Arc::new(Mailbox { commands: Mutex::default(), pending: AtomicBool::new(false), event });
        let (alive, ended) = mpsc::sync_channel(0);
        let (preparing, prepared) = mpsc::sync_channel::<()>(0);
        let theirs = Arc::clone(&mailbox);
        thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _alive: SyncSender<()> = alive;
            let service = Service::new(mux, theirs, poll);
            drop(preparing);
            service.run();
        })?;
        // What the thread opens for itself it opens before the caller goes on, perhaps to forbid that.
        let _ = prepared.recv();
        Ok(Worker { mailbox, ended })
    }

    /// Where other DPUs of the process call this one.
    pub fn callee(&self) -> Arc<dyn Callee> {
        Arc::clone(&self.mailbox) as Arc<dyn Callee>
    }

    /// Serves a ring from now on.
    pub fn start(&self, ring: Ring) {
        self.mailbox.put(Command::Start(Box::new(ring)));
    }

    /// Takes a ring back, with nothing of it in flight.
    pub fn take(&self, queue: u16) -> Option<Ring> {
        let (reply, taken) = mpsc::sync_channel(1);
        self.mailbox.put(Command::Take(queue, reply));
        self.answer(&taken).flatten().map(|ring| *ring)
    }

    /// The driver reset the device: it knows of no connection.
    pub fn reset(&self) {
        self.mailbox.put(Command::Reset);
    }

    /// The front end is gone, and with it all rings that it did not take back.
    pub fn front_end_gone(&self) {
        self.mailbox.put(Command::FrontEndGone);
    }

    /// State of the worker; `None` when it has ended.
    pub fn report(&self) -> Option<Report> {
        let (reply, report) = mpsc::sync_channel(1);
        self.mailbox.put(Command::Report(reply));
        self.answer(&report)
    }

    /// Waits for an answer, as long as there is a thread to give one.
    fn answer<T>(&self, from: &Receiver<T>) -> Option<T> {
        loop {
            match from.recv_timeout(LIFE_SIGN) {
                Ok(answer) => return Some(answer),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if self.wait_ended(Duration::ZERO) => {
                    // It may have answered in between, and ended then.
                    return from.try_recv().ok();
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Asks the thread to end.
    pub fn quit(&self) {
        self.mailbox.put(Command::Quit);
    }

    /// Waits until the thread has ended; false when it has not after `limit`.
    pub fn wait_ended(&self, limit: Duration) -> bool {
        !matches!(self.ended.recv_timeout(limit), Err(RecvTimeoutError::Timeout))
    }
}

/// One queue.
#[derive(Debug, Default)]
struct Slot {
    /// `None` while the session has it.
    ring: Option<Box<Ring>>,
    /// The DPU was asked to kick and has not done so.
    armed: bool,
    /// Where the queue stood when the session took it, within one front end.
    base: Option<u16>,
    /// The front end was told that the queue broke.
    told_broken: bool,
}

impl Slot {
    #[inline]
    fn has_work(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| ring.has_work())
    }

    /// Asks for a kick; whether there is work already.
    fn arm(&mut self) -> bool {
        self.armed = true;
        self.ring.as_mut().is_some_and(|ring| ring.arm_kick())
    }

    fn disarm(&mut self) {
        if std::mem::take(&mut self.armed)
            && let Some(ring) = &mut self.ring
        {
            ring.disarm_kick();
        }
    }

    /// Shows the DPU what was done, and the front end that it broke.
    fn flush(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        ring.publish();
        ring.signal_if_needed();
        if ring.is_broken() && !self.told_broken {
            self.told_broken = true;
            tracing::error!(
                queue = ring.index(),
                "the DPU's available index cannot be right, the queue stops"
            );
            ring.signal_error();
        }
    }
}

/// What runs on the worker's thread.
struct Service {
    mux: Mux,
    mailbox: Arc<Mailbox>,
    slots: [Slot; QUEUES as usize],
    /// The DPU believes in connections that are gone, and has an event queue to be told.
    event_due: bool,
    /// Connections were lost with the last front end.
    lost: bool,
    /// The mux has collected events that were not served.
    collected: bool,
    poll: PollWindow,
    run_delay: RunDelay,
    started: Instant,
    rounds: u64,
    sleeps: u64,
    quit: bool,
}

impl Service {
    fn new(mux: Mux, mailbox: Arc<Mailbox>, poll: PollWindow) -> Service {
        Service {
            mux,
            mailbox,
            slots: Default::default(),
            event_due: false,
            lost: false,
            collected: false,
            run_delay: RunDelay::new(poll.is_enabled()),
            poll,
            started: Instant::now(),
            rounds: 0,
            sleeps: 0,
            quit: false,
        }
    }

    fn run(mut self) {
        while !self.quit {
            if self.mailbox.is_pending() {
                self.read_mail();
            } else if !self.round() {
                self.idle();
            }
        }
        for slot in 0..QUEUES {
            self.take_ring(slot);
        }
    }

    /// Milliseconds of the mux's clock.
    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn slot(&mut self, queue: u16) -> &mut Slot {
        &mut self.slots[usize::from(queue.min(EVENT))]
    }

    /// Serves everybody a little; whether there was anything to do.
    fn round(&mut self) -> bool {
        self.rounds += 1;
        let now = self.now();
        let mut any = self.serve_tx(now);
        any |= self.serve_host(now);
        if self.mux.next_deadline().is_some_and(|due| due <= now) {
            self.mux.sweep(now);
            any = true;
        }
        any |= self.serve_rx(now);
        if self.event_due {
            any |= self.serve_event();
        }
        any
    }

    fn serve_tx(&mut self, now: u64) -> bool {
        let slot = &mut self.slots[usize::from(TX)];
        let Some(ring) = &mut slot.ring else { return false };
        let mut taken = 0;
        while taken < ROUND {
            match ring.pop() {
                Ok(Some(chain)) => self.mux.from_dpu(chain, now),
                Ok(None) | Err(_) => break,
            }
            taken += 1;
        }
        self.mux.flush(now);
        self.mux.return_chains(ring);
        // Malformed chains leave entries to publish, too.
        slot.flush();
        taken > 0
    }

    fn serve_host(&mut self, now: u64) -> bool {
        if !std::mem::take(&mut self.collected) {
            self.collect(&NOW);
        }
        let served = self.mux.host_events(now);
        self.collected = false;
        self.note_kicks(served.foreign);
        served.events > 0
    }

    fn serve_rx(&mut self, now: u64) -> bool {
        if !self.mux.has_something_for_dpu() {
            return false;
        }
        let slot = &mut self.slots[usize::from(RX)];
        let Some(ring) = &mut slot.ring else { return false };
        let any = self.mux.to_dpu(ring, now);
        slot.flush();
        any
    }

    /// Tells the DPU that its connections are gone, once it has a buffer for that.
    fn serve_event(&mut self) -> bool {
        let slot = &mut self.slots[usize::from(EVENT)];
        let Some(ring) = &mut slot.ring else { return false };
        let mut any = false;
        for _ in 0..EVENT_BUFFERS {
            let Ok(Some(mut chain)) = ring.pop() else { break };
            any = true;
            let written = chain.copy_in(0, &TRANSPORT_RESET).map_or(0, |()| TRANSPORT_RESET.len());
            ring.push_used(chain, written);
            if written > 0 {
                self.event_due = false;
                break;
            }
        }
        slot.flush();
        any
    }

    fn note_kicks(&mut self, foreign: u32) {
        for (number, slot) in self.slots.iter_mut().enumerate() {
            if foreign & 1 << number != 0
                && let Some(ring) = &slot.ring
            {
                ring.count_kick();
            }
        }
    }

    /// Collects events of host sockets, kicks and commands.
    fn collect(&mut self, timeout: &Timespec) -> bool {
        match self.mux.wait(Some(timeout)) {
            Ok(count) => {
                self.collected = count > 0;
                self.collected
            }
            Err(error) => {
                tracing::error!("waiting for host sockets failed, the DPU is served no more: {error}");
                self.quit = true;
                false
            }
        }
    }

    fn read_mail(&mut self) {
        self.mailbox.pending.store(false, Ordering::Release);
        let commands = std::mem::take(&mut *self.mailbox.lock());
        for command in commands {
            match command {
                Command::Start(ring) => self.start_ring(ring),
                Command::Take(queue, reply) => {
                    let ring = self.take_ring(queue);
                    // Nobody waits for it when the session is gone; the ring ends here then.
                    let _ = reply.send(ring);
                }
                Command::Reset => self.forget_dpu(),
                Command::FrontEndGone => self.lose_front_end(),
                Command::Call(call) => {
                    let now = self.now();
                    self.mux.sibling_calls(call, now);
                }
                Command::Report(reply) => {
                    let _ = reply.send(self.report());
                }
                Command::Quit => self.quit = true,
            }
        }
    }

    fn report(&mut self) -> Report {
        Report {
            counters: self.mux.counters(),
            connections: self.mux.connections(),
            buffered: self.mux.buffered(),
            rounds: self.rounds,
            sleeps: self.sleeps,
        }
    }

    fn start_ring(&mut self, mut ring: Box<Ring>) {
        let (queue, base) = (ring.index(), ring.base());
        if queue != EVENT && base == 0 && self.slot(queue).base != Some(0) {
            // A driver that begins at the beginning knows of no connection. With the first front end
            // there is none anyway.
            self.forget_dpu();
        } else if queue == EVENT && std::mem::take(&mut self.lost) {
            self.event_due = true;
        }
        if let Some(kick) = ring.kick()
            && let Err(error) = self.mux.watch_foreign(kick, u32::from(queue))
        {
            tracing::warn!(queue, "kick descriptor cannot be waited for ({error}), the queue is polled");
            ring.set_kick(Kick::Poll);
        }
        let slot = self.slot(queue);
        // Kicks are off until somebody waits for this queue.
        ring.disarm_kick();
        *slot = Slot { ring: Some(ring), base: Some(base), ..Slot::default() };
        slot.flush();
    }

    fn take_ring(&mut self, queue: u16) -> Option<Box<Ring>> {
        let mut ring = self.slot(queue).ring.take()?;
        if queue == RX {
            self.mux.give_back(&mut ring);
            ring.publish();
            ring.signal_if_needed();
        }
        if let Some(kick) = ring.kick() {
            // Must go explicitly: the front end keeps the same open file alive.
            self.mux.unwatch_foreign(kick);
        }
        self.slot(queue).base = Some(ring.base());
        Some(ring)
    }

    fn forget_dpu(&mut self) {
        self.mux.reset();
        self.event_due = false;
        self.lost = false;
    }

    fn lose_front_end(&mut self) {
        for queue in 0..QUEUES {
            drop(self.take_ring(queue));
            *self.slot(queue) = Slot::default();
        }
        self.event_due = false;
        self.lost |= self.mux.lose_dpu();
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
            self.slots.iter_mut().for_each(Slot::disarm);
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
        if self.has_work() || self.collected {
            self.poll.work(since, now);
        }
    }

    /// Whether a round would find something in the queues.
    #[inline]
    fn has_work(&self) -> bool {
        self.slots[usize::from(TX)].has_work()
            || (self.mux.has_something_for_dpu() && self.slots[usize::from(RX)].has_work())
            || (self.event_due && self.slots[usize::from(EVENT)].has_work())
    }

    /// Looks at queues and host sockets until something comes (then: when) or `window` is over.
    fn spin(&mut self, since: Duration, window: Duration) -> Option<Duration> {
        let mut last = since;
        loop {
            for _ in 0..SPINS {
                if self.has_work() || self.mailbox.is_pending() {
                    return Some(last);
                }
                std::hint::spin_loop();
            }
            if self.collect(&NOW) {
                return Some(last);
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

    /// Asks the DPU for the kicks that matter; whether there is something to do already.
    fn arm(&mut self) -> bool {
        let mut work = self.mailbox.is_pending() || self.slots[usize::from(TX)].arm();
        if self.mux.has_something_for_dpu() {
            work |= self.slots[usize::from(RX)].arm();
        } else {
            self.slots[usize::from(RX)].disarm();
        }
        if self.event_due {
            work |= self.slots[usize::from(EVENT)].arm();
        }
        work
    }

    fn sleep(&mut self) {
        let mut timeout =
            self.mux.next_deadline().map(|due| Duration::from_millis(due.saturating_sub(self.now())));
        let polled = |slot: &Slot| slot.ring.as_ref().is_some_and(|ring| ring.kick().is_none());
        if self.slots.iter().any(polled) {
            timeout = Some(timeout.map_or(POLLED_RING_INTERVAL, |limit| limit.min(POLLED_RING_INTERVAL)));
        }
        self.sleeps += 1;
        let timeout = timeout.unwrap_or(LONGEST_SLEEP);
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
        self.collect(&timeout);
    }
}

#[cfg(test)]
mod tests;
