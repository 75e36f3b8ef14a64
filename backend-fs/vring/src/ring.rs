//! Device side of one split virtqueue (virtio 1.2 section 2.7).
//!
//! # Roles
//! The DPU's driver writes descriptors and the *available* ring; this side writes the *used* ring.
//! Both live in DPU memory at addresses the front end named. A [`Ring`] exists only for a validated
//! configuration: size a power of two, areas aligned and each inside one shared region. After that
//! the areas are reached through cached pointers that the ring's memory table keeps mapped.
//!
//! # One request
//! [`Ring::pop`] takes the next head, copies each descriptor once (the DPU may rewrite it at any
//! time), checks and translates it, and yields a [`Chain`]. [`Ring::push_used`] writes its used entry;
//! [`Ring::publish`] makes all entries since the last time visible with one store;
//! [`Ring::signal_if_needed`] interrupts the DPU when it asked for that. Completion order is free.
//!
//! # Hostile rings
//! Every available entry that is taken gets exactly one used entry. A malformed chain gets it at once
//! with length 0 and is counted; the queue lives. Only an available index that jumps by more than
//! the ring's size leaves nothing to go by: the ring is then *broken*, [`Ring::pop`] says so each
//! time, and nothing more is read until the front end sets the queue up anew.
//! Chains in flight keep at most [`PIECE_BUDGET`] pieces; beyond that the ring takes nothing more
//! until one comes back.
//!
//! # Notifications
//! With `VIRTIO_RING_F_EVENT_IDX` each side publishes the index at which it wants to hear from the
//! other; without, a flag. While a worker polls, kicks are off ([`Ring::disarm_kick`]); before it
//! sleeps it arms them ([`Ring::arm_kick`]) and looks once more, so that no request is missed.

mod config;
mod give_back;
mod notifier;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

pub use config::{Kick, MAX_QUEUE_SIZE, RingAddresses, RingConfig, RingCounters, RingError};
use notifier::Notifier;

use crate::chain::{Abandoned, Chain};
use crate::memory::{DirtyLog, DpuMemory};

/// Pieces of memory that the chains in flight of one ring may hold together (24 MiB of bookkeeping).
/// A full 1024-entry queue of 1 MiB requests in 4 KiB pages needs a quarter of it.
pub const PIECE_BUDGET: usize = 1 << 20;

/// Most descriptors of one chain; also the longest indirect table.
const MAX_CHAIN: u32 = 32768;
/// Most bytes of one chain (virtio 1.2 section 2.7.4).
const MAX_CHAIN_BYTES: u64 = 1 << 32;
/// Pieces up to which the storage of a chain is kept for the next one.
const POOLED_PIECES: usize = 2048;

const DESCRIPTOR_SIZE: u64 = 16;
const F_NEXT: u16 = 1;
const F_WRITE: u16 = 2;
const F_INDIRECT: u16 = 4;
/// `VIRTQ_AVAIL_F_NO_INTERRUPT`, `VIRTQ_USED_F_NO_NOTIFY`.
const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// Why one chain was returned unserved. Only counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BadChain {
    Head,
    InFlight,
    TooLong,
    Index,
    Indirect,
    ZeroLength,
    Order,
    NotShared,
}

/// Adds to a counter that only one thread writes.
fn count(counter: &AtomicU64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
}

/// Pointers to the fields of the three areas. Valid as long as the memory table lives.
#[derive(Clone, Copy, Debug)]
struct Areas {
    descriptors: *const u8,
    avail_flags: *const AtomicU16,
    avail_idx: *const AtomicU16,
    avail_ring: *const AtomicU16,
    used_event: *const AtomicU16,
    used_flags: *const AtomicU16,
    used_idx: *const AtomicU16,
    used_ring: *mut u32,
    avail_event: *const AtomicU16,
}

