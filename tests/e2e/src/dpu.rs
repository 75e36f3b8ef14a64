//! The emulated DPU as the host sees it: a QEMU process (TCG, so that it runs anywhere), its memory, its
//! devices, and the protocol with the agent inside.
//!
//! A thread reads the agent's events and hands each to the job that it belongs to. When QEMU ends for any
//! reason, the connection closes, all jobs end with an error, and the error quotes the console.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::Signal;

use crate::daemon::tail_of;
use crate::deadline::wait_for;
use crate::initramfs::{Base, Luggage};
use crate::kernel::Kernel;
use crate::registry::{Group, Hugepages, Scratch, describe_exit};
use crate::wire::{Event, Order, PORT_NAME, Program, Stream, bytes_of, line_of};

/// How long a boot may take; 3 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(90);

/// How long switching off may take.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(30);

/// How long a program in the DPU may take unless the caller says otherwise.
pub const RUN_LIMIT: Duration = Duration::from_secs(150);

/// How long a killed program may take to be gone; one that waits inside the file system may take for ever.
const KILL_LIMIT: Duration = Duration::from_secs(3);

/// Bytes of the console that an error quotes.
const CONSOLE_TAIL: usize = 3000;

/// What the DPU's memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Memory {
    /// Shared pages of the normal size.
    Plain,
    /// Shared hugepages of 2 MiB.
    Hugepages,
}

/// One virtio-fs device.
#[derive(Clone, Debug)]
pub struct FsDevice {
    /// Socket of the daemon that serves it.
    pub socket: PathBuf,
    /// Tag by which the DPU mounts it.
    pub tag: String,
    /// Entries per queue.
    pub queue_size: u16,
    /// Number of request queues.
    pub request_queues: u16,
}

impl FsDevice {
    /// A device as QEMU's users set it up: one request queue of 1024 entries.
    #[must_use]
    pub fn new(socket: &Path, tag: &str) -> Self {
        Self { socket: socket.to_owned(), tag: tag.to_owned(), queue_size: 1024, request_queues: 1 }
    }
}

/// What a DPU is made of.
#[derive(Clone, Debug)]
pub struct DpuConfig {
    /// Its kernel.
    pub kernel: Kernel,
    /// Size of its memory in MiB.
    pub memory_mib: u64,
    /// Kind of its memory.
    pub memory: Memory,
    /// Number of processors.
    pub processors: u16,
    /// Its virtio-fs devices.
    pub devices: Vec<FsDevice>,
    /// Disk images it may read.
    pub disks: Vec<PathBuf>,
    /// What comes along in the initramfs.
    pub luggage: Luggage,
    /// Whether a restart is part of the plan; otherwise QEMU ends on one, a kernel panic included.
    pub may_reboot: bool,
}

impl DpuConfig {
    /// A DPU with two processors and 512 MiB of plain memory.
    #[must_use]
    pub fn new(kernel: &Kernel) -> Self {
        Self {
            kernel: kernel.clone(),
            memory_mib: 512,
            memory: Memory::Plain,
            processors: 2,
            devices: Vec::new(),
            disks: Vec::new(),
            luggage: Luggage::default(),
            may_reboot: false,
        }
    }

