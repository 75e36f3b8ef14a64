//! Sessions driven by a front end over a real socket, with a device that only keeps its rings.

use std::collections::BTreeMap;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::sync::{Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::MemfdFlags;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zerocopy::{FromBytes, IntoBytes};

use super::*;
use crate::message::{HEADER_SIZE, Header, LogArea, VringAddress, VringState, number};

const USER: u64 = 0x7f00_0000_0000;
const MEMORY: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
const BUFFER: u64 = 0x1_0000;
/// A region of this size is none the test device works in.
const UNFIT: u64 = 0x2_0000;
const FEATURES: u64 = feature::VERSION_1 | feature::EVENT_IDX | feature::INDIRECT_DESC;

/// What happened to the device, seen from outside.
#[derive(Default)]
struct Seen {
    rings: BTreeMap<u16, Ring>,
    starts: u32,
    stops: u32,
    resets: u32,
    tables: Vec<usize>,
}

#[derive(Clone, Default)]
struct TestDevice {
    seen: Arc<Mutex<Seen>>,
    config: Option<Vec<u8>>,
}

impl TestDevice {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }
}

impl Device for TestDevice {
    fn features(&self) -> u64 {
        FEATURES
    }
    fn queues(&self) -> u16 {
        3
    }
    fn max_queue_size(&self) -> u32 {
        1024
    }
    fn config(&self) -> Option<&[u8]> {
        self.config.as_deref()
    }
    fn check_region(&mut self, region: &MemoryRegion, _fd: BorrowedFd<'_>) -> Result<(), String> {
        if region.size == UNFIT { Err("the device does not like it".into()) } else { Ok(()) }
    }
    fn memory_changed(&mut self, memory: &DpuMemory) {
        self.seen().tables.push(memory.regions().count());
    }
    fn start(&mut self, index: u16, ring: Ring) -> io::Result<()> {
        let mut seen = self.seen();
        seen.starts += 1;
        assert!(seen.rings.insert(index, ring).is_none(), "queue {index} was started twice");
        Ok(())
    }
    fn pause(&mut self, index: u16) -> Option<Ring> {
        self.seen().rings.remove(&index)
    }
    fn stop(&mut self, index: u16) -> Option<Ring> {
        let mut seen = self.seen();
        seen.stops += 1;
        seen.rings.remove(&index)
    }
    fn reset(&mut self) {
        self.seen().resets += 1;
    }
}

/// A front end and the session that serves it.
struct FrontEnd {
    socket: UnixStream,
    memory: OwnedFd,
    device: TestDevice,
    stop: Stop,
    session: Option<JoinHandle<Result<End, SessionError>>>,
}

