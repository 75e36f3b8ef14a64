//! Makes memory that can be shared with a DPU: a memfd, on hugepages if wanted, filled in advance, sealed.
//!
//! Filling in advance (`prefault`) is what makes hugepages safe: without it the pool may be empty when the DPU first
//! touches a page, and the process that touches it dies of SIGBUS. It is done with `MADV_POPULATE_WRITE`, which
//! reports the shortage instead, and falls back to `fallocate` on kernels before 5.14.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use crate::size::{Bytes, PageSize};
use crate::sys::Mapping;

/// What memory to make.
#[derive(Debug, Clone)]
pub struct Wish<'a> {
    /// Name, shown as `/memfd:NAME` in `/proc` and by `dpu-hugepages status`.
    pub name: &'a str,
    /// Bytes; a multiple of the page size.
    pub size: u64,
    /// Hugepages of this size, or base pages.
    pub huge: Option<PageSize>,
    /// Take every page now.
    pub prefault: bool,
    /// Take the pages from this node only. Needs `prefault`: the policy belongs to the mapping that fills the memory.
    pub node: Option<u32>,
    /// Nobody may resize it any more, so that no mapping of it can ever fault behind its end.
    pub seal: bool,
}

impl Default for Wish<'_> {
    fn default() -> Self {
        Wish { name: "dpu-memory", size: 0, huge: None, prefault: true, node: None, seal: true }
    }
}

/// Why memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The size does not fit the pages.
    #[error("{} is not a whole number of pages of {page}; use {}", Bytes(*size), Bytes(*next))]
    Misaligned {
        /// Bytes wished.
        size: u64,
        /// Page size in the short form.
        page: String,
        /// The next size that fits.
        next: u64,
    },
    /// A node without filling.
    #[error("memory can be bound to a node only while it is filled: ask for prefault as well")]
    NodeWithoutPrefault,
    /// The kernel has no such hugepages.
    #[error("the kernel has no hugepages of {page}: see `ls /sys/kernel/mm/hugepages`, and CONFIG_HUGETLBFS")]
    NoSuchPageSize {
        /// The page size.
        page: PageSize,
    },
    /// The pool is too small.
    #[error(
        "not enough free hugepages of {page} for {}{}: run `dpu-hugepages reserve --size {}{} --page-size {page}` \
         (or a hugetlb cgroup limit is in the way: `dpu-hugepages doctor`)",
        Bytes(*size), node.map_or(String::new(), |n| format!(" on node {n}")),
        crate::size::compact(*size), node.map_or(String::new(), |n| format!(" --node {n}"))
    )]
    PoolTooSmall {
        /// The page size.
        page: PageSize,
        /// Bytes wished.
        size: u64,
        /// The node, if one was wished.
        node: Option<u32>,
    },
    /// Anything else.
    #[error("cannot {what} {} of shared memory: {source}", Bytes(*size))]
    Io {
        /// What was tried.
        what: &'static str,
        /// Bytes wished.
        size: u64,
        /// What the system said.
        source: io::Error,
    },
}

/// Shared memory, alive as long as any process holds it.
#[derive(Debug)]
pub struct Backing {
    fd: OwnedFd,
    size: u64,
}

