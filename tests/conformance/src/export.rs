//! A daemon under test with its export, and the questions to ask after an attack.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use virtio_driver::daemon::{Daemon, DaemonCommand};
use virtio_driver::device::DeviceOptions;
use virtio_driver::fuse::abi::ROOT;
use virtio_driver::fuse::{Session, SessionOptions};
use virtio_driver::ring::Completion;

use crate::snapshot::Snapshot;

/// Private memory a daemon may gain under any attack, in bytes.
pub const MEMORY_SLACK: u64 = 64 << 20;

/// Descriptors a daemon may keep after an attack whose nodes and handles were given back.
pub const FD_SLACK: usize = 64;

/// How the daemon isolates itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sandbox {
    /// Not at all: only the daemon's own checks stand.
    None,
    /// `chroot` into the export.
    Chroot,
    /// Namespaces and `pivot_root`.
    Namespace,
}

impl Sandbox {
    /// Every mode.
    pub const ALL: [Sandbox; 3] = [Sandbox::None, Sandbox::Chroot, Sandbox::Namespace];

    fn name(self) -> &'static str {
        match self {
            Sandbox::None => "none",
            Sandbox::Chroot => "chroot",
            Sandbox::Namespace => "namespace",
        }
    }
}

/// Where things are in the yard: `share` is exported, `outside` is what no DPU may touch.
#[derive(Debug)]
pub struct Yard {
    dir: tempfile::TempDir,
}

/// Content of the canary file outside the export.
pub const CANARY: &[u8] = b"the canary sings";

/// Content of the witness file inside the export.
pub const WITNESS: &[u8] = b"the witness was here";

impl Yard {
    /// A fresh yard on tmpfs.
    pub fn new() -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("conformance-").tempdir_in("/dev/shm")?;
        let yard = Yard { dir };
        std::fs::create_dir_all(yard.share().join("sub"))?;
        std::fs::create_dir_all(yard.outside().join("dir"))?;
        std::fs::write(yard.share().join("witness"), WITNESS)?;
        std::fs::write(yard.share().join("sub/inner"), b"inner")?;
        std::fs::write(yard.outside().join("canary"), CANARY)?;
        std::fs::write(yard.outside().join("dir/chick"), CANARY)?;
        Ok(yard)
    }

    /// The exported directory.
    pub fn share(&self) -> PathBuf {
        self.dir.path().join("share")
    }

    /// The directory beside it.
    pub fn outside(&self) -> PathBuf {
        self.dir.path().join("outside")
    }
}

/// A running daemon and its export.
#[derive(Debug)]
pub struct Export {
    /// Directories.
    pub yard: Yard,
    /// The process.
    pub daemon: Daemon,
    outside: Snapshot,
    start: Option<Usage>,
    _run: tempfile::TempDir,
}

/// What a daemon uses.
#[derive(Clone, Copy, Debug)]
struct Usage {
    fds: usize,
    memory: u64,
}

/// The daemon under test.
pub fn backend_fs() -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("BACKEND_FS").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/release/backend-fs")),
        PathBuf::from,
    );
    ensure!(
        path.is_file(),
        "{} is missing: run `make build`, or set BACKEND_FS to the daemon under test",
        path.display()
    );
    Ok(path)
}

impl Export {
    /// Starts a daemon on a fresh yard.
    pub fn start(sandbox: Sandbox, extra: &[&str]) -> anyhow::Result<Self> {
        Self::start_on(Yard::new()?, sandbox, extra)
    }

    /// Starts a daemon on a prepared yard.
    pub fn start_on(yard: Yard, sandbox: Sandbox, extra: &[&str]) -> anyhow::Result<Self> {
        let run = tempfile::tempdir()?;
        let socket = run.path().join("fs.sock");
        let daemon = DaemonCommand::new(backend_fs()?, &socket)
            .args([Path::new("--shared-dir"), &yard.share(), Path::new("--socket-path"), &socket])
            .args(["--sandbox", sandbox.name()])
            .args(extra)
            .spawn()?;
        let outside = Snapshot::of(&yard.outside())?;
        Ok(Export { yard, daemon, outside, start: None, _run: run })
    }

