//! The daemon without a device: what the server does is one probing action instead of serving.

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::process::ExitCode;

use backend_fs::daemon::notify::Notifier;
use backend_fs::daemon::{self, supervise};
use backend_fs::listener::Leftovers;
use backend_fs::sandbox::mounts::View;
use backend_fs::sandbox::options::{SandboxMode, SandboxOptions, SeccompMode};
use backend_fs::sandbox::process::{Side, split};
use backend_fs::sandbox::signals::SignalFd;
use backend_fs::sandbox::{Confinement, capabilities, descriptors};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, Mode, OFlags, openat, statat};
use rustix::io::Errno;

use crate::forbidden;

struct Plan {
    options: SandboxOptions,
    export: PathBuf,
    readonly: bool,
    file_handles: bool,
    action: Vec<String>,
}

fn plan(arguments: impl Iterator<Item = String>) -> Plan {
    let mut plan = Plan {
        options: SandboxOptions::default(),
        export: PathBuf::new(),
        readonly: false,
        file_handles: false,
        action: Vec::new(),
    };
    for argument in arguments {
        let (name, value) = argument.split_once('=').unwrap_or((&argument, ""));
        match name {
            "--mode" => plan.options.mode = mode(value),
            "--seccomp" => plan.options.seccomp = seccomp(value),
            "--export" => plan.export = value.into(),
            "--readonly" => plan.readonly = true,
            "--handles" => plan.file_handles = true,
            "--modcaps" => plan.options.modcaps = value.parse().unwrap(),
            "--uid-map" => plan.options.uid_map.push(value.parse().unwrap()),
            "--gid-map" => plan.options.gid_map.push(value.parse().unwrap()),
            _ => plan.action.push(argument),
        }
    }
    plan
}

fn mode(name: &str) -> SandboxMode {
    match name {
        "namespace" => SandboxMode::Namespace,
        "chroot" => SandboxMode::Chroot,
        "none" => SandboxMode::None,
        _ => panic!("mode {name}"),
    }
}

fn seccomp(name: &str) -> SeccompMode {
    match name {
        "none" => SeccompMode::None,
        "kill" => SeccompMode::Kill,
        "log" => SeccompMode::Log,
        "trap" => SeccompMode::Trap,
        _ => panic!("seccomp {name}"),
    }
}

/// As `main` of the daemon: the supervisor mirrors, the server acts.
pub fn main(arguments: impl Iterator<Item = String>) -> ExitCode {
    descriptors::close_inherited(None).unwrap();
    let plan = plan(arguments);
    match run(&plan) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let code = error.exit_code();
            if !error.is_reported() {
                let mut line = error.to_string();
                let mut source = error.source();
                while let Some(cause) = source {
                    line = format!("{line}: {cause}");
                    source = cause.source();
                }
                eprintln!("probe: {line}");
            }
            ExitCode::from(code)
        }
    }
}

fn run(plan: &Plan) -> Result<u8, daemon::Error> {
    let signals = SignalFd::take_over()?;
    match split(&plan.options)? {
        Side::Supervisor(supervisor) => {
            let files = Leftovers::default();
            supervise::supervise(supervisor, &plan.options, &signals, &Notifier::default(), files)?;
            Ok(0)
        }
        Side::Server(server) => {
            let confinement = Confinement {
                options: &plan.options,
                export: &plan.export,
                readonly: plan.readonly,
                file_handles: plan.file_handles,
            };
            daemon::log_panics();
            let view = confinement.enter()?;
            confinement.seal(daemon::SERVER_CALLS)?;
            server.ready();
            let words: Vec<&str> = plan.action.iter().map(String::as_str).collect();
            Ok(act(&words, &view, &signals))
        }
    }
}

fn act(words: &[&str], view: &View, signals: &SignalFd) -> u8 {
    match words {
        ["reach", paths @ ..] => reach(paths, view),
        ["reopen", name] => say(&reopen(view, name)),
        ["write", name] => say(&write(view, name)),
        ["identity"] => say(&identity()),
        ["capabilities"] => say(&capabilities_now()),
        ["descriptors"] => say(&open_descriptors(view)),
        ["forbidden", name] => {
            let errno = forbidden::call(name);
            say(&format!("survived {errno}"));
        }
        ["needed"] => needed(),
        ["exit", code] => return code.parse().unwrap(),
        ["panic"] => panic!("told to"),
        ["abort"] => std::process::abort(),
        ["wait"] => {
            say("waiting");
            loop {
                let _ = poll(&mut [PollFd::new(signals, PollFlags::IN)], None);
                if let Some(signal) = signals.next() {
                    say(&format!("signal {}", signal.as_raw()));
                    return 0;
                }
            }
        }
        ["appears", name] => {
            say("waiting");
            crate::run::wait_for(name, crate::run::PATIENCE, || reopen(view, name) == "it did");
            say("it did");
        }
        ["stay"] => {
            say("waiting");
            loop {
                let _ = poll(&mut [], None);
            }
        }
        other => panic!("action {other:?}"),
    }
    0
}

