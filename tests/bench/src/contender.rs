//! Who competes, how each is started, and what it answers with before anything is measured.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Serialize;
use virtio_driver::daemon::{Daemon, DaemonCommand};
use virtio_driver::device::DeviceOptions;
use virtio_driver::fuse::abi::ROOT;
use virtio_driver::fuse::{Session, SessionOptions};
use virtio_driver::memory::Backing;
use virtio_driver::ring::Completion;

use crate::args::FsArguments;
use crate::fixture::{self, Fixture};
use crate::measure::DAEMON_CPU;

/// A daemon in the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Contender {
    /// virtiofsd 1.14 as it comes.
    Virtiofsd,
    /// virtiofsd 1.14 with `--inode-file-handles=never`, which costs it fewer system calls.
    VirtiofsdNoHandles,
    /// The C virtiofsd of QEMU 7.2.
    CVirtiofsd,
    /// backend-fs.
    Ours,
    /// backend-fs over DPU memory of hugepages.
    OursHugepages,
}

impl Contender {
    /// Column title.
    pub fn title(self) -> &'static str {
        match self {
            Contender::Virtiofsd => "virtiofsd",
            Contender::VirtiofsdNoHandles => "no file\nhandles",
            Contender::CVirtiofsd => "C\nvirtiofsd",
            Contender::Ours => "ours",
            Contender::OursHugepages => "ours\nhugepages",
        }
    }

    fn program(self, args: &FsArguments) -> &Path {
        match self {
            Contender::Virtiofsd | Contender::VirtiofsdNoHandles => &args.virtiofsd,
            Contender::CVirtiofsd => &args.c_virtiofsd,
            Contender::Ours | Contender::OursHugepages => &args.ours,
        }
    }

    fn remedy(self) -> &'static str {
        match self {
            Contender::Virtiofsd | Contender::VirtiofsdNoHandles => {
                "run `tests/setup peers` (or set VIRTIOFSD or --virtiofsd)"
            }
            Contender::CVirtiofsd => "run `tests/setup packages` (Debian package qemu-system-common 7.2)",
            Contender::Ours | Contender::OursHugepages => "run `make build` (or give --ours)",
        }
    }

    fn command(self, args: &FsArguments, shared: &Path, socket: &Path) -> DaemonCommand {
        let command = DaemonCommand::new(self.program(args), socket);
        let rust = |command: DaemonCommand| {
            command
                .args([Path::new("--shared-dir"), shared, Path::new("--socket-path"), socket])
                .args(["--sandbox", "none"])
        };
        match self {
            Contender::Virtiofsd | Contender::Ours | Contender::OursHugepages => rust(command),
            Contender::VirtiofsdNoHandles => rust(command).args(["--inode-file-handles=never"]),
            Contender::CVirtiofsd => command
                .args(["-o".to_owned(), format!("source={}", shared.display())])
                .args(["-o".to_owned(), "cache=auto".to_owned()])
                .args([format!("--socket-path={}", socket.display())]),
        }
    }

    /// An error that names what is missing and how to get it, unless every program is there.
    pub fn check_all(contenders: &[Contender], args: &FsArguments) -> anyhow::Result<()> {
        let missing: Vec<String> = contenders
            .iter()
            .filter(|contender| !contender.program(args).is_file())
            .map(|contender| {
                format!("  {} is missing: {}", contender.program(args).display(), contender.remedy())
            })
            .collect();
        if !missing.is_empty() {
            let mut lines = missing;
            lines.dedup();
            bail!("cannot compare, programs are missing:\n{}", lines.join("\n"));
        }
        Ok(())
    }
}

/// A small file as a contender knows it.
#[derive(Clone, Debug)]
pub struct SmallFile {
    /// Name in the root.
    pub name: String,
    /// Node.
    pub node: u64,
    /// Inode number.
    pub ino: u64,
    /// Size in bytes.
    pub size: u64,
}

