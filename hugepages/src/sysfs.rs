//! What the kernel says about hugepages and memory, and the one thing it can be told: how many pages a node's pool has.
//!
//! Every path starts at a root that the caller gives, so that the same code reads a tree of files in a test, or the
//! `/sys` and `/proc` of a machine mounted elsewhere. Figures come from the per-node directories
//! (`/sys/devices/system/node/nodeN/hugepages`); a kernel built without NUMA has only `/sys/kernel/mm/hugepages`,
//! which then stands for node 0.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::plan::{NodeState, Topology};
use crate::size::PageSize;
use crate::sys;

/// A file of sysfs or `/proc` that could not be read or written.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what} {}: {source}{}", path.display(), hint(source))]
pub struct SysfsError {
    what: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl SysfsError {
    /// What the operating system said.
    pub fn io(&self) -> &io::Error {
        &self.source
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EACCES | libc::EPERM) => " (run as root)",
        Some(libc::EROFS) => " (read-only here, as in a container: run this on the host itself)",
        Some(libc::EINVAL) => {
            " (the kernel cannot make pages of this size while it runs: reserve them on the kernel command line, \
             see `dpu-hugepages persist`)"
        }
        _ => "",
    }
}

/// The pool of one page size, all nodes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pool {
    /// `nr_hugepages`, surplus included.
    pub total: u64,
    /// `free_hugepages`.
    pub free: u64,
    /// `resv_hugepages`: promised, not yet touched.
    pub reserved: u64,
    /// `surplus_hugepages`.
    pub surplus: u64,
    /// `nr_overcommit_hugepages`: how many surplus pages there may be.
    pub overcommit: u64,
}

/// `/proc/meminfo`, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemInfo {
    /// `MemTotal`.
    pub total: u64,
    /// `MemFree`.
    pub free: u64,
    /// `MemAvailable`: the kernel's own estimate of what can be had without swapping.
    pub available: u64,
}

/// A machine's `/sys` and `/proc` under some root.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Host::at("/")
    }
}

impl Host {
    /// The machine whose file tree begins at `root`; `/` for the real one.
    pub fn at(root: impl Into<PathBuf>) -> Host {
        Host { root: root.into() }
    }

