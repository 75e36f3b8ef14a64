//! Locks. A verb that takes one says so in a line and holds it until the process is killed.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{Tried, print};
use crate::sys::{self, LockKind, RecordLock};

/// The line that says that the lock is held.
pub const LOCKED: &str = "locked";

/// What to do with a lock.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Take a lock on the whole file with `flock(2)` and hold it.
    Flock(Hold),
    /// Take a record lock of the process with `fcntl(2)` and hold it.
    Posix(Hold),
    /// Take a record lock of the open file with `fcntl(2)` and hold it.
    OpenFile(Hold),
    /// Ask which record lock is in the way.
    Test(Hold),
}

/// A lock.
#[derive(Clone, Debug, Args)]
pub struct Hold {
    /// The file; it must exist.
    #[arg(long)]
    file: PathBuf,
    /// Kind of the lock.
    #[arg(long, default_value = "exclusive")]
    kind: Kind,
    /// First byte.
    #[arg(long, default_value_t = 0)]
    start: i64,
    /// Number of bytes; 0 reaches to the end.
    #[arg(long, default_value_t = 0)]
    len: i64,
    /// Wait until it is free.
    #[arg(long)]
    wait: bool,
    /// Let go at once.
    #[arg(long)]
    release: bool,
}

/// Kind of a lock.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Kind {
    /// Others may share it.
    Shared,
    /// Nobody else may have it.
    Exclusive,
}

/// The lock in the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InTheWay {
    /// True for an exclusive lock.
    pub exclusive: bool,
    /// First locked byte.
    pub start: i64,
    /// Number of locked bytes, 0 for "to the end".
    pub len: i64,
}

impl Verb {
    /// Does it.
    ///
    /// # Errors
    /// When the lock is refused.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Flock(hold) => {
                let file = hold.open()?;
                let operation = match (hold.kind, hold.wait) {
                    (Kind::Shared, true) => FlockOperation::LockShared,
                    (Kind::Shared, false) => FlockOperation::NonBlockingLockShared,
                    (Kind::Exclusive, true) => FlockOperation::LockExclusive,
                    (Kind::Exclusive, false) => FlockOperation::NonBlockingLockExclusive,
                };
                flock(&file, operation).tried("flock")?;
                hold.keep();
                Ok(())
            }
            Self::Posix(hold) => hold.record(RecordLock::Posix),
            Self::OpenFile(hold) => hold.record(RecordLock::OpenFile),
            Self::Test(hold) => {
                let found =
                    sys::test_record_lock(&hold.open()?, hold.kind(), hold.range()).tried("F_GETLK")?;
                print(&found.map(|lock| InTheWay {
                    exclusive: lock.exclusive,
                    start: lock.start,
                    len: lock.len,
                }))
            }
        }
    }
}

impl Hold {
    fn open(&self) -> Result<File> {
        OpenOptions::new().read(true).write(true).open(&self.file).tried("open")
    }

    fn kind(&self) -> LockKind {
        match self.kind {
            Kind::Shared => LockKind::Shared,
            Kind::Exclusive => LockKind::Exclusive,
        }
    }

    fn range(&self) -> sys::Range {
        sys::Range { start: self.start, len: self.len }
    }

    fn record(&self, family: RecordLock) -> Result<()> {
        let file = self.open()?;
        sys::set_record_lock(&file, family, self.kind(), self.range(), self.wait).tried("lock")?;
        self.keep();
        Ok(())
    }

    fn keep(&self) {
        println!("{LOCKED}");
        if self.release {
            return;
        }
        // Until it is killed; parking may end for no reason.
        loop {
            std::thread::park();
        }
    }
}
