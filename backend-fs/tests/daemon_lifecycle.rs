//! The life of the real daemon as its callers see it: what it prints, which files come and go, how it
//! ends. No DPU is needed for that; a front end here says no more than GET_FEATURES.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail by panicking, like tests.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use tempfile::TempDir;

/// Longest wait for anything, on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The line that callers wait for.
const WAITING: &str = "Waiting for vhost-user socket connection...";

const MODES: [&str; 3] = ["namespace", "chroot", "none"];

/// An export and a place for the socket.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("export")).unwrap();
        std::fs::create_dir(directory.path().join("run")).unwrap();
        for name in ["", "export", "run"] {
            let open = std::fs::Permissions::from_mode(0o777);
            std::fs::set_permissions(directory.path().join(name), open).unwrap();
        }
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/fs.sock")
    }

    fn files(&self) -> Vec<OsString> {
        let mut names: Vec<_> =
            std::fs::read_dir(self.path("run")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    }

    /// The daemon with an export and nothing else.
    fn bare(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_backend-fs"));
        command.env_remove("NOTIFY_SOCKET").env_remove("RUST_LOG");
        command.arg("--shared-dir").arg(self.path("export"));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
        command
    }

    fn command(&self) -> Command {
        let mut command = self.bare();
        command.arg("--socket-path").arg(self.socket());
        command
    }
}

/// A daemon with its stderr.
struct Daemon {
    child: Child,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Daemon {
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            stderr.lines().map_while(Result::ok).try_for_each(|line| sender.send(line))
        });
        Self { child, lines, seen: Vec::new() }
    }

    fn ready(command: Command) -> Self {
        let mut daemon = Self::start(command);
        daemon.says(WAITING);
        daemon
    }

    /// Waits for a line on stderr.
    fn says(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => panic!("no '{text}' in {PATIENCE:?}: {:#?}", self.seen),
                Err(RecvTimeoutError::Disconnected) => panic!("ended without '{text}': {:#?}", self.seen),
            }
        }
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    fn server(&self) -> Pid {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        Pid::from_raw(children.split_whitespace().next().expect("a server").parse().unwrap()).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// Waits for the end: exit code, time it took, and all of stderr.
    fn ends(mut self) -> (i32, Duration, Vec<String>) {
        let begin = Instant::now();
        wait_for("the daemon's end", || self.child.try_wait().unwrap().is_some());
        let took = begin.elapsed();
        let status = self.child.wait().unwrap();
        let mut lines = std::mem::take(&mut self.seen);
        lines.extend(self.lines.iter());
        (status.code().unwrap_or_else(|| -status.signal().unwrap()), took, lines)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = kill_process_group(self.pid(), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    // wait-loop: `condition`, until the deadline
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether the daemon serves this front end: asks for the features, `VHOST_USER_GET_FEATURES`.
fn is_served(stream: &mut UnixStream, patience: Duration) -> bool {
    ask(stream);
    is_answered(stream, patience)
}

fn ask(stream: &mut UnixStream) {
    let words = [1u32, 1, 0];
    let header: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&header).unwrap();
}

fn is_answered(stream: &mut UnixStream, patience: Duration) -> bool {
    stream.set_read_timeout(Some(patience)).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).is_ok() && reply[..4] == 1u32.to_ne_bytes()
}

/// Copies by another process: a child that some other test forks meanwhile would inherit the descriptor
/// this process writes to, and a file that is open for writing cannot be executed.
fn copy_program(from: &Path, to: &Path) {
    assert!(Command::new("cp").arg(from).arg(to).status().unwrap().success());
}

fn mounts() -> String {
    std::fs::read_to_string("/proc/self/mountinfo").unwrap()
}

#[test]
fn sigterm_ends_it_quickly_with_0_and_leaves_nothing() {
    let before = mounts();
    for mode in MODES {
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let place = Place::new();
            let mut command = place.command();
            command.arg(format!("--sandbox={mode}"));
            let daemon = Daemon::ready(command);
            let server = daemon.server();
            assert_eq!(place.files(), ["fs.sock", "fs.sock.pid"]);
            daemon.signal(signal);
            let (code, took, lines) = daemon.ends();
            assert_eq!(code, 0, "{mode} {signal:?}: {lines:#?}");
            assert!(took < Duration::from_secs(1), "{mode} {signal:?}: {took:?}");
            assert!(place.files().is_empty(), "{mode}: {:?}", place.files());
            assert!(!Path::new(&format!("/proc/{}", server.as_raw_nonzero())).exists(), "{mode}");
        }
    }
    assert_eq!(mounts(), before);
}

