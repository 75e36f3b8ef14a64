//! System calls that no server ever needs: what an attacker would want next.

/// Name, number and arguments of each. The arguments make the call fail, or do nothing of lasting
/// effect, where the filter only logs.
const BY_NUMBER: &[(&str, libc::c_long, [u64; 6])] = &[
    ("execve", libc::SYS_execve, [0; 6]),
    ("execveat", libc::SYS_execveat, [NONE, 0, 0, 0, 0, 0]),
    ("socket", libc::SYS_socket, [NONE, 0, 0, 0, 0, 0]),
    ("socketpair", libc::SYS_socketpair, [NONE, 0, 0, 0, 0, 0]),
    ("connect", libc::SYS_connect, [NONE, 0, 0, 0, 0, 0]),
    ("bind", libc::SYS_bind, [NONE, 0, 0, 0, 0, 0]),
    ("listen", libc::SYS_listen, [NONE, 0, 0, 0, 0, 0]),
    ("ptrace", libc::SYS_ptrace, [NONE, 0, 0, 0, 0, 0]),
    ("process_vm_readv", libc::SYS_process_vm_readv, [0; 6]),
    ("process_vm_writev", libc::SYS_process_vm_writev, [0; 6]),
    ("kill", libc::SYS_kill, [0x7fff_fff0, 0, 0, 0, 0, 0]),
    ("pidfd_open", libc::SYS_pidfd_open, [NONE, 0, 0, 0, 0, 0]),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, [NONE, 0, 0, 0, 0, 0]),
    ("mount", libc::SYS_mount, [0; 6]),
    ("umount2", libc::SYS_umount2, [0; 6]),
    ("pivot_root", libc::SYS_pivot_root, [0; 6]),
    ("chroot", libc::SYS_chroot, [0; 6]),
    ("open_tree", libc::SYS_open_tree, [NONE, 0, 0, 0, 0, 0]),
    ("move_mount", libc::SYS_move_mount, [NONE, 0, NONE, 0, 0, 0]),
    ("fsopen", libc::SYS_fsopen, [0; 6]),
    ("setns", libc::SYS_setns, [NONE, 0, 0, 0, 0, 0]),
    ("unshare a user namespace", libc::SYS_unshare, [libc::CLONE_NEWUSER as u64 | 1, 0, 0, 0, 0, 0]),
    ("init_module", libc::SYS_init_module, [0; 6]),
    ("finit_module", libc::SYS_finit_module, [NONE, 0, 0, 0, 0, 0]),
    ("kexec_load", libc::SYS_kexec_load, [0; 6]),
    ("reboot", libc::SYS_reboot, [0; 6]),
    ("swapon", libc::SYS_swapon, [0; 6]),
    ("bpf", libc::SYS_bpf, [NONE, 0, 0, 0, 0, 0]),
    ("perf_event_open", libc::SYS_perf_event_open, [0; 6]),
    ("userfaultfd", libc::SYS_userfaultfd, [NONE, 0, 0, 0, 0, 0]),
    ("io_uring_setup", libc::SYS_io_uring_setup, [0; 6]),
    ("add_key", libc::SYS_add_key, [0; 6]),
    ("keyctl", libc::SYS_keyctl, [NONE, 0, 0, 0, 0, 0]),
    ("personality", libc::SYS_personality, [0xffff_ffff, 0, 0, 0, 0, 0]),
    ("sethostname", libc::SYS_sethostname, [0, NONE, 0, 0, 0, 0]),
    ("settimeofday", libc::SYS_settimeofday, [NONE, NONE, 0, 0, 0, 0]),
    ("acct", libc::SYS_acct, [NONE, 0, 0, 0, 0, 0]),
    ("shmget", libc::SYS_shmget, [NONE, NONE, 0, 0, 0, 0]),
    ("seccomp", libc::SYS_seccomp, [NONE, 0, 0, 0, 0, 0]),
    ("prctl beyond names", libc::SYS_prctl, [libc::PR_GET_DUMPABLE as u64, 0, 0, 0, 0, 0]),
    ("mmap of executable memory", libc::SYS_mmap, [0, 4096, READ_EXEC, ANONYMOUS, NONE, 0]),
    ("mprotect to executable", libc::SYS_mprotect, [0, 4096, READ_EXEC, 0, 0, 0]),
    ("tgkill of another process", libc::SYS_tgkill, [0x7fff_fff0, 0x7fff_fff0, 0, 0, 0, 0]),
    ("a number without a call", 1000, [0; 6]),
];

const NONE: u64 = u64::MAX;
const READ_EXEC: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
const ANONYMOUS: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;

/// A new process, the call behind `fork`: here its child would go on with the test, so it ends at once.
const FORK: &str = "clone of a process";

/// All of them.
pub fn names() -> impl Iterator<Item = &'static str> {
    BY_NUMBER.iter().map(|(name, ..)| *name).chain([FORK])
}

/// Makes the call and returns its errno, 0 for success.
pub fn call(name: &str) -> i32 {
    let outcome = if name == FORK {
        // SAFETY: as fork; the child only ends.
        unsafe {
            let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0);
            if child == 0 {
                libc::_exit(0);
            }
            child
        }
    } else {
        let (_, number, [a, b, c, d, e, f]) = BY_NUMBER.iter().find(|(known, ..)| *known == name).unwrap();
        // SAFETY: null pointers and closed descriptors are refused by the kernel.
        unsafe { libc::syscall(*number, *a, *b, *c, *d, *e, *f) }
    };
    if outcome >= 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap() }
}