    fn qemu_arguments(&self, scratch: &Scratch) -> Vec<String> {
        let size = self.memory_mib;
        let huge = match self.memory {
            Memory::Plain => "",
            Memory::Hugepages => ",hugetlb=on,hugetlbsize=2M",
        };
        let path = |name: &str| scratch.join(name).display().to_string();
        let mut arguments: Vec<String> = ["-nodefaults", "-no-user-config", "-display", "none"]
            .iter()
            .map(|argument| (*argument).to_owned())
            .collect();
        let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
        add("-machine", "q35,memory-backend=ram".to_owned());
        add("-accel", "tcg,thread=multi".to_owned());
        // TCG of QEMU 7.2 leaves the flags register wrong when an interrupt follows cmpxchg16b; Linux then dies at a
        // random place (a third of the boots of 6.12). Without the feature Linux takes another way.
        add("-cpu", "max,-cx16".to_owned());
        add("-smp", self.processors.to_string());
        add("-m", format!("{size}M"));
        add("-object", format!("memory-backend-memfd,id=ram,size={size}M,share=on{huge}"));
        add("-kernel", self.kernel.image.display().to_string());
        add("-initrd", path("initramfs"));
        // On a busy machine the timer's ticks come too late for Linux's check of the I/O APIC.
        add("-append", "console=ttyS0 panic=-1 no_timer_check tsc=reliable mitigations=off quiet".to_owned());
        add("-chardev", format!("file,id=console,path={}", path("console")));
        add("-serial", "chardev:console".to_owned());
        add("-device", "virtio-serial-pci".to_owned());
        add("-chardev", format!("socket,id=orders,path={}", path("orders")));
        add("-device", format!("virtserialport,chardev=orders,name={PORT_NAME}"));
        for (index, device) in self.devices.iter().enumerate() {
            add("-chardev", format!("socket,id=fs{index},path={}", device.socket.display()));
            let queues = match device.request_queues {
                1 => String::new(),
                count => format!(",num-request-queues={count}"),
            };
            let (tag, entries) = (&device.tag, device.queue_size);
            add(
                "-device",
                format!("vhost-user-fs-pci,chardev=fs{index},tag={tag},queue-size={entries}{queues}"),
            );
        }
        for (index, disk) in self.disks.iter().enumerate() {
            add("-drive", format!("if=none,id=disk{index},format=raw,readonly=on,file={}", disk.display()));
            add("-device", format!("virtio-blk-pci,drive=disk{index}"));
        }
        if !self.may_reboot {
            arguments.push("-no-reboot".to_owned());
        }
        arguments
    }
}

/// How a program in the DPU ended and what it wrote.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Program and arguments, for messages.
    pub title: String,
    /// Exit code; `None` if a signal ended it.
    pub code: Option<i32>,
    /// Signal, if one ended it.
    pub signal: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// How long it ran, as the host saw it.
    pub elapsed: Duration,
}

impl Finished {
    /// The standard output of a program that must have succeeded.
    ///
    /// # Errors
    /// When it did not; with what it wrote.
    pub fn success(self) -> Result<String> {
        if self.code == Some(0) {
            return Ok(self.stdout);
        }
        let how = match (self.code, self.signal) {
            (Some(code), _) => format!("exit code {code}"),
            (None, signal) => format!("signal {}", signal.unwrap_or_default()),
        };
        bail!("{} failed ({how})\n    {}\n    {}", self.title, self.stdout.trim(), self.stderr.trim())
    }

    /// What a program that must have failed said about it.
    ///
    /// # Errors
    /// When it succeeded.
    pub fn failure(self) -> Result<String> {
        if self.code == Some(0) {
            bail!("{} succeeded where it must fail: {}", self.title, self.stdout.trim());
        }
        Ok(format!("{}{}", self.stdout, self.stderr))
    }
}

type Mailboxes = Arc<Mutex<HashMap<u64, Sender<Event>>>>;

/// A running DPU.
#[derive(Debug)]
pub struct Dpu {
    qemu: Group,
    orders: Arc<Mutex<UnixStream>>,
    mailboxes: Mailboxes,
    ready: Mutex<Receiver<Event>>,
    next: std::sync::atomic::AtomicU64,
    console: PathBuf,
    /// `uname -r` in the DPU.
    pub kernel: String,
    /// Time from the start of QEMU to the agent's first word.
    pub boot_time: Duration,
    _hugepages: Option<Hugepages>,
    _scratch: Scratch,
}