#[test]
fn sigterm_ends_it_with_a_front_end_connected() {
    for mode in MODES {
        let place = Place::new();
        let mut command = place.command();
        command.arg(format!("--sandbox={mode}"));
        let daemon = Daemon::ready(command);
        let mut front_end = UnixStream::connect(place.socket()).unwrap();
        assert!(is_served(&mut front_end, PATIENCE), "{mode}");
        daemon.signal(Signal::TERM);
        let (code, took, lines) = daemon.ends();
        assert_eq!(code, 0, "{mode}: {lines:#?}");
        assert!(took < Duration::from_secs(1), "{mode}: {took:?}");
        assert!(place.files().is_empty());
    }
}

#[test]
fn waiting_line_is_exact_on_every_log_level() {
    for level in ["off", "info"] {
        let place = Place::new();
        let mut command = place.command();
        command.arg("--log-level").arg(level);
        let mut daemon = Daemon::start(command);
        assert_eq!(daemon.says(WAITING), WAITING, "{level}");
        // It is true: somebody accepts.
        let mut front_end = UnixStream::connect(place.socket()).unwrap();
        assert!(is_served(&mut front_end, PATIENCE));
    }
}

#[test]
fn disconnect_ends_it_with_0() {
    for mode in MODES {
        let place = Place::new();
        let mut command = place.command();
        command.arg(format!("--sandbox={mode}"));
        let daemon = Daemon::ready(command);
        let mut front_end = UnixStream::connect(place.socket()).unwrap();
        assert!(is_served(&mut front_end, PATIENCE), "{mode}");
        drop(front_end);
        let (code, _, lines) = daemon.ends();
        assert_eq!(code, 0, "{mode}: {lines:#?}");
        assert!(place.files().is_empty());
    }
}

#[test]
fn second_front_end_is_refused_while_the_only_one_is_served() {
    let place = Place::new();
    let _daemon = Daemon::ready(place.command());
    let mut front_end = UnixStream::connect(place.socket()).unwrap();
    assert!(is_served(&mut front_end, PATIENCE));
    let error = UnixStream::connect(place.socket()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    assert!(is_served(&mut front_end, PATIENCE), "the first one is not disturbed");
}

#[test]
fn keep_listening_serves_one_front_end_after_the_other() {
    let place = Place::new();
    let mut command = place.command();
    command.arg("--keep-listening");
    let mut daemon = Daemon::ready(command);
    let pid = daemon.server();
    for _ in 0..50 {
        let mut front_end = UnixStream::connect(place.socket()).unwrap();
        assert!(is_served(&mut front_end, PATIENCE));
    }
    let mut first = UnixStream::connect(place.socket()).unwrap();
    assert!(is_served(&mut first, PATIENCE));
    let mut second = UnixStream::connect(place.socket()).unwrap();
    daemon.says("another front end has connected");
    ask(&mut second);
    assert!(!is_answered(&mut second, Duration::from_millis(50)), "one at a time");
    drop(first);
    assert!(is_answered(&mut second, PATIENCE), "the one that waited is next");
    assert_eq!(daemon.server(), pid);
    let fds = std::fs::read_dir(format!("/proc/{}/fd", pid.as_raw_nonzero())).unwrap().count();
    assert!(fds < 40, "{fds} descriptors after 52 front ends");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.ends().0, 0);
}

#[test]
fn garbage_from_a_front_end_is_an_error_of_that_front_end() {
    let place = Place::new();
    let mut command = place.command();
    command.arg("--keep-listening");
    let mut daemon = Daemon::ready(command);
    let mut front_end = UnixStream::connect(place.socket()).unwrap();
    front_end.write_all(&[0xff; 64]).unwrap();
    daemon.says("front end dropped: ");
    let mut next = UnixStream::connect(place.socket()).unwrap();
    assert!(is_served(&mut next, PATIENCE));

    // The only front end: its error is the daemon's.
    let place = Place::new();
    let daemon = Daemon::ready(place.command());
    let mut front_end = UnixStream::connect(place.socket()).unwrap();
    front_end.write_all(&[0xff; 64]).unwrap();
    let (code, _, lines) = daemon.ends();
    assert_eq!(code, 1, "{lines:#?}");
    assert!(place.files().is_empty());
}