impl AsFd for Backing {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<Backing> for OwnedFd {
    fn from(backing: Backing) -> OwnedFd {
        backing.fd
    }
}

impl Backing {
    /// Makes the memory. On an error nothing is left behind.
    pub fn create(wish: &Wish<'_>) -> Result<Backing, BackingError> {
        let base = rustix::param::page_size() as u64;
        let page = wish.huge.map_or(base, PageSize::bytes);
        if wish.size == 0 || !wish.size.is_multiple_of(page) {
            let next = wish.size.max(1).checked_next_multiple_of(page).unwrap_or(page);
            return Err(BackingError::Misaligned { size: wish.size, page: crate::size::compact(page), next });
        }
        if wish.node.is_some() && !wish.prefault {
            return Err(BackingError::NodeWithoutPrefault);
        }
        let io = |what| move |source: io::Error| BackingError::Io { what, size: wish.size, source };
        let fd = match (rustix::fs::memfd_create(wish.name, flags(wish)), wish.huge) {
            (Ok(fd), _) => fd,
            (
                Err(rustix::io::Errno::NODEV | rustix::io::Errno::NOENT | rustix::io::Errno::INVAL),
                Some(page),
            ) => {
                return Err(BackingError::NoSuchPageSize { page });
            }
            (Err(e), _) => return Err(io("create")(e.into())),
        };
        rustix::fs::ftruncate(&fd, wish.size).map_err(|e| io("size")(e.into()))?;
        if wish.prefault {
            fill(fd.as_fd(), wish)?;
        }
        if wish.seal {
            let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
            rustix::fs::fcntl_add_seals(&fd, seals).map_err(|e| io("seal")(e.into()))?;
        }
        Ok(Backing { fd, size: wish.size })
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }
}

fn flags(wish: &Wish<'_>) -> MemfdFlags {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if let Some(page) = wish.huge {
        // linux/memfd.h: MFD_HUGE_SHIFT 26, above it log2 of the page size.
        flags |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(page.shift() << 26);
    }
    flags
}

fn fill(fd: BorrowedFd<'_>, wish: &Wish<'_>) -> Result<(), BackingError> {
    let failed = |what, source: io::Error| match (source.raw_os_error(), wish.huge) {
        // EFAULT and EHWPOISON stand for SIGBUS; ENOSPC is hugetlbfs's fallocate, ENOMEM the promise at mmap.
        (Some(libc::ENOMEM | libc::EFAULT | libc::ENOSPC), Some(page)) => {
            BackingError::PoolTooSmall { page, size: wish.size, node: wish.node }
        }
        _ => BackingError::Io { what, size: wish.size, source },
    };
    let length =
        usize::try_from(wish.size).map_err(|_| failed("map", io::Error::from_raw_os_error(libc::EFBIG)))?;
    let mapping = Mapping::shared(fd, 0, length, true).map_err(|e| failed("map", e))?;
    if let Some(node) = wish.node {
        mapping.bind(node).map_err(|e| failed("bind", e))?;
    }
    match mapping.populate(0, length, true) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) && wish.node.is_none() => {
            let all = rustix::fs::fallocate(fd, FallocateFlags::empty(), 0, wish.size);
            all.map_err(|e| failed("fill", e.into()))
        }
        done => done.map_err(|e| failed("fill", e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_memory_is_sealed_and_filled() {
        let backing = Backing::create(&Wish { size: 1 << 20, ..Wish::default() }).unwrap();
        assert_eq!(backing.size(), 1 << 20);
        let stat = rustix::fs::fstat(&backing).unwrap();
        assert_eq!((stat.st_size, stat.st_blocks * 512), (1 << 20, 1 << 20));
        assert!(rustix::fs::ftruncate(&backing, 0).is_err());
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_is_made() {
        let misaligned = Wish { size: 3 << 20, huge: Some(PageSize::M2), ..Wish::default() };
        let text = Backing::create(&misaligned).unwrap_err().to_string();
        assert_eq!(text, "3 MiB is not a whole number of pages of 2M; use 4 MiB");
        assert!(matches!(Backing::create(&Wish::default()), Err(BackingError::Misaligned { .. })));
        let no_prefault = Wish { size: 1 << 20, prefault: false, node: Some(0), ..Wish::default() };
        assert!(matches!(Backing::create(&no_prefault), Err(BackingError::NodeWithoutPrefault)));
    }

    #[test]
    fn an_unknown_page_size_is_named() {
        let page = PageSize::new(1 << 40).unwrap();
        let wish = Wish { size: 1 << 40, huge: Some(page), prefault: false, ..Wish::default() };
        let error = Backing::create(&wish).unwrap_err();
        assert!(matches!(error, BackingError::NoSuchPageSize { .. }), "{error}");
    }

    #[test]
    fn an_empty_pool_is_an_error_with_the_command_that_helps() {
        // More than any machine has, so that the state of the pool does not matter.
        let wish = Wish { size: 1 << 46, huge: Some(PageSize::M2), ..Wish::default() };
        let text = Backing::create(&wish).unwrap_err().to_string();
        assert!(text.contains("dpu-hugepages reserve --size 65536G --page-size 2M"), "{text}");
    }
}
