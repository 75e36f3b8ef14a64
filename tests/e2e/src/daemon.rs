//! The daemon under test as a host process: `backend-fs` or `virtiofsd`, started with the same arguments.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::apt::run_tool;
use crate::deadline::wait_for;
use crate::registry::{Group, Scratch, describe_exit};

/// How long a daemon may take until its socket is there.
const START_LIMIT: Duration = Duration::from_secs(10);

/// How long a daemon may take to end after its DPU is gone.
const END_LIMIT: Duration = Duration::from_secs(10);

/// Bytes of the daemon's log that an error quotes.
const LOG_TAIL: usize = 2000;

/// Which daemon it is; it decides what is expected of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flavor {
    /// The daemon of this repository.
    BackendFs,
    /// The reference daemon that it replaces.
    Virtiofsd,
}

/// A daemon's program file.
#[derive(Clone, Debug)]
pub struct DaemonProgram {
    /// Where it lies.
    pub path: PathBuf,
    /// Which one it is.
    pub flavor: Flavor,
    /// What it says on `--version`.
    pub version: String,
}

impl DaemonProgram {
    /// Looks at the program.
    ///
    /// # Errors
    /// When it cannot be run.
    pub fn at(path: &Path) -> Result<Self> {
        let path =
            path.canonicalize().with_context(|| format!("there is no daemon at {}", path.display()))?;
        let version = run_tool(Command::new(&path).arg("--version"))?.trim().to_owned();
        let flavor = if version.starts_with("virtiofsd") { Flavor::Virtiofsd } else { Flavor::BackendFs };
        Ok(Self { path, flavor, version })
    }
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    group: Group,
    socket: PathBuf,
    log: PathBuf,
    // Holds socket and log; goes away after the process.
    _scratch: Scratch,
}

impl Daemon {
    /// Starts the daemon on `export` and waits for its socket.
    ///
    /// # Errors
    /// When it ends at once or opens no socket in time; with its log.
    pub fn start(program: &DaemonProgram, export: &Path, arguments: &[String]) -> Result<Self> {
        let scratch = Scratch::new("daemon")?;
        let socket = scratch.join("fs.sock");
        let log = scratch.join("log");
        let output = fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let errors = output.try_clone().context("cannot duplicate the log")?;
        let mut command = Command::new(&program.path);
        command
            .arg("--socket-path")
            .arg(&socket)
            .arg("--shared-dir")
            .arg(export)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        let group = Group::spawn("the daemon", &mut command)?;
        let mut daemon = Self { group, socket, log, _scratch: scratch };
        wait_for("the daemon's socket", START_LIMIT, || {
            if let Some(status) = daemon.group.ended()? {
                bail!("the daemon ended at its start ({})", describe_exit(status));
            }
            Ok(daemon.socket.exists().then_some(()))
        })
        .with_context(|| daemon.log_tail())?;
        Ok(daemon)
    }

    /// The socket for the DPU's device.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Fails if the daemon has ended.
    ///
    /// # Errors
    /// With the exit status and the log.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.group.ended()? {
            None => Ok(()),
            Some(status) => {
                Err(anyhow::anyhow!("the daemon ended ({})", describe_exit(status))).context(self.log_tail())
            }
        }
    }

    /// Waits for the daemon to end by itself because its DPU is gone, and checks that it did so well.
    ///
    /// # Errors
    /// When it goes on or ends with anything but code 0.
    pub fn expect_end(&mut self) -> Result<()> {
        let status = self.group.wait(END_LIMIT).with_context(|| self.log_tail())?;
        self.judge(status)
    }

    /// Asks the daemon to end (SIGTERM) and waits for it.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.group.signal(rustix::process::Signal::TERM)?;
        self.group.wait(END_LIMIT).with_context(|| self.log_tail())
    }

    /// Number of file descriptors the daemon's process has open.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn open_files(&self) -> Result<usize> {
        let path = format!("/proc/{}/fd", self.group.pid().as_raw_pid());
        Ok(fs::read_dir(&path).with_context(|| format!("cannot list {path}"))?.count())
    }

    fn judge(&self, status: ExitStatus) -> Result<()> {
        if status.success() {
            return Ok(());
        }
        Err(anyhow::anyhow!("the daemon ended with {} in place of code 0", describe_exit(status)))
            .context(self.log_tail())
    }

    /// The end of the daemon's log, as a line for an error message.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail_of(&self.log, LOG_TAIL, "daemon log")
    }
}

/// The last bytes of a log for an error message.
#[must_use]
pub(crate) fn tail_of(path: &Path, limit: usize, label: &str) -> String {
    let bytes = fs::read(path).unwrap_or_default();
    let start = bytes.len().saturating_sub(limit);
    let text = String::from_utf8_lossy(&bytes[start..]);
    let text = text.trim();
    if text.is_empty() {
        format!("{label} is empty")
    } else {
        format!("{label}:\n    {}", text.replace('\n', "\n    "))
    }
}
