//! System calls that no safe wrapper exists for. The only file of the host file system with `unsafe`.
//!
//! Every function does exactly one system call (or says so), returns its errno, and touches no state
//! but the calling thread's where its name says so. What `rustix` wraps is called through `rustix`
//! right where it is needed.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;
use rustix::path::DecInt;
use vring::chain::Slices;

use crate::sandbox::seccomp::Call;

type Result<T> = std::result::Result<T, Errno>;

/// System calls that the host file system makes once it serves.
///
/// `openat` and the calls on `/proc/self/fd` take a path; it is always the number of an open descriptor.
pub const CALLS: &[Call] = &[
    Call::any(libc::SYS_capget, "capabilities of this thread"),
    Call::any(libc::SYS_capset, "acting as the caller; clearing set-id bits"),
    Call::any(libc::SYS_copy_file_range, "COPY_FILE_RANGE"),
    Call::any(libc::SYS_faccessat2, "ACCESS"),
    Call::any(libc::SYS_fallocate, "FALLOCATE"),
    Call::any(libc::SYS_fchdir, "the thread's working directory becomes /proc/self/fd"),
    Call::any(libc::SYS_fchmod, "SETATTR of an open file"),
    Call::any(libc::SYS_fchmodat, "SETATTR of the mode"),
    Call::any(libc::SYS_fchownat, "SETATTR of the owner"),
    Call::with(libc::SYS_fcntl, 1, libc::F_DUPFD_CLOEXEC as u32, "FLUSH"),
    Call::with(libc::SYS_fcntl, 1, libc::F_OFD_GETLK as u32, "GETLK"),
    Call::with(libc::SYS_fcntl, 1, libc::F_OFD_SETLK as u32, "SETLK"),
    Call::with(libc::SYS_fcntl, 1, libc::F_OFD_SETLKW as u32, "SETLKW"),
    Call::any(libc::SYS_fdatasync, "FSYNC"),
    Call::any(libc::SYS_flock, "SETLK and SETLKW of whole files; RELEASE"),
    Call::any(libc::SYS_fstatfs, "STATFS; kind of a new mount"),
    Call::any(libc::SYS_fsync, "FSYNC and FSYNCDIR"),
    Call::any(libc::SYS_ftruncate, "SETATTR of the size"),
    Call::any(libc::SYS_getdents64, "READDIR and READDIRPLUS"),
    Call::any(libc::SYS_getxattr, "GETXATTR"),
    Call::any(libc::SYS_linkat, "LINK"),
    Call::any(libc::SYS_listxattr, "LISTXATTR"),
    Call::any(libc::SYS_lseek, "LSEEK; place in a directory"),
    Call::any(libc::SYS_mkdirat, "MKDIR"),
    Call::any(libc::SYS_mknodat, "MKNOD"),
    Call::any(libc::SYS_name_to_handle_at, "evicting inodes"),
    Call::any(libc::SYS_open_by_handle_at, "use of evicted inodes"),
    Call::any(libc::SYS_openat, "reopening through /proc/self/fd"),
    Call::any(libc::SYS_openat2, "LOOKUP, CREATE and TMPFILE"),
    Call::any(libc::SYS_preadv2, "READ"),
    Call::any(libc::SYS_pwritev2, "WRITE"),
    Call::any(libc::SYS_readlinkat, "READLINK"),
    Call::any(libc::SYS_removexattr, "REMOVEXATTR; mapped file capabilities"),
    Call::any(libc::SYS_renameat2, "RENAME"),
    Call::any(libc::SYS_rt_sigprocmask, "waiting for a lock can be interrupted"),
    Call::any(libc::SYS_rt_sigreturn, "a wait for a lock was interrupted"),
    Call::any(libc::SYS_setfsgid, "acting as the caller"),
    Call::any(libc::SYS_setfsuid, "acting as the caller"),
    Call::any(libc::SYS_setgroups, "acting as the caller"),
    Call::any(libc::SYS_setxattr, "SETXATTR; security labels"),
    Call::any(libc::SYS_statx, "LOOKUP, GETATTR and all that answers with attributes"),
    Call::any(libc::SYS_symlinkat, "SYMLINK"),
    Call::any(libc::SYS_syncfs, "SYNCFS"),
    Call::on_own_process(libc::SYS_tgkill, 0, "interrupting a wait for a lock"),
    Call::any(libc::SYS_getpid, "as tgkill"),
    Call::any(libc::SYS_gettid, "as tgkill"),
    Call::any(libc::SYS_umask, "default ACLs"),
    Call::any(libc::SYS_unlinkat, "UNLINK, RMDIR and undoing"),
    Call::with(libc::SYS_unshare, 0, libc::CLONE_FS as u32, "a umask for each thread"),
    Call::any(libc::SYS_utimensat, "SETATTR of times"),
];

