//! A front end and a DPU's driver for one device under test: a socket, a memory file, rings in it.
//!
//! The memory is written and read by `pwrite` and `pread`, which needs no mapping on this side.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vring::message::{HEADER_SIZE, Header, MemoryRegion, VringAddress, VringState, feature, number};
use vring::session::{End, SessionError, Stop};
use zerocopy::IntoBytes;

use super::gate::GateFs;
use crate::config::DeviceOptions;
use crate::device::serve_connection;
use crate::fuse::session::Session;
use crate::host::options::HostOptions;

const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 16 << 20;
const RING_AREA: u64 = 0x4_0000;
const AVAILABLE: u64 = 0x1_0000;
const USED: u64 = 0x2_0000;
const BUFFERS: u64 = 8 << 20;
const BUFFER_AREA: u64 = 1 << 20;
const REPLY: u64 = 0x400;
pub const SIZE: u16 = 64;
const LIMIT: Duration = Duration::from_secs(20);

/// FUSE operations by number.
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const INIT: u32 = 26;
pub const SETLKW: u32 = 33;

/// One queue as the DPU sees it.
pub struct Queue {
    pub index: u16,
    available: u16,
    used: u16,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub err: OwnedFd,
}

/// A reply: slot of the request, positive errno, bytes written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    pub slot: u16,
    pub errno: i32,
    pub written: u32,
}

pub struct Dpu {
    socket: UnixStream,
    memory: OwnedFd,
    pub fs: Arc<GateFs>,
    pub stop: Stop,
    served: Option<JoinHandle<Result<End, SessionError>>>,
    features: u64,
}

pub fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

