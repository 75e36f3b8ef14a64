//! What `reserve` took and has not given back, so that `release` can undo exactly that and nothing else.
//!
//! Theory of operation. The kernel's interface is one absolute number per pool, so two programs that each read, add
//! and write would undo each other. [`StateDir::lock`] therefore holds an exclusive `flock` for the whole change, and
//! only its holder can read or write the record. The record is written *before* the kernel is asked, as an entry that
//! is `pending` with the pool's size at that moment; it becomes a plain entry when the pages are there. A process
//! killed in between leaves a pending entry, and the next one to take the lock settles it from what the pool has
//! grown by since. The record carries the kernel's boot id: pools are empty after a reboot, and an old
//! record must then be forgotten.
//!
//! Limit: a program that writes `nr_hugepages` by itself at the same time does not know this lock.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::size::PageSize;
use crate::sysfs::{Host, SysfsError};

/// Where the record is kept unless told otherwise. `/run` is empty after a boot, as the pools are.
pub const DEFAULT_STATE_DIR: &str = "/run/dpu-hugepages";

/// Pages taken on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Page size in KiB.
    pub page_kib: u64,
    /// Node number.
    pub node: u32,
    /// Pages taken; what was asked for while the entry is pending.
    pub pages: u64,
    /// Pool size before an unfinished change.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_from: Option<u64>,
}

impl Entry {
    /// The page size, if the record is sound.
    pub fn page(&self) -> Option<PageSize> {
        PageSize::from_kib(self.page_kib)
    }
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    version: u32,
    boot_id: String,
    entries: Vec<Entry>,
}

const VERSION: u32 = 1;

/// A record that cannot be read, written or locked.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An operation on a file failed.
    #[error("cannot {what} {}: {source}{}", path.display(), if source.kind() == io::ErrorKind::PermissionDenied { " (run as root)" } else { "" })]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not such a record.
    #[error(
        "{} is damaged ({reason}). Compare `dpu-hugepages status` with what should be reserved, then remove the file",
        path.display()
    )]
    Damaged {
        /// The record's path.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Somebody else is changing the pools.
    #[error("another dpu-hugepages is changing the pools (it holds {}); try again when it is done", path.display())]
    Busy {
        /// The lock file.
        path: PathBuf,
    },
    /// The kernel's figures could not be read.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
}

/// The directory of the record and its lock.
#[derive(Debug, Clone)]
pub struct StateDir {
    dir: PathBuf,
}

impl StateDir {
    /// A record in `dir`, which is made when something is to be written.
    pub fn at(dir: impl Into<PathBuf>) -> StateDir {
        StateDir { dir: dir.into() }
    }

    /// Takes the lock, waiting for its holder, and settles what a killed process left.
    pub fn lock(&self, host: &Host) -> Result<Locked, StateError> {
        self.take(host, FlockOperation::LockExclusive)
    }

    /// Takes the lock or says that it is held.
    pub fn try_lock(&self, host: &Host) -> Result<Locked, StateError> {
        self.take(host, FlockOperation::NonBlockingLockExclusive)
    }

