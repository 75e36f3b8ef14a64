//! The DPU memory that a front end shared: mappings, address translation, dirty log.
//!
//! A [`DpuMemory`] is an immutable table of regions behind an `Arc`. When the front end adds or
//! removes a region, a new table is made that shares the unchanged [`Mapping`]s; chains that were
//! popped before keep the old table, and with it their memory, until they are done. So nothing on
//! the request path takes a lock, and a region that was removed stays mapped exactly as long as a
//! request still uses it.
//!
//! Two address spaces lead into a region: *DPU addresses* (physical addresses of the DPU, in
//! descriptors) and *user addresses* (where the front end itself sees the memory, in ring set-up
//! messages). Both come from the peer; every translation is checked for its whole length.
//!
//! Memory whose backing the front end truncates later is handled by [`crate::sigbus`].

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{FileType, MemfdFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::chain::Piece;
use crate::message::{LogArea, MAX_MEM_SLOTS, MemoryRegion};
use crate::sigbus;

/// `HUGETLBFS_MAGIC`, `TMPFS_MAGIC` (linux/magic.h).
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// Pages of the dirty log: `VHOST_LOG_PAGE`.
const LOG_PAGE_SHIFT: u32 = 12;

/// What to change when the memory of a DPU cannot be shared.
const SHARE_ADVICE: &str = "the front end must share its memory: QEMU needs \
    `-object memory-backend-memfd,id=mem,share=on,size=... -machine memory-backend=mem`, libvirt \
    `<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>`";

/// Why a region cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Size 0, or the end of the region does not fit 64 bits.
    #[error("memory region at DPU address {:#x}: size {:#x} or offset {:#x} is not possible", .0.dpu_addr, .0.size, .0.mmap_offset)]
    BadRange(MemoryRegion),
    /// Two regions claim the same DPU address.
    #[error("memory region at DPU address {:#x} of {:#x} bytes overlaps another one", .0.dpu_addr, .0.size)]
    Overlap(MemoryRegion),
    /// More regions than slots.
    #[error("more than {MAX_MEM_SLOTS} memory regions")]
    TooMany,
    /// No region of this place and size exists.
    #[error("no memory region at DPU address {:#x} with size {:#x} to remove", .0.dpu_addr, .0.size)]
    NoSuchRegion(MemoryRegion),
    /// The descriptor is a socket, device or the like.
    #[error(
        "memory region at DPU address {addr:#x}: its descriptor is a {kind}, not a memory file; {SHARE_ADVICE}"
    )]
    NotMemory {
        /// Region.
        addr: u64,
        /// What it is.
        kind: &'static str,
    },
    /// The file ends before the region does.
    #[error(
        "memory region at DPU address {addr:#x}: needs {needed:#x} bytes of its file, which has {size:#x}"
    )]
    FileTooSmall {
        /// Region.
        addr: u64,
        /// End of the region in the file.
        needed: u64,
        /// Size of the file.
        size: u64,
    },
    /// The file cannot be mapped shared and writable.
    #[error(
        "memory region at DPU address {addr:#x}: cannot map its file shared and writable ({source}); {SHARE_ADVICE}"
    )]
    Map {
        /// Region.
        addr: u64,
        /// Cause.
        source: io::Error,
    },
    /// The device cannot work in it.
    #[error("memory region at DPU address {addr:#x}: {why}")]
    Unfit {
        /// Region.
        addr: u64,
        /// Why, and what to change.
        why: String,
    },
    /// Every place for guarded mappings is taken.
    #[error(transparent)]
    Registry(#[from] sigbus::RegistryFull),
    /// An event descriptor or memory file could not be made.
    #[error("cannot prepare DPU memory: {0}")]
    Io(#[from] io::Error),
}

/// What kind of file backs a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// memfd or tmpfs file with ordinary pages.
    Shmem,
    /// Hugepages (hugetlbfs file or memfd with `MFD_HUGETLB`).
    Hugetlb,
    /// A file on another file system.
    File,
}

/// Facts about one region, for logs and checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// The region as the front end described it.
    pub region: MemoryRegion,
    /// What backs it.
    pub backing: Backing,
    /// Bytes of a page of the backing file.
    pub page_size: u64,
    /// Where this process sees the first byte.
    pub host_addr: usize,
}

