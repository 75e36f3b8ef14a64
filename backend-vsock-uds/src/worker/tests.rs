//! The worker's thread with rings in memory of this process: kicks, interrupts, sleep, hand-over.

use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use vring::memory::DpuMemory;

use super::*;
use crate::conn::Timeouts;
use crate::mux::Quotas;
use crate::mux::tests::Queue;
use crate::packet::{HEADER_LEN, HOST_CID, Header, Kind as Socket, Op};
use crate::route::Routes;

const CID: u64 = 7;
const PORT: u32 = 80;
const LIMIT: Duration = Duration::from_secs(10);
const SIZE: u16 = 16;
/// Where the queues lie, and behind them a page for each of their buffers.
const PLACES: [u64; 3] = [0, 0x4000, 0x8000];
const BUFFERS: u64 = 0x1_0000;
const WRITABLE: u16 = 2;

/// A DPU, its worker, and a directory for host sockets.
struct World {
    memory: Arc<DpuMemory>,
    queues: [Queue; 3],
    kicks: Vec<OwnedFd>,
    calls: Vec<OwnedFd>,
    worker: Worker,
    root: tempfile::TempDir,
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

fn buffer(queue: u16, slot: u16) -> u64 {
    BUFFERS + u64::from(queue) * 0x1_0000 + u64::from(slot) * 0x1000
}

impl World {
    fn new(poll_window: Duration) -> Self {
        let root = tempfile::tempdir().expect("a directory");
        let mut routes = Routes::none();
        routes.insert(PORT, root.path().join("service"));
        let mux = Mux::new(CID, routes, Quotas::default(), Timeouts::default()).expect("a mux");
        let worker = Worker::spawn("worker-test", mux, PollWindow::new(poll_window, 2)).expect("a thread");
        let queue = |at| Queue { at, size: SIZE, available: 0, used: 0 };
        World {
            memory: Arc::new(DpuMemory::anonymous(1 << 20).expect("memory")),
            queues: PLACES.map(queue),
            kicks: (0..3).map(|_| event()).collect(),
            calls: (0..3).map(|_| event()).collect(),
            worker,
            root,
        }
    }

    /// A new driver: queues at 0, buffers in the rx and event queues.
    fn boot(&mut self) {
        for (number, queue) in (0u16..).zip(&mut self.queues) {
            (queue.available, queue.used) = (0, 0);
            self.memory.write(queue.at + 0x1000, &[0; 64]).expect("in range");
            self.memory.write(queue.at + 0x2000, &[0; 256]).expect("in range");
            let len = if number == EVENT { 4 } else { 4096 };
            for slot in 0..SIZE {
                let flags = if number == TX { 0 } else { WRITABLE };
                queue.describe(&self.memory, slot, buffer(number, slot), len, flags, 0);
                if number != TX {
                    queue.offer(&self.memory, slot);
                }
            }
        }
        for number in 0..3 {
            self.start(number, 0, true);
        }
    }

    fn start(&self, number: u16, base: u16, with_kick: bool) {
        let place = usize::from(number);
        let kick = match with_kick {
            true => Kick::Event(self.kicks[place].try_clone().expect("a copy")),
            false => Kick::Poll,
        };
        let call = Some(self.calls[place].try_clone().expect("a copy"));
        self.worker.start(self.queues[place].ring_with(&self.memory, number, base, kick, call));
    }

    fn take(&self, number: u16) -> u16 {
        let ring = self.worker.take(number).expect("the worker has the ring");
        assert_eq!(ring.in_flight(), 0, "nothing stays out");
        ring.base()
    }

    fn kick(&self, number: u16) {
        rustix::io::write(&self.kicks[usize::from(number)], &1u64.to_ne_bytes()).expect("kicked");
    }

    fn send(&mut self, header: &Header, payload: &[u8]) {
        let queue = &mut self.queues[usize::from(TX)];
        let slot = queue.available % SIZE;
        let bytes = [&header.encode()[..], payload].concat();
        self.memory.write(buffer(TX, slot), &bytes).expect("in range");
        queue.describe(&self.memory, slot, buffer(TX, slot), bytes.len() as u32, 0, 0);
        queue.offer(&self.memory, slot);
        self.kick(TX);
    }

    /// Waits for an interrupt and takes a used entry.
    fn used(&mut self, number: u16) -> (u16, u32) {
        let place = usize::from(number);
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(used) = self.queues[place].take_used(&self.memory) {
                return used;
            }
            assert!(Instant::now() < deadline, "queue {number}: nothing within {LIMIT:?}");
            let mut fds = [PollFd::new(&self.calls[place], PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).expect("poll works");
            let _ = rustix::io::read(&self.calls[place], &mut [0; 8]);
        }
    }

    /// The next packet, whose buffer is offered again.
    fn packet(&mut self) -> (Header, Vec<u8>) {
        let (slot, len) = self.used(RX);
        let mut bytes = vec![0; len as usize];
        self.memory.read(buffer(RX, slot), &mut bytes).expect("in range");
        self.queues[usize::from(RX)].offer(&self.memory, slot);
        self.kick(RX);
        let payload = bytes.split_off(HEADER_LEN);
        let mut header = [0; HEADER_LEN];
        header.copy_from_slice(&bytes);
        (Header::decode(&header), payload)
    }

