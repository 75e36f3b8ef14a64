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
//! - **Budgets** ([`Quotas`]): connections, greetings under way, resets for unknown pairs, extra
//!   window. What is over a budget is refused (RST, close) and counted.
//!
//! An RST that answers a packet of no connection waits in a bounded queue of its own; beyond the
//! bound it is dropped, and the DPU's own timeout has to do.

pub mod channel;
pub mod deadline;
mod deliver;
mod events;
pub mod rxq;
pub mod table;
mod take;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::epoll;
use vring::chain::{Chain, SliceBuf};

use self::channel::{Channel, Peer};
use self::deadline::Deadlines;
use self::rxq::RxQueue;
use self::table::{Pair, Table, Token};
use crate::conn::Timeouts;
use crate::conn::machine::{Connection, Effects, Input, State};
use crate::host::hello;
use crate::host::socket::{Attempt, HostSocket};
use crate::host::sys::{self, Pieces};
use crate::packet::{HOST_CID, Header, Kind};
use crate::route::{Route, Routes};

/// Buffers of the DPU that one read of a host socket fills at most. The stock driver offers 4 KiB
/// each, so this is what a host socket's default buffer holds.
pub const RX_BATCH: usize = 64;

/// How soon a connect that met a full backlog is tried again. Milliseconds.
const RETRY_AFTER: u64 = 5;

/// Bytes after which a connection counts as bulk and gets a larger window.
const BULK: u64 = 1 << 20;

/// What one DPU may take.
#[derive(Clone, Copy, Debug)]
pub struct Quotas {
    /// Connections.
    pub connections: usize,
    /// Host programs whose greeting is not complete.
    pub greetings: usize,
    /// Resets that wait for buffers of the DPU.
    pub resets: usize,
    /// Window of a connection, bytes.
    pub window: u32,
    /// Window of a connection that moves bulk data, bytes.
    pub bulk_window: u32,
    /// Bytes of window beyond `window`, all connections together.
    pub extra_window: u64,
}

impl Default for Quotas {
    fn default() -> Self {
        Self {
            connections: 4096,
            greetings: 256,
            resets: 1024,
            window: 256 << 10,
            bulk_window: 1 << 20,
            extra_window: 64 << 20,
        }
    }
}

/// What happened, for those who ask.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "counters named for what they count")]
pub struct Counters {
    pub connections_by_dpu: u64,
    pub connections_by_host: u64,
    pub refused_by_rule: u64,
    pub refused_by_host: u64,
    pub refused_by_quota: u64,
    pub bad_packets: u64,
    pub bad_credit: u64,
    pub resets_sent: u64,
    pub resets_dropped: u64,
    pub controls_sent: u64,
    pub packets_to_dpu: u64,
    pub packets_from_dpu: u64,
    pub bytes_to_dpu: u64,
    pub bytes_from_dpu: u64,
    pub discarded_bytes: u64,
    pub bad_greetings: u64,
}

/// A host socket where host programs ask for a port of the DPU.
#[derive(Debug)]
struct Listener {
    fd: OwnedFd,
    /// Leads to this port without a greeting.
    port: Option<u32>,
    kind: Kind,
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
    Caller(u32, u32),
    Listener(u32),
}

impl Watched {
    fn encode(self) -> u64 {
        let (tag, slot, generation) = match self {
            Watched::Channel(token) => (0, token.slot, token.generation),
            Watched::Caller(slot, generation) => (1, slot, generation),
            Watched::Listener(slot) => (2, slot, 0),
        };
        tag << 62 | u64::from(slot & SLOT_MASK) << 32 | u64::from(generation)
    }