impl FrontEnd {
    fn connect_to(device: TestDevice) -> FrontEnd {
        let (socket, theirs) = UnixStream::pair().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let stop = Stop::new().unwrap();
        let (mut served, ending) = (device.clone(), stop.clone());
        let session = std::thread::spawn(move || run(&theirs, &mut served, &ending));
        let memory = rustix::fs::memfd_create(c"session-test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, MEMORY).unwrap();
        FrontEnd { socket, memory, device, stop, session: Some(session) }
    }

    fn connect() -> FrontEnd {
        FrontEnd::connect_to(TestDevice::default())
    }

    /// Connected and negotiated, nothing set up.
    fn negotiated() -> FrontEnd {
        let front = FrontEnd::connect();
        front.negotiate();
        front
    }

    fn negotiate(&self) {
        assert!(self.u64(number::GET_FEATURES) & feature::PROTOCOL_FEATURES != 0);
        let protocol = self.u64(number::GET_PROTOCOL_FEATURES);
        self.send(number::SET_PROTOCOL_FEATURES, false, &protocol.to_ne_bytes(), &[]);
        self.ack(number::SET_OWNER, &[], &[]);
        self.ack(number::SET_FEATURES, &(FEATURES | feature::PROTOCOL_FEATURES).to_ne_bytes(), &[]);
    }

    /// With memory and queue 1 running.
    fn running() -> FrontEnd {
        let front = FrontEnd::negotiated();
        front.share();
        front.set_up(1);
        front.ack(number::SET_VRING_ENABLE, &state(1, 1), &[]);
        assert!(front.runs(1));
        front
    }

    fn share(&self) {
        self.ack(number::SET_MEM_TABLE, &table(&[whole()]), &[self.memory.as_fd()]);
    }

    fn set_up(&self, index: u32) {
        self.ack(number::SET_VRING_NUM, &state(index, 64), &[]);
        self.ack(number::SET_VRING_BASE, &state(index, 0), &[]);
        self.ack(number::SET_VRING_ADDR, addresses(index).as_bytes(), &[]);
        self.ack(number::SET_VRING_CALL, &u64::from(index).to_ne_bytes(), &[event().as_fd()]);
        self.ack(number::SET_VRING_KICK, &u64::from(index).to_ne_bytes(), &[event().as_fd()]);
    }

    fn send(&self, request: u32, need_reply: bool, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let header = Header { request, need_reply, size: payload.len() };
        self.send_raw(&[&header.encode()[..], payload].concat(), fds);
    }

    fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(254))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(&self.socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(bytes.len()));
    }

    fn reply(&self) -> (u32, Vec<u8>) {
        let mut header = [0; HEADER_SIZE];
        (&self.socket).read_exact(&mut header).expect("a reply within the time limit");
        let [request, flags, size]: [u32; 3] = zerocopy::transmute!(header);
        assert_eq!(flags, 5, "version 1, reply");
        let mut payload = vec![0; size as usize];
        (&self.socket).read_exact(&mut payload).unwrap();
        (request, payload)
    }

    fn u64(&self, request: u32) -> u64 {
        self.send(request, false, &[], &[]);
        let (replied, payload) = self.reply();
        assert_eq!(replied, request);
        u64::read_from_bytes(&payload).unwrap()
    }

    /// Sends with an acknowledgement asked for; whether it was positive.
    fn try_ack(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.send(request, true, payload, fds);
        let (replied, payload) = self.reply();
        assert_eq!((replied, payload.len()), (request, 8));
        payload == [0; 8]
    }

    #[track_caller]
    fn ack(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert!(self.try_ack(request, payload, fds), "{} was refused", message::name(request));
    }

    #[track_caller]
    fn nack(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        assert!(!self.try_ack(request, payload, fds), "{} was accepted", message::name(request));
    }

    fn base(&self, index: u32) -> u32 {
        self.send(number::GET_VRING_BASE, false, &state(index, 0), &[]);
        let (request, payload) = self.reply();
        assert_eq!(request, number::GET_VRING_BASE);
        let state = VringState::read_from_bytes(&payload).unwrap();
        assert_eq!(state.index, index);
        state.num
    }

    fn runs(&self, index: u16) -> bool {
        self.device.seen().rings.contains_key(&index)
    }

    fn with_ring<T>(&self, index: u16, act: impl FnOnce(&mut Ring) -> T) -> T {
        act(self.device.seen().rings.get_mut(&index).expect("the queue runs"))
    }

    fn poke(&self, at: u64, bytes: &[u8]) {
        assert_eq!(rustix::io::pwrite(&self.memory, bytes, at), Ok(bytes.len()));
    }

    fn peek16(&self, at: u64) -> u16 {
        let mut bytes = [0; 2];
        rustix::io::pread(&self.memory, &mut bytes, at).unwrap();
        u16::from_le_bytes(bytes)
    }

    /// The DPU offers one writable buffer as entry `available`.
    fn offer(&self, available: u16) {
        self.poke(0, &BUFFER.to_le_bytes());
        self.poke(8, &64u32.to_le_bytes());
        self.poke(12, &[2, 0, 0, 0]);
        self.poke(AVAILABLE + 4 + 2 * u64::from(available % 64), &[0, 0]);
        self.poke(AVAILABLE + 2, &available.wrapping_add(1).to_le_bytes());
    }

    fn end(mut self) -> Result<End, SessionError> {
        let session = self.session.take().unwrap();
        self.socket.shutdown(std::net::Shutdown::Write).unwrap();
        session.join().unwrap()
    }

    /// How the session ended by itself.
    fn ended(mut self) -> Result<End, SessionError> {
        self.session.take().unwrap().join().unwrap()
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn state(index: u32, num: u32) -> Vec<u8> {
    VringState { index, num }.as_bytes().to_vec()
}

fn whole() -> MemoryRegion {
    MemoryRegion { dpu_addr: 0, size: MEMORY, user_addr: USER, mmap_offset: 0 }
}

fn table(regions: &[MemoryRegion]) -> Vec<u8> {
    let mut payload = [regions.len() as u32, 0].as_bytes().to_vec();
    payload.extend(regions.as_bytes());
    payload
}

fn single(region: MemoryRegion) -> Vec<u8> {
    [&[0; 8], region.as_bytes()].concat()
}

fn addresses(index: u32) -> VringAddress {
    VringAddress { index, flags: 0, descriptor: USER, used: USER + USED, available: USER + AVAILABLE, log: 0 }
}

/// A file that can be told from all others, to see how often it is open in this process.
fn marked(name: &str) -> OwnedFd {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, MEMORY).unwrap();
    fd
}