    fn take(&self, host: &Host, operation: FlockOperation) -> Result<Locked, StateError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { what, path, source }
        };
        fs::DirBuilder::new().recursive(true).mode(0o755).create(&self.dir).map_err(io("make", &self.dir))?;
        let path = self.dir.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(io("open", &path))?;
        loop {
            match rustix::fs::flock(&file, operation) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Err(StateError::Busy { path }),
                Err(e) => return Err(StateError::Io { what: "lock", path, source: e.into() }),
            }
        }
        let record = self.read(host)?;
        let mut locked =
            Locked { dir: self.dir.clone(), boot_id: boot_id(host), entries: record, _lock: file };
        if locked.entries.iter().any(|e| e.pending_from.is_some()) {
            let entries = locked.entries.clone();
            locked.entries = settle(&entries, |page, node| host.pool_pages(node, page))?;
            locked.store()?;
        }
        Ok(locked)
    }

    /// The record as it is, for showing: no lock, empty when there is none.
    pub fn read(&self, host: &Host) -> Result<Vec<Entry>, StateError> {
        let path = self.dir.join("state.json");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(source) => return Err(StateError::Io { what: "read", path, source }),
        };
        let damaged = |reason: String| StateError::Damaged { path: path.clone(), reason };
        let record: Record = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
        if record.version != VERSION {
            return Err(damaged(format!("version {} is unknown", record.version)));
        }
        if let Some(entry) = record.entries.iter().find(|e| e.page().is_none()) {
            return Err(damaged(format!("{} KiB is no page size", entry.page_kib)));
        }
        Ok(if record.boot_id == boot_id(host) { record.entries } else { vec![] })
    }
}

