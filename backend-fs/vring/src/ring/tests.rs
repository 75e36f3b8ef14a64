//! The ring against a driver that plays the DPU, well-behaved and hostile.

use std::os::fd::AsFd;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::message::{LogArea, MemoryRegion};

const AVAILABLE: u64 = 0x10_0000;
const USED: u64 = 0x12_0000;
const TABLES: u64 = 0x20_0000;
const BUFFERS: u64 = 0x30_0000;
const MEMORY: usize = 0x40_0000;

/// Descriptor as the driver writes it.
#[derive(Clone, Copy, Debug)]
struct D {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

fn d(addr: u64, len: u32, flags: u16, next: u16) -> D {
    D { addr, len, flags, next }
}

/// The DPU's side of one queue.
struct Driver {
    memory: Arc<DpuMemory>,
    size: u16,
    available: u16,
    used: u16,
}

impl Driver {
    fn put16(&self, addr: u64, value: u16) {
        self.memory.write(addr, &value.to_le_bytes()).unwrap();
    }

    fn get16(&self, addr: u64) -> u16 {
        let mut bytes = [0; 2];
        self.memory.read(addr, &mut bytes).unwrap();
        u16::from_le_bytes(bytes)
    }

    fn put_descriptor(&self, table: u64, index: u16, d: D) {
        let at = table + u64::from(index) * 16;
        self.memory.write(at, &d.addr.to_le_bytes()).unwrap();
        self.memory.write(at + 8, &d.len.to_le_bytes()).unwrap();
        self.put16(at + 12, d.flags);
        self.put16(at + 14, d.next);
    }

    /// Makes a head available.
    fn offer(&mut self, head: u16) {
        self.put16(AVAILABLE + 4 + 2 * u64::from(self.available % self.size), head);
        self.available = self.available.wrapping_add(1);
        self.put16(AVAILABLE + 2, self.available);
    }

    /// Writes a chain of direct descriptors from `head` on and offers it.
    fn submit(&mut self, head: u16, descriptors: &[(u64, u32, u16)]) {
        for (i, (addr, len, flags)) in descriptors.iter().enumerate() {
            let last = i + 1 == descriptors.len();
            let more = if last { 0 } else { F_NEXT };
            self.put_descriptor(0, head + i as u16, d(*addr, *len, flags | more, head + i as u16 + 1));
        }
        self.offer(head);
    }

    /// Entries of the used ring not seen yet: head and length.
    fn take_used(&mut self) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        while self.used != self.get16(USED + 2) {
            let at = USED + 4 + 8 * u64::from(self.used % self.size);
            let mut bytes = [0; 8];
            self.memory.read(at, &mut bytes).unwrap();
            let [head, len]: [u32; 2] = zerocopy::transmute!(bytes);
            entries.push((u32::from_le(head), u32::from_le(len)));
            self.used = self.used.wrapping_add(1);
        }
        entries
    }

    fn used_event(&self, value: u16) {
        self.put16(AVAILABLE + 4 + 2 * u64::from(self.size), value);
    }

