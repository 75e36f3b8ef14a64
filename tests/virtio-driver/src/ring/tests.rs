//! The ring against a device made of the test itself: what the driver tells the device, and which devices it accuses.

use std::sync::Arc;

use super::*;
use crate::memory::Backing;

/// A ring whose used ring the test writes.
struct Bed {
    ring: Ring,
    memory: Arc<DpuMemory>,
    used: u16,
}

impl Bed {
    fn new(event_idx: bool, completion: Completion) -> Self {
        let memory = DpuMemory::new(1 << 20, Backing::Memfd).unwrap();
        let ring = Ring::new(&memory, RingConfig { size: 8, event_idx, completion }).unwrap();
        Bed { ring, memory, used: 0 }
    }

    fn chain(&self, readable: usize, writable: usize) -> Chain {
        let buffer = self.memory.allocate(4096).unwrap();
        Chain::direct(vec![
            Descriptor::readable(buffer.gpa(), readable),
            Descriptor::writable(buffer.gpa() + 2048, writable),
        ])
    }

    /// The device puts an entry into the used ring.
    fn complete(&mut self, id: u32, len: u32) {
        let at = 4 + 8 * usize::from(self.used % 8);
        self.ring.used.put(at, &[id, len]);
        self.used = self.used.wrapping_add(1);
        self.ring.used.store_u16(2, self.used, Ordering::Release);
    }

    /// The device says from which available index on it wants to hear.
    fn want_kick_at(&self, index: u16) {
        self.ring.used.store_u16(4 + 8 * 8, index, Ordering::Relaxed);
    }

    fn accusation(&mut self) -> String {
        self.ring.take_used().unwrap_err().to_string()
    }
}

#[test]
fn a_chain_lies_in_the_table_as_the_device_must_see_it() {
    let mut bed = Bed::new(true, Completion::Polling);
    let chain = bed.chain(40, 16);
    let head = bed.ring.submit(&chain).unwrap();
    let first: RawDescriptor = bed.ring.table.get(16 * usize::from(head));
    let second: RawDescriptor = bed.ring.table.get(16 * usize::from(first.next));
    assert_eq!((first.len, first.flags), (40, DESC_NEXT));
    assert_eq!((second.len, second.flags), (16, DESC_WRITE));
    assert_eq!(bed.ring.avail.load_u16(2, Ordering::Acquire), 1);
    assert_eq!(bed.ring.avail.load_u16(4, Ordering::Acquire), head);
}

#[test]
fn an_indirect_chain_takes_one_slot() {
    let mut bed = Bed::new(true, Completion::Polling);
    let parts = vec![Descriptor::readable(0x4000_0000, 8); 20];
    let chain = Chain::indirect(&bed.memory, parts).unwrap();
    let head = bed.ring.submit(&chain).unwrap();
    let entry: RawDescriptor = bed.ring.table.get(16 * usize::from(head));
    assert_eq!((entry.len, entry.flags), (320, DESC_INDIRECT));
    assert_eq!(bed.ring.free_slots(), 7);
}

#[test]
fn slots_come_back_and_the_ring_wraps_around() {
    let mut bed = Bed::new(false, Completion::Polling);
    for round in 0..70_000u32 {
        let chain = Chain::direct(vec![Descriptor::writable(0x4000_0000, 100); 3]);
        let head = bed.ring.submit(&chain).unwrap();
        bed.complete(u32::from(head), round % 100);
        assert_eq!(bed.ring.take_used().unwrap(), Some(Used { head, len: round % 100 }));
    }
    assert_eq!(bed.ring.free_slots(), 8);
    assert_eq!(bed.ring.stats().completed, 70_000);
}

#[test]
fn a_full_ring_refuses_more() {
    let mut bed = Bed::new(false, Completion::Polling);
    for _ in 0..4 {
        let chain = bed.chain(1, 1);
        bed.ring.add(&chain).unwrap();
    }
    let chain = bed.chain(1, 1);
    assert!(matches!(bed.ring.add(&chain), Err(Error::RingFull)));
}