    /// Mounts with options for attacks: a sleeping driver and a ring large enough for long chains.
    pub fn mount(&mut self) -> anyhow::Result<Session> {
        let device = DeviceOptions { ring_size: 1024, ..Default::default() };
        self.mount_with(SessionOptions { device, ..Default::default() })
    }

    /// Mounts with a polling driver.
    pub fn mount_polling(&mut self) -> anyhow::Result<Session> {
        let device = DeviceOptions { ring_size: 1024, completion: Completion::Polling, ..Default::default() };
        self.mount_with(SessionOptions { device, ..Default::default() })
    }

    /// Mounts as told.
    pub fn mount_with(&mut self, options: SessionOptions) -> anyhow::Result<Session> {
        let stream = self.daemon.connect()?;
        let session = Session::mount(stream, options)
            .with_context(|| format!("the daemon's stderr:\n{}", self.daemon.stderr()))?;
        self.start.get_or_insert(usage(&self.daemon));
        Ok(session)
    }

    /// Path inside the export, on the host.
    pub fn inside(&self, path: &str) -> PathBuf {
        self.yard.share().join(path)
    }

    /// Fails unless the daemon runs, serves this session, and nothing outside the export changed.
    pub fn check(&mut self, session: &mut Session) -> anyhow::Result<()> {
        self.check_alive()?;
        let serves = Self::serve(session);
        self.explain(serves)
    }

    /// A few plain requests with known answers.
    fn serve(session: &mut Session) -> anyhow::Result<()> {
        let client = session.client();
        client.getattr(ROOT, None)?;
        let witness = client.lookup(ROOT, "witness")?;
        let open = client.open(witness.nodeid, libc::O_RDONLY)?;
        let content = client.read(witness.nodeid, open.fh, 0, 4096)?;
        ensure!(content == WITNESS, "the witness reads {content:?}");
        client.release(witness.nodeid, open.fh)?;
        Ok(client.forget(witness.nodeid, 1)?)
    }

    /// Adds to a failed result why the daemon ended, if it did, and what it printed.
    pub fn explain<T, E: Into<anyhow::Error>>(&mut self, result: Result<T, E>) -> anyhow::Result<T> {
        result.map_err(|error| {
            // A closed connection comes before the end of the process.
            let _ = self.daemon.wait_exit(Duration::from_secs(1));
            let end = self.daemon.expect_running().err().map(|end| end.to_string());
            let end =
                end.unwrap_or_else(|| format!("the daemon runs; its stderr:\n{}", self.daemon.stderr()));
            error.into().context(end)
        })
    }

    /// Fails unless the daemon runs and nothing outside the export changed.
    pub fn check_alive(&mut self) -> anyhow::Result<()> {
        self.daemon.expect_running()?;
        let changes = self.outside.changes()?;
        ensure!(changes.is_empty(), "an attack reached out of the export:\n{}", changes.join("\n"));
        let stderr = self.daemon.stderr();
        ensure!(!stderr.contains("panicked at"), "the daemon panicked:\n{stderr}");
        Ok(())
    }

    /// Fails if the daemon uses more than it may after an attack whose nodes and handles were given back.
    pub fn check_usage(&self) -> anyhow::Result<()> {
        let Some(start) = self.start else { return Ok(()) };
        let now = usage(&self.daemon);
        ensure!(now.fds <= start.fds + FD_SLACK, "descriptors grew from {} to {}", start.fds, now.fds);
        self.check_memory()
    }

    /// Fails if the daemon uses more memory of its own than it may.
    pub fn check_memory(&self) -> anyhow::Result<()> {
        let Some(start) = self.start else { return Ok(()) };
        let now = usage(&self.daemon);
        ensure!(
            now.memory <= start.memory + MEMORY_SLACK,
            "private memory grew from {} to {} KiB",
            start.memory >> 10,
            now.memory >> 10
        );
        Ok(())
    }
}

fn usage(daemon: &Daemon) -> Usage {
    Usage { fds: daemon.open_fds(), memory: daemon.private_memory() }
}