impl Dpu {
    /// Boots a DPU and waits until it takes orders.
    ///
    /// # Errors
    /// When QEMU fails or the DPU does not come up; with its console.
    pub fn boot(base: &Base, config: &DpuConfig) -> Result<Self> {
        let scratch = Scratch::new("dpu")?;
        let hugepages = match config.memory {
            Memory::Plain => None,
            Memory::Hugepages => Some(Hugepages::reserve(config.memory_mib << 20)?),
        };
        base.compose(&config.kernel, &config.luggage, &scratch.join("initramfs"))?;
        let listener =
            UnixListener::bind(scratch.join("orders")).context("cannot open the protocol socket")?;
        listener.set_nonblocking(true).context("cannot set the protocol socket up")?;
        let console = scratch.join("console");
        let errors = scratch.join("qemu.log");
        let log = std::fs::File::create(&errors).context("cannot create QEMU's log")?;
        let started = Instant::now();
        let mut command = Command::new("qemu-system-x86_64");
        command.args(config.qemu_arguments(&scratch)).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let mut qemu = Group::spawn("QEMU", &mut command)
            .context("run `tests/setup packages` to install what is needed")?;
        let check = |qemu: &mut Group| match qemu.ended()? {
            None => Ok(()),
            Some(status) => Err(anyhow!("QEMU ended ({})", describe_exit(status)))
                .context(tail_of(&console, CONSOLE_TAIL, "console"))
                .context(tail_of(&errors, CONSOLE_TAIL, "QEMU's messages")),
        };
        let stream = wait_for("QEMU to open the protocol socket", BOOT_LIMIT, || {
            check(&mut qemu)?;
            match listener.accept() {
                Ok((stream, _)) => Ok(Some(stream)),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
                Err(error) => Err(error).context("cannot accept QEMU's connection"),
            }
        })?;
        stream.set_nonblocking(false).context("cannot set the protocol connection up")?;
        let mailboxes = Mailboxes::default();
        let reader = stream.try_clone().context("cannot duplicate the protocol connection")?;
        let (ready_sender, ready) = channel();
        let boxes = mailboxes.clone();
        std::thread::spawn(move || deliver(reader, &boxes, &ready_sender));
        let mut dpu = Self {
            qemu,
            orders: Arc::new(Mutex::new(stream)),
            mailboxes,
            ready: Mutex::new(ready),
            next: std::sync::atomic::AtomicU64::new(1),
            console: console.clone(),
            kernel: String::new(),
            boot_time: Duration::ZERO,
            _hugepages: hugepages,
            _scratch: scratch,
        };
        dpu.await_ready(started)?;
        Ok(dpu)
    }

    fn await_ready(&mut self, started: Instant) -> Result<()> {
        let word = self.ready.get_mut().unwrap_or_else(PoisonError::into_inner).recv_timeout(BOOT_LIMIT);
        match word {
            Ok(Event::Ready { kernel, .. }) => {
                self.kernel = kernel;
                self.boot_time = started.elapsed();
                Ok(())
            }
            Ok(other) => bail!("the DPU said {other:?} before it was ready"),
            Err(RecvTimeoutError::Timeout) => {
                Err(anyhow!("the DPU did not come up in {} s", BOOT_LIMIT.as_secs()))
                    .context(self.console_tail())
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(anyhow!("QEMU ended while the DPU came up")).context(self.console_tail())
            }
        }
    }