fn say(line: &str) {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}").unwrap();
    stdout.flush().unwrap();
}

/// Tries each path from each starting point a conquered server has, and says what it got.
fn reach(paths: &[&str], view: &View) {
    let starts: [(&str, BorrowedFd<'_>); 3] =
        [("cwd", CWD), ("root", view.root.as_fd()), ("fds", view.proc_self_fd.as_fd())];
    for path in paths {
        for (name, start) in starts {
            let got = match openat(start, *path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
                Ok(fd) => format!("inode {}", rustix::fs::fstat(&fd).unwrap().st_ino),
                Err(errno) => errno_name(errno),
            };
            say(&format!("{name} {path} {got}"));
        }
    }
}

fn errno_name(errno: Errno) -> String {
    format!("errno {}", errno.raw_os_error())
}

/// What the host file system does with every inode it keeps: `O_PATH` first, reopened when needed.
fn reopen(view: &View, name: &str) -> String {
    let node = match openat(&view.root, name, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(node) => node,
        Err(errno) => return errno_name(errno),
    };
    match openat(&view.proc_self_fd, node.as_raw_fd().to_string(), OFlags::RDONLY, Mode::empty()) {
        Ok(fd) => {
            let mut text = String::new();
            File::from(fd).read_to_string(&mut text).unwrap();
            text
        }
        Err(errno) => errno_name(errno),
    }
}

fn write(view: &View, name: &str) -> String {
    match openat(&view.root, name, OFlags::WRONLY | OFlags::CREATE, Mode::RUSR) {
        Ok(fd) => format!("wrote {}", rustix::io::write(fd, b"x").unwrap()),
        Err(errno) => errno_name(errno),
    }
}

fn identity() -> String {
    let uid = rustix::process::getuid().as_raw();
    let gid = rustix::process::getgid().as_raw();
    let groups = rustix::process::getgroups().unwrap().len();
    let pid = rustix::process::getpid().as_raw_nonzero();
    let root = statat(CWD, "/", rustix::fs::AtFlags::empty()).unwrap().st_uid;
    format!("pid {pid} uid {uid} gid {gid} groups {groups} root's owner {root}")
}

fn capabilities_now() -> String {
    use caps::CapSet::{Ambient, Bounding, Effective, Inheritable, Permitted};
    let mut lines = Vec::new();
    for (name, set) in [
        ("effective", Effective),
        ("permitted", Permitted),
        ("inheritable", Inheritable),
        ("bounding", Bounding),
        ("ambient", Ambient),
    ] {
        let mut names: Vec<String> = caps::runtime::thread_all_supported()
            .into_iter()
            .filter(|capability| caps::has_cap(None, set, *capability).unwrap())
            .map(|capability| capability.to_string())
            .collect();
        names.sort();
        lines.push(format!("{name}: {}", names.join(" ")));
    }
    lines.push(format!("no_new_privs: {}", rustix::thread::no_new_privs().unwrap()));
    lines.push(format!("file handles: {}", capabilities::can_use_file_handles()));
    lines.join("\n")
}

/// What is open, as `/proc/self/fd` shows it.
fn open_descriptors(view: &View) -> String {
    let list = openat(&view.proc_self_fd, ".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    let names = rustix::fs::Dir::new(list).unwrap();
    let mut lines = Vec::new();
    for entry in names {
        let name = entry.unwrap().file_name().to_owned();
        if let Ok(target) = rustix::fs::readlinkat(&view.proc_self_fd, &name, Vec::new()) {
            lines.push(format!("{} -> {}", name.to_string_lossy(), target.to_string_lossy()));
        }
    }
    lines.join("\n")
}

/// Calls that would end or derail the probe when they succeed; other cases make them for real.
const NOT_BY_NUMBER: [libc::c_long; 4] = [
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_rt_sigreturn,
    // Takes whatever stack it is given; a thread is started below instead.
    libc::SYS_clone,
];

/// Makes every allowed call once, with arguments that the kernel refuses where it can.
fn needed() {
    let mut count = 0;
    for call in daemon::SERVER_CALLS.iter().copied().flatten() {
        if NOT_BY_NUMBER.contains(&call.number()) {
            continue;
        }
        let [a, b, c, d, e, f] = call.sample_arguments();
        // SAFETY: pointers and descriptors are all ones and refused; the few calls that take such
        // numbers (umask, brk) change nothing that the probe relies on.
        unsafe { libc::syscall(call.number(), a, b, c, d, e, f) };
        count += 1;
    }
    let thread = std::thread::Builder::new().name("probe".into()).spawn(|| 7).unwrap();
    say(&format!("made {count} calls and a thread: {}", thread.join().unwrap()));
}
