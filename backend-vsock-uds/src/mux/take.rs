//! Packets of the DPU: check, find the connection, hand payload to the host socket.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use rustix::io::Errno;
use vring::chain::Chain;

use super::table::{Pair, Token};
use super::{BULK, Batch, Mux};
use crate::conn::machine::{Effects, Input};
use crate::host::sys::{self, IOV_MAX};
use crate::packet::{HEADER_LEN, HOST_CID, Header, Kind, Op, SEQ_EOM, SEQ_EOR, SHUTDOWN_SEND};

/// Records that may wait for a host socket beyond one per byte of the window: only empty ones can.
const EMPTY_RECORDS: usize = 1024;

impl Mux {
    /// Serves one packet of the DPU. Its chain comes back through [`Mux::return_chains`], at the latest
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
        let pair = Pair {
            peer_cid: packet.dst_cid,
            dpu_port: packet.src_port,
            host_port: packet.dst_port,
            kind: packet.kind,
        };
        let nonsense = packet.len as usize > payload
            || (packet.len > 0 && packet.op != Op::Rw)
            || matches!(packet.kind, Kind::Unknown(_))
            || matches!(packet.op, Op::Unknown(_));
        if nonsense {
            self.counters.bad_packets += 1;
            self.flush(now);
            if let Some(token) = self.table.find(pair) {
                // What it sent before still arrives; the RST below speaks for the connection.
                self.end_of_dpu_records(token, now);
                self.input(token, Input::DpuRst, now);
            }
            self.queue_reset(&packet);
            self.finish(chain);
            return;
        }
        let Some(token) = self.table.find(pair) else {
            match packet.op {
                Op::Request if packet.dst_cid == HOST_CID => self.request(&packet, pair, now),
                Op::Request => self.request_sibling(&packet, pair, now),
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
        match packet.op {
            Op::Rw => {
                self.payload(token, packet, chain, now);
                return;
            }
            Op::Request => self.input(token, Input::DpuRequest, now),
            Op::Response => self.input(token, Input::DpuResponse, now),
            Op::Rst => {
                self.end_of_dpu_records(token, now);
                self.input(token, Input::DpuRst, now)
            }
            Op::Shutdown => {
                if packet.flags & SHUTDOWN_SEND != 0 {
                    self.end_of_dpu_records(token, now);
                }
                self.input(token, Input::DpuShutdown(packet.flags), now)
            }
            Op::CreditRequest => self.input(token, Input::DpuCreditRequest, now),
            Op::CreditUpdate | Op::Unknown(_) => {
                self.reconcile(token, Effects::default(), now);
                Effects::default()
            }
        };
        self.finish(chain);
    }

    /// The DPU sends no more: a record without its end is none.
    fn end_of_dpu_records(&mut self, token: Token, now: u64) {
        let Some((_, channel)) = self.table.get_mut(token) else { return };
        if !channel.keeps_records() {
            return;
        }
        let dropped = channel.waiting.drop_partial();
        if dropped > 0 {
            self.counters.discarded_bytes += dropped as u64;
            self.input(token, Input::HostTook(dropped as u32), now);
        }
    }

    fn payload(&mut self, token: Token, packet: &Header, chain: Chain, now: u64) {
        if !self.input(token, Input::DpuData(packet.len), now).keep_data {
            self.counters.discarded_bytes += u64::from(packet.len);
            self.finish(chain);
            return;
        }
        self.counters.bytes_from_dpu += u64::from(packet.len);
        if self.table.get_mut(token).is_some_and(|(_, channel)| channel.keeps_records()) {
            self.record(token, packet, chain, now);
            return;
        }
        if packet.len == 0 {
            self.finish(chain);
            return;
        }
        let Some(chain) = self.gather(token, packet.len as usize, chain) else { return };
        // The socket is full already, or more pieces than one call takes: what is gathered goes first,
        // then this by way of the buffer.
        self.flush(now);
        self.keep(token, &chain, packet.len as usize);
        self.finish(chain);
        self.write_waiting(token, now);
    }

    /// Puts a packet into the batch; if it does not fit there, the chain comes back.
    fn gather(&mut self, token: Token, len: usize, chain: Chain) -> Option<Chain> {
        let direct = match self.table.get_mut(token) {
            Some((_, channel)) => channel.waiting.is_empty() && channel.writable,
            None => false,
        };
        if !direct {
            return Some(chain);
        }
        // Lengths were checked when the packet came.
        let Ok(slices) = chain.readable_slices(HEADER_LEN, len, &mut self.slices) else {
            return Some(chain);
        };
        if self.batch.pieces.len() + slices.as_iovecs().len() > IOV_MAX {
            return Some(chain);
        }
        self.batch.token = Some(token);
        self.batch.pieces.extend(slices.as_iovecs());
        self.batch.bytes += len;
        self.batch.chains.push((chain, len));
        None
    }

    /// Copies the payload of a packet into the buffer of its connection, if the host still takes any.
    fn keep(&mut self, token: Token, chain: &Chain, len: usize) {
        let Some((_, channel)) = self.table.get_mut(token) else { return };
        if channel.connection.wants_host_writable() {
            channel.waiting.append(len, |offset, place| {
                // Lengths were checked when the packet came.
                let _ = chain.copy_out(HEADER_LEN + offset, place);
            });
        }
    }

    /// A packet for a host socket that keeps records: whole records only, each with one call.
    fn record(&mut self, token: Token, packet: &Header, chain: Chain, now: u64) {
        let Some((pair, channel)) = self.table.get_mut(token) else {
            self.finish(chain);
            return;
        };
        let len = packet.len as usize;
        // A stream has no empty records, and each of its packets is a record.
        let ends = match pair.kind {
            Kind::SeqPacket => packet.flags & SEQ_EOM != 0,
            Kind::Stream | Kind::Unknown(_) => len > 0,
        };
        let eor = pair.kind == Kind::SeqPacket && packet.flags & SEQ_EOR != 0;
        let alone = ends && channel.waiting.is_empty() && channel.writable;
        if alone
            && let Some(socket) = &channel.socket
            && let Ok(slices) = chain.readable_slices(HEADER_LEN, len, &mut self.slices)
            && slices.as_iovecs().len() <= IOV_MAX
        {
            self.pieces.clear();
            self.pieces.extend(slices.as_iovecs());
            let sent = sys::send_pieces_as_record(socket.as_fd(), &self.pieces, eor);
            self.pieces.clear();
            match sent {
                Ok(_) => {
                    self.finish(chain);
                    self.took(token, len, Input::HostTook(packet.len), now);
                    return;
                }
                Err(Errno::AGAIN) => channel.writable = false,
                Err(Errno::INTR) => {}
                Err(errno) => {
                    self.finish(chain);
                    self.write_failed(token, errno, now);
                    return;
                }
            }
        }
        self.keep(token, &chain, len);
        self.finish(chain);
        let Some((_, channel)) = self.table.get_mut(token) else { return };
        if ends {
            if channel.waiting.records() >= channel.connection.window() as usize + EMPTY_RECORDS {
                self.counters.oversized_records += 1;
                self.input(token, Input::Abort, now);
                return;
            }
            channel.waiting.end_record(eor);
            self.input(token, Input::DpuRecord, now);
        }
        self.write_waiting(token, now);
    }

    /// Hands the gathered packets to their host socket. Nothing to do when there are none.
    pub fn flush(&mut self, now: u64) {
        let Some(token) = self.batch.token else { return };
        let batch = std::mem::take(&mut self.batch);
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
            Err(errno) => {
                self.counters.discarded_bytes += batch.bytes as u64;
                self.return_batch(batch);
                self.write_failed(token, errno, now);
                return;
            }
        };
        if taken < batch.bytes
            && let Some((_, channel)) = self.table.get_mut(token)
        {
            // The socket is full, and an edge follows when it has room again. After EINTR there may be
            // room now, which `write_waiting` finds out.
            channel.writable = sent == Err(Errno::INTR);
            let mut skip = taken;
            for (chain, len) in &batch.chains {
                let here = skip.min(*len);
                skip -= here;
                channel.waiting.append(len - here, |offset, place| {
                    // Lengths were checked when the packets came.
                    let _ = chain.copy_out(HEADER_LEN + here + offset, place);
                });
            }
        }
        self.return_batch(batch);
        self.took(token, taken, Input::HostTook(taken as u32), now);
        if sent == Err(Errno::INTR) {
            self.write_waiting(token, now);
        }
    }

