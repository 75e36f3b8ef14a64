//! Packets for the DPU: whose turn it is, and what goes into its buffers.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use rustix::io::Errno;
use vring::chain::Chain;
use vring::ring::Ring;

use super::channel::Record;
use super::table::{Pair, Token};
use super::{Mux, RX_BATCH};
use crate::conn::machine::{Control, Effects, Input};
use crate::host::socket::NextRecord;
use crate::host::sys::{self, IOV_MAX};
use crate::packet::{HEADER_LEN, Header, Kind, MAX_PAYLOAD, Op, SEQ_EOM};

/// Turns of one call. More is left for the next one, so that the other queue gets its turn.
const TURNS: usize = 16;

/// What became of one turn.
#[derive(PartialEq, Eq)]
enum Turn {
    /// It was used, or nothing was to be done.
    Used,
    /// The DPU has no buffer for it.
    NoBuffer,
}

impl Mux {
    /// Fills buffers of the DPU: a bounded number of turns, fewer when it has no buffers left or
    /// nobody has anything for it. Returns whether anything was done.
    pub fn to_dpu(&mut self, rx: &mut Ring, now: u64) -> bool {
        self.flush(now);
        let mut progress = false;
        while let Some(rst) = self.resets.front().copied() {
            let Some(chain) = self.buffer(rx) else { return progress };
            self.resets.pop_front();
            self.counters.resets_sent += 1;
            fill(rx, chain, &rst, 0);
            progress = true;
        }
        for _ in 0..TURNS {
            let Some(token) = self.turns.pop() else { break };
            if self.turn(token, rx, now) == Turn::NoBuffer {
                self.turns.unpop(token);
                break;
            }
            progress = true;
        }
        progress
    }

    fn turn(&mut self, token: Token, rx: &mut Ring, now: u64) -> Turn {
        while let Some((pair, channel)) = self.table.get_mut(token) {
            if !channel.connection.has_control() {
                break;
            }
            let Some(chain) = self.buffer(rx) else { return Turn::NoBuffer };
            let Some((_, channel)) = self.table.get_mut(token) else {
                self.spare.push_front(chain);
                break;
            };
            match channel.connection.next_control() {
                Some(control) => {
                    self.counters.controls_sent += 1;
                    self.counters.resets_sent += u64::from(control.op == Op::Rst);
                    fill(rx, chain, &header(self.cid, pair, control, 0), 0);
                }
                None => self.spare.push_front(chain),
            }
            self.reconcile(token, Effects::default(), now);
        }
        let Some((_, channel)) = self.table.get_mut(token) else { return Turn::Used };
        if channel.connection.may_send() == 0 {
            // An empty record needs no credit, but may_send is also 0 where nothing may go at all.
            return Turn::Used;
        }
        if channel.keeps_records() || channel.record.is_some() {
            self.send_record(token, rx, now)
        } else {
            self.send_bytes(token, rx, now)
        }
    }

