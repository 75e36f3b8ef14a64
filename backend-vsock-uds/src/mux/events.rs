//! What host sockets report: programs that call, bytes that came, room that came free, hang-ups.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::epoll::{self, EventFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketFlags};

use super::channel::{Channel, Peer};
use super::table::{Pair, Token};
use super::{Caller, Mux, Watched, watch};
use crate::conn::machine::{Connection, Effects, Input};
use crate::host::hello::{self, Greeting, MAX_GREETING};
use crate::host::socket::HostSocket;
use crate::packet::Kind;

/// Events served per call, and programs accepted per event: the DPU's queues get their turn in between.
const EVENTS: usize = 64;

impl Mux {
    /// Serves what host sockets have reported. Returns whether anything was.
    pub fn host_events(&mut self, now: u64) -> bool {
        let mut events: Vec<epoll::Event> = Vec::with_capacity(EVENTS);
        let zero = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        if epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&zero)).is_err() {
            return false;
        }
        for event in &events {
            let flags = event.flags;
            match Watched::decode(event.data.u64()) {
                Watched::Channel(token) => self.channel_event(token, flags, now),
                Watched::Caller(slot, generation) => self.caller_event(Token { slot, generation }, now),
                Watched::Listener(slot) => self.accept(slot, now),
            }
        }
        !events.is_empty()
    }

    fn channel_event(&mut self, token: Token, flags: EventFlags, now: u64) {
        let Some((_, channel)) = self.table.get_mut(token) else { return };
        if flags.intersects(EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR) {
            channel.readable |= !channel.ended;
        }
        if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
            channel.hung_up = true;
        }
        if flags.intersects(EventFlags::OUT | EventFlags::HUP | EventFlags::ERR) {
            channel.writable = true;
        }
        // With the end of file behind it, a hang-up is all there is left to say.
        if channel.hung_up && channel.ended {
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
                Err(_) => return,
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
            self.call_dpu(Caller { socket, peer }, port, kind, false, now);
            return;
        }
        // Callers are kept in a table of the same kind as connections; the pair only has to be unique.
        let pair = Pair { dpu_port: self.next_caller, host_port: 0, kind };
        self.next_caller = self.next_caller.wrapping_add(1);
        let Ok(token) = self.callers.insert(pair, Caller { socket, peer }) else {
            self.counters.refused_by_quota += 1;
            return;
        };
        let Some((_, caller)) = self.callers.get_mut(token) else { return };
        if watch(&self.epoll, &caller.socket, Watched::Caller(token.slot, token.generation)).is_err() {
            self.callers.remove(token);
            return;
        }
        self.caller_deadlines.set(token, Some(now.saturating_add(self.timeouts.connect)));
        self.caller_event(token, now);
    }

    /// More of a greeting may have come.
    fn caller_event(&mut self, token: Token, now: u64) {
        let Some((pair, caller)) = self.callers.get_mut(token) else { return };
        let mut bytes = [0; MAX_GREETING];
        let received =
            rustix::net::recv(&caller.socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        let greeting = match received {
            Ok((0, _)) => Greeting::Invalid,
            Ok((len, _)) => hello::parse(&bytes[..len]),
            Err(Errno::AGAIN | Errno::INTR) => Greeting::Partial,
            Err(_) => Greeting::Invalid,
        };
        let (port, len) = match greeting {
            Greeting::Partial => return,
            Greeting::Complete { port, len } => (port, len),
            Greeting::Invalid => {
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
            self.call_dpu(caller, port, pair.kind, true, now);
        } else {
            self.counters.bad_greetings += 1;
        }
    }

    /// Asks the DPU for a connection on behalf of a host program.
    fn call_dpu(&mut self, caller: Caller, port: u32, kind: Kind, watched: bool, now: u64) {
        let Ok(host_port) = self.table.assign_port(port, kind) else {
            self.counters.refused_by_quota += 1;
            return;
        };
        let pair = Pair { dpu_port: port, host_port, kind };
        let connection = Connection::from_host(kind, self.quotas.window, self.timeouts, now);
        let mut channel = Channel::new(connection);
        channel.peer = caller.peer;
        channel.greets = watched;
        channel.writable = true;
        channel.readable = true;
        let Ok(token) = self.table.insert(pair, channel) else {
            self.counters.refused_by_quota += 1;
            return;
        };
        if watched {
            // Registered anew, so that what was reported to the greeting is reported again.
            let _ = epoll::delete(&self.epoll, caller.socket.as_fd());
        }
        if watch(&self.epoll, &caller.socket, Watched::Channel(token)).is_err() {
            self.forget(token);
            return;
        }
        if let Some((_, channel)) = self.table.get_mut(token) {
            channel.socket = Some(caller.socket);
        }
        self.counters.connections_by_host += 1;
        self.reconcile(token, Effects::default(), now);
    }
}
