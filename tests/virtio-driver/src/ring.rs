//! Driver side of a split virtqueue (virtio 1.2, section 2.7).
//!
//! The driver owns the descriptor table and the available ring and reads the used ring. The life of a chain:
//!
//! ```text
//! add       descriptors written (or one indirect descriptor), head put into the available ring
//! publish   available index stored (release): the device may take the chain from now on
//! notify    kick eventfd written, unless the device said that it does not want to hear of it
//! take_used a used entry read (acquire): the chain is the driver's again
//! ```
//!
//! Two ways to learn of completions, as DPU drivers have them: [`Completion::Eventfd`] sleeps on the call eventfd and
//! asks for an interrupt only before it sleeps; [`Completion::Polling`] spins on the used index with interrupts
//! suppressed. Both work with and without EVENT_IDX.
//!
//! The ring checks the device: a used entry must name a chain that is outstanding, must not claim more bytes than the
//! chain's writable part has, and the used index must not run ahead of what was made available. A breach is
//! [`Error::RingProtocol`] – that is how tests prove "used exactly once".
//!
//! Raw access for hostile rings is in [`crate::hostile`]; the hooks are the `pub(crate)` functions at the end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::memory::{DpuBuffer, DpuMemory};
use crate::{Error, Result};

/// `VIRTQ_DESC_F_NEXT`.
pub const DESC_NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`: the device writes this buffer.
pub const DESC_WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`: the buffer is a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`.
const AVAIL_NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`.
const USED_NO_NOTIFY: u16 = 1;

/// Looks at the used index before a polling driver starts to yield its CPU (about 1 ms).
const SPINS_BEFORE_YIELD: u32 = 20_000;

/// `struct virtq_desc`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct RawDescriptor {
    /// DPU-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// `DESC_*`.
    pub flags: u16,
    /// Index of the next descriptor if [`DESC_NEXT`].
    pub next: u16,
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// DPU-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it.
    pub writable: bool,
}

impl Descriptor {
    /// A buffer the device reads.
    pub fn readable(addr: u64, len: usize) -> Self {
        Descriptor { addr, len: len as u32, writable: false }
    }

    /// A buffer the device writes.
    pub fn writable(addr: u64, len: usize) -> Self {
        Descriptor { addr, len: len as u32, writable: true }
    }
}

/// A chain that can be put on a ring again and again. With a table it takes one slot of the ring.
#[derive(Debug)]
pub struct Chain {
    descriptors: Vec<Descriptor>,
    writable: u32,
    table: Option<DpuBuffer>,
}

impl Chain {
    /// A chain whose descriptors lie in the ring's own table.
    pub fn direct(descriptors: Vec<Descriptor>) -> Self {
        let writable = descriptors.iter().filter(|d| d.writable).map(|d| d.len).fold(0, u32::saturating_add);
        Chain { descriptors, writable, table: None }
    }

    /// A chain in an indirect table, as Linux makes it when the feature was negotiated and there are two or more
    /// descriptors.
    pub fn indirect(memory: &DpuMemory, descriptors: Vec<Descriptor>) -> Result<Self> {
        let mut chain = Chain::direct(descriptors);
        if chain.descriptors.len() < 2 {
            return Ok(chain);
        }
        let table = memory.allocate(chain.descriptors.len() * size_of::<RawDescriptor>())?;
        for (index, raw) in raw_descriptors(&chain.descriptors, |index| index as u16).enumerate() {
            table.put(index * size_of::<RawDescriptor>(), &raw);
        }
        chain.table = Some(table);
        Ok(chain)
    }

    /// Bytes the device may write.
    pub fn writable_bytes(&self) -> u32 {
        self.writable
    }

    /// The buffers, in order.
    pub fn descriptors(&self) -> &[Descriptor] {
        &self.descriptors
    }
}

/// Table entries for `descriptors`, where `slot` gives the table index of the n-th one.
fn raw_descriptors<'a>(
    descriptors: &'a [Descriptor],
    slot: impl Fn(usize) -> u16 + 'a,
) -> impl Iterator<Item = RawDescriptor> + 'a {
    descriptors.iter().enumerate().map(move |(index, d)| {
        let last = index + 1 == descriptors.len();
        let flags = if d.writable { DESC_WRITE } else { 0 } | if last { 0 } else { DESC_NEXT };
        RawDescriptor { addr: d.addr, len: d.len, flags, next: if last { 0 } else { slot(index + 1) } }
    })
}

/// How the driver learns of completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// Sleep on the call eventfd.
    Eventfd,
    /// Spin on the used index, interrupts suppressed.
    Polling,
}