    /// One read of a host stream into as many buffers as it fills.
    fn send_bytes(&mut self, token: Token, rx: &mut Ring, now: u64) -> Turn {
        let Some((_, channel)) = self.table.get_mut(token) else { return Turn::Used };
        if !channel.readable {
            return Turn::Used;
        }
        let room = self.gather_buffers(rx, token);
        if room == 0 {
            return Turn::NoBuffer;
        }
        let Some((pair, channel)) = self.table.get_mut(token) else { return Turn::Used };
        let Some(socket) = &channel.socket else { return Turn::Used };
        let received = sys::receive(socket.as_fd(), &mut self.pieces);
        self.pieces.clear();
        let received = match received {
            Ok(received) if received.len > 0 => received,
            Ok(_) => return self.host_ended(token, now),
            Err(Errno::INTR) => {
                self.turns.push(token);
                return Turn::Used;
            }
            Err(Errno::AGAIN) => {
                channel.readable = false;
                return Turn::Used;
            }
            // A reset connection ends like a closed one.
            Err(_) => return self.host_ended(token, now),
        };
        // Less than asked for: the socket is empty, and more bytes make a new edge. Not so where the
        // kernel stopped early (at descriptors that came along, before out-of-band data), and at the end
        // there is no edge any more.
        let stopped_early = received.ancillary || channel.urgent || channel.ending;
        channel.readable = received.len == room || stopped_early;
        self.counters.bytes_to_dpu += received.len as u64;
        let mut left = received.len;
        while left > 0 {
            let Some(chain) = self.spare.pop_front() else { break };
            let here = capacity(&chain).min(left);
            left -= here;
            let (buf_alloc, fwd_cnt) = channel.connection.sent(here as u32);
            let control = Control { op: Op::Rw, flags: 0, buf_alloc, fwd_cnt };
            fill(rx, chain, &header(self.cid, pair, control, here), here);
            self.counters.packets_to_dpu += 1;
        }
        self.reconcile(token, Effects::default(), now);
        Turn::Used
    }

    /// Takes buffers of the DPU for as much as the connection may send, and puts their places into
    /// `pieces`. Returns the bytes they hold.
    fn gather_buffers(&mut self, rx: &mut Ring, token: Token) -> usize {
        let Some((_, channel)) = self.table.get_mut(token) else { return 0 };
        let credit = channel.connection.may_send() as usize;
        let (mut room, mut buffers) = (0, 0);
        self.pieces.clear();
        for _ in 0..RX_BATCH {
            if room >= credit || self.pieces.len() >= IOV_MAX {
                break;
            }
            if self.spare.len() <= buffers {
                match rx.pop() {
                    Ok(Some(chain)) => self.spare.push_back(chain),
                    Ok(None) | Err(_) => break,
                }
            }
            let here = capacity(&self.spare[buffers]).min(credit - room);
            if here == 0 {
                // A buffer that holds no packet with payload goes back unused.
                if let Some(chain) = self.spare.remove(buffers) {
                    self.counters.bad_packets += 1;
                    rx.push_used(chain, 0);
                }
                continue;
            }
            // `here` fits the buffer.
            let Ok(slices) = self.spare[buffers].writable_slices(HEADER_LEN, here, &mut self.slices) else {
                break;
            };
            let placed = self.pieces.extend_up_to_limit(slices.as_iovecs());
            room += placed;
            buffers += 1;
            if placed < here {
                break;
            }
        }
        room
    }

    /// Sends a record of the host, as far as credit and buffers go.
    fn send_record(&mut self, token: Token, rx: &mut Ring, now: u64) -> Turn {
        for _ in 0..RX_BATCH {
            let Some((pair, channel)) = self.table.get_mut(token) else { return Turn::Used };
            if channel.record.is_none() && !self.take_record(token, now) {
                return Turn::Used;
            }
            let Some(mut chain) = self.buffer(rx) else { return Turn::NoBuffer };
            let Some((_, channel)) = self.table.get_mut(token) else { return Turn::Used };
            let credit = channel.connection.may_send() as usize;
            let Some(record) = &mut channel.record else {
                self.spare.push_front(chain);
                return Turn::Used;
            };
            let rest = record.bytes.get(record.sent..).unwrap_or_default();
            let here = rest.len().min(credit).min(capacity(&chain));
            if here == 0 && !rest.is_empty() {
                // No credit: the record goes on with the DPU's next update.
                self.spare.push_front(chain);
                return Turn::Used;
            }
            let last = here == rest.len();
            // `here` fits the buffer.
            let _ = chain.copy_in(HEADER_LEN, &rest[..here]);
            record.sent += here;
            let (buf_alloc, fwd_cnt) = channel.connection.sent(here as u32);
            let flags = if last && pair.kind == Kind::SeqPacket { SEQ_EOM } else { 0 };
            let control = Control { op: Op::Rw, flags, buf_alloc, fwd_cnt };
            fill(rx, chain, &header(self.cid, pair, control, here), here);
            self.counters.packets_to_dpu += 1;
            self.counters.bytes_to_dpu += here as u64;
            if last {
                channel.record = None;
            }
        }
        self.reconcile(token, Effects::default(), now);
        Turn::Used
    }

