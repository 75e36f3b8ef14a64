//! The system call filter.
//!
//! Every module that makes system calls while DPUs are served has a table of them beside the code:
//! call, condition, reason. The filter is the union of the tables, made when the daemon starts; a call
//! that no table has does what `--seccomp` says. Conditions on arguments keep the broad calls narrow:
//! no memory may become executable, `clone` makes threads only, `prctl` names them only.
//!
//! Two more filters answer calls that the C library makes and can do without: `clone3` with `ENOSYS`,
//! since its flags lie in memory where no filter can look (it falls back to `clone`), and `openat` with
//! `EACCES` unless it asks for an `O_PATH` descriptor.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::Error;

/// What a system call outside of the allow list does (`--seccomp`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SeccompMode {
    /// No filter.
    None,
    /// The process ends (`SECCOMP_RET_KILL_PROCESS`).
    #[default]
    Kill,
    /// The call is made and the kernel logs it (`SECCOMP_RET_LOG`).
    Log,
    /// `SIGSYS` (`SECCOMP_RET_TRAP`).
    Trap,
}

impl SeccompMode {
    /// All of them.
    pub const ALL: [SeccompMode; 4] =
        [SeccompMode::None, SeccompMode::Kill, SeccompMode::Log, SeccompMode::Trap];

    /// The word on the command line.
    pub fn name(self) -> &'static str {
        match self {
            SeccompMode::None => "none",
            SeccompMode::Kill => "kill",
            SeccompMode::Log => "log",
            SeccompMode::Trap => "trap",
        }
    }
}

/// One allowed system call.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    number: c_long,
    only: Only,
    why: &'static str,
}

/// Condition on an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Only {
    /// None.
    Any,
    /// These bits of the argument have this value.
    Bits { index: u8, mask: u64, value: u64 },
    /// The argument (32 bits of it) is this process's id.
    OwnProcess { index: u8 },
}

impl Call {
    /// Allowed with any arguments.
    pub const fn any(number: c_long, why: &'static str) -> Self {
        Self { number, only: Only::Any, why }
    }

    /// Allowed when argument `index` (from 0) has exactly this value in its lower 32 bits.
    pub const fn with(number: c_long, index: u8, value: u32, why: &'static str) -> Self {
        Self { number, only: Only::Bits { index, mask: u32::MAX as u64, value: value as u64 }, why }
    }

    /// Allowed when the bits `mask` of argument `index` have the value `value`.
    pub const fn with_bits(number: c_long, index: u8, mask: u64, value: u64, why: &'static str) -> Self {
        Self { number, only: Only::Bits { index, mask, value }, why }
    }

    /// Allowed when argument `index` is this process's own id.
    pub const fn on_own_process(number: c_long, index: u8, why: &'static str) -> Self {
        Self { number, only: Only::OwnProcess { index }, why }
    }

    /// Number of the call.
    pub fn number(&self) -> c_long {
        self.number
    }

    /// What needs it.
    pub fn why(&self) -> &'static str {
        self.why
    }

    fn rule(&self, own_pid: u32) -> Result<Option<SeccompRule>, seccompiler::BackendError> {
        let condition = match self.only {
            Only::Any => return Ok(None),
            Only::Bits { index, mask, value } => {
                SeccompCondition::new(index, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(mask), value)?
            }
            Only::OwnProcess { index } => {
                SeccompCondition::new(index, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, own_pid.into())?
            }
        };
        SeccompRule::new(vec![condition]).map(Some)
    }
}

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;

