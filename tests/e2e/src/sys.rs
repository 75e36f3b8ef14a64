//! The system calls that neither `std` nor `rustix` offers in safe form: record locks with a range, a child
//! that dies with its parent, shared mappings, waiting for a termination signal. The only file of this crate
//! with `unsafe`.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Which family a record lock belongs to: it decides who owns the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordLock {
    /// `F_SETLK`: owned by the process.
    Posix,
    /// `F_OFD_SETLK`: owned by the open file description.
    OpenFile,
}

/// What a record lock asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// `F_RDLCK`.
    Shared,
    /// `F_WRLCK`.
    Exclusive,
    /// `F_UNLCK`.
    Unlock,
}

impl LockKind {
    fn raw(self) -> libc::c_short {
        // The three constants are 0, 1 and 2 (bits/fcntl.h), so the narrowing cannot lose anything.
        (match self {
            Self::Shared => libc::F_RDLCK,
            Self::Exclusive => libc::F_WRLCK,
            Self::Unlock => libc::F_UNLCK,
        }) as libc::c_short
    }
}

/// A byte range of a file; a length of 0 reaches to the end of the file, however far it grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: i64,
    /// Number of bytes.
    pub len: i64,
}

/// The lock that stands in the way, as `F_GETLK` tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// True for an exclusive lock.
    pub exclusive: bool,
    /// First locked byte.
    pub start: i64,
    /// Number of locked bytes, 0 for "to the end".
    pub len: i64,
    /// The owner, as the asking side sees it.
    pub pid: i32,
}

fn request(kind: LockKind, range: Range) -> libc::flock {
    libc::flock {
        l_type: kind.raw(),
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: range.start,
        l_len: range.len,
        l_pid: 0,
    }
}

/// Sets or clears a record lock; `wait` lets it block until the lock is free.
///
/// # Errors
/// `EAGAIN` when the lock is held by somebody else and `wait` is false; whatever `fcntl(2)` reports.
pub fn set_record_lock(
    file: &File,
    family: RecordLock,
    kind: LockKind,
    range: Range,
    wait: bool,
) -> io::Result<()> {
    let command = match (family, wait) {
        (RecordLock::Posix, false) => libc::F_SETLK,
        (RecordLock::Posix, true) => libc::F_SETLKW,
        (RecordLock::OpenFile, false) => libc::F_OFD_SETLK,
        (RecordLock::OpenFile, true) => libc::F_OFD_SETLKW,
    };
    let lock = request(kind, range);
    // SAFETY: the descriptor is open for the life of `file`, and the four commands read one `struct flock`,
    // which lives until the call returns.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw const lock) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Asks who would refuse the lock; `None` when nobody would.
///
/// # Errors
/// Whatever `fcntl(2)` reports.
pub fn test_record_lock(file: &File, kind: LockKind, range: Range) -> io::Result<Option<Holder>> {
    let mut lock = request(kind, range);
    // SAFETY: the descriptor is open for the life of `file`, and `F_GETLK` reads and writes one
    // `struct flock`, which is exclusively borrowed for the call.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut lock) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if lock.l_type == LockKind::Unlock.raw() {
        return Ok(None);
    }
    Ok(Some(Holder {
        exclusive: lock.l_type == LockKind::Exclusive.raw(),
        start: lock.l_start,
        len: lock.l_len,
        pid: lock.l_pid,
    }))
}

/// Makes the child a process group leader that the kernel kills when the spawning thread ends.
pub fn tie_to_parent(command: &mut Command) -> &mut Command {
    command.process_group(0);
    // SAFETY: the closure runs between fork and exec and makes one async-signal-safe system call; it touches
    // no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        })
    }
}

/// How a mapping relates to its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// `MAP_SHARED`: stores reach the file.
    Shared,
    /// `MAP_PRIVATE`: stores stay in this process.
    Private,
}

/// A readable and writable mapping of the first bytes of a file.
#[derive(Debug)]
pub struct Mapping {
    address: *mut u8,
    len: usize,
}

impl Mapping {
    /// Maps `len` bytes of `file` from its start.
    ///
    /// # Errors
    /// Whatever `mmap(2)` reports.
    pub fn new(file: &File, len: usize, sharing: Sharing) -> io::Result<Self> {
        let flags = match sharing {
            Sharing::Shared => libc::MAP_SHARED,
            Sharing::Private => libc::MAP_PRIVATE,
        };
        // SAFETY: the kernel chooses the address, so no existing mapping is replaced; the descriptor is open.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { address: address.cast(), len })
    }

    /// Copies `bytes` into the mapping at `offset`; false when they do not fit.
    pub fn store(&mut self, offset: usize, bytes: &[u8]) -> bool {
        if offset.checked_add(bytes.len()).is_none_or(|end| end > self.len) {
            return false;
        }
        for (index, byte) in bytes.iter().enumerate() {
            // SAFETY: `offset + index` is below `len` by the check above, and the mapping is live and writable.
            unsafe { self.address.add(offset + index).write_volatile(*byte) };
        }
        true
    }

    /// Copies `len` bytes at `offset` out of the mapping; `None` when they are outside of it.
    #[must_use]
    pub fn load(&self, offset: usize, len: usize) -> Option<Vec<u8>> {
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return None;
        }
        let mut bytes = Vec::with_capacity(len);
        for index in 0..len {
            // SAFETY: `offset + index` is below `len` by the check above, and the mapping is live and readable.
            bytes.push(unsafe { self.address.add(offset + index).read_volatile() });
        }
        Some(bytes)
    }

    /// Writes changed pages back to the file and waits for it.
    ///
    /// # Errors
    /// Whatever `msync(2)` reports.
    pub fn sync(&self) -> io::Result<()> {
        // SAFETY: address and length are those of the live mapping.
        let result = unsafe { libc::msync(self.address.cast(), self.len, libc::MS_SYNC) };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: address and length are those of the live mapping, and nothing can use it afterwards.
        unsafe { libc::munmap(self.address.cast(), self.len) };
    }
}

/// The signals on which the program cleans up and ends.
const TERMINATION: [libc::c_int; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

fn termination_set() -> libc::sigset_t {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset initialises the whole set before anything reads it.
    let mut set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        set.assume_init()
    };
    for signal in TERMINATION {
        // SAFETY: the set is initialised and the signal number is a valid constant.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}

/// Blocks the termination signals in this thread and all it will start, so that one thread can wait for them.
/// Call it before any other thread exists.
///
/// Children do not inherit the blocked set: `std::process::Command` resets the mask before exec.
pub fn block_termination_signals() {
    let set = termination_set();
    // SAFETY: the set is initialised; the old mask is not asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
}

/// Waits for a termination signal and returns its number.
///
/// # Errors
/// Whatever `sigwait(3)` reports.
pub fn wait_termination_signal() -> io::Result<i32> {
    let set = termination_set();
    let mut signal = 0;
    // SAFETY: both pointers are to live, initialised values.
    let error = unsafe { libc::sigwait(&raw const set, &raw mut signal) };
    if error == 0 { Ok(signal) } else { Err(io::Error::from_raw_os_error(error)) }
}