fn boot_id(host: &Host) -> String {
    host.read("proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Turns pending entries into what the pool really grew by, at most what was asked for, and joins equal places.
pub(crate) fn settle<E>(
    entries: &[Entry],
    pool_pages: impl Fn(PageSize, u32) -> Result<u64, E>,
) -> Result<Vec<Entry>, E> {
    let mut settled: Vec<Entry> = vec![];
    for entry in entries {
        let mut entry = *entry;
        if let (Some(before), Some(page)) = (entry.pending_from.take(), entry.page()) {
            entry.pages = entry.pages.min(pool_pages(page, entry.node)?.saturating_sub(before));
        }
        match settled.iter_mut().find(|e| (e.page_kib, e.node) == (entry.page_kib, entry.node)) {
            Some(same) => same.pages += entry.pages,
            None => settled.push(entry),
        }
    }
    settled.retain(|e| e.pages > 0);
    settled.sort_by_key(|e| (e.page_kib, e.node));
    Ok(settled)
}

/// The record while its lock is held; the lock goes with the value.
#[derive(Debug)]
pub struct Locked {
    dir: PathBuf,
    boot_id: String,
    entries: Vec<Entry>,
    _lock: File,
}

impl Locked {
    /// What is recorded.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Notes that pages are about to be taken.
    pub(crate) fn begin(&mut self, pending: &[Entry]) -> Result<(), StateError> {
        self.entries.extend_from_slice(pending);
        self.store()
    }

    /// Replaces every pending entry by what was taken.
    pub(crate) fn commit(&mut self, taken: &[Entry]) -> Result<(), StateError> {
        self.entries.retain(|e| e.pending_from.is_none());
        self.entries.extend_from_slice(taken);
        let Ok(joined) = settle(&self.entries, |_, _| Ok::<_, std::convert::Infallible>(0));
        self.entries = joined;
        self.store()
    }

    /// Takes pages off the record of one place.
    pub(crate) fn give_back(&mut self, page: PageSize, node: u32, pages: u64) -> Result<(), StateError> {
        for entry in self.entries.iter_mut().filter(|e| e.page() == Some(page) && e.node == node) {
            entry.pages = entry.pages.saturating_sub(pages);
        }
        self.entries.retain(|e| e.pages > 0);
        self.store()
    }

    /// Writes a new file and renames it over the old one, so that a reader sees one or the other.
    fn store(&self) -> Result<(), StateError> {
        let path = self.dir.join("state.json");
        let io = |what| {
            let path = path.clone();
            move |source| StateError::Io { what, path, source }
        };
        if self.entries.is_empty() {
            return match fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io("remove")(e)),
                _ => Ok(()),
            };
        }
        let record =
            Record { version: VERSION, boot_id: self.boot_id.clone(), entries: self.entries.clone() };
        let text = serde_json::to_string_pretty(&record).map_err(|e| io("write")(e.into()))?;
        let new = self.dir.join("state.json.new");
        let mut file = File::create(&new).map_err(io("write"))?;
        file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(io("write"))?;
        fs::rename(&new, &path).map_err(io("replace"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::tests::two_node_tree;

    fn entry(node: u32, pages: u64, pending_from: Option<u64>) -> Entry {
        Entry { page_kib: 2048, node, pages, pending_from }
    }

    fn tree_with_boot_id(id: &str) -> (tempfile::TempDir, Host) {
        let (dir, host) = two_node_tree();
        fs::create_dir_all(dir.path().join("proc/sys/kernel/random")).unwrap();
        fs::write(dir.path().join("proc/sys/kernel/random/boot_id"), id).unwrap();
        (dir, host)
    }

    #[test]
    fn what_was_taken_is_remembered_and_joined() {
        let (tree, host) = tree_with_boot_id("a\n");
        let state = StateDir::at(tree.path().join("run"));
        let mut locked = state.lock(&host).unwrap();
        locked.begin(&[entry(0, 5, Some(0))]).unwrap();
        locked.commit(&[entry(0, 5, None)]).unwrap();
        locked.begin(&[entry(0, 9, Some(5)), entry(1, 9, Some(0))]).unwrap();
        locked.commit(&[entry(0, 2, None), entry(1, 3, None)]).unwrap();
        drop(locked);
        assert_eq!(state.read(&host).unwrap(), [entry(0, 7, None), entry(1, 3, None)]);
        let mut locked = state.lock(&host).unwrap();
        locked.give_back(PageSize::M2, 0, 7).unwrap();
        locked.give_back(PageSize::M2, 1, 1).unwrap();
        assert_eq!(locked.entries(), [entry(1, 2, None)]);
        locked.give_back(PageSize::M2, 1, 2).unwrap();
        assert!(!tree.path().join("run/state.json").exists());
    }

    #[test]
    fn a_killed_reserve_is_settled_from_the_pool() {
        let (tree, host) = tree_with_boot_id("a\n");
        let state = StateDir::at(tree.path().join("run"));
        let mut locked = state.lock(&host).unwrap();
        locked.begin(&[entry(0, 10, Some(4)), entry(1, 10, Some(0))]).unwrap();
        drop(locked);
        host.set_pool_pages(0, PageSize::M2, 7).unwrap();
        assert_eq!(state.lock(&host).unwrap().entries(), [entry(0, 3, None)]);
        assert_eq!(state.read(&host).unwrap(), [entry(0, 3, None)]);
    }

    #[test]
    fn a_reboot_forgets_the_record() {
        let (tree, host) = tree_with_boot_id("a\n");
        let state = StateDir::at(tree.path().join("run"));
        state.lock(&host).unwrap().commit(&[entry(0, 5, None)]).unwrap();
        fs::write(tree.path().join("proc/sys/kernel/random/boot_id"), "b\n").unwrap();
        assert_eq!(state.read(&host).unwrap(), []);
    }

    #[test]
    fn only_one_holds_the_lock() {
        let (tree, host) = tree_with_boot_id("a\n");
        let state = StateDir::at(tree.path().join("run"));
        let held = state.lock(&host).unwrap();
        assert!(matches!(state.try_lock(&host), Err(StateError::Busy { .. })));
        drop(held);
        state.try_lock(&host).unwrap();
    }

    #[test]
    fn a_damaged_record_is_refused_not_guessed() {
        let (tree, host) = tree_with_boot_id("a\n");
        let state = StateDir::at(tree.path().join("run"));
        state.lock(&host).unwrap();
        for text in [
            "{",
            r#"{"version":9,"boot_id":"a","entries":[]}"#,
            r#"{"version":1,"boot_id":"a","entries":[{"page_kib":3,"node":0,"pages":1}]}"#,
        ] {
            fs::write(tree.path().join("run/state.json"), text).unwrap();
            assert!(matches!(state.lock(&host), Err(StateError::Damaged { .. })), "{text}");
        }
    }
}
