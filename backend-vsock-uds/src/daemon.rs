//! Life of the daemon: listen, isolate, serve front ends as they come and go, stop.
//!
//! ```text
//! main thread   run ─ limits ─ signals ─ sockets ─ enter ─ devices ─ seal ─ wait ─ stop ─ remove sockets
//!                                                            │
//! per DPU       ├─ vsock-<cid>   queues and host sockets (`worker`), from start to stop
//!               └─ front-<cid>   one front end after the other (`front_end`)
//! ```
//!
//! Up to `enter` nothing has been given up, and a failure leaves no trace. The stages of the isolation are
//! described in [`crate::sandbox`].
#![forbid(unsafe_code)]

pub mod front_end;
pub mod notify;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vring::poll::PollWindow;
use vring::session::Stop;

use crate::config::{Config, DpuConfig, Endpoint};
use crate::conn::Timeouts;
use crate::device::{self, VsockDevice};
use crate::listener::{self, FRONT_END_BACKLOG, Leftovers, PROGRAM_BACKLOG, Socket};
use crate::mux::Mux;
use crate::packet::Kind;
use crate::sandbox;
use crate::sandbox::seccomp::{self, Call, RUNTIME_CALLS};
use crate::sandbox::signals::SignalFd;
use crate::siblings::{Directory, Siblings};
use front_end::FrontEnds;
use notify::{Notifier, State};

/// How long the end waits for threads. Management software that waits for a back-end to end kills it
/// after "a few seconds" (QEMU, docs/interop/vhost-user.rst, "Backend program conventions").
const GRACE: Duration = Duration::from_secs(2);

/// Limit of open files aimed at; a connection takes one.
const NOFILE: u64 = 1_000_000;

/// System calls of this module and of [`front_end`].
const CALLS: &[Call] = &[
    Call::any(libc::SYS_ppoll, "waiting for signals and front ends"),
    Call::any(libc::SYS_read, "signalfd, eventfd"),
    Call::any(libc::SYS_sendto, "telling the service manager"),
];

/// Everything the sealed daemon may ask of the kernel.
pub const TABLES: &[&[Call]] = &[RUNTIME_CALLS, CALLS, listener::CALLS, device::CALLS];

