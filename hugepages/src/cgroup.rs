//! The hugetlb limits that a process's control groups put on it, cgroup v1 and v2.
//!
//! A group may have a limit on pages that are touched (`hugetlb.2MB.max`) and one on pages that are promised
//! (`hugetlb.2MB.rsvd.max`). Beyond the first a process dies of SIGBUS, beyond the second `mmap` fails. The limits of
//! all groups above count as well, so the tightest on the way up is what matters.

use std::path::{Path, PathBuf};

use crate::size::PageSize;
use crate::sysfs::Host;

/// The tightest limit found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HugetlbLimit {
    /// The file that sets it.
    pub file: PathBuf,
    /// Bytes allowed.
    pub limit: u64,
    /// Bytes of it that are left.
    pub left: u64,
}

/// v1 writes "no limit" as the largest page count times the page size (`mm/page_counter.c`).
const V1_NO_LIMIT: u64 = 1 << 62;

/// The tightest hugetlb limit on `process` (a process id, or `self`). None when nothing limits it, or where the
/// groups are not to be seen.
pub fn hugetlb_limit(host: &Host, process: &str, page: PageSize) -> Option<HugetlbLimit> {
    let groups = host.read(format!("proc/{process}/cgroup")).ok()?;
    let mounts = host.read("proc/self/mountinfo").ok()?;
    let (dir, root, v2) = group_dir(&groups, &mounts)?;
    let size = page.cgroup_name();
    let (limits, usages) = if v2 {
        (["max", "rsvd.max"], ["current", "rsvd.current"])
    } else {
        (["limit_in_bytes", "rsvd.limit_in_bytes"], ["usage_in_bytes", "rsvd.usage_in_bytes"])
    };
    let mut tightest: Option<HugetlbLimit> = None;
    let mut at = Some(dir.as_path());
    while let Some(dir) = at.filter(|d| d.starts_with(&root)) {
        for (limit, usage) in limits.iter().zip(usages) {
            let file = dir.join(format!("hugetlb.{size}.{limit}"));
            // Missing in the root group and where the controller is off; `max` is not a number.
            let Ok(limit) = host.read_number(relative(&file)) else { continue };
            if limit >= V1_NO_LIMIT {
                continue;
            }
            let used = host.read_number(relative(&dir.join(format!("hugetlb.{size}.{usage}")))).unwrap_or(0);
            let left = limit.saturating_sub(used);
            if tightest.as_ref().is_none_or(|t| left < t.left) {
                tightest = Some(HugetlbLimit { file, limit, left });
            }
        }
        at = dir.parent();
    }
    tightest
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// The process's group directory, the mount it lies under, and whether that is cgroup v2. A v1 hugetlb hierarchy
/// comes first: where it is mounted, v2 does not have the controller.
fn group_dir(groups: &str, mounts: &str) -> Option<(PathBuf, PathBuf, bool)> {
    let group = |wanted: &str| {
        groups.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            let found = if wanted.is_empty() {
                controllers.is_empty()
            } else {
                controllers.split(',').any(|c| c == wanted)
            };
            found.then(|| path.trim_start_matches('/').to_owned())
        })
    };
    let mount = |kind: &str, option: &str| {
        mounts.lines().find_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut right = right.split(' ');
            let (found, _, options) = (right.next()?, right.next()?, right.next()?);
            let fits = found == kind && (option.is_empty() || options.split(',').any(|o| o == option));
            fits.then(|| left.split(' ').nth(4).map(PathBuf::from)).flatten()
        })
    };
    if let (Some(group), Some(mount)) = (group("hugetlb"), mount("cgroup", "hugetlb")) {
        return Some((mount.join(group), mount, false));
    }
    let (group, mount) = (group("")?, mount("cgroup2", "")?);
    Some((mount.join(group), mount, true))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let host = Host::at(dir.path());
        (dir, host)
    }

    const V2: &str = "29 21 0:25 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";

    #[test]
    fn the_tightest_v2_limit_on_the_way_up_counts() {
        let (_dir, host) = tree(&[
            ("proc/self/mountinfo", V2),
            ("proc/7/cgroup", "0::/machine/vm\n"),
            ("sys/fs/cgroup/machine/vm/hugetlb.2MB.max", "max\n"),
            ("sys/fs/cgroup/machine/vm/hugetlb.2MB.rsvd.max", "8388608\n"),
            ("sys/fs/cgroup/machine/vm/hugetlb.2MB.rsvd.current", "2097152\n"),
            ("sys/fs/cgroup/machine/hugetlb.2MB.max", "16777216\n"),
            ("sys/fs/cgroup/machine/hugetlb.2MB.current", "14680064\n"),
        ]);
        let limit = hugetlb_limit(&host, "7", PageSize::M2).unwrap();
        assert_eq!((limit.limit, limit.left), (16 << 20, 2 << 20));
        assert_eq!(limit.file, Path::new("/sys/fs/cgroup/machine/hugetlb.2MB.max"));
        assert_eq!(hugetlb_limit(&host, "7", PageSize::G1), None);
        assert_eq!(hugetlb_limit(&host, "8", PageSize::M2), None);
    }

    #[test]
    fn a_v1_hierarchy_is_read_and_its_no_limit_known() {
        let mounts = format!("{V2}30 21 0:26 / /sys/fs/cgroup/hugetlb rw - cgroup cgroup rw,hugetlb\n");
        let (_dir, host) = tree(&[
            ("proc/self/mountinfo", &mounts),
            ("proc/self/cgroup", "9:cpu,cpuacct:/a\n8:hugetlb:/b\n0::/c\n"),
            ("sys/fs/cgroup/hugetlb/b/hugetlb.1GB.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/hugetlb/hugetlb.1GB.limit_in_bytes", "2147483648\n"),
            ("sys/fs/cgroup/hugetlb/hugetlb.1GB.usage_in_bytes", "0\n"),
        ]);
        let limit = hugetlb_limit(&host, "self", PageSize::G1).unwrap();
        assert_eq!(limit.left, 2 << 30);
    }
}
