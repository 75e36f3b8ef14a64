//! Life of the daemon: listen, isolate, serve, reconnect, stop.
//!
//! ```text
//! run ─ limits ─ signals ─ listen ─ split ─┬─ supervisor: supervise ─ remove socket and pid file
//!                                          └─ server: enter ─ export ─ seal ─ ready ─ serve…
//! ```
//!
//! Up to `split` nothing has been given up, and a failure leaves no trace. The stages of the isolation are
//! described in [`crate::sandbox`], the server's part after them in [`server`].
#![forbid(unsafe_code)]

pub mod notify;
pub mod server;
pub mod supervise;

use std::io;
use std::path::PathBuf;

use vring::session::SessionError;

use crate::config::Config;
use crate::sandbox::process::{Side, split};
use crate::sandbox::signals::SignalFd;
use crate::{limits, listener, sandbox};
use notify::Notifier;

pub use server::{SERVER_CALLS, log_panics};

/// Why the daemon could not start, or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Limit of open files.
    #[error(transparent)]
    Limits(#[from] limits::Error),
    /// The endpoint.
    #[error(transparent)]
    Listener(#[from] listener::Error),
    /// Isolation.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// The export cannot be served.
    #[error("--shared-dir {}: cannot serve it", .export.display())]
    Export {
        /// The export.
        export: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// What the server needs besides.
    #[error("cannot start serving: {step}")]
    Start {
        /// The step.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The socket failed.
    #[error("cannot accept front ends")]
    Accept(#[source] io::Error),
    /// The front end's session ended badly.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The server ended with this code and has said why.
    #[error("the serving process ended with exit code {0}")]
    Mirrored(u8),
    /// The server was killed.
    #[error("the serving process was killed by signal {signal}{advice}")]
    Killed {
        /// By this signal.
        signal: i32,
        /// What that means.
        advice: &'static str,
    },
    /// The server did not end in time.
    #[error("the serving process did not end within {} seconds and was killed", supervise::GRACE.as_secs())]
    Stuck,
}

impl Error {
    /// Exit status: the server's own, 128 + n when signal n killed it, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Mirrored(code) => *code,
            Error::Killed { signal, .. } => u8::try_from(128 + signal).unwrap_or(1),
            _ => 1,
        }
    }

    /// Whether the reason was printed already, by the other process.
    pub fn is_reported(&self) -> bool {
        matches!(self, Error::Mirrored(_))
    }
}

/// Serves until the front end is gone for good or a signal ends the daemon. Returns in two processes, the
/// supervisor and the server; each then ends with what was returned to it.
///
/// # Errors
/// [`Error`].
pub fn run(mut config: Config) -> Result<(), Error> {
    let limit = limits::apply(config.sandbox.rlimit_nofile)?;
    let budget = config.fd_budget(limit)?;
    config.host.fd_budget = budget;
    tracing::debug!("open files: {limit}, of them {budget} for the DPU");
    if (budget as u64) < limits::SMALL_BUDGET {
        tracing::warn!("only {budget} open files are left for the DPU; raise --rlimit-nofile");
    }
    let signals = SignalFd::take_over()?;
    let notifier = Notifier::from_environment();
    let (socket, leftovers) = listener::open(&config.listen.endpoint)?;
    match split(&config.sandbox)? {
        Side::Supervisor(supervisor) => {
            // The server's copy is the only one: when it closes the socket, nobody can connect any more.
            drop(socket);
            supervise::supervise(supervisor, &config.sandbox, &signals, &notifier, leftovers)
        }
        Side::Server(link) => {
            leftovers.forget();
            drop(notifier);
            server::run(config, link, socket, signals)
        }
    }
}
