//! Gathers what [`crate::doctor`] judges. Everything is tried or read for real; what cannot be read is left out.

use std::collections::BTreeMap;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::cgroup::{HugetlbLimit, hugetlb_limit};
use crate::mounts::{self, HugetlbMount};
use crate::plan::Topology;
use crate::qemu_argv::{Mistake, is_qemu, mistakes};
use crate::size::PageSize;
use crate::status::{self, HugetlbFile};
use crate::sysfs::{Host, MemInfo, Pool, SysfsError};

/// A resource limit; None is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// What a process gets without asking.
    pub soft: Option<u64>,
    /// What it may ask for.
    pub hard: Option<u64>,
}

/// A tmpfs and its room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes it may hold.
    pub size: u64,
    /// Bytes that are left.
    pub free: u64,
}

/// A running QEMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Qemu {
    /// Process id.
    pub pid: u32,
    /// `-name`, if it has one.
    pub name: Option<String>,
    /// What its arguments get wrong.
    pub mistakes: Vec<Mistake>,
}

/// What is so on this machine.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Pools by page size.
    pub pools: BTreeMap<PageSize, (Pool, Topology)>,
    /// The kernel's default hugepage size.
    pub default_page: Option<PageSize>,
    /// Memory figures.
    pub memory: MemInfo,
    /// Whether a memfd can be made and sealed; else what the system said.
    pub memfd: Option<Result<(), String>>,
    /// The same with `MFD_HUGETLB`, by page size.
    pub memfd_hugetlb: BTreeMap<PageSize, Result<(), String>>,
    /// Whether memory can be filled with an error instead of SIGBUS (`MADV_POPULATE_WRITE`).
    pub populate: Option<bool>,
    /// Open files.
    pub nofile: Option<Limit>,
    /// Locked memory in bytes.
    pub memlock: Option<Limit>,
    /// Tightest hugetlb limit by page size.
    pub cgroup: BTreeMap<PageSize, HugetlbLimit>,
    /// Whether hugetlb pages count as memory of the group (`memory_hugetlb_accounting`, Linux 6.6).
    pub hugetlb_in_memory_cgroup: bool,
    /// hugetlbfs mounts.
    pub mounts: Vec<HugetlbMount>,
    /// Files with pages that no process has open.
    pub abandoned: Vec<HugetlbFile>,
    /// `transparent_hugepage/shmem_enabled`, the word that is chosen.
    pub thp_shmem: Option<String>,
    /// `/dev/shm`.
    pub dev_shm: Option<Room>,
    /// Whether this runs in a container.
    pub container: bool,
    /// Running QEMUs.
    pub qemus: Vec<Qemu>,
    /// The process that limits and groups are of.
    pub process: String,
}

/// Looks at the machine, and at the limits of `process` (a process id, or `self`).
pub fn gather(host: &Host, process: &str) -> Result<Facts, SysfsError> {
    let mut facts = Facts {
        default_page: host.default_page_size()?,
        memory: host.meminfo()?,
        process: process.to_owned(),
        ..Facts::default()
    };
    for page in host.page_sizes()? {
        facts.pools.insert(page, (host.pool(page)?, host.topology(page)?));
        facts.memfd_hugetlb.insert(page, try_memfd(Some(page)));
        if let Some(limit) = hugetlb_limit(host, process, page) {
            facts.cgroup.insert(page, limit);
        }
    }
    facts.memfd = Some(try_memfd(None));
    facts.populate = Some(try_populate());
    if let Ok(text) = host.read(format!("proc/{process}/limits")) {
        facts.nofile = parse_limit(&text, "Max open files");
        facts.memlock = parse_limit(&text, "Max locked memory");
    }
    let mountinfo = host.read("proc/self/mountinfo").unwrap_or_default();
    let accounting = |l: &str| l.contains(" - cgroup2 ") && l.contains("memory_hugetlb_accounting");
    facts.hugetlb_in_memory_cgroup = mountinfo.lines().any(accounting);
    facts.mounts = mounts::list(host)?;
    facts.abandoned = abandoned(host)?;
    let thp = host.read("sys/kernel/mm/transparent_hugepage/shmem_enabled").ok();
    facts.thp_shmem = thp.and_then(|t| Some(t.split_once('[')?.1.split_once(']')?.0.to_owned()));
    facts.dev_shm = rustix::fs::statvfs(host.path("dev/shm")).ok().filter(|s| s.f_blocks > 0).map(|s| Room {
        size: s.f_blocks.saturating_mul(s.f_frsize),
        free: s.f_bavail.saturating_mul(s.f_frsize),
    });
    facts.container = in_container(host);
    facts.qemus = qemus(host);
    Ok(facts)
}

