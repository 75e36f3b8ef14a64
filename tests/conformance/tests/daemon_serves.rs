//! The real daemon in all its isolation under a real driver: a full round of file operations in every
//! sandbox mode with the killing filter, one DPU after the other, and an end in the middle of the work.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::num::NonZeroUsize;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use virtio_driver::daemon::{Daemon, DaemonCommand};
use virtio_driver::device::DeviceOptions;
use virtio_driver::fuse::abi::ROOT;
use virtio_driver::fuse::{DpuKernel, Session, SessionOptions};
use virtio_driver::memory::{Backing, HugepageReservation};
use virtio_driver::ring::Completion;
use virtio_driver::workout::{self, Expectations};

const EVERYTHING: Expectations = Expectations { xattr: true, tmpfile: true, identities: true };

/// The daemon as built: the one in `BACKEND_FS`, or the workspace's own of the same profile.
fn backend_fs() -> PathBuf {
    let built = || {
        let test = std::env::current_exe().unwrap();
        test.parent().and_then(Path::parent).unwrap().join("backend-fs")
    };
    let path = std::env::var_os("BACKEND_FS").map_or_else(built, PathBuf::from);
    assert!(path.is_file(), "{} is missing: run `cargo build -p backend-fs`", path.display());
    path
}

struct Export {
    daemon: Daemon,
    shared: tempfile::TempDir,
    _run: tempfile::TempDir,
}

impl Export {
    fn start(extra: &[&str]) -> Self {
        let shared = tempfile::tempdir_in("/dev/shm").unwrap();
        let run = tempfile::tempdir().unwrap();
        let socket = run.path().join("fs.sock");
        let daemon = DaemonCommand::new(backend_fs(), &socket)
            .args([Path::new("--shared-dir"), shared.path(), Path::new("--socket-path"), &socket])
            .args(["--xattr"])
            .args(extra)
            .spawn()
            .unwrap();
        Export { daemon, shared, _run: run }
    }

    fn mount(&mut self, options: SessionOptions) -> Session {
        Session::mount(self.daemon.connect().unwrap(), options).unwrap()
    }

    fn work_out(&mut self, options: SessionOptions) {
        let mut session = self.mount(options);
        match workout::run(&mut session, self.shared.path(), EVERYTHING) {
            Ok(steps) => assert!(steps > 20),
            Err(failure) => panic!("{failure}; the daemon said: {}", self.daemon.stderr()),
        }
        self.daemon.expect_running().unwrap();
    }
}

#[test]
fn every_sandbox_mode_serves_every_operation() {
    for sandbox in ["namespace", "chroot", "none"] {
        for handles in ["prefer", "never"] {
            println!("--sandbox={sandbox} --inode-file-handles={handles}");
            let arguments = [&format!("--sandbox={sandbox}"), &format!("--inode-file-handles={handles}")];
            Export::start(&arguments.map(String::as_str)).work_out(SessionOptions::default());
        }
    }
}

#[test]
fn every_seccomp_mode_serves_every_operation() {
    for seccomp in ["kill", "trap", "log", "none"] {
        println!("--seccomp={seccomp}");
        Export::start(&["--seccomp", seccomp]).work_out(SessionOptions::default());
    }
}

/// A daemon that is nobody: everything happens as itself, whoever asks.
#[test]
fn unprivileged_daemon_serves_as_itself() {
    const NOBODY: u32 = 65534;
    let place = tempfile::tempdir().unwrap();
    let open = |path: &Path| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
        std::os::unix::fs::chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    };
    open(place.path());
    let program = place.path().join("backend-fs");
    std::fs::copy(backend_fs(), &program).unwrap();
    for (sandbox, maps) in [
        ("namespace", &[][..]),
        ("namespace", &["--uid-map=:0:65534:1:", "--gid-map=:0:65534:1:"]),
        ("none", &[]),
    ] {
        println!("--sandbox={sandbox} {maps:?}");
        let shared = tempfile::tempdir_in("/dev/shm").unwrap();
        open(shared.path());
        let socket = place.path().join("fs.sock");
        let mut daemon = DaemonCommand::new("setpriv", &socket)
            .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
            .args([&program, Path::new("--shared-dir"), shared.path(), Path::new("--socket-path"), &socket])
            .args(["--sandbox", sandbox])
            .args(maps)
            .spawn()
            .unwrap();
        let mut session = Session::mount(daemon.connect().unwrap(), SessionOptions::default()).unwrap();
        // Seen from a user namespace that maps it to root, the owner is root.
        let mapped = !maps.is_empty();
        let client = session.client();
        let made = client.create(ROOT, "file", libc::O_RDWR, 0o640).unwrap();
        client.write(made.entry.nodeid, made.open.fh, 0, b"written").unwrap();
        let directory = client.mkdir(ROOT, "directory", 0o750).unwrap().nodeid;
        client.rename(ROOT, "file", directory, "moved").unwrap();
        assert_eq!(made.entry.attr.uid, if mapped { 0 } else { NOBODY });
        let moved = shared.path().join("directory/moved");
        assert_eq!(std::fs::read(&moved).unwrap(), b"written");
        assert_eq!(std::fs::metadata(&moved).unwrap().uid(), NOBODY);
        drop(session);
        let status = daemon.wait_exit(Duration::from_secs(5)).unwrap();
        assert_eq!(status.code(), Some(0), "{}", daemon.stderr());
    }
}

