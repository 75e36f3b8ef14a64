//! Connections to other DPUs of the process. See [`crate::siblings`].
#![forbid(unsafe_code)]

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType};

use super::channel::{Greeting, Peer};
use super::table::{Pair, Token};
use super::{Mux, Watched, watch};
use crate::conn::machine::{Connection, Effects, Input};
use crate::host::socket::HostSocket;
use crate::packet::{Header, Kind};
use crate::siblings::{Call, Siblings};

/// What the called side's mux writes into the pair when its DPU has accepted.
pub(super) const ACCEPTED: &[u8] = b"+";

impl Mux {
    /// Lets the DPU connect to others.
    pub fn set_siblings(&mut self, siblings: Siblings) {
        self.siblings = siblings;
    }

    /// The DPU asks for a connection to another context id.
    pub(super) fn request_sibling(&mut self, packet: &Header, pair: Pair, now: u64) {
        let Some(callee) = self.siblings.find(pair.peer_cid) else {
            self.counters.refused_by_rule += 1;
            self.queue_reset(packet);
            return;
        };
        let Some(token) = self.admit(pair, now, Connection::from_dpu) else {
            self.queue_reset(packet);
            return;
        };
        self.counters.connections_by_dpu += 1;
        match socket_pair(pair.kind) {
            Ok((ours, theirs)) if watch(&self.epoll, &ours, Watched::Channel(token)).is_ok() => {
                if let Some((_, channel)) = self.table.get_mut(token) {
                    // The first packet's numbers hold whatever they are: nothing is in flight.
                    let _ = channel.connection.update_credit(packet.buf_alloc, packet.fwd_cnt);
                    channel.awaits_sibling = true;
                    channel.writable = true;
                }
                self.attach(token, ours);
                callee.call(Call {
                    socket: theirs,
                    kind: pair.kind,
                    from_cid: self.cid,
                    from_port: pair.dpu_port,
                    to_port: pair.host_port,
                });
                self.reconcile(token, Effects::default(), now);
            }
            _ => {
                self.input(token, Input::HostRefused, now);
            }
        }
    }

    /// Another DPU calls this one.
    pub fn sibling_calls(&mut self, call: Call, now: u64) {
        let pair = Pair {
            peer_cid: call.from_cid,
            dpu_port: call.to_port,
            host_port: call.from_port,
            kind: call.kind,
        };
        // Whoever gives up here closes the socket, and the caller is refused.
        let Ok(socket) = HostSocket::accepted(call.socket) else { return };
        self.call_dpu(socket, None::<Peer>, pair, Greeting::Sibling, now);
    }

    /// What the called side says, before anything else.
    pub(super) fn sibling_answers(&mut self, token: Token, now: u64) {
        let Some((_, channel)) = self.table.get_mut(token) else { return };
        let Some(socket) = &channel.socket else { return };
        let mut answer = [0; ACCEPTED.len()];
        match rustix::net::recv(socket, &mut answer[..], RecvFlags::DONTWAIT) {
            Ok(_) if answer == ACCEPTED => {
                channel.awaits_sibling = false;
                channel.readable = true;
                self.input(token, Input::HostConnected, now);
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(_) | Err(_) => {
                self.counters.refused_by_host += 1;
                self.input(token, Input::HostRefused, now);
            }
        }
    }
}

fn socket_pair(kind: Kind) -> Result<(HostSocket, std::os::fd::OwnedFd), Errno> {
    let socket_type = if kind == Kind::SeqPacket { SocketType::SEQPACKET } else { SocketType::STREAM };
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let (ours, theirs) = rustix::net::socketpair(AddressFamily::UNIX, socket_type, flags, None)?;
    Ok((HostSocket::accepted(ours)?, theirs))
}