fn times_open(name: &str) -> usize {
    let wanted = format!("/memfd:{name} (deleted)");
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter(|entry| {
            let target = std::fs::read_link(entry.as_ref().unwrap().path());
            target.is_ok_and(|target| target.as_os_str() == wanted.as_str())
        })
        .count()
}

#[test]
fn negotiation_tells_what_there_is() {
    let device = TestDevice { config: Some(vec![1, 2, 3, 4]), ..TestDevice::default() };
    let front = FrontEnd::connect_to(device);
    let features = front.u64(number::GET_FEATURES);
    assert_eq!(features, FEATURES | feature::LOG_ALL | feature::PROTOCOL_FEATURES);
    let protocol = ProtocolFeatures::from_bits(front.u64(number::GET_PROTOCOL_FEATURES)).unwrap();
    assert!(protocol.contains(ProtocolFeatures::CONFIG | ProtocolFeatures::MQ | ProtocolFeatures::STATUS));
    assert!(!protocol.contains(ProtocolFeatures::BACKEND_REQ));
    front.negotiate();
    assert_eq!(front.u64(number::GET_QUEUE_NUM), 3);
    assert_eq!(front.u64(number::GET_MAX_MEM_SLOTS), 509);
    front.send(number::GET_CONFIG, false, [1u32, 2, 0].as_bytes(), &[]);
    let (_, payload) = front.reply();
    assert_eq!(payload, [[1u32, 2, 0].as_bytes(), &[2, 3]].concat());
    front.send(number::GET_CONFIG, true, [3u32, 2, 0].as_bytes(), &[]);
    assert_eq!(front.reply(), (number::GET_CONFIG, vec![]), "an error is an empty reply");
    front.nack(number::SET_CONFIG, &[[0u32, 1, 0].as_bytes(), &[9]].concat(), &[]);
    front.ack(number::SET_CONFIG, &[[0u32, 1, 0].as_bytes(), &[1]].concat(), &[]);
    assert_eq!(front.end().unwrap(), End::Disconnected);
}

#[test]
fn config_is_offered_only_by_a_device_that_has_one() {
    let front = FrontEnd::connect();
    let protocol = front.u64(number::GET_PROTOCOL_FEATURES);
    assert_eq!(protocol & ProtocolFeatures::CONFIG.bits(), 0);
    front.negotiate();
    front.send(number::GET_CONFIG, false, [0u32, 4, 0].as_bytes(), &[]);
    assert_eq!(front.reply(), (number::GET_CONFIG, vec![]));
}

#[test]
fn queue_starts_when_all_of_it_is_there() {
    let front = FrontEnd::negotiated();
    front.share();
    front.set_up(1);
    assert!(!front.runs(1), "not enabled yet");
    front.ack(number::SET_VRING_ENABLE, &state(1, 1), &[]);
    assert!(front.runs(1));
    assert!(!front.runs(0) && !front.runs(2));
    assert_eq!(front.end().unwrap(), End::Disconnected);
}