/// Why the daemon could not start, or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A socket.
    #[error(transparent)]
    Listener(#[from] listener::Error),
    /// Isolation.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// What serving needs besides.
    #[error("DPU {cid}: cannot start serving: {step}")]
    Start {
        /// Of which DPU.
        cid: u64,
        /// The step.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Something of the process as a whole.
    #[error("cannot start serving: {step}")]
    Process {
        /// The step.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Serves until a signal ends the daemon, or until the front ends are gone that cannot come back.
///
/// # Errors
/// [`Error`].
pub fn run(config: Config) -> Result<(), Error> {
    raise_nofile(&config);
    let signals = SignalFd::take_over()?;
    let notifier = Notifier::from_environment();
    let mut leftovers = Leftovers::default();
    let mut parts = Vec::new();
    for dpu in &config.dpus {
        let socket = endpoint(dpu, &config, &mut leftovers)?;
        let mux = mux(dpu, &config, &mut leftovers)?;
        parts.push((dpu, socket, mux));
    }
    let stop = Stop::new().map_err(|source| Error::Process { step: "making the stop event", source })?;
    let over = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|errno| Error::Process { step: "making the end event", source: errno.into() })?;
    log_panics();
    sandbox::enter(leftovers.directories())?;

    let directory = Arc::new(Directory::default());
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let over = Arc::new(over);
    let mut serving = Vec::new();
    for (dpu, socket, mut mux) in parts {
        mux.set_siblings(Siblings::new(Arc::clone(&directory), dpu.cid, dpu.groups.clone()));
        let poll = PollWindow::new(config.poll_window, cpus);
        let failed = |step| move |source| Error::Start { cid: dpu.cid, step, source };
        let device =
            VsockDevice::new(dpu.cid, mux, dpu.queue_size, poll).map_err(failed("starting its thread"))?;
        directory.insert(dpu.cid, dpu.groups.clone(), device.callee());
        serving.push((dpu.cid, socket, device));
    }
    // The auxiliary vector is read when it is first needed, by means that are out of reach later.
    let _ = rustix::param::page_size();
    seccomp::install(config.seccomp, TABLES)?;
    let mut threads = Vec::new();
    for (cid, socket, device) in serving {
        let front_ends = FrontEnds { cid, socket, device, stop: stop.clone(), over: Arc::clone(&over) };
        let thread = thread::Builder::new()
            .name(format!("front-{cid}"))
            .spawn(move || front_ends.serve())
            .map_err(|source| Error::Start { cid, step: "starting its front end thread", source })?;
        threads.push((cid, thread));
    }
    notifier.tell(State::Ready);
    tracing::info!("serving {} DPU{}", config.dpus.len(), if config.dpus.len() == 1 { "" } else { "s" });

    wait_for_end(&signals, &over, config.dpus.len() as u64);
    notifier.tell(State::Stopping);
    stop.trigger();
    let deadline = Instant::now() + GRACE;
    for (cid, thread) in threads {
        finish(cid, thread, deadline);
    }
    drop(leftovers);
    Ok(())
}

/// Opens what the front end of a DPU connects to.
fn endpoint(dpu: &DpuConfig, config: &Config, leftovers: &mut Leftovers) -> Result<Socket, Error> {
    let socket = match &dpu.endpoint {
        Endpoint::Path(path) => {
            let access = config.socket_access;
            let socket = listener::make(path, Kind::Stream, access, FRONT_END_BACKLOG, leftovers)?;
            Socket::Listening(socket.into())
        }
        Endpoint::Fd(fd) => listener::inherited(*fd)?,
    };
    if let Socket::Listening(listener) = &socket {
        // Another process that has the same inherited socket may be faster after poll.
        listener.set_nonblocking(true).map_err(|source| Error::Start {
            cid: dpu.cid,
            step: "making its socket non-blocking",
            source,
        })?;
    }
    Ok(socket)
}

/// The mux of a DPU with the sockets of its host programs.
fn mux(dpu: &DpuConfig, config: &Config, leftovers: &mut Leftovers) -> Result<Mux, Error> {
    let failed = |step| move |source| Error::Start { cid: dpu.cid, step, source };
    let mut mux = Mux::new(dpu.cid, dpu.routes.clone(), dpu.quotas, Timeouts::default())
        .map_err(failed("making an epoll descriptor"))?;
    for listening in &dpu.listeners {
        let socket =
            listener::make(&listening.path, listening.kind, config.uds_access, PROGRAM_BACKLOG, leftovers)?;
        let socket = UnixListener::from(socket);
        socket.set_nonblocking(true).map_err(failed("making a listener non-blocking"))?;
        mux.add_listener(socket.into(), listening.port, listening.kind)
            .map_err(failed("watching a listener"))?;
    }
    Ok(mux)
}

/// Each connection is a descriptor.
fn raise_nofile(config: &Config) {
    let limit = getrlimit(Resource::Nofile);
    let (soft, hard) = (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX));
    let wanted = NOFILE.min(hard);
    let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
    let in_force = if soft < wanted && setrlimit(Resource::Nofile, raised).is_ok() { wanted } else { soft };
    let needed = config.dpus.iter().map(|dpu| dpu.quotas.connections as u64 + 64).sum();
    if in_force < needed {
        tracing::warn!(
            "the limit of open files is {in_force}, {needed} may be needed; host programs and DPUs are told \
             to wait or refused when it is reached"
        );
    }
}

/// Waits for a signal, or until every front end thread is over.
fn wait_for_end(signals: &SignalFd, over: &std::os::fd::OwnedFd, threads: u64) {
    let mut ended = 0;
    loop {
        let mut fds = [PollFd::new(signals, PollFlags::IN), PollFd::new(over, PollFlags::IN)];
        // EINTR leads to the same: look at both.
        let _ = poll(&mut fds, None);
        if signals.next().is_some() {
            tracing::info!("ending");
            return;
        }
        let mut count = [0; 8];
        if rustix::io::read(over, &mut count).is_ok() {
            ended += u64::from_ne_bytes(count);
        }
        if ended >= threads {
            return;
        }
    }
}

/// Waits for a front end thread and ends its device.
fn finish(cid: u64, thread: thread::JoinHandle<VsockDevice>, deadline: Instant) {
    // The session ends with the stop event, whatever the front end does.
    let Ok(device) = thread.join() else {
        tracing::error!(cid, "the thread that served the front end failed");
        return;
    };
    if let Some(report) = device.report() {
        let counts: Vec<String> = report
            .counters
            .each()
            .filter(|(_, count)| *count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        tracing::info!(cid, connections = report.connections, "{}", counts.join(", "));
    }
    if !device.shut_down(deadline.saturating_duration_since(Instant::now())) {
        tracing::error!(cid, "the thread that served the queues did not end");
    }
}

/// Makes panics log lines. The standard hook would also want to read this program's own file for a
/// backtrace, which the sandbox forbids.
fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        tracing::error!("thread {}: {info}", thread.name().unwrap_or("without a name"));
    }));
}
