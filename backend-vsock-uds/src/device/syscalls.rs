//! System calls of the device: the front end's socket, its memory and its rings, and the host sockets of
//! connections. For the seccomp allow list.
#![forbid(unsafe_code)]

use crate::sandbox::seccomp::Call;

const SOL_SOCKET: u32 = libc::SOL_SOCKET as u32;

const fn fcntl(command: libc::c_int, why: &'static str) -> Call {
    Call::with(libc::SYS_fcntl, 1, command as u32, why)
}

/// Every call of `vring`, of the workers and of the mux. Mapping shared memory is among the calls of
/// the runtime, which forbid that it becomes executable.
pub const CALLS: &[Call] = &[
    // The front end's socket.
    Call::any(libc::SYS_recvmsg, "vhost-user messages and their descriptors; bytes of host programs"),
    Call::any(libc::SYS_sendto, "vhost-user replies"),
    Call::any(libc::SYS_ppoll, "waiting for vhost-user messages"),
    fcntl(libc::F_DUPFD_CLOEXEC, "a second owner of an event descriptor"),
    fcntl(libc::F_GETFL, "whether a kick descriptor blocks"),
    // Memory of the DPU.
    Call::any(libc::SYS_fstat, "size of shared memory; whether a path is a socket"),
    Call::any(libc::SYS_fstatfs, "whether shared memory is in hugepages, and their size"),
    // Rings and waiting.
    Call::any(libc::SYS_write, "interrupts of the DPU; waking a worker"),
    Call::any(libc::SYS_epoll_ctl, "queues and connections come and go"),
    Call::any(libc::SYS_epoll_pwait, "a worker waits"),
    Call::any(libc::SYS_epoll_pwait2, "as epoll_pwait, for times that are no whole milliseconds"),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_epoll_wait, "a worker waits"),
    Call::any(libc::SYS_eventfd2, "memory that was lost"),
    Call::any(libc::SYS_pread64, "how long a worker waited for a processor"),
    // Host sockets.
    Call::any(libc::SYS_openat, "the socket that a rule names; for more than a path a filter answers EACCES"),
    Call::with(libc::SYS_socket, 0, libc::AF_UNIX as u32, "connections to host programs"),
    Call::with(libc::SYS_socketpair, 0, libc::AF_UNIX as u32, "connections between DPUs"),
    Call::any(libc::SYS_connect, "connections to host programs"),
    Call::any(libc::SYS_sendmsg, "bytes for host programs"),
    Call::any(libc::SYS_recvfrom, "greetings and records of host programs"),
    Call::any(libc::SYS_shutdown, "ends of directions"),
    Call::with(libc::SYS_getsockopt, 1, SOL_SOCKET, "who connected; type and buffer of a socket"),
    Call::with(libc::SYS_setsockopt, 1, SOL_SOCKET, "buffer and credentials of record sockets"),
];
