//! Stages 1 to 3: the split into supervisor and server.
//!
//! ```text
//!  supervisor ──fork──► middle ──unshare──► … ──fork──► server (pid 1 of its namespace)
//!      │                  │ exits                          ▲
//!      │◄─ adopts (subreaper) ─────────────────────────────┤
//!      └─ writes the id maps of the middle; "go" ──────────┘
//! ```
//!
//! A process that makes a pid namespace does not enter it, its children do; and whoever makes a user
//! namespace has lost the right to write a map with more than its own id. So a short-lived middle process
//! makes the namespaces while the supervisor stays outside, writes the maps, and adopts the server when
//! the middle process is gone. In the modes without namespaces the server is forked directly.
//!
//! The server starts work only on the supervisor's "go": the parent-death signal counts from the last
//! change of parent, and what the DPU may reach through the server must not find an unsealed supervisor.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use caps::{Capability, CapsHashSet};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, geteuid, getpid, pidfd_open, pidfd_send_signal,
    set_child_subreaper, set_parent_process_death_signal, waitpid,
};
use rustix::thread::{Gid, Uid, UnshareFlags, set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::options::{NamespaceMap, SandboxMode, SandboxOptions};
use super::seccomp::{self, Call};
use super::signals::SignalFd;
use super::{Error, capabilities, user_namespace};

/// Which of the two processes the caller of [`split`] now is.
#[derive(Debug)]
pub enum Side {
    /// The process that was started.
    Supervisor(Supervisor),
    /// Its child.
    Server(Server),
}

/// System calls of the supervisor. It reads no file and opens none.
pub const SUPERVISOR_CALLS: &[Call] = &[
    Call::any(libc::SYS_ppoll, "waiting for signals and for the end of the server"),
    Call::any(libc::SYS_read, "signalfd; the server's ready message"),
    Call::any(libc::SYS_wait4, "exit code of the server"),
    Call::any(libc::SYS_pidfd_send_signal, "forwarding signals to the server"),
    Call::any(libc::SYS_newfstatat, "is the socket still the one that was made"),
    Call::any(libc::SYS_statx, "as newfstatat"),
    Call::any(libc::SYS_unlinkat, "removing the socket and the pid file"),
    Call::any(libc::SYS_sendto, "sd_notify; log lines to syslog"),
    Call::any(libc::SYS_sendmsg, "as sendto"),
];

/// Makes the server and, depending on the side, returns what each needs.
///
/// # Errors
/// Any of [`Error`]; in the supervisor also what went wrong in the middle process.
pub fn split(options: &SandboxOptions) -> Result<Side, Error> {
    let threads = count_threads();
    if threads != 1 {
        return Err(Error::Threads(threads));
    }
    let (here, there) = message_pair()?;
    match options.mode {
        SandboxMode::Namespace => split_with_namespaces(options, here, there),
        SandboxMode::Chroot | SandboxMode::None => match fork()? {
            Some(pid) => Ok(Side::Supervisor(Supervisor::adopt(pid, here)?)),
            None => {
                drop(here);
                Server::begin(there).map(Side::Server)
            }
        },
    }
}

fn split_with_namespaces(options: &SandboxOptions, here: OwnedFd, there: OwnedFd) -> Result<Side, Error> {
    let user_namespace = !geteuid().is_root();
    let (outside, inside) = message_pair()?;
    set_child_subreaper(Some(getpid())).map_err(Error::start("becoming the subreaper"))?;
    let Some(middle) = fork()? else {
        drop(outside);
        return match run_middle(&inside, user_namespace, options) {
            Middle::Server => {
                drop((here, inside));
                Server::begin(there).map(Side::Server)
            }
            Middle::Done => leave(),
        };
    };
    drop(inside);
    let made = follow_middle(&outside, middle, user_namespace, options);
    drop(outside);
    waitpid(Some(middle), WaitOptions::empty()).map_err(Error::start("waiting for the namespaces"))?;
    Ok(Side::Supervisor(Supervisor::adopt(made?, here)?))
}

/// What the middle process tells the supervisor: one byte of kind, four of value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Message {
    /// The namespaces are made, their maps are empty.
    Unshared,
    /// A step failed with this errno.
    Failed(Step, i32),
    /// The server runs and has this pid in the supervisor's namespace.
    Server(i32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Unshare,
    Group,
    User,
    Fork,
}

const MESSAGE_SIZE: usize = 5;

impl Message {
    fn encode(self) -> [u8; MESSAGE_SIZE] {
        let (kind, value) = match self {
            Message::Unshared => (0, 0),
            Message::Server(pid) => (1, pid),
            Message::Failed(Step::Unshare, errno) => (2, errno),
            Message::Failed(Step::Group, errno) => (3, errno),
            Message::Failed(Step::User, errno) => (4, errno),
            Message::Failed(Step::Fork, errno) => (5, errno),
        };
        let [a, b, c, d] = value.to_ne_bytes();
        [kind, a, b, c, d]
    }

    fn decode([kind, a, b, c, d]: [u8; MESSAGE_SIZE]) -> Option<Self> {
        let value = i32::from_ne_bytes([a, b, c, d]);
        Some(match kind {
            0 => Message::Unshared,
            1 => Message::Server(value),
            2 => Message::Failed(Step::Unshare, value),
            3 => Message::Failed(Step::Group, value),
            4 => Message::Failed(Step::User, value),
            5 => Message::Failed(Step::Fork, value),
            _ => return None,
        })
    }
}

/// What the middle process is when it is through.
enum Middle {
    Server,
    Done,
}

fn run_middle(supervisor: &OwnedFd, user_namespace: bool, options: &SandboxOptions) -> Middle {
    // Nobody to tell means that the supervisor is gone: there is nothing left to do but to end.
    let tell = |message: Message| {
        let _ = rustix::io::write(supervisor, &message.encode());
        Middle::Done
    };
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWNET;
    if user_namespace {
        flags |= UnshareFlags::NEWUSER;
    }
    // SAFETY: no CLONE_FILES or CLONE_VM among the flags: nothing that Rust's types rely on changes.
    if let Err(errno) = unsafe { rustix::thread::unshare_unsafe(flags) } {
        return tell(Message::Failed(Step::Unshare, errno.raw_os_error()));
    }
    if user_namespace {
        tell(Message::Unshared);
        let mut mapped = [0u8];
        if rustix::io::read(supervisor, &mut mapped) != Ok(1) {
            return Middle::Done;
        }
        if maps_root(&options.gid_map) {
            let root = Gid::ROOT;
            if let Err(errno) = set_thread_res_gid(root, root, root) {
                return tell(Message::Failed(Step::Group, errno.raw_os_error()));
            }
        }
        if maps_root(&options.uid_map) {
            let root = Uid::ROOT;
            if let Err(errno) = set_thread_res_uid(root, root, root) {
                return tell(Message::Failed(Step::User, errno.raw_os_error()));
            }
        }
    }
    match fork() {
        Ok(None) => Middle::Server,
        Ok(Some(server)) => tell(Message::Server(server.as_raw_nonzero().get())),
        Err(_) => tell(Message::Failed(Step::Fork, Errno::AGAIN.raw_os_error())),
    }
}

fn maps_root(map: &[NamespaceMap]) -> bool {
    map.iter().any(|line| line.inside == 0)
}

fn follow_middle(
    middle: &OwnedFd,
    pid: Pid,
    user_namespace: bool,
    options: &SandboxOptions,
) -> Result<Pid, Error> {
    let next = || {
        let mut bytes = [0; MESSAGE_SIZE];
        match retry(|| rustix::io::read(middle, &mut bytes)) {
            Ok(MESSAGE_SIZE) => Message::decode(bytes).ok_or(Errno::PROTO),
            Ok(_) => Err(Errno::PIPE),
            Err(errno) => Err(errno),
        }
        .map_err(Error::start("making the namespaces"))
    };
    let mut message = next()?;
    if message == Message::Unshared {
        user_namespace::write_maps(pid, &options.uid_map, &options.gid_map)?;
        rustix::io::write(middle, b"m").map_err(Error::start("making the namespaces"))?;
        message = next()?;
    }
    match message {
        Message::Server(server) => {
            Pid::from_raw(server).ok_or(Errno::PROTO).map_err(Error::start("making the namespaces"))
        }
        Message::Failed(step, errno) => Err(step_error(step, errno, user_namespace)),
        Message::Unshared => Err(Error::start("making the namespaces")(Errno::PROTO)),
    }
}

fn step_error(step: Step, errno: i32, user_namespace: bool) -> Error {
    let error = io::Error::from_raw_os_error(errno);
    match step {
        Step::Unshare if user_namespace => Error::Unshare {
            what: "user, mount, pid and net namespaces",
            error,
            advice: "unprivileged user namespaces may be forbidden here \
                     (user.max_user_namespaces, AppArmor); use --sandbox=none or run as root",
        },
        Step::Unshare => Error::Unshare {
            what: "mount, pid and net namespaces",
            error,
            advice: "that takes CAP_SYS_ADMIN; inside a container use --sandbox=chroot",
        },
        Step::Group => Error::Identity { what: "group 0", source: error },
        Step::User => Error::Identity { what: "user 0", source: error },
        Step::Fork => Error::Start { step: "fork", source: error },
    }
}

/// How the server ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With this exit code.
    Exited(u8),
    /// By this signal.
    Killed(i32),
}