/// A shared, writable mapping of a part of a file; unmapped on drop.
#[derive(Debug)]
pub struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// Taken before the memory goes.
    guard: Option<sigbus::Guard>,
}

// SAFETY: the mapping is plain memory shared with another process; it is only accessed through raw
// copies and atomics, and the base and length never change.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `offset..offset + size` of `fd`. Returns the mapping, which starts on a page boundary,
    /// and the distance of `offset` from its start.
    fn new(
        fd: BorrowedFd<'_>,
        offset: u64,
        size: u64,
        page_size: u64,
        lost: &Arc<OwnedFd>,
    ) -> Result<(Mapping, usize), MapError> {
        let overflow = || io::Error::from(io::ErrorKind::InvalidInput);
        let lead = offset & (page_size - 1);
        let len = size
            .checked_add(lead)
            .and_then(|len| len.checked_next_multiple_of(page_size))
            .and_then(|len| usize::try_from(len).ok())
            .ok_or_else(overflow)?;
        // SAFETY: a fresh mapping at an address the kernel chooses; nothing of ours is replaced.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                fd,
                offset - lead,
            )
        }
        .map_err(io::Error::from)?;
        let base = NonNull::new(base.cast::<u8>()).ok_or_else(overflow)?;
        let mut mapping = Mapping { base, len, guard: None };
        let start = base.as_ptr() as usize;
        mapping.guard = Some(sigbus::register(start, len, page_size as usize, Arc::clone(lost))?);
        Ok((mapping, lead as usize))
    }

    fn is_lost(&self) -> bool {
        self.guard.as_ref().is_some_and(sigbus::Guard::is_lost)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        self.guard = None;
        // SAFETY: this mapping was made in `new` and nothing points into it any more: every user
        // holds the `Arc` around it.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

enum MapError {
    Io(io::Error),
    Registry(sigbus::RegistryFull),
}

impl From<io::Error> for MapError {
    fn from(error: io::Error) -> Self {
        MapError::Io(error)
    }
}

impl From<sigbus::RegistryFull> for MapError {
    fn from(error: sigbus::RegistryFull) -> Self {
        MapError::Registry(error)
    }
}

impl MapError {
    fn at(self, addr: u64) -> MemoryError {
        match self {
            MapError::Io(source) => MemoryError::Map { addr, source },
            MapError::Registry(full) => MemoryError::Registry(full),
        }
    }
}

#[derive(Clone, Debug)]
struct Region {
    info: RegionInfo,
    /// First byte of the region (not of the mapping).
    host: NonNull<u8>,
    mapping: Arc<Mapping>,
}

// SAFETY: `host` points into `mapping`, which is Send and Sync and kept alive by the `Arc`.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    fn map(region: MemoryRegion, fd: BorrowedFd<'_>, lost: &Arc<OwnedFd>) -> Result<Region, MemoryError> {
        let addr = region.dpu_addr;
        let end = region.mmap_offset.checked_add(region.size);
        let fits = region.dpu_addr.checked_add(region.size).is_some()
            && region.user_addr.checked_add(region.size).is_some()
            && i64::try_from(end.unwrap_or(u64::MAX)).is_ok();
        let (Some(end), true, true) = (end, fits, region.size > 0) else {
            return Err(MemoryError::BadRange(region));
        };
        let stat = rustix::fs::fstat(fd).map_err(io::Error::from)?;
        if let Some(kind) = not_memory(FileType::from_raw_mode(stat.st_mode)) {
            return Err(MemoryError::NotMemory { addr, kind });
        }
        if (stat.st_size as u64) < end {
            return Err(MemoryError::FileTooSmall { addr, needed: end, size: stat.st_size as u64 });
        }
        let (backing, page_size) = backing_of(fd)?;
        let (mapping, lead) = Mapping::new(fd, region.mmap_offset, region.size, page_size, lost)
            .map_err(|error| error.at(addr))?;
        // SAFETY: `lead` is below the page size and the mapping is at least `lead + size` long.
        let host = unsafe { mapping.base.add(lead) };
        let info = RegionInfo { region, backing, page_size, host_addr: host.as_ptr() as usize };
        Ok(Region { info, host, mapping: Arc::new(mapping) })
    }

    fn dpu_addr(&self) -> u64 {
        self.info.region.dpu_addr
    }

    fn size(&self) -> u64 {
        self.info.region.size
    }

    /// Offset of a DPU address in this region.
    fn offset_of(&self, dpu_addr: u64) -> Option<u64> {
        let offset = dpu_addr.checked_sub(self.dpu_addr())?;
        (offset < self.size()).then_some(offset)
    }

    /// The piece of `len` bytes at `offset`, both inside the region.
    fn piece(&self, offset: u64, len: u64) -> Piece {
        debug_assert!(offset + len <= self.size());
        // SAFETY: the caller checked that `offset` lies inside the region, which is mapped.
        let addr = unsafe { self.host.as_ptr().add(offset as usize) };
        Piece { addr, len: len as usize, dpu_addr: self.dpu_addr() + offset }
    }
}

