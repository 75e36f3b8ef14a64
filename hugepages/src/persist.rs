//! Reservations that come back after a boot.
//!
//! Three ways, because the kernel has three: a `vm.nr_hugepages` line in `sysctl.d` sets the default page size's pool
//! over all nodes; a `tmpfiles.d` line can write any pool of any node; and gigantic pages (1G) are best taken on the
//! kernel command line, before memory fragments. The first two are files, written here; the command line belongs to
//! the boot loader, so it is printed. Each file says in its first line who wrote it, and a file of that name without
//! this line is left alone.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::size::PageSize;

/// First line of what is written here.
const MARK: &str = "# Written by `dpu-hugepages persist`; `dpu-hugepages persist --remove` removes it.";
/// Below the root.
pub const SYSCTL_FILE: &str = "etc/sysctl.d/60-dpu-hugepages.conf";
/// Below the root.
pub const TMPFILES_FILE: &str = "etc/tmpfiles.d/dpu-hugepages.conf";

/// What shall come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lasting {
    /// The page size.
    pub page: PageSize,
    /// Pages in the pool, all nodes together.
    pub pages: u64,
    /// Nodes to spread them over; empty leaves it to the kernel, which spreads over all.
    pub nodes: Vec<u32>,
}

/// How it comes back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// A file with this content below the root.
    File {
        /// Its path, relative.
        path: &'static str,
        /// Its content.
        text: String,
    },
    /// Arguments for the kernel.
    CommandLine(String),
}

/// Why it could not be made to last.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// A file of that name was written by somebody else.
    #[error("{} was not written by dpu-hugepages and is left alone: move it away, or add the line yourself: {line}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// The line that it should have had.
        line: String,
    },
    /// The system refused.
    #[error("cannot {what} {}: {source}{}", path.display(), if source.kind() == io::ErrorKind::PermissionDenied { " (run as root)" } else { "" })]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Chooses the way. `default` is the kernel's default hugepage size.
pub fn way(wish: &Lasting, default: Option<PageSize>) -> Way {
    let shares = spread(wish);
    if wish.page.is_gigantic() {
        let count = if wish.nodes.is_empty() {
            wish.pages.to_string()
        } else {
            // Per-node counts: Linux 5.16 (Documentation/admin-guide/kernel-parameters.txt, hugepages=).
            shares.iter().map(|(node, pages)| format!("{node}:{pages}")).collect::<Vec<_>>().join(",")
        };
        return Way::CommandLine(format!("hugepagesz={} hugepages={count}", wish.page));
    }
    if wish.nodes.is_empty() && default == Some(wish.page) {
        let text = format!("{MARK}\nvm.nr_hugepages = {}\n", wish.pages);
        return Way::File { path: SYSCTL_FILE, text };
    }
    let mut text = format!("{MARK}\n");
    let name = wish.page.sysfs_name();
    if wish.nodes.is_empty() {
        let _ = writeln!(text, "w /sys/kernel/mm/hugepages/{name}/nr_hugepages - - - - {}", wish.pages);
    }
    for (node, pages) in shares {
        let _ = writeln!(
            text,
            "w /sys/devices/system/node/node{node}/hugepages/{name}/nr_hugepages - - - - {pages}"
        );
    }
    Way::File { path: TMPFILES_FILE, text }
}

fn spread(wish: &Lasting) -> Vec<(u32, u64)> {
    let mut nodes = wish.nodes.clone();
    nodes.sort_unstable();
    nodes.dedup();
    let count = nodes.len() as u64;
    let share = |i: u64| wish.pages / count + u64::from(i < wish.pages % count);
    nodes.into_iter().zip(0u64..).map(|(node, i)| (node, share(i))).filter(|(_, pages)| *pages > 0).collect()
}

/// What became of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It was written.
    New,
    /// It had this content already.
    Same,
}

/// Writes a file below `root`, as a whole or not at all, and removes the one of the other kind, which would undo it.
pub fn write(root: &Path, path: &'static str, text: &str) -> Result<Written, PersistError> {
    let target = root.join(path);
    let line = text.lines().nth(1).unwrap_or_default();
    let old = own_text(&target, line)?;
    let other = if path == SYSCTL_FILE { TMPFILES_FILE } else { SYSCTL_FILE };
    let other = root.join(other);
    let stale = own_text(&other, line).is_ok_and(|text| text.is_some());
    if old.as_deref() != Some(text) {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| PersistError::Io { what, path, source }
        };
        let dir = target.parent().unwrap_or(root);
        fs::create_dir_all(dir).map_err(io("make", dir))?;
        // sysctl.d and tmpfiles.d read only names that end in .conf.
        let new = target.with_extension("conf.new");
        let result = File::create(&new)
            .and_then(|mut file| file.write_all(text.as_bytes()).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, &target))
            .and_then(|()| File::open(dir)?.sync_all());
        if let Err(source) = result {
            let _ = fs::remove_file(&new);
            return Err(io("write", &target)(source));
        }
    }
    if stale {
        fs::remove_file(&other).map_err(|source| PersistError::Io { what: "remove", path: other, source })?;
    }
    Ok(if old.as_deref() == Some(text) { Written::Same } else { Written::New })
}

/// Removes what was written below `root`. Returns the files that went.
pub fn remove(root: &Path) -> Result<Vec<PathBuf>, PersistError> {
    let mut gone = vec![];
    for path in [SYSCTL_FILE, TMPFILES_FILE].map(|p| root.join(p)) {
        if own_text(&path, "none; it was not made here")?.is_some() {
            fs::remove_file(&path).map_err(|source| PersistError::Io {
                what: "remove",
                path: path.clone(),
                source,
            })?;
            gone.push(path);
        }
    }
    Ok(gone)
}