/// Checked copy of a descriptor.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Device side of one queue. Owned by one worker thread at a time.
#[derive(Debug)]
pub struct Ring {
    index: u16,
    size: u16,
    addresses: RingAddresses,
    areas: Areas,
    memory: Arc<DpuMemory>,
    event_idx: bool,
    indirect: bool,
    kick: Kick,
    call: Option<Notifier>,
    err: Option<Notifier>,
    /// Next available entry to take, and the available index as last read.
    next_avail: u16,
    avail_seen: u16,
    /// Next used entry to write, and up to where entries are visible and signalled.
    next_used: u16,
    published: u16,
    signalled: u16,
    /// Signal whatever the DPU's event index says: the driver may have missed one.
    force_signal: bool,
    broken: bool,
    /// Switched off by the front end: nothing is taken, what is in flight comes back.
    enabled: bool,
    /// Region of the last translation.
    hint: usize,
    /// One bit per head: handed out and not back yet.
    in_flight: Box<[u64]>,
    chains_in_flight: usize,
    pieces_in_flight: usize,
    abandoned: Arc<Abandoned>,
    pool: Vec<Chain>,
    data_log: Option<Arc<DirtyLog>>,
    /// Log of the used ring and the address at which its first byte is logged.
    used_log: Option<(Arc<DirtyLog>, u64)>,
    counters: Arc<RingCounters>,
}

// SAFETY: the pointers in `areas` lead into mappings that `memory` keeps alive; the memory is shared
// with the DPU and only accessed through atomics and volatile copies, from whichever thread owns the
// ring.
unsafe impl Send for Ring {}

impl Areas {
    fn find(memory: &DpuMemory, index: u16, size: u16, at: RingAddresses) -> Result<Areas, RingError> {
        let n = u64::from(size);
        let place = |area: &'static str, addr: u64, len: u64, align: u64| {
            let piece = memory.user_range(addr, len).ok_or(RingError::NotShared { index, area, addr })?;
            // The user address is what the specification speaks of; ours is what is dereferenced.
            if !addr.is_multiple_of(align) || !(piece.addr as u64).is_multiple_of(align) {
                return Err(RingError::Alignment { index, area, addr });
            }
            Ok(piece)
        };
        let descriptors = place("descriptor table", at.descriptors, n * DESCRIPTOR_SIZE, 16)?;
        let available = place("available ring", at.available, 4 + 2 * n + 2, 2)?;
        let used = place("used ring", at.used, 4 + 8 * n + 2, 4)?;
        // Offsets within areas whose whole length was just checked (virtio 1.2, 2.7.6 and 2.7.8).
        let avail_at = |offset: usize| available.addr.wrapping_add(offset).cast::<AtomicU16>().cast_const();
        let used_at = |offset: usize| used.addr.wrapping_add(offset).cast::<AtomicU16>().cast_const();
        Ok(Areas {
            descriptors: descriptors.addr,
            avail_flags: avail_at(0),
            avail_idx: avail_at(2),
            avail_ring: avail_at(4),
            used_event: avail_at(4 + 2 * usize::from(size)),
            used_flags: used_at(0),
            used_idx: used_at(2),
            used_ring: used.addr.wrapping_add(4).cast(),
            avail_event: used_at(4 + 8 * usize::from(size)),
        })
    }
}

/// Loads a field of a ring area.
#[inline]
fn load(field: *const AtomicU16, order: Ordering) -> u16 {
    // SAFETY: `field` comes from `Areas`: aligned, inside a mapping that the ring's memory table keeps
    // alive, and only accessed atomically from this side.
    u16::from_le(unsafe { (*field).load(order) })
}

/// Stores a field of a ring area.
#[inline]
fn store(field: *const AtomicU16, value: u16, order: Ordering) {
    // SAFETY: as in `load`; mappings are writable.
    unsafe { (*field).store(value.to_le(), order) };
}

