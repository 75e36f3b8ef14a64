//! DPU memory: shared regions at DPU-physical addresses, with an allocator inside each.
//!
//! A region is one memfd (4 KiB pages or 2 MiB hugepages) mapped shared, so that the daemon can map the same pages
//! after it got the descriptor over the vhost-user socket. The other side may write at any moment: no Rust reference
//! to the bytes is ever made; data goes in and out by copy or through atomics.
//!
//! The allocator hands out power-of-two blocks (64 bytes to 4 MiB), aligned to their size up to a page, from a bump
//! pointer and per-size free lists (last in, first out). That is what the DPU kernel's slab does closely enough: small
//! objects share pages, page buffers are whole pages.

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::MemfdFlags;
use rustix::mm::{MapFlags, ProtFlags};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::{Error, Result};

/// Page size of the DPU, and size of one page buffer.
pub const PAGE: usize = 4096;

/// Size of the hugepages used by [`Backing::Hugetlb2M`].
pub const HUGEPAGE: usize = 2 << 20;

/// DPU-physical address of the first region. Not 0, so that a forgotten address is an invalid one.
const FIRST_REGION: u64 = 0x4000_0000;

/// Distance between the starts of regions; the space behind a smaller region is a hole.
const REGION_STRIDE: u64 = 0x1_0000_0000;

/// Smallest block handed out.
const MIN_BLOCK: usize = 64;

/// What the pages of a region are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Pages of a plain memfd.
    Memfd,
    /// Hugepages of 2 MiB from the system's pool.
    Hugetlb2M,
}

/// One region of DPU memory.
#[derive(Debug)]
pub struct Region {
    base: NonNull<u8>,
    len: usize,
    gpa: u64,
    fd: OwnedFd,
    backing: Backing,
    free: Mutex<FreeBlocks>,
}

// SAFETY: the mapping is owned by the region until drop and is only accessed by raw copies and atomics, which are
// meaningful from any thread (torn data is possible and is what shared memory with a foreign process means).
unsafe impl Send for Region {}
// SAFETY: as above; the free lists are behind a mutex.
unsafe impl Sync for Region {}

#[derive(Debug, Default)]
struct FreeBlocks {
    /// First byte never handed out.
    bump: usize,
    /// Free offsets by log2 of the block size.
    lists: [Vec<usize>; 32],
}

