//! System calls of the host file system, for the seccomp allow list. What the runtime does by itself
//! (memory, locks, threads) is not among them.
#![forbid(unsafe_code)]

use crate::sandbox::seccomp::Call;

const fn fcntl(command: libc::c_int, why: &'static str) -> Call {
    Call::with(libc::SYS_fcntl, 1, command as u32, why)
}

/// Every call that serving a request may make.
pub const CALLS: &[Call] = &[
    // Finding and opening.
    Call::any(libc::SYS_openat2, "LOOKUP: beneath the parent, through no link"),
    Call::any(libc::SYS_openat, "reopening an O_PATH descriptor through /proc/self/fd"),
    Call::any(libc::SYS_name_to_handle_at, "the file handle of an inode"),
    Call::any(libc::SYS_open_by_handle_at, "opening an inode whose descriptor was given back"),
    Call::any(libc::SYS_close, "FORGET, RELEASE"),
    fcntl(libc::F_DUPFD_CLOEXEC, "a second owner of a descriptor"),
    // Attributes.
    Call::any(libc::SYS_statx, "LOOKUP, GETATTR, STATX"),
    Call::any(libc::SYS_fstatfs, "STATFS; the kind of file system"),
    Call::any(libc::SYS_faccessat2, "ACCESS"),
    Call::any(libc::SYS_fchmod, "SETATTR of the mode, open file"),
    Call::any(libc::SYS_fchmodat, "SETATTR of the mode"),
    Call::any(libc::SYS_fchownat, "SETATTR of owner and group"),
    Call::any(libc::SYS_utimensat, "SETATTR of times"),
    Call::any(libc::SYS_ftruncate, "SETATTR of the size"),
    // Names.
    Call::any(libc::SYS_mkdirat, "MKDIR"),
    Call::any(libc::SYS_mknodat, "MKNOD"),
    Call::any(libc::SYS_symlinkat, "SYMLINK"),
    Call::any(libc::SYS_linkat, "LINK"),
    Call::any(libc::SYS_unlinkat, "UNLINK, RMDIR"),
    Call::any(libc::SYS_renameat2, "RENAME, RENAME2"),
    Call::any(libc::SYS_readlinkat, "READLINK"),
    Call::any(libc::SYS_getdents64, "READDIR, READDIRPLUS"),
    // Data.
    Call::any(libc::SYS_preadv2, "READ"),
    Call::any(libc::SYS_pwritev2, "WRITE"),
    Call::any(libc::SYS_lseek, "LSEEK; position in a directory"),
    Call::any(libc::SYS_fallocate, "FALLOCATE"),
    Call::any(libc::SYS_copy_file_range, "COPY_FILE_RANGE"),
    Call::any(libc::SYS_fsync, "FSYNC, FSYNCDIR"),
    Call::any(libc::SYS_fdatasync, "FSYNC of data only"),
    Call::any(libc::SYS_syncfs, "SYNCFS"),
    // Extended attributes, through /proc/self/fd as the working directory.
    Call::any(libc::SYS_setxattr, "SETXATTR"),
    Call::any(libc::SYS_getxattr, "GETXATTR"),
    Call::any(libc::SYS_listxattr, "LISTXATTR"),
    Call::any(libc::SYS_removexattr, "REMOVEXATTR"),
    Call::any(libc::SYS_fchdir, "entering /proc/self/fd, per thread"),
    // Acting as the caller, per thread.
    Call::with(
        libc::SYS_unshare,
        0,
        libc::CLONE_FS as u32,
        "umask and working directory of the thread's own",
    ),
    Call::any(libc::SYS_umask, "new inodes of callers with FUSE_DONT_MASK"),
    Call::any(libc::SYS_setfsuid, "the caller's user id"),
    Call::any(libc::SYS_setfsgid, "the caller's group id"),
    Call::any(libc::SYS_setgroups, "the caller's supplementary groups"),
    Call::any(libc::SYS_capget, "capabilities to go back to"),
    Call::any(libc::SYS_capset, "capabilities of the caller; keeping DAC_OVERRIDE, dropping FSETID"),
    // Locks.
    Call::any(libc::SYS_flock, "SETLK of flock(2)"),
    fcntl(libc::F_OFD_SETLK, "SETLK"),
    fcntl(libc::F_OFD_SETLKW, "SETLKW, on a thread of its own"),
    fcntl(libc::F_OFD_GETLK, "GETLK"),
    Call::any(libc::SYS_gettid, "the thread that waits for a lock"),
    Call::any(libc::SYS_rt_sigprocmask, "letting that thread be woken"),
    Call::on_own_process(libc::SYS_tgkill, 0, "waking it"),
    Call::any(libc::SYS_rt_sigreturn, "it was woken"),
];
