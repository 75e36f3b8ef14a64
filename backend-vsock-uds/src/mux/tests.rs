//! The mux with real Unix sockets and rings in memory of this process: both ends play in one thread, so
//! every test is exact about what happens when, and none waits.

mod closing;
mod fairness;
mod greeting;
mod hostile;
mod records;
mod streams;

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use rustix::event::Timespec;
use vring::memory::DpuMemory;
use vring::ring::{Kick, Ring, RingAddresses, RingConfig};

use super::{Mux, Quotas};
use crate::conn::Timeouts;
use crate::packet::{HEADER_LEN, HOST_CID, Header, Kind, Op};
use crate::route::Routes;

pub const CID: u64 = 42;
/// Port of the host that leads to the test's listener.
pub const PORT: u32 = 1234;
pub const TIMEOUTS: Timeouts = Timeouts { connect: 2_000, linger: 8_000, greeting: 10_000 };

const RX_SIZE: u16 = 128;
const RX_BUFFER: u64 = 4096;
const RX_AREA: u64 = 0x10_000;
const TX_SIZE: u16 = 256;
const TX_SLOTS: u16 = 32;
const TX_PIECES: u16 = 8;
const TX_AREA: u64 = 0x10_0000;
const TX_STRIDE: u64 = 0x14000;
/// Turns after which something that should come to rest is taken for a spin.
const RESTLESS: usize = 20_000;

/// One driver-side queue: where it lies and what the driver knows of it.
pub(crate) struct Queue {
    pub at: u64,
    pub size: u16,
    pub available: u16,
    pub used: u16,
}

impl Queue {
    fn available_at(&self) -> u64 {
        self.at + 0x1000
    }

    fn used_at(&self) -> u64 {
        self.at + 0x2000
    }

    fn ring(&self, memory: &Arc<DpuMemory>, base: u16) -> Ring {
        self.ring_with(memory, 0, base, Kick::Poll, None)
    }

    pub fn ring_with(
        &self,
        memory: &Arc<DpuMemory>,
        index: u16,
        base: u16,
        kick: Kick,
        call: Option<OwnedFd>,
    ) -> Ring {
        let user = memory.regions().next().expect("one region").region.user_addr;
        let config = RingConfig {
            index,
            size: u32::from(self.size),
            addresses: RingAddresses {
                descriptors: user + self.at,
                available: user + self.available_at(),
                used: user + self.used_at(),
            },
            base,
            event_idx: false,
            indirect: false,
            kick,
            call,
            err: None,
        };
        Ring::new(Arc::clone(memory), config).map_err(|(error, _)| error).expect("a ring")
    }

    pub fn describe(&self, memory: &DpuMemory, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut descriptor = [0; 16];
        descriptor[..8].copy_from_slice(&addr.to_le_bytes());
        descriptor[8..12].copy_from_slice(&len.to_le_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
        descriptor[14..].copy_from_slice(&next.to_le_bytes());
        memory.write(self.at + u64::from(index) * 16, &descriptor).expect("in range");
    }

    pub fn offer(&mut self, memory: &DpuMemory, head: u16) {
        let slot = u64::from(self.available % self.size);
        memory.write(self.available_at() + 4 + 2 * slot, &head.to_le_bytes()).expect("in range");
        self.available = self.available.wrapping_add(1);
        memory.write(self.available_at() + 2, &self.available.to_le_bytes()).expect("in range");
    }

    /// The next used entry: head and length.
    pub fn take_used(&mut self, memory: &DpuMemory) -> Option<(u16, u32)> {
        let mut index = [0; 2];
        memory.read(self.used_at() + 2, &mut index).expect("in range");
        if u16::from_le_bytes(index) == self.used {
            return None;
        }
        let mut entry = [0; 8];
        let slot = u64::from(self.used % self.size);
        memory.read(self.used_at() + 4 + 8 * slot, &mut entry).expect("in range");
        self.used = self.used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
        Some((word(0) as u16, word(4)))
    }
}

/// A packet that reached the DPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    pub header: Header,
    pub payload: Vec<u8>,
}