fn not_memory(kind: FileType) -> Option<&'static str> {
    match kind {
        FileType::RegularFile => None,
        FileType::Directory => Some("directory"),
        FileType::CharacterDevice => Some("character device"),
        FileType::BlockDevice => Some("block device"),
        FileType::Fifo => Some("pipe"),
        FileType::Socket => Some("socket"),
        // Anonymous inodes (eventfd, epoll) have no type at all.
        _ => Some("descriptor without a file"),
    }
}

fn backing_of(fd: BorrowedFd<'_>) -> io::Result<(Backing, u64)> {
    let statfs = rustix::fs::fstatfs(fd)?;
    let small = rustix::param::page_size() as u64;
    let page_size = statfs.f_bsize as u64;
    Ok(match statfs.f_type as u64 {
        HUGETLBFS_MAGIC if page_size.is_power_of_two() && page_size >= small => (Backing::Hugetlb, page_size),
        TMPFS_MAGIC => (Backing::Shmem, small),
        _ => (Backing::File, small),
    })
}

/// A DPU address range does not lie in shared memory as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("DPU address range {addr:#x} + {len:#x} is not shared memory")]
pub struct NotShared {
    /// First DPU address.
    pub addr: u64,
    /// Bytes.
    pub len: u64,
}

/// The memory table of one front end. Immutable: a change of regions makes a new table.
#[derive(Debug)]
pub struct DpuMemory {
    /// Sorted by DPU address, not overlapping.
    regions: Vec<Region>,
    /// Written when memory is lost; shared by all tables of a front end.
    lost: Arc<OwnedFd>,
}