/// What happened, as far as the supervisor cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The server is isolated and accepts front ends.
    Ready,
    /// A signal that ends the daemon.
    Signal(Signal),
    /// The server is gone.
    Ended(Ending),
    /// Nothing within the time given.
    Timeout,
}

/// The supervisor's end.
#[derive(Debug)]
pub struct Supervisor {
    pid: Pid,
    server: OwnedFd,
    /// Until the server is ready or gone.
    link: Option<OwnedFd>,
}

impl Supervisor {
    fn adopt(pid: Pid, link: OwnedFd) -> Result<Self, Error> {
        let server = pidfd_open(pid, PidfdFlags::empty()).map_err(Error::start("watching the server"))?;
        Ok(Self { pid, server, link: Some(link) })
    }

    /// Stage 1: gives up what waiting and cleaning up does not need, then lets the server begin. If that
    /// fails, dropping the supervisor ends the server.
    ///
    /// # Errors
    /// [`Error::Capabilities`], [`Error::Seccomp`], [`Error::Start`].
    pub fn release(&self, options: &SandboxOptions) -> Result<(), Error> {
        let keep: CapsHashSet = [Capability::CAP_DAC_OVERRIDE].into();
        capabilities::reduce(&keep, &CapsHashSet::new())?;
        seccomp::install(options.seccomp, &[seccomp::RUNTIME_CALLS, SUPERVISOR_CALLS])?;
        match &self.link {
            Some(link) => {
                rustix::io::write(link, b"g").map(drop).map_err(Error::start("starting the server"))
            }
            None => Ok(()),
        }
    }

