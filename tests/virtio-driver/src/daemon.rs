//! A real daemon process under test: started with the argv a caller would use, watched, and ended for certain.
//!
//! The daemon gets a process group of its own, so that it ends together with everything it forked. Standard error is
//! collected (up to a limit) and is part of every error about the process. Dropping a [`Daemon`] kills the group.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal};

use crate::wait::try_wait_for;
use crate::{Error, Result};

/// How long a daemon may take to listen.
pub const START_LIMIT: Duration = Duration::from_secs(10);

/// How much standard error is kept.
const STDERR_KEPT: usize = 1 << 20;

/// How to start a daemon.
#[derive(Clone, Debug)]
pub struct DaemonCommand {
    program: PathBuf,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    socket: PathBuf,
    hint: String,
}

impl DaemonCommand {
    /// A daemon that will listen on `socket`. `args` must say so to it in its own way.
    pub fn new(program: impl Into<PathBuf>, socket: impl Into<PathBuf>) -> Self {
        DaemonCommand {
            program: program.into(),
            args: Vec::new(),
            env: Vec::new(),
            socket: socket.into(),
            hint: String::new(),
        }
    }

    /// Appends arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// What to do when the program is missing; part of the error.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = hint.into();
        self
    }

    /// Starts the process. It may not listen yet; [`Daemon::connect`] waits for that.
    pub fn spawn(&self) -> Result<Daemon> {
        let mut child = Command::new(&self.program)
            .args(&self.args)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(|source| Error::Spawn {
                program: self.program.clone(),
                hint: self.hint.clone(),
                source,
            })?;
        let stderr = Arc::new(Mutex::new(Vec::new()));
        let reader = child.stderr.take().map(|pipe| collect(pipe, Arc::clone(&stderr)));
        Ok(Daemon {
            name: self.program.display().to_string(),
            socket: self.socket.clone(),
            child,
            stderr,
            reader,
        })
    }
}

/// Copies what the daemon prints until it closes the pipe.
fn collect(mut pipe: ChildStderr, into: Arc<Mutex<Vec<u8>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut chunk = [0; 4096];
        while let Ok(read @ 1..) = pipe.read(&mut chunk) {
            let mut text = into.lock().unwrap_or_else(PoisonError::into_inner);
            let room = STDERR_KEPT.saturating_sub(text.len()).min(read);
            text.extend_from_slice(&chunk[..room]);
        }
    })
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    socket: PathBuf,
    child: Child,
    stderr: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Daemon {
    /// Process id of the process that was started.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// What it printed to standard error so far.
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Connects as soon as the daemon listens. Fails at once, with its stderr, when it ends instead.
    pub fn connect(&mut self) -> Result<UnixStream> {
        let what = format!("{} to listen on {}", self.name, self.socket.display());
        try_wait_for(&what, START_LIMIT, || match UnixStream::connect(&self.socket) {
            Ok(stream) => Ok(Some(stream)),
            Err(_) => self.expect_running().map(|()| None),
        })
    }

    /// An error if the process has ended.
    pub fn expect_running(&mut self) -> Result<()> {
        let Some(status) = self.try_status()? else { return Ok(()) };
        if let Some(reader) = self.reader.take() {
            // Descendants may still hold the pipe; what they would add is not worth waiting for.
            if reader.is_finished() {
                let _ = reader.join();
            }
        }
        let _ = crate::wait::wait_for("the daemon's last words", Duration::from_millis(100), || {
            (!self.stderr().is_empty()).then_some(())
        });
        Err(Error::DaemonEnded {
            program: self.name.clone(),
            status: describe_status(status),
            stderr: self.stderr(),
        })
    }

    /// Exit status if the process has ended.
    pub fn try_status(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().map_err(|e| Error::os(format!("ask for the status of {}", self.name), e))
    }

    /// Waits for the process to end by itself.
    pub fn wait_exit(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("{} to end", self.name);
        try_wait_for(&what, limit, || self.try_status())
    }

    /// Sends a signal to the process (not to its group) and waits for it to end.
    pub fn terminate(&mut self, signal: Signal, limit: Duration) -> Result<ExitStatus> {
        if self.try_status()?.is_none() {
            rustix::process::kill_process(Pid::from_child(&self.child), signal)
                .map_err(|e| Error::os(format!("signal {}", self.name), e))?;
        }
        self.wait_exit(limit)
    }

    /// Process ids of the daemon and everything it forked, as far as it is still related.
    pub fn processes(&self) -> Vec<u32> {
        let mut family = vec![self.pid()];
        let mut next = 0;
        while let Some(parent) = family.get(next).copied() {
            family.extend(children_of(parent));
            next += 1;
        }
        family
    }

    /// CPU time all threads of the daemon and its children have used, from the scheduler's own account.
    pub fn cpu_time(&self) -> Duration {
        Self::cpu_time_of(&self.processes())
    }

    /// Like [`Daemon::cpu_time`] for processes that are known already, without a walk through the process table.
    pub fn cpu_time_of(processes: &[u32]) -> Duration {
        let mut nanoseconds = 0u64;
        for &pid in processes {
            for task in tasks_of(pid) {
                let account = std::fs::read_to_string(format!("/proc/{pid}/task/{task}/schedstat"));
                nanoseconds += account
                    .ok()
                    .and_then(|text| text.split_whitespace().next()?.parse::<u64>().ok())
                    .unwrap_or(0);
            }
        }
        Duration::from_nanos(nanoseconds)
    }

    /// Binds every thread of the daemon and its children to one CPU. Threads made later inherit it.
    pub fn pin_to(&self, cpu: usize) -> Result<()> {
        let mut set = rustix::thread::CpuSet::new();
        set.set(cpu);
        for pid in self.processes() {
            for task in tasks_of(pid) {
                // A thread may end between the listing and the call; that is no failure.
                match rustix::thread::sched_setaffinity(Pid::from_raw(task as i32), &set) {
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(e) => return Err(Error::os(format!("bind {} to CPU {cpu}", self.name), e)),
                }
            }
        }
        Ok(())
    }

    /// Open descriptors of all processes of the daemon.
    pub fn open_fds(&self) -> usize {
        let count = |pid: u32| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        self.processes().into_iter().map(count).sum()
    }

    /// Resident memory of all processes of the daemon that is their own (not the shared DPU memory), in bytes.
    pub fn private_memory(&self) -> u64 {
        let anonymous = |pid: u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
            line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
        };
        self.processes().into_iter().filter_map(anonymous).sum::<u64>() * 1024
    }

    fn kill_group(&mut self) {
        // The children of a daemon that is already gone are still in the group.
        let _ = rustix::process::kill_process_group(Pid::from_child(&self.child), Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.kill_group();
    }
}

fn tasks_of(pid: u32) -> Vec<u32> {
    let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
    tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// Parent of a process: field 4 of its stat line. The name before it is in parentheses and may hold anything.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

fn children_of(pid: u32) -> Vec<u32> {
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|candidate| parent_of(*candidate) == Some(pid))
        .collect()
}

/// An exit status in words.
pub fn describe_status(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    }
}