    fn avail_event(&self) -> u16 {
        self.get16(USED + 4 + 8 * u64::from(self.size))
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn config(memory: &DpuMemory, size: u32, event_idx: bool) -> RingConfig {
    let base = memory.regions().next().unwrap().region.user_addr;
    RingConfig {
        index: 1,
        size,
        addresses: RingAddresses { descriptors: base, available: base + AVAILABLE, used: base + USED },
        base: 0,
        event_idx,
        indirect: true,
        kick: Kick::Poll,
        call: None,
        err: None,
    }
}

fn setup_with(size: u16, change: impl FnOnce(&mut RingConfig)) -> (Driver, Ring) {
    let memory = Arc::new(DpuMemory::anonymous(MEMORY).unwrap());
    let mut config = config(&memory, u32::from(size), true);
    change(&mut config);
    let ring = Ring::new(Arc::clone(&memory), config).map_err(|(error, _)| error).unwrap();
    (Driver { memory, size, available: 0, used: 0 }, ring)
}

fn setup(size: u16) -> (Driver, Ring) {
    setup_with(size, |_| {})
}

fn pop(ring: &mut Ring) -> Chain {
    ring.pop().unwrap().expect("a chain is available")
}

fn counter(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Offers one chain that must come back unserved, and shows that the queue lives on.
#[track_caller]
fn refused(describe: impl FnOnce(&mut Driver) -> u32) {
    let (mut driver, mut ring) = setup(8);
    let head = describe(&mut driver);
    assert!(ring.pop().unwrap().is_none(), "the chain was served");
    ring.publish();
    assert_eq!(driver.take_used(), [(head, 0)]);
    assert_eq!(counter(&ring.counters().bad_chains), 1);
    driver.submit(6, &[(BUFFERS, 16, 0), (BUFFERS, 16, F_WRITE)]);
    let chain = pop(&mut ring);
    ring.push_used(chain, 16);
    ring.publish();
    assert_eq!(driver.take_used(), [(6, 16)]);
}

#[test]
fn request_is_read_served_and_returned() {
    let (mut driver, mut ring) = setup(8);
    driver.memory.write(BUFFERS, b"question").unwrap();
    driver.submit(2, &[(BUFFERS, 8, 0), (BUFFERS + 0x100, 4, F_WRITE), (BUFFERS + 0x200, 4, F_WRITE)]);
    assert!(ring.has_work());
    let mut chain = pop(&mut ring);
    assert!(!ring.has_work());
    assert_eq!((chain.readable_len(), chain.writable_len()), (8, 8));
    let mut request = [0; 8];
    chain.copy_out(0, &mut request).unwrap();
    assert_eq!(&request, b"question");
    chain.copy_in(0, b"answer").unwrap();
    ring.push_used(chain, 6);
    assert!(driver.take_used().is_empty(), "invisible before it is published");
    ring.publish();
    assert_eq!(driver.take_used(), [(2, 6)]);
    let mut reply = [0; 8];
    driver.memory.read(BUFFERS + 0x100, &mut reply[..4]).unwrap();
    driver.memory.read(BUFFERS + 0x200, &mut reply[4..]).unwrap();
    assert_eq!(&reply[..6], b"answer");
    assert_eq!(ring.in_flight(), 0);
}

#[test]
fn indices_wrap_at_sixteen_bits() {
    let (mut driver, mut ring) = setup(4);
    for round in 0..70_000u32 {
        let head = (round % 4) as u16;
        driver.submit(head, &[(BUFFERS, 1, F_WRITE)]);
        let chain = pop(&mut ring);
        ring.push_used(chain, 1);
        ring.publish();
        assert_eq!(driver.take_used(), [(u32::from(head), 1)]);
    }
    assert_eq!(ring.base(), 70_000u32 as u16);
}

#[test]
fn chains_complete_in_any_order() {
    let (mut driver, mut ring) = setup(8);
    for head in [1, 3, 5] {
        driver.submit(head, &[(BUFFERS, 8, F_WRITE)]);
    }
    let [a, b, c] = [pop(&mut ring), pop(&mut ring), pop(&mut ring)];
    assert_eq!(ring.in_flight(), 3);
    ring.push_used(b, 2);
    ring.push_used(c, 3);
    ring.publish();
    assert_eq!(driver.take_used(), [(3, 2), (5, 3)]);
    ring.push_used(a, 1);
    ring.publish();
    assert_eq!(driver.take_used(), [(1, 1)]);
}

#[test]
fn indirect_table_may_be_longer_than_the_queue_and_follow_direct_descriptors() {
    let (mut driver, mut ring) = setup(4);
    let entries = 300;
    for i in 0..entries {
        let last = i + 1 == entries;
        let flags = F_WRITE | if last { 0 } else { F_NEXT };
        driver.put_descriptor(TABLES, i, d(BUFFERS + u64::from(i) * 2048, 100, flags, i + 1));
    }
    driver.put_descriptor(0, 0, d(BUFFERS, 40, F_NEXT, 1));
    driver.put_descriptor(0, 1, d(TABLES, u32::from(entries) * 16, F_INDIRECT, 0));
    driver.offer(0);
    let chain = pop(&mut ring);
    assert_eq!((chain.readable_len(), chain.writable_len()), (40, 30_000));
    assert_eq!(chain.writable.pieces.len(), 300);
}

#[test]
fn adjoining_buffers_become_one_piece() {
    let (mut driver, mut ring) = setup(8);
    driver.submit(0, &[(BUFFERS, 4096, F_WRITE), (BUFFERS + 4096, 4096, F_WRITE), (BUFFERS, 1, F_WRITE)]);
    let chain = pop(&mut ring);
    assert_eq!(chain.writable.pieces.len(), 2);
    assert_eq!(chain.writable_len(), 8193);
}

#[test]
fn malformed_direct_chains_come_back_empty() {
    // Loops: onto itself, and over two.
    refused(|dpu| {
        dpu.put_descriptor(0, 1, d(BUFFERS, 4, F_NEXT, 1));
        dpu.offer(1);
        1
    });
    refused(|dpu| {
        dpu.put_descriptor(0, 1, d(BUFFERS, 4, F_NEXT, 2));
        dpu.put_descriptor(0, 2, d(BUFFERS, 4, F_NEXT, 1));
        dpu.offer(1);
        1
    });
    // The next index is outside of the table, the head is.
    refused(|dpu| {
        dpu.put_descriptor(0, 1, d(BUFFERS, 4, F_NEXT, 8));
        dpu.offer(1);
        1
    });
    refused(|dpu| {
        dpu.offer(8);
        8
    });
    refused(|dpu| {
        dpu.offer(u16::MAX);
        u32::from(u16::MAX)
    });
    // No length; more than 4 GiB; a reply before the request.
    refused(|dpu| {
        dpu.submit(0, &[(BUFFERS, 0, 0)]);
        0
    });
    refused(|dpu| {
        dpu.submit(0, &[(BUFFERS, 8, F_WRITE), (BUFFERS, 8, 0)]);
        0
    });
}

#[test]
fn chains_outside_of_shared_memory_come_back_empty() {
    for (addr, len) in [
        (MEMORY as u64, 1),
        (MEMORY as u64 - 1, 2),
        (u64::MAX, 1),
        (u64::MAX - 4, 16),
        (1 << 63, 1),
        (0, u32::MAX),
    ] {
        refused(|dpu| {
            dpu.submit(0, &[(BUFFERS, 8, 0), (addr, len, F_WRITE)]);
            0
        });
    }
}

#[test]
fn malformed_indirect_tables_come_back_empty() {
    let table = |dpu: &mut Driver, addr: u64, len: u32, flags: u16| {
        dpu.put_descriptor(0, 0, d(addr, len, F_INDIRECT | flags, 1));
        dpu.put_descriptor(0, 1, d(BUFFERS, 4, 0, 0));
        dpu.offer(0);
        0
    };
    let one = |dpu: &mut Driver| dpu.put_descriptor(TABLES, 0, d(BUFFERS, 4, 0, 0));
    for (addr, len, flags) in [
        (TABLES, 0, 0),
        (TABLES, 8, 0),
        (TABLES, 24, 0),
        (TABLES + 4, 16, 0),
        (TABLES, 16 * (MAX_CHAIN + 1), 0),
        (MEMORY as u64 - 16, 32, 0),
        (u64::MAX - 15, 16, 0),
        (TABLES, 16, F_NEXT),
    ] {
        refused(|dpu| {
            one(dpu);
            table(dpu, addr, len, flags)
        });
    }
    // A table in a table, a loop in a table, a next index beyond it.
    refused(|dpu| {
        dpu.put_descriptor(TABLES, 0, d(TABLES, 16, F_INDIRECT, 0));
        table(dpu, TABLES, 16, 0)
    });
    refused(|dpu| {
        dpu.put_descriptor(TABLES, 0, d(BUFFERS, 4, F_NEXT, 0));
        table(dpu, TABLES, 16, 0)
    });
    refused(|dpu| {
        dpu.put_descriptor(TABLES, 0, d(BUFFERS, 4, F_NEXT, 1));
        table(dpu, TABLES, 16, 0)
    });
}

#[test]
fn indirect_descriptors_need_the_feature() {
    let (mut driver, mut ring) = setup_with(8, |config| config.indirect = false);
    driver.put_descriptor(TABLES, 0, d(BUFFERS, 4, 0, 0));
    driver.put_descriptor(0, 0, d(TABLES, 16, F_INDIRECT, 0));
    driver.offer(0);
    assert!(ring.pop().unwrap().is_none());
    assert_eq!(counter(&ring.counters().bad_chains), 1);
}

#[test]
fn more_than_four_gibibytes_in_one_chain_come_back_empty() {
    let (mut driver, mut ring) = setup(8);
    // The same large buffer over and over: 1025 times 4 MiB.
    for i in 0..=1024u16 {
        let flags = if i == 1024 { 0 } else { F_NEXT };
        driver.put_descriptor(TABLES, i, d(0, MEMORY as u32, flags, i + 1));
    }
    driver.put_descriptor(0, 0, d(TABLES, 1025 * 16, F_INDIRECT, 0));
    driver.offer(0);
    assert!(ring.pop().unwrap().is_none());
    driver.put_descriptor(0, 0, d(TABLES + 16, 1024 * 16, F_INDIRECT, 0));
    driver.put_descriptor(TABLES, 0, d(0, 0, 0, 0));
    for i in 1..=1024u16 {
        let flags = if i == 1024 { 0 } else { F_NEXT };
        driver.put_descriptor(TABLES, i, d(0, MEMORY as u32, flags, i));
    }
    driver.offer(0);
    assert_eq!(pop(&mut ring).readable_len() as u64, MAX_CHAIN_BYTES);
}

#[test]
fn head_that_is_in_flight_already_comes_back_empty() {
    let (mut driver, mut ring) = setup(8);
    driver.submit(3, &[(BUFFERS, 8, F_WRITE)]);
    driver.offer(3);
    let chain = pop(&mut ring);
    assert!(ring.pop().unwrap().is_none());
    ring.push_used(chain, 8);
    ring.publish();
    assert_eq!(driver.take_used(), [(3, 0), (3, 8)], "one used entry for each available one");
    driver.offer(3);
    assert_eq!(pop(&mut ring).writable_len(), 8);
}

#[test]
fn available_index_that_jumps_breaks_the_ring() {
    for jump in [9, 5000, u16::MAX] {
        let (driver, mut ring) = setup(8);
        driver.put16(AVAILABLE + 2, jump);
        let error = ring.pop().unwrap_err();
        assert_eq!(error, RingError::Broken { index: 1, available: jump, next: 0, size: 8 });
        assert!(ring.is_broken() && !ring.has_work() && !ring.arm_kick());
        driver.put16(AVAILABLE + 2, 0);
        assert!(ring.pop().is_err(), "only a new set-up mends it");
    }
}

#[test]
fn base_and_used_index_continue() {
    let memory = Arc::new(DpuMemory::anonymous(MEMORY).unwrap());
    let mut driver = Driver { memory: Arc::clone(&memory), size: 8, available: 65_534, used: 65_530 };
    driver.put16(AVAILABLE + 2, 65_534);
    driver.put16(USED + 2, 65_530);
    let config = RingConfig { base: 65_534, ..config(&memory, 8, true) };
    let mut ring = Ring::new(memory, config).map_err(|(error, _)| error).unwrap();
    assert!(ring.pop().unwrap().is_none());
    for head in 0..4 {
        driver.submit(head, &[(BUFFERS, 1, F_WRITE)]);
        let chain = pop(&mut ring);
        ring.push_used(chain, 1);
    }
    ring.publish();
    assert_eq!(driver.take_used(), [(0, 1), (1, 1), (2, 1), (3, 1)]);
    assert_eq!(ring.base(), 2);
}

#[test]
fn configurations_that_virtio_forbids_are_refused() {
    let memory = Arc::new(DpuMemory::anonymous(MEMORY).unwrap());
    let attempt = |change: fn(&mut RingConfig)| {
        let mut config = config(&memory, 8, true);
        change(&mut config);
        Ring::new(Arc::clone(&memory), config).map(drop).map_err(|(error, _)| error)
    };
    for size in [0, 3, 7, 65_536, u32::MAX] {
        let mut config = config(&memory, 8, true);
        config.size = size;
        let error = Ring::new(Arc::clone(&memory), config).map(drop).map_err(|(error, _)| error);
        assert_eq!(error, Err(RingError::Size { index: 1, size }));
    }
    assert!(matches!(attempt(|c| c.addresses.descriptors += 8), Err(RingError::Alignment { .. })));
    assert!(matches!(attempt(|c| c.addresses.available += 1), Err(RingError::Alignment { .. })));
    assert!(matches!(attempt(|c| c.addresses.used += 2), Err(RingError::Alignment { .. })));
    assert!(matches!(attempt(|c| c.addresses.descriptors = 0), Err(RingError::NotShared { .. })));
    assert!(matches!(attempt(|c| c.addresses.used += MEMORY as u64), Err(RingError::NotShared { .. })));
    assert!(
        matches!(
            attempt(|c| c.addresses.used += MEMORY as u64 - USED - 4 - 8 * 8),
            Err(RingError::NotShared { area: "used ring", .. })
        ),
        "the event index of the used ring counts, too"
    );
    assert!(attempt(|c| c.addresses.used += MEMORY as u64 - USED - 4 - 8 * 8 - 4).is_ok());
}

#[test]
fn signal_waits_for_the_event_index() {
    let call = event();
    let reader = call.try_clone().unwrap();
    let (mut driver, mut ring) = setup_with(8, |config| config.call = Some(call));
    let signalled = || rustix::io::read(&reader, &mut [0u8; 8]).is_ok();
    let mut complete = |count: u16| {
        for head in 0..count {
            driver.submit(head, &[(BUFFERS, 1, F_WRITE)]);
            let chain = pop(&mut ring);
            ring.push_used(chain, 1);
        }
        ring.publish();
        (ring.signal_if_needed(), driver.used_event(driver.get16(USED + 2).wrapping_add(2)))
    };
    assert!(complete(1).0 && signalled(), "the first time the driver may not have set its event index");
    // The driver now wants to hear of the entry after the next two: index 3.
    assert!(!complete(2).0 && !signalled());
    assert!(complete(3).0 && signalled(), "a batch that passes the event index signals once");
    assert!(!signalled());
    assert_eq!(counter(&ring.counters().signals), 2);
}

#[test]
fn no_interrupt_flag_is_honoured_without_event_index() {
    let call = event();
    let (mut driver, mut ring) = setup_with(8, |config| {
        config.event_idx = false;
        config.call = Some(call);
    });
    let mut complete = |flags: u16| {
        driver.put16(AVAILABLE, flags);
        driver.submit(0, &[(BUFFERS, 1, F_WRITE)]);
        let chain = pop(&mut ring);
        ring.push_used(chain, 1);
        ring.publish();
        ring.signal_if_needed()
    };
    assert!(!complete(AVAIL_F_NO_INTERRUPT));
    assert!(complete(0));
    assert!(!ring.signal_if_needed(), "nothing new, no signal");
}

#[test]
fn full_call_descriptor_never_blocks() {
    for flags in [EventfdFlags::CLOEXEC, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK] {
        let call = eventfd(0, flags).unwrap();
        let other_end = call.try_clone().unwrap();
        rustix::io::write(&other_end, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (mut driver, mut ring) = setup_with(8, |config| config.call = Some(call));
        driver.submit(0, &[(BUFFERS, 1, F_WRITE)]);
        let chain = pop(&mut ring);
        ring.push_used(chain, 1);
        ring.publish();
        assert!(ring.signal_if_needed());
    }
}

#[test]
fn closed_call_pipe_never_hurts() {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    drop(reader);
    let (mut driver, mut ring) = setup_with(8, |config| config.call = Some(writer));
    driver.submit(0, &[(BUFFERS, 1, F_WRITE)]);
    let chain = pop(&mut ring);
    ring.push_used(chain, 1);
    ring.publish();
    assert!(ring.signal_if_needed());
}

#[test]
fn arming_kicks_finds_what_came_meanwhile() {
    let (mut driver, mut ring) = setup(8);
    assert!(!ring.arm_kick());
    assert_eq!(driver.avail_event(), 0, "the next request is to be announced");
    driver.submit(0, &[(BUFFERS, 1, F_WRITE)]);
    assert!(ring.arm_kick(), "it came before the kick was armed");
    let chain = pop(&mut ring);
    ring.push_used(chain, 1);
    assert!(!ring.arm_kick());
    assert_eq!(driver.avail_event(), 1);
    ring.disarm_kick();
    let (old, new) = (driver.available, driver.available.wrapping_add(5));
    assert!(!passes(driver.avail_event(), new, old), "the driver sees no reason to kick");
}

#[test]
fn kick_flag_is_used_without_event_index() {
    let (mut driver, mut ring) = setup_with(8, |config| config.event_idx = false);
    ring.disarm_kick();
    assert_eq!(driver.get16(USED), USED_F_NO_NOTIFY);
    assert!(!ring.arm_kick());
    assert_eq!(driver.get16(USED), 0);
    driver.submit(0, &[(BUFFERS, 1, F_WRITE)]);
    assert!(ring.arm_kick());
}

#[test]
fn disabled_ring_takes_nothing_but_still_completes() {
    let (mut driver, mut ring) = setup(8);
    driver.submit(0, &[(BUFFERS, 1, F_WRITE)]);
    let chain = pop(&mut ring);
    driver.submit(1, &[(BUFFERS, 1, F_WRITE)]);
    ring.set_enabled(false);
    assert!(!ring.has_work() && ring.pop().unwrap().is_none());
    ring.push_used(chain, 1);
    ring.publish();
    assert_eq!(driver.take_used(), [(0, 1)]);
    ring.set_enabled(true);
    assert!(ring.has_work());
    assert_eq!(ring.base(), 1);
}

#[test]
fn dropped_chain_comes_back_empty() {
    let (mut driver, mut ring) = setup(8);
    driver.submit(4, &[(BUFFERS, 8, F_WRITE)]);
    let chain = pop(&mut ring);
    std::thread::spawn(move || drop(chain)).join().unwrap();
    assert!(ring.pop().unwrap().is_none());
    ring.publish();
    assert_eq!(driver.take_used(), [(4, 0)]);
    assert_eq!(ring.in_flight(), 0);
    assert_eq!(counter(&ring.counters().abandoned_chains), 1);
    driver.offer(4);
    assert_eq!(pop(&mut ring).writable_len(), 8);
}

#[test]
fn chain_of_another_ring_is_ignored() {
    let (mut driver, mut ring) = setup(8);
    let (_, mut other) = setup(8);
    driver.submit(4, &[(BUFFERS, 8, F_WRITE)]);
    let chain = pop(&mut ring);
    other.push_used(chain, 8);
    other.publish();
    assert_eq!(other.published, 0);
    assert!(ring.pop().unwrap().is_none(), "and not given to its own ring a second time");
}

#[test]
fn storage_of_chains_is_used_again() {
    let (mut driver, mut ring) = setup(8);
    let mut place = None;
    for _ in 0..100 {
        driver.submit(0, &[(BUFFERS, 8, 0), (BUFFERS + 64, 8, F_WRITE)]);
        let chain = pop(&mut ring);
        let here = chain.writable.pieces.as_ptr();
        assert_eq!(*place.get_or_insert(here), here);
        ring.push_used(chain, 8);
    }
    assert_eq!(ring.pool.len(), 1);
}

#[test]
fn written_length_never_exceeds_the_room() {
    let (mut driver, mut ring) = setup(8);
    driver.submit(0, &[(BUFFERS, 8, F_WRITE)]);
    let chain = pop(&mut ring);
    ring.push_used(chain, 9000);
    ring.publish();
    assert_eq!(driver.take_used(), [(0, 8)]);
}

#[test]
fn ring_moves_to_a_new_table_while_a_chain_keeps_the_old_memory() {
    let fd = rustix::fs::memfd_create(c"ring-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, 2 * MEMORY as u64).unwrap();
    let region = |number: u64| MemoryRegion {
        dpu_addr: number * MEMORY as u64,
        size: MEMORY as u64,
        user_addr: (1 << 32) + number * MEMORY as u64,
        mmap_offset: number * MEMORY as u64,
    };
    let empty = DpuMemory::empty().unwrap();
    let both = empty.with_regions([(region(0), fd.as_fd()), (region(1), fd.as_fd())]).unwrap();
    let both = Arc::new(both);
    let mut ring = Ring::new(Arc::clone(&both), config(&both, 8, true)).map_err(|(error, _)| error).unwrap();
    let mut driver = Driver { memory: Arc::clone(&both), size: 8, available: 0, used: 0 };
    let far = MEMORY as u64 + 64;
    driver.submit(0, &[(far, 8, F_WRITE)]);
    let mut chain = pop(&mut ring);
    let small = Arc::new(both.without_region(region(1)).unwrap());
    ring.remap(Arc::clone(&small)).unwrap();
    driver.submit(1, &[(far, 8, F_WRITE)]);
    assert!(ring.pop().unwrap().is_none(), "the region is gone for new chains");
    chain.copy_in(0, b"late").unwrap();
    ring.push_used(chain, 4);
    ring.publish();
    assert_eq!(driver.take_used(), [(1, 0), (0, 4)]);
    let mut bytes = [0; 4];
    both.read(far, &mut bytes).unwrap();
    assert_eq!(&bytes, b"late");
    assert!(ring.pool.iter().all(|pooled| Arc::ptr_eq(&pooled.memory, &small)));
    let without_ring = Arc::new(both.without_region(region(0)).unwrap());
    assert!(ring.remap(without_ring).is_err());
    driver.submit(2, &[(BUFFERS, 8, F_WRITE)]);
    assert_eq!(pop(&mut ring).writable_len(), 8, "a failed move leaves the ring as it was");
}

#[test]
fn writes_are_logged_for_migration() {
    let (mut driver, mut ring) = setup(8);
    let log_fd = rustix::fs::memfd_create(c"log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&log_fd, 4096).unwrap();
    let area = LogArea { size: (MEMORY >> 15) as u64, offset: 0 };
    let log = Arc::new(DirtyLog::map(area, log_fd.as_fd(), &driver.memory).unwrap());
    ring.set_log(Some(Arc::clone(&log)), Some((log, USED)));
    driver.submit(0, &[(BUFFERS, 64, 0), (BUFFERS + 0x1ff0, 0x2020, F_WRITE)]);
    let chain = pop(&mut ring);
    ring.push_used(chain, 0x20);
    ring.publish();
    let mut bits = vec![0; MEMORY >> 15];
    rustix::io::pread(&log_fd, &mut bits, 0).unwrap();
    let dirty: Vec<u64> =
        (0..MEMORY as u64 >> 12).filter(|page| bits[(page / 8) as usize] >> (page % 8) & 1 == 1).collect();
    assert_eq!(dirty, [USED >> 12, (BUFFERS + 0x1000) >> 12, (BUFFERS + 0x2000) >> 12]);
}

#[test]
fn too_many_pieces_in_flight_hold_further_requests_back() {
    let (mut driver, mut ring) = setup(64);
    // Alternating buffers that cannot be merged: the longest indirect table there may be.
    for i in 0..MAX_CHAIN {
        let last = i + 1 == MAX_CHAIN;
        let addr = BUFFERS + u64::from(i % 2) * 0x1000;
        let flags = F_WRITE | if last { 0 } else { F_NEXT };
        driver.put_descriptor(TABLES, i as u16, d(addr, 1, flags, (i + 1) as u16));
    }
    for head in 0..40 {
        driver.put_descriptor(0, head, d(TABLES, MAX_CHAIN * 16, F_INDIRECT, 0));
        driver.offer(head);
    }
    let mut chains = Vec::new();
    while let Some(chain) = ring.pop().unwrap() {
        chains.push(chain);
    }
    assert_eq!(chains.len(), PIECE_BUDGET / MAX_CHAIN as usize);
    assert!(!ring.has_work() && !ring.arm_kick());
    ring.push_used(chains.pop().unwrap(), 1);
    assert!(ring.has_work());
    assert!(ring.pop().unwrap().is_some());
    assert!(ring.pool.len() <= 1, "oversized storage is not kept");
}

#[derive(Clone, Debug)]
enum Step {
    Submit { readable: u8, writable: u8, indirect: bool },
    Pop,
    Complete(u8, u8),
    Drop(u8),
    Publish,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0u8..4, 0u8..4, any::<bool>())
            .prop_filter("a chain has a descriptor", |(r, w, _)| r + w > 0)
            .prop_map(|(readable, writable, indirect)| Step::Submit { readable, writable, indirect }),
        4 => Just(Step::Pop),
        3 => (any::<u8>(), any::<u8>()).prop_map(|(which, written)| Step::Complete(which, written)),
        1 => any::<u8>().prop_map(Step::Drop),
        2 => Just(Step::Publish),
    ]
}

proptest! {
    /// Whatever the order of events: chains arrive in order with their sizes, and each comes back
    /// exactly once with what was written.
    #[test]
    fn ring_behaves_like_a_queue(steps in proptest::collection::vec(step(), 1..300)) {
        const HEADS: u16 = 8;
        let (mut driver, mut ring) = setup(64);
        let mut free: Vec<u16> = (0..HEADS).rev().collect();
        let mut offered = std::collections::VecDeque::new();
        let mut in_flight: Vec<(u16, Chain)> = Vec::new();
        let mut expected: Vec<(u32, u32)> = Vec::new();
        for step in steps {
            match step {
                Step::Submit { readable, writable, indirect } => {
                    let Some(slot) = free.pop() else { continue };
                    let head = slot * 6;
                    let buffers: Vec<(u64, u32, u16)> = (0..readable).map(|i| (i, 0))
                        .chain((0..writable).map(|i| (i + readable, F_WRITE)))
                        .map(|(i, flags)| (BUFFERS + u64::from(i) * 256, 16, flags))
                        .collect();
                    if indirect {
                        let table = TABLES + u64::from(slot) * 256;
                        for (i, (addr, len, flags)) in buffers.iter().enumerate() {
                            let more = if i + 1 < buffers.len() { F_NEXT } else { 0 };
                            driver.put_descriptor(table, i as u16, d(*addr, *len, flags | more, i as u16 + 1));
                        }
                        driver.put_descriptor(0, head, d(table, buffers.len() as u32 * 16, F_INDIRECT, 0));
                        driver.offer(head);
                    } else {
                        driver.submit(head, &buffers);
                    }
                    offered.push_back((head, usize::from(readable) * 16, usize::from(writable) * 16));
                }
                Step::Pop => match (ring.pop().unwrap(), offered.pop_front()) {
                    (Some(chain), Some((head, readable, writable))) => {
                        prop_assert_eq!(chain.head, head);
                        prop_assert_eq!(chain.readable_len(), readable);
                        prop_assert_eq!(chain.writable_len(), writable);
                        in_flight.push((head, chain));
                    }
                    (None, None) => {}
                    (popped, model) => prop_assert!(false, "{popped:?} but expected {model:?}"),
                },
                Step::Complete(which, written) if !in_flight.is_empty() => {
                    let (head, chain) = in_flight.swap_remove(usize::from(which) % in_flight.len());
                    let len = usize::from(written).min(chain.writable_len());
                    ring.push_used(chain, usize::from(written));
                    expected.push((u32::from(head), len as u32));
                }
                Step::Drop(which) if !in_flight.is_empty() => {
                    let (head, chain) = in_flight.swap_remove(usize::from(which) % in_flight.len());
                    drop(chain);
                    ring.return_abandoned();
                    expected.push((u32::from(head), 0));
                }
                Step::Publish => {
                    ring.publish();
                    let used = driver.take_used();
                    prop_assert_eq!(&used, &expected);
                    free.extend(used.iter().map(|(head, _)| *head as u16 / 6));
                    expected.clear();
                }
                Step::Complete(..) | Step::Drop(_) => {}
            }
            prop_assert_eq!(ring.in_flight(), in_flight.len());
        }
    }

    /// Random bytes everywhere: no panic, no access outside of memory, and the books balance.
    #[test]
    fn random_rings_do_no_harm(
        descriptors in proptest::collection::vec(
            (0u64..0x50_0000, prop_oneof![0u32..64, any::<u32>(), Just(16), Just(32)], 0u16..8, 0u16..20),
            32,
        ),
        heads in proptest::collection::vec(0u16..20, 16),
        jumps in proptest::collection::vec(0u16..18, 1..20),
    ) {
        let (driver, mut ring) = setup(16);
        for (i, (addr, len, flags, next)) in descriptors.iter().enumerate() {
            let table = if i < 16 { 0 } else { TABLES };
            // Half of the indirect tables point to something that looks like one.
            let addr = if flags & F_INDIRECT != 0 && addr % 2 == 0 { TABLES } else { *addr };
            driver.put_descriptor(table, (i % 16) as u16, d(addr, *len, *flags, *next));
        }
        for (i, head) in heads.iter().enumerate() {
            driver.put16(AVAILABLE + 4 + 2 * i as u64, *head);
        }
        let mut available = 0u16;
        let mut kept = Vec::new();
        for jump in jumps {
            available = available.wrapping_add(jump);
            driver.put16(AVAILABLE + 2, available);
            loop {
                match ring.pop() {
                    Ok(Some(mut chain)) => {
                        let mut bytes = vec![0; chain.readable_len().min(5000)];
                        prop_assert!(chain.copy_out(0, &mut bytes).is_ok());
                        let len = chain.writable_len().min(5000);
                        // Written back unchanged, so that the descriptors stay what they are.
                        let mut slices = crate::chain::SliceBuf::default();
                        prop_assert_eq!(chain.writable_slices(0, len, &mut slices).unwrap().len(), len);
                        prop_assert!(chain.copy_in(0, &[]).is_ok());
                        if kept.len() < 3 { kept.push(chain) } else { ring.push_used(chain, len) }
                    }
                    Ok(None) => break,
                    Err(_) => {
                        prop_assert!(ring.is_broken());
                        break;
                    }
                }
            }
            ring.publish();
            ring.signal_if_needed();
            let taken = counter(&ring.counters().chains);
            let used = u64::from(driver.get16(USED + 2));
            prop_assert_eq!(taken, used + ring.in_flight() as u64);
        }
    }
}