    /// Pid of the server in this process's namespace.
    pub fn server(&self) -> Pid {
        self.pid
    }

    /// Waits for the next event, at most `timeout`.
    pub fn next(&mut self, signals: &SignalFd, timeout: Option<std::time::Duration>) -> Event {
        loop {
            let link = self.link.as_ref().map(AsFd::as_fd);
            let (ended, signalled, spoke) = wait(&[self.server.as_fd(), signals.as_fd()], link, timeout);
            // The server's word comes before its end, so that both are seen.
            if spoke {
                let mut word = [0u8];
                let said = self.link.take().map(|link| rustix::io::read(link, &mut word));
                if said == Some(Ok(1)) {
                    return Event::Ready;
                }
                continue;
            }
            if ended {
                return Event::Ended(self.reap());
            }
            match signals.next() {
                Some(signal) => return Event::Signal(signal),
                None if signalled => {}
                None if timeout.is_some() => return Event::Timeout,
                None => {}
            }
        }
    }

    /// Sends a signal to the server; one that has already ended needs none.
    pub fn signal(&self, signal: Signal) {
        if let Err(errno) = pidfd_send_signal(&self.server, signal) {
            tracing::debug!("signal to the server: {errno}");
        }
    }

    fn reap(&self) -> Ending {
        match retry(|| waitpid(Some(self.pid), WaitOptions::empty())) {
            Ok(Some((_, status))) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Ending::Exited(u8::try_from(code).unwrap_or(u8::MAX)),
                (None, Some(signal)) => Ending::Killed(signal),
                (None, None) => Ending::Exited(u8::MAX),
            },
            _ => Ending::Exited(u8::MAX),
        }
    }
}