/// Largest number of iovecs of one call (`UIO_MAXIOV`, `include/uapi/linux/uio.h`).
const MAX_IOVECS: usize = 1024;

/// Largest file handle (`MAX_HANDLE_SZ`, `include/linux/exportfs.h`).
const MAX_HANDLE: usize = 128;

/// Bytes before the opaque part of `struct file_handle`.
const HANDLE_HEADER: usize = 8;

/// What every lookup wants to know of a file.
pub(super) const STAT_MASK: StatxFlags =
    StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);

fn check(ret: libc::c_long) -> Result<usize> {
    match usize::try_from(ret) {
        Ok(value) => Ok(value),
        Err(_) => Err(last_errno()),
    }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Attributes of an open file.
pub(super) fn stat_fd(fd: BorrowedFd) -> Result<Statx> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, STAT_MASK)
}

/// Attributes of `name` in `dir`; a symbolic link is not followed.
///
/// Neither `AT_STATX_DONT_SYNC` (a DPU must see what a host program would see) nor
/// `AT_NO_AUTOMOUNT` (an automount point is of no use before it is mounted) is asked for.
pub(super) fn stat_name(dir: BorrowedFd, name: &CStr) -> Result<Statx> {
    rustix::fs::statx(dir, name, AtFlags::SYMLINK_NOFOLLOW, STAT_MASK)
}

/// Opens `name` in `dir`, never through a symbolic link and never outside `dir`.
pub(super) fn open_name(dir: BorrowedFd, name: &CStr, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    rustix::fs::openat2(
        dir,
        name,
        flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        mode,
        ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS,
    )
}

/// Opens the file behind `fd` (usually `O_PATH`) anew. `proc_self_fd` is `/proc/self/fd`.
///
/// The caller has made sure that it is a regular file or a directory, or asks for `O_PATH`: opening
/// anything else can block or act on a device.
pub(super) fn reopen(proc_self_fd: BorrowedFd, fd: BorrowedFd, flags: OFlags) -> Result<OwnedFd> {
    let flags = (flags | OFlags::CLOEXEC) - OFlags::NOFOLLOW;
    rustix::fs::openat(proc_self_fd, DecInt::from_fd(fd).as_c_str(), flags, Mode::empty())
}

/// A file handle, as `name_to_handle_at(2)` gives it: a whole `struct file_handle`.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct FileHandle(Box<[u8]>);

impl FileHandle {
    /// The handle of an open file. `O_PATH` is enough.
    ///
    /// # Errors
    /// `EOPNOTSUPP` or `EOVERFLOW`: the file system has none, or none that fits.
    pub(super) fn of(fd: BorrowedFd) -> Result<Self> {
        let mut buf = [0u8; HANDLE_HEADER + MAX_HANDLE];
        buf[..4].copy_from_slice(&(MAX_HANDLE as u32).to_ne_bytes());
        let mut mount_id: libc::c_int = 0;
        // SAFETY: `buf` starts with the size of the room after the header and is that long; the path
        // is a terminated empty string; `mount_id` is a valid place for an int. All outlive the call.
        check(unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                fd.as_raw_fd(),
                c"".as_ptr(),
                buf.as_mut_ptr(),
                &raw mut mount_id,
                libc::AT_EMPTY_PATH,
            )
        })?;
        let len = u32::from_ne_bytes([buf[0], buf[1], buf[2], buf[3]]) as usize;
        Ok(Self(buf.get(..HANDLE_HEADER + len).ok_or(Errno::OVERFLOW)?.into()))
    }

    /// Opens the file again. `mount` is any open file or directory of its mount, not `O_PATH`.
    ///
    /// # Errors
    /// `ESTALE`: the file is gone, also when its inode number is in use again. `EPERM`: without
    /// `CAP_DAC_READ_SEARCH`.
    pub(super) fn open(&self, mount: BorrowedFd, flags: OFlags) -> Result<OwnedFd> {
        let flags = (flags | OFlags::CLOEXEC).bits();
        // SAFETY: the box holds a whole `struct file_handle` whose `handle_bytes` was written by the
        // kernel and equals the bytes that follow; the kernel only reads it.
        let fd = check(unsafe {
            libc::syscall(libc::SYS_open_by_handle_at, mount.as_raw_fd(), self.0.as_ptr(), flags)
        })?;
        let fd = i32::try_from(fd).map_err(|_| Errno::BADF)?;
        // SAFETY: the call succeeded, so this is a fresh descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}

/// The iovecs of `slices` after its first `skip` bytes, at most as many as one call takes: the rest of
/// the piece that `skip` lies in when that is not its start, else whole pieces. With their bytes.
fn rest<'a>(
    slices: &Slices<'a>,
    skip: usize,
    partial: &'a mut [libc::iovec; 1],
) -> (&'a [libc::iovec], usize) {
    let iovecs = slices.as_iovecs();
    let mut before = 0;
    for (index, iovec) in iovecs.iter().enumerate() {
        let within = skip - before;
        if within == 0 {
            let whole = &iovecs[index..iovecs.len().min(index + MAX_IOVECS)];
            return (whole, whole.iter().map(|iovec| iovec.iov_len).sum());
        }
        if within < iovec.iov_len {
            let len = iovec.iov_len - within;
            partial[0] = libc::iovec { iov_base: iovec.iov_base.wrapping_byte_add(within), iov_len: len };
            return (partial, len);
        }
        before += iovec.iov_len;
    }
    (&[], 0)
}