    /// `path`, which must be relative, under the root.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        self.root.join(path)
    }

    /// Reads a whole small file.
    pub fn read(&self, path: impl AsRef<Path>) -> Result<String, SysfsError> {
        let path = self.path(path);
        fs::read_to_string(&path).map_err(|source| SysfsError { what: "read", path, source })
    }

    /// Reads a file that holds one number.
    pub fn read_number(&self, path: impl AsRef<Path>) -> Result<u64, SysfsError> {
        let path = path.as_ref();
        let text = self.read(path)?;
        text.trim().parse().map_err(|_| {
            let source =
                io::Error::new(io::ErrorKind::InvalidData, format!("not a number: {:?}", text.trim()));
            SysfsError { what: "read", path: self.path(path), source }
        })
    }

    fn write(&self, path: impl AsRef<Path>, text: &str) -> Result<(), SysfsError> {
        let path = self.path(path);
        // One write(2), no O_CREAT: the kernel takes each write as a whole command.
        let written = fs::OpenOptions::new().write(true).truncate(true).open(&path);
        written
            .and_then(|mut file| io::Write::write_all(&mut file, text.as_bytes()))
            .map_err(|source| SysfsError { what: "write", path, source })
    }

    /// The page sizes the kernel has pools for, smallest first.
    pub fn page_sizes(&self) -> Result<Vec<PageSize>, SysfsError> {
        let path = self.path("sys/kernel/mm/hugepages");
        let list = match fs::read_dir(&path) {
            Ok(list) => list,
            // A kernel without hugetlb has no such directory.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(vec![]),
            Err(source) => return Err(SysfsError { what: "list", path, source }),
        };
        let size = |name: &str| {
            PageSize::from_kib(name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?)
        };
        let mut sizes: Vec<_> =
            list.flatten().filter_map(|entry| size(entry.file_name().to_str()?)).collect();
        sizes.sort();
        Ok(sizes)
    }

    /// The page size that `/proc/sys/vm/nr_hugepages` and a plain `MAP_HUGETLB` mean. None without hugetlb.
    pub fn default_page_size(&self) -> Result<Option<PageSize>, SysfsError> {
        Ok(field(&self.read("proc/meminfo")?, "Hugepagesize").and_then(|b| PageSize::from_kib(b >> 10)))
    }

    /// Numbers of the nodes that have memory.
    pub fn nodes(&self) -> Result<Vec<u32>, SysfsError> {
        for list in ["has_memory", "online"] {
            let path = Path::new("sys/devices/system/node").join(list);
            if self.path(&path).exists() {
                return Ok(parse_ids(&self.read(path)?));
            }
        }
        Ok(vec![0])
    }

    fn pool_dir(&self, node: u32, page: PageSize) -> PathBuf {
        let dir = Path::new("sys/devices/system/node")
            .join(format!("node{node}/hugepages"))
            .join(page.sysfs_name());
        if self.path(&dir).exists() { dir } else { global_dir(page) }
    }

    /// The pool of one size over all nodes.
    pub fn pool(&self, page: PageSize) -> Result<Pool, SysfsError> {
        let dir = global_dir(page);
        Ok(Pool {
            total: self.read_number(dir.join("nr_hugepages"))?,
            free: self.read_number(dir.join("free_hugepages"))?,
            reserved: self.read_number(dir.join("resv_hugepages"))?,
            surplus: self.read_number(dir.join("surplus_hugepages"))?,
            overcommit: self.read_number(dir.join("nr_overcommit_hugepages"))?,
        })
    }

    /// The pool of one size on one node, and what memory the node could still give.
    pub fn node(&self, node: u32, page: PageSize) -> Result<NodeState, SysfsError> {
        let dir = self.pool_dir(node, page);
        Ok(NodeState {
            id: node,
            total: self.read_number(dir.join("nr_hugepages"))?,
            free: self.read_number(dir.join("free_hugepages"))?,
            surplus: self.read_number(dir.join("surplus_hugepages"))?,
            available: self.node_available(node)?,
        })
    }

    /// Everything a plan needs for one page size.
    pub fn topology(&self, page: PageSize) -> Result<Topology, SysfsError> {
        let nodes = self.nodes()?.into_iter().map(|n| self.node(n, page)).collect::<Result<_, _>>()?;
        Ok(Topology { page, reserved: self.pool(page)?.reserved, nodes })
    }

    /// Pages that belong to the node's pool for good: total less surplus.
    pub fn pool_pages(&self, node: u32, page: PageSize) -> Result<u64, SysfsError> {
        let dir = self.pool_dir(node, page);
        let total = self.read_number(dir.join("nr_hugepages"))?;
        Ok(total.saturating_sub(self.read_number(dir.join("surplus_hugepages"))?))
    }

    /// Asks the kernel for a pool of `pages` on one node, surplus not counted. It gives what it can and reports no
    /// shortfall: read [`Host::pool_pages`] afterwards. Pages in use that no longer fit become surplus pages.
    ///
    /// While *other* nodes have surplus pages, some kernels (6.1 for one) misread the node's own file by their number
    /// (`set_max_huge_pages` takes `nr_huge_pages` for the pool's size). Then the pool's file is written instead,
    /// which takes its nodes from the writing thread's memory policy and means the same in all kernels.
    pub fn set_pool_pages(&self, node: u32, page: PageSize, pages: u64) -> Result<(), SysfsError> {
        let (pool, own) = (self.pool(page)?, self.node(node, page)?);
        let by_policy = global_dir(page).join("nr_hugepages_mempolicy");
        if pool.surplus <= own.surplus || !self.path(&by_policy).exists() {
            return self.write(self.pool_dir(node, page).join("nr_hugepages"), &pages.to_string());
        }
        let others = (pool.total - pool.surplus).saturating_sub(own.total.saturating_sub(own.surplus));
        let text = others.saturating_add(pages).to_string();
        sys::bound_to_node(node, || self.write(&by_policy, &text)).map_err(|source| SysfsError {
            what: "bind this thread's memory to one node for",
            path: by_policy.clone(),
            source,
        })?
    }

    /// Asks the kernel to compact the node's memory (`Documentation/admin-guide/sysctl/vm.rst`), the whole machine's
    /// where nodes cannot be compacted alone.
    pub fn compact(&self, node: u32) -> Result<(), SysfsError> {
        let of_node = Path::new("sys/devices/system/node").join(format!("node{node}/compact"));
        if self.path(&of_node).exists() {
            self.write(of_node, "1")
        } else {
            self.write("proc/sys/vm/compact_memory", "1")
        }
    }

    /// Free blocks of the node that are large enough for a page, from `/proc/buddyinfo`. None where the file cannot
    /// tell: gigantic pages are larger than any block it lists.
    pub fn free_blocks(&self, node: u32, page: PageSize) -> Result<Option<u64>, SysfsError> {
        let base = rustix::param::page_size() as u64;
        let order = (page.bytes() / base).trailing_zeros() as usize;
        Ok(parse_buddyinfo(&self.read("proc/buddyinfo")?, node, order))
    }

    /// `/proc/meminfo`.
    pub fn meminfo(&self) -> Result<MemInfo, SysfsError> {
        let text = self.read("proc/meminfo")?;
        let get = |name| field(&text, name).unwrap_or(0);
        Ok(MemInfo { total: get("MemTotal"), free: get("MemFree"), available: get("MemAvailable") })
    }

    /// Memory of the node that could become hugepages while the host keeps 1/32 of its memory: free pages and
    /// page cache, never more than what the kernel estimates for the whole machine.
    ///
    /// With a single node the machine's own estimate is the node's. The node's file would be wrong there on kernels
    /// that put memory into service late: it counts only what has been put into service.
    fn node_available(&self, node: u32) -> Result<u64, SysfsError> {
        let machine = self.meminfo()?;
        let path = Path::new("sys/devices/system/node").join(format!("node{node}/meminfo"));
        if self.nodes()?.len() == 1 || !self.path(&path).exists() {
            return Ok(machine.available.saturating_sub(machine.total / 32));
        }
        let text = self.read(path)?;
        let get = |name| field(&text, name).unwrap_or(0);
        let cache = get("Active(file)") + get("Inactive(file)") + get("SReclaimable");
        let estimate = (get("MemFree") + cache).min(machine.available);
        Ok(estimate.saturating_sub(get("MemTotal") / 32))
    }
}

