//! A chain that was taken and turned out not to be needed goes back to where it came from.
//!
//! A device that takes buffers ahead of the data for them (virtio-vsock's receive queue) holds chains
//! that it never wrote to when its queue stops. Returning them as used would tell the DPU of data that
//! never was; leaving them out would lose them. Going back, they are the next ones to be taken, by
//! this ring or by the one that continues at [`Ring::base`].
#![forbid(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Ring, load};
use crate::chain::Chain;

impl Ring {
    /// Gives back the chain that was taken last. Several go back last one first.
    ///
    /// # Errors
    /// The chain itself when the available entry before the next one is not its own: a malformed chain
    /// was taken (and returned) after it, or the DPU has rewritten the entry. It can still be
    /// completed with length 0.
    pub fn give_back(&mut self, mut chain: Chain) -> Result<(), Chain> {
        let ours = chain.ring.as_ref().is_some_and(|ring| Arc::ptr_eq(ring, &self.abandoned));
        if !ours || !chain.owed {
            return Err(chain);
        }
        let last = self.next_avail.wrapping_sub(1);
        let slot = usize::from(last & (self.size - 1));
        if load(self.areas.avail_ring.wrapping_add(slot), Ordering::Relaxed) != chain.head {
            return Err(chain);
        }
        self.next_avail = last;
        let taken = &self.counters.chains;
        taken.store(taken.load(Ordering::Relaxed).wrapping_sub(1), Ordering::Relaxed);
        chain.owed = false;
        self.land(chain.head, chain.pieces());
        self.recycle(chain);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use super::Ring;
    use crate::memory::DpuMemory;
    use crate::ring::{Kick, RingAddresses, RingConfig};

    const SIZE: u16 = 8;
    const AVAILABLE: u64 = 0x1000;
    const USED: u64 = 0x2000;

    /// A ring with `heads` available, each a chain of one writable descriptor.
    fn ring(heads: &[u16]) -> (Arc<DpuMemory>, Ring) {
        let memory = Arc::new(DpuMemory::anonymous(0x4000).expect("memory"));
        let base = memory.regions().next().expect("a region").region.user_addr;
        for head in 0..SIZE {
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&(0x3000 + u64::from(head) * 64).to_le_bytes());
            descriptor[8..12].copy_from_slice(&64u32.to_le_bytes());
            descriptor[12..14].copy_from_slice(&2u16.to_le_bytes());
            memory.write(u64::from(head) * 16, &descriptor).expect("in range");
        }
        for (slot, head) in heads.iter().enumerate() {
            memory.write(AVAILABLE + 4 + 2 * slot as u64, &head.to_le_bytes()).expect("in range");
        }
        memory.write(AVAILABLE + 2, &(heads.len() as u16).to_le_bytes()).expect("in range");
        let config = RingConfig {
            index: 0,
            size: u32::from(SIZE),
            addresses: RingAddresses { descriptors: base, available: base + AVAILABLE, used: base + USED },
            base: 0,
            event_idx: false,
            indirect: false,
            kick: Kick::Poll,
            call: None,
            err: None,
        };
        let ring = Ring::new(Arc::clone(&memory), config).map_err(|(error, _)| error).expect("a ring");
        (memory, ring)
    }

    fn used_index(memory: &DpuMemory) -> u16 {
        let mut index = [0; 2];
        memory.read(USED + 2, &mut index).expect("in range");
        u16::from_le_bytes(index)
    }

    #[test]
    fn chains_given_back_are_taken_again_in_the_same_order() {
        let (memory, mut ring) = ring(&[3, 1, 4]);
        let mut taken: Vec<_> = std::iter::from_fn(|| ring.pop().expect("a sound ring")).collect();
        assert_eq!((taken.len(), ring.base(), ring.in_flight()), (3, 3, 3));
        while taken.len() > 1 {
            ring.give_back(taken.pop().expect("one")).expect("it was the last one taken");
        }
        assert_eq!((ring.base(), ring.in_flight()), (1, 1));
        assert_eq!(ring.counters().chains.load(Ordering::Relaxed), 1);
        let again: Vec<_> = std::iter::from_fn(|| ring.pop().expect("a sound ring")).collect();
        assert_eq!(again.iter().map(|chain| chain.head).collect::<Vec<_>>(), [1, 4]);
        ring.publish();
        assert_eq!(used_index(&memory), 0, "nothing was returned as used");
    }

    #[test]
    fn a_chain_that_was_not_the_last_one_taken_comes_back() {
        let (_memory, mut ring) = ring(&[3, 1]);
        let first = ring.pop().expect("a sound ring").expect("a chain");
        let _second = ring.pop().expect("a sound ring").expect("a chain");
        let first = ring.give_back(first).expect_err("another was taken after it");
        assert_eq!(ring.base(), 2);
        ring.push_used(first, 0);
        assert_eq!(ring.in_flight(), 1);
    }

    #[test]
    fn a_malformed_chain_in_between_blocks_the_way_back() {
        // Head 8 does not exist.
        let (memory, mut ring) = ring(&[3, 8, 1]);
        let first = ring.pop().expect("a sound ring").expect("a chain");
        let last = ring.pop().expect("a sound ring").expect("a chain");
        ring.give_back(last).expect("it was the last one taken");
        assert_eq!(ring.base(), 2);
        let first = ring.give_back(first).expect_err("the malformed one came after it");
        ring.push_used(first, 0);
        ring.publish();
        assert_eq!((ring.base(), used_index(&memory)), (2, 2), "each entry was used once");
    }
}
