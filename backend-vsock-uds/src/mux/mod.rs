//! All connections of one DPU: packets in, packets out, host sockets between.
//!
//! # Theory of operation
//!
//! ```text
//!  tx queue ─ from_dpu ─┐                                  ┌─ to_dpu ─ rx queue
//!                       ▼                                  │
//!                conn::machine ── Effects ─► reconcile ─► RxQueue
//!                       ▲                       │
//!  host sockets ─ host_events, sweep            └─► sockets, deadlines, table
//! ```
//!
//! - **Nothing blocks.** Host sockets are non-blocking and watched edge-triggered; connecting to a
//!   Unix socket is instant or `EAGAIN` (a full backlog), which is tried again on a timer.
//! - **One place for consequences.** State machines only change themselves. Whatever follows from an
//!   input for the socket, the deadlines, the turn queue or the table happens in `reconcile`.
//! - **Batches.** Consecutive packets of one connection leave in one `sendmsg` straight from DPU
//!   memory; one `recvmsg` fills up to [`RX_BATCH`] buffers of the DPU. The chains of a batch are
//!   completed after the call, in order.
//! - **Fairness.** A connection with data gets one batch per turn ([`rxq`]); packets of the DPU are
//!   served in the order of its ring, and a host that does not read costs its own connection's
//!   window, nobody else's.
//! - **Budgets** ([`Quotas`]): connections, greetings under way, resets for unknown pairs, promised
//!   windows. What is over a budget is refused (RST, close) and counted.
//! - **No event spin.** The only level-triggered descriptors are listeners. One that cannot be served
//!   (no descriptors left) is switched off for [`ACCEPT_PAUSE`].
//!
//! An RST that answers a packet of no connection waits in a bounded queue of its own; beyond the
//! bound it is dropped, and the DPU's own timeout has to do.
//!
//! # When the DPU goes
//! [`Mux::reset`]: its driver started anew and knows nothing of the connections; they are dropped.
//! [`Mux::lose_dpu`]: only the front end went. The DPU's kernel may come back with another front end
//! and believe that its sockets are connected; for each of them an RST is kept ready.

pub mod channel;
pub mod deadline;
mod deliver;
mod events;
pub mod quotas;
pub mod rxq;
mod siblings;
pub mod table;
mod take;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::epoll;
use vring::chain::{Chain, SliceBuf};
use vring::ring::Ring;

use self::channel::{Channel, Greeting, Peer};
use self::deadline::Deadlines;
use self::quotas::Windows;
pub use self::quotas::{Counters, Quotas};
use self::rxq::RxQueue;
use self::table::{Pair, Table, Token};
use crate::conn::Timeouts;
use crate::conn::machine::{Connection, Effects, Input, State};
use crate::host::hello;
use crate::host::socket::{Attempt, HostSocket};
use crate::host::sys::{self, Pieces};
use crate::packet::{Header, Kind, Op};
use crate::route::{Route, Routes};
use crate::siblings::Siblings;

/// Buffers of the DPU that one read of a host socket fills at most. The stock driver offers 4 KiB
/// each, so this is what a host socket's default buffer holds.
pub const RX_BATCH: usize = 64;

/// How soon a connect that met a full backlog is tried again. Milliseconds.
const RETRY_AFTER: u64 = 5;

/// How long a listener rests when no descriptor is left for those who call. Milliseconds.
pub const ACCEPT_PAUSE: u64 = 100;

/// Bytes after which a connection counts as bulk and gets a larger window.
const BULK: u64 = 1 << 20;

/// A host socket where host programs ask for a port of the DPU.
#[derive(Debug)]
struct Listener {
    fd: OwnedFd,
    /// Leads to this port without a greeting.
    port: Option<u32>,
    kind: Kind,
    /// Rests until then.
    paused: Option<u64>,
}

/// A host program that has not finished its greeting.
#[derive(Debug)]
struct Caller {
    socket: HostSocket,
    peer: Option<Peer>,
}

/// Packets of one connection that leave together.
#[derive(Debug, Default)]
struct Batch {
    token: Option<Token>,
    pieces: Pieces,
    chains: Vec<(Chain, usize)>,
    bytes: usize,
}

/// What an epoll event belongs to; 64 bits of epoll data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Watched {
    Channel(Token),
    Caller(Token),
    Listener(u32),
    /// Something of whoever owns the mux.
    Foreign(u32),
}

impl Watched {
    fn encode(self) -> u64 {
        let (tag, slot, generation) = match self {
            Watched::Channel(token) => (0, token.slot, token.generation),
            Watched::Caller(token) => (1, token.slot, token.generation),
            Watched::Listener(slot) => (2, slot, 0),
            Watched::Foreign(number) => (3, number, 0),
        };
        tag << 62 | u64::from(slot & SLOT_MASK) << 32 | u64::from(generation)
    }

