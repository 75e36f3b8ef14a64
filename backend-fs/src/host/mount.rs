//! The host mounts an export reaches: what kind of file system each is, and whether its files have handles.
//!
//! A mount is known by device and mount id together: btrfs subvolumes differ in the first, bind mounts
//! in the second. The table is a snapshot that lookups read without a lock; a new mount makes a new
//! snapshot and drops those that no inode uses any more.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use rustix::fs::{OFlags, Statx};

use super::options::FileHandles;
use super::sys::{self, FileHandle};
use super::table::lock;
use crate::filesystem::Result;

/// What to expect of calls on a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FsKind {
    /// All in memory (tmpfs, proc): calls do not wait for a device.
    Memory,
    /// On a local block device, with `RWF_NOWAIT` as a rule (ext4, xfs, btrfs).
    Disk,
    /// Local in some other way (overlayfs, vfat): a call waits for a device at most.
    Other,
    /// Calls may wait for another machine or another program (NFS, CIFS, FUSE), perhaps for ever.
    Remote,
}

impl FsKind {
    /// By the magic number of `statfs(2)` (`include/uapi/linux/magic.h` and the file systems' sources).
    fn of_magic(magic: u32) -> Self {
        match magic {
            // tmpfs, ramfs, hugetlbfs, proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs, pstore, devpts.
            0x0102_1994 | 0x8584_58f6 | 0x9584_58f6 | 0x9fa0 | 0x6265_6572 | 0x0027_e0eb | 0x6367_7270
            | 0x6462_6720 | 0x7472_6163 | 0x7363_6673 | 0x6165_676c | 0x1cd1 => FsKind::Memory,
            // ext2/3/4, xfs, btrfs, f2fs, zfs.
            0xef53 | 0x5846_5342 | 0x9123_683e | 0xf2f5_2010 | 0x2fc1_2fc1 => FsKind::Disk,
            // NFS, CIFS, SMB2, SMB, FUSE, 9p, Ceph, AFS, kAFS, Coda, Lustre, GFS2, OCFS2, autofs, OrangeFS.
            0x6969 | 0xff53_4d42 | 0xfe53_4d42 | 0x517b | FUSE_MAGIC | 0x0102_1997 | 0x00c3_6400
            | 0x5346_414f | 0x6b41_4653 | 0x7375_7245 | 0x0bd0_0bd0 | 0x0116_1970 | 0x7461_636f | 0x0187
            | 0x2003_0528 => FsKind::Remote,
            _ => FsKind::Other,
        }
    }
}

/// `FUSE_SUPER_MAGIC`.
const FUSE_MAGIC: u32 = 0x6573_5546;

/// One mount.
pub(super) struct Mount {
    /// Stands for the mount in the identity of its inodes.
    pub(super) index: u32,
    pub(super) device: u64,
    pub(super) id: u64,
    pub(super) kind: FsKind,
    /// Files here can be opened by handle, through this descriptor.
    handle_fd: Option<OwnedFd>,
    /// A file here had no handle although the first one had.
    handles_failed: AtomicBool,
    /// `RWF_NOWAIT` was refused here.
    nowait_refused: AtomicBool,
}

impl Mount {
    /// What [`FileHandle::open`] needs, if files of this mount have handles.
    pub(super) fn handle_fd(&self) -> Option<BorrowedFd<'_>> {
        if self.handles_failed.load(Ordering::Relaxed) {
            return None;
        }
        self.handle_fd.as_ref().map(AsFd::as_fd)
    }

    /// As [`Mount::handle_fd`], for files that have a handle already.
    pub(super) fn open_by_handle_fd(&self) -> Option<BorrowedFd<'_>> {
        self.handle_fd.as_ref().map(AsFd::as_fd)
    }

    /// No more handles are made here.
    pub(super) fn give_up_handles(&self) {
        self.handles_failed.store(true, Ordering::Relaxed);
    }

    pub(super) fn nowait_refused(&self) -> bool {
        self.nowait_refused.load(Ordering::Relaxed)
    }

    pub(super) fn note_nowait_refused(&self) {
        self.nowait_refused.store(true, Ordering::Relaxed);
    }

    /// Whether `stat` is of a file here.
    pub(super) fn holds(&self, stat: &Statx) -> bool {
        (self.device, self.id) == (device_of(stat), stat.stx_mnt_id)
    }

    /// The place of nothing, for vacant table slots.
    pub(super) fn none() -> Arc<Self> {
        Arc::new(Self {
            index: 0,
            device: 0,
            id: 0,
            kind: FsKind::Other,
            handle_fd: None,
            handles_failed: AtomicBool::new(true),
            nowait_refused: AtomicBool::new(false),
        })
    }
}

fn device_of(stat: &Statx) -> u64 {
    (u64::from(stat.stx_dev_major) << 32) | u64::from(stat.stx_dev_minor)
}

type Snapshot = HashMap<(u64, u64), Arc<Mount>>;

/// All mounts that inodes are known on.
pub(super) struct Mounts {
    snapshot: ArcSwap<Snapshot>,
    change: Mutex<()>,
    next_index: AtomicU32,
    handles: FileHandles,
    any_handles: AtomicBool,
}