    /// Process id of QEMU.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.qemu.pid().as_raw_pid()
    }

    /// The end of the console, as a line for an error message.
    #[must_use]
    pub fn console_tail(&self) -> String {
        tail_of(&self.console, CONSOLE_TAIL, "console")
    }

    /// Starts a program in the DPU.
    ///
    /// # Errors
    /// When the DPU is gone.
    pub fn start(&self, program: Program) -> Result<Job<'_>> {
        let id = self.next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (sender, events) = channel();
        lock(&self.mailboxes).insert(id, sender);
        let title = program.argv.join(" ");
        self.send(&Order::Run { id, program })?;
        let (stdout, stderr) = (Vec::new(), Vec::new());
        Ok(Job { dpu: self, id, title, events, started: Instant::now(), stdout, stderr, ended: false })
    }

    /// Runs a program to its end, at most for `limit`.
    ///
    /// # Errors
    /// When it cannot be run or takes too long. A program that fails is no error here.
    pub fn run_program(&self, program: Program, limit: Duration) -> Result<Finished> {
        self.start(program)?.wait(limit)
    }

    /// Runs a program as root to its end, at most for [`RUN_LIMIT`].
    ///
    /// # Errors
    /// As [`Dpu::run_program`].
    pub fn run(&self, argv: &[&str]) -> Result<Finished> {
        self.run_program(program(argv), RUN_LIMIT)
    }

    /// Switches the DPU off and waits for QEMU to end.
    ///
    /// # Errors
    /// When that takes too long or QEMU fails.
    pub fn power_off(mut self) -> Result<()> {
        self.send(&Order::PowerOff)?;
        let status = self.qemu.wait(POWER_OFF_LIMIT).with_context(|| self.console_tail())?;
        if !status.success() {
            bail!("QEMU ended with {}", describe_exit(status));
        }
        Ok(())
    }

    /// Restarts the DPU inside the same QEMU and waits until it takes orders again.
    ///
    /// # Errors
    /// When it does not come up again.
    pub fn reboot(&mut self) -> Result<()> {
        let started = Instant::now();
        self.send(&Order::Reboot)?;
        self.await_ready(started)
    }

    /// Takes the power away: QEMU is killed.
    pub fn cut_power(mut self) {
        self.qemu.kill();
    }

    fn send(&self, order: &Order) -> Result<()> {
        let line = line_of(order).context("cannot write an order")?;
        let mut stream = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write_all(line.as_bytes()).context("the DPU is gone").with_context(|| self.console_tail())
    }
}

/// A program with its arguments, run as root.
#[must_use]
pub fn program(argv: &[&str]) -> Program {
    Program { argv: argv.iter().map(|argument| (*argument).to_owned()).collect(), ..Program::default() }
}

fn lock(mailboxes: &Mailboxes) -> MutexGuard<'_, HashMap<u64, Sender<Event>>> {
    mailboxes.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads events until the connection ends, then closes all mailboxes.
///
/// A line that is no event can only be the rest of one that a restart cut off.
fn deliver(stream: UnixStream, mailboxes: &Mailboxes, ready: &Sender<Event>) {
    for line in BufReader::new(stream).lines() {
        let Ok(line) = line else { break };
        let Ok(event) = serde_json::from_str::<Event>(&line) else { continue };
        let id = match &event {
            Event::Ready { .. } => {
                // Nothing that ran before a restart runs any more.
                lock(mailboxes).clear();
                if ready.send(event).is_err() {
                    break;
                }
                continue;
            }
            Event::Started { id, .. }
            | Event::Output { id, .. }
            | Event::Exited { id, .. }
            | Event::Refused { id, .. } => *id,
        };
        let last = matches!(event, Event::Exited { .. } | Event::Refused { .. });
        let mut mailboxes = lock(mailboxes);
        if let Some(mailbox) = mailboxes.get(&id) {
            let _ = mailbox.send(event);
        }
        if last {
            mailboxes.remove(&id);
        }
    }
    lock(mailboxes).clear();
}

/// A program that runs in the DPU; killed when dropped before its end.
#[derive(Debug)]
pub struct Job<'dpu> {
    dpu: &'dpu Dpu,
    id: u64,
    title: String,
    events: Receiver<Event>,
    started: Instant,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    ended: bool,
}

/// The end of a job.
struct End {
    code: Option<i32>,
    signal: Option<i32>,
}

