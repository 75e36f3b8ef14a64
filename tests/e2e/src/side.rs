//! The two sides of an export, so that a case can be written once for "one side" and "the other".

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

use crate::deadline::wait_for;
use crate::dpu::{Dpu, Finished, Job, RUN_LIMIT, program};
use crate::initramfs::AGENT;
use crate::registry::Group;
use crate::suites::DEBIAN;
use crate::verbs::lock::LOCKED;

/// How long a lock may take that nobody holds; generous, because the DPU is emulated.
const LOCK_LIMIT: Duration = Duration::from_secs(20);

/// One side of an export.
pub trait Side {
    /// "host" or "DPU", for messages.
    fn name(&self) -> &'static str;

    /// The path of an entry of the export, as this side calls it.
    fn path(&self, name: &str) -> String;

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When it cannot be run or takes too long; not when it fails.
    fn run(&self, argv: &[&str]) -> Result<Finished>;

    /// Starts a verb that takes a lock and holds it.
    ///
    /// # Errors
    /// When it cannot be started.
    fn hold(&self, verb: &[&str]) -> Result<Box<dyn Hold + '_>>;

    /// This program on that side.
    fn tool(&self) -> &str;

    /// Performs a verb that must succeed and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    fn act(&self, verb: &[&str]) -> Result<String> {
        self.verb(verb)?.success().with_context(|| format!("on the {}", self.name()))
    }

    /// Performs a verb that must succeed and reads the value that it printed.
    ///
    /// # Errors
    /// When it fails or printed something else.
    fn ask<T: DeserializeOwned>(&self, verb: &[&str]) -> Result<T>
    where
        Self: Sized,
    {
        let text = self.act(verb)?;
        serde_json::from_str(&text).with_context(|| format!("cannot understand {text:?}"))
    }

    /// Performs a verb that must be refused with an error of that name.
    ///
    /// # Errors
    /// When it succeeds or fails in another way.
    fn refused(&self, error: &str, verb: &[&str]) -> Result<()> {
        let said = self.verb(verb)?.failure().with_context(|| format!("on the {}", self.name()))?;
        if said.trim_end().ends_with(error) {
            return Ok(());
        }
        bail!("{} on the {} must be refused with {error}, but: {}", verb.join(" "), self.name(), said.trim())
    }

    /// Performs a verb.
    ///
    /// # Errors
    /// As [`Side::run`].
    fn verb(&self, verb: &[&str]) -> Result<Finished> {
        self.run(&[&[self.tool(), "do"], verb].concat())
    }

    /// Runs a shell script that stops at the first failure, and returns what it printed.
    ///
    /// # Errors
    /// When it fails.
    fn shell(&self, script: &str) -> Result<String> {
        self.run(&["sh", "-ec", script])?.success().with_context(|| format!("on the {}", self.name()))
    }
}

/// A lock that is held or waited for.
pub trait Hold {
    /// True once the lock is held.
    ///
    /// # Errors
    /// When the process that wants it has ended.
    fn is_locked(&mut self) -> Result<bool>;

    /// Lets go and waits until the process has ended.
    ///
    /// # Errors
    /// When it does not end.
    fn release(self: Box<Self>) -> Result<()>;

    /// Waits until the lock is held.
    ///
    /// # Errors
    /// When that takes too long.
    fn locked(&mut self) -> Result<()> {
        wait_for("the lock", LOCK_LIMIT, || Ok(self.is_locked()?.then_some(())))
    }
}

/// The host's side: the export itself.
#[derive(Clone, Debug)]
pub struct HostSide {
    directory: PathBuf,
    tool: String,
}

impl HostSide {
    /// The side whose entries lie in `directory`.
    ///
    /// # Errors
    /// When this program's own file cannot be found.
    pub fn new(directory: &Path) -> Result<Self> {
        let tool = std::env::current_exe().context("cannot find this program's own file")?;
        Ok(Self { directory: directory.to_owned(), tool: tool.display().to_string() })
    }

    /// The path of an entry.
    #[must_use]
    pub fn entry(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The content of a file as text.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&self, name: &str) -> Result<String> {
        std::fs::read_to_string(self.entry(name)).with_context(|| format!("cannot read {name} on the host"))
    }

    /// Writes a file: truncates it, or makes it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> Result<()> {
        std::fs::write(self.entry(name), content).with_context(|| format!("cannot write {name} on the host"))
    }
}