/// What `pthread_create` asks of `clone`; a process would lack them.
const THREAD: u64 = (libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;

/// What Rust's standard library and the C library do of their own accord in every thread.
pub const RUNTIME_CALLS: &[Call] = &[
    Call::any(libc::SYS_brk, "malloc"),
    Call::with_bits(libc::SYS_mmap, 2, PROT_EXEC, 0, "malloc, thread stacks; never executable"),
    Call::with_bits(libc::SYS_mprotect, 2, PROT_EXEC, 0, "malloc, stack guards; never executable"),
    Call::any(libc::SYS_mremap, "realloc"),
    Call::any(libc::SYS_munmap, "free, thread exit"),
    Call::any(libc::SYS_madvise, "free, stacks of ended threads"),
    Call::any(libc::SYS_futex, "locks, condition variables, joining"),
    Call::with_bits(libc::SYS_clone, 0, THREAD, THREAD, "starting threads, no processes"),
    Call::any(libc::SYS_clone3, "as clone; the second filter answers ENOSYS"),
    Call::any(libc::SYS_set_robust_list, "thread start"),
    Call::any(libc::SYS_rseq, "thread start"),
    Call::any(libc::SYS_sigaltstack, "stack overflow detection of threads"),
    Call::any(libc::SYS_sched_getaffinity, "stack bounds of a thread; number of processors"),
    Call::any(libc::SYS_rt_sigprocmask, "thread start and abort"),
    Call::any(libc::SYS_rt_sigaction, "abort"),
    Call::any(libc::SYS_rt_sigreturn, "return from the stack overflow handler"),
    Call::any(libc::SYS_restart_syscall, "a wait that was stopped and continued"),
    Call::with(libc::SYS_prctl, 0, libc::PR_SET_NAME as u32, "thread names"),
    Call::any(libc::SYS_getpid, "abort"),
    Call::any(libc::SYS_gettid, "abort"),
    Call::on_own_process(libc::SYS_tgkill, 0, "abort; waking own threads"),
    Call::any(libc::SYS_getrandom, "hash seeds"),
    Call::any(libc::SYS_clock_gettime, "time, where the vDSO cannot answer"),
    Call::any(libc::SYS_sched_yield, "contended locks"),
    Call::any(libc::SYS_write, "log lines"),
    Call::any(libc::SYS_close, "every descriptor"),
    Call::with(
        libc::SYS_fcntl,
        1,
        libc::F_GETFD as u32,
        "checks of the standard library on close (debug builds)",
    ),
    Call::any(libc::SYS_exit, "thread exit"),
    Call::any(libc::SYS_exit_group, "exit"),
];

/// Filters every thread of this process by the union of `tables`; [`SeccompMode::None`] does nothing.
/// Needs `no_new_privs`, and sets it.
///
/// # Errors
/// [`Error::Seccomp`].
pub fn install(mode: SeccompMode, tables: &[&[Call]]) -> Result<(), Error> {
    let action = match mode {
        SeccompMode::None => return Ok(()),
        SeccompMode::Kill => SeccompAction::KillProcess,
        SeccompMode::Log => SeccompAction::Log,
        SeccompMode::Trap => SeccompAction::Trap,
    };
    let failed = |error: &dyn std::fmt::Display| Error::Seccomp(error.to_string());
    // The others go first: the allow list may not allow to install another one.
    let fallback = compile_fallback().map_err(|error| failed(&error))?;
    let paths_only = compile_paths_only().map_err(|error| failed(&error))?;
    let allow = compile(action, tables, own_pid()).map_err(|error| failed(&error))?;
    for program in [fallback, paths_only, allow] {
        seccompiler::apply_filter_all_threads(&program).map_err(|error| failed(&error))?;
    }
    Ok(())
}

fn own_pid() -> u32 {
    rustix::process::getpid().as_raw_nonzero().get().unsigned_abs()
}

fn arch() -> Result<TargetArch, seccompiler::BackendError> {
    TargetArch::try_from(std::env::consts::ARCH)
}

fn compile(
    action: SeccompAction,
    tables: &[&[Call]],
    own_pid: u32,
) -> Result<BpfProgram, seccompiler::BackendError> {
    // An empty list of rules stands for "with any arguments" and wins over every condition.
    let mut rules = BTreeMap::<i64, Vec<SeccompRule>>::new();
    let mut unconditional = Vec::new();
    for call in tables.iter().copied().flatten() {
        let entry = rules.entry(call.number).or_default();
        match call.rule(own_pid)? {
            Some(rule) => entry.push(rule),
            None => unconditional.push(call.number),
        }
    }
    for number in unconditional {
        rules.insert(number, Vec::new());
    }
    SeccompFilter::new(rules, action, SeccompAction::Allow, arch()?)?.try_into()
}

fn compile_fallback() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let answer = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, answer, arch()?)?.try_into()
}

/// `openat` for more than a path (`O_PATH`) is refused with `EACCES`, not punished: malloc counts the
/// processors in `/sys` when threads are in each other's way, and looks into
/// `/proc/sys/vm/overcommit_memory` before it gives memory back, and goes on without either.
fn compile_paths_only() -> Result<BpfProgram, seccompiler::BackendError> {
    let path = libc::O_PATH as u64;
    let more = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::MaskedEq(path), 0)?;
    let rules = BTreeMap::from([(libc::SYS_openat, vec![SeccompRule::new(vec![more])?])]);
    let answer = SeccompAction::Errno(libc::EACCES.unsigned_abs());
    SeccompFilter::new(rules, SeccompAction::Allow, answer, arch()?)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What malloc does when threads contend must not end the daemon; see [`compile_paths_only`]. The
    /// filters stay with the thread that has them.
    #[test]
    fn opening_more_than_a_path_is_refused_and_not_punished() {
        let tables = crate::daemon::TABLES;
        let programs =
            [compile_paths_only().unwrap(), compile(SeccompAction::KillThread, tables, own_pid()).unwrap()];
        let opened = std::thread::spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            programs.iter().for_each(|program| seccompiler::apply_filter(program).unwrap());
            let open = |flags| rustix::fs::openat(rustix::fs::CWD, c"/", flags, rustix::fs::Mode::empty());
            let whole = open(rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC).map(drop);
            let path = open(rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC).map(drop);
            (whole, path)
        });
        assert_eq!(opened.join().unwrap(), (Err(rustix::io::Errno::ACCESS), Ok(())));
    }

    #[test]
    fn filter_fits_the_kernel_and_every_call_has_a_reason() {
        let tables = crate::daemon::TABLES;
        let program = compile(SeccompAction::KillProcess, tables, 1).unwrap();
        assert!(program.len() <= 4096, "{} instructions", program.len());
        assert!(tables.iter().copied().flatten().all(|call| !call.why().is_empty() && call.number() >= 0));
    }
}
