//! What can go wrong between driver and daemon.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of the transport or of the machinery around it. Errors a file system *answers* are
/// [`crate::fuse::FuseError::Errno`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call of the driver itself failed.
    #[error("cannot {what}")]
    Os {
        /// What was attempted, as a verb phrase.
        what: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// Not enough free hugepages for a memory region.
    #[error("no {pages} free hugepages of 2 MiB for DPU memory; reserve them: sysctl vm.nr_hugepages=N")]
    NoHugepages {
        /// Pages wanted.
        pages: usize,
    },
    /// The DPU memory is used up.
    #[error("DPU memory is full: no room for {len} bytes")]
    MemoryFull {
        /// Bytes wanted.
        len: usize,
    },
    /// The daemon could not be started.
    #[error("cannot start {program}; is it built or installed? {hint}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// What to do.
        hint: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The daemon ended when it should have run.
    #[error("{program} ended early ({status}); its stderr:\n{stderr}")]
    DaemonEnded {
        /// The program.
        program: String,
        /// Exit status in words.
        status: String,
        /// What it printed.
        stderr: String,
    },
    /// Waited in vain.
    #[error("nothing within {waited:?} while waiting for {what}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        waited: Duration,
    },
    /// The daemon closed the vhost-user connection.
    #[error("the daemon closed the vhost-user connection while {during}")]
    Disconnected {
        /// What the driver was doing.
        during: String,
    },
    /// The daemon answered a vhost-user message wrongly.
    #[error("vhost-user {request}: {problem}")]
    VhostUser {
        /// Name of the request.
        request: String,
        /// What was wrong with the answer.
        problem: String,
    },
    /// The daemon refused a request that asked for an acknowledgement.
    #[error("the daemon refused vhost-user {request} (answer {code})")]
    Refused {
        /// Name of the request.
        request: String,
        /// The non-zero answer.
        code: u64,
    },
    /// The daemon lacks a feature that the test asked for.
    #[error("the daemon does not offer {feature}")]
    NotOffered {
        /// Feature by name.
        feature: String,
    },
    /// The ring has no room for the chain now.
    #[error("the ring is full")]
    RingFull,
    /// The device broke the rules of the virtqueue.
    #[error("the device broke the ring: {0}")]
    RingProtocol(String),
    /// The device answered something that is no FUSE reply to the request.
    #[error("bad FUSE reply to {operation}: {problem}")]
    FuseProtocol {
        /// Operation by name.
        operation: String,
        /// What is wrong.
        problem: String,
    },
}

impl Error {
    /// Wraps an errno with what was attempted.
    pub(crate) fn os(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Error::Os { what: what.into(), source: source.into() }
    }
}
