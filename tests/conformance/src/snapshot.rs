//! A picture of a directory tree, to be compared with a later one.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// Everything an attack could change about one file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Portrait {
    mode: u32,
    owner: (u32, u32),
    links: u64,
    inode: u64,
    modified: (i64, i64),
    /// Bytes of a file, target of a symlink.
    content: Vec<u8>,
    xattrs: Vec<u8>,
}

/// All files below a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    root: PathBuf,
    files: BTreeMap<PathBuf, Portrait>,
}

impl Snapshot {
    /// Looks at a directory and everything below it.
    pub fn of(root: &Path) -> anyhow::Result<Self> {
        let mut files = BTreeMap::new();
        let mut pending = vec![root.to_owned()];
        while let Some(path) = pending.pop() {
            let meta =
                path.symlink_metadata().with_context(|| format!("cannot look at {}", path.display()))?;
            let content = if meta.is_symlink() {
                path.read_link()?.as_os_str().as_bytes().to_vec()
            } else if meta.is_file() {
                std::fs::read(&path)?
            } else {
                Vec::new()
            };
            if meta.is_dir() {
                for entry in std::fs::read_dir(&path)? {
                    pending.push(entry?.path());
                }
            }
            let mut names = vec![0; 4096];
            let len = rustix::fs::llistxattr(&path, &mut names).unwrap_or(0);
            names.truncate(len);
            let portrait = Portrait {
                mode: meta.mode(),
                owner: (meta.uid(), meta.gid()),
                links: meta.nlink(),
                inode: meta.ino(),
                modified: (meta.mtime(), meta.mtime_nsec()),
                content,
                xattrs: names,
            };
            files.insert(path, portrait);
        }
        Ok(Snapshot { root: root.to_owned(), files })
    }

    /// What is different now, one line per file; empty if nothing is.
    pub fn changes(&self) -> anyhow::Result<Vec<String>> {
        let now = Snapshot::of(&self.root)?;
        let gone = self.files.keys().filter(|path| !now.files.contains_key(*path));
        let mut lines: Vec<String> = gone.map(|path| format!("{} is gone", path.display())).collect();
        for (path, portrait) in &now.files {
            match self.files.get(path) {
                None => lines.push(format!("{} is new", path.display())),
                Some(before) if before != portrait => {
                    lines.push(format!("{} changed: {before:?} to {portrait:?}", path.display()));
                }
                Some(_) => {}
            }
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_change_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in ["content", "mode", "gone"] {
            std::fs::write(path(name), name).unwrap();
        }
        let before = Snapshot::of(dir.path()).unwrap();
        assert!(before.changes().unwrap().is_empty());
        std::fs::write(path("content"), "other").unwrap();
        rustix::fs::chmod(path("mode"), rustix::fs::Mode::RWXU).unwrap();
        std::fs::remove_file(path("gone")).unwrap();
        std::fs::write(path("new"), "").unwrap();
        let changes = before.changes().unwrap().join("\n");
        for name in ["content changed", "mode changed", "gone is gone", "new is new"] {
            assert!(changes.contains(name), "{changes}");
        }
    }
}