impl DpuMemory {
    /// A table without regions.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn empty() -> Result<DpuMemory, MemoryError> {
        let lost = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?;
        Ok(DpuMemory { regions: Vec::new(), lost: Arc::new(lost) })
    }

    /// A table of exactly these regions (`VHOST_USER_SET_MEM_TABLE`).
    ///
    /// # Errors
    /// [`MemoryError`]; nothing stays mapped then.
    pub fn with_regions<'a>(
        &self,
        regions: impl IntoIterator<Item = (MemoryRegion, BorrowedFd<'a>)>,
    ) -> Result<DpuMemory, MemoryError> {
        let mut table = DpuMemory { regions: Vec::new(), lost: Arc::clone(&self.lost) };
        for (region, fd) in regions {
            table.insert(region, fd)?;
        }
        Ok(table)
    }

    /// This table and one more region (`VHOST_USER_ADD_MEM_REG`).
    ///
    /// # Errors
    /// [`MemoryError`]; this table is unchanged then.
    pub fn with_region(&self, region: MemoryRegion, fd: BorrowedFd<'_>) -> Result<DpuMemory, MemoryError> {
        let mut table = DpuMemory { regions: self.regions.clone(), lost: Arc::clone(&self.lost) };
        table.insert(region, fd)?;
        Ok(table)
    }

    /// This table without a region (`VHOST_USER_REM_MEM_REG`): same DPU address, user address, size.
    ///
    /// # Errors
    /// [`MemoryError::NoSuchRegion`].
    pub fn without_region(&self, region: MemoryRegion) -> Result<DpuMemory, MemoryError> {
        let same = |other: &Region| {
            let other = other.info.region;
            (other.dpu_addr, other.user_addr, other.size) == (region.dpu_addr, region.user_addr, region.size)
        };
        let regions: Vec<Region> = self.regions.iter().filter(|other| !same(other)).cloned().collect();
        if regions.len() == self.regions.len() {
            return Err(MemoryError::NoSuchRegion(region));
        }
        Ok(DpuMemory { regions, lost: Arc::clone(&self.lost) })
    }

    /// A table of one region of `size` bytes of fresh memory at DPU address 0; its user addresses are
    /// this process's own. For tests and for rings that this process drives itself.
    ///
    /// # Errors
    /// [`MemoryError`] when the memory cannot be had.
    pub fn anonymous(size: usize) -> Result<DpuMemory, MemoryError> {
        let fd = rustix::fs::memfd_create(c"dpu-memory", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
        rustix::fs::ftruncate(&fd, size as u64).map_err(io::Error::from)?;
        let empty = DpuMemory::empty()?;
        let region = MemoryRegion { dpu_addr: 0, size: size as u64, user_addr: 0, mmap_offset: 0 };
        let mut table = empty.with_region(region, fd.as_fd())?;
        for region in &mut table.regions {
            region.info.region.user_addr = region.info.host_addr as u64;
        }
        Ok(table)
    }

    fn insert(&mut self, region: MemoryRegion, fd: BorrowedFd<'_>) -> Result<(), MemoryError> {
        if self.regions.len() >= MAX_MEM_SLOTS {
            return Err(MemoryError::TooMany);
        }
        let end = region.dpu_addr.checked_add(region.size).ok_or(MemoryError::BadRange(region))?;
        let at = self.regions.partition_point(|other| other.dpu_addr() < region.dpu_addr);
        let hits_next = self.regions.get(at).is_some_and(|next| next.dpu_addr() < end);
        let hits_previous = at
            .checked_sub(1)
            .and_then(|previous| self.regions.get(previous))
            .is_some_and(|previous| previous.offset_of(region.dpu_addr).is_some());
        if hits_next || hits_previous {
            return Err(MemoryError::Overlap(region));
        }
        let mapped = Region::map(region, fd, &self.lost)?;
        self.regions.insert(at, mapped);
        Ok(())
    }

    /// Facts about each region, in DPU address order.
    pub fn regions(&self) -> impl Iterator<Item = RegionInfo> + '_ {
        self.regions.iter().map(|region| region.info)
    }

    /// Becomes readable when a page of any region was lost; stays so.
    pub fn lost_event(&self) -> BorrowedFd<'_> {
        self.lost.as_fd()
    }

    /// Whether a page of a region of this table was lost: the front end took the memory away.
    pub fn is_lost(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_lost())
    }

    /// Translates a DPU address range, calling `push` for each contiguous piece. Regions that adjoin
    /// in DPU addresses may be spanned. `hint` remembers the region of the last hit.
    #[inline]
    pub(crate) fn translate(
        &self,
        addr: u64,
        len: u64,
        hint: &mut usize,
        mut push: impl FnMut(Piece),
    ) -> Result<(), NotShared> {
        if let Some(region) = self.regions.get(*hint)
            && let Some(offset) = region.offset_of(addr)
            && len <= region.size() - offset
        {
            push(region.piece(offset, len));
            return Ok(());
        }
        self.translate_slowly(addr, len, hint, push)
    }

    fn translate_slowly(
        &self,
        addr: u64,
        len: u64,
        hint: &mut usize,
        mut push: impl FnMut(Piece),
    ) -> Result<(), NotShared> {
        let outside = NotShared { addr, len };
        let (mut addr, mut left) = (addr, len);
        while left > 0 {
            let after = self.regions.partition_point(|region| region.dpu_addr() <= addr);
            let index = after.checked_sub(1).ok_or(outside)?;
            let region = self.regions.get(index).ok_or(outside)?;
            let offset = region.offset_of(addr).ok_or(outside)?;
            let here = left.min(region.size() - offset);
            push(region.piece(offset, here));
            *hint = index;
            left -= here;
            addr += here;
        }
        Ok(())
    }

    /// Where this process sees a range of the front end's own addresses, which must lie inside one
    /// region. Also returns the DPU address.
    pub(crate) fn user_range(&self, user_addr: u64, len: u64) -> Option<Piece> {
        self.regions.iter().find_map(|region| {
            let offset = user_addr.checked_sub(region.info.region.user_addr)?;
            let fits = offset < region.size() && len <= region.size() - offset;
            fits.then(|| region.piece(offset, len))
        })
    }

    /// Copies bytes to DPU memory: the part of a DPU in tests.
    ///
    /// # Errors
    /// [`NotShared`]; some bytes may have been copied then.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), NotShared> {
        let mut done = 0;
        self.translate(addr, bytes.len() as u64, &mut 0, |piece| {
            // SAFETY: the piece is mapped and writable; `bytes` has its length left from `done` on.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(done), piece.addr, piece.len) };
            done += piece.len;
        })
    }

    /// Copies bytes from DPU memory: the part of a DPU in tests.
    ///
    /// # Errors
    /// [`NotShared`]; some bytes may have been copied then.
    pub fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), NotShared> {
        let mut done = 0;
        self.translate(addr, bytes.len() as u64, &mut 0, |piece| {
            // SAFETY: the piece is mapped and readable; `bytes` has its length left from `done` on.
            unsafe { std::ptr::copy_nonoverlapping(piece.addr, bytes.as_mut_ptr().add(done), piece.len) };
            done += piece.len;
        })
    }
}

