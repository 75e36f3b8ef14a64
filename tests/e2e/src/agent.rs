//! The DPU side of the framework: init of the emulated DPU, and the agent that runs what the host orders.
//!
//! As process 1 this program mounts the kernel's file systems, loads the modules, finds the port of the
//! protocol, starts itself once more as the agent, and collects orphans. When the agent ends, the DPU switches
//! itself off. Trouble goes to the console, which the host keeps as a log.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{Gid, Uid};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, WaitOptions, kill_process_group, wait};
use rustix::system::{RebootCommand, finit_module, reboot};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use crate::deadline::wait_for;
use crate::initramfs::AGENT;
use crate::kernel::MODULE_DIRECTORY;
use crate::wire::{Event, Order, PORT_NAME, Program, Stream, line_of, text_of};

/// How long the port of the protocol may take to appear after its driver is loaded.
const PORT_LIMIT: Duration = Duration::from_secs(20);

/// Bytes of output per event.
const OUTPUT_CHUNK: usize = 8 << 10;

/// The search path of programs in the DPU.
const PATH: &str = "/bin:/sbin:/usr/bin:/usr/sbin";

/// Life as process 1: does not return while the DPU runs.
///
/// # Errors
/// When the DPU cannot be brought up; the caller then switches it off.
pub fn init() -> Result<()> {
    for (kind, target) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        mount(kind, target, kind, MountFlags::empty(), None)
            .with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    fs::create_dir("/dev/shm").context("cannot create /dev/shm")?;
    mount("tmpfs", "/dev/shm", "tmpfs", MountFlags::empty(), None).context("cannot mount /dev/shm")?;
    load_modules()?;
    let port = find_port()?;
    let agent = Command::new(AGENT).arg("agent").arg(&port).spawn().context("cannot start the agent")?;
    let agent = Pid::from_child(&agent);
    loop {
        match wait(WaitOptions::empty()).context("cannot wait for children")? {
            Some((pid, _)) if pid == agent => return Ok(()),
            _ => {}
        }
    }
}

/// Switches the DPU off.
pub fn power_off() {
    rustix::fs::sync();
    if let Err(error) = reboot(RebootCommand::PowerOff) {
        eprintln!("dpu-e2e: cannot switch off: {error}");
    }
}

