//! The server: confines itself, then serves one front end after the other.
//!
//! Without `--keep-listening` the first front end is the only one: the socket is closed before it is served,
//! so that a second one is refused at once, and the daemon ends with it. With `--keep-listening` a second
//! front end waits in the socket's backlog, which is what a front end wants that was restarted faster than
//! its predecessor's end was noticed; a warning says who is waiting for whom. Whatever the last DPU
//! held open is dropped before the next is served.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use vring::session::{End, Stop};

use super::Error;
use crate::config::{Config, DeviceOptions};
use crate::device;
use crate::fuse::Session;
use crate::host::options::FileHandles;
use crate::host::{self, HostFs};
use crate::listener::{self, Socket};
use crate::logging::WAITING_LINE;
use crate::sandbox::Confinement;
use crate::sandbox::process::Server;
use crate::sandbox::seccomp::{Call, RUNTIME_CALLS};
use crate::sandbox::signals::SignalFd;

/// System calls of this module.
const CALLS: &[Call] = &[
    Call::any(libc::SYS_ppoll, "waiting for signals and front ends"),
    Call::any(libc::SYS_read, "signalfd"),
    Call::any(libc::SYS_eventfd2, "end of the watch over the backlog"),
    Call::any(libc::SYS_sendto, "log lines to syslog"),
];

/// Everything the sealed server may ask of the kernel.
pub const SERVER_CALLS: &[&[Call]] = &[RUNTIME_CALLS, CALLS, listener::CALLS, device::CALLS, host::CALLS];

/// Runs the server's part of the daemon.
///
/// # Errors
/// [`Error`]; the caller prints it and ends the process with its exit code.
pub fn run(config: Config, link: Server, socket: Socket, signals: SignalFd) -> Result<(), Error> {
    log_panics();
    // The auxiliary vector is read when it is first needed, by means that are out of reach later.
    let _ = rustix::param::page_size();
    let _ = device::processors();
    let export = config.shared_dir.as_path();
    let confinement = Confinement {
        options: &config.sandbox,
        export,
        readonly: config.host.readonly,
        file_handles: config.host.file_handles != FileHandles::Never,
    };
    let view = confinement.enter()?;
    let session = Session::new(&config.host);
    let lock_waiters = config.host.max_lock_waiters;
    let fs = HostFs::new(view.root, view.proc_self_fd, config.host)
        .map_err(|source| Error::Export { export: export.to_owned(), source })?;
    let stop = Stop::new().map_err(|source| Error::Start { step: "making the stop event", source })?;
    stop_on_signal(signals, stop.clone())?;
    if let Socket::Listening(listener) = &socket {
        // Another process that has the same inherited socket may be faster after poll.
        listener.set_nonblocking(true).map_err(Error::Accept)?;
    }
    confinement.seal(SERVER_CALLS)?;
    link.ready();

    let serving =
        Serving { fs: Arc::new(fs), session: Arc::new(session), device: config.device, lock_waiters, stop };
    match socket {
        Socket::Connected(stream) => serving.one(stream).map(drop),
        Socket::Listening(listener) if config.listen.keep_listening => serving.many(&listener),
        Socket::Listening(listener) => match serving.accept(&listener)? {
            Some(stream) => {
                drop(listener);
                serving.one(stream).map(drop)
            }
            None => Ok(()),
        },
    }
}

struct Serving {
    fs: Arc<HostFs>,
    session: Arc<Session>,
    device: DeviceOptions,
    lock_waiters: usize,
    stop: Stop,
}

impl Serving {
    /// Front end after front end, until a signal.
    fn many(&self, listener: &UnixListener) -> Result<(), Error> {
        while let Some(stream) = self.accept(listener)? {
            let done = eventfd(0, EventfdFlags::CLOEXEC)
                .map_err(|errno| Error::Start { step: "watching the backlog", source: errno.into() })?;
            let end = thread::scope(|scope| {
                let watch = thread::Builder::new().name("backlog".into());
                let watch = watch.spawn_scoped(scope, || warn_of_backlog(listener, &done));
                if let Err(error) = watch {
                    tracing::debug!("watching the backlog: {error}");
                }
                let end = self.one(stream);
                // Cannot fail: the counter is 0.
                let _ = rustix::io::write(&done, &1u64.to_ne_bytes());
                end
            });
            match end {
                Ok(End::Disconnected) => {}
                Ok(End::Stopped) => return Ok(()),
                Err(error) => tracing::error!("front end dropped: {error}"),
            }
        }
        Ok(())
    }

    /// Serves one front end to its end; nothing stays of what its DPU held.
    fn one(&self, stream: UnixStream) -> Result<End, Error> {
        tracing::info!("front end connected");
        let (fs, session) = (Arc::clone(&self.fs), Arc::clone(&self.session));
        let end = device::serve_connection(&stream, fs, session, &self.device, self.lock_waiters, &self.stop);
        match &end {
            Ok(End::Disconnected) => tracing::info!("front end disconnected"),
            Ok(End::Stopped) => tracing::info!("stopped"),
            Err(_) => {}
        }
        Ok(end?)
    }

    /// The next front end, or `None` when a signal came first.
    fn accept(&self, listener: &UnixListener) -> Result<Option<UnixStream>, Error> {
        // Callers wait for this very line. If stderr is gone, nobody does.
        let _ = writeln!(io::stderr(), "{WAITING_LINE}");
        loop {
            let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(&self.stop, PollFlags::IN)];
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::Accept(errno.into())),
            }
            if self.stop.is_triggered() {
                return Ok(None);
            }
            match listener.accept() {
                Ok((stream, _)) => return Ok(Some(stream)),
                Err(error) if may_try_again(&error) => {}
                Err(error) => return Err(Error::Accept(error)),
            }
        }
    }
}

fn may_try_again(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}

/// Says once that somebody waits, until `done`.
fn warn_of_backlog(listener: &UnixListener, done: &impl std::os::fd::AsFd) {
    let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(done, PollFlags::IN)];
    if poll(&mut fds, None).is_ok() && fds[1].revents().is_empty() {
        tracing::warn!("another front end has connected; it is served when the present one disconnects");
    }
}

/// Triggers `stop` when a signal comes that ends the daemon.
fn stop_on_signal(signals: SignalFd, stop: Stop) -> Result<(), Error> {
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while signals.next().is_none() {
                // EINTR leads to the same: look again.
                let _ = poll(&mut [PollFd::new(&signals, PollFlags::IN)], None);
            }
            stop.trigger();
        })
        .map(drop)
        .map_err(|source| Error::Start { step: "starting the signal thread", source })
}

/// Makes panics log lines. The standard hook would also want to read this program's own file for a
/// backtrace, which the sandbox forbids.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = thread::current();
        tracing::error!("thread {}: {info}", thread.name().unwrap_or("without a name"));
    }));
}