/// One `preadv2` into `into` from its byte `skip` on. Returns the bytes read and the bytes tried.
pub(super) fn read_at(
    fd: BorrowedFd,
    into: &Slices,
    skip: usize,
    offset: i64,
    nowait: bool,
) -> Result<(usize, usize)> {
    let mut partial = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }];
    let (iovecs, len) = rest(into, skip, &mut partial);
    let flags = if nowait { libc::RWF_NOWAIT } else { 0 };
    // SAFETY: `Slices` guarantees that each iovec points into memory that stays mapped while it is
    // borrowed, and `rest` only narrows one; that memory is shared with the DPU, so no Rust reference
    // to it exists and the kernel may write it. The count is at most `MAX_IOVECS`.
    let read = check(unsafe {
        libc::preadv2(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset, flags)
            as libc::c_long
    })?;
    Ok((read, len))
}

/// One `pwritev2` of `from` from its byte `skip` on. Returns the bytes written and the bytes tried.
/// With `append` the offset has no meaning.
pub(super) fn write_at(
    fd: BorrowedFd,
    from: &Slices,
    skip: usize,
    offset: i64,
    append: bool,
) -> Result<(usize, usize)> {
    let mut partial = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }];
    let (iovecs, len) = rest(from, skip, &mut partial);
    let flags = if append { libc::RWF_APPEND } else { 0 };
    // SAFETY: as in `read_at`; the kernel only reads the memory here.
    let written = check(unsafe {
        libc::pwritev2(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as libc::c_int, offset, flags)
            as libc::c_long
    })?;
    Ok((written, len))
}

/// Fills `buf` with `struct linux_dirent64`s from the directory's position on; 0 at its end.
pub(super) fn getdents(dir: BorrowedFd, buf: &mut [u8]) -> Result<usize> {
    // SAFETY: the kernel writes at most `buf.len()` bytes into `buf`.
    check(unsafe { libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buf.as_mut_ptr(), buf.len()) })
}

/// Whether the calling thread's file system ids may access the file (`faccessat2(2)`, Linux 5.8).
pub(super) fn access(fd: BorrowedFd, mask: u32) -> Result<()> {
    // SAFETY: the path is a terminated empty string; the call only reads it.
    check(unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            fd.as_raw_fd(),
            c"".as_ptr(),
            mask,
            libc::AT_EMPTY_PATH | libc::AT_EACCESS,
        )
    })?;
    Ok(())
}

/// Sets the calling thread's file system user id and returns the one before. The kernel reports no
/// error; [`thread_fsuid`] tells what holds.
pub(super) fn set_thread_fsuid(uid: u32) -> u32 {
    // SAFETY: no memory is involved; the raw call changes the calling thread alone.
    (unsafe { libc::syscall(libc::SYS_setfsuid, uid) }) as u32
}

/// Sets the calling thread's file system group id and returns the one before.
pub(super) fn set_thread_fsgid(gid: u32) -> u32 {
    // SAFETY: no memory is involved; the raw call changes the calling thread alone.
    (unsafe { libc::syscall(libc::SYS_setfsgid, gid) }) as u32
}

/// The calling thread's file system user id: setting an invalid one changes nothing.
pub(super) fn thread_fsuid() -> u32 {
    set_thread_fsuid(u32::MAX)
}

/// The calling thread's file system group id.
pub(super) fn thread_fsgid() -> u32 {
    set_thread_fsgid(u32::MAX)
}

/// Sets the calling thread's supplementary groups.
pub(super) fn set_thread_groups(groups: &[u32]) -> Result<()> {
    // SAFETY: the kernel reads `groups.len()` 32-bit ids; the raw call changes the calling thread alone.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    Ok(())
}

