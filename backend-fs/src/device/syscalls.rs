//! System calls of the device: the front end's socket, its memory and its rings, and the threads that
//! serve them. For the seccomp allow list.
#![forbid(unsafe_code)]

use crate::sandbox::seccomp::Call;

const fn fcntl(command: libc::c_int, why: &'static str) -> Call {
    Call::with(libc::SYS_fcntl, 1, command as u32, why)
}

/// Every call of `vring` and of the workers. Mapping shared memory is among the calls of the runtime,
/// which forbid that it becomes executable.
pub const CALLS: &[Call] = &[
    // The front end's socket.
    Call::any(libc::SYS_recvmsg, "vhost-user messages and their descriptors"),
    Call::any(libc::SYS_sendto, "replies"),
    Call::any(libc::SYS_ppoll, "waiting for messages"),
    fcntl(libc::F_DUPFD_CLOEXEC, "a second owner of an event descriptor"),
    fcntl(libc::F_GETFL, "whether a kick descriptor blocks"),
    // Memory of the DPU.
    Call::any(libc::SYS_fstat, "size of shared memory"),
    Call::any(libc::SYS_fstatfs, "whether it is in hugepages, and their size"),
    fcntl(libc::F_GET_SEALS, "whether it can shrink or is read-only"),
    Call::any(libc::SYS_readlinkat, "the name of its file, where /proc can be seen"),
    Call::any(libc::SYS_mincore, "which of its pages exist"),
    Call::with_bits(libc::SYS_move_pages, 3, u64::MAX, 0, "on which NUMA nodes they lie; moves none"),
    // Rings.
    Call::any(libc::SYS_read, "kicks"),
    Call::any(libc::SYS_write, "calls; waking a worker"),
    Call::any(libc::SYS_epoll_create1, "a worker's set of kicks"),
    Call::any(libc::SYS_epoll_ctl, "queues of a worker come and go"),
    Call::any(libc::SYS_epoll_pwait, "a worker waits for kicks"),
    Call::any(libc::SYS_epoll_pwait2, "as epoll_pwait, for times that are no whole milliseconds"),
    Call::any(libc::SYS_eventfd2, "waking a worker; memory that was lost"),
    Call::any(libc::SYS_openat, "schedstat of a worker, where /proc can be seen"),
    Call::any(libc::SYS_pread64, "how long a worker waited for a processor"),
    Call::with(libc::SYS_unshare, 0, libc::CLONE_FS as u32, "umask and working directory of a worker's own"),
];