/// The content of a file that was written here; None when there is no file.
fn own_text(path: &Path, line: &str) -> Result<Option<String>, PersistError> {
    match fs::read_to_string(path) {
        Ok(text) if text.starts_with(MARK) => Ok(Some(text)),
        Ok(_) => Err(PersistError::Foreign { path: path.to_owned(), line: line.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(PersistError::Io { what: "read", path: path.to_owned(), source }),
    }
}

/// Other files below `root` that set `vm.nr_hugepages` too. Of several the last one read wins.
pub fn rivals(root: &Path) -> Vec<PathBuf> {
    let own = root.join(SYSCTL_FILE);
    let mut files = vec![root.join("etc/sysctl.conf")];
    for dir in ["etc/sysctl.d", "run/sysctl.d", "usr/local/lib/sysctl.d", "usr/lib/sysctl.d"] {
        let entries = fs::read_dir(root.join(dir)).into_iter().flatten().flatten();
        files.extend(entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "conf")));
    }
    let sets = |text: String| {
        text.lines().any(|line| {
            let name = line
                .trim()
                .trim_start_matches('-')
                .split('=')
                .next()
                .unwrap_or_default()
                .trim()
                .replace('/', ".");
            name == "vm.nr_hugepages"
        })
    };
    files.retain(|p| *p != own && fs::read_to_string(p).is_ok_and(sets));
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(page: PageSize, pages: u64, nodes: &[u32]) -> Lasting {
        Lasting { page, pages, nodes: nodes.to_vec() }
    }

    #[test]
    fn the_default_size_goes_to_sysctl() {
        let Way::File { path, text } = way(&wish(PageSize::M2, 512, &[]), Some(PageSize::M2)) else {
            panic!()
        };
        assert_eq!((path, text.lines().nth(1)), (SYSCTL_FILE, Some("vm.nr_hugepages = 512")));
    }

    #[test]
    fn nodes_and_other_sizes_go_to_tmpfiles() {
        let Way::File { path, text } = way(&wish(PageSize::M2, 5, &[1, 0, 1]), Some(PageSize::M2)) else {
            panic!()
        };
        assert_eq!(path, TMPFILES_FILE);
        assert_eq!(
            text.lines().skip(1).collect::<Vec<_>>(),
            [
                "w /sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages - - - - 3",
                "w /sys/devices/system/node/node1/hugepages/hugepages-2048kB/nr_hugepages - - - - 2"
            ]
        );
        let Way::File { text, .. } = way(&wish(PageSize::M2, 5, &[]), Some(PageSize::G1)) else { panic!() };
        assert!(text.ends_with("w /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages - - - - 5\n"));
    }

    #[test]
    fn gigantic_pages_go_to_the_command_line() {
        let line = |nodes: &[u32]| way(&wish(PageSize::G1, 5, nodes), Some(PageSize::M2));
        assert_eq!(line(&[]), Way::CommandLine("hugepagesz=1G hugepages=5".into()));
        assert_eq!(line(&[0, 1]), Way::CommandLine("hugepagesz=1G hugepages=0:3,1:2".into()));
    }

    #[test]
    fn files_are_written_once_and_removed() {
        let root = tempfile::tempdir().unwrap();
        let text = |n| format!("{MARK}\nvm.nr_hugepages = {n}\n");
        assert_eq!(write(root.path(), SYSCTL_FILE, &text(1)).unwrap(), Written::New);
        assert_eq!(write(root.path(), SYSCTL_FILE, &text(1)).unwrap(), Written::Same);
        assert_eq!(write(root.path(), SYSCTL_FILE, &text(2)).unwrap(), Written::New);
        assert_eq!(fs::read_to_string(root.path().join(SYSCTL_FILE)).unwrap(), text(2));
        write(root.path(), TMPFILES_FILE, &format!("{MARK}\nw /sys/x - - - - 1\n")).unwrap();
        assert!(!root.path().join(SYSCTL_FILE).exists(), "two files would contradict each other");
        assert_eq!(remove(root.path()).unwrap(), [root.path().join(TMPFILES_FILE)]);
        assert_eq!(remove(root.path()).unwrap(), [] as [PathBuf; 0]);
        assert_eq!(
            fs::read_dir(root.path().join("etc/sysctl.d")).unwrap().count(),
            0,
            "no temporary file is left"
        );
    }

    #[test]
    fn a_file_of_somebody_else_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(SYSCTL_FILE);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, "vm.nr_hugepages = 7\n").unwrap();
        let error = write(root.path(), SYSCTL_FILE, &format!("{MARK}\nvm.nr_hugepages = 1\n")).unwrap_err();
        assert!(error.to_string().contains("add the line yourself: vm.nr_hugepages = 1"), "{error}");
        assert!(remove(root.path()).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "vm.nr_hugepages = 7\n");
    }

    #[test]
    fn rivals_are_found() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            fs::create_dir_all(root.path().join(path).parent().unwrap()).unwrap();
            fs::write(root.path().join(path), text).unwrap();
        };
        put("etc/sysctl.conf", "# vm.nr_hugepages = 3\nvm.swappiness=1\n");
        put("etc/sysctl.d/99-dpdk.conf", " vm/nr_hugepages=1024\n");
        put("usr/lib/sysctl.d/50-x.conf", "vm.nr_hugepages_mempolicy = 1\n");
        put(SYSCTL_FILE, "vm.nr_hugepages = 1\n");
        assert_eq!(rivals(root.path()), [root.path().join("etc/sysctl.d/99-dpdk.conf")]);
    }
}
