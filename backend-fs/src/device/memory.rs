//! What kind of memory the front end shared: checked before it is mapped, told in one line of the log.
#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;

use hugepages::probe::{MemoryKind, Placement, Region, probe_region};
use vring::memory::DpuMemory;
use vring::message::MemoryRegion;

/// The kinds of the regions of the current memory table, by DPU address.
#[derive(Debug, Default)]
pub(super) struct SharedMemory {
    kinds: Vec<(u64, MemoryKind)>,
    told: String,
}

impl SharedMemory {
    /// Looks at a region that is about to be mapped.
    ///
    /// The front end's own mapping is not looked at: in the sandbox's pid namespace its process cannot be
    /// seen. `dpu-hugepages doctor` does that from outside.
    ///
    /// # Errors
    /// It is not shared memory; the text says what to change in QEMU or libvirt.
    pub(super) fn check(&mut self, region: &MemoryRegion, fd: BorrowedFd<'_>) -> Result<(), String> {
        let asked = Region { fd, offset: region.mmap_offset, size: region.size, front_end: None };
        let kind = probe_region(asked).map_err(|error| error.to_string())?;
        self.kinds.retain(|(addr, _)| *addr != region.dpu_addr);
        self.kinds.push((region.dpu_addr, kind));
        Ok(())
    }

    /// Logs the table that is in force now, unless it reads as the last one did.
    pub(super) fn log(&mut self, memory: &DpuMemory) {
        let live: Vec<u64> = memory.regions().map(|info| info.region.dpu_addr).collect();
        self.kinds.retain(|(addr, _)| live.contains(addr));
        let Some(kind) = self.whole() else { return };
        let line = kind.to_string();
        if line == self.told {
            return;
        }
        if kind.is_risky() {
            tracing::warn!("{line}");
        } else {
            tracing::info!("{line}");
        }
        self.told = line;
    }

    /// The regions as one: QEMU cuts the DPU's memory at holes of its address space. What differs between
    /// them is told of the largest; sizes and nodes are those of all.
    fn whole(&self) -> Option<MemoryKind> {
        let kinds = || self.kinds.iter().map(|(_, kind)| kind);
        let mut whole = kinds().max_by_key(|kind| kind.size)?.clone();
        whole.size = kinds().map(|kind| kind.size).sum();
        let mut nodes: Vec<u32> = kinds()
            .flat_map(|kind| match &kind.placement {
                Placement::Nodes(nodes) => nodes.clone(),
                Placement::Unknown => Vec::new(),
            })
            .collect();
        nodes.sort_unstable();
        nodes.dedup();
        whole.placement = if nodes.is_empty() { Placement::Unknown } else { Placement::Nodes(nodes) };
        Some(whole)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::MemfdFlags;

    use super::*;

    fn region(dpu_addr: u64, mmap_offset: u64, size: u64) -> MemoryRegion {
        MemoryRegion { dpu_addr, size, user_addr: 0x1000_0000 + dpu_addr, mmap_offset }
    }

    #[test]
    fn regions_of_one_file_are_told_as_one() {
        let file = rustix::fs::memfd_create(c"ram", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8 << 20).unwrap();
        let mut memory = SharedMemory::default();
        memory.check(&region(0, 0, 2 << 20), file.as_fd()).unwrap();
        memory.check(&region(4 << 30, 2 << 20, 6 << 20), file.as_fd()).unwrap();
        let line = memory.whole().unwrap().to_string();
        assert!(line.starts_with("DPU memory: 8 MiB shared, memfd"), "{line}");
    }

    #[test]
    fn a_descriptor_without_memory_is_refused_with_what_to_change() {
        let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
        let refusal = SharedMemory::default().check(&region(0, 0, 4096), socket.as_fd()).unwrap_err();
        assert!(refusal.contains("a socket") && refusal.contains("share=on"), "{refusal}");
    }
}