fn load_modules() -> Result<()> {
    let directory = Path::new("/").join(MODULE_DIRECTORY);
    let mut files: Vec<PathBuf> = fs::read_dir(&directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .flatten()
        .map(|entry| entry.path())
        .collect();
    files.sort();
    for path in files {
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        finit_module(&file, c"", 0).with_context(|| format!("cannot load {}", path.display()))?;
    }
    Ok(())
}

/// The device of the port whose name is ours.
fn find_port() -> Result<PathBuf> {
    wait_for("the protocol port to appear", PORT_LIMIT, || {
        let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else { return Ok(None) };
        for port in ports.flatten() {
            let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
            let device = Path::new("/dev").join(port.file_name());
            if name.trim() == PORT_NAME && device.exists() {
                return Ok(Some(device));
            }
        }
        Ok(None)
    })
}

/// Life as the agent: takes orders until told to switch off or the host is gone.
///
/// # Errors
/// When the port cannot be used.
pub fn serve(port: &Path) -> Result<()> {
    let port = File::options()
        .read(true)
        .write(true)
        .open(port)
        .with_context(|| format!("cannot open {}", port.display()))?;
    let orders = BufReader::new(port.try_clone().context("cannot duplicate the port")?);
    let agent = Agent { port: Arc::new(Mutex::new(port)), running: Arc::new(Mutex::new(HashMap::new())) };
    agent.send(&Event::Ready { kernel: kernel_release()?, uptime_ms: uptime_ms()? });
    for line in orders.lines() {
        let line = line.context("cannot read from the host")?;
        match serde_json::from_str(&line).with_context(|| format!("cannot understand {line:?}"))? {
            Order::Run { id, program } => {
                let agent = agent.clone();
                std::thread::spawn(move || agent.run(id, &program));
            }
            Order::Signal { id, signal } => agent.signal(id, signal),
            Order::PowerOff => {
                power_off();
                bail!("the DPU did not switch off");
            }
            Order::Reboot => {
                rustix::fs::sync();
                reboot(RebootCommand::Restart).context("cannot restart")?;
            }
        }
    }
    Ok(())
}

fn kernel_release() -> Result<String> {
    let text =
        fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read the kernel's release")?;
    Ok(text.trim().to_owned())
}

/// `/proc/uptime` starts with seconds and hundredths of the time since the kernel started.
fn uptime_ms() -> Result<u64> {
    let text = fs::read_to_string("/proc/uptime").context("cannot read the uptime")?;
    let first = text.split_whitespace().next().unwrap_or_default();
    let hundredths: u64 =
        first.replace('.', "").parse().with_context(|| format!("uptime is not a number: {text:?}"))?;
    Ok(hundredths * 10)
}

/// What the threads of the agent share: the port to the host and the process groups that run.
#[derive(Clone)]
struct Agent {
    port: Arc<Mutex<File>>,
    running: Arc<Mutex<HashMap<u64, Pid>>>,
}

impl Agent {
    /// A host that is gone shows at the reading side, so a failed write needs no further care.
    fn send(&self, event: &Event) {
        if let Ok(line) = line_of(event) {
            let mut port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
            let _ = port.write_all(line.as_bytes());
        }
    }

    fn signal(&self, id: u64, signal: i32) {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(pid), Some(signal)) = (running.get(&id), Signal::from_named_raw(signal)) {
            let _ = kill_process_group(*pid, signal);
        }
    }

    fn run(&self, id: u64, program: &Program) {
        match self.run_to_end(id, program) {
            Ok(status) => self.send(&Event::Exited { id, code: status.code(), signal: status.signal() }),
            Err(error) => self.send(&Event::Refused { id, reason: format!("{error:#}") }),
        }
    }

    fn run_to_end(&self, id: u64, program: &Program) -> Result<ExitStatus> {
        let mut command = command_of(program)?;
        let mut child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {:?}", program.argv))?;
        let pid = Pid::from_child(&child);
        self.running.lock().unwrap_or_else(PoisonError::into_inner).insert(id, pid);
        self.send(&Event::Started { id, pid: child.id() });
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        std::thread::scope(|scope| {
            scope.spawn(|| self.pump(id, Stream::Stdout, stdout));
            scope.spawn(|| self.pump(id, Stream::Stderr, stderr));
        });
        let status = child.wait();
        self.running.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        status.context("cannot wait for the program")
    }

    fn pump(&self, id: u64, stream: Stream, input: Option<impl Read>) {
        let Some(mut input) = input else { return };
        let mut buffer = vec![0; OUTPUT_CHUNK];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => self.send(&Event::Output { id, stream, text: text_of(&buffer[..count]) }),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

fn command_of(program: &Program) -> Result<Command> {
    let Some((name, arguments)) = program.argv.split_first() else { bail!("there is no program to run") };
    let mut command = if program.root.is_some() || program.user.is_some() {
        let mut command = Command::new(AGENT);
        command.args(["do", "enter"]);
        if let Some(root) = &program.root {
            command.args(["--root", root]);
        }
        if let Some(cwd) = &program.cwd {
            command.args(["--cwd", cwd]);
        }
        if let Some(user) = &program.user {
            command.arg(format!("--uid={}", user.uid)).arg(format!("--gid={}", user.gid));
            command.args(user.groups.iter().map(|group| format!("--group={group}")));
        }
        command.arg("--").arg(name);
        command
    } else {
        let mut command = Command::new(name);
        if let Some(cwd) = &program.cwd {
            command.current_dir(cwd);
        }
        command
    };
    command.args(arguments).env("PATH", PATH).env("HOME", "/root");
    command.envs(program.env.iter().map(|(name, value)| (name, value)));
    Ok(command)
}

/// How a program enters another root or becomes another user before it starts.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Enter {
    /// Directory that becomes the root directory.
    #[arg(long)]
    root: Option<PathBuf>,
    /// Working directory, inside the new root.
    #[arg(long, default_value = "/")]
    cwd: PathBuf,
    /// User id.
    #[arg(long)]
    uid: Option<u32>,
    /// Group id.
    #[arg(long)]
    gid: Option<u32>,
    /// Supplementary group; may be repeated.
    #[arg(long = "group")]
    groups: Vec<u32>,
    /// Program and arguments.
    #[arg(trailing_var_arg = true, required = true)]
    argv: Vec<String>,
}

impl Enter {
    /// Becomes the program; returns only on failure.
    ///
    /// # Errors
    /// When a step is refused or the program cannot be started.
    pub fn become_program(&self) -> Result<()> {
        if let Some(root) = &self.root {
            std::os::unix::fs::chroot(root).with_context(|| format!("cannot enter {}", root.display()))?;
        }
        std::env::set_current_dir(&self.cwd)
            .with_context(|| format!("cannot change to {}", self.cwd.display()))?;
        let Some((name, arguments)) = self.argv.split_first() else { bail!("there is no program to run") };
        // The calls act on this thread only, which is the one that becomes the program. `Command::uid` would
        // drop the supplementary groups again.
        if self.uid.is_some() || self.gid.is_some() {
            let groups: Vec<_> = self.groups.iter().map(|group| Gid::from_raw(*group)).collect();
            set_thread_groups(&groups).context("cannot set the supplementary groups")?;
        }
        if let Some(gid) = self.gid.map(Gid::from_raw) {
            set_thread_res_gid(gid, gid, gid).context("cannot set the group id")?;
        }
        if let Some(uid) = self.uid.map(Uid::from_raw) {
            set_thread_res_uid(uid, uid, uid).context("cannot set the user id")?;
        }
        let mut command = Command::new(name);
        command.args(arguments);
        Err(command.exec()).with_context(|| format!("cannot start {:?}", self.argv))
    }
}