#[test]
fn both_kernels_and_every_kind_of_ring_are_served() {
    let base = DeviceOptions::default;
    let devices = [
        DeviceOptions { completion: Completion::Polling, ..base() },
        DeviceOptions { indirect: false, ..base() },
        DeviceOptions { event_idx: false, ring_size: 1024, ..base() },
        DeviceOptions {
            event_idx: false,
            indirect: false,
            completion: Completion::Polling,
            memory_slots: false,
            ..base()
        },
    ];
    for device in devices {
        println!("{device:?}");
        Export::start(&[]).work_out(SessionOptions { device, ..Default::default() });
    }
    Export::start(&["--thread-pool-size=4", "--cache=never"])
        .work_out(SessionOptions { kernel: DpuKernel::V6_1, ..Default::default() });
}

#[test]
fn kind_of_memory_is_logged() {
    let mut export = Export::start(&[]);
    export.work_out(SessionOptions::default());
    let line = "DPU memory: 64 MiB shared, memfd, 4K pages";
    assert!(export.daemon.stderr().contains(line), "{}", export.daemon.stderr());

    let memory = 64 << 20;
    let _pages = HugepageReservation::new(NonZeroUsize::new(memory + (4 << 20)).unwrap()).unwrap();
    let device = DeviceOptions { backing: Backing::Hugetlb2M, memory, ..Default::default() };
    let mut export = Export::start(&[]);
    export.work_out(SessionOptions { device, ..Default::default() });
    assert!(export.daemon.stderr().contains("memfd on hugepages of 2M"), "{}", export.daemon.stderr());
}

#[test]
fn one_dpu_after_the_other_is_served_by_the_same_process() {
    let mut export = Export::start(&["--keep-listening"]);
    let pid = export.daemon.pid();
    for round in 0..20 {
        let mut session = export.mount(SessionOptions::default());
        let client = session.client();
        // What the last DPU left open does not count against this one.
        let name = format!("file-{round}");
        let created = client.create(ROOT, &name, libc::O_RDWR, 0o644).unwrap();
        client.write(created.entry.nodeid, created.open.fh, 0, name.as_bytes()).unwrap();
        assert_eq!(std::fs::read(export.shared.path().join(&name)).unwrap(), name.as_bytes());
    }
    export.daemon.expect_running().unwrap();
    assert_eq!(export.daemon.pid(), pid);
    let ended = export.daemon.terminate(Signal::TERM, Duration::from_secs(1));
    assert!(ended.is_ok_and(|status| status.success()), "{}", export.daemon.stderr());
}

#[test]
fn sigterm_in_the_middle_of_work_ends_it_within_a_second() {
    for sandbox in ["namespace", "none"] {
        let mut export = Export::start(&["--sandbox", sandbox]);
        let mut session = export.mount(SessionOptions::default());
        let client = session.client();
        client.set_limit(Duration::from_millis(500));
        let created = client.create(ROOT, "busy", libc::O_RDWR, 0o644).unwrap();
        let (node, handle) = (created.entry.nodeid, created.open.fh);
        let worker = std::thread::spawn(move || {
            let data = vec![7; 128 << 10];
            let mut writes = 0;
            loop {
                match session.client().write(node, handle, (writes % 64) * (128 << 10), &data) {
                    Ok(_) => writes += 1,
                    Err(error) => return (writes, error),
                }
            }
        });
        let busy = export.shared.path().join("busy");
        let deadline = Instant::now() + Duration::from_secs(10);
        // wait-loop: the work shows on the host
        while std::fs::metadata(&busy).unwrap().len() < 8 << 20 {
            assert!(Instant::now() < deadline && !worker.is_finished(), "no work was done");
            std::thread::sleep(Duration::from_millis(1));
        }
        let begin = Instant::now();
        let status = export.daemon.terminate(Signal::TERM, Duration::from_secs(5)).unwrap();
        assert!(begin.elapsed() < Duration::from_secs(1), "{sandbox}: {:?}", begin.elapsed());
        assert_eq!(status.code(), Some(0), "{sandbox}: {}", export.daemon.stderr());
        let (writes, error) = worker.join().unwrap();
        assert!(error.errno().is_none(), "after {writes} writes one was refused: {error}");
    }
}
