//! What host sockets report: programs that call, bytes that came, room that came free, hang-ups.
#![forbid(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags};

use super::channel::{Greeting, Peer};
use super::table::{Pair, Token};
use super::{ACCEPT_PAUSE, Caller, Mux, Watched, watch};
use crate::conn::machine::{Connection, Effects, Input};
use crate::host::hello::{self, MAX_GREETING};
use crate::host::socket::HostSocket;
use crate::packet::{HOST_CID, Kind};

/// Events served per call, and programs accepted per event: the DPU's queues get their turn in between.
pub(super) const EVENTS: usize = 64;

/// What [`Mux::host_events`] served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// Events of host sockets.
    pub events: usize,
    /// One bit per number of [`Mux::watch_foreign`] that had an event.
    pub foreign: u32,
}

impl Mux {
    /// Watches a descriptor that is not the mux's own, edge-triggered, in the same set: whoever waits
    /// waits for both. `number` is below 32.
    ///
    /// # Errors
    /// When it cannot be watched.
    pub fn watch_foreign(&self, fd: impl AsFd, number: u32) -> io::Result<()> {
        let data = epoll::EventData::new_u64(Watched::Foreign(number).encode());
        Ok(epoll::add(&self.epoll, fd, data, EventFlags::IN | EventFlags::ET)?)
    }