fn global_dir(page: PageSize) -> PathBuf {
    Path::new("sys/kernel/mm/hugepages").join(page.sysfs_name())
}

/// The value in bytes of a `Name:  123 kB` line of meminfo, with or without a leading `Node N`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (left, right) = line.split_once(':')?;
        if left.split_whitespace().next_back()? != name {
            return None;
        }
        right.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
    })
}

/// A kernel id list such as `0-1,4` (`lib/bitmap-str.c`). What is not one is left out.
pub(crate) fn parse_ids(text: &str) -> Vec<u32> {
    let mut ids = vec![];
    for part in text.trim().split(',').filter(|p| !p.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<u32>(), last.trim().parse::<u32>()) {
            // MAX_NUMNODES is 1024 at most: a longer range is not a node list.
            ids.extend((first..=last).take(1024));
        }
    }
    ids
}

/// Sums the free blocks of at least `order` over the zones of one node. None when the table has no such order.
fn parse_buddyinfo(text: &str, node: u32, order: usize) -> Option<u64> {
    let mut sum = None;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let of_node = words.next() == Some("Node")
            && words.next().and_then(|w| w.trim_end_matches(',').parse().ok()) == Some(node)
            && words.next() == Some("zone");
        if !of_node {
            continue;
        }
        let counts: Vec<u64> = words.skip(1).filter_map(|w| w.parse().ok()).collect();
        for (at, count) in counts.iter().enumerate().skip(order) {
            *sum.get_or_insert(0) += count << (at - order);
        }
    }
    sum
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A machine made of files: two nodes, 2M and 1G pools, all empty, 8 GiB available on each.
    pub(crate) fn two_node_tree() -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        for page in ["hugepages-2048kB", "hugepages-1048576kB"] {
            for file in ["nr_hugepages", "free_hugepages", "surplus_hugepages"] {
                put(&format!("sys/kernel/mm/hugepages/{page}/{file}"), "0\n");
                for node in 0..2 {
                    put(&format!("sys/devices/system/node/node{node}/hugepages/{page}/{file}"), "0\n");
                }
            }
            put(&format!("sys/kernel/mm/hugepages/{page}/resv_hugepages"), "0\n");
            put(&format!("sys/kernel/mm/hugepages/{page}/nr_overcommit_hugepages"), "0\n");
        }
        put("sys/devices/system/node/has_memory", "0-1\n");
        for node in 0..2 {
            let text = format!("Node {node} MemTotal:  8388608 kB\nNode {node} MemFree:  8388608 kB\n");
            put(&format!("sys/devices/system/node/node{node}/meminfo"), &text);
            put(&format!("sys/devices/system/node/node{node}/compact"), "");
        }
        put(
            "proc/meminfo",
            "MemTotal: 16777216 kB\nMemFree: 16777216 kB\nMemAvailable: 16777216 kB\nHugepagesize:       2048 kB\n",
        );
        put(
            "proc/buddyinfo",
            "Node 0, zone   Normal  1 1 1 1 1 1 1 1 1 3 4\nNode 1, zone   Normal  1 1 1 1 1 1 1 1 1 0 0\n",
        );
        let host = Host::at(dir.path());
        (dir, host)
    }

    #[test]
    fn a_tree_of_two_nodes_reads_as_a_topology() {
        let (_dir, host) = two_node_tree();
        assert_eq!(host.page_sizes().unwrap(), [PageSize::M2, PageSize::G1]);
        assert_eq!(host.default_page_size().unwrap(), Some(PageSize::M2));
        let t = host.topology(PageSize::M2).unwrap();
        assert_eq!(t.nodes.iter().map(|n| n.id).collect::<Vec<_>>(), [0, 1]);
        // 8 GiB less the 1/32 that stays with the host.
        assert_eq!(t.nodes[1].available, (8 << 30) - (8 << 30) / 32);
        host.set_pool_pages(1, PageSize::M2, 7).unwrap();
        assert_eq!(host.pool_pages(1, PageSize::M2).unwrap(), 7);
        assert_eq!(host.pool_pages(0, PageSize::M2).unwrap(), 0);
    }

    #[test]
    fn a_kernel_without_numa_is_node_zero() {
        let (dir, host) = two_node_tree();
        fs::remove_dir_all(dir.path().join("sys/devices")).unwrap();
        assert_eq!(host.nodes().unwrap(), [0]);
        host.set_pool_pages(0, PageSize::M2, 5).unwrap();
        assert_eq!(host.pool(PageSize::M2).unwrap().total, 5);
        assert!(host.topology(PageSize::M2).unwrap().nodes[0].available > 8 << 30);
    }

    #[test]
    fn a_kernel_without_hugetlb_has_no_sizes() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Host::at(dir.path()).page_sizes().unwrap(), []);
    }

    #[test]
    fn an_error_names_the_file_and_what_to_do() {
        let (dir, host) = two_node_tree();
        fs::write(dir.path().join("sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages"), "many\n")
            .unwrap();
        let text = host.pool(PageSize::M2).unwrap_err().to_string();
        assert!(text.contains("resv_hugepages") && text.contains("many"), "{text}");
        let error = |errno| SysfsError {
            what: "write",
            path: "/x".into(),
            source: io::Error::from_raw_os_error(errno),
        };
        assert!(error(libc::EACCES).to_string().contains("run as root"));
        assert!(error(libc::EINVAL).to_string().contains("kernel command line"));
    }

    #[test]
    fn kernel_lists_and_tables_are_parsed() {
        assert_eq!(parse_ids("0-2,5\n"), [0, 1, 2, 5]);
        assert_eq!(parse_ids("\n"), [0u32; 0]);
        assert_eq!(parse_ids("0-4294967295").len(), 1024);
        let table = "Node 0, zone  DMA  0 0 0 0 0 0 0 0 1 1 3\nNode 0, zone Normal 9 9 9 9 9 9 9 9 9 2 1\nNode 10, zone Normal 0 0 0 0 0 0 0 0 0 5 5\n";
        assert_eq!(parse_buddyinfo(table, 0, 9), Some(1 + 6 + 2 + 2));
        assert_eq!(parse_buddyinfo(table, 10, 10), Some(5));
        assert_eq!(parse_buddyinfo(table, 0, 18), None);
        assert_eq!(parse_buddyinfo(table, 1, 9), None);
    }

    #[test]
    fn this_machine_can_be_read() {
        let host = Host::default();
        assert!(host.meminfo().unwrap().total > 0);
        for page in host.page_sizes().unwrap() {
            let t = host.topology(page).unwrap();
            assert!(!t.nodes.is_empty());
            assert!(host.pool(page).unwrap().total >= t.nodes[0].free);
        }
    }
}