/// A started contender with everything opened that the rounds need.
#[derive(Debug)]
pub struct Rig {
    /// Who it is.
    pub contender: Contender,
    /// Its processes.
    pub processes: Vec<u32>,
    /// The mounted session.
    pub session: Session,
    /// File that is read: node and handle.
    pub data: (u64, u64),
    /// File that is written: node and handle.
    pub scratch: (u64, u64),
    /// The same file on the host.
    pub scratch_path: PathBuf,
    /// Files for metadata requests.
    pub small: Vec<SmallFile>,
    /// Directory that is listed: node and handle.
    pub listed: (u64, u64),
    /// Directory for creating files.
    pub nursery: u64,
    /// The same directory on the host.
    pub nursery_path: PathBuf,
    daemon: Daemon,
    _run: tempfile::TempDir,
}

impl Rig {
    /// Starts a contender, binds it to its CPU and opens its files.
    pub fn start(contender: Contender, args: &FsArguments, fixture: &Fixture) -> anyhow::Result<Self> {
        Self::try_start(contender, args, fixture)
            .with_context(|| format!("cannot start {}", contender.title().replace('\n', " ")))
    }

    fn try_start(contender: Contender, args: &FsArguments, fixture: &Fixture) -> anyhow::Result<Self> {
        let run = tempfile::tempdir()?;
        let socket = run.path().join("fs.sock");
        let mut daemon = contender.command(args, fixture.path(), &socket).spawn()?;
        let stream = daemon.connect()?;
        let device = DeviceOptions {
            ring_size: 1024,
            memory: 128 << 20,
            completion: Completion::Polling,
            backing: if contender == Contender::OursHugepages { Backing::Hugetlb2M } else { Backing::Memfd },
            ..Default::default()
        };
        let mut session = Session::mount(stream, SessionOptions { device, ..Default::default() })
            .with_context(|| format!("its stderr: {}", daemon.stderr()))?;
        daemon.pin_to(DAEMON_CPU)?;

        let name = format!("{contender:?}");
        let scratch_path = fixture.scratch(&format!("scratch-{name}"))?;
        let nursery_path = fixture.path().join(format!("nursery-{name}"));
        std::fs::create_dir(&nursery_path)?;

        let client = session.client();
        let open =
            |client: &mut virtio_driver::fuse::Client, name: &str, flags| -> anyhow::Result<(u64, u64)> {
                let node = client.lookup(ROOT, name)?.nodeid;
                Ok((node, client.open(node, flags)?.fh))
            };
        let data = open(client, fixture::DATA, libc::O_RDONLY)?;
        let scratch = open(client, &format!("scratch-{name}"), libc::O_RDWR)?;
        let small = (0..fixture::SMALL_FILES)
            .map(|index| {
                let name = fixture::small_name(index);
                let entry = client.lookup(ROOT, &name)?;
                Ok(SmallFile {
                    name,
                    node: entry.nodeid,
                    ino: entry.attr.ino,
                    size: fixture::small_size(index),
                })
            })
            .collect::<anyhow::Result<_>>()?;
        let listed = client.lookup(ROOT, fixture::LISTED_DIR)?.nodeid;
        let listed = (listed, client.opendir(listed)?.fh);
        let nursery = client.lookup(ROOT, format!("nursery-{name}"))?.nodeid;
        Ok(Rig {
            contender,
            processes: daemon.processes(),
            session,
            data,
            scratch,
            scratch_path,
            small,
            listed,
            nursery,
            nursery_path,
            daemon,
            _run: run,
        })
    }

    /// Changes how the driver learns of completions.
    pub fn set_completion(&mut self, completion: Completion) {
        self.session.client().ring_mut().set_completion(completion);
    }

    /// An error if the daemon has ended.
    pub fn expect_running(&mut self) -> anyhow::Result<()> {
        Ok(self.daemon.expect_running()?)
    }
}