/// Whether the server ended, a signal is there, the server spoke.
fn wait(
    [server, signals]: &[BorrowedFd<'_>; 2],
    link: Option<BorrowedFd<'_>>,
    timeout: Option<std::time::Duration>,
) -> (bool, bool, bool) {
    let timeout = timeout.and_then(|t| Timespec::try_from(t).ok());
    let mut fds = arrayvec::ArrayVec::<PollFd<'_>, 3>::new();
    fds.push(PollFd::new(server, PollFlags::IN));
    fds.push(PollFd::new(signals, PollFlags::IN));
    if let Some(link) = &link {
        fds.push(PollFd::new(link, PollFlags::IN));
    }
    // A failed poll (EINTR) counts as nothing seen; the caller waits again.
    let _ = poll(&mut fds, timeout.as_ref());
    let seen = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
    (seen(0), seen(1), seen(2))
}

/// The server's end of the link.
#[derive(Debug)]
pub struct Server {
    link: OwnedFd,
}

impl Server {
    fn begin(link: OwnedFd) -> Result<Self, Error> {
        let mut go = [0u8];
        if retry(|| rustix::io::read(&link, &mut go)) != Ok(1) {
            return Err(Error::SupervisorGone);
        }
        set_parent_process_death_signal(Some(Signal::KILL))
            .map_err(Error::start("tying it to the supervisor"))?;
        // It may have died before the call above; then its end of the link is closed.
        let mut fds = [PollFd::new(&link, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0) {
            return Err(Error::SupervisorGone);
        }
        drop_groups()?;
        Ok(Self { link })
    }

    /// Tells the supervisor that front ends can connect.
    pub fn ready(self) {
        if let Err(errno) = rustix::io::write(&self.link, b"r") {
            tracing::debug!("telling the supervisor: {errno}");
        }
    }
}

/// Stage 3. Supplementary groups of the daemon's user would otherwise open files to every user of the DPU.
/// Without `CAP_SETGID`, or in a user namespace with a single group, they cannot be dropped, and
/// requests cannot change their identity either, so that the daemon's own identity is all there is.
fn drop_groups() -> Result<(), Error> {
    match set_thread_groups(&[]) {
        Ok(()) | Err(Errno::PERM) => Ok(()),
        Err(errno) => {
            Err(Error::Identity { what: "a process without supplementary groups", source: errno.into() })
        }
    }
}

/// Threads of this process, 1 when the list cannot be read.
fn count_threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(1, Iterator::count)
}

fn message_pair() -> Result<(OwnedFd, OwnedFd), Error> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(Error::start("socketpair"))
}

/// The child's pid, or `None` in the child.
fn fork() -> Result<Option<Pid>, Error> {
    // SAFETY: `split` made sure that this process has one thread, so that the child inherits no
    // lock in a locked state.
    match unsafe { libc::fork() } {
        -1 => Err(Error::Start { step: "fork", source: io::Error::last_os_error() }),
        pid => Ok(Pid::from_raw(pid)),
    }
}

/// Ends the middle process without running anything the supervisor will run, too.
fn leave() -> ! {
    // SAFETY: ends the process; nothing is shared that could be left half done.
    unsafe { libc::_exit(0) }
}

fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_pair() {
        let all = [
            Message::Unshared,
            Message::Server(4711),
            Message::Failed(Step::Unshare, 1),
            Message::Failed(Step::Group, 22),
            Message::Failed(Step::User, 22),
            Message::Failed(Step::Fork, 11),
        ];
        for message in all {
            assert_eq!(Message::decode(message.encode()), Some(message));
        }
        assert_eq!(Message::decode([6, 0, 0, 0, 0]), None);
    }

    #[test]
    fn a_process_with_threads_is_not_split() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        let refused = split(&SandboxOptions::default());
        assert!(matches!(refused, Err(Error::Threads(threads)) if threads > 1), "{refused:?}");
        drop(go);
        assert!(other.join().is_ok());
    }
}
