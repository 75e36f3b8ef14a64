//! Packets for the DPU: whose turn it is, and what goes into its buffers.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use rustix::io::Errno;
use vring::chain::Chain;
use vring::ring::Ring;

use super::channel::Record;
use super::table::{Pair, Token};
use super::{Mux, RX_BATCH};
use crate::conn::machine::{Control, Input};
use crate::host::sys::{self, IOV_MAX};
use crate::packet::{HEADER_LEN, HOST_CID, Header, Op, SEQ_EOM};

/// Longest record of a host program that is passed on. Bytes. A Unix socket's buffer is smaller unless
/// the host raised `net.core.wmem_max`.
const MAX_RECORD: usize = 16 << 20;

/// What became of one turn.
#[derive(PartialEq, Eq)]
enum Turn {
    /// It was used, or nothing was to be done.
    Used,
    /// The DPU has no buffer for it.
    NoBuffer,
}

impl Mux {
    /// Fills buffers of the DPU until it has none left or nobody has anything for it. Returns whether
    /// any was filled.
    pub fn to_dpu(&mut self, rx: &mut Ring, now: u64) -> bool {
        let mut progress = false;
        while let Some(rst) = self.resets.front().copied() {
            let Some(chain) = self.buffer(rx) else { return progress };
            self.resets.pop_front();
            self.counters.resets_sent += 1;
            fill(rx, chain, &rst, 0);
            progress = true;
        }
        while let Some(token) = self.turns.pop() {
            if self.turn(token, rx, now) == Turn::NoBuffer {
                self.turns.unpop(token);
                return progress;
            }
            progress = true;
        }
        progress
    }

    fn turn(&mut self, token: Token, rx: &mut Ring, now: u64) -> Turn {
        loop {
            let Some((pair, channel)) = self.table.get_mut(token) else { return Turn::Used };
            if !channel.connection.has_control() {
                break;
            }
            let Some(chain) = self.buffer(rx) else { return Turn::NoBuffer };
            let Some((_, channel)) = self.table.get_mut(token) else {
                self.spare.push_front(chain);
                return Turn::Used;
            };
            match channel.connection.next_control() {
                Some(control) => {
                    self.counters.controls_sent += 1;
                    self.counters.resets_sent += u64::from(control.op == Op::Rst);
                    fill(rx, chain, &self.control_header(pair, control), 0);
                }
                None => self.spare.push_front(chain),
            }
            self.reconcile(token, crate::conn::machine::Effects::default(), now);
        }
        let Some((_, channel)) = self.table.get_mut(token) else { return Turn::Used };
        if channel.connection.may_send() == 0 {
            return Turn::Used;
        }
        let records = channel.socket.as_ref().is_some_and(|socket| socket.keeps_records());
        if records || channel.record.is_some() {
            self.send_record(token, rx, now)
        } else {
            self.send_bytes(token, rx, now)
        }
    }

