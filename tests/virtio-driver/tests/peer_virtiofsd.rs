//! The driver against the reference daemon, virtiofsd 1.14: if the whole workout passes there over every kind of ring
//! and memory, the driver's chains, messages and expectations are right.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use virtio_driver::daemon::{Daemon, DaemonCommand};
use virtio_driver::device::DeviceOptions;
use virtio_driver::frontend::wire::{Message, Request};
use virtio_driver::fuse::abi::ROOT;
use virtio_driver::fuse::{DpuKernel, Session, SessionOptions};
use virtio_driver::memory::{Backing, HugepageReservation};
use virtio_driver::ring::Completion;
use virtio_driver::workout::{self, Expectations};

/// What virtiofsd 1.14 can do when it is started as [`Export::start`] does.
const VIRTIOFSD: Expectations = Expectations { xattr: true, tmpfile: false, identities: true };

fn virtiofsd() -> PathBuf {
    let path = std::env::var_os("VIRTIOFSD").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../.cache/peers/bin/virtiofsd")),
        PathBuf::from,
    );
    assert!(
        path.is_file(),
        "{} is missing: run `make peers` to build virtiofsd 1.14, or set VIRTIOFSD to its path",
        path.display()
    );
    path
}

/// A directory on tmpfs and a daemon that exports it.
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
        let daemon = DaemonCommand::new(virtiofsd(), &socket)
            .args([Path::new("--shared-dir"), shared.path(), Path::new("--socket-path"), &socket])
            .args(["--sandbox", "none", "--xattr"])
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
        let steps = workout::run(&mut session, self.shared.path(), VIRTIOFSD).unwrap();
        assert!(steps > 20);
        self.daemon.expect_running().unwrap();
    }
}

fn options(device: DeviceOptions) -> SessionOptions {
    SessionOptions { device, ..Default::default() }
}

#[test]
fn workout_passes_with_eventfds_and_indirect_descriptors() {
    Export::start(&[]).work_out(SessionOptions::default());
}

#[test]
fn workout_passes_with_polling() {
    let device = DeviceOptions { completion: Completion::Polling, ..Default::default() };
    Export::start(&[]).work_out(options(device));
}

#[test]
fn workout_passes_without_indirect_descriptors() {
    let device = DeviceOptions { indirect: false, ..Default::default() };
    Export::start(&[]).work_out(options(device));
}

#[test]
fn workout_passes_without_event_idx_on_a_large_ring() {
    let device = DeviceOptions { event_idx: false, ring_size: 1024, ..Default::default() };
    Export::start(&[]).work_out(options(device));
}

#[test]
fn workout_passes_polling_a_plain_ring() {
    let device = DeviceOptions {
        event_idx: false,
        indirect: false,
        completion: Completion::Polling,
        memory_slots: false,
        ..Default::default()
    };
    Export::start(&[]).work_out(options(device));
}

#[test]
fn workout_passes_as_linux_6_1_with_a_thread_pool() {
    let options = SessionOptions { kernel: DpuKernel::V6_1, ..Default::default() };
    Export::start(&["--thread-pool-size=4"]).work_out(options);
}

#[test]
fn workout_passes_over_hugepages() {
    let memory = 64 << 20;
    let _pages = HugepageReservation::new(NonZeroUsize::new(memory + (4 << 20)).unwrap()).unwrap();
    let device = DeviceOptions { backing: Backing::Hugetlb2M, memory, ..Default::default() };
    Export::start(&[]).work_out(options(device));
}

#[test]
fn a_missing_program_is_named_with_the_way_out() {
    let error = DaemonCommand::new("/nonexistent/daemon", "/nonexistent/socket")
        .hint("run `make peers`")
        .spawn()
        .unwrap_err()
        .to_string();
    assert!(error.contains("/nonexistent/daemon") && error.contains("make peers"), "{error}");
}

#[test]
fn a_daemon_that_ends_at_once_is_reported_with_its_stderr() {
    let mut export = Export::start(&["--no-such-option"]);
    let error = export.daemon.connect().unwrap_err().to_string();
    assert!(error.contains("exit code 2") && error.contains("no-such-option"), "{error}");
}

#[test]
fn terminating_and_disconnecting_end_the_daemon() {
    let mut export = Export::start(&[]);
    drop(export.mount(SessionOptions::default()));
    let status = export.daemon.wait_exit(Duration::from_secs(5)).unwrap();
    assert_eq!(status.code(), Some(0));

    let mut export = Export::start(&[]);
    let _session = export.mount(SessionOptions::default());
    export.daemon.terminate(Signal::TERM, Duration::from_secs(5)).unwrap();
}

#[test]
fn a_restarted_queue_serves_on() {
    let mut export = Export::start(&[]);
    let mut session = export.mount(SessionOptions::default());
    for _ in 0..5 {
        session.client().getattr(ROOT, None).unwrap();
        session.restart_queue(0).unwrap();
    }
    session.client().getattr(ROOT, None).unwrap();
}

#[test]
fn daemon_figures_are_measured() {
    let mut export = Export::start(&[]);
    let mut session = export.mount(SessionOptions::default());
    let (fds, cpu) = (export.daemon.open_fds(), export.daemon.cpu_time());
    std::fs::write(export.shared.path().join("f"), "").unwrap();
    let node = session.client().lookup(ROOT, "f").unwrap().nodeid;
    let handles: Vec<u64> =
        (0..10).map(|_| session.client().open(node, libc::O_RDONLY).unwrap().fh).collect();
    assert!(export.daemon.open_fds() >= fds + handles.len());
    assert!(export.daemon.cpu_time() > cpu);
    assert!(export.daemon.private_memory() > 0);
}

#[test]
fn an_unknown_message_ends_virtiofsd_and_is_seen_as_a_disconnect() {
    let mut export = Export::start(&[]);
    let session = export.mount(SessionOptions::default());
    let frontend = session.device().frontend();
    let unknown = Message { request: 4711, ..Message::new(Request::GetFeatures, &[]) };
    frontend.send_raw(&unknown).unwrap();
    frontend.get_features().unwrap_err();
}
