//! Packets of the DPU: check, find the connection, hand payload to the host socket.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use rustix::io::Errno;
use vring::chain::Chain;

use super::table::{Pair, Token};
use super::{BULK, Mux};
use crate::conn::machine::Input;
use crate::host::sys::{self, IOV_MAX};
use crate::packet::{HEADER_LEN, HOST_CID, Header, Kind, Op, SEQ_EOM, SEQ_EOR};

impl Mux {
    /// Serves one packet of the DPU. Its chain comes back through [`Mux::take_done`], at the latest
    /// after [`Mux::flush`].
    pub fn from_dpu(&mut self, chain: Chain, now: u64) {
        self.counters.packets_from_dpu += 1;
        let mut bytes = [0; HEADER_LEN];
        if chain.copy_out(0, &mut bytes).is_err() {
            self.counters.bad_packets += 1;
            self.finish(chain);
            return;
        }
        let packet = Header::decode(&bytes);
        let payload = chain.readable_len() - HEADER_LEN;
        // A sender that is not this DPU cannot be answered: the answer would go to somebody else.
        if packet.src_cid != self.cid {
            self.counters.bad_packets += 1;
            self.finish(chain);
            return;
        }
        let pair = Pair { dpu_port: packet.src_port, host_port: packet.dst_port, kind: packet.kind };
        let nonsense = packet.dst_cid != HOST_CID
            || packet.len as usize > payload
            || (packet.len > 0 && packet.op != Op::Rw)
            || matches!(packet.kind, Kind::Unknown(_))
            || matches!(packet.op, Op::Unknown(_));
        if nonsense {
            self.counters.bad_packets += 1;
            self.flush(now);
            if let Some(token) = self.table.find(pair) {
                self.input(token, Input::DpuRst, now);
            }
            self.queue_reset(&packet);
            self.finish(chain);
            return;
        }
        let Some(token) = self.table.find(pair) else {
            match packet.op {
                Op::Request => self.request(&packet, pair, now),
                _ => self.queue_reset(&packet),
            }
            self.finish(chain);
            return;
        };
        if packet.op != Op::Rw || self.batch.token != Some(token) {
            self.flush(now);
        }
        self.packet(token, &packet, chain, now);
    }

    /// A packet of a connection.
    fn packet(&mut self, token: Token, packet: &Header, chain: Chain, now: u64) {
        let Some((_, channel)) = self.table.get_mut(token) else {
            self.finish(chain);
            return;
        };
        if packet.op != Op::Rst && channel.connection.update_credit(packet.buf_alloc, packet.fwd_cnt).is_err()
        {
            self.counters.bad_credit += 1;
        }
        let input = match packet.op {
            Op::Rw => {
                self.payload(token, packet, chain, now);
                return;
            }
            Op::Request => Input::DpuRequest,
            Op::Response => Input::DpuResponse,
            Op::Rst => Input::DpuRst,
            Op::Shutdown => Input::DpuShutdown(packet.flags),
            Op::CreditRequest => Input::DpuCreditRequest,
            Op::CreditUpdate | Op::Unknown(_) => {
                self.reconcile(token, crate::conn::machine::Effects::default(), now);
                self.finish(chain);
                return;
            }
        };
        self.input(token, input, now);
        self.finish(chain);
    }

    fn payload(&mut self, token: Token, packet: &Header, chain: Chain, now: u64) {
        if !self.input(token, Input::DpuData(packet.len), now).keep_data {
            self.counters.discarded_bytes += u64::from(packet.len);
            self.finish(chain);
            return;
        }
        self.counters.bytes_from_dpu += u64::from(packet.len);
        let len = packet.len as usize;
        let Some((pair, channel)) = self.table.get_mut(token) else {
            self.finish(chain);
            return;
        };
        let records = channel.socket.as_ref().is_some_and(|socket| socket.keeps_records());
        let direct = channel.waiting.is_empty() && channel.writable && !records;
        if direct && let Ok(slices) = chain.readable_slices(HEADER_LEN, len, &mut self.slices) {
            if self.batch.pieces.len() + slices.as_iovecs().len() <= IOV_MAX {
                self.batch.token = Some(token);
                self.batch.pieces.extend(slices.as_iovecs());
                self.batch.bytes += len;
                self.batch.chains.push((chain, len));
                return;
            }
            // More pieces than one call takes: what is gathered goes first, then this by way of the
            // buffer.
            self.flush(now);
        }
        let Some((_, channel)) = self.table.get_mut(token) else {
            self.finish(chain);
            return;
        };
        let mut bytes = vec![0; len];
        // The length was checked against the chain.
        let _ = chain.copy_out(HEADER_LEN, &mut bytes);
        channel.waiting.push(&bytes);
        let ends = pair.kind == Kind::Stream || packet.flags & SEQ_EOM != 0;
        if records && ends {
            channel.waiting.end_record(packet.flags & SEQ_EOR != 0);
        }
        self.finish(chain);
        self.write_waiting(token, now);
    }