/// Log of the DPU pages that this device wrote, one bit per 4 KiB, shared with the front end for
/// live migration (`VHOST_USER_SET_LOG_BASE`).
#[derive(Debug)]
pub struct DirtyLog {
    mapping: Mapping,
    /// Offset of the log in the mapping.
    lead: usize,
    /// Bytes of the log.
    size: u64,
}

impl DirtyLog {
    /// Maps the log.
    ///
    /// # Errors
    /// [`MemoryError`] when size and offset do not fit the file, or it cannot be mapped.
    pub fn map(area: LogArea, fd: BorrowedFd<'_>, memory: &DpuMemory) -> Result<DirtyLog, MemoryError> {
        let region = MemoryRegion { size: area.size, mmap_offset: area.offset, ..MemoryRegion::default() };
        let end = area.offset.checked_add(area.size).filter(|end| i64::try_from(*end).is_ok());
        let (Some(end), true) = (end, area.size > 0) else { return Err(MemoryError::BadRange(region)) };
        let stat = rustix::fs::fstat(fd).map_err(io::Error::from)?;
        if let Some(kind) = not_memory(FileType::from_raw_mode(stat.st_mode)) {
            return Err(MemoryError::NotMemory { addr: 0, kind });
        }
        if (stat.st_size as u64) < end {
            return Err(MemoryError::FileTooSmall { addr: 0, needed: end, size: stat.st_size as u64 });
        }
        let (_, page_size) = backing_of(fd)?;
        let (mapping, lead) =
            Mapping::new(fd, area.offset, area.size, page_size, &memory.lost).map_err(|error| error.at(0))?;
        Ok(DirtyLog { mapping, lead, size: area.size })
    }

    /// Marks every page that `addr..addr + len` touches. Pages beyond the log are left out.
    pub fn mark(&self, addr: u64, len: u64) {
        if len == 0 {
            return;
        }
        let first = addr >> LOG_PAGE_SHIFT;
        let last = addr.saturating_add(len - 1) >> LOG_PAGE_SHIFT;
        let end = last.min(self.size.saturating_mul(8).saturating_sub(1));
        for page in first..=end {
            let byte = (page / 8) as usize;
            // SAFETY: `page < size * 8`, so `byte < size`, and the mapping holds `lead + size` bytes.
            let cell = unsafe { AtomicU8::from_ptr(self.mapping.base.as_ptr().add(self.lead + byte)) };
            cell.fetch_or(1 << (page % 8), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
