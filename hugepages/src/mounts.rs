//! hugetlbfs mounts: which there are, how one is made, and how it goes away.
//!
//! A hugetlbfs mount is only needed by front ends that name a path (`memory-backend-file`, DPDK, libvirt without
//! `<source type='memfd'/>`). Making one twice with the same options changes nothing; a different mount in the same
//! place is an error, because hugetlbfs cannot change its page size or limits on a remount.

use std::ffi::CString;
use std::fmt::Write as _;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, UnmountFlags};
use serde::Serialize;

use crate::size::{Bytes, PageSize, compact};
use crate::sysfs::{Host, SysfsError};

/// A hugetlbfs mount as `/proc/self/mountinfo` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HugetlbMount {
    /// Where it is mounted.
    pub path: PathBuf,
    /// Size of its pages.
    pub page_size: Option<PageSize>,
    /// Most bytes it may hold, None for no limit.
    pub size: Option<u64>,
    /// Bytes it has been promised from the pool for good.
    pub min_size: Option<u64>,
    /// Owner of its root directory.
    pub uid: u32,
    /// Group of its root directory.
    pub gid: u32,
    /// Permission bits of its root directory.
    pub mode: u32,
}

/// Every hugetlbfs mount of this process's namespace.
pub fn list(host: &Host) -> Result<Vec<HugetlbMount>, SysfsError> {
    let default = host.default_page_size()?;
    Ok(parse_mountinfo(&host.read("proc/self/mountinfo")?, default))
}

/// `proc(5)`: `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`.
fn parse_mountinfo(text: &str, default: Option<PageSize>) -> Vec<HugetlbMount> {
    let mut mounts: Vec<HugetlbMount> = vec![];
    for line in text.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let mut right = right.split(' ');
        let (Some("hugetlbfs"), Some(_), Some(options)) = (right.next(), right.next(), right.next()) else {
            continue;
        };
        let Some(path) = left.split(' ').nth(4) else { continue };
        let mut mount = HugetlbMount {
            path: unescape(path),
            page_size: default,
            size: None,
            min_size: None,
            uid: 0,
            gid: 0,
            // hugetlbfs_show_options leaves out what is the default (fs/hugetlbfs/inode.c).
            mode: 0o755,
        };
        for option in options.split(',') {
            let (name, value) = option.split_once('=').unwrap_or((option, ""));
            match name {
                "pagesize" => mount.page_size = value.parse().ok(),
                "size" => mount.size = limit(value),
                "min_size" => mount.min_size = limit(value),
                "uid" => mount.uid = value.parse().unwrap_or(0),
                "gid" => mount.gid = value.parse().unwrap_or(0),
                "mode" => mount.mode = u32::from_str_radix(value, 8).unwrap_or(0o755),
                _ => {}
            }
        }
        // A later mount on the same place hides the earlier one.
        mounts.retain(|m| m.path != mount.path);
        mounts.push(mount);
    }
    mounts
}

/// The kernel writes limits in bytes, without a unit.
fn limit(value: &str) -> Option<u64> {
    let bytes = value.parse().ok().or_else(|| value.parse::<Bytes>().ok().map(|b| b.0));
    bytes.filter(|b| *b > 0)
}

/// `\040` and its like, which the kernel writes for blanks, tabs, newlines and backslashes.
fn unescape(text: &str) -> PathBuf {
    let bytes = text.as_bytes();
    let mut path = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let code = bytes.get(at + 1..at + 4).filter(|_| bytes[at] == b'\\');
        match code.and_then(|c| u8::from_str_radix(std::str::from_utf8(c).ok()?, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                at += 4;
            }
            None => {
                path.push(bytes[at]);
                at += 1;
            }
        }
    }
    PathBuf::from(std::ffi::OsStr::from_bytes(&path))
}

/// A mount to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountWish {
    /// Where; the directory is made if it is missing.
    pub path: PathBuf,
    /// Size of its pages.
    pub page_size: PageSize,
    /// Most bytes it may hold.
    pub size: Option<u64>,
    /// Bytes to promise to it from the pool.
    pub min_size: Option<u64>,
    /// Owner of its root directory.
    pub uid: u32,
    /// Group of its root directory.
    pub gid: u32,
    /// Permission bits of its root directory.
    pub mode: u32,
}