/// Only where every process can be looked into: else an open file would pass for an abandoned one.
fn abandoned(host: &Host) -> Result<Vec<HugetlbFile>, SysfsError> {
    let status = status::read(host, &[])?;
    if status.unreadable_processes > 0 {
        return Ok(vec![]);
    }
    Ok(status.files.into_iter().filter(|f| !f.used).collect())
}

fn try_memfd(page: Option<PageSize>) -> Result<(), String> {
    let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    if let Some(page) = page {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::from_bits_retain(page.shift() << 26);
    }
    let fd = rustix::fs::memfd_create("dpu-hugepages-doctor", flags).map_err(|e| e.to_string())?;
    rustix::fs::ftruncate(&fd, page.map_or(1 << 20, PageSize::bytes)).map_err(|e| e.to_string())?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW).map_err(|e| e.to_string())
}

fn try_populate() -> bool {
    let attempt = || -> std::io::Result<()> {
        let fd = rustix::fs::memfd_create("dpu-hugepages-doctor", MemfdFlags::CLOEXEC)?;
        let page = rustix::param::page_size();
        rustix::fs::ftruncate(&fd, page as u64)?;
        let mapping = crate::sys::Mapping::shared(std::os::fd::AsFd::as_fd(&fd), 0, page, false)?;
        mapping.populate(0, page, true)
    };
    attempt().is_ok()
}

/// `Max open files            20000                20000                files`
fn parse_limit(text: &str, name: &str) -> Option<Limit> {
    let mut words = text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace();
    let mut value = || {
        let word = words.next()?;
        Some(if word == "unlimited" { None } else { Some(word.parse().ok()?) })
    };
    Some(Limit { soft: value()?, hard: value()? })
}

fn in_container(host: &Host) -> bool {
    let marks = ["run/.containerenv", ".dockerenv", "run/systemd/container"];
    marks.iter().any(|m| host.path(m).exists())
        || host.read("proc/1/environ").is_ok_and(|e| e.split('\0').any(|v| v.starts_with("container=")))
}

fn qemus(host: &Host) -> Vec<Qemu> {
    let mut list = vec![];
    for entry in std::fs::read_dir(host.path("proc")).into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else { continue };
        let Ok(text) = std::fs::read(entry.path().join("cmdline")) else { continue };
        let args: Vec<String> =
            text.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
        if args.first().is_some_and(|program| is_qemu(program)) {
            let name = args.windows(2).find(|w| w[0] == "-name").map(|w| w[1].clone());
            list.push(Qemu { pid, name, mistakes: mistakes(&args) });
        }
    }
    list.sort_by_key(|q| q.pid);
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_can_be_looked_at() {
        let facts = gather(&Host::default(), "self").unwrap();
        assert_eq!(facts.memfd, Some(Ok(())));
        assert!(facts.memory.total > 0 && facts.nofile.is_some());
        assert_eq!(facts.pools.len(), facts.memfd_hugetlb.len());
    }

    #[test]
    fn limits_are_read_with_blanks_in_their_names() {
        let text = "Limit   Soft Limit  Hard Limit  Units\nMax locked memory   8388608   unlimited   bytes\n\
                    Max open files            1024                 20000                files\n";
        assert_eq!(parse_limit(text, "Max open files"), Some(Limit { soft: Some(1024), hard: Some(20000) }));
        assert_eq!(parse_limit(text, "Max locked memory"), Some(Limit { soft: Some(8 << 20), hard: None }));
        assert_eq!(parse_limit(text, "Max processes"), None);
    }
}