    /// One read of a host stream into as many buffers as it fills.
    fn send_bytes(&mut self, token: Token, rx: &mut Ring, now: u64) -> Turn {
        let Some((pair, channel)) = self.table.get_mut(token) else { return Turn::Used };
        if !channel.readable {
            return Turn::Used;
        }
        let credit = channel.connection.may_send() as usize;
        let mut room = 0;
        let mut buffers = 0;
        self.pieces.clear();
        while room < credit && buffers < RX_BATCH {
            if self.spare.len() <= buffers {
                match rx.pop() {
                    Ok(Some(chain)) => self.spare.push_back(chain),
                    Ok(None) | Err(_) => break,
                }
            }
            let Some(here) =
                self.spare[buffers].writable_len().checked_sub(HEADER_LEN).filter(|here| *here > 0)
            else {
                // A buffer that holds no packet with payload goes back unused.
                if let Some(chain) = self.spare.remove(buffers) {
                    self.counters.bad_packets += 1;
                    rx.push_used(chain, 0);
                }
                continue;
            };
            let here = here.min(credit - room);
            let Ok(slices) = self.spare[buffers].writable_slices(HEADER_LEN, here, &mut self.slices) else {
                break;
            };
            if self.pieces.len() + slices.as_iovecs().len() > IOV_MAX {
                break;
            }
            self.pieces.extend(slices.as_iovecs());
            room += here;
            buffers += 1;
        }
        if room == 0 {
            return Turn::NoBuffer;
        }
        let Some(socket) = &channel.socket else { return Turn::Used };
        let received = sys::receive(socket.as_fd(), &mut self.pieces);
        self.pieces.clear();
        let mut left = match received {
            Ok(0) => return self.host_ended(token, now),
            Ok(received) => received,
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
        // Less than asked for: the socket is empty, and more bytes make a new edge. After a hang-up no
        // edge comes any more, so the end of file is read.
        channel.readable = left == room || channel.hung_up;
        self.counters.bytes_to_dpu += left as u64;
        while left > 0 {
            let Some(chain) = self.spare.pop_front() else { break };
            let here = (chain.writable_len() - HEADER_LEN).min(left);
            left -= here;
            let (buf_alloc, fwd_cnt) = channel.connection.sent(here as u32);
            let control = Control { op: Op::Rw, flags: 0, buf_alloc, fwd_cnt };
            let header = Header { len: here as u32, ..header(self.cid, pair, control) };
            fill(rx, chain, &header, here);
            self.counters.packets_to_dpu += 1;
        }
        self.reconcile(token, crate::conn::machine::Effects::default(), now);
        Turn::Used
    }

    /// Sends a record of the host, as far as credit and buffers go.
    fn send_record(&mut self, token: Token, rx: &mut Ring, now: u64) -> Turn {
        loop {
            let Some((pair, channel)) = self.table.get_mut(token) else { return Turn::Used };
            if channel.record.is_none() {
                let Some(socket) = channel.socket.as_ref().filter(|_| channel.readable) else {
                    return Turn::Used;
                };
                let record = socket.next_record_len().and_then(|len| {
                    let mut bytes = vec![0; len.min(MAX_RECORD)];
                    let received = socket.receive_record(&mut bytes)?;
                    bytes.truncate(received);
                    Ok((len, bytes))
                });
                match record {
                    // On these sockets an empty record looks like the end; a hang-up tells them apart.
                    Ok((0, _)) if channel.hung_up => return self.host_ended(token, now),
                    Ok((len, _)) if len > MAX_RECORD => {
                        self.counters.discarded_bytes += len as u64;
                        continue;
                    }
                    Ok((_, bytes)) => channel.record = Some(Record { bytes, sent: 0 }),
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => {
                        channel.readable = false;
                        return Turn::Used;
                    }
                    Err(_) => return self.host_ended(token, now),
                }
            }
            let Some(chain) = self.buffer(rx) else { return Turn::NoBuffer };
            let Some((_, channel)) = self.table.get_mut(token) else { return Turn::Used };
            let credit = channel.connection.may_send() as usize;
            let Some(record) = &mut channel.record else { return Turn::Used };
            let rest = &record.bytes[record.sent..];
            let here = rest.len().min(credit).min(chain.writable_len().saturating_sub(HEADER_LEN));
            if here == 0 && !rest.is_empty() {
                // No credit: the record goes on with the DPU's next update.
                self.spare.push_front(chain);
                return Turn::Used;
            }
            let last = here == rest.len();
            let mut chain = chain;
            // `here` fits the buffer.
            let _ = chain.copy_in(HEADER_LEN, &rest[..here]);
            record.sent += here;
            let (buf_alloc, fwd_cnt) = channel.connection.sent(here as u32);
            let control = Control { op: Op::Rw, flags: if last { SEQ_EOM } else { 0 }, buf_alloc, fwd_cnt };
            let header = Header { len: here as u32, ..header(self.cid, pair, control) };
            fill(rx, chain, &header, here);
            self.counters.packets_to_dpu += 1;
            self.counters.bytes_to_dpu += here as u64;
            if last {
                channel.record = None;
                self.reconcile(token, crate::conn::machine::Effects::default(), now);
                return Turn::Used;
            }
        }
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
        loop {
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
    }

    fn control_header(&self, pair: Pair, control: Control) -> Header {
        header(self.cid, pair, control)
    }
}

fn header(cid: u64, pair: Pair, control: Control) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: cid,
        src_port: pair.host_port,
        dst_port: pair.dpu_port,
        len: 0,
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