/// A DPU with its driver, the mux that serves it, and a directory for host sockets.
pub struct World {
    pub mux: Mux,
    pub now: u64,
    /// Packets that nobody has looked at.
    pub inbox: VecDeque<Packet>,
    /// The driver offers a buffer again as soon as it is used.
    pub refill: bool,
    held: Vec<u16>,
    memory: Arc<DpuMemory>,
    rx_queue: Queue,
    tx_queue: Queue,
    pub rx: Ring,
    tx: Ring,
    tx_free: Vec<u16>,
    pub root: tempfile::TempDir,
}

impl World {
    /// A world where `PORT` leads to `<root>/service`.
    pub fn new() -> Self {
        Self::with(Quotas::default())
    }

    pub fn with(quotas: Quotas) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        let mut routes = Routes::none();
        routes.insert(PORT, root.path().join("service"));
        Self::build(root, routes, quotas)
    }

    pub fn build(root: tempfile::TempDir, routes: Routes, quotas: Quotas) -> Self {
        let memory = Arc::new(DpuMemory::anonymous(8 << 20).expect("memory"));
        let rx_queue = Queue { at: 0, size: RX_SIZE, available: 0, used: 0 };
        let tx_queue = Queue { at: 0x4000, size: TX_SIZE, available: 0, used: 0 };
        let (rx, tx) = (rx_queue.ring(&memory, 0), tx_queue.ring(&memory, 0));
        let mut world = Self {
            mux: Mux::new(CID, routes, quotas, TIMEOUTS).expect("a mux"),
            now: 1000,
            inbox: VecDeque::new(),
            refill: true,
            held: Vec::new(),
            memory,
            rx_queue,
            tx_queue,
            rx,
            tx,
            tx_free: (0..TX_SLOTS).rev().collect(),
            root,
        };
        for head in 0..RX_SIZE {
            let addr = RX_AREA + u64::from(head) * RX_BUFFER;
            world.rx_queue.describe(&world.memory, head, addr, RX_BUFFER as u32, 2, 0);
            world.rx_queue.offer(&world.memory, head);
        }
        world
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// The host program behind `PORT`.
    pub fn listen(&self) -> UnixListener {
        UnixListener::bind(self.path("service")).expect("a listener")
    }

    /// Puts a packet into the tx queue, cut into these pieces.
    pub fn send_pieces(&mut self, pieces: &[&[u8]]) {
        if self.tx_free.is_empty() {
            self.turn();
        }
        let slot = self.tx_free.pop().expect("the mux returns every chain");
        assert!(!pieces.is_empty() && pieces.len() <= usize::from(TX_PIECES));
        let mut addr = TX_AREA + u64::from(slot) * TX_STRIDE;
        for (number, piece) in pieces.iter().enumerate() {
            let index = slot * TX_PIECES + number as u16;
            let last = number + 1 == pieces.len();
            self.memory.write(addr, piece).expect("in range");
            self.tx_queue.describe(
                &self.memory,
                index,
                addr,
                piece.len() as u32,
                u16::from(!last),
                index + 1,
            );
            // A gap, so that pieces stay apart.
            addr += piece.len() as u64 + 16;
        }
        self.tx_queue.offer(&self.memory, slot * TX_PIECES);
    }

    pub fn send(&mut self, header: &Header, payload: &[u8]) {
        if payload.is_empty() {
            self.send_pieces(&[&header.encode()]);
        } else {
            self.send_pieces(&[&header.encode(), payload]);
        }
    }

    /// One turn of a worker. Returns whether anything happened.
    pub fn turn(&mut self) -> bool {
        let mut busy = false;
        while let Some(chain) = self.tx.pop().expect("a sound ring") {
            self.mux.from_dpu(chain, self.now);
            busy = true;
        }
        self.mux.flush(self.now);
        self.mux.return_chains(&mut self.tx);
        self.tx.publish();
        while let Some((head, _)) = self.tx_queue.take_used(&self.memory) {
            self.tx_free.push(head / TX_PIECES);
        }
        self.mux.wait(Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("waiting works");
        busy |= self.mux.host_events(self.now).events > 0;
        if self.mux.next_deadline().is_some_and(|due| due <= self.now) {
            self.mux.sweep(self.now);
            busy = true;
        }
        busy |= self.mux.to_dpu(&mut self.rx, self.now);
        self.rx.publish();
        self.collect();
        busy
    }

    fn collect(&mut self) {
        while let Some((head, len)) = self.rx_queue.take_used(&self.memory) {
            let addr = RX_AREA + u64::from(head) * RX_BUFFER;
            if len > 0 {
                let mut bytes = vec![0; len as usize];
                self.memory.read(addr, &mut bytes).expect("in range");
                let payload = bytes.split_off(HEADER_LEN);
                let mut header = [0; HEADER_LEN];
                header.copy_from_slice(&bytes);
                let header = Header::decode(&header);
                assert_eq!(header.len as usize, payload.len(), "length of {header:?}");
                assert_eq!(header.dst_cid, CID);
                self.inbox.push_back(Packet { header, payload });
            }
            if self.refill {
                self.rx_queue.offer(&self.memory, head);
            } else {
                self.held.push(head);
            }
        }
    }

    /// The driver offers the buffers again that it kept.
    pub fn offer_held(&mut self) {
        for head in std::mem::take(&mut self.held) {
            self.rx_queue.offer(&self.memory, head);
        }
    }

    /// Runs until nothing happens any more. It must come to rest.
    pub fn settle(&mut self) {
        for _ in 0..RESTLESS {
            if !self.turn() {
                return;
            }
        }
        panic!("the mux does not come to rest: {:?}", self.mux.counters());
    }

    /// Lets time pass, deadline by deadline.
    pub fn pass(&mut self, milliseconds: u64) {
        let end = self.now + milliseconds;
        while let Some(due) = self.mux.next_deadline().filter(|due| *due <= end) {
            self.now = self.now.max(due);
            self.turn();
        }
        self.now = end;
        self.settle();
    }

    pub fn next(&mut self) -> Option<Packet> {
        self.inbox.pop_front()
    }

    /// The operations of the packets that came, which are then forgotten.
    pub fn ops(&mut self) -> Vec<Op> {
        self.inbox.drain(..).map(|packet| packet.header.op).collect()
    }

    /// The DPU connects to `PORT` and is accepted.
    pub fn connect(&mut self, dpu_port: u32) -> DpuSocket {
        self.connect_kind(dpu_port, Kind::Stream)
    }

    pub fn connect_kind(&mut self, dpu_port: u32, kind: Kind) -> DpuSocket {
        let mut socket = DpuSocket::new(dpu_port, PORT, kind);
        socket.tell(self, Op::Request, 0);
        self.settle();
        socket.receive(self);
        assert_eq!(socket.ops.drain(..).collect::<Vec<_>>(), [(Op::Response, 0)]);
        socket
    }

    /// A connection of the DPU and the host program's end of it.
    pub fn pair(&mut self, listener: &UnixListener, dpu_port: u32) -> (DpuSocket, UnixStream) {
        let socket = self.connect(dpu_port);
        let (stream, _) = listener.accept().expect("the mux has connected");
        stream.set_nonblocking(true).expect("non-blocking");
        (socket, stream)
    }
}

/// A socket of the DPU, with the bookkeeping that its kernel does.
#[derive(Debug)]
pub struct DpuSocket {
    pub dpu_port: u32,
    pub host_port: u32,
    pub kind: Kind,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
    /// As Linux since CVE-2026-23086: sends no more ahead than it would receive itself.
    pub limits_itself: bool,
    /// What the program in the DPU has not read yet.
    pub unread: u32,
    sent: u32,
    peer_alloc: u32,
    peer_fwd: u32,
    pub received: Vec<u8>,
    /// Records that have come completely.
    pub records: Vec<Vec<u8>>,
    /// Packets without payload, with their flags.
    pub ops: Vec<(Op, u32)>,
    /// Packets with payload.
    pub packets: usize,
    /// Where `received` of the current record starts.
    record_start: usize,
}

impl DpuSocket {
    pub fn new(dpu_port: u32, host_port: u32, kind: Kind) -> Self {
        Self {
            dpu_port,
            host_port,
            kind,
            buf_alloc: 256 << 10,
            fwd_cnt: 0,
            limits_itself: false,
            unread: 0,
            sent: 0,
            peer_alloc: 0,
            peer_fwd: 0,
            received: Vec::new(),
            records: Vec::new(),
            ops: Vec::new(),
            packets: 0,
            record_start: 0,
        }
    }

    pub fn header(&self, op: Op, flags: u32, len: usize) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: self.dpu_port,
            dst_port: self.host_port,
            len: len as u32,
            kind: self.kind,
            op,
            flags,
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.fwd_cnt,
        }
    }

    /// Sends a packet without payload.
    pub fn tell(&self, world: &mut World, op: Op, flags: u32) {
        world.send(&self.header(op, flags, 0), &[]);
    }

    /// Bytes the DPU may send.
    pub fn credit(&self) -> u32 {
        let room = if self.limits_itself { self.peer_alloc.min(self.buf_alloc) } else { self.peer_alloc };
        room.saturating_sub(self.sent.wrapping_sub(self.peer_fwd))
    }

    /// Sends one packet with payload, whether there is credit or not.
    pub fn write_packet(&mut self, world: &mut World, payload: &[u8], flags: u32) {
        world.send(&self.header(Op::Rw, flags, payload.len()), payload);
        self.sent = self.sent.wrapping_add(payload.len() as u32);
    }

    /// Writes as much as there is credit for, in packets of 64 KiB; bytes written.
    pub fn write(&mut self, world: &mut World, bytes: &[u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let here = (bytes.len() - done).min(65_536).min(self.credit() as usize);
            if here == 0 {
                world.settle();
                self.receive(world);
                if self.credit() == 0 {
                    break;
                }
                continue;
            }
            self.write_packet(world, &bytes[done..done + here], 0);
            done += here;
        }
        world.settle();
        done
    }

    /// Takes this socket's packets out of the inbox.
    pub fn receive(&mut self, world: &mut World) {
        let mut others = VecDeque::new();
        while let Some(packet) = world.next() {
            let header = packet.header;
            if (header.dst_port, header.src_port, header.kind) != (self.dpu_port, self.host_port, self.kind) {
                others.push_back(packet);
                continue;
            }
            (self.peer_alloc, self.peer_fwd) = (header.buf_alloc, header.fwd_cnt);
            if header.op == Op::Rw {
                self.packets += 1;
                self.unread += header.len;
                assert!(self.unread <= self.buf_alloc, "the DPU's buffer is overrun");
                self.received.extend_from_slice(&packet.payload);
                if self.kind == Kind::SeqPacket && header.flags & crate::packet::SEQ_EOM != 0 {
                    self.records.push(self.received[self.record_start..].to_vec());
                    self.record_start = self.received.len();
                }
                if self.kind == Kind::Stream {
                    assert_eq!(header.flags, 0, "a stream has no flags");
                }
            } else {
                assert!(packet.payload.is_empty());
                self.ops.push((header.op, header.flags));
            }
        }
        world.inbox = others;
    }

    /// The program in the DPU reads everything, and its kernel says so.
    pub fn read_all(&mut self, world: &mut World) {
        loop {
            self.receive(world);
            if self.unread == 0 {
                return;
            }
            self.fwd_cnt = self.fwd_cnt.wrapping_add(std::mem::take(&mut self.unread));
            self.tell(world, Op::CreditUpdate, 0);
            world.settle();
        }
    }

    /// The packets without payload so far, which are then forgotten.
    pub fn take_ops(&mut self, world: &mut World) -> Vec<(Op, u32)> {
        self.receive(world);
        std::mem::take(&mut self.ops)
    }
}

/// Everything that can be read now; and whether the end of file was met.
pub fn drain(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut buffer = [0; 65_536];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return (bytes, true),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return (bytes, false),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return (bytes, true),
            Err(error) => panic!("reading: {error}"),
        }
    }
}

/// Writes until the socket is full; bytes written.
pub fn stuff(stream: &mut UnixStream, bytes: &[u8]) -> usize {
    let mut done = 0;
    while done < bytes.len() {
        match stream.write(&bytes[done..]) {
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("writing: {error}"),
        }
    }
    done
}

/// Bytes that differ everywhere.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}