#[test]
fn enabled_queue_starts_with_the_last_missing_part() {
    for last in [number::SET_VRING_KICK, number::SET_VRING_ADDR, number::SET_MEM_TABLE] {
        let front = FrontEnd::negotiated();
        front.ack(number::SET_VRING_ENABLE, &state(1, 1), &[]);
        front.ack(number::SET_VRING_NUM, &state(1, 64), &[]);
        let event = event();
        let parts: [(u32, Vec<u8>, &OwnedFd); 3] = [
            (number::SET_MEM_TABLE, table(&[whole()]), &front.memory),
            (number::SET_VRING_ADDR, addresses(1).as_bytes().to_vec(), &event),
            (number::SET_VRING_KICK, 1u64.to_ne_bytes().to_vec(), &event),
        ];
        let send = |part: &(u32, Vec<u8>, &OwnedFd)| {
            let fds: &[BorrowedFd<'_>] =
                if part.0 == number::SET_VRING_ADDR { &[] } else { &[part.2.as_fd()] };
            front.ack(part.0, &part.1, fds);
        };
        parts.iter().filter(|part| part.0 != last).for_each(send);
        assert!(!front.runs(1), "{} is missing", message::name(last));
        parts.iter().filter(|part| part.0 == last).for_each(send);
        assert!(front.runs(1), "{} was the last part", message::name(last));
    }
}

#[test]
fn queues_start_enabled_without_protocol_features() {
    let front = FrontEnd::connect();
    front.send(number::SET_OWNER, false, &[], &[]);
    front.send(number::SET_FEATURES, false, &FEATURES.to_ne_bytes(), &[]);
    front.send(number::SET_MEM_TABLE, false, &table(&[whole()]), &[front.memory.as_fd()]);
    front.send(number::SET_VRING_NUM, false, &state(0, 64), &[]);
    front.send(number::SET_VRING_ADDR, false, addresses(0).as_bytes(), &[]);
    front.send(number::SET_VRING_KICK, false, &0u64.to_ne_bytes(), &[event().as_fd()]);
    assert_eq!(front.u64(number::GET_FEATURES) & FEATURES, FEATURES, "everything before was handled");
    assert!(front.runs(0));
}

#[test]
fn polled_queue_needs_no_kick_descriptor() {
    let front = FrontEnd::negotiated();
    front.share();
    front.ack(number::SET_VRING_NUM, &state(2, 64), &[]);
    front.ack(number::SET_VRING_ADDR, addresses(2).as_bytes(), &[]);
    front.ack(number::SET_VRING_KICK, &(2u64 | 1 << 8).to_ne_bytes(), &[]);
    front.ack(number::SET_VRING_ENABLE, &state(2, 1), &[]);
    assert!(front.with_ring(2, |ring| ring.kick().is_none()));
}

#[test]
fn stopped_queue_tells_its_base_and_continues_there() {
    let front = FrontEnd::running();
    front.offer(0);
    front.with_ring(1, |ring| {
        let chain = ring.pop().unwrap().unwrap();
        ring.push_used(chain, 1);
        ring.publish();
    });
    assert_eq!(front.base(1), 1);
    assert!(!front.runs(1));
    assert_eq!(front.device.seen().stops, 1);
    assert_eq!(front.base(1), 1, "asking again changes nothing");
    front.ack(number::SET_VRING_KICK, &1u64.to_ne_bytes(), &[event().as_fd()]);
    assert!(front.runs(1), "a new kick starts it again");
    front.with_ring(1, |ring| assert_eq!(ring.base(), 1));
    assert_eq!(front.base(1), 1);
    front.ack(number::SET_VRING_BASE, &state(1, 7), &[]);
    assert_eq!(front.base(1), 7);
}

#[test]
fn running_queue_keeps_its_shape() {
    let front = FrontEnd::running();
    front.nack(number::SET_VRING_NUM, &state(1, 32), &[]);
    front.nack(number::SET_VRING_BASE, &state(1, 5), &[]);
    let moved = VringAddress { used: USER + USED + 0x1000, ..addresses(1) };
    front.nack(number::SET_VRING_ADDR, moved.as_bytes(), &[]);
    front.nack(number::SET_FEATURES, &(feature::VERSION_1 | feature::PROTOCOL_FEATURES).to_ne_bytes(), &[]);
    assert!(front.runs(1));
    front.ack(number::SET_VRING_ADDR, addresses(1).as_bytes(), &[]);
}

#[test]
fn disabled_queue_completes_but_takes_nothing() {
    let front = FrontEnd::running();
    front.offer(0);
    front.ack(number::SET_VRING_ENABLE, &state(1, 0), &[]);
    front.with_ring(1, |ring| assert!(!ring.has_work()));
    front.ack(number::SET_VRING_ENABLE, &state(1, 1), &[]);
    front.with_ring(1, |ring| assert!(ring.has_work()));
    front.nack(number::SET_VRING_ENABLE, &state(1, 2), &[]);
}

#[test]
fn new_memory_table_moves_running_queues() {
    let front = FrontEnd::running();
    front.offer(0);
    let chain = front.with_ring(1, |ring| ring.pop().unwrap().unwrap());
    let extra = MemoryRegion { dpu_addr: 1 << 32, size: 0x1000, user_addr: USER + (1 << 32), mmap_offset: 0 };
    front.ack(number::ADD_MEM_REG, &single(extra), &[front.memory.as_fd()]);
    assert!(front.runs(1));
    front.with_ring(1, |ring| assert_eq!(ring.memory().regions().count(), 2));
    front.ack(number::REM_MEM_REG, &single(extra), &[]);
    front.nack(number::REM_MEM_REG, &single(extra), &[]);
    front.with_ring(1, |ring| {
        ring.push_used(chain, 1);
        ring.publish();
    });
    assert_eq!(front.peek16(USED + 2), 1, "the chain that was out came back to the ring that moved");
    assert_eq!(front.device.seen().tables, [1, 2, 1]);
    front.ack(number::SET_MEM_TABLE, &table(&[whole()]), &[front.memory.as_fd()]);
    assert!(front.runs(1));
}

#[test]
fn queue_stops_when_its_ring_leaves_memory_and_starts_when_it_is_back() {
    let front = FrontEnd::running();
    front.ack(number::REM_MEM_REG, &single(whole()), &[]);
    assert!(!front.runs(1));
    front.ack(number::ADD_MEM_REG, &single(whole()), &[front.memory.as_fd()]);
    assert!(front.runs(1));
}

#[test]
fn refused_memory_leaves_everything_as_it_was() {
    let front = FrontEnd::running();
    let beyond = MemoryRegion { size: MEMORY + 1, ..whole() };
    front.nack(number::SET_MEM_TABLE, &table(&[beyond]), &[front.memory.as_fd()]);
    front.nack(number::SET_MEM_TABLE, &table(&[]), &[]);
    front.nack(
        number::SET_MEM_TABLE,
        &table(&[MemoryRegion { size: UNFIT, ..whole() }]),
        &[front.memory.as_fd()],
    );
    front.nack(number::SET_MEM_TABLE, &table(&[whole(), whole()]), &[front.memory.as_fd(); 2]);
    front.nack(number::ADD_MEM_REG, &single(whole()), &[front.memory.as_fd()]);
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    front.nack(number::SET_MEM_TABLE, &table(&[whole()]), &[pipe.as_fd()]);
    assert!(front.runs(1));
    assert_eq!(front.device.seen().tables, [1]);
}

#[test]
fn refused_memory_ends_a_session_that_asked_for_no_answer() {
    let front = FrontEnd::negotiated();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    front.send(number::SET_MEM_TABLE, false, &table(&[whole()]), &[pipe.as_fd()]);
    let error = front.ended().unwrap_err();
    assert!(error.to_string().contains("share=on"), "{error}");
}

#[test]
fn wrong_descriptor_counts_are_refused_and_closed() {
    let front = FrontEnd::running();
    let file = marked("wrong-count");
    for count in [0, 2, 8, 253] {
        let fds = vec![file.as_fd(); count];
        front.nack(number::SET_VRING_KICK, &1u64.to_ne_bytes(), &fds);
        front.nack(number::SET_MEM_TABLE, &table(&[whole()]), &fds);
        front.nack(number::ADD_MEM_REG, &single(whole()), &fds);
    }
    for count in [1, 8, 253] {
        let fds = vec![file.as_fd(); count];
        front.nack(number::SET_VRING_NUM, &state(1, 64), &fds);
        front.nack(250, &[], &fds);
        front.send(number::GET_FEATURES, false, &[], &fds);
        assert_eq!(front.reply(), (number::GET_FEATURES, vec![]));
    }
    assert!(front.runs(1));
    assert_eq!(times_open("wrong-count"), 1);
}

#[test]
fn events_are_replaced_without_leaks() {
    let front = FrontEnd::running();
    let file = marked("replaced");
    for _ in 0..5000 {
        for request in [number::SET_VRING_KICK, number::SET_VRING_CALL, number::SET_VRING_ERR] {
            front.ack(request, &1u64.to_ne_bytes(), &[file.as_fd()]);
        }
    }
    assert_eq!(times_open("replaced"), 1 + 3);
    assert!(front.runs(1));
    assert_eq!(front.base(1), 0);
    assert_eq!(times_open("replaced"), 1 + 2, "a stopped queue waits for a new kick descriptor");
    front.ack(number::SET_STATUS, &0u64.to_ne_bytes(), &[]);
    assert_eq!(times_open("replaced"), 1);
}

#[test]
fn unknown_requests_are_declined_and_the_session_goes_on() {
    let front = FrontEnd::negotiated();
    for request in [0, 19, 20, 22, 31, 32, 35, 41, 44, 1000, u32::MAX] {
        front.nack(request, &[1, 2, 3], &[]);
        front.send(request, false, &[7; 100], &[]);
    }
    front.nack(number::SET_BACKEND_REQ_FD, &[], &[event().as_fd()]);
    assert_eq!(front.u64(number::GET_QUEUE_NUM), 3);
}

#[test]
fn malformed_requests_are_declined_and_the_session_goes_on() {
    let front = FrontEnd::negotiated();
    for request in [
        number::SET_FEATURES,
        number::SET_MEM_TABLE,
        number::SET_VRING_NUM,
        number::SET_VRING_ADDR,
        number::SET_VRING_KICK,
        number::SET_PROTOCOL_FEATURES,
        number::SET_STATUS,
    ] {
        for size in [0, 7, 9, 41, 500] {
            front.nack(request, &vec![0x55; size], &[]);
        }
    }
    front.nack(number::SET_MEM_TABLE, &[[509u32, 0].as_bytes(), &[0; 509 * 32]].concat(), &[]);
    front.nack(number::SET_FEATURES, &(1u64 << 63).to_ne_bytes(), &[]);
    front.nack(number::SET_PROTOCOL_FEATURES, &(1u64 << 5).to_ne_bytes(), &[]);
    for index in [3, 255, u32::MAX] {
        front.nack(number::SET_VRING_NUM, &state(index, 64), &[]);
        front.nack(number::SET_VRING_ENABLE, &state(index, 1), &[]);
    }
    front.nack(number::SET_VRING_KICK, &3u64.to_ne_bytes(), &[event().as_fd()]);
    for size in [0, 3, 2048, 32768, 65536, u32::MAX] {
        front.nack(number::SET_VRING_NUM, &state(1, size), &[]);
    }
    front.nack(number::SET_VRING_BASE, &state(1, 65536), &[]);
    front.send(number::GET_VRING_BASE, false, &state(9, 0), &[]);
    assert_eq!(front.reply(), (number::GET_VRING_BASE, vec![]));
    assert_eq!(front.u64(number::GET_QUEUE_NUM), 3);
}

#[test]
fn bad_ring_addresses_are_declined() {
    let front = FrontEnd::negotiated();
    front.share();
    front.ack(number::SET_VRING_NUM, &state(1, 64), &[]);
    front.ack(number::SET_VRING_ENABLE, &state(1, 1), &[]);
    front.ack(number::SET_VRING_KICK, &1u64.to_ne_bytes(), &[event().as_fd()]);
    for wrong in [
        VringAddress { descriptor: USER + 8, ..addresses(1) },
        VringAddress { descriptor: 0, ..addresses(1) },
        VringAddress { used: USER + MEMORY - 16, ..addresses(1) },
        VringAddress { available: u64::MAX - 1, ..addresses(1) },
    ] {
        front.nack(number::SET_VRING_ADDR, wrong.as_bytes(), &[]);
        assert!(!front.runs(1));
    }
    front.ack(number::SET_VRING_ADDR, addresses(1).as_bytes(), &[]);
    assert!(front.runs(1));
}

#[test]
fn requests_before_the_owner_are_declined() {
    let front = FrontEnd::connect();
    let protocol = front.u64(number::GET_PROTOCOL_FEATURES);
    front.send(number::SET_PROTOCOL_FEATURES, false, &protocol.to_ne_bytes(), &[]);
    front.nack(number::SET_FEATURES, &FEATURES.to_ne_bytes(), &[]);
    front.nack(number::SET_MEM_TABLE, &table(&[whole()]), &[front.memory.as_fd()]);
    front.nack(number::SET_VRING_NUM, &state(1, 64), &[]);
    front.nack(number::RESET_DEVICE, &[], &[]);
    front.negotiate();
    front.share();
}

#[test]
fn acknowledgements_need_the_protocol_feature() {
    let front = FrontEnd::connect();
    front.send(number::SET_OWNER, true, &[], &[]);
    front.send(250, true, &[], &[]);
    // The next reply is the one to this request: the two before were not answered.
    assert!(front.u64(number::GET_FEATURES) != 0);
}

#[test]
fn status_is_kept_and_zero_stops_the_queues() {
    let front = FrontEnd::running();
    front.ack(number::SET_STATUS, &15u64.to_ne_bytes(), &[]);
    assert_eq!(front.u64(number::GET_STATUS), 15);
    front.nack(number::SET_STATUS, &256u64.to_ne_bytes(), &[]);
    front.ack(number::SET_STATUS, &0u64.to_ne_bytes(), &[]);
    assert_eq!(front.u64(number::GET_STATUS), 0);
    assert!(!front.runs(1));
    assert_eq!(front.device.seen().resets, 0, "a DPU that pauses keeps what it had open");
    front.set_up(1);
    front.ack(number::SET_VRING_ENABLE, &state(1, 1), &[]);
    assert!(front.runs(1));
}

#[test]
fn features_ok_needs_features() {
    let front = FrontEnd::connect();
    let protocol = front.u64(number::GET_PROTOCOL_FEATURES);
    front.send(number::SET_PROTOCOL_FEATURES, false, &protocol.to_ne_bytes(), &[]);
    front.ack(number::SET_OWNER, &[], &[]);
    front.ack(number::SET_STATUS, &11u64.to_ne_bytes(), &[]);
    assert_eq!(front.u64(number::GET_STATUS), 3);
}

#[test]
fn device_reset_stops_queues_and_drops_state() {
    let front = FrontEnd::running();
    front.ack(number::RESET_DEVICE, &[], &[]);
    assert!(!front.runs(1));
    assert_eq!(front.device.seen().resets, 1);
    front.negotiate();
    front.set_up(1);
    assert!(!front.runs(1), "a reset queue is disabled");
    front.ack(number::SET_VRING_ENABLE, &state(1, 1), &[]);
    assert!(front.runs(1));
}

#[test]
fn reset_owner_stops_the_queues() {
    let front = FrontEnd::running();
    front.ack(number::RESET_OWNER, &[], &[]);
    assert!(!front.runs(1));
}

#[test]
fn migration_log_is_written_and_switched_off() {
    let front = FrontEnd::running();
    let log = rustix::fs::memfd_create(c"log", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&log, 4096).unwrap();
    let dirty = |page: u64| {
        let mut byte = [0];
        rustix::io::pread(&log, &mut byte, page / 8).unwrap();
        byte[0] >> (page % 8) & 1 == 1
    };
    let area = LogArea { size: 4096, offset: 0 };
    front.send(number::SET_LOG_BASE, false, area.as_bytes(), &[log.as_fd()]);
    assert_eq!(front.reply(), (number::SET_LOG_BASE, area.as_bytes().to_vec()));
    let features = FEATURES | feature::PROTOCOL_FEATURES;
    front.ack(number::SET_FEATURES, &(features | feature::LOG_ALL).to_ne_bytes(), &[]);
    let logged = VringAddress { flags: 1, log: USED, ..addresses(1) };
    front.ack(number::SET_VRING_ADDR, logged.as_bytes(), &[]);
    let serve = |available| {
        front.offer(available);
        front.with_ring(1, |ring| {
            let chain = ring.pop().unwrap().unwrap();
            ring.push_used(chain, 1);
            ring.publish();
        });
    };
    serve(0);
    assert!(dirty(BUFFER >> 12) && dirty(USED >> 12) && !dirty(0));
    front.ack(number::SET_FEATURES, &features.to_ne_bytes(), &[]);
    front.ack(number::SET_VRING_ADDR, addresses(1).as_bytes(), &[]);
    rustix::io::pwrite(&log, &[0; 64], 0).unwrap();
    serve(1);
    assert!(!dirty(BUFFER >> 12) && !dirty(USED >> 12));
}

#[test]
fn unusable_migration_log_is_refused_where_the_front_end_listens() {
    let front = FrontEnd::running();
    let log = rustix::fs::memfd_create(c"log", MemfdFlags::CLOEXEC).unwrap();
    for area in [
        LogArea { size: 4096, offset: 0 },
        LogArea { size: 0, offset: 0 },
        LogArea { size: u64::MAX, offset: 1 },
    ] {
        front.send(number::SET_LOG_BASE, false, area.as_bytes(), &[log.as_fd()]);
        assert_eq!(front.reply(), (number::SET_LOG_BASE, vec![]));
    }
    let logging = FEATURES | feature::PROTOCOL_FEATURES | feature::LOG_ALL;
    front.nack(number::SET_FEATURES, &logging.to_ne_bytes(), &[]);
    assert!(front.runs(1));
}

#[test]
fn memory_that_is_taken_away_ends_the_session() {
    let front = FrontEnd::running();
    front.offer(0);
    rustix::fs::ftruncate(&front.memory, 0).unwrap();
    front.with_ring(1, |ring| assert!(ring.pop().unwrap().is_none()));
    let error = front.ended().unwrap_err();
    assert!(matches!(error, SessionError::MemoryLost), "{error}");
}

#[test]
fn stop_ends_a_session_that_waits_or_is_half_way_through_a_message() {
    for bytes in [&[][..], &[1], &[5, 0, 0, 0, 1, 0, 0, 0, 40, 0, 0, 0, 1]] {
        let front = FrontEnd::negotiated();
        front.send_raw(bytes, &[]);
        front.stop.trigger();
        assert!(front.stop.is_triggered());
        assert_eq!(front.ended().unwrap(), End::Stopped);
    }
}

#[test]
fn stop_ends_a_session_whose_front_end_does_not_read() {
    let front = FrontEnd::negotiated();
    let request = Header { request: number::GET_FEATURES, need_reply: false, size: 0 }.encode();
    // Until the session cannot write its replies any more and stops reading.
    loop {
        let sent = rustix::net::send(&front.socket, &request, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        if sent.is_err() {
            break;
        }
    }
    front.stop.trigger();
    assert_eq!(front.ended().unwrap(), End::Stopped);
}

#[test]
fn disconnect_is_clean_between_messages_only() {
    assert_eq!(FrontEnd::connect().end().unwrap(), End::Disconnected);
    assert_eq!(FrontEnd::running().end().unwrap(), End::Disconnected);
    let whole = [&Header { request: 5, need_reply: false, size: 40 }.encode()[..], &[0; 40]].concat();
    for cut in 1..whole.len() {
        let front = FrontEnd::connect();
        front.send_raw(&whole[..cut], &[]);
        let error = front.end().unwrap_err();
        assert!(matches!(error, SessionError::Connection(ConnectionError::Truncated)), "{error}");
    }
}

#[test]
fn stream_that_cannot_be_followed_ends_the_session() {
    let headers: [[u32; 3]; 4] = [[1, 0, 0], [1, 3, 0], [1, 5, 0], [1, 1, 1 << 20]];
    for header in headers {
        let front = FrontEnd::negotiated();
        front.send_raw(header.as_bytes(), &[]);
        let error = front.ended().unwrap_err();
        assert!(matches!(error, SessionError::Connection(ConnectionError::Header(_))), "{error}");
    }
}

#[test]
fn descriptors_are_closed_when_a_session_ends_in_any_way() {
    let file = marked("ends");
    for cut in [1, 6, 12, 30, 52] {
        let front = FrontEnd::negotiated();
        front.ack(number::SET_MEM_TABLE, &table(&[whole()]), &[file.as_fd()]);
        front.set_up(1);
        front.ack(number::SET_VRING_ENABLE, &state(1, 1), &[]);
        front.ack(number::SET_VRING_KICK, &1u64.to_ne_bytes(), &[file.as_fd()]);
        let message = [&Header { request: 5, need_reply: false, size: 40 }.encode()[..], &[0; 40]].concat();
        front.send_raw(&message[..cut], &[file.as_fd(); 200]);
        let device = front.device.clone();
        let _ = front.end();
        assert!(!device.seen().rings.is_empty(), "the ring is left to the device");
        device.seen().rings.clear();
        assert_eq!(times_open("ends"), 1);
    }
}

#[test]
fn messages_may_come_byte_by_byte_or_several_at_once() {
    let front = FrontEnd::negotiated();
    let one = Header { request: number::GET_QUEUE_NUM, need_reply: false, size: 0 }.encode();
    for byte in one {
        front.send_raw(&[byte], &[]);
    }
    front.send_raw(&[one, one].concat(), &[]);
    for _ in 0..3 {
        assert_eq!(front.reply(), (number::GET_QUEUE_NUM, 3u64.to_ne_bytes().to_vec()));
    }
}
