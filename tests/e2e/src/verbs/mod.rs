//! Single file operations, run on the host and in the DPU alike: `dpu-e2e do VERB …`.
//!
//! What a verb finds out goes to standard output as one line of JSON. A refused operation ends with exit code 1
//! and the name of the error (`EEXIST`, …) in the message, so that cases can tell refusals apart.

pub mod entry;
pub mod lock;
pub mod map;
pub mod pattern;
pub mod space;
pub mod stress;
pub mod tree;

use anyhow::{Context, Result};
use clap::Subcommand;
use serde::Serialize;

use crate::agent::Enter;

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Become another user or enter another root, then become a program.
    Enter(Enter),
    /// Directory entries and attributes.
    #[command(subcommand)]
    Entry(entry::Verb),
    /// Locks.
    #[command(subcommand)]
    Lock(lock::Verb),
    /// Memory mappings.
    #[command(subcommand)]
    Map(map::Verb),
    /// Files with a known content at every offset.
    #[command(subcommand)]
    Pattern(pattern::Verb),
    /// Holes, allocation, copying inside the file system.
    #[command(subcommand)]
    Space(space::Verb),
    /// Random operations, compared with a model.
    #[command(subcommand)]
    Stress(stress::Verb),
    /// Trees of many small files.
    #[command(subcommand)]
    Tree(tree::Verb),
}

impl Verb {
    /// Does it.
    ///
    /// # Errors
    /// When the operation fails.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Enter(enter) => enter.become_program(),
            Self::Entry(verb) => verb.perform(),
            Self::Lock(verb) => verb.perform(),
            Self::Map(verb) => verb.perform(),
            Self::Pattern(verb) => verb.perform(),
            Self::Space(verb) => verb.perform(),
            Self::Stress(verb) => verb.perform(),
            Self::Tree(verb) => verb.perform(),
        }
    }
}

/// Prints what was found out.
fn print<T: Serialize>(value: &T) -> Result<()> {
    println!("{}", serde_json::to_string(value).context("cannot write the result")?);
    Ok(())
}

/// The name of an error number, where cases compare it; otherwise the number's text.
fn error_name(error: rustix::io::Errno) -> String {
    use rustix::io::Errno;
    let names = [
        (Errno::ACCESS, "EACCES"),
        (Errno::AGAIN, "EAGAIN"),
        (Errno::EXIST, "EEXIST"),
        (Errno::INVAL, "EINVAL"),
        (Errno::NODATA, "ENODATA"),
        (Errno::NODEV, "ENODEV"),
        (Errno::NOENT, "ENOENT"),
        (Errno::NOSYS, "ENOSYS"),
        (Errno::NOTEMPTY, "ENOTEMPTY"),
        (Errno::OPNOTSUPP, "EOPNOTSUPP"),
        (Errno::PERM, "EPERM"),
        (Errno::RANGE, "ERANGE"),
        (Errno::ROFS, "EROFS"),
    ];
    let name = names.iter().find(|(candidate, _)| *candidate == error).map(|(_, name)| *name);
    name.map_or_else(|| error.to_string(), str::to_owned)
}

/// Adds the name of the error and what was tried.
trait Tried<T> {
    /// Says what was tried if it was refused.
    fn tried(self, what: &str) -> Result<T>;
}

impl<T> Tried<T> for rustix::io::Result<T> {
    fn tried(self, what: &str) -> Result<T> {
        self.map_err(|error| anyhow::anyhow!("{what}: {}", error_name(error)))
    }
}

impl<T> Tried<T> for std::io::Result<T> {
    fn tried(self, what: &str) -> Result<T> {
        self.map_err(|error| match rustix::io::Errno::from_io_error(&error) {
            Some(errno) => anyhow::anyhow!("{what}: {}", error_name(errno)),
            None => anyhow::anyhow!("{what}: {error}"),
        })
    }
}