#[test]
fn a_device_that_uses_a_chain_twice_is_accused() {
    let mut bed = Bed::new(false, Completion::Polling);
    let chains = [bed.chain(1, 1), bed.chain(1, 1)];
    let head = bed.ring.submit(&chains[0]).unwrap();
    bed.ring.submit(&chains[1]).unwrap();
    bed.complete(u32::from(head), 0);
    bed.complete(u32::from(head), 0);
    bed.ring.take_used().unwrap().unwrap();
    assert!(bed.accusation().contains("not outstanding"));
}

#[test]
fn a_device_that_invents_a_chain_is_accused() {
    let mut bed = Bed::new(false, Completion::Polling);
    let chain = bed.chain(1, 1);
    bed.ring.submit(&chain).unwrap();
    bed.complete(4711, 0);
    assert!(bed.accusation().contains("4711"));
}

#[test]
fn a_device_that_runs_ahead_is_accused() {
    let mut bed = Bed::new(false, Completion::Polling);
    let chain = bed.chain(1, 1);
    let head = bed.ring.submit(&chain).unwrap();
    bed.complete(u32::from(head), 0);
    bed.complete(u32::from(head), 0);
    assert!(bed.accusation().contains("ahead"));
}

#[test]
fn a_device_that_claims_more_than_there_is_room_is_accused() {
    let mut bed = Bed::new(false, Completion::Polling);
    let chain = bed.chain(40, 16);
    let head = bed.ring.submit(&chain).unwrap();
    bed.complete(u32::from(head), 17);
    assert!(bed.accusation().contains("17 bytes"));
}

#[test]
fn the_device_is_kicked_only_when_it_wants_to_be() {
    let mut bed = Bed::new(true, Completion::Polling);
    let chain = bed.chain(1, 1);
    bed.want_kick_at(0);
    bed.ring.submit(&chain).unwrap();
    assert_eq!(bed.ring.stats().kicks, 1, "the event index was reached");
    bed.ring.submit(&chain).unwrap();
    assert_eq!(bed.ring.stats().kicks, 1, "the event index lies behind");
    bed.want_kick_at(3);
    bed.ring.submit(&chain).unwrap();
    assert_eq!(bed.ring.stats().kicks, 1, "the event index lies ahead");
    bed.ring.submit(&chain).unwrap();
    assert_eq!(bed.ring.stats().kicks, 2, "the event index was reached again");

    let mut bed = Bed::new(false, Completion::Polling);
    bed.ring.submit(&chain).unwrap();
    assert_eq!(bed.ring.stats().kicks, 1);
    bed.ring.used.store_u16(0, USED_NO_NOTIFY, Ordering::Relaxed);
    bed.ring.submit(&chain).unwrap();
    assert_eq!(bed.ring.stats().kicks, 1, "the device said no");
}

#[test]
fn interrupts_are_asked_for_only_before_sleeping() {
    let mut bed = Bed::new(true, Completion::Polling);
    let used_event = |bed: &Bed| bed.ring.avail.load_u16(4 + 2 * 8, Ordering::Relaxed);
    let chain = bed.chain(1, 1);
    let head = bed.ring.submit(&chain).unwrap();
    bed.complete(u32::from(head), 0);
    bed.ring.wait_used(Duration::from_secs(1)).unwrap();
    assert_eq!(used_event(&bed), u16::MAX, "a polling driver wants none");

    bed.ring.set_completion(Completion::Eventfd);
    bed.ring.submit(&chain).unwrap();
    let timeout = bed.ring.wait_used(Duration::from_millis(5)).unwrap_err();
    assert!(matches!(timeout, Error::Timeout { .. }), "{timeout}");
    assert_eq!(used_event(&bed), 1, "a sleeping driver wants the next one");
}

#[test]
fn the_end_of_the_connection_ends_a_wait() {
    for completion in [Completion::Polling, Completion::Eventfd] {
        let mut bed = Bed::new(true, completion);
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        bed.ring.watch_connection(ours.into());
        let chain = bed.chain(1, 1);
        bed.ring.submit(&chain).unwrap();
        drop(theirs);
        let error = bed.ring.wait_used(Duration::from_secs(60)).unwrap_err();
        assert!(matches!(error, Error::Disconnected { .. }), "{completion:?}: {error}");
    }
}
