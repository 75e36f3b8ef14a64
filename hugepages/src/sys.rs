//! System calls that have no safe wrapper elsewhere: mappings of shared memory and their placement, names of users
//! and groups, the stop flag. The only file of this crate with `unsafe`.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

/// A mapping of a file, unmapped when dropped. Its memory is never turned into a reference: other processes change
/// it at will, and a file that shrinks would make any access fatal. Only the kernel is asked about it.
#[derive(Debug)]
pub struct Mapping {
    start: *mut c_void,
    length: usize,
}

// SAFETY: the address is only passed to system calls that take any address from any thread.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `length` bytes of a file, shared, readable and writable. With `reserve` unset a hugetlb file promises no
    /// pages for it.
    pub fn shared(fd: BorrowedFd<'_>, offset: u64, length: usize, reserve: bool) -> io::Result<Mapping> {
        let offset = i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EOVERFLOW))?;
        let flags = libc::MAP_SHARED | if reserve { 0 } else { libc::MAP_NORESERVE };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the kernel chooses the address, so that no existing mapping is touched.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, fd.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Mapping { start, length })
        }
    }

    /// Address of the byte at `offset`. Nothing may be read or written through it here.
    pub fn address(&self, offset: usize) -> usize {
        self.start as usize + offset.min(self.length)
    }

    /// Bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    fn within(&self, offset: usize, length: usize) -> io::Result<*mut c_void> {
        if offset.checked_add(length).is_none_or(|end| end > self.length) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        Ok(self.start.wrapping_byte_add(offset))
    }

    /// Makes every page of the range present, as a read or a write would, but with an error where that would be
    /// SIGBUS (`MADV_POPULATE_READ`, `MADV_POPULATE_WRITE`, Linux 5.14).
    pub fn populate(&self, offset: usize, length: usize, write: bool) -> io::Result<()> {
        let start = self.within(offset, length)?;
        let advice = if write { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        loop {
            // SAFETY: the range lies within this mapping, and populating changes no byte of it.
            if unsafe { libc::madvise(start, length, advice) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Lets pages that are made through this mapping come from one node only (`MPOL_BIND`).
    pub fn bind(&self, node: u32) -> io::Result<()> {
        const BITS: u32 = u64::BITS;
        let mut mask = vec![0u64; (node / BITS) as usize + 1];
        if let Some(word) = mask.last_mut() {
            *word = 1 << (node % BITS);
        }
        // The kernel reads `maxnode - 1` bits (mm/mempolicy.c, get_nodes).
        let bits = mask.len() * BITS as usize + 1;
        // SAFETY: the range is this mapping, the mask is `bits - 1` bits long, and nothing is moved.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.start,
                self.length,
                libc::MPOL_BIND,
                mask.as_ptr(),
                bits,
                0u32,
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Whether the base page at `offset` is in memory (`mincore`). Meaningful for tmpfs and memfd, not for hugetlb.
    pub fn is_resident(&self, offset: usize) -> io::Result<bool> {
        let base = rustix::param::page_size();
        let start = self.within(offset / base * base, 1)?;
        let mut state = 0u8;
        // SAFETY: one byte of the mapping is one page, for which the kernel writes one byte.
        if unsafe { libc::mincore(start, 1, &mut state) } == 0 {
            Ok(state & 1 == 1)
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `shared` and is unmapped only here; nobody holds a reference into it.
        let _ = unsafe { libc::munmap(self.start, self.length) };
    }
}

/// The NUMA node of the page at each address of this process, None where no page is mapped (`move_pages(2)` without
/// target nodes: it only asks, makes no page present, and takes any address).
pub fn nodes_of(addresses: &[usize]) -> io::Result<Vec<Option<u32>>> {
    let mut status: Vec<c_int> = vec![-libc::ENOENT; addresses.len()];
    // SAFETY: both arrays have the given length. With no target nodes the kernel moves nothing and writes `status`.
    let done = unsafe {
        let nodes = ptr::null::<c_int>();
        let pages = addresses.as_ptr().cast::<*const c_void>();
        libc::syscall(libc::SYS_move_pages, 0, addresses.len(), pages, nodes, status.as_mut_ptr(), 0)
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status.into_iter().map(|node| u32::try_from(node).ok()).collect())
}

/// Calls `work` while this thread may take memory from one node only (`set_mempolicy(2)`, `MPOL_BIND`), and puts the
/// thread's policy back afterwards.
pub fn bound_to_node<T>(node: u32, work: impl FnOnce() -> T) -> io::Result<T> {
    // MAX_NUMNODES is at most 1024 (CONFIG_NODES_SHIFT); get_mempolicy refuses a mask that is shorter.
    const WORDS: usize = 1024 / u64::BITS as usize;
    const BITS: usize = WORDS * u64::BITS as usize + 1;
    let mut mask = [0u64; WORDS];
    let word = mask
        .get_mut((node / u64::BITS) as usize)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
    *word = 1 << (node % u64::BITS);
    let mut old_mode: c_int = 0;
    let mut old_mask = [0u64; WORDS];
    // SAFETY: the mode is one int, the mask has `BITS - 1` bits; no address is asked about.
    let got = unsafe {
        libc::syscall(libc::SYS_get_mempolicy, &mut old_mode, old_mask.as_mut_ptr(), BITS, 0usize, 0usize)
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    let set = |mode: c_int, mask: &[u64; WORDS]| {
        // SAFETY: the mask has `BITS - 1` bits and is only read.
        let done = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, mask.as_ptr(), BITS) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    };
    set(libc::MPOL_BIND, &mask)?;
    let result = work();
    set(old_mode, &old_mask)?;
    Ok(result)
}

/// The user id of a user name. None when there is no such user.
pub fn user_id(name: &str) -> io::Result<Option<u32>> {
    by_name(name, |name, buffer| {
        // SAFETY: all fields are integers and pointers, for which zero is a value.
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = ptr::null_mut();
        // SAFETY: the name ends with NUL, the buffer has the given length, and both results outlive the call.
        let code = unsafe {
            libc::getpwnam_r(
                name.as_ptr(),
                &mut entry,
                buffer.as_mut_ptr().cast::<c_char>(),
                buffer.len(),
                &mut found,
            )
        };
        (code, (!found.is_null()).then_some(entry.pw_uid))
    })
}

/// The group id of a group name. None when there is no such group.
pub fn group_id(name: &str) -> io::Result<Option<u32>> {
    by_name(name, |name, buffer| {
        // SAFETY: all fields are integers and pointers, for which zero is a value.
        let mut entry: libc::group = unsafe { std::mem::zeroed() };
        let mut found = ptr::null_mut();
        // SAFETY: the name ends with NUL, the buffer has the given length, and both results outlive the call.
        let code = unsafe {
            libc::getgrnam_r(
                name.as_ptr(),
                &mut entry,
                buffer.as_mut_ptr().cast::<c_char>(),
                buffer.len(),
                &mut found,
            )
        };
        (code, (!found.is_null()).then_some(entry.gr_gid))
    })
}

fn by_name(name: &str, get: impl Fn(&CStr, &mut [u8]) -> (c_int, Option<u32>)) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    // Groups with many members need room for all their names.
    let mut buffer = vec![0u8; 4096];
    loop {
        match get(&name, &mut buffer) {
            (0, id) => return Ok(id),
            (libc::ERANGE, _) if buffer.len() < (1 << 20) => buffer.resize(buffer.len() * 4, 0),
            (libc::EINTR, _) => {}
            // Some name services report an unknown name as an error (getpwnam(3), ERRORS).
            (libc::ENOENT | libc::ESRCH, _) => return Ok(None),
            (code, _) => return Err(io::Error::from_raw_os_error(code)),
        }
    }
}

static STOP: AtomicBool = AtomicBool::new(false);

extern "C" fn on_stop_signal(_: c_int) {
    STOP.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP set [`stop_requested`] and interrupt a waiting system call.
pub fn catch_stop_signals() -> io::Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler: extern "C" fn(c_int) = on_stop_signal;
        // SAFETY: zero is a valid sigaction, and the handler only stores to an atomic, which a handler may do.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            libc::sigaction(signal, &action, ptr::null_mut())
        };
        if done != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Whether a stop signal came.
pub fn stop_requested() -> bool {
    STOP.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn memfd(length: u64) -> rustix::fd::OwnedFd {
        let fd = rustix::fs::memfd_create("sys-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, length).unwrap();
        fd
    }

    #[test]
    fn a_hole_has_no_node_and_a_written_page_has_one() {
        let fd = memfd(1 << 20);
        let mapping = Mapping::shared(fd.as_fd(), 0, 1 << 20, false).unwrap();
        assert!(!mapping.is_resident(8192).unwrap());
        assert_eq!(nodes_of(&[mapping.address(8192)]).unwrap(), [None]);
        rustix::io::pwrite(&fd, b"x", 8192).unwrap();
        assert!(mapping.is_resident(8200).unwrap());
        mapping.populate(8192, 4096, false).unwrap();
        assert!(nodes_of(&[mapping.address(8192)]).unwrap()[0].is_some());
    }

    #[test]
    fn ranges_beyond_the_mapping_are_refused() {
        let fd = memfd(8192);
        let mapping = Mapping::shared(fd.as_fd(), 0, 8192, false).unwrap();
        assert!(mapping.populate(4096, 8192, false).is_err());
        assert!(mapping.populate(usize::MAX, 2, false).is_err());
        assert!(mapping.is_resident(8192).is_err());
        assert_eq!(nodes_of(&[0, usize::MAX]).unwrap(), [None, None]);
    }

    #[test]
    fn populating_behind_the_end_of_the_file_is_an_error_not_a_signal() {
        let fd = memfd(4096);
        let mapping = Mapping::shared(fd.as_fd(), 0, 8192, false).unwrap();
        assert!(mapping.populate(0, 8192, true).is_err());
        mapping.populate(0, 4096, true).unwrap();
    }

    #[test]
    fn memory_can_be_bound_to_a_node_that_exists() {
        let fd = memfd(8192);
        let mapping = Mapping::shared(fd.as_fd(), 0, 8192, false).unwrap();
        let node = crate::sysfs::Host::default().nodes().unwrap()[0];
        mapping.bind(node).unwrap();
        mapping.populate(0, 8192, true).unwrap();
        assert_eq!(nodes_of(&[mapping.address(0)]).unwrap(), [Some(node)]);
        assert!(mapping.bind(1000).is_err());
    }

    #[test]
    fn a_thread_is_bound_to_a_node_for_as_long_as_it_works() {
        let policy = || {
            let text = std::fs::read_to_string("/proc/thread-self/numa_maps").unwrap();
            text.lines().next().unwrap().split_whitespace().nth(1).unwrap().to_owned()
        };
        let before = policy();
        let node = crate::sysfs::Host::default().nodes().unwrap()[0];
        assert_eq!(bound_to_node(node, policy).unwrap(), format!("bind:{node}"));
        assert_eq!(policy(), before);
        assert!(bound_to_node(1000, || ()).is_err());
        assert!(bound_to_node(u32::MAX, || ()).is_err());
    }

    #[test]
    fn names_are_resolved() {
        assert_eq!(user_id("root").unwrap(), Some(0));
        assert_eq!(group_id("root").unwrap(), Some(0));
        assert_eq!(user_id("no-such-user-here").unwrap(), None);
        assert!(group_id("nul\0inside").is_err());
    }
}
