//! One input is the memory of a DPU: a ring of eight entries at its start, anything behind it.
//! A byte picks what was negotiated; the rest is copied to address 0.

use std::sync::Arc;

use vring::memory::DpuMemory;
use vring::ring::{Kick, Ring, RingAddresses, RingConfig};

const MEMORY: usize = 64 << 10;
/// Entries of the ring.
const SIZE: u32 = 8;
const AVAILABLE: u64 = 128;
const USED: u64 = 256;
/// Rounds of the available ring: its index is fixed, so more only repeat.
const TAKEN: usize = 64;

/// Takes chains until the ring has no more, reads and fills each, gives it back. Gives
/// whether there was any.
pub fn check(data: &[u8]) -> bool {
    let Some((&options, contents)) = data.split_first() else { return false };
    let Ok(memory) = DpuMemory::anonymous(MEMORY) else { return false };
    let memory = Arc::new(memory);
    assert!(memory.write(0, &contents[..contents.len().min(MEMORY)]).is_ok());
    let Some(region) = memory.regions().next() else { return false };
    let base = region.region.user_addr;
    let addresses = RingAddresses { descriptors: base, available: base + AVAILABLE, used: base + USED };
    let config = RingConfig {
        index: 0,
        size: SIZE,
        addresses,
        base: 0,
        event_idx: options & 1 != 0,
        indirect: options & 2 != 0,
        kick: Kick::Poll,
        call: None,
        err: None,
    };
    let Ok(mut ring) = Ring::new(memory, config) else { return false };
    let mut held = Vec::new();
    let mut taken = false;
    let mut bytes = [0; 4096];
    for _ in 0..TAKEN {
        let Ok(Some(mut chain)) = ring.pop() else { break };
        taken = true;
        let readable = chain.readable_len().min(bytes.len());
        assert!(chain.copy_out(0, &mut bytes[..readable]).is_ok());
        assert!(chain.copy_out(chain.readable_len(), &mut [0]).is_err());
        let writable = chain.writable_len().min(16);
        assert!(chain.copy_in(chain.writable_len() - writable, &[0x5a; 16][..writable]).is_ok());
        assert!(chain.copy_in(chain.writable_len(), &[0]).is_err());
        // Every other one comes back late, or is dropped on the way.
        match options & 4 {
            0 => ring.push_used(chain, writable),
            _ => held.push(chain),
        }
        assert!(ring.in_flight() <= SIZE as usize);
    }
    if options & 8 == 0 {
        held.drain(..).for_each(|chain| ring.push_used(chain, 0));
    }
    drop(held);
    // A ring that works again collects what was dropped.
    let _ = ring.pop();
    ring.publish();
    ring.signal_if_needed();
    ring.arm_kick();
    taken
}
