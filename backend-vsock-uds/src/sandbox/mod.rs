//! Isolation of the daemon: what a DPU sees that has taken it over completely.
//!
//! | stage | when | given up |
//! |---|---|---|
//! | 1 | first thing in `main` | inherited descriptors that nobody named ([`descriptors`]) |
//! | 2 | sockets made, before any other thread | all capabilities but one, and new ones ([`capabilities`]) |
//! | 3 | then | every file: opening, making, changing; own sockets can still be removed ([`landlock`]) |
//! | 4 | threads run, before the first byte of a front end | system calls outside the allow list; `openat` makes `O_PATH` descriptors only ([`seccomp`]) |
//!
//! What is left: Unix sockets that the daemon's user may connect to, by any path, not only those of rules
//! (Landlock cannot tell them apart), and its own sockets. The stages hold one by one where the kernel has
//! them; a kernel without Landlock keeps stage 4, which allows no file to be opened for reading or writing
//! either.
//!
//! The daemon reaches host programs by their paths, so it stays in the host's mount namespace, and it
//! passes their connections on, so it stays in the network namespace, whose abstract sockets no rule can
//! name.

pub mod capabilities;
pub mod descriptors;
pub mod landlock;
pub mod seccomp;
pub mod signals;

use std::io;
use std::os::fd::OwnedFd;

/// Why the process could not be isolated.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Capabilities.
    #[error("cannot drop capabilities: {step}: {reason}")]
    Capabilities {
        /// The step.
        step: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// Landlock.
    #[error("cannot restrict the daemon with Landlock: {0}")]
    Landlock(String),
    /// seccomp.
    #[error(
        "cannot install the system call filter: {0}; the kernel needs CONFIG_SECCOMP_FILTER, or use --seccomp=none"
    )]
    Seccomp(String),
    /// Signals.
    #[error("cannot take over signals")]
    Signals(#[source] io::Error),
}

/// Stages 2 and 3. To be called while this thread is the only one: both hold for it and those it starts.
///
/// # Errors
/// [`Error::Capabilities`], [`Error::Landlock`].
pub fn enter<'a>(directories: impl IntoIterator<Item = &'a OwnedFd>) -> Result<(), Error> {
    capabilities::reduce()?;
    let enforced = landlock::restrict(directories)?;
    tracing::debug!("Landlock: {}", if enforced { "enforced" } else { "not available" });
    Ok(())
}