/// Negotiated properties of a ring.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// Number of descriptors, a power of two up to 32,768.
    pub size: u16,
    /// `VIRTIO_RING_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// How to wait.
    pub completion: Completion,
}

/// A completed chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// What [`Ring::add`] returned.
    pub head: u16,
    /// Bytes the device says it wrote.
    pub len: u32,
}

/// What happened on a ring so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct RingStats {
    /// Chains made available.
    pub added: u64,
    /// Chains that came back.
    pub completed: u64,
    /// Writes to the kick eventfd.
    pub kicks: u64,
    /// Signals on the call eventfd, counted by its counter.
    pub signals: u64,
}

#[derive(Clone, Copy, Debug)]
struct Outstanding {
    slots: u16,
    writable: u32,
}

/// The driver side of one virtqueue.
#[derive(Debug)]
pub struct Ring {
    config: RingConfig,
    table: DpuBuffer,
    avail: DpuBuffer,
    used: DpuBuffer,
    kick: OwnedFd,
    call: OwnedFd,
    /// Free slots of the descriptor table.
    free: Vec<u16>,
    /// Slots that belong to a head: `links[slot]` is the next one of the same chain.
    links: Vec<u16>,
    outstanding: Vec<Option<Outstanding>>,
    in_flight: u16,
    /// Available index as the driver counts it.
    next_avail: u16,
    /// Available index as the device sees it.
    published: u16,
    last_used: u16,
    stats: RingStats,
    /// Connection whose end means that the device is gone.
    connection: Option<OwnedFd>,
    /// A polling driver leaves interrupts on.
    keep_interrupts: bool,
}

impl Ring {
    /// An empty ring in DPU memory.
    pub fn new(memory: &DpuMemory, config: RingConfig) -> Result<Self> {
        let size = usize::from(config.size);
        let eventfd = || {
            rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                .map_err(|e| Error::os("create an eventfd", e))
        };
        let ring = Ring {
            config,
            table: memory.allocate(16 * size)?,
            avail: memory.allocate(6 + 2 * size)?,
            used: memory.allocate(6 + 8 * size)?,
            kick: eventfd()?,
            call: eventfd()?,
            free: (0..config.size).rev().collect(),
            links: vec![0; size],
            outstanding: vec![None; size],
            in_flight: 0,
            next_avail: 0,
            published: 0,
            last_used: 0,
            stats: RingStats::default(),
            connection: None,
            keep_interrupts: false,
        };
        ring.table.fill(0);
        ring.avail.fill(0);
        ring.used.fill(0);
        ring.suppress_interrupts();
        Ok(ring)
    }

    /// What was negotiated.
    pub fn config(&self) -> RingConfig {
        self.config
    }

    /// Lets a wait end with [`Error::Disconnected`] when the other end of this socket closes it.
    pub fn watch_connection(&mut self, socket: OwnedFd) {
        self.connection = Some(socket);
    }

    /// Lets a polling driver ask for an interrupt with every completion, as one does that only looks early.
    pub fn keep_interrupts(&mut self, keep: bool) {
        self.keep_interrupts = keep;
    }

    /// Changes how completions are learned of. Takes effect with the next wait.
    pub fn set_completion(&mut self, completion: Completion) {
        self.config.completion = completion;
    }

    /// Counters.
    pub fn stats(&self) -> RingStats {
        self.stats
    }

    /// Chains that the device has.
    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Descriptor slots that are free.
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// User addresses of descriptor table, available and used ring, for `SET_VRING_ADDR`.
    pub fn addresses(&self) -> [u64; 3] {
        [self.table.user_address(), self.avail.user_address(), self.used.user_address()]
    }

    /// DPU-physical addresses of descriptor table, available and used ring.
    pub fn dpu_addresses(&self) -> [u64; 3] {
        [self.table.gpa(), self.avail.gpa(), self.used.gpa()]
    }

    /// The kick eventfd.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The call eventfd.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// Available index to continue from, for `SET_VRING_BASE` of a ring that is handed over.
    pub fn base(&self) -> u16 {
        self.last_used
    }

    /// Puts a chain into the ring, invisible to the device until [`Ring::publish`]. Returns the head, which names the
    /// chain until it comes back.
    pub fn add(&mut self, chain: &Chain) -> Result<u16> {
        let head = match &chain.table {
            Some(table) => {
                let head = self.free.pop().ok_or(Error::RingFull)?;
                let raw = RawDescriptor {
                    addr: table.gpa(),
                    len: table.len() as u32,
                    flags: DESC_INDIRECT,
                    next: 0,
                };
                self.put_descriptor(head, raw);
                self.outstanding[usize::from(head)] =
                    Some(Outstanding { slots: 1, writable: chain.writable });
                head
            }
            None => {
                let count = chain.descriptors.len();
                let rest = self.free.len().checked_sub(count).filter(|_| count > 0).ok_or(Error::RingFull)?;
                let slots: Vec<u16> = self.free.split_off(rest);
                for (index, raw) in raw_descriptors(&chain.descriptors, |index| slots[index]).enumerate() {
                    self.put_descriptor(slots[index], raw);
                }
                self.lend(&slots, chain.writable)
            }
        };
        self.push_available(head);
        Ok(head)
    }