    /// Takes the next record out of the host socket; whether there was one.
    fn take_record(&mut self, token: Token, now: u64) -> bool {
        let Some((pair, channel)) = self.table.get_mut(token) else { return false };
        let Some(socket) = channel.socket.as_ref().filter(|_| channel.readable) else { return false };
        let limit = channel.connection.peer_buffer() as usize;
        let len = match socket.next_record() {
            Ok(NextRecord::Record(len)) => len,
            Err(Errno::INTR) => {
                self.turns.push(token);
                return false;
            }
            Err(Errno::AGAIN) => {
                channel.readable = false;
                return false;
            }
            Ok(NextRecord::End) | Err(_) => {
                self.host_ended(token, now);
                return false;
            }
        };
        if pair.kind == Kind::SeqPacket && len > limit {
            tracing::warn!(
                port = pair.dpu_port,
                "a host program sent a record of {len} bytes, the DPU's socket holds {limit}: connection reset"
            );
            self.counters.oversized_records += 1;
            self.input(token, Input::Abort, now);
            return false;
        }
        let mut bytes = vec![0; len];
        if let Err(errno) = socket.receive_record(&mut bytes) {
            tracing::debug!(%errno, "a record that was there is gone");
            self.host_ended(token, now);
            return false;
        }
        // A stream has no empty packets.
        if len > 0 || pair.kind == Kind::SeqPacket {
            channel.record = Some(Record { bytes, sent: 0 });
        } else {
            self.turns.push(token);
        }
        channel.record.is_some()
    }

    /// The host socket gave end of file.
    fn host_ended(&mut self, token: Token, now: u64) -> Turn {
        let Some((_, channel)) = self.table.get_mut(token) else { return Turn::Used };
        channel.readable = false;
        let (first, gone) = (!channel.ended, channel.hung_up);
        channel.ended = true;
        if first {
            self.input(token, Input::HostEof, now);
        }
        if gone {
            self.input(token, Input::HostGone, now);
        }
        Turn::Used
    }

    /// A buffer of the DPU that holds at least a header.
    fn buffer(&mut self, rx: &mut Ring) -> Option<Chain> {
        // Bounded, because a DPU may feed useless buffers for ever.
        for _ in 0..RX_BATCH {
            let chain = match self.spare.pop_front() {
                Some(chain) => chain,
                None => rx.pop().ok()??,
            };
            if chain.writable_len() >= HEADER_LEN {
                return Some(chain);
            }
            self.counters.bad_packets += 1;
            rx.push_used(chain, 0);
        }
        None
    }
}

/// Payload that a buffer holds. Drivers take no packet that is longer, whatever room they give.
fn capacity(chain: &Chain) -> usize {
    chain.writable_len().saturating_sub(HEADER_LEN).min(MAX_PAYLOAD as usize)
}

fn header(cid: u64, pair: Pair, control: Control, len: usize) -> Header {
    Header {
        src_cid: pair.peer_cid,
        dst_cid: cid,
        src_port: pair.host_port,
        dst_port: pair.dpu_port,
        len: len as u32,
        kind: pair.kind,
        op: control.op,
        flags: control.flags,
        buf_alloc: control.buf_alloc,
        fwd_cnt: control.fwd_cnt,
    }
}

/// Completes a buffer with a header and the payload that is in place.
fn fill(rx: &mut Ring, mut chain: Chain, header: &Header, payload: usize) {
    // Every buffer that gets here holds a header.
    let _ = chain.copy_in(0, &header.encode());
    rx.push_used(chain, HEADER_LEN + payload);
}