    fn decode(word: u64) -> Self {
        let (slot, generation) = ((word >> 32) as u32 & SLOT_MASK, word as u32);
        match word >> 62 {
            0 => Watched::Channel(Token { slot, generation }),
            1 => Watched::Caller(Token { slot, generation }),
            2 => Watched::Listener(slot),
            _ => Watched::Foreign(slot),
        }
    }
}

/// Slots that fit an epoll data word; quotas are far below.
const SLOT_MASK: u32 = (1 << 30) - 1;

/// The connections of one DPU.
#[derive(Debug)]
pub struct Mux {
    cid: u64,
    routes: Routes,
    siblings: Siblings,
    quotas: Quotas,
    timeouts: Timeouts,
    windows: Windows,
    table: Table<Channel>,
    callers: Table<Caller>,
    caller_deadlines: Deadlines,
    next_caller: u32,
    listeners: Vec<Listener>,
    turns: RxQueue,
    deadlines: Deadlines,
    retries: Deadlines,
    /// Connections that the DPU has forgotten, oldest first; some may be over.
    draining: VecDeque<Token>,
    resets: VecDeque<Header>,
    epoll: OwnedFd,
    /// Reported and not served yet.
    events: Vec<(Watched, epoll::EventFlags)>,
    batch: Batch,
    /// Chains of the tx queue that are done, in the order in which they came.
    done: Vec<Chain>,
    /// Buffers of the DPU that were taken and not used yet, in ring order.
    spare: VecDeque<Chain>,
    slices: SliceBuf,
    pieces: Pieces,
    counters: Counters,
}

impl Mux {
    /// A mux for the DPU with context id `cid`.
    ///
    /// # Errors
    /// When no epoll descriptor can be had.
    pub fn new(cid: u64, routes: Routes, quotas: Quotas, timeouts: Timeouts) -> io::Result<Self> {
        Ok(Self {
            cid,
            routes,
            siblings: Siblings::default(),
            quotas,
            timeouts,
            windows: Windows::new(quotas.windows),
            table: Table::new(quotas.connections),
            callers: Table::new(quotas.greetings),
            caller_deadlines: Deadlines::default(),
            next_caller: 0,
            listeners: Vec::new(),
            turns: RxQueue::default(),
            deadlines: Deadlines::default(),
            retries: Deadlines::default(),
            draining: VecDeque::new(),
            resets: VecDeque::new(),
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            events: Vec::with_capacity(events::EVENTS),
            batch: Batch::default(),
            done: Vec::new(),
            spare: VecDeque::new(),
            slices: SliceBuf::default(),
            pieces: Pieces::default(),
            counters: Counters::default(),
        })
    }

    /// Listens for host programs on `fd`: with a greeting, or for the fixed `port`.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub fn add_listener(&mut self, fd: OwnedFd, port: Option<u32>, kind: Kind) -> io::Result<()> {
        let slot = u32::try_from(self.listeners.len()).map_err(|_| io::Error::other("too many listeners"))?;
        let data = epoll::EventData::new_u64(Watched::Listener(slot).encode());
        epoll::add(&self.epoll, &fd, data, epoll::EventFlags::IN)?;
        self.listeners.push(Listener { fd, port, kind, paused: None });
        Ok(())
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// Live connections.
    pub fn connections(&self) -> usize {
        self.table.len()
    }

    /// Bytes of the DPU that wait for host sockets, all connections together.
    pub fn buffered(&mut self) -> usize {
        let tokens: Vec<Token> = self.table.tokens().collect();
        tokens.into_iter().filter_map(|token| Some(self.table.get_mut(token)?.1.waiting.len())).sum()
    }