    /// Makes everything added visible to the device.
    pub fn publish(&mut self) {
        self.avail.store_u16(2, self.next_avail, Ordering::Release);
    }

    /// Kicks the device if it wants to hear of what was published since the last call.
    pub fn notify(&mut self) -> Result<()> {
        fence(Ordering::SeqCst); // The index must be visible before the wish is read (section 2.7.13.4.1).
        let wanted = if self.config.event_idx {
            let event = self.used.load_u16(4 + 8 * usize::from(self.config.size), Ordering::Relaxed);
            // vring_need_event() of include/uapi/linux/virtio_ring.h.
            self.next_avail.wrapping_sub(event).wrapping_sub(1) < self.next_avail.wrapping_sub(self.published)
        } else {
            self.next_avail != self.published
                && self.used.load_u16(0, Ordering::Relaxed) & USED_NO_NOTIFY == 0
        };
        self.published = self.next_avail;
        if wanted { self.kick() } else { Ok(()) }
    }

    /// Kicks the device unasked.
    pub fn kick(&mut self) -> Result<()> {
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).map_err(|e| Error::os("kick the device", e))?;
        self.stats.kicks += 1;
        Ok(())
    }

    /// [`Ring::add`], [`Ring::publish`] and [`Ring::notify`] in one.
    pub fn submit(&mut self, chain: &Chain) -> Result<u16> {
        let head = self.add(chain)?;
        self.publish();
        self.notify()?;
        Ok(head)
    }

    /// Takes one completion if there is one.
    pub fn take_used(&mut self) -> Result<Option<Used>> {
        let index = self.used.load_u16(2, Ordering::Acquire);
        if index == self.last_used {
            return Ok(None);
        }
        let ahead = index.wrapping_sub(self.last_used);
        if ahead > self.in_flight {
            return Err(Error::RingProtocol(format!(
                "used index {index} is {ahead} ahead with {} chains outstanding",
                self.in_flight
            )));
        }
        let at = 4 + 8 * usize::from(self.last_used % self.config.size);
        let (id, len) =
            (self.used.load_u32(at, Ordering::Relaxed), self.used.load_u32(at + 4, Ordering::Relaxed));
        let lent =
            self.outstanding.get_mut(id as usize).and_then(Option::take).ok_or_else(|| {
                Error::RingProtocol(format!("used entry names {id}, which is not outstanding"))
            })?;
        if len > lent.writable {
            return Err(Error::RingProtocol(format!(
                "device claims {len} bytes written into a chain with {}",
                lent.writable
            )));
        }
        let head = id as u16;
        let mut slot = head;
        for _ in 0..lent.slots {
            self.free.push(slot);
            slot = self.links[usize::from(slot)];
        }
        self.in_flight -= 1;
        self.last_used = self.last_used.wrapping_add(1);
        self.stats.completed += 1;
        Ok(Some(Used { head, len }))
    }

    /// Waits for a completion in the ring's way.
    pub fn wait_used(&mut self, limit: Duration) -> Result<Used> {
        match self.config.completion {
            Completion::Polling => self.spin(limit),
            Completion::Eventfd => self.sleep(limit),
        }
    }

    fn spin(&mut self, limit: Duration) -> Result<Used> {
        if self.keep_interrupts {
            self.ask_for_interrupt();
        } else {
            self.suppress_interrupts();
        }
        let start = Instant::now();
        let mut looks = 0u32;
        loop {
            if let Some(used) = self.take_used()? {
                return Ok(used);
            }
            looks += 1;
            if looks.is_multiple_of(1024) && start.elapsed() > limit {
                return Err(self.timeout(limit));
            }
            if looks.is_multiple_of(SPINS_BEFORE_YIELD) {
                self.expect_connection()?;
            }
            // A device that takes longer than a wake-up may need this CPU; benchmarks never come here.
            if looks > SPINS_BEFORE_YIELD { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }

    fn sleep(&mut self, limit: Duration) -> Result<Used> {
        let start = Instant::now();
        loop {
            if let Some(used) = self.take_used()? {
                return Ok(used);
            }
            self.ask_for_interrupt();
            if let Some(used) = self.take_used()? {
                return Ok(used); // Completed between the look and the wish.
            }
            let left = limit.checked_sub(start.elapsed()).ok_or_else(|| self.timeout(limit))?;
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let mut events = vec![PollFd::new(&self.call, PollFlags::IN)];
            events.extend(self.connection.as_ref().map(|socket| PollFd::new(socket, PollFlags::RDHUP)));
            match rustix::event::poll(&mut events, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(Error::os("wait for the call eventfd", e)),
            }
            self.drain_call();
            if let Some(used) = self.take_used()? {
                return Ok(used);
            }
            self.expect_connection()?;
        }
    }

    /// An error if the other end of the connection has closed it.
    fn expect_connection(&self) -> Result<()> {
        let Some(socket) = &self.connection else { return Ok(()) };
        let mut events = [PollFd::new(socket, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        match rustix::event::poll(&mut events, Some(&now)) {
            Ok(1..) => {
                Err(Error::Disconnected { during: format!("{} chains were outstanding", self.in_flight) })
            }
            _ => Ok(()),
        }
    }

    /// Reads the call eventfd's counter into the statistics.
    pub fn drain_call(&mut self) {
        let mut counter = [0; 8];
        if rustix::io::read(&self.call, &mut counter).is_ok() {
            self.stats.signals += u64::from_ne_bytes(counter);
        }
    }

    fn timeout(&self, limit: Duration) -> Error {
        let what = format!("a completion ({} chains outstanding)", self.in_flight);
        Error::Timeout { what, waited: limit }
    }

    fn suppress_interrupts(&self) {
        if self.config.event_idx {
            // An event just behind the present index comes up only after 65,535 more completions.
            self.set_used_event(self.last_used.wrapping_sub(1));
        } else {
            self.avail.store_u16(0, AVAIL_NO_INTERRUPT, Ordering::Relaxed);
        }
    }

    fn ask_for_interrupt(&self) {
        if self.config.event_idx {
            self.set_used_event(self.last_used);
        } else {
            self.avail.store_u16(0, 0, Ordering::Relaxed);
        }
        fence(Ordering::SeqCst); // The wish must be visible before the index is read again.
    }

    fn set_used_event(&self, event: u16) {
        self.avail.store_u16(4 + 2 * usize::from(self.config.size), event, Ordering::Relaxed);
    }

    fn push_available(&mut self, head: u16) {
        let at = 4 + 2 * usize::from(self.next_avail % self.config.size);
        self.avail.store_u16(at, head, Ordering::Relaxed);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.in_flight += 1;
        self.stats.added += 1;
    }

    /// Links `slots` to one chain that the device is about to get; the first is its head.
    fn lend(&mut self, slots: &[u16], writable: u32) -> u16 {
        for pair in slots.windows(2) {
            self.links[usize::from(pair[0])] = pair[1];
        }
        let head = slots[0];
        self.outstanding[usize::from(head)] = Some(Outstanding { slots: slots.len() as u16, writable });
        head
    }

    /// Writes one entry of the descriptor table, whatever it says.
    pub(crate) fn put_descriptor(&self, slot: u16, raw: RawDescriptor) {
        self.table.put(16 * usize::from(slot), &raw);
    }

    /// Takes `count` slots, writes what `fill` makes of their numbers, and adds them as one chain.
    pub(crate) fn add_raw(
        &mut self,
        count: usize,
        fill: impl FnOnce(&[u16]) -> Vec<RawDescriptor>,
    ) -> Result<u16> {
        let rest = self.free.len().checked_sub(count).filter(|_| count > 0).ok_or(Error::RingFull)?;
        let slots = self.free.split_off(rest);
        for (slot, raw) in slots.iter().zip(fill(&slots)) {
            self.put_descriptor(*slot, raw);
        }
        // What a device may report for a malformed chain is not bounded by the ring's rules.
        let head = self.lend(&slots, u32::MAX);
        self.push_available(head);
        Ok(head)
    }

    /// Stores any available index, without keeping the driver's own count in step.
    pub(crate) fn force_available_index(&self, index: u16) {
        self.avail.store_u16(2, index, Ordering::Release);
    }

    /// Stores any head into an entry of the available ring.
    pub(crate) fn force_available_entry(&self, entry: u16, head: u16) {
        self.avail.store_u16(4 + 2 * usize::from(entry % self.config.size), head, Ordering::Release);
    }

    /// Available index of the driver's own count.
    pub(crate) fn next_available(&self) -> u16 {
        self.next_avail
    }

    /// Used index as the device last stored it.
    pub(crate) fn device_used_index(&self) -> u16 {
        self.used.load_u16(2, Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests;