/// Why a mount could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The path is not absolute.
    #[error("the mount point `{}` must be an absolute path", .0.display())]
    Relative(PathBuf),
    /// Limits that cannot be.
    #[error("{what} {} is not a whole number of pages of {page}", Bytes(*size))]
    Misaligned {
        /// Which limit.
        what: &'static str,
        /// Its value.
        size: u64,
        /// The page size.
        page: PageSize,
    },
    /// More is promised than allowed.
    #[error("--min-size is larger than --size")]
    MinAboveSize,
    /// The kernel has no such pages.
    #[error("the kernel has no hugepages of {page}; it has: {}", if known.is_empty() { "none" } else { known })]
    NoSuchPageSize {
        /// The page size.
        page: PageSize,
        /// Those it has.
        known: String,
    },
    /// Something else is mounted there.
    #[error(
        "a different hugetlbfs is mounted on {} already ({has}; wanted: {wanted}). Unmount it first: `dpu-hugepages \
         umount {}`",
        path.display(), path.display()
    )]
    Different {
        /// Where.
        path: PathBuf,
        /// What is there, as mount options.
        has: String,
        /// What was wanted, as mount options.
        wanted: String,
    },
    /// No hugetlbfs is mounted there.
    #[error("no hugetlbfs is mounted on {}", .0.display())]
    NotMounted(PathBuf),
    /// Somebody uses it.
    #[error(
        "{} is in use: something has a file open or mapped there, or works in it. `dpu-hugepages status` lists who",
        .0.display()
    )]
    Busy(PathBuf),
    /// The pool cannot keep the promise.
    #[error(
        "the pool has not enough free pages for --min-size {}: run `dpu-hugepages reserve --size {} --page-size {page}` first",
        Bytes(*size), compact(*size)
    )]
    PoolTooSmall {
        /// Bytes to be promised.
        size: u64,
        /// The page size.
        page: PageSize,
    },
    /// The system refused.
    #[error("cannot {what} {}: {source}{}", path.display(), if source.raw_os_error() == Some(libc::EPERM) { " (run as root)" } else { "" })]
    Io {
        /// What was tried.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel's figures could not be read.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
}

impl MountWish {
    /// The options for `mount -t hugetlbfs -o` and for `/etc/fstab`.
    pub fn options(&self) -> String {
        let mut text = format!("pagesize={}", self.page_size);
        for (name, value) in [("size", self.size), ("min_size", self.min_size)] {
            if let Some(bytes) = value {
                let _ = write!(text, ",{name}={}", compact(bytes));
            }
        }
        if self.uid != 0 {
            let _ = write!(text, ",uid={}", self.uid);
        }
        if self.gid != 0 {
            let _ = write!(text, ",gid={}", self.gid);
        }
        let _ = write!(text, ",mode={:04o}", self.mode);
        text
    }

    /// The line for `/etc/fstab`.
    pub fn fstab_line(&self) -> String {
        let path = self
            .path
            .display()
            .to_string()
            .replace('\\', "\\134")
            .replace(' ', "\\040")
            .replace('\t', "\\011");
        format!("hugetlbfs {path} hugetlbfs {} 0 0", self.options())
    }

    fn check(&self, host: &Host) -> Result<(), MountError> {
        if !self.path.is_absolute() {
            return Err(MountError::Relative(self.path.clone()));
        }
        for (what, value) in [("--size", self.size), ("--min-size", self.min_size)] {
            if let Some(size) = value.filter(|s| !s.is_multiple_of(self.page_size.bytes())) {
                return Err(MountError::Misaligned { what, size, page: self.page_size });
            }
        }
        if matches!((self.size, self.min_size), (Some(size), Some(min)) if min > size) {
            return Err(MountError::MinAboveSize);
        }
        let known = host.page_sizes()?;
        if !known.contains(&self.page_size) {
            let known = known.iter().map(PageSize::to_string).collect::<Vec<_>>().join(", ");
            return Err(MountError::NoSuchPageSize { page: self.page_size, known });
        }
        Ok(())
    }

    fn matches(&self, mount: &HugetlbMount) -> bool {
        mount.page_size == Some(self.page_size)
            && (mount.size, mount.min_size) == (self.size, self.min_size)
            && (mount.uid, mount.gid, mount.mode) == (self.uid, self.gid, self.mode)
    }
}

impl HugetlbMount {
    /// Its options in the form of `mount -o`.
    pub fn options(&self) -> String {
        let wish = MountWish {
            path: self.path.clone(),
            page_size: self.page_size.unwrap_or(PageSize::M2),
            size: self.size,
            min_size: self.min_size,
            uid: self.uid,
            gid: self.gid,
            mode: self.mode,
        };
        wish.options()
    }
}