impl Side for HostSide {
    fn name(&self) -> &'static str {
        "host"
    }

    fn path(&self, name: &str) -> String {
        self.entry(name).display().to_string()
    }

    fn tool(&self) -> &str {
        &self.tool
    }

    fn run(&self, argv: &[&str]) -> Result<Finished> {
        let Some((name, arguments)) = argv.split_first() else { bail!("there is no program to run") };
        let started = std::time::Instant::now();
        let mut group = Group::spawn(
            name,
            Command::new(name)
                .args(arguments)
                .current_dir(&self.directory)
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped()),
        )?;
        let child = group.child();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (stdout, stderr) = (collect(stdout), collect(stderr));
        let status = group.wait(RUN_LIMIT)?;
        Ok(Finished {
            title: argv.join(" "),
            code: status.code(),
            signal: std::os::unix::process::ExitStatusExt::signal(&status),
            stdout: stdout.recv().unwrap_or_default(),
            stderr: stderr.recv().unwrap_or_default(),
            elapsed: started.elapsed(),
        })
    }

    fn hold(&self, verb: &[&str]) -> Result<Box<dyn Hold + '_>> {
        let mut group = Group::spawn(
            "lock holder",
            Command::new(&self.tool).arg("do").args(verb).stdin(Stdio::null()).stdout(Stdio::piped()),
        )?;
        let Some(stdout) = group.child().stdout.take() else { bail!("the lock holder has no output") };
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Box::new(HostHold { group, lines, locked: false }))
    }
}

/// Reads all of a pipe in a thread; the text comes when the pipe ends.
fn collect(pipe: Option<impl std::io::Read + Send + 'static>) -> Receiver<String> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read before an error still helps.
            let _ = pipe.read_to_end(&mut bytes);
        }
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

struct HostHold {
    group: Group,
    lines: Receiver<String>,
    locked: bool,
}

impl Hold for HostHold {
    fn is_locked(&mut self) -> Result<bool> {
        match self.lines.try_recv() {
            Ok(line) => self.locked |= line == LOCKED,
            Err(TryRecvError::Empty) => {}
            Err(TryRecvError::Disconnected) if self.locked => {}
            Err(TryRecvError::Disconnected) => bail!("the lock was refused on the host"),
        }
        Ok(self.locked)
    }

    fn release(mut self: Box<Self>) -> Result<()> {
        self.group.kill();
        Ok(())
    }
}

/// The DPU's side: a directory of the mount.
#[derive(Clone, Debug)]
pub struct DpuSide<'dpu> {
    /// The DPU.
    pub dpu: &'dpu Dpu,
    directory: String,
}

impl<'dpu> DpuSide<'dpu> {
    /// The side whose entries lie in `directory` of the DPU.
    #[must_use]
    pub fn new(dpu: &'dpu Dpu, directory: &str) -> Self {
        Self { dpu, directory: directory.to_owned() }
    }

    /// The directory in the DPU.
    #[must_use]
    pub fn directory(&self) -> &str {
        &self.directory
    }

    /// Runs a shell script of the Debian root in the directory, with its own limit.
    ///
    /// # Errors
    /// When it fails or takes too long.
    pub fn debian_for(&self, limit: Duration, script: &str) -> Result<Finished> {
        let mut program = program(&["/bin/sh", "-ec", script]);
        program.cwd = Some(self.directory.clone());
        program.root = Some(DEBIAN.to_owned());
        self.dpu.run_program(program, limit)
    }

    /// Runs a shell script in the directory, with its own limit.
    ///
    /// # Errors
    /// When it fails or takes too long.
    pub fn shell_for(&self, limit: Duration, script: &str) -> Result<String> {
        let mut program = program(&["sh", "-ec", script]);
        program.cwd = Some(self.directory.clone());
        self.dpu.run_program(program, limit)?.success()
    }
}

impl Side for DpuSide<'_> {
    fn name(&self) -> &'static str {
        "DPU"
    }

    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.directory)
    }

    fn tool(&self) -> &str {
        AGENT
    }

    fn run(&self, argv: &[&str]) -> Result<Finished> {
        let mut program = program(argv);
        program.cwd = Some(self.directory.clone());
        self.dpu.run_program(program, RUN_LIMIT)
    }

    fn hold(&self, verb: &[&str]) -> Result<Box<dyn Hold + '_>> {
        Ok(Box::new(DpuHold { job: self.dpu.start(program(&[&[AGENT, "do"], verb].concat()))? }))
    }
}

struct DpuHold<'dpu> {
    job: Job<'dpu>,
}

impl Hold for DpuHold<'_> {
    fn is_locked(&mut self) -> Result<bool> {
        self.job.has_line(LOCKED)
    }

    fn release(self: Box<Self>) -> Result<()> {
        self.job.kill(LOCK_LIMIT).map(drop)
    }
}