/// Gives the calling thread a umask and working directory of its own.
pub(super) fn unshare_thread_fs() -> Result<()> {
    // SAFETY: `CLONE_FS` alone copies the kernel's `fs_struct`; memory and descriptors stay shared, so
    // no assumption of other code in this process is broken.
    check(unsafe { libc::syscall(libc::SYS_unshare, libc::CLONE_FS) })?;
    Ok(())
}

/// A range for `fcntl(2)` locks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct OfdLock {
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub(super) kind: u32,
    /// First byte.
    pub(super) start: i64,
    /// Bytes; 0 means to the end of the file, however long it gets.
    pub(super) len: i64,
    /// Who holds it (answers only); negative for an open file description lock.
    pub(super) pid: i32,
}

impl OfdLock {
    fn to_flock(self) -> libc::flock64 {
        libc::flock64 {
            l_type: self.kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self.start,
            l_len: self.len,
            // The kernel refuses anything else for open file description locks.
            l_pid: 0,
        }
    }
}

/// Takes or drops an open file description lock. With `wait` the thread sleeps until it has it or a
/// signal arrives (`EINTR`).
pub(super) fn set_ofd_lock(fd: BorrowedFd, lock: OfdLock, wait: bool) -> Result<()> {
    let flock = lock.to_flock();
    let command = if wait { libc::F_OFD_SETLKW } else { libc::F_OFD_SETLK };
    // SAFETY: `flock` is a whole `struct flock64` that the kernel reads.
    check(libc::c_long::from(unsafe { libc::fcntl(fd.as_raw_fd(), command, &raw const flock) }))?;
    Ok(())
}

/// The lock that stands in the way of `lock`, or one of kind `F_UNLCK`.
pub(super) fn get_ofd_lock(fd: BorrowedFd, lock: OfdLock) -> Result<OfdLock> {
    let mut flock = lock.to_flock();
    // SAFETY: `flock` is a whole `struct flock64` that the kernel reads and writes.
    check(libc::c_long::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut flock) }))?;
    Ok(OfdLock { kind: flock.l_type as u32, start: flock.l_start, len: flock.l_len, pid: flock.l_pid })
}

/// The signal that interrupts a thread which waits for a lock.
fn wake_signal() -> libc::c_int {
    libc::SIGRTMIN() + 3
}

extern "C" fn ignore_signal(_signal: libc::c_int) {}

/// Installs the empty handler that lets [`interrupt_thread`] end a blocking call with `EINTR`.
pub(super) fn install_wake_handler() -> Result<()> {
    // SAFETY: all zero is a valid `sigaction`: no flags (so no `SA_RESTART`), an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = ignore_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
    // SAFETY: the handler does nothing, so it is async-signal-safe; the old action is not asked for.
    check(libc::c_long::from(unsafe {
        libc::sigaction(wake_signal(), &raw const action, std::ptr::null_mut())
    }))?;
    Ok(())
}

/// Lets the calling thread receive the signal of [`interrupt_thread`], which a daemon's threads may block.
pub(super) fn allow_wake_signal() -> Result<()> {
    // SAFETY: all zero is a valid empty `sigset_t`; the set is initialised before it is read, and the
    // old mask is not asked for. Only the calling thread's mask changes.
    let errno = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, wake_signal());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut())
    };
    if errno == 0 { Ok(()) } else { Err(Errno::from_raw_os_error(errno)) }
}

/// Interrupts the blocking call that thread `tid` of this process may be in.
pub(super) fn interrupt_thread(tid: rustix::process::Pid) {
    let process = rustix::process::getpid().as_raw_nonzero().get();
    let thread = tid.as_raw_nonzero().get();
    // SAFETY: no memory is involved. The caller keeps the thread from ending, so `tid` is its own; the
    // signal has a handler (`install_wake_handler`). It can only fail for a thread that is gone.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, wake_signal()) };
}

/// Closes, and tells what `close(2)` tells: a file system may report a failed write only now.
pub(super) fn close(fd: OwnedFd) -> Result<()> {
    // SAFETY: ownership is given up first, so it is closed once, whatever the call answers.
    check(libc::c_long::from(unsafe { libc::close(fd.into_raw_fd()) }))?;
    Ok(())
}

/// Makes others wait before they open the file for writing (`F_SETLEASE`).
#[cfg(test)]
pub(super) fn set_read_lease(fd: BorrowedFd) -> Result<()> {
    /// `include/uapi/asm-generic/fcntl.h`.
    const F_SETSIG: libc::c_int = 10;
    // SAFETY: no memory is involved. The holder is told of those who wait by a signal that does nothing
    // by default; the usual one would end the process.
    check(libc::c_long::from(unsafe {
        libc::fcntl(fd.as_raw_fd(), F_SETSIG, libc::SIGCHLD);
        libc::fcntl(fd.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK)
    }))?;
    Ok(())
}
