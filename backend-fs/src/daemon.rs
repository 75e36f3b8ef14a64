//! Life of the daemon: listen, isolate, serve, reconnect, stop.
//!
//! ```text
//! run ─ limits ─ signals ─ listen ─ split ─┬─ supervisor: supervise ─ remove socket and pid file
//!                                          └─ server: enter ─ export ─ seal ─ ready ─ serve…
//! ```
//!
//! Up to `split` nothing has been given up and any failure leaves no trace. The stages of the
//! isolation are described in [`crate::sandbox`].

pub mod notify;
pub mod supervise;

use crate::config::Config;
use crate::sandbox::seccomp::{Call, RUNTIME_CALLS};
use crate::{limits, listener, sandbox};

/// System calls of the server besides those of the modules it runs.
const CALLS: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_poll, "waiting for signals and front ends"),
    Call::any(libc::SYS_ppoll, "as poll, on architectures without it"),
    Call::any(libc::SYS_read, "signalfd"),
];

/// Everything the sealed server may ask of the kernel.
pub const SERVER_CALLS: &[&[Call]] = &[RUNTIME_CALLS, CALLS, listener::CALLS];

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
    /// This build has no device.
    #[error("this build cannot serve {}", .0.display())]
    NoDevice(std::path::PathBuf),
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

/// Serves until the front end is gone for good or a signal ends the daemon.
///
/// # Errors
/// [`Error`]. In the supervisor as well as in the server: this function returns in both.
pub fn run(config: Config) -> Result<(), Error> {
    Err(Error::NoDevice(config.shared_dir.as_path().to_owned()))
}

/// Makes panics log lines. The standard hook would also want to read this program's own file for a
/// backtrace, which the sandbox forbids.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let thread = std::thread::current();
        tracing::error!("thread {}: {info}", thread.name().unwrap_or("without a name"));
    }));
}
