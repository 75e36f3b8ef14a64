//! Isolation of the process that talks to the DPU.
//!
//! # Theory of operation
//!
//! Two processes come out of one start, in every mode:
//!
//! - the **supervisor** is the process the caller started. It stays in the caller's namespaces,
//!   never looks at a byte that comes from the DPU, forwards signals, reports how the other one
//!   ended, mirrors its exit code and removes the socket and the pid file;
//! - the **server** talks to the front end and to the DPU's rings and does the host's system calls.
//!   It gives up everything else, in numbered stages. A stage may rely on all earlier ones.
//!
//! | stage | when | given up |
//! |---|---|---|
//! | 0 | first thing in `main` | inherited descriptors that nobody named ([`descriptors`]) |
//! | 1 | after listening | the supervisor: all capabilities but `DAC_OVERRIDE` (to remove its files), new privileges, all system calls but those for waiting and cleaning up ([`process`]) |
//! | 2 | server, at birth | mode `namespace`: other processes (pid namespace), the network (net namespace), and as non-root the caller's user namespace ([`process`], [`user_namespace`]); life without the supervisor (`PDEATHSIG`) |
//! | 3 | server | supplementary groups |
//! | 4 | server | every path outside the export: `pivot_root` or `chroot` ([`mounts`]); device nodes and set-id bits of the export; write access with `--readonly` |
//! | 5 | server | capabilities that serving does not need, the bounding and ambient sets, new privileges ([`capabilities`]) |
//! | 6 | server, before the first thread | modes `chroot` and `none` without file handles: paths outside the export and `/proc/self/fd` ([`landlock`]) |
//! | 7 | last, before the first byte of a front end | system calls outside the allow list ([`seccomp`]) |
//!
//! # What each mode leaves reachable
//!
//! The mode answers one question: what does a server see that the DPU has taken over completely?
//!
//! - `namespace`: the export, and the list of its own descriptors. The latter is a bind mount of
//!   `/proc/self/fd` alone, taken from a procfs of the new pid namespace before the pivot, and
//!   afterwards held only by a descriptor: `..` of it leads nowhere, the host's `/proc` does not exist.
//! - `chroot`: the export, for every path lookup. The descriptor of `/proc/self/fd` belongs to the
//!   host's procfs, so `..` of it would lead out; where Landlock applies (below) it leads to `EACCES`.
//!   The network and other processes are out of reach through seccomp and capabilities only.
//! - `none`: everything the daemon's user may open, less what Landlock forbids.
//!
//! **File handles** (`--inode-file-handles`) need `CAP_DAC_READ_SEARCH`, and `open_by_handle_at`
//! opens any inode of the same *file system*, whatever the root directory is. That is true for every
//! daemon that uses them and for every mode: who exports a part of a file system and wants the rest
//! of it out of reach even of a conquered server says `--inode-file-handles=never`.
//!
//! **Landlock** adds nothing in mode `namespace`: no path leads out, the network namespace is empty
//! and there is no other process. It cannot be used with file handles: a file opened by its handle may
//! have no path yet (a disconnected dentry), and Landlock refuses what it cannot walk up from. So it is
//! used in exactly the two other modes, when no file handles are.
//!
//! # Limits
//!
//! Forking needs a process with one thread; [`process::split`] refuses otherwise. The supervisor's
//! death kills the server (`SIGKILL`): a server that nobody watches would hold the DPU's files
//! without anybody to end it.

pub mod capabilities;
pub mod descriptors;
pub mod landlock;
pub mod mounts;
pub mod options;
pub mod process;
pub mod seccomp;
pub mod signals;
pub mod user_namespace;

use std::io;
use std::path::{Path, PathBuf};

use caps::CapsHashSet;
use rustix::io::Errno;
use rustix::process::geteuid;

use mounts::View;
use options::SandboxOptions;
use seccomp::Call;