/// Gives `fd` to the daemon as descriptor number `number`, and nothing else but a stray one.
fn start_with_fd(place: &Place, fd: &OwnedFd, number: i32) -> Daemon {
    // The shell keeps descriptors open that it was given without close-on-exec; `sh` may not know
    // numbers above 9.
    let script = format!("exec {number}<&{} 200</; exec \"$@\" --fd={number}", fd.as_raw_fd());
    let bare = place.bare();
    let mut command = Command::new("bash");
    command.args(["-c", &script, "bash"]).arg(bare.get_program()).args(bare.get_args());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).process_group(0);
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).unwrap();
    let daemon = Daemon::start(command);
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC).unwrap();
    daemon
}

#[test]
fn inherited_listening_socket_is_served() {
    let place = Place::new();
    let listener: OwnedFd = UnixListener::bind(place.socket()).unwrap().into();
    let mut daemon = start_with_fd(&place, &listener, 5);
    drop(listener);
    daemon.says(WAITING);
    let mut front_end = UnixStream::connect(place.socket()).unwrap();
    assert!(is_served(&mut front_end, PATIENCE));
    drop(front_end);
    assert_eq!(daemon.ends().0, 0);
    assert_eq!(
        place.files(),
        ["fs.sock"],
        "a socket that was passed in is its maker's, and there is no pid file"
    );
}

#[test]
fn inherited_connected_socket_is_served() {
    let place = Place::new();
    let (mut front_end, there) = UnixStream::pair().unwrap();
    let there: OwnedFd = there.into();
    let daemon = start_with_fd(&place, &there, 9);
    drop(there);
    assert!(is_served(&mut front_end, PATIENCE));
    drop(front_end);
    let (code, _, lines) = daemon.ends();
    assert_eq!(code, 0, "{lines:#?}");
    assert!(!lines.iter().any(|line| line.contains(WAITING)), "nobody is waited for: {lines:#?}");
}

#[test]
fn stray_descriptors_do_not_reach_the_sandbox() {
    let place = Place::new();
    let listener: OwnedFd = UnixListener::bind(place.socket()).unwrap().into();
    let mut daemon = start_with_fd(&place, &listener, 5);
    daemon.says(WAITING);
    for pid in [daemon.pid(), daemon.server()] {
        let stray = format!("/proc/{}/fd/200", pid.as_raw_nonzero());
        assert!(std::fs::symlink_metadata(&stray).is_err(), "{stray} -> {:?}", std::fs::read_link(&stray));
    }
}

#[test]
fn wrong_descriptor_is_refused() {
    let place = Place::new();
    let (reader, _writer) = std::io::pipe().unwrap();
    let daemon = start_with_fd(&place, &reader.into(), 5);
    let (code, _, lines) = daemon.ends();
    assert_eq!((code, lines.len()), (1, 1), "{lines:#?}");
    assert!(lines[0].starts_with("backend-fs: --fd 5: not a socket"), "{lines:#?}");
}

#[test]
fn busy_socket_is_one_clear_line_and_exit_code_1() {
    let place = Place::new();
    let first = Daemon::ready(place.command());
    let (code, _, lines) = Daemon::start(place.command()).ends();
    assert_eq!((code, lines.len()), (1, 1), "{lines:#?}");
    let pid = first.pid().as_raw_nonzero();
    assert!(lines[0].contains(&format!("another daemon (pid {pid}) serves it")), "{lines:#?}");
    let mut front_end = UnixStream::connect(place.socket()).unwrap();
    assert!(is_served(&mut front_end, PATIENCE), "the first one is not disturbed");
}

#[test]
fn stale_socket_of_a_killed_daemon_is_replaced() {
    let place = Place::new();
    let daemon = Daemon::ready(place.command());
    let server = daemon.server();
    daemon.signal(Signal::KILL);
    assert_eq!(daemon.ends().0, -libc::SIGKILL);
    wait_for("the server's end", || !Path::new(&format!("/proc/{}", server.as_raw_nonzero())).exists());
    assert_eq!(place.files(), ["fs.sock", "fs.sock.pid"]);
    let _daemon = Daemon::ready(place.command());
    let mut front_end = UnixStream::connect(place.socket()).unwrap();
    assert!(is_served(&mut front_end, PATIENCE));
}

#[test]
fn dead_server_is_reported_and_its_files_removed() {
    let place = Place::new();
    let daemon = Daemon::ready(place.command());
    kill_process(daemon.server(), Signal::KILL).unwrap();
    let (code, _, lines) = daemon.ends();
    assert_eq!(code, 128 + libc::SIGKILL);
    assert!(lines.last().unwrap().contains("killed by signal 9 (SIGKILL)"), "{lines:#?}");
    assert!(place.files().is_empty());
}