impl Region {
    fn new(gpa: u64, len: usize, backing: Backing) -> Result<Arc<Self>> {
        let granule = match backing {
            Backing::Memfd => PAGE,
            Backing::Hugetlb2M => HUGEPAGE,
        };
        let len = len.max(1).next_multiple_of(granule);
        let flags = match backing {
            Backing::Memfd => MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
            Backing::Hugetlb2M => MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        };
        let no_pages = || Error::NoHugepages { pages: len / HUGEPAGE };
        let fd = rustix::fs::memfd_create("dpu-memory", flags)
            .map_err(|e| Error::os("create a memfd for DPU memory", e))?;
        rustix::fs::ftruncate(&fd, len as u64).map_err(|e| Error::os("size the DPU memory", e))?;
        // SAFETY: a fresh shared mapping at an address the kernel chooses; nothing existing is replaced.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &fd,
                0,
            )
        }
        .map_err(|e| match (backing, e) {
            (Backing::Hugetlb2M, rustix::io::Errno::NOMEM) => no_pages(),
            (_, e) => Error::os("map the DPU memory", e),
        })?;
        let base = NonNull::new(base.cast::<u8>())
            .ok_or_else(|| Error::os("map the DPU memory", rustix::io::Errno::FAULT))?;
        Ok(Arc::new(Region { base, len, gpa, fd, backing, free: Mutex::default() }))
    }

    /// DPU-physical address of the first byte.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Size in bytes.
    pub fn size(&self) -> usize {
        self.len
    }

    /// Address of the mapping in this process: what a VMM sends as user address.
    pub fn user_address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    /// Kind of pages.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The file behind the region.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn allocate(self: &Arc<Self>, len: usize) -> Option<DpuBuffer> {
        let block = block_size(len);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = match free.lists[block.trailing_zeros() as usize].pop() {
            Some(offset) => offset,
            None => {
                let offset = free.bump.next_multiple_of(block.min(PAGE));
                let end = offset.checked_add(block).filter(|end| *end <= self.len)?;
                free.bump = end;
                offset
            }
        };
        Some(DpuBuffer { region: Arc::clone(self), offset, len })
    }

    /// Pointer to `len` bytes at `offset`, checked.
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset:#x} leave the region of {:#x} bytes",
            self.len
        );
        // SAFETY: offset is within the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset) }
    }

    fn copy_in(&self, offset: usize, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: `at` checked the destination; source and mapping cannot overlap (no reference into it exists).
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    fn copy_out(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.at(offset, bytes.len());
        // SAFETY: `at` checked the source; the destination is a distinct Rust slice.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: base and len are those of the mapping made in `new`; buffers hold an Arc, so none is left.
        // A failure would leak the mapping, nothing more.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

/// Block that holds `len` bytes.
fn block_size(len: usize) -> usize {
    len.max(MIN_BLOCK).next_power_of_two()
}

/// The DPU's memory: regions that can be added and removed while it is in use.
#[derive(Debug)]
pub struct DpuMemory {
    regions: RwLock<Vec<Arc<Region>>>,
}

impl DpuMemory {
    /// Memory of one region of `len` bytes (rounded up to whole pages).
    pub fn new(len: usize, backing: Backing) -> Result<Arc<Self>> {
        let memory = DpuMemory { regions: RwLock::default() };
        memory.plug(len, backing)?;
        Ok(Arc::new(memory))
    }

    /// Adds a region behind the others. The daemon learns of it by [`crate::frontend::Frontend::add_mem_region`] or
    /// by a new memory table.
    pub fn plug(&self, len: usize, backing: Backing) -> Result<Arc<Region>> {
        let mut regions = self.regions.write().unwrap_or_else(PoisonError::into_inner);
        let gpa = regions.last().map_or(FIRST_REGION, |last| last.gpa + REGION_STRIDE);
        let region = Region::new(gpa, len, backing)?;
        regions.push(Arc::clone(&region));
        Ok(region)
    }

    /// Takes a region out of the table. Its pages live on until the last buffer in it is gone.
    pub fn unplug(&self, region: &Arc<Region>) {
        self.regions
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|candidate| !Arc::ptr_eq(candidate, region));
    }

    /// The regions, lowest address first.
    pub fn regions(&self) -> Vec<Arc<Region>> {
        self.regions.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A buffer of `len` bytes from the first region with room. Its content is whatever was there before.
    pub fn allocate(&self, len: usize) -> Result<DpuBuffer> {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions.iter().find_map(|region| region.allocate(len)).ok_or(Error::MemoryFull { len })
    }

    /// A buffer from one given region.
    pub fn allocate_in(&self, region: &Arc<Region>, len: usize) -> Result<DpuBuffer> {
        region.allocate(len).ok_or(Error::MemoryFull { len })
    }

    /// An address that lies in no region.
    pub fn hole(&self) -> u64 {
        let regions = self.regions.read().unwrap_or_else(PoisonError::into_inner);
        regions.last().map_or(FIRST_REGION, |last| last.gpa + last.len as u64 + 16 * PAGE as u64)
    }
}

/// A block of DPU memory; goes back to its region on drop.
#[derive(Debug)]
pub struct DpuBuffer {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl DpuBuffer {
    /// DPU-physical address.
    pub fn gpa(&self) -> u64 {
        self.region.gpa + self.offset as u64
    }

    /// Address in this process, as vhost-user wants ring addresses.
    pub fn user_address(&self) -> u64 {
        self.region.user_address() + self.offset as u64
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the buffer has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn check(&self, offset: usize, len: usize) -> usize {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} leave the buffer of {} bytes",
            self.len
        );
        self.offset + offset
    }

    /// Copies `bytes` to `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        self.region.copy_in(self.check(offset, bytes.len()), bytes);
    }

    /// Copies from `offset` into `bytes`.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        self.region.copy_out(self.check(offset, bytes.len()), bytes);
    }

    /// `len` bytes at `offset`, as a vector.
    pub fn to_vec(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes);
        bytes
    }

    /// Sets every byte to `value`.
    pub fn fill(&self, value: u8) {
        let to = self.region.at(self.offset, self.len);
        // SAFETY: `at` checked that the whole buffer is inside the mapping.
        unsafe { std::ptr::write_bytes(to, value, self.len) }
    }

    /// Stores a structure at `offset`.
    pub fn put<T: IntoBytes + Immutable>(&self, offset: usize, value: &T) {
        self.write(offset, value.as_bytes());
    }

    /// Loads a structure from `offset`.
    pub fn get<T: FromBytes + IntoBytes>(&self, offset: usize) -> T {
        let mut value = T::new_zeroed();
        self.read(offset, value.as_mut_bytes());
        value
    }

    /// `pread` of up to `len` bytes of a file straight into the buffer, as a daemon does it. Returns the bytes read.
    pub fn read_from_file(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> Result<usize> {
        let to = self.region.at(self.check(0, len), len);
        // SAFETY: `at` checked the destination; the kernel writes at most `len` bytes there.
        let read = unsafe { libc::pread(file.as_raw_fd(), to.cast(), len, offset as libc::off_t) };
        usize::try_from(read).map_err(|_| Error::os("read a file", std::io::Error::last_os_error()))
    }

    /// `pwrite` of the first `len` bytes of the buffer, as a daemon does it. Returns the bytes written.
    pub fn write_to_file(&self, file: BorrowedFd<'_>, offset: u64, len: usize) -> Result<usize> {
        let from = self.region.at(self.check(0, len), len);
        // SAFETY: `at` checked the source; the kernel only reads it.
        let written = unsafe { libc::pwrite(file.as_raw_fd(), from.cast(), len, offset as libc::off_t) };
        usize::try_from(written).map_err(|_| Error::os("write a file", std::io::Error::last_os_error()))
    }

    fn atomic<T>(&self, offset: usize) -> *mut T {
        let pointer = self.region.at(self.check(offset, size_of::<T>()), size_of::<T>()).cast::<T>();
        assert!(pointer.is_aligned(), "offset {offset} is not aligned for an atomic access");
        pointer
    }

    /// Stores a 16-bit field that the device reads concurrently.
    pub fn store_u16(&self, offset: usize, value: u16, order: Ordering) {
        // SAFETY: in bounds, aligned, alive as long as self; both sides access it atomically.
        unsafe { AtomicU16::from_ptr(self.atomic(offset)) }.store(value, order);
    }

    /// Loads a 16-bit field that the device writes concurrently.
    pub fn load_u16(&self, offset: usize, order: Ordering) -> u16 {
        // SAFETY: in bounds, aligned, alive as long as self; both sides access it atomically.
        unsafe { AtomicU16::from_ptr(self.atomic(offset)) }.load(order)
    }

    /// Loads a 32-bit field that the device writes concurrently.
    pub fn load_u32(&self, offset: usize, order: Ordering) -> u32 {
        // SAFETY: in bounds, aligned, alive as long as self; both sides access it atomically.
        unsafe { AtomicU32::from_ptr(self.atomic(offset)) }.load(order)
    }

    /// Stores a 64-bit field that the device reads concurrently.
    pub fn store_u64(&self, offset: usize, value: u64, order: Ordering) {
        // SAFETY: in bounds, aligned, alive as long as self; both sides access it atomically.
        unsafe { AtomicU64::from_ptr(self.atomic(offset)) }.store(value, order);
    }
}