    /// Whether the DPU should be given something, if it has buffers.
    pub fn has_something_for_dpu(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Whether buffers of the DPU are kept here.
    pub fn has_spare(&self) -> bool {
        !self.spare.is_empty()
    }

    /// When [`Mux::sweep`] has something to do, in the clock of `now`.
    pub fn next_deadline(&self) -> Option<u64> {
        let paused = self.listeners.iter().filter_map(|listener| listener.paused).min();
        [self.deadlines.next(), self.retries.next(), self.caller_deadlines.next(), paused]
            .into_iter()
            .flatten()
            .min()
    }

    /// The DPU's driver was reset: every connection that the DPU knew of ends, host programs see a
    /// hang-up, and nothing of the old DPU is ever sent to the new one. Listeners stay, and so do host
    /// programs whose request has not reached any DPU.
    pub fn reset(&mut self) {
        let tokens: Vec<Token> = self.table.tokens().collect();
        self.turns = RxQueue::default();
        for token in tokens {
            match self.table.get_mut(token) {
                Some((_, channel)) if channel.connection.is_unasked() => self.turns.push(token),
                _ => {
                    self.counters.lost_connections += 1;
                    self.forget(token);
                }
            }
        }
        self.resets.clear();
        self.batch = Batch::default();
        self.done.clear();
    }

    /// The front end is gone and the DPU with it, or perhaps not: every connection ends, host
    /// programs see a hang-up, and if the DPU comes back it is told by RST. Returns whether there is
    /// anything to tell.
    pub fn lose_dpu(&mut self) -> bool {
        let tokens: Vec<Token> = self.table.tokens().collect();
        let known = |token: &Token| {
            let unasked = self.table.get_mut(*token)?.1.connection.is_unasked();
            self.table.pair_of(*token).filter(|_| !unasked)
        };
        let pairs: Vec<Pair> = tokens.iter().filter_map(known).collect();
        self.reset();
        for pair in &pairs {
            let control = conn_rst(self.cid, *pair);
            self.push_reset(control);
        }
        !pairs.is_empty()
    }

    /// Gives unused buffers of the DPU back to their ring, as if they had never been taken.
    pub fn give_back(&mut self, rx: &mut Ring) {
        while let Some(chain) = self.spare.pop_back() {
            if let Err(chain) = rx.give_back(chain) {
                // The DPU gets the buffer back empty, and offers it again.
                rx.push_used(chain, 0);
            }
        }
    }

    /// Returns the chains of packets that have been served.
    pub fn return_chains(&mut self, tx: &mut Ring) {
        for chain in self.done.drain(..) {
            tx.push_used(chain, 0);
        }
    }

    fn queue_reset(&mut self, packet: &Header) {
        if let Some(rst) = packet.refusal() {
            self.push_reset(rst);
        }
    }

    fn push_reset(&mut self, rst: Header) {
        if self.resets.len() < self.quotas.resets {
            self.resets.push_back(rst);
        } else {
            self.counters.resets_dropped += 1;
        }
    }

    /// Gives an input to a connection and does what follows from it.
    fn input(&mut self, token: Token, input: Input, now: u64) -> Effects {
        let Some((_, channel)) = self.table.get_mut(token) else { return Effects::default() };
        let effects = channel.connection.on(input, now);
        self.reconcile(token, effects, now);
        effects
    }

    /// The sole place where sockets, deadlines, turns and the table follow the state machines.
    fn reconcile(&mut self, token: Token, effects: Effects, now: u64) {
        let Some((pair, channel)) = self.table.get_mut(token) else { return };
        if effects.discard {
            self.counters.discarded_bytes += channel.waiting.len() as u64;
            channel.waiting.clear();
        }
        let (mut broken, mut draining) = (false, false);
        if let Some(socket) = &channel.socket {
            if effects.greet_host {
                let answer = match channel.greeting {
                    Greeting::None => Vec::new(),
                    Greeting::Program => hello::answer(pair.host_port).into_bytes(),
                    Greeting::Sibling => siblings::ACCEPTED.to_vec(),
                };
                broken =
                    !answer.is_empty() && sys::send_bytes(socket.as_fd(), &answer, &[]) != Ok(answer.len());
            }
            if effects.shut_host_write {
                socket.end_sending();
            }
            if effects.shut_host_read {
                socket.end_receiving();
                channel.readable = false;
                channel.record = None;
            }
        }
        if effects.close_host {
            // Closing the descriptor takes it out of the epoll set.
            channel.socket = None;
            channel.path = None;
            channel.readable = false;
            channel.record = None;
        }
        let (deadline, state) = (channel.connection.deadline(), channel.connection.state());
        let (over, turn) = (channel.connection.is_over(), channel.has_something_for_dpu());
        if state == State::Draining && !channel.draining {
            channel.draining = true;
            draining = true;
        }
        let moved = channel.armed != deadline;
        channel.armed = deadline;
        if over {
            self.forget(token);
            return;
        }
        if draining {
            // Those that are over leave the list here at the latest.
            if self.draining.len() > 2 * self.table.len() {
                let table = &mut self.table;
                self.draining.retain(|token| table.get_mut(*token).is_some());
            }
            self.draining.push_back(token);
        }
        if moved {
            self.deadlines.set(token, deadline);
        }
        if turn {
            self.turns.push(token);
        } else if state == State::Draining {
            // The DPU may use the pair again while the last bytes still go to the host.
            self.table.release_pair(token);
        }
        if broken {
            self.input(token, Input::HostGone, now);
        }
    }

    /// Drops a connection without a word.
    fn forget(&mut self, token: Token) {
        if let Some((_, channel)) = self.table.remove(token) {
            self.windows.release(channel.connection.window());
        }
        self.deadlines.set(token, None);
        self.retries.set(token, None);
        if self.draining.front() == Some(&token) {
            self.draining.pop_front();
        }
    }

    /// Serves every deadline that has passed.
    pub fn sweep(&mut self, now: u64) {
        self.flush(now);
        while let Some(token) = self.retries.pop(now) {
            self.connect(token, now);
        }
        while let Some(token) = self.deadlines.pop(now) {
            if let Some((_, channel)) = self.table.get_mut(token) {
                channel.armed = None;
            }
            self.input(token, Input::DeadlinePassed, now);
        }
        while let Some(token) = self.caller_deadlines.pop(now) {
            self.counters.bad_greetings += 1;
            self.callers.remove(token);
        }
        self.resume_listeners(now);
    }

    /// The DPU asks for a connection.
    fn request(&mut self, packet: &Header, pair: Pair, now: u64) {
        let path: PathBuf = match self.routes.lookup(pair.host_port) {
            Route::Socket(path) => path,
            Route::Refused => {
                self.counters.refused_by_rule += 1;
                self.queue_reset(packet);
                return;
            }
        };
        match self.admit(pair, now, Connection::from_dpu) {
            Some(token) => {
                if let Some((_, channel)) = self.table.get_mut(token) {
                    // The first packet's numbers hold whatever they are: nothing is in flight.
                    let _ = channel.connection.update_credit(packet.buf_alloc, packet.fwd_cnt);
                    channel.path = Some(path);
                }
                self.counters.connections_by_dpu += 1;
                self.reconcile(token, Effects::default(), now);
                self.connect(token, now);
            }
            None => self.queue_reset(packet),
        }
    }

    /// Adds a connection if the quotas allow it.
    fn admit(
        &mut self,
        pair: Pair,
        now: u64,
        connection: impl Fn(Kind, u32, Timeouts, u64) -> Connection,
    ) -> Option<Token> {
        loop {
            let token = self.windows.promise(self.quotas.window).and_then(|window| {
                let channel = Channel::new(connection(pair.kind, window, self.timeouts, now));
                let token = self.table.insert(pair, channel).ok();
                if token.is_none() {
                    self.windows.release(window);
                }
                token
            });
            if token.is_some() {
                return token;
            }
            if !self.evict(now) {
                self.counters.refused_by_quota += 1;
                return None;
            }
        }
    }

    /// Ends the connection that has waited longest for its host program to read the last bytes of a DPU
    /// socket that is gone. False when there is none.
    fn evict(&mut self, now: u64) -> bool {
        while let Some(token) = self.draining.pop_front() {
            if self.table.get_mut(token).is_some() {
                self.input(token, Input::Abort, now);
                return true;
            }
        }
        false
    }

    /// Gives a channel its socket.
    fn attach(&mut self, token: Token, socket: HostSocket) {
        let Some((_, channel)) = self.table.get_mut(token) else { return };
        if socket.keeps_records() {
            // A record is as large as the window at most, and the socket takes it whole or not.
            let before = channel.connection.window();
            let most = u32::try_from(socket.max_record()).unwrap_or(u32::MAX);
            channel.connection.limit_window(most);
            self.windows.release(before - channel.connection.window());
        }
        channel.socket = Some(socket);
    }

    /// Tries to connect a channel to its host socket.
    fn connect(&mut self, token: Token, now: u64) {
        let Some((pair, channel)) = self.table.get_mut(token) else { return };
        let Some(path) = &channel.path else { return };
        match HostSocket::connect(path, pair.kind) {
            Attempt::Connected(socket) => {
                channel.path = None;
                if watch(&self.epoll, &socket, Watched::Channel(token)).is_err() {
                    self.input(token, Input::HostRefused, now);
                    return;
                }
                channel.writable = true;
                self.attach(token, socket);
                self.input(token, Input::HostConnected, now);
            }
            Attempt::Busy => self.retries.set(token, Some(now.saturating_add(RETRY_AFTER))),
            Attempt::Refused(errno) => {
                tracing::debug!(port = pair.host_port, path = %path.display(), %errno, "host socket refused");
                self.counters.refused_by_host += 1;
                self.input(token, Input::HostRefused, now);
            }
        }
    }
}

/// An RST for a connection that is gone.
fn conn_rst(cid: u64, pair: Pair) -> Header {
    Header {
        src_cid: pair.peer_cid,
        dst_cid: cid,
        src_port: pair.host_port,
        dst_port: pair.dpu_port,
        len: 0,
        kind: pair.kind,
        op: Op::Rst,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    }
}

/// Watches a host socket edge-triggered for everything, for its whole life.
fn watch(epoll: &OwnedFd, socket: &HostSocket, watched: Watched) -> io::Result<()> {
    use epoll::EventFlags;
    let flags = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::PRI | EventFlags::ET;
    epoll::add(epoll, socket, epoll::EventData::new_u64(watched.encode()), flags)?;
    Ok(())
}