/// Copies descriptor `index` of the table at `table` once.
///
/// # Safety
/// The table must be 16-byte aligned, mapped, and longer than `index`.
#[inline]
unsafe fn read_descriptor(table: *const u8, index: u16) -> Descriptor {
    let at = table.wrapping_add(usize::from(index) * DESCRIPTOR_SIZE as usize).cast::<u64>();
    // SAFETY: the caller's promise covers both words; volatile, because the DPU may write meanwhile and
    // the values must not be read a second time.
    let (addr, rest) = unsafe { (at.read_volatile(), at.wrapping_add(1).read_volatile()) };
    let rest = u64::from_le(rest);
    Descriptor {
        addr: u64::from_le(addr),
        len: rest as u32,
        flags: (rest >> 32) as u16,
        next: (rest >> 48) as u16,
    }
}

/// Whether moving an index from `old` to `new` passes `event` (virtio 1.2 section 2.7.10).
#[inline]
fn passes(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

impl Ring {
    /// Sets a queue up in `memory`. The used index continues from what the used ring says.
    ///
    /// # Errors
    /// [`RingError`] for a configuration that virtio does not allow; the configuration comes back.
    #[allow(clippy::result_large_err, reason = "set-up path; the caller wants its descriptors back")]
    pub fn new(memory: Arc<DpuMemory>, config: RingConfig) -> Result<Ring, (RingError, RingConfig)> {
        let (index, size) = (config.index, config.size);
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err((RingError::Size { index, size }, config));
        }
        let areas = match Areas::find(&memory, index, size as u16, config.addresses) {
            Ok(areas) => areas,
            Err(error) => return Err((error, config)),
        };
        let used = load(areas.used_idx, Ordering::Relaxed);
        Ok(Ring {
            index,
            size: size as u16,
            addresses: config.addresses,
            areas,
            memory,
            event_idx: config.event_idx,
            indirect: config.indirect,
            kick: config.kick,
            call: config.call.map(Notifier::new),
            err: config.err.map(Notifier::new),
            next_avail: config.base,
            avail_seen: config.base,
            next_used: used,
            published: used,
            signalled: used,
            force_signal: true,
            broken: false,
            enabled: true,
            hint: 0,
            in_flight: vec![0; (size as usize).div_ceil(64)].into(),
            chains_in_flight: 0,
            pieces_in_flight: 0,
            abandoned: Arc::default(),
            pool: Vec::with_capacity(size as usize),
            data_log: None,
            used_log: None,
            counters: Arc::default(),
        })
    }

    /// Queue number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Next available entry that would be taken: `VHOST_USER_GET_VRING_BASE`.
    pub fn base(&self) -> u16 {
        self.next_avail
    }

    /// Chains handed out and not back yet.
    pub fn in_flight(&self) -> usize {
        self.chains_in_flight
    }

    /// Whether the ring stopped because of what the DPU wrote.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// The counters, which outlive the ring.
    pub fn counters(&self) -> &Arc<RingCounters> {
        &self.counters
    }

    /// Goes on with the counters of an earlier incarnation of the same queue.
    pub fn set_counters(&mut self, counters: Arc<RingCounters>) {
        self.counters = counters;
    }

    /// The memory the ring lies in.
    pub fn memory(&self) -> &Arc<DpuMemory> {
        &self.memory
    }

    /// The descriptor that becomes readable when there is work; `None`: poll.
    pub fn kick(&self) -> Option<BorrowedFd<'_>> {
        match &self.kick {
            Kick::Event(fd) => Some(fd.as_fd()),
            Kick::Poll => None,
        }
    }

    /// Replaces the kick.
    pub fn set_kick(&mut self, kick: Kick) {
        self.kick = kick;
    }

    /// Replaces the interrupt descriptor. The next completion signals in any case, because one may
    /// have been lost between the two.
    pub fn set_call(&mut self, call: Option<OwnedFd>) {
        self.call = call.map(Notifier::new);
        self.force_signal = true;
    }

    /// Switches taking of requests on or off. Completions go on either way.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Replaces the error descriptor.
    pub fn set_err(&mut self, err: Option<OwnedFd>) {
        self.err = err.map(Notifier::new);
    }

    /// Sets where writes are logged: data, and the used ring at the given logging address.
    pub fn set_log(&mut self, data: Option<Arc<DirtyLog>>, used: Option<(Arc<DirtyLog>, u64)>) {
        self.data_log = data;
        self.used_log = used;
    }

    /// Moves the ring to another memory table. Chains in flight keep the old one.
    ///
    /// # Errors
    /// [`RingError`] when the areas are not in the new table; the ring is unchanged then.
    pub fn remap(&mut self, memory: Arc<DpuMemory>) -> Result<(), RingError> {
        self.areas = Areas::find(&memory, self.index, self.size, self.addresses)?;
        self.memory = memory;
        self.hint = 0;
        // Pooled chains hold the old table.
        self.pool.clear();
        Ok(())
    }

    /// Takes the descriptors out again, to set the queue up anew from them.
    pub fn into_notifiers(self) -> (Kick, Option<OwnedFd>, Option<OwnedFd>) {
        (self.kick, self.call.map(|call| call.fd), self.err.map(|err| err.fd))
    }

    /// Whether [`Ring::pop`] would find something.
    #[inline]
    pub fn has_work(&self) -> bool {
        let available = self.avail_seen != self.next_avail
            || load(self.areas.avail_idx, Ordering::Acquire) != self.next_avail;
        available && self.enabled && !self.broken && self.pieces_in_flight < PIECE_BUDGET
    }

    /// Takes the next chain. Malformed ones are returned to the DPU on the way.
    ///
    /// # Errors
    /// [`RingError::Broken`], from then on each time.
    #[inline]
    pub fn pop(&mut self) -> Result<Option<Chain>, RingError> {
        self.return_abandoned();
        if !self.enabled {
            return Ok(None);
        }
        // One round at most, so that a DPU that feeds bad chains for ever cannot hold the worker here.
        for _ in 0..self.size {
            if self.next_avail == self.avail_seen && !self.look()? {
                return Ok(None);
            }
            if self.pieces_in_flight >= PIECE_BUDGET {
                return Ok(None);
            }
            let slot = usize::from(self.next_avail & (self.size - 1));
            let head = load(self.areas.avail_ring.wrapping_add(slot), Ordering::Relaxed);
            self.next_avail = self.next_avail.wrapping_add(1);
            count(&self.counters.chains);
            match self.take(head) {
                Ok(chain) => return Ok(Some(chain)),
                Err(bad) => {
                    tracing::debug!(queue = self.index, head, ?bad, "malformed descriptor chain");
                    count(&self.counters.bad_chains);
                    self.write_used(head, 0);
                }
            }
        }
        Ok(None)
    }

    /// Reads the available index; whether there is something new.
    fn look(&mut self) -> Result<bool, RingError> {
        let available = load(self.areas.avail_idx, Ordering::Acquire);
        if self.broken || available.wrapping_sub(self.next_avail) > self.size {
            self.broken = true;
            let (index, next, size) = (self.index, self.next_avail, self.size);
            return Err(RingError::Broken { index, available, next, size });
        }
        self.avail_seen = available;
        Ok(available != self.next_avail)
    }

    fn take(&mut self, head: u16) -> Result<Chain, BadChain> {
        if head >= self.size {
            return Err(BadChain::Head);
        }
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        if self.in_flight[word] & bit != 0 {
            return Err(BadChain::InFlight);
        }
        let mut chain = self
            .pool
            .pop()
            .unwrap_or_else(|| Chain::new(Arc::clone(&self.memory), Some(Arc::clone(&self.abandoned))));
        match self.walk(head, &mut chain) {
            Ok(()) => {
                chain.head = head;
                chain.owed = true;
                self.in_flight[word] |= bit;
                self.chains_in_flight += 1;
                self.pieces_in_flight += chain.pieces();
                Ok(chain)
            }
            Err(bad) => {
                self.recycle(chain);
                Err(bad)
            }
        }
    }

    /// Follows the descriptors from `head`, filling `chain`.
    fn walk(&mut self, head: u16, chain: &mut Chain) -> Result<(), BadChain> {
        let (mut table, mut entries) = (self.areas.descriptors, u32::from(self.size));
        let (mut index, mut seen, mut bytes, mut nested) = (head, 0, 0, false);
        loop {
            // A chain that visits more descriptors than the table has runs in a circle.
            if seen >= entries {
                return Err(BadChain::TooLong);
            }
            seen += 1;
            // SAFETY: `index < entries` (checked for the head by the caller and below for each next one);
            // the table is the ring's own, or an indirect one checked by `indirect_table`.
            let descriptor = unsafe { read_descriptor(table, index) };
            if descriptor.flags & F_INDIRECT != 0 {
                if nested || !self.indirect || descriptor.flags & F_NEXT != 0 {
                    return Err(BadChain::Indirect);
                }
                (table, entries) = self.indirect_table(&descriptor)?;
                (index, seen, nested) = (0, 0, true);
                continue;
            }
            if descriptor.len == 0 {
                return Err(BadChain::ZeroLength);
            }
            bytes += u64::from(descriptor.len);
            if bytes > MAX_CHAIN_BYTES {
                return Err(BadChain::TooLong);
            }
            let stream = if descriptor.flags & F_WRITE != 0 {
                &mut chain.writable
            } else if chain.writable.len == 0 {
                &mut chain.readable
            } else {
                return Err(BadChain::Order);
            };
            self.memory
                .translate(descriptor.addr, u64::from(descriptor.len), &mut self.hint, |piece| {
                    stream.push(piece);
                })
                .map_err(|_| BadChain::NotShared)?;
            if descriptor.flags & F_NEXT == 0 {
                return Ok(());
            }
            if u32::from(descriptor.next) >= entries {
                return Err(BadChain::Index);
            }
            index = descriptor.next;
        }
    }

    /// Checks an indirect table: aligned, whole entries, contiguous in shared memory.
    fn indirect_table(&mut self, descriptor: &Descriptor) -> Result<(*const u8, u32), BadChain> {
        let len = u64::from(descriptor.len);
        let entries = len / DESCRIPTOR_SIZE;
        if entries == 0 || entries > u64::from(MAX_CHAIN) || !len.is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(BadChain::Indirect);
        }
        let (mut first, mut pieces) = (std::ptr::null::<u8>(), 0);
        self.memory
            .translate(descriptor.addr, len, &mut self.hint, |piece| {
                if pieces == 0 {
                    first = piece.addr;
                }
                pieces += 1;
            })
            .map_err(|_| BadChain::NotShared)?;
        if pieces != 1 || !(first as u64).is_multiple_of(DESCRIPTOR_SIZE) {
            return Err(BadChain::Indirect);
        }
        Ok((first, entries as u32))
    }

    /// Returns a chain to the DPU; `written` bytes of its writable part are the reply. It becomes
    /// visible with [`Ring::publish`]. A chain of another ring, or of an earlier incarnation of this
    /// one, is ignored.
    #[inline]
    pub fn push_used(&mut self, mut chain: Chain, written: usize) {
        let ours = chain.ring.as_ref().is_some_and(|ring| Arc::ptr_eq(ring, &self.abandoned));
        if !ours || !chain.owed {
            chain.owed = false;
            return;
        }
        chain.owed = false;
        let written = written.min(chain.writable.len).min(u32::MAX as usize);
        if let Some(log) = &self.data_log {
            let mut left = written;
            for piece in &chain.writable.pieces {
                let here = left.min(piece.len);
                log.mark(piece.dpu_addr, here as u64);
                left -= here;
            }
        }
        self.land(chain.head, chain.pieces());
        self.write_used(chain.head, written as u32);
        self.recycle(chain);
    }

    /// Makes all used entries so far visible to the DPU.
    #[inline]
    pub fn publish(&mut self) {
        if self.next_used != self.published {
            self.published = self.next_used;
            store(self.areas.used_idx, self.published, Ordering::Release);
            self.log_used(2, 2);
        }
    }

    /// Interrupts the DPU if it wants to hear of the entries published since the last time.
    /// Returns whether it did.
    #[inline]
    pub fn signal_if_needed(&mut self) -> bool {
        let (old, new) = (self.signalled, self.published);
        if old == new {
            return false;
        }
        self.signalled = new;
        // The used index must be visible before the DPU's wish is read (virtio 1.2 section 2.7.7.2).
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = load(self.areas.used_event, Ordering::Relaxed);
            self.force_signal || passes(event, new, old)
        } else {
            load(self.areas.avail_flags, Ordering::Relaxed) & AVAIL_F_NO_INTERRUPT == 0
        };
        self.force_signal = false;
        if !wanted {
            return false;
        }
        if let Some(call) = &self.call {
            count(&self.counters.signals);
            call.signal();
        }
        true
    }

    /// Tells the front end that the queue broke.
    pub fn signal_error(&self) {
        if let Some(err) = &self.err {
            err.signal();
        }
    }

    /// Asks for a kick with the next request. Returns true if there is one already: then serve it
    /// instead of sleeping.
    pub fn arm_kick(&mut self) -> bool {
        if self.event_idx {
            self.store_avail_event(self.next_avail);
        } else {
            store(self.areas.used_flags, 0, Ordering::Relaxed);
            self.log_used(0, 2);
        }
        // The wish must be visible before the last look at the available index.
        fence(Ordering::SeqCst);
        self.has_work()
    }

    /// Says that no kicks are needed, because this side polls. With EVENT_IDX an event index that was
    /// passed stays silent for the next 65535 entries, so mostly there is nothing to write.
    pub fn disarm_kick(&mut self) {
        if self.event_idx {
            self.store_avail_event(self.next_avail.wrapping_sub(1));
        } else {
            store(self.areas.used_flags, USED_F_NO_NOTIFY, Ordering::Relaxed);
            self.log_used(0, 2);
        }
    }

    /// Counts a wake-up by the DPU.
    pub fn count_kick(&self) {
        count(&self.counters.kicks);
    }

    fn store_avail_event(&self, value: u16) {
        store(self.areas.avail_event, value, Ordering::Relaxed);
        self.log_used(4 + 8 * u64::from(self.size), 2);
    }

    /// The head is back: no longer in flight.
    fn land(&mut self, head: u16, pieces: usize) {
        let (word, bit) = (usize::from(head / 64), 1u64 << (head % 64));
        if let Some(bits) = self.in_flight.get_mut(word)
            && *bits & bit != 0
        {
            *bits &= !bit;
            self.chains_in_flight -= 1;
            self.pieces_in_flight = self.pieces_in_flight.saturating_sub(pieces);
        }
    }

    fn return_abandoned(&mut self) {
        for (head, pieces) in self.abandoned.take() {
            count(&self.counters.abandoned_chains);
            self.land(head, pieces);
            self.write_used(head, 0);
        }
    }

    fn write_used(&mut self, head: u16, written: u32) {
        let slot = usize::from(self.next_used & (self.size - 1));
        let entry = self.areas.used_ring.wrapping_add(slot * 2);
        // SAFETY: `slot < size`, so both words lie in the used ring, which is mapped and 4-byte aligned.
        unsafe {
            entry.write_volatile(u32::from(head).to_le());
            entry.wrapping_add(1).write_volatile(written.to_le());
        }
        self.next_used = self.next_used.wrapping_add(1);
        self.log_used(4 + 8 * slot as u64, 8);
    }

    #[inline]
    fn log_used(&self, offset: u64, len: u64) {
        if let Some((log, base)) = &self.used_log {
            log.mark(base.saturating_add(offset), len);
        }
    }

    /// Keeps the storage of a chain that is done, unless it is oversized or of an old memory table.
    fn recycle(&mut self, mut chain: Chain) {
        let small = chain.readable.pieces.capacity() + chain.writable.pieces.capacity() <= POOLED_PIECES;
        if small && Arc::ptr_eq(&chain.memory, &self.memory) && self.pool.len() < usize::from(self.size) {
            chain.readable.clear();
            chain.writable.clear();
            self.pool.push(chain);
        }
    }
}

#[cfg(test)]
mod tests;