impl Drop for DpuBuffer {
    fn drop(&mut self) {
        let list = block_size(self.len).trailing_zeros() as usize;
        let mut free = self.region.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.lists[list].push(self.offset);
    }
}

/// Keeps hugepages reserved for as long as it lives, and gives back what it took from the system.
///
/// The pool is system-wide: pages that were free before are used first, and on drop the pool shrinks by exactly the
/// number of pages this reservation added.
#[derive(Debug)]
pub struct HugepageReservation {
    added: usize,
}

static POOL: Mutex<()> = Mutex::new(());
const POOL_SIZE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const POOL_FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
const POOL_PROMISED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages";

impl HugepageReservation {
    /// Makes sure that `bytes` of free 2 MiB hugepages exist, or says why not.
    pub fn new(bytes: NonZeroUsize) -> Result<Self> {
        let pages = bytes.get().div_ceil(HUGEPAGE);
        let pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        let free = read_count(POOL_FREE)?.saturating_sub(read_count(POOL_PROMISED)?);
        let missing = pages.saturating_sub(free);
        let before = read_count(POOL_SIZE)?;
        if missing > 0 {
            write_count(before + missing)?;
        }
        let got = read_count(POOL_SIZE)?;
        let reservation = HugepageReservation { added: got.saturating_sub(before).min(missing) };
        drop(pool); // An early return drops the reservation, which takes the lock.
        if got < before + missing {
            return Err(Error::NoHugepages { pages });
        }
        Ok(reservation)
    }
}

impl Drop for HugepageReservation {
    fn drop(&mut self) {
        if self.added == 0 {
            return;
        }
        let _pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(now) = read_count(POOL_SIZE) {
            let _ = write_count(now.saturating_sub(self.added));
        }
    }
}

fn read_count(path: &str) -> Result<usize> {
    let text = std::fs::read_to_string(path).map_err(|e| Error::os(format!("read {path}"), e))?;
    text.trim().parse().map_err(|e| Error::os(format!("read {path}"), std::io::Error::other(e)))
}

fn write_count(pages: usize) -> Result<()> {
    std::fs::write(POOL_SIZE, pages.to_string())
        .map_err(|e| Error::os(format!("write {POOL_SIZE} (reserving hugepages needs root)"), e))
}