    fn connect(&mut self, listener: &UnixListener) -> UnixStream {
        self.send(&header(Op::Request), &[]);
        assert_eq!(self.packet().0.op, Op::Response);
        listener.accept().expect("connected").0
    }

    fn listen(&self) -> UnixListener {
        UnixListener::bind(self.root.path().join("service")).expect("a listener")
    }
}

fn header(op: Op) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: 1000,
        dst_port: PORT,
        len: 0,
        kind: Socket::Stream,
        op,
        flags: 0,
        buf_alloc: 65_536,
        fwd_cnt: 0,
    }
}

#[test]
fn kicks_wake_it_and_it_interrupts_the_dpu() {
    for window in [Duration::ZERO, Duration::from_micros(50)] {
        let mut world = World::new(window);
        let listener = world.listen();
        world.boot();
        let mut stream = world.connect(&listener);
        for round in 0..100u8 {
            stream.write_all(&[round; 10]).expect("written");
            let (packet, payload) = world.packet();
            assert_eq!((packet.op, payload), (Op::Rw, vec![round; 10]));
        }
        assert_eq!(world.used(TX), (0, 0), "the packet of the request came back");
    }
}

#[test]
fn a_queue_without_kick_descriptor_is_polled() {
    let mut world = World::new(Duration::ZERO);
    let listener = world.listen();
    world.boot();
    world.take(TX);
    world.start(TX, 0, false);
    world.connect(&listener);
}

#[test]
fn an_idle_worker_sleeps() {
    let mut world = World::new(Duration::from_micros(50));
    let listener = world.listen();
    world.boot();
    let _stream = world.connect(&listener);
    let before = world.worker.report().expect("it runs");
    assert_eq!(before.connections, 1);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(300) {
        // wait-loop: the measuring interval is over.
        thread::sleep(Duration::from_millis(20));
    }
    let after = world.worker.report().expect("it runs");
    // Each report takes a round or two, and the last window of spinning a few more.
    assert!(after.rounds - before.rounds < 10, "{} rounds without work", after.rounds - before.rounds);
    assert!(after.sleeps > 0);
}

#[test]
fn a_queue_that_stops_has_its_unused_buffers_back() {
    let mut world = World::new(Duration::ZERO);
    let listener = world.listen();
    world.boot();
    let mut stream = world.connect(&listener);
    stream.write_all(b"one").expect("written");
    world.packet();
    let used = world.queues[usize::from(RX)].used;
    assert_eq!(world.take(RX), used, "exactly the buffers that were used");
    assert_eq!(world.take(TX), 1);
    assert!(world.worker.take(RX).is_none(), "it is gone already");
    // Bytes that come meanwhile wait for the queue.
    stream.write_all(b"two").expect("written");
    world.start(RX, used, true);
    world.start(TX, 1, true);
    assert_eq!(world.packet().1, b"two");
}

#[test]
fn a_lost_front_end_is_followed_by_resets_and_an_event() {
    let mut world = World::new(Duration::ZERO);
    let listener = world.listen();
    world.boot();
    let _stream = world.connect(&listener);
    let (rx, tx) = (world.queues[usize::from(RX)].used, 1);
    world.worker.front_end_gone();
    world.start(RX, rx, true);
    world.start(TX, tx, true);
    world.start(EVENT, 0, true);
    assert_eq!(world.packet().0.op, Op::Rst);
    assert_eq!(world.used(EVENT), (0, 4));
    let report = world.worker.report().expect("it runs");
    assert_eq!((report.connections, report.counters.lost_connections), (0, 1));
}

#[test]
fn an_event_waits_for_a_buffer_that_holds_it() {
    let mut world = World::new(Duration::ZERO);
    let listener = world.listen();
    world.boot();
    let _stream = world.connect(&listener);
    world.worker.front_end_gone();
    // The first event buffer is too small, and the second one right.
    world.queues[usize::from(EVENT)].describe(&world.memory, 0, buffer(EVENT, 0), 3, WRITABLE, 0);
    let rx = world.queues[usize::from(RX)].used;
    world.start(RX, rx, true);
    world.start(TX, 1, true);
    world.start(EVENT, 0, true);
    assert_eq!((world.used(EVENT), world.used(EVENT)), ((0, 0), (1, 4)));
}

#[test]
fn a_rebooted_dpu_hears_nothing_of_the_past() {
    let mut world = World::new(Duration::ZERO);
    let listener = world.listen();
    world.boot();
    let _stream = world.connect(&listener);
    world.worker.front_end_gone();
    world.boot();
    let _stream = world.connect(&listener);
    assert_eq!(world.queues[usize::from(EVENT)].take_used(&world.memory), None);
}

#[test]
fn a_broken_tx_queue_stops_and_the_thread_lives() {
    let mut world = World::new(Duration::ZERO);
    let listener = world.listen();
    world.boot();
    let mut stream = world.connect(&listener);
    let at = PLACES[usize::from(TX)] + 0x1000 + 2;
    world.memory.write(at, &9999u16.to_le_bytes()).expect("in range");
    world.kick(TX);
    stream.write_all(b"still heard").expect("written");
    assert_eq!(world.packet().1, b"still heard");
    assert!(world.worker.take(TX).expect("the ring").is_broken());
}

#[test]
fn it_ends_when_asked() {
    let world = World::new(Duration::from_micros(50));
    world.worker.quit();
    assert!(world.worker.wait_ended(LIMIT));
    assert_eq!(world.worker.report(), None);
}