    /// Writes the gathered packets. To be called before the tx queue's turn ends.
    pub fn flush(&mut self, now: u64) {
        let Some(token) = self.batch.token.take() else { return };
        let mut batch = std::mem::take(&mut self.batch);
        let sent = match self.table.get_mut(token) {
            Some((_, channel)) => match &channel.socket {
                Some(socket) => sys::send(socket.as_fd(), &batch.pieces),
                None => Err(Errno::PIPE),
            },
            None => Err(Errno::PIPE),
        };
        let taken = match sent {
            Ok(taken) => taken,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => {
                self.input(token, Input::HostGone, now);
                self.return_batch(batch);
                return;
            }
        };
        if let Some((_, channel)) = self.table.get_mut(token)
            && taken < batch.bytes
        {
            channel.writable = false;
            let mut skip = taken;
            for (chain, len) in &batch.chains {
                let here = skip.min(*len);
                skip -= here;
                let mut rest = vec![0; len - here];
                // Lengths were checked when the packets were gathered.
                let _ = chain.copy_out(HEADER_LEN + here, &mut rest);
                channel.waiting.push(&rest);
            }
        }
        batch.pieces.clear();
        self.return_batch(batch);
        self.took(token, taken, now);
    }

    /// Gives the chains of a batch back and keeps its storage.
    fn return_batch(&mut self, mut batch: super::Batch) {
        self.done.extend(batch.chains.drain(..).map(|(chain, _)| chain));
        batch.pieces.clear();
        batch.bytes = 0;
        batch.token = None;
        self.batch = batch;
    }

    /// Writes what waits for a host socket, as far as it takes it.
    pub(super) fn write_waiting(&mut self, token: Token, now: u64) {
        while let Some((_, channel)) = self.table.get_mut(token) {
            if !channel.writable || !channel.connection.wants_host_writable() {
                return;
            }
            let Some(socket) = &channel.socket else { return };
            let sent = if socket.keeps_records() {
                match channel.waiting.first_record() {
                    None => return,
                    Some((record, eor)) => sys::send_record(socket.as_fd(), record, eor),
                }
            } else {
                let (first, second) = channel.waiting.as_slices();
                sys::send_bytes(socket.as_fd(), first, second)
            };
            let records = socket.keeps_records();
            match sent {
                Ok(taken) => {
                    let taken = if records { channel.waiting.pop_record() } else { taken };
                    if !records {
                        channel.waiting.consume(taken);
                    }
                    self.took(token, taken, now);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    channel.writable = false;
                    return;
                }
                Err(_) => {
                    self.input(token, Input::HostGone, now);
                    return;
                }
            }
        }
    }

    /// The host socket took bytes.
    fn took(&mut self, token: Token, bytes: usize, now: u64) {
        if let Some((_, channel)) = self.table.get_mut(token) {
            channel.taken += bytes as u64;
            let extra = u64::from(self.quotas.bulk_window.saturating_sub(channel.connection.window()));
            if channel.taken >= BULK && extra > 0 && self.extra_window + extra <= self.quotas.extra_window {
                self.extra_window += extra;
                channel.connection.grow_window(self.quotas.bulk_window);
            }
        }
        self.input(token, Input::HostTook(u32::try_from(bytes).unwrap_or(u32::MAX)), now);
    }

    fn finish(&mut self, chain: Chain) {
        self.done.push(chain);
    }
}
