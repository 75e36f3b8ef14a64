//! The state of the pools, and who holds their pages.
//!
//! A hugepage is held by whoever maps it, but also by an open memfd that nobody maps (a VMM that hands its memory to
//! others) and by a file left in a hugetlbfs mount by a program that crashed. All three are listed, since each keeps
//! pages out of the pool. Memory that several processes share appears once for each of them, with the same `object`.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::mounts::{self, HugetlbMount};
use crate::plan::NodeState;
use crate::size::PageSize;
use crate::smaps::{hugetlb_of_status, parse_numa_maps, parse_smaps};
use crate::state::Entry;
use crate::sysfs::{Host, SysfsError};

/// `linux/magic.h`.
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// Everything `dpu-hugepages status` shows. Serialised, it is the stable form of `status --json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// One entry for each page size the kernel has.
    pub pools: Vec<PoolStatus>,
    /// Processes that hold hugepages.
    pub holders: Vec<Holder>,
    /// Files in hugetlbfs mounts that have pages.
    pub files: Vec<HugetlbFile>,
    /// hugetlbfs mounts.
    pub mounts: Vec<HugetlbMount>,
    /// What `reserve` took and has not given back.
    pub recorded: Vec<Recorded>,
    /// Processes that could not be looked into, for want of permission.
    pub unreadable_processes: u64,
}

/// The pool of one page size. Counts are pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PoolStatus {
    /// The page size.
    pub page_size: PageSize,
    /// The same in bytes.
    pub page_bytes: u64,
    /// Whether it is the kernel's default hugepage size.
    pub default: bool,
    /// Pages there are.
    pub total: u64,
    /// Pages that nobody has touched.
    pub free: u64,
    /// Of the free ones, those promised to a mapping.
    pub reserved: u64,
    /// Pages beyond the pool's size.
    pub surplus: u64,
    /// How many surplus pages there may be.
    pub overcommit_limit: u64,
    /// The same by node.
    pub nodes: Vec<NodeState>,
}

impl PoolStatus {
    /// Pages free and promised to nobody.
    pub fn available(&self) -> u64 {
        self.free.saturating_sub(self.reserved)
    }
}

/// Pages recorded as taken by `reserve`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Recorded {
    /// The page size.
    pub page_size: PageSize,
    /// Node number.
    pub node: u32,
    /// Pages.
    pub pages: u64,
}

/// How a process holds pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// It maps them.
    Mapped,
    /// It has the file open, without a mapping.
    Open,
}

/// One process and one piece of hugepage memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    /// Process id.
    pub pid: u32,
    /// Name of its program.
    pub command: String,
    /// How it holds the memory.
    pub hold: Hold,
    /// What is held: the path as the kernel shows it, `/memfd:NAME (deleted)` for a memfd.
    pub path: String,
    /// The same for all holders of the same memory: device and inode. None for private memory.
    pub object: Option<(u64, u64)>,
    /// The page size.
    pub page_size: PageSize,
    /// Bytes that are mapped, or the size of the open file.
    pub size: u64,
    /// Bytes with pages behind them: in this process's mapping, or in the open file.
    pub bytes: u64,
    /// Bytes by NUMA node, for mappings.
    pub nodes: BTreeMap<u32, u64>,
    /// Whether other processes can see the memory.
    pub shared: bool,
}

/// A file in a hugetlbfs mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HugetlbFile {
    /// Where it is.
    pub path: PathBuf,
    /// Bytes with pages behind them.
    pub bytes: u64,
    /// The page size.
    pub page_size: PageSize,
    /// Whether a process that could be looked into has it open or mapped. A file that nobody uses was left behind;
    /// removing it gives its pages back.
    pub used: bool,
}

/// Reads everything. Processes come and go while it reads; what is gone is left out.
pub fn read(host: &Host, recorded: &[Entry]) -> Result<Status, SysfsError> {
    let default = host.default_page_size()?;
    let mut pools = vec![];
    for page in host.page_sizes()? {
        let pool = host.pool(page)?;
        pools.push(PoolStatus {
            page_size: page,
            page_bytes: page.bytes(),
            default: default == Some(page),
            total: pool.total,
            free: pool.free,
            reserved: pool.reserved,
            surplus: pool.surplus,
            overcommit_limit: pool.overcommit,
            nodes: host.topology(page)?.nodes,
        });
    }
    let mounts = mounts::list(host)?;
    // A promise without a page does not show in a process's counters: then every process is looked through.
    let promised = pools.iter().any(|p| p.reserved > 0);
    let (holders, unreadable_processes) = holders(host, promised);
    let used: HashSet<_> = holders.iter().filter_map(|h| h.object).collect();
    let mut files = vec![];
    for mount in &mounts {
        if let Some(page) = mount.page_size {
            find_files(&mount.path, page, &used, &mut files);
        }
    }
    let recorded = recorded
        .iter()
        .filter_map(|e| Some(Recorded { page_size: e.page()?, node: e.node, pages: e.pages }))
        .collect();
    Ok(Status { pools, holders, files, mounts, recorded, unreadable_processes })
}

