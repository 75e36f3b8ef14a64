//! What a ring is made of, how it can fail, and what it counts.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU64;

/// Largest queue (virtio 1.2 section 2.7).
pub const MAX_QUEUE_SIZE: u32 = 32768;

/// Why a ring cannot be used, or can no longer be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a power of two, 0, or too large.
    #[error("queue {index}: size {size} is not a power of two from 1 to {MAX_QUEUE_SIZE}")]
    Size {
        /// Queue.
        index: u16,
        /// Size that was asked for.
        size: u32,
    },
    /// An area is not aligned as virtio wants it.
    #[error("queue {index}: {area} at {addr:#x} is not aligned")]
    Alignment {
        /// Queue.
        index: u16,
        /// Which of the three.
        area: &'static str,
        /// Front end address.
        addr: u64,
    },
    /// An area does not lie inside one shared region.
    #[error("queue {index}: {area} at {addr:#x} does not lie in shared memory")]
    NotShared {
        /// Queue.
        index: u16,
        /// Which of the three.
        area: &'static str,
        /// Front end address.
        addr: u64,
    },
    /// The available index cannot be right.
    #[error(
        "queue {index}: available index {available} is more than {size} ahead of {next}; the queue stops"
    )]
    Broken {
        /// Queue.
        index: u16,
        /// What the DPU wrote.
        available: u16,
        /// Next entry to be taken.
        next: u16,
        /// Queue size.
        size: u16,
    },
}

/// Where the three areas lie, in the front end's own addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RingAddresses {
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
}

/// How the DPU tells that there is work.
#[derive(Debug)]
pub enum Kick {
    /// It writes to this eventfd.
    Event(OwnedFd),
    /// It does not; the ring is to be polled.
    Poll,
}

/// Everything a ring is made of. Without `call` or `err` those signals are not sent.
#[derive(Debug)]
pub struct RingConfig {
    /// Queue.
    pub index: u16,
    /// Entries.
    pub size: u32,
    /// Areas.
    pub addresses: RingAddresses,
    /// Next available entry to take.
    pub base: u16,
    /// `VIRTIO_RING_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// `VIRTIO_RING_F_INDIRECT_DESC` was negotiated.
    pub indirect: bool,
    /// How work is announced.
    pub kick: Kick,
    /// Interrupts the DPU.
    pub call: Option<OwnedFd>,
    /// Tells the front end that the queue broke.
    pub err: Option<OwnedFd>,
}

/// Counters of one ring, read by others at any time.
#[derive(Debug, Default)]
pub struct RingCounters {
    /// Available entries taken.
    pub chains: AtomicU64,
    /// Of these, malformed and returned with length 0.
    pub bad_chains: AtomicU64,
    /// Of these, dropped by whoever served them and returned with length 0.
    pub abandoned_chains: AtomicU64,
    /// Times the worker was woken by the DPU.
    pub kicks: AtomicU64,
    /// Interrupts sent.
    pub signals: AtomicU64,
}