impl Mounts {
    pub(super) fn new(handles: FileHandles) -> Self {
        Self {
            snapshot: ArcSwap::default(),
            change: Mutex::new(()),
            next_index: AtomicU32::new(1),
            handles,
            any_handles: AtomicBool::new(false),
        }
    }

    /// Whether there is, or was, a mount whose files have handles.
    pub(super) fn any_handles(&self) -> bool {
        self.any_handles.load(Ordering::Relaxed)
    }

    /// The mount that a file with these attributes is on, if it is known.
    pub(super) fn find(&self, stat: &Statx) -> Option<Arc<Mount>> {
        self.snapshot.load().get(&(device_of(stat), stat.stx_mnt_id)).cloned()
    }

    /// The mount of the open file `fd` with these attributes.
    ///
    /// # Errors
    /// Of `fstatfs(2)`.
    pub(super) fn get(&self, proc_self_fd: BorrowedFd, fd: BorrowedFd, stat: &Statx) -> Result<Arc<Mount>> {
        if let Some(mount) = self.find(stat) {
            return Ok(mount);
        }
        let _change = lock(&self.change);
        if let Some(mount) = self.find(stat) {
            return Ok(mount);
        }
        let magic = rustix::fs::fstatfs(fd)?.f_type as u32;
        let mount = Arc::new(Mount {
            index: self.next_index.fetch_add(1, Ordering::Relaxed),
            device: device_of(stat),
            id: stat.stx_mnt_id,
            kind: FsKind::of_magic(magic),
            handle_fd: self.working_handles(magic, proc_self_fd, fd, stat),
            handles_failed: AtomicBool::new(false),
            nowait_refused: AtomicBool::new(false),
        });
        if mount.handle_fd.is_some() {
            self.any_handles.store(true, Ordering::Relaxed);
        }
        let mut snapshot: Snapshot = self
            .snapshot
            .load()
            .iter()
            // Only the snapshot itself has it: its last inode is gone.
            .filter(|(_, mount)| Arc::strong_count(mount) > 1)
            .map(|(key, mount)| (*key, Arc::clone(mount)))
            .collect();
        snapshot.insert((mount.device, mount.id), Arc::clone(&mount));
        self.snapshot.store(Arc::new(snapshot));
        Ok(mount)
    }

    /// Every mount that is known.
    pub(super) fn all(&self) -> Vec<Arc<Mount>> {
        self.snapshot.load().values().cloned().collect()
    }

    /// Tries a handle of the open file once, there and back. Gives the descriptor to open handles with.
    ///
    /// A FUSE file system gives handles that it cannot open any more once it forgot the inode, so its
    /// handles are not trusted unless they are demanded.
    fn working_handles(
        &self,
        magic: u32,
        proc_self_fd: BorrowedFd,
        fd: BorrowedFd,
        stat: &Statx,
    ) -> Option<OwnedFd> {
        let directory = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        let wanted = match self.handles {
            FileHandles::Never => false,
            FileHandles::Prefer => magic != FUSE_MAGIC,
            FileHandles::Mandatory => true,
        };
        if !directory || !wanted {
            return None;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NONBLOCK;
        let anchor = sys::reopen(proc_self_fd, fd, flags).ok()?;
        let again = FileHandle::of(fd).ok()?.open(anchor.as_fd(), OFlags::PATH).ok()?;
        let again = sys::stat_fd(again.as_fd()).ok()?;
        ((again.stx_ino, device_of(&again)) == (stat.stx_ino, device_of(stat))).then_some(anchor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_file_systems_are_known_by_their_numbers() {
        // tmpfs, ext4, overlayfs, NFS, FUSE, and one that nobody knows.
        let kinds = [0x0102_1994, 0xef53, 0x794c_7630, 0x6969, 0x6573_5546, 1].map(FsKind::of_magic);
        use FsKind::{Disk, Memory, Other, Remote};
        assert_eq!(kinds, [Memory, Disk, Other, Remote, Remote, Other]);
    }

    #[test]
    fn a_mount_goes_when_its_last_inode_has_gone() {
        let proc_self_fd =
            rustix::fs::open("/proc/self/fd", OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        let open = |path| rustix::fs::open(path, OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
        let mounts = Mounts::new(FileHandles::Prefer);
        let known = |fd: &OwnedFd| {
            let stat = sys::stat_fd(fd.as_fd()).unwrap();
            mounts.get(proc_self_fd.as_fd(), fd.as_fd(), &stat).unwrap()
        };
        let (memory, proc) = (open("/dev/shm"), open("/proc"));
        let first = known(&memory);
        assert!(first.kind == FsKind::Memory && Arc::ptr_eq(&first, &known(&memory)));
        assert!(first.handle_fd().is_some() && mounts.any_handles());
        let second = known(&proc);
        assert!(second.handle_fd().is_none());
        assert_eq!(mounts.all().len(), 2);
        drop(first);
        known(&open("/sys"));
        assert_eq!(mounts.all().len(), 2);
        assert!(Arc::ptr_eq(&second, &known(&proc)));
    }
}