    /// Gives the chains of a batch back and keeps its storage.
    fn return_batch(&mut self, mut batch: Batch) {
        self.done.extend(batch.chains.drain(..).map(|(chain, _)| chain));
        batch.pieces.clear();
        batch.bytes = 0;
        batch.token = None;
        self.batch = batch;
    }

    /// Writes what waits for a host socket, as far as it takes it.
    pub(super) fn write_waiting(&mut self, token: Token, now: u64) {
        while let Some((_, channel)) = self.table.get_mut(token) {
            let idle = channel.waiting.is_empty() || !channel.connection.wants_host_writable();
            if idle || !channel.writable {
                return;
            }
            let Some(socket) = &channel.socket else { return };
            let records = socket.keeps_records();
            let sent = if records {
                match channel.waiting.first_record() {
                    None => return,
                    Some((record, eor)) => sys::send_record(socket.as_fd(), record, eor),
                }
            } else {
                let (first, second) = channel.waiting.as_slices();
                sys::send_bytes(socket.as_fd(), first, second)
            };
            match sent {
                Ok(_) if records => {
                    let len = channel.waiting.pop_record();
                    self.took(token, len, Input::HostTookRecord(len as u32), now);
                }
                Ok(taken) => {
                    channel.waiting.consume(taken);
                    self.took(token, taken, Input::HostTook(taken as u32), now);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    channel.writable = false;
                    return;
                }
                Err(errno) => {
                    self.write_failed(token, errno, now);
                    return;
                }
            }
        }
    }

    /// Writing to the host socket failed for good.
    fn write_failed(&mut self, token: Token, errno: Errno, now: u64) {
        let Some((_, channel)) = self.table.get_mut(token) else { return };
        if errno == Errno::MSGSIZE {
            // The window is smaller than what the socket takes; somebody made its buffer smaller since.
            self.counters.oversized_records += 1;
            self.input(token, Input::Abort, now);
            return;
        }
        // A datagram peer leaves no end of file behind.
        let over = channel.socket.as_ref().is_some_and(crate::host::socket::HostSocket::is_datagram);
        if over {
            self.input(token, Input::HostEof, now);
        }
        self.input(token, Input::HostGone, now);
    }

    /// The host socket took bytes.
    fn took(&mut self, token: Token, bytes: usize, input: Input, now: u64) {
        if let Some((_, channel)) = self.table.get_mut(token) {
            channel.taken += bytes as u64;
            let more = self.quotas.bulk_window.saturating_sub(channel.connection.window());
            let bulk = channel.taken >= BULK && !channel.keeps_records();
            if bulk && more > 0 && self.windows.promise_more(more) {
                channel.connection.grow_window(self.quotas.bulk_window);
            }
        }
        self.input(token, input, now);
    }

    fn finish(&mut self, chain: Chain) {
        self.done.push(chain);
    }
}