/// Why the process could not be isolated. Each names the step, what it was done on and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More than one thread at the time of the fork.
    #[error("cannot isolate a process with {0} threads: a library started one before the sandbox")]
    Threads(usize),
    /// `fork(2)` and what belongs to it.
    #[error("cannot start the isolated process: {step}")]
    Start {
        /// The step.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// `unshare(2)`.
    #[error("--sandbox=namespace: cannot make new {what}: {error}; {advice}")]
    Unshare {
        /// Which namespaces.
        what: &'static str,
        /// What the kernel said.
        error: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// Id maps of the user namespace.
    #[error("--sandbox=namespace: cannot set the {what} of the user namespace: {reason}")]
    IdMap {
        /// `uid map` or `gid map`.
        what: &'static str,
        /// What failed.
        reason: String,
    },
    /// Changing to the namespace's own user.
    #[error("cannot become {what} inside the sandbox")]
    Identity {
        /// The new identity.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// A step of the change of root.
    #[error("cannot confine the daemon to {}: {step}", .export.display())]
    Mount {
        /// The export.
        export: PathBuf,
        /// The step.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Capabilities.
    #[error("cannot drop capabilities: {step}: {reason}")]
    Capabilities {
        /// The step.
        step: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// A capability that was asked for and is not there to keep.
    #[error("--modcaps: cannot keep {0}: the daemon was started without it")]
    CapabilityMissing(String),
    /// Landlock.
    #[error("cannot restrict the daemon to {} with Landlock: {reason}", .export.display())]
    Landlock {
        /// The export.
        export: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// seccomp.
    #[error(
        "cannot install the system call filter: {0}; the kernel needs CONFIG_SECCOMP_FILTER, or use --seccomp=none"
    )]
    Seccomp(String),
    /// Signals.
    #[error("cannot take over signals")]
    Signals(#[source] io::Error),
    /// The supervisor went away during start-up.
    #[error("the supervising process ended during start-up")]
    SupervisorGone,
}

impl Error {
    fn start(step: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Error::Start { step, source: errno.into() }
    }
}

/// What the server is to be confined to, and how.
#[derive(Clone, Copy, Debug)]
pub struct Confinement<'a> {
    /// The command line's wishes.
    pub options: &'a SandboxOptions,
    /// The export.
    pub export: &'a Path,
    /// No change may be made below the export.
    pub readonly: bool,
    /// Inodes may be kept as file handles.
    pub file_handles: bool,
}

impl Confinement<'_> {
    /// Stages 4 to 6, in the server.
    ///
    /// # Errors
    /// [`Error::Mount`], [`Error::Capabilities`], [`Error::CapabilityMissing`], [`Error::Landlock`].
    pub fn enter(&self) -> Result<View, Error> {
        let view = mounts::confine(self.options.mode, self.export, self.readonly)?;
        let keep = capabilities::kept(&self.options.modcaps, self.file_handles);
        // An unprivileged daemon has nothing to insist on.
        let none = CapsHashSet::new();
        let insist = if geteuid().is_root() { &self.options.modcaps.add } else { &none };
        let left = capabilities::reduce(&keep, insist)?;
        tracing::debug!("capabilities: {}", listing(&left));
        let file_handles = self.file_handles && capabilities::can_use_file_handles();
        if landlock::applies(self.options.mode, file_handles) {
            let enforced = landlock::restrict(&view, self.export)?;
            tracing::debug!("Landlock: {}", if enforced { "enforced" } else { "not available" });
        }
        Ok(view)
    }

    /// Stage 7, in the server, when everything that serving needs is open. `calls` are the tables of
    /// all modules that run from now on.
    ///
    /// # Errors
    /// [`Error::Seccomp`].
    pub fn seal(&self, calls: &[&[Call]]) -> Result<(), Error> {
        seccomp::install(self.options.seccomp, calls)
    }
}

fn listing(set: &CapsHashSet) -> String {
    let mut names: Vec<_> = set.iter().map(ToString::to_string).collect();
    names.sort();
    names.join(" ")
}