impl Job<'_> {
    /// Waits until the program has written a line that starts with `prefix` to its standard output.
    ///
    /// # Errors
    /// When it ends or `limit` passes before.
    pub fn wait_line(&mut self, prefix: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let text = String::from_utf8_lossy(&self.stdout).into_owned();
            if let Some(line) = text.lines().find(|line| line.starts_with(prefix)) {
                return Ok(line.to_owned());
            }
            if self.next_event(deadline)?.is_some() {
                bail!(
                    "{} ended without a line {prefix:?}: {} {}",
                    self.title,
                    text.trim(),
                    String::from_utf8_lossy(&self.stderr).trim()
                );
            }
        }
    }

    /// True once the program has written a line that starts with `prefix`; looks at what has arrived by now.
    ///
    /// # Errors
    /// When the program has ended without it.
    pub fn has_line(&mut self, prefix: &str) -> Result<bool> {
        loop {
            let text = String::from_utf8_lossy(&self.stdout);
            if text.lines().any(|line| line.starts_with(prefix)) {
                return Ok(true);
            }
            match self.events.try_recv() {
                Ok(event) => {
                    if self.take(event)?.is_some() {
                        bail!("{} ended without a line {prefix:?}", self.title);
                    }
                }
                Err(std::sync::mpsc::TryRecvError::Empty) => return Ok(false),
                Err(std::sync::mpsc::TryRecvError::Disconnected) => return Err(self.lost()),
            }
        }
    }

    /// Waits for the program to end; after `limit` it is killed.
    ///
    /// # Errors
    /// When it takes too long, could not be started, or the DPU is gone.
    pub fn wait(mut self, limit: Duration) -> Result<Finished> {
        let deadline = Instant::now() + limit;
        let end = loop {
            if let Some(end) = self.next_event(deadline)? {
                break end;
            }
        };
        Ok(Finished {
            title: self.title.clone(),
            code: end.code,
            signal: end.signal,
            stdout: String::from_utf8_lossy(&self.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
            elapsed: self.started.elapsed(),
        })
    }

    /// Sends a signal to the program and all that it started.
    ///
    /// # Errors
    /// When the DPU is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.dpu.send(&Order::Signal { id: self.id, signal: signal.as_raw() })
    }

    /// Kills the program and waits for its end.
    ///
    /// # Errors
    /// When it does not go away.
    pub fn kill(self, limit: Duration) -> Result<Finished> {
        self.signal(Signal::KILL)?;
        self.wait(limit)
    }

    /// Takes one event; `Some` when the program has ended.
    fn next_event(&mut self, deadline: Instant) -> Result<Option<End>> {
        match self.events.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(event) => self.take(event),
            Err(RecvTimeoutError::Disconnected) => Err(self.lost()),
            Err(RecvTimeoutError::Timeout) => Err(anyhow!(
                "{} did not get there in {:.0} s; it wrote: {} {}",
                self.title,
                self.started.elapsed().as_secs_f64(),
                String::from_utf8_lossy(&self.stdout).trim(),
                String::from_utf8_lossy(&self.stderr).trim()
            ))
            .context(self.dpu.console_tail()),
        }
    }

    fn lost(&mut self) -> anyhow::Error {
        self.ended = true;
        anyhow!("the DPU was gone while {} ran", self.title).context(self.dpu.console_tail())
    }

    fn take(&mut self, event: Event) -> Result<Option<End>> {
        match event {
            Event::Output { stream, text, .. } => {
                let bytes = bytes_of(&text).context("the DPU sent text that stands for no bytes")?;
                match stream {
                    Stream::Stdout => self.stdout.extend(bytes),
                    Stream::Stderr => self.stderr.extend(bytes),
                }
                Ok(None)
            }
            Event::Exited { code, signal, .. } => {
                self.ended = true;
                Ok(Some(End { code, signal }))
            }
            Event::Refused { reason, .. } => {
                self.ended = true;
                bail!("the DPU cannot run {}: {reason}", self.title)
            }
            Event::Ready { .. } | Event::Started { .. } => Ok(None),
        }
    }
}

impl Drop for Job<'_> {
    /// Kills the program and gives it a moment to go, so that it does not keep the mount busy.
    fn drop(&mut self) {
        if self.ended || self.signal(Signal::KILL).is_err() {
            return;
        }
        let deadline = Instant::now() + KILL_LIMIT;
        while let Ok(None) = self.next_event(deadline) {}
    }
}