/// Mounts a hugetlbfs. False when exactly this one is there already.
pub fn mount(host: &Host, wish: &MountWish) -> Result<bool, MountError> {
    wish.check(host)?;
    if let Some(there) = list(host)?.into_iter().find(|m| m.path == wish.path) {
        if wish.matches(&there) {
            return Ok(false);
        }
        let (has, wanted) = (there.options(), wish.options());
        return Err(MountError::Different { path: wish.path.clone(), has, wanted });
    }
    let io = |what| {
        let path = wish.path.clone();
        move |source| MountError::Io { what, path, source }
    };
    let existed = wish.path.exists();
    std::fs::create_dir_all(&wish.path).map_err(io("make"))?;
    let data = CString::new(wish.options()).map_err(|e| io("mount")(e.into()))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    match rustix::mount::mount("hugetlbfs", &wish.path, "hugetlbfs", flags, Some(data.as_c_str())) {
        Ok(()) => Ok(true),
        Err(error) => {
            if !existed {
                // Only the last directory: the others may have come from somebody else at the same time.
                let _ = std::fs::remove_dir(&wish.path);
            }
            match (error, wish.min_size) {
                (rustix::io::Errno::NOMEM, Some(size)) => {
                    Err(MountError::PoolTooSmall { size, page: wish.page_size })
                }
                _ => Err(io("mount hugetlbfs on")(error.into())),
            }
        }
    }
}

/// Unmounts a hugetlbfs; files in it that nobody has open give their pages back.
pub fn umount(host: &Host, path: &Path) -> Result<(), MountError> {
    if !list(host)?.iter().any(|m| m.path == path) {
        return Err(MountError::NotMounted(path.to_owned()));
    }
    match rustix::mount::unmount(path, UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::BUSY) => Err(MountError::Busy(path.to_owned())),
        Err(e) => Err(MountError::Io { what: "unmount", path: path.to_owned(), source: e.into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sysfs::tests::two_node_tree;

    const MOUNTINFO: &str = "\
21 1 0:20 / /sys rw,nosuid - sysfs sysfs rw
30 21 0:17 / /dev/hugepages rw,relatime shared:9 - hugetlbfs hugetlbfs rw,pagesize=2M
31 21 0:18 / /mnt/huge\\0401G rw,nosuid - hugetlbfs none rw,seclabel,uid=64055,gid=107,mode=1770,pagesize=1024M,size=4294967296,min_size=1073741824
";

    fn wish() -> MountWish {
        MountWish {
            path: "/mnt/huge 1G".into(),
            page_size: PageSize::G1,
            size: Some(4 << 30),
            min_size: Some(1 << 30),
            uid: 64055,
            gid: 107,
            mode: 0o1770,
        }
    }

    #[test]
    fn mounts_are_read_with_their_options() {
        let mounts = parse_mountinfo(MOUNTINFO, Some(PageSize::M2));
        assert_eq!(mounts.len(), 2);
        assert_eq!(
            (mounts[0].path.to_str(), mounts[0].page_size, mounts[0].mode),
            (Some("/dev/hugepages"), Some(PageSize::M2), 0o755)
        );
        assert!(wish().matches(&mounts[1]), "{:?}", mounts[1]);
        assert!(!wish().matches(&mounts[0]));
    }

    #[test]
    fn options_are_what_mount_takes() {
        assert_eq!(wish().options(), "pagesize=1G,size=4G,min_size=1G,uid=64055,gid=107,mode=1770");
        assert_eq!(
            wish().fstab_line(),
            "hugetlbfs /mnt/huge\\0401G hugetlbfs pagesize=1G,size=4G,min_size=1G,uid=64055,gid=107,mode=1770 0 0"
        );
    }

    #[test]
    fn a_wish_that_cannot_be_is_refused_before_anything_happens() {
        let (tree, host) = two_node_tree();
        let refused = |change: &dyn Fn(&mut MountWish)| {
            let mut wish = MountWish { path: tree.path().join("mnt"), ..wish() };
            change(&mut wish);
            let text = mount(&host, &wish).unwrap_err().to_string();
            assert!(!tree.path().join("mnt").exists());
            text
        };
        assert!(refused(&|w| w.path = "mnt".into()).contains("absolute"));
        assert!(refused(&|w| w.size = Some((4 << 30) + 1)).contains("whole number of pages of 1G"));
        assert!(refused(&|w| w.min_size = Some(5 << 30)).contains("larger than --size"));
        assert!(refused(&|w| w.page_size = PageSize::from_kib(16 << 10).unwrap()).contains("it has: 2M, 1G"));
    }

    #[test]
    fn a_mount_that_is_there_is_left_alone_or_refused() {
        let (tree, host) = two_node_tree();
        std::fs::create_dir_all(tree.path().join("proc/self")).unwrap();
        std::fs::write(tree.path().join("proc/self/mountinfo"), MOUNTINFO).unwrap();
        assert!(!mount(&host, &wish()).unwrap());
        let error = mount(&host, &MountWish { gid: 1, ..wish() }).unwrap_err();
        assert!(matches!(error, MountError::Different { .. }), "{error}");
        assert!(matches!(umount(&host, Path::new("/elsewhere")), Err(MountError::NotMounted(_))));
    }
}