    fn decode(word: u64) -> Self {
        let (slot, generation) = ((word >> 32) as u32 & SLOT_MASK, word as u32);
        match word >> 62 {
            0 => Watched::Channel(Token { slot, generation }),
            1 => Watched::Caller(slot, generation),
            _ => Watched::Listener(slot),
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
    quotas: Quotas,
    timeouts: Timeouts,
    table: Table<Channel>,
    callers: Table<Caller>,
    caller_deadlines: Deadlines,
    next_caller: u32,
    listeners: Vec<Listener>,
    turns: RxQueue,
    deadlines: Deadlines,
    retries: Deadlines,
    resets: VecDeque<Header>,
    epoll: OwnedFd,
    batch: Batch,
    /// Chains of the tx queue that are done.
    done: Vec<Chain>,
    /// Buffers of the DPU that were taken and not used yet, in ring order.
    spare: VecDeque<Chain>,
    slices: SliceBuf,
    pieces: Pieces,
    extra_window: u64,
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
            quotas,
            timeouts,
            table: Table::new(quotas.connections),
            callers: Table::new(quotas.greetings),
            caller_deadlines: Deadlines::default(),
            next_caller: 0,
            listeners: Vec::new(),
            turns: RxQueue::default(),
            deadlines: Deadlines::default(),
            retries: Deadlines::default(),
            resets: VecDeque::new(),
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            batch: Batch::default(),
            done: Vec::new(),
            spare: VecDeque::new(),
            slices: SliceBuf::default(),
            pieces: Pieces::default(),
            extra_window: 0,
            counters: Counters::default(),
        })
    }

    /// Becomes readable when [`Mux::host_events`] has something to do.
    pub fn events_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Listens for host programs on `fd`: with a greeting, or for the fixed `port`.
    ///
    /// # Errors
    /// When the socket cannot be watched.
    pub fn add_listener(&mut self, fd: OwnedFd, port: Option<u32>, kind: Kind) -> io::Result<()> {
        let slot = u32::try_from(self.listeners.len()).map_err(|_| io::Error::other("too many listeners"))?;
        let data = epoll::EventData::new_u64(Watched::Listener(slot).encode());
        epoll::add(&self.epoll, &fd, data, epoll::EventFlags::IN)?;
        self.listeners.push(Listener { fd, port, kind });
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

    /// Whether the DPU should be given something, if it has buffers.
    pub fn has_something_for_dpu(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// When [`Mux::sweep`] has something to do, in the clock of `now`.
    pub fn next_deadline(&self) -> Option<u64> {
        [self.deadlines.next(), self.retries.next(), self.caller_deadlines.next()].into_iter().flatten().min()
    }

    /// The DPU's driver was reset: every connection ends, host programs see a hang-up, and nothing of
    /// the old DPU is ever sent to the new one. Listeners stay.
    pub fn reset(&mut self) {
        let tokens: Vec<Token> = self.table.tokens().collect();
        for token in tokens {
            self.forget(token);
        }
        self.turns = RxQueue::default();
        self.resets.clear();
        self.spare.clear();
        self.batch = Batch::default();
        self.done.clear();
    }

    /// Takes the buffers back that were taken from the rx ring and not used, last one first.
    pub fn take_spare(&mut self) -> Option<Chain> {
        self.spare.pop_back()
    }

    /// Chains of the tx queue whose packets have been served.
    pub fn take_done(&mut self) -> Option<Chain> {
        self.done.pop()
    }

    fn queue_reset(&mut self, packet: &Header) {
        let Some(rst) = packet.refusal() else { return };
        if self.resets.len() < self.quotas.resets {
            self.resets.push_back(Header { src_cid: HOST_CID, dst_cid: self.cid, ..rst });
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
        let mut broken = false;
        if let Some(socket) = &channel.socket {
            if effects.greet_host && channel.greets {
                let answer = hello::answer(pair.host_port);
                broken = sys::send_bytes(socket.as_fd(), answer.as_bytes(), &[]) != Ok(answer.len());
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
        if over {
            self.forget(token);
            return;
        }
        if state == State::Draining {
            // The DPU may use the pair again while the last bytes still go to the host.
            self.table.release_pair(token);
        }
        self.deadlines.set(token, deadline);
        if turn {
            self.turns.push(token);
        }
        if broken {
            self.input(token, Input::HostGone, now);
        }
    }

    /// Drops a connection without a word.
    fn forget(&mut self, token: Token) {
        if let Some((_, channel)) = self.table.remove(token) {
            let extra = channel.connection.window().saturating_sub(self.quotas.window);
            self.extra_window = self.extra_window.saturating_sub(u64::from(extra));
        }
        self.deadlines.set(token, None);
        self.retries.set(token, None);
    }

    /// Serves every deadline that has passed.
    pub fn sweep(&mut self, now: u64) {
        while let Some(token) = self.retries.pop(now) {
            self.connect(token, now);
        }
        while let Some(token) = self.deadlines.pop(now) {
            self.input(token, Input::DeadlinePassed, now);
        }
        while let Some(token) = self.caller_deadlines.pop(now) {
            self.counters.bad_greetings += 1;
            self.callers.remove(token);
        }
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
        let mut channel =
            Channel::new(Connection::from_dpu(pair.kind, self.quotas.window, self.timeouts, now));
        // The first packet's numbers hold whatever they are: nothing is in flight.
        let _ = channel.connection.update_credit(packet.buf_alloc, packet.fwd_cnt);
        channel.path = Some(path);
        match self.table.insert(pair, channel) {
            Ok(token) => {
                self.counters.connections_by_dpu += 1;
                self.deadlines.set(token, Some(now.saturating_add(self.timeouts.connect)));
                self.connect(token, now);
            }
            Err(_) => {
                self.counters.refused_by_quota += 1;
                self.queue_reset(packet);
            }
        }
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
                channel.socket = Some(socket);
                channel.writable = true;
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

/// Watches a host socket edge-triggered for everything, for its whole life.
fn watch(epoll: &OwnedFd, socket: &HostSocket, watched: Watched) -> io::Result<()> {
    let flags =
        epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    epoll::add(epoll, socket, epoll::EventData::new_u64(watched.encode()), flags)?;
    Ok(())
}