/// All holders by process id, and how many processes could not be looked into. `promised`: also mappings that have
/// touched no page yet, which takes reading every process's mappings.
pub fn holders(host: &Host, promised: bool) -> (Vec<Holder>, u64) {
    let mut found = vec![];
    let mut unreadable = 0;
    let Ok(processes) = fs::read_dir(host.path("proc")) else { return (found, unreadable) };
    let mut pids: Vec<u32> =
        processes.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    for pid in pids {
        let dir = host.path(format!("proc/{pid}"));
        let mapped = mapped_by(pid, &dir, promised);
        let open = opened_by(pid, &dir);
        if mapped.is_none() || open.is_none() {
            // A process that has ended meanwhile is not unreadable.
            unreadable += u64::from(dir.exists());
        }
        let mapped = mapped.unwrap_or_default();
        let objects: HashSet<_> = mapped.iter().filter_map(|h| h.object).collect();
        let open =
            open.unwrap_or_default().into_iter().filter(|h| h.object.is_none_or(|o| !objects.contains(&o)));
        found.extend(open);
        found.extend(mapped);
    }
    found.sort_by(|a, b| (a.pid, a.hold, &a.path).cmp(&(b.pid, b.hold, &b.path)));
    (found, unreadable)
}

fn command_of(dir: &Path) -> String {
    fs::read_to_string(dir.join("comm")).map(|c| c.trim_end().to_owned()).unwrap_or_default()
}

/// The hugetlb mappings of one process, one entry for each object. None when it may not be looked into.
fn mapped_by(pid: u32, dir: &Path, promised: bool) -> Option<Vec<Holder>> {
    let status = fs::read_to_string(dir.join("status")).ok()?;
    // smaps walks all page tables of the process; this line says whether it is worth it.
    if hugetlb_of_status(&status) == 0 && !promised {
        return Some(vec![]);
    }
    let smaps = fs::read_to_string(dir.join("smaps")).ok()?;
    let nodes = fs::read_to_string(dir.join("numa_maps")).map(|t| parse_numa_maps(&t)).unwrap_or_default();
    let base = rustix::param::page_size() as u64;
    let mut list: Vec<Holder> = vec![];
    for vma in parse_smaps(&smaps) {
        let Some(page_size) = vma.hugetlb_page(base) else { continue };
        let device = rustix::fs::makedev(vma.device.0, vma.device.1);
        let object = vma.shared.then_some((device, vma.inode));
        let same = list.iter_mut().find(|h| object.is_some() && h.object == object);
        let at = nodes.get(&vma.start).cloned().unwrap_or_default();
        let at = at.into_iter().map(|(node, pages)| (node, pages * page_size.bytes()));
        match same {
            Some(holder) => {
                holder.size += vma.end - vma.start;
                holder.bytes += vma.hugetlb;
                for (node, bytes) in at {
                    *holder.nodes.entry(node).or_default() += bytes;
                }
            }
            None => list.push(Holder {
                pid,
                command: command_of(dir),
                hold: Hold::Mapped,
                path: vma.path,
                object,
                page_size,
                size: vma.end - vma.start,
                bytes: vma.hugetlb,
                nodes: at.collect(),
                shared: vma.shared,
            }),
        }
    }
    Some(list)
}

/// The hugetlb files that one process has open. None when it may not be looked into.
fn opened_by(pid: u32, dir: &Path) -> Option<Vec<Holder>> {
    let mut list: Vec<Holder> = vec![];
    for entry in fs::read_dir(dir.join("fd")).ok()?.flatten() {
        let link = entry.path();
        let Ok(target) = fs::read_link(&link) else { continue };
        // Only files can be hugetlb; sockets and pipes have no path.
        if !target.is_absolute() {
            continue;
        }
        let Ok(fs) = rustix::fs::statfs(&link) else { continue };
        if fs.f_type & 0xffff_ffff != HUGETLBFS_MAGIC {
            continue;
        }
        let (Ok(meta), Some(page_size)) = (fs::metadata(&link), PageSize::new(fs.f_bsize as u64)) else {
            continue;
        };
        let object = Some((meta.dev(), meta.ino()));
        if meta.is_file() && !list.iter().any(|h| h.object == object) {
            list.push(Holder {
                pid,
                command: command_of(dir),
                hold: Hold::Open,
                path: target.to_string_lossy().into_owned(),
                object,
                page_size,
                size: meta.len(),
                bytes: meta.blocks() * 512,
                nodes: BTreeMap::new(),
                shared: true,
            });
        }
    }
    Some(list)
}

/// Files with pages under a mount point. Directories are followed, links and other mounts are not.
fn find_files(dir: &Path, page_size: PageSize, used: &HashSet<(u64, u64)>, files: &mut Vec<HugetlbFile>) {
    let Ok(root) = fs::metadata(dir) else { return };
    let mut open = vec![dir.to_owned()];
    while let Some(dir) = open.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            if meta.dev() != root.dev() {
                continue;
            }
            if meta.is_dir() {
                open.push(entry.path());
            } else if meta.is_file() && meta.blocks() > 0 {
                let used = used.contains(&(meta.dev(), meta.ino()));
                files.push(HugetlbFile { path: entry.path(), bytes: meta.blocks() * 512, page_size, used });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
}