    /// Ends that. The descriptor may live on elsewhere, so that closing it would not do.
    pub fn unwatch_foreign(&self, fd: impl AsFd) {
        // Fails only when it was not watched.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Waits until something is reported, at most for `timeout`; `None`: for ever.
    ///
    /// # Errors
    /// Only for reasons that make waiting impossible; an interrupted wait just returns.
    pub fn wait(&mut self, timeout: Option<&Timespec>) -> io::Result<usize> {
        self.events.clear();
        let mut space = [MaybeUninit::<epoll::Event>::uninit(); EVENTS];
        let (reported, _) = match epoll::wait(&self.epoll, &mut space, timeout) {
            Ok(reported) => reported,
            Err(Errno::INTR) => return Ok(0),
            Err(errno) => return Err(errno.into()),
        };
        self.events.extend(reported.iter().map(|event| (Watched::decode(event.data.u64()), event.flags)));
        Ok(self.events.len())
    }

    /// Serves what [`Mux::wait`] brought.
    pub fn host_events(&mut self, now: u64) -> Served {
        self.flush(now);
        let mut served = Served::default();
        let mut events = std::mem::take(&mut self.events);
        for (watched, flags) in events.drain(..) {
            match watched {
                Watched::Foreign(number) => {
                    served.foreign |= 1u32.checked_shl(number).unwrap_or(0);
                    continue;
                }
                Watched::Channel(token) => self.channel_event(token, flags, now),
                Watched::Caller(token) => self.caller_event(token, flags, now),
                Watched::Listener(slot) => self.accept(slot, now),
            }
            served.events += 1;
        }
        self.events = events;
        served
    }

    fn channel_event(&mut self, token: Token, flags: EventFlags, now: u64) {
        let Some((_, channel)) = self.table.get_mut(token) else { return };
        if channel.awaits_sibling {
            self.sibling_answers(token, now);
            return;
        }
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            channel.readable |= !channel.ended;
        }
        channel.ending |= flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        channel.hung_up |= flags.intersects(EventFlags::HUP | EventFlags::ERR);
        channel.urgent |= flags.contains(EventFlags::PRI);
        channel.writable |= flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR);
        // With the end of file behind it, or nobody there to take what comes before it, a hang-up is all
        // there is left to say.
        if channel.hung_up && (channel.ended || !channel.connection.dpu_receives()) {
            let first = !channel.ended;
            channel.ended = true;
            if first {
                self.input(token, Input::HostEof, now);
            }
            self.input(token, Input::HostGone, now);
        }
        self.write_waiting(token, now);
        self.reconcile(token, Effects::default(), now);
    }

    fn accept(&mut self, slot: u32, now: u64) {
        for _ in 0..EVENTS {
            let Some(listener) = self.listeners.get(slot as usize) else { return };
            let (port, kind) = (listener.port, listener.kind);
            let accepted =
                rustix::net::accept_with(&listener.fd, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC);
            match accepted {
                Ok(fd) => self.caller(fd, port, kind, now),
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return,
                Err(errno) => {
                    self.pause_listener(slot, errno, now);
                    return;
                }
            }
        }
    }

    /// No descriptor or no memory is left for who calls. The listener stays readable, so it is not
    /// watched for a while; callers wait in its backlog.
    fn pause_listener(&mut self, slot: u32, errno: Errno, now: u64) {
        if self.counters.accept_pauses == 0 {
            tracing::warn!("host programs have to wait: accepting a connection failed: {errno}");
        }
        self.counters.accept_pauses += 1;
        self.listen_for(slot, EventFlags::empty());
        if let Some(listener) = self.listeners.get_mut(slot as usize) {
            listener.paused = Some(now.saturating_add(ACCEPT_PAUSE));
        }
    }

    /// As if accepting had failed for want of descriptors.
    #[cfg(test)]
    pub(super) fn pause_listener_for_test(&mut self, slot: u32, now: u64) {
        self.pause_listener(slot, Errno::MFILE, now);
    }

    pub(super) fn resume_listeners(&mut self, now: u64) {
        for slot in 0..self.listeners.len() {
            if self.listeners[slot].paused.is_some_and(|until| until <= now) {
                self.listeners[slot].paused = None;
                self.listen_for(slot as u32, EventFlags::IN);
            }
        }
    }

    fn listen_for(&self, slot: u32, flags: EventFlags) {
        if let Some(listener) = self.listeners.get(slot as usize) {
            let data = epoll::EventData::new_u64(Watched::Listener(slot).encode());
            if let Err(errno) = epoll::modify(&self.epoll, &listener.fd, data, flags) {
                tracing::error!("a listener for host programs cannot be watched any more: {errno}");
            }
        }
    }

    /// A host program has connected.
    fn caller(&mut self, fd: OwnedFd, port: Option<u32>, kind: Kind, now: u64) {
        let peer = rustix::net::sockopt::socket_peercred(&fd).ok().map(|cred| Peer {
            pid: cred.pid.as_raw_nonzero().get(),
            uid: cred.uid.as_raw(),
            gid: cred.gid.as_raw(),
        });
        let Ok(socket) = HostSocket::accepted(fd) else { return };
        if let Some(port) = port {
            self.program_calls(Caller { socket, peer }, port, kind, Greeting::None, now);
            return;
        }
        if self.callers.len() >= self.quotas.greetings
            && let Some(oldest) = self.caller_deadlines.pop(u64::MAX)
        {
            // Idle callers must not keep the others out.
            self.counters.bad_greetings += 1;
            self.callers.remove(oldest);
        }
        // Callers are kept in a table of the same kind as connections; the pair only has to be unique.
        let pair = Pair { peer_cid: HOST_CID, dpu_port: self.next_caller, host_port: 0, kind };
        self.next_caller = self.next_caller.wrapping_add(1);
        let Ok(token) = self.callers.insert(pair, Caller { socket, peer }) else {
            self.counters.refused_by_quota += 1;
            return;
        };
        let Some((_, caller)) = self.callers.get_mut(token) else { return };
        if watch(&self.epoll, &caller.socket, Watched::Caller(token)).is_err() {
            self.callers.remove(token);
            return;
        }
        self.caller_deadlines.set(token, Some(now.saturating_add(self.timeouts.greeting)));
        self.caller_event(token, EventFlags::empty(), now);
    }

    /// More of a greeting may have come.
    fn caller_event(&mut self, token: Token, flags: EventFlags, now: u64) {
        let Some((pair, caller)) = self.callers.get_mut(token) else { return };
        let mut bytes = [0; MAX_GREETING];
        let received =
            rustix::net::recv(&caller.socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        let greeting = match received {
            Ok((0, _)) => hello::Greeting::Invalid,
            Ok((len, _)) => hello::parse(&bytes[..len]),
            Err(Errno::AGAIN | Errno::INTR) => hello::Greeting::Partial,
            Err(_) => hello::Greeting::Invalid,
        };
        let ending = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        let (port, len) = match greeting {
            hello::Greeting::Partial if !ending => return,
            hello::Greeting::Complete { port, len } => (port, len),
            hello::Greeting::Partial | hello::Greeting::Invalid => {
                self.counters.bad_greetings += 1;
                self.caller_deadlines.set(token, None);
                self.callers.remove(token);
                return;
            }
        };
        self.caller_deadlines.set(token, None);
        let Some((_, caller)) = self.callers.remove(token) else { return };
        // Exactly the greeting: what follows it is data.
        let taken = rustix::net::recv(&caller.socket, &mut bytes[..len], RecvFlags::DONTWAIT);
        if taken.is_ok_and(|(taken, _)| taken == len) {
            self.program_calls(caller, port, pair.kind, Greeting::Program, now);
        } else {
            self.counters.bad_greetings += 1;
        }
    }

    /// Asks the DPU for a connection on behalf of a host program.
    fn program_calls(&mut self, caller: Caller, port: u32, kind: Kind, greeting: Greeting, now: u64) {
        let Ok(host_port) = self.table.assign_port(port, kind) else {
            self.counters.refused_by_quota += 1;
            return;
        };
        let pair = Pair { peer_cid: HOST_CID, dpu_port: port, host_port, kind };
        if greeting == Greeting::Program {
            // Registered anew, so that what was reported to the greeting is reported again.
            let _ = epoll::delete(&self.epoll, &caller.socket);
        }
        self.call_dpu(caller.socket, caller.peer, pair, greeting, now);
    }

    /// Asks the DPU for a connection. Without one the socket is closed.
    pub(super) fn call_dpu(
        &mut self,
        socket: HostSocket,
        peer: Option<Peer>,
        pair: Pair,
        greeting: Greeting,
        now: u64,
    ) {
        let Some(token) = self.admit(pair, now, Connection::from_host) else { return };
        if watch(&self.epoll, &socket, Watched::Channel(token)).is_err() {
            self.forget(token);
            return;
        }
        if let Some((_, channel)) = self.table.get_mut(token) {
            channel.peer = peer;
            channel.greeting = greeting;
            channel.writable = true;
            channel.readable = true;
        }
        self.attach(token, socket);
        self.counters.connections_by_host += 1;
        self.reconcile(token, Effects::default(), now);
    }
}