/// Value of an eventfd, which is 0 afterwards.
pub fn take_count(event: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    rustix::io::read(event, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

fn state(index: u16, num: u32) -> Vec<u8> {
    VringState { index: index.into(), num }.as_bytes().to_vec()
}

impl Dpu {
    pub fn connect(change: impl FnOnce(&mut DeviceOptions, &mut usize)) -> Dpu {
        Dpu::connect_with(feature::EVENT_IDX, change)
    }

    pub fn connect_with(ring_features: u64, change: impl FnOnce(&mut DeviceOptions, &mut usize)) -> Dpu {
        let mut options = DeviceOptions {
            tag: None,
            request_queues: 2,
            queue_size: 1024,
            poll_window: Duration::from_micros(50),
            pool_size: 2,
        };
        let mut lock_waiters = 4;
        change(&mut options, &mut lock_waiters);
        let fs = Arc::new(GateFs::default());
        let session = Arc::new(Session::new(&HostOptions::default()));
        let stop = Stop::new().unwrap();
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        let (served_fs, ending) = (Arc::clone(&fs), stop.clone());
        let served = std::thread::spawn(move || {
            serve_connection(&theirs, served_fs, session, &options, lock_waiters, &ending)
        });
        let memory = rustix::fs::memfd_create(c"device-test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, MEMORY).unwrap();
        let features = feature::VERSION_1 | feature::PROTOCOL_FEATURES | ring_features;
        let dpu = Dpu { socket, memory, fs, stop, served: Some(served), features };
        dpu.send(number::GET_PROTOCOL_FEATURES, false, &[], &[]);
        let protocol = dpu.reply();
        dpu.send(number::SET_PROTOCOL_FEATURES, false, &protocol, &[]);
        dpu.ack(number::SET_OWNER, &[], &[]);
        dpu.ack(number::SET_FEATURES, &features.to_ne_bytes(), &[]);
        dpu.share();
        dpu
    }

    /// Sends the memory table; again, it is a new one with the same memory.
    pub fn share(&self) {
        let region = MemoryRegion { dpu_addr: 0, size: MEMORY, user_addr: USER, mmap_offset: 0 };
        let table = [[1u32, 0].as_bytes(), region.as_bytes()].concat();
        self.ack(number::SET_MEM_TABLE, &table, &[self.memory.as_fd()]);
    }

    fn send(&self, request: u32, need_reply: bool, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = Header { request, need_reply, size: payload.len() };
        let bytes = [&header.encode()[..], payload].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(fds.is_empty() || ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        let sent = sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(bytes.len()));
    }

    fn reply(&self) -> Vec<u8> {
        let mut header = [0; HEADER_SIZE];
        (&self.socket).read_exact(&mut header).expect("a reply within the time limit");
        let [_, _, size]: [u32; 3] = zerocopy::transmute!(header);
        let mut payload = vec![0; size as usize];
        (&self.socket).read_exact(&mut payload).unwrap();
        payload
    }

    #[track_caller]
    pub fn ack(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send(request, true, payload, fds);
        assert_eq!(self.reply(), [0; 8], "{} was refused", vring::message::name(request));
    }

    /// Sets a queue up and starts it.
    pub fn start(&self, index: u16) -> Queue {
        self.start_with(index, true)
    }

    pub fn start_with(&self, index: u16, kick_descriptor: bool) -> Queue {
        let queue = Queue { index, available: 0, used: 0, kick: event(), call: event(), err: event() };
        let base = USER + u64::from(index) * RING_AREA;
        let address = VringAddress {
            index: index.into(),
            flags: 0,
            descriptor: base,
            used: base + USED,
            available: base + AVAILABLE,
            log: 0,
        };
        let number = u64::from(index).to_ne_bytes();
        self.ack(number::SET_VRING_NUM, &state(index, SIZE.into()), &[]);
        self.ack(number::SET_VRING_ADDR, address.as_bytes(), &[]);
        self.ack(number::SET_VRING_CALL, &number, &[queue.call.as_fd()]);
        self.ack(number::SET_VRING_ERR, &number, &[queue.err.as_fd()]);
        if kick_descriptor {
            self.ack(number::SET_VRING_KICK, &number, &[queue.kick.as_fd()]);
        } else {
            self.ack(number::SET_VRING_KICK, &(u64::from(index) | 1 << 8).to_ne_bytes(), &[]);
        }
        self.ack(number::SET_VRING_ENABLE, &state(index, 1), &[]);
        queue
    }

    /// Sets a stopped queue up from the beginning, with an empty ring.
    pub fn start_anew(&self, index: u16) -> Queue {
        let ring = u64::from(index) * RING_AREA;
        self.poke(ring + AVAILABLE, &[0; 4]);
        self.poke(ring + USED, &[0; 4]);
        self.ack(number::SET_VRING_BASE, &state(index, 0), &[]);
        self.start(index)
    }

    /// Queue 1, with the file system initialised over it.
    pub fn mount(&self) -> Queue {
        let mut queue = self.start(1);
        let init = [7u32, 31, 0, 1 << 1];
        self.submit(&mut queue, &[(0, INIT, 0, init.as_bytes())]);
        let completed = self.next(&mut queue);
        assert_eq!((completed.slot, completed.errno), (0, 0));
        queue
    }

    /// Stops the queue; next available entry.
    pub fn base(&self, queue: &Queue) -> u32 {
        self.send(number::GET_VRING_BASE, false, &state(queue.index, 0), &[]);
        let reply = self.reply();
        u32::from_ne_bytes(reply[4..].try_into().unwrap())
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.memory, bytes, at), Ok(bytes.len()));
    }

    fn peek<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        assert_eq!(rustix::io::pread(&self.memory, &mut bytes, at), Ok(N));
        bytes
    }

    /// Makes FUSE requests available all at once and kicks. Each is: slot, operation, node, arguments.
    pub fn submit(&self, queue: &mut Queue, requests: &[(u16, u32, u64, &[u8])]) {
        let ring = u64::from(queue.index) * RING_AREA;
        for (slot, operation, node, arguments) in requests {
            let buffer = BUFFERS + u64::from(queue.index) * BUFFER_AREA + u64::from(*slot) * 0x1000;
            let len = 40 + arguments.len() as u32;
            let unique = u64::from(*slot) + 1;
            let mut header = [len, *operation].as_bytes().to_vec();
            header.extend([unique, *node].as_bytes());
            header.extend([0u32; 4].as_bytes());
            self.poke(buffer, &[&header, *arguments].concat());
            self.poke(buffer + REPLY, &[0xee; 16]);
            let head = slot * 2;
            let answered = *operation != FORGET;
            let at = ring + u64::from(head) * 16;
            let flags = u32::from(answered) | u32::from(head + 1) << 16;
            self.poke(at, &[[buffer].as_bytes(), [len, flags].as_bytes()].concat());
            self.poke(at + 16, &[[buffer + REPLY].as_bytes(), [0x400u32, 2].as_bytes()].concat());
            let place = ring + AVAILABLE + 4 + 2 * u64::from(queue.available % SIZE);
            self.poke(place, &head.to_ne_bytes());
            queue.available = queue.available.wrapping_add(1);
        }
        self.poke(ring + AVAILABLE + 2, &queue.available.to_ne_bytes());
        self.kick(queue);
    }

    pub fn getattr(&self, queue: &mut Queue, slot: u16, node: u64) {
        self.submit(queue, &[(slot, GETATTR, node, &[0; 16])]);
    }

    pub fn setlkw(&self, queue: &mut Queue, slot: u16) {
        let mut arguments = [9u64, 1, 0, 99].as_bytes().to_vec();
        arguments.extend([libc::F_WRLCK as u32, 1, 0, 0].as_bytes());
        self.submit(queue, &[(slot, SETLKW, 1, &arguments)]);
    }

    pub fn kick(&self, queue: &Queue) {
        rustix::io::write(&queue.kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Writes the available index without anything behind it.
    pub fn break_ring(&self, queue: &Queue) {
        let ring = u64::from(queue.index) * RING_AREA;
        self.poke(ring + AVAILABLE + 2, &(queue.available.wrapping_add(SIZE + 1)).to_ne_bytes());
        self.kick(queue);
    }

    /// The next completion, if there is one.
    pub fn take(&self, queue: &mut Queue) -> Option<Completed> {
        let ring = u64::from(queue.index) * RING_AREA;
        if u16::from_ne_bytes(self.peek(ring + USED + 2)) == queue.used {
            return None;
        }
        let entry: [u8; 8] = self.peek(ring + USED + 4 + 8 * u64::from(queue.used % SIZE));
        let [head, written]: [u32; 2] = zerocopy::transmute!(entry);
        queue.used = queue.used.wrapping_add(1);
        let slot = head as u16 / 2;
        let buffer = BUFFERS + u64::from(queue.index) * BUFFER_AREA + u64::from(slot) * 0x1000;
        let reply: [u8; 16] = self.peek(buffer + REPLY);
        let [_, error, unique, _]: [i32; 4] = zerocopy::transmute!(reply);
        if written > 0 {
            assert_eq!(unique, i32::from(slot) + 1, "the reply is to this request");
        }
        Some(Completed { slot, errno: if written > 0 { -error } else { 0 }, written })
    }

    /// Waits for the next completion, sleeping on the call descriptor as a driver does.
    pub fn next(&self, queue: &mut Queue) -> Completed {
        let deadline = Instant::now() + LIMIT;
        let ring = u64::from(queue.index) * RING_AREA;
        loop {
            self.poke(ring + AVAILABLE + 4 + 2 * u64::from(SIZE), &queue.used.to_ne_bytes());
            if let Some(completed) = self.take(queue) {
                return completed;
            }
            assert!(Instant::now() < deadline, "queue {}: no completion within {LIMIT:?}", queue.index);
            let wait = Timespec { tv_sec: 1, tv_nsec: 0 };
            let mut fds = [PollFd::new(&queue.call, PollFlags::IN)];
            let woken = poll(&mut fds, Some(&wait)).unwrap() > 0;
            if woken {
                take_count(&queue.call);
            } else {
                assert!(self.take_is_none(queue), "queue {}: completed without a signal", queue.index);
            }
        }
    }

    fn take_is_none(&self, queue: &Queue) -> bool {
        let ring = u64::from(queue.index) * RING_AREA;
        u16::from_ne_bytes(self.peek(ring + USED + 2)) == queue.used
    }

    pub fn features(&self) -> u64 {
        self.features
    }

    /// Disconnects; how the session ended, and the file system when nothing else holds it.
    pub fn disconnect(mut self) -> (Result<End, SessionError>, Arc<GateFs>) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
        let end = self.served.take().unwrap().join().unwrap();
        (end, Arc::clone(&self.fs))
    }

    /// Waits for the session to end by itself.
    pub fn ended(mut self) -> (Result<End, SessionError>, Arc<GateFs>) {
        let end = self.served.take().unwrap().join().unwrap();
        (end, Arc::clone(&self.fs))
    }
}