#[test]
fn socket_has_mode_owner_and_group() {
    let place = Place::new();
    let mut command = place.command();
    command.args(["--socket-mode=0606", "--socket-owner=nobody", "--socket-group=daemon"]);
    let _daemon = Daemon::ready(command);
    let metadata = std::fs::symlink_metadata(place.socket()).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o606);
    assert_eq!((metadata.uid(), metadata.gid()), (65534, 1));
    let pid_file = std::fs::metadata(place.path("run/fs.sock.pid")).unwrap();
    assert_eq!(pid_file.permissions().mode() & 0o7777, 0o600);
}

#[test]
fn relative_and_over_long_socket_paths_work() {
    let place = Place::new();
    let mut command = place.bare();
    command.current_dir(place.path("run")).args(["--socket-path", "fs.sock"]);
    let daemon = Daemon::ready(command);
    assert!(is_served(&mut UnixStream::connect(place.socket()).unwrap(), PATIENCE));
    assert_eq!(daemon.ends().0, 0);
    assert!(place.files().is_empty());

    let deep = place.path("run").join("d".repeat(150));
    std::fs::create_dir(&deep).unwrap();
    let mut command = place.bare();
    command.arg("--socket-path").arg(deep.join("fs.sock"));
    let daemon = Daemon::ready(command);
    let handle = std::fs::File::open(&deep).unwrap();
    let short = format!("/proc/self/fd/{}/fs.sock", handle.as_raw_fd());
    assert!(is_served(&mut UnixStream::connect(short).unwrap(), PATIENCE));
    assert_eq!(daemon.ends().0, 0);
    assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 0);
}

#[test]
fn service_manager_is_told() {
    let place = Place::new();
    let by_path = UnixDatagram::bind(place.path("notify")).unwrap();
    let name = format!("backend-fs-test-{}", std::process::id());
    let by_name = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
    for (socket, name) in
        [(by_path, place.path("notify").into_os_string()), (by_name, format!("@{name}").into())]
    {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut command = place.command();
        command.env("NOTIFY_SOCKET", &name);
        let daemon = Daemon::start(command);
        let mut word = [0; 100];
        let len = socket.recv(&mut word).unwrap();
        assert!(word[..len].starts_with(b"READY=1\n"));
        assert!(UnixStream::connect(place.socket()).is_ok(), "it told too early");
        daemon.signal(Signal::TERM);
        let len = socket.recv(&mut word).unwrap();
        assert!(word[..len].starts_with(b"STOPPING=1"));
        assert_eq!(daemon.ends().0, 0);
    }
}

#[test]
fn limit_of_open_files_is_raised_as_far_as_it_goes() {
    let limits =
        |pid: Pid| std::fs::read_to_string(format!("/proc/{}/limits", pid.as_raw_nonzero())).unwrap();
    let open_files = |pid: Pid| {
        let limits = limits(pid);
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap().to_owned();
        line.split_whitespace().nth(3).unwrap().parse::<u64>().unwrap()
    };
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap();
    let place = Place::new();
    let daemon = Daemon::ready(place.command());
    let got = open_files(daemon.server());
    assert!(got == 1_000_000 || got == hard, "{got}");
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.ends().0, 0);

    let mut command = place.command();
    command.arg("--rlimit-nofile=5000");
    let daemon = Daemon::ready(command);
    assert_eq!(open_files(daemon.server()), 5000);
    daemon.signal(Signal::TERM);
    assert_eq!(daemon.ends().0, 0);

    let mut command = place.command();
    command.arg(format!("--rlimit-nofile={}", u32::MAX));
    let (code, _, lines) = Daemon::start(command).ends();
    assert_eq!((code, lines.len()), (1, 1), "{lines:#?}");
    assert!(lines[0].contains("--rlimit-nofile"), "{lines:#?}");
}

#[test]
fn unprivileged_daemon_serves_from_its_own_namespaces() {
    for mode in ["namespace", "none"] {
        let place = Place::new();
        let program = place.path("backend-fs");
        copy_program(Path::new(env!("CARGO_BIN_EXE_backend-fs")), &program);
        let with_path = place.command();
        let mut command = Command::new(program);
        command.args(with_path.get_args()).arg(format!("--sandbox={mode}"));
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        command.uid(65534).gid(65534).process_group(0);
        let daemon = Daemon::ready(command);
        let mut front_end = UnixStream::connect(place.socket()).unwrap();
        assert!(is_served(&mut front_end, PATIENCE), "{mode}");
        daemon.signal(Signal::TERM);
        let (code, took, lines) = daemon.ends();
        assert_eq!(code, 0, "{mode}: {lines:#?}");
        assert!(took < Duration::from_secs(1), "{mode}: {took:?}");
        assert!(place.files().is_empty());
    }
}
