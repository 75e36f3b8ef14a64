//! Open files and directories: what OPEN, OPENDIR and RELEASE do, and how open flags of the DPU become
//! open flags of the host.
//!
//! A file is opened anew through `/proc/self/fd`, or by handle when its inode is evicted; never by
//! name. The inode's kind was seen when it was looked up and cannot change, so a FIFO, socket or device is
//! refused before any call that could block on it (CVE-2020-35517).
//!
//! `O_APPEND` is never passed on. Pages that the DPU writes back carry their own offsets, also those of
//! files that some program has opened for appending; the host would move them to the end. A write that
//! is to be appended says so itself ([`crate::filesystem::FileSystem::append`]).
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use arc_swap::Guard;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::cred::WithoutFsetid;
use super::fd_budget::{BudgetedFd, FdToken};
use super::inode::{Inode, InodeStore};
use super::mount::{FsKind, Mount};
use super::options::CachePolicy;
use super::table::Identified;
use super::{HostFs, WRITEBACK};
use crate::filesystem::{Context, HandleId, NodeId, Opened, Release, Result};
use crate::fuse::abi;

/// How a READ that may not block is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum ReadMode {
    /// With `RWF_NOWAIT`: what is not in the page cache is left to a thread that may block.
    Nowait,
    /// As it is: the file system does not know `RWF_NOWAIT`, and waits for memory or a local device.
    Inline,
    /// By a thread that may block.
    Offload,
}

/// An open file or directory.
pub(super) struct Handle {
    id: u64,
    node: NodeId,
    directory: bool,
    file: BudgetedFd,
    pub(super) mount: Arc<Mount>,
    read_mode: AtomicU8,
    /// Writes wait for a device (`O_SYNC`, `O_DIRECT`) or for somebody else (remote file system).
    pub(super) slow_writes: bool,
    /// Where the directory's descriptor stands; `None` when nobody knows.
    pub(super) position: Mutex<Option<u64>>,
}

impl Identified for Handle {
    fn id(&self) -> u64 {
        self.id
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Handle {
    /// What stands in an empty slot of the table.
    pub(super) fn vacant(inodes: &InodeStore) -> Result<Self> {
        let file =
            BudgetedFd::uncounted(inodes.absent_fd().as_fd().try_clone_to_owned().map_err(|_| Errno::NFILE)?);
        Ok(Self {
            id: 0,
            node: NodeId(0),
            directory: false,
            file,
            mount: Mount::none(),
            read_mode: AtomicU8::new(ReadMode::Offload as u8),
            slow_writes: true,
            position: Mutex::new(None),
        })
    }

    pub(super) fn read_mode(&self) -> ReadMode {
        match self.read_mode.load(Ordering::Relaxed) {
            0 => ReadMode::Nowait,
            1 => ReadMode::Inline,
            _ => ReadMode::Offload,
        }
    }

    /// The file system does not know `RWF_NOWAIT` for this file.
    pub(super) fn read_inline(&self) {
        self.read_mode.store(ReadMode::Inline as u8, Ordering::Relaxed);
        self.mount.note_nowait_refused();
    }
}

/// What an open file of this mount, with these flags, expects of reads.
fn read_mode(mount: &Mount, flags: OFlags) -> ReadMode {
    match mount.kind {
        FsKind::Remote => ReadMode::Offload,
        _ if flags.contains(OFlags::DIRECT) => ReadMode::Offload,
        FsKind::Memory => ReadMode::Inline,
        _ if mount.nowait_refused() => ReadMode::Inline,
        FsKind::Disk | FsKind::Other => ReadMode::Nowait,
    }
}

/// The host's flags for a regular file that the DPU opens with `flags`.
///
/// Most bits are the same on every architecture; `O_DIRECT`, `O_DIRECTORY`, `O_NOFOLLOW` and `O_LARGEFILE` are
/// not, and an Arm DPU sends Arm's. The last two mean nothing here. Arm's `O_DIRECT` is the
/// `O_DIRECTORY` of x86, and the other way round; no kernel sends `O_DIRECTORY` with a regular file, so
/// either bit means direct I/O.
fn file_flags(flags: u32, writeback: bool, allow_direct_io: bool) -> Result<OFlags> {
    const DIRECT_ANYWHERE: u32 = 0o40_000 | 0o200_000;
    let kept = OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC | OFlags::NOATIME;
    let given = OFlags::from_bits_retain(flags);
    let mut host = given & kept;
    host |= match flags & libc::O_ACCMODE as u32 {
        access if access == libc::O_RDONLY as u32 => OFlags::RDONLY,
        // The writeback cache reads what surrounds a partly written page.
        access if access == libc::O_WRONLY as u32 && !writeback => OFlags::WRONLY,
        access if access == libc::O_WRONLY as u32 || access == libc::O_RDWR as u32 => OFlags::RDWR,
        _ => return Err(Errno::INVAL),
    };
    if allow_direct_io && flags & DIRECT_ANYWHERE != 0 {
        host |= OFlags::DIRECT;
    }
    Ok(host)
}

/// Whether opening with these host flags can change the file.
pub(super) fn changes(flags: OFlags) -> bool {
    flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC)
}

impl HostFs {
    /// The open regular file of a request on `node`.
    ///
    /// # Errors
    /// `EBADF`: no such handle, of another inode, or of a directory. `EAGAIN`: as [`HostFs::inode`].
    pub(super) fn file(&self, cx: &Context, node: NodeId, handle: HandleId) -> Result<Guard<Arc<Handle>>> {
        self.handle(cx, node, handle)
            .and_then(|found| if found.directory { Err(Errno::BADF) } else { Ok(found) })
    }

    /// The open directory of a request on `node`.
    ///
    /// # Errors
    /// As [`HostFs::file`].
    pub(super) fn directory(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
    ) -> Result<Guard<Arc<Handle>>> {
        self.handle(cx, node, handle)
            .and_then(|found| if found.directory { Ok(found) } else { Err(Errno::BADF) })
    }

    /// The open file or directory of a request on `node`.
    ///
    /// # Errors
    /// As [`HostFs::file`].
    pub(super) fn handle(&self, cx: &Context, node: NodeId, handle: HandleId) -> Result<Guard<Arc<Handle>>> {
        let found = self.handles.get(handle.0).filter(|found| found.node == node).ok_or(Errno::BADF)?;
        if !cx.may_block && found.mount.kind == FsKind::Remote {
            return Err(Errno::AGAIN);
        }
        Ok(found)
    }

    /// The host's flags for a regular file. See [`file_flags`].
    pub(super) fn host_flags(&self, flags: u32) -> Result<OFlags> {
        let host = file_flags(flags, self.negotiated(WRITEBACK), self.options.allow_direct_io)?;
        if changes(host) {
            self.writable()?;
        }
        Ok(host)
    }

    pub(super) fn do_open(
        &self,
        cx: &Context,
        node: NodeId,
        flags: u32,
        kill_suidgid: bool,
    ) -> Result<Opened> {
        let inode = self.inode(cx, node)?;
        match inode.kind() {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno::ISDIR),
            libc::S_IFLNK => return Err(Errno::LOOP),
            _ => return Err(Errno::NXIO),
        }
        let flags = self.host_flags(flags)?;
        let token = self.inodes.take_token().ok_or(Errno::NFILE)?;
        let without_fsetid = WithoutFsetid::enter(kill_suidgid && flags.contains(OFlags::TRUNC))?;
        let file = self.open_file(cx, &inode, flags)?;
        drop(without_fsetid);
        if flags.contains(OFlags::TRUNC) {
            self.drop_mapped_capability(file.as_fd())?;
        }
        self.insert_handle(&inode, file, flags, token)
    }

    pub(super) fn do_opendir(&self, cx: &Context, node: NodeId, _flags: u32) -> Result<Opened> {
        let inode = self.inode(cx, node)?;
        if !inode.is_directory() {
            return Err(Errno::NOTDIR);
        }
        let token = self.inodes.take_token().ok_or(Errno::NFILE)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let file = self.inodes.open(&inode, flags)?;
        self.insert_handle(&inode, file, flags, token)
    }

    /// Opens a regular file for input and output.
    pub(super) fn open_file(&self, cx: &Context, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        // A file with a lease makes an open wait for the lease to be given up, unless told not to.
        let flags = if cx.may_block { flags } else { flags | OFlags::NONBLOCK };
        match self.inodes.open(inode, flags) {
            // Only the owner may have it, in the host's view.
            Err(Errno::PERM) if flags.contains(OFlags::NOATIME) && !self.options.preserve_noatime => {
                self.inodes.open(inode, flags - OFlags::NOATIME)
            }
            result => result,
        }
    }

    /// Makes an opened file the DPU's.
    pub(super) fn insert_handle(
        &self,
        inode: &Inode,
        file: OwnedFd,
        flags: OFlags,
        token: FdToken,
    ) -> Result<Opened> {
        let directory = inode.is_directory();
        let mount = Arc::clone(&inode.mount);
        let handle = self
            .handles
            .insert(|id| Handle {
                id,
                node: inode.node(),
                directory,
                file: BudgetedFd::new(file, token),
                read_mode: AtomicU8::new(read_mode(&mount, flags) as u8),
                slow_writes: mount.kind == FsKind::Remote
                    || flags.intersects(OFlags::SYNC | OFlags::DSYNC | OFlags::DIRECT),
                mount,
                position: Mutex::new(Some(0)),
            })
            .map_err(|_| Errno::NFILE)?;
        inode.opened();
        Ok(Opened { handle: HandleId(handle.id), flags: fopen_flags(self.options.cache, directory) })
    }

    /// RELEASE, or RELEASEDIR of a `directory`.
    pub(super) fn do_release(&self, node: NodeId, release: Release, directory: bool) -> Result<()> {
        let handle = self
            .handles
            .get(release.handle.0)
            .filter(|found| found.node == node && found.directory == directory)
            .ok_or(Errno::BADF)?;
        if release.flock_owner.is_some() {
            // A thread that still waits for this lock keeps the description open.
            let _ = rustix::fs::flock(handle.as_fd(), rustix::fs::FlockOperation::NonBlockingUnlock);
        }
        drop(handle);
        if self.close(release.handle) { Ok(()) } else { Err(Errno::BADF) }
    }

    /// Takes a handle away; with the last one of an inode its locks go. False when there is none.
    pub(super) fn close(&self, handle: HandleId) -> bool {
        let Some(handle) = self.handles.remove(handle.0) else { return false };
        // No node any more: the DPU has forgotten it too early, and can only lose by that.
        if self.inodes.get(handle.node).map_or(true, |inode| inode.closed()) {
            self.locks.drop_inode(handle.node);
        }
        true
    }
}

/// `FOPEN_*` for an open file.
fn fopen_flags(cache: CachePolicy, directory: bool) -> u32 {
    match (cache, directory) {
        (CachePolicy::Never | CachePolicy::Metadata, false) => abi::FOPEN_DIRECT_IO,
        (CachePolicy::Always, false) => abi::FOPEN_KEEP_CACHE,
        (CachePolicy::Always | CachePolicy::Metadata, true) => abi::FOPEN_KEEP_CACHE | abi::FOPEN_CACHE_DIR,
        (CachePolicy::Auto, _) | (CachePolicy::Never, true) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCMODE: u32 = libc::O_ACCMODE as u32;

    #[test]
    fn flags_that_are_not_the_hosts_business_are_dropped() {
        for bit in 0..32 {
            let flag = 1u32 << bit;
            let host = file_flags(flag & !ACCMODE, false, false).unwrap();
            let dropped = libc::O_CREAT
                | libc::O_EXCL
                | libc::O_NOCTTY
                | libc::O_APPEND
                | libc::O_NONBLOCK
                | libc::O_ASYNC
                | libc::O_DIRECT
                | libc::O_DIRECTORY
                | libc::O_NOFOLLOW
                | libc::O_CLOEXEC
                | libc::O_PATH
                | libc::O_TMPFILE;
            assert!(!host.intersects(OFlags::from_bits_retain(dropped as u32)), "{flag:o}");
        }
    }

    #[test]
    fn access_mode_three_is_refused() {
        assert_eq!(file_flags(3, false, false), Err(Errno::INVAL));
    }

    #[test]
    fn writeback_reads_through_write_only_files() {
        let write = libc::O_WRONLY as u32;
        assert_eq!(file_flags(write, false, false), Ok(OFlags::WRONLY));
        assert_eq!(file_flags(write, true, false), Ok(OFlags::RDWR));
    }

    #[test]
    fn direct_io_needs_permission_and_is_seen_from_arm_and_x86() {
        for flag in [0o40_000, 0o200_000] {
            assert_eq!(file_flags(flag, false, false), Ok(OFlags::RDONLY));
            assert_eq!(file_flags(flag, false, true), Ok(OFlags::DIRECT));
        }
    }

    #[test]
    fn a_leased_file_does_not_hold_a_worker_up() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let open = |path: &std::path::Path| {
            rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, rustix::fs::Mode::empty()).unwrap()
        };
        let options = super::super::options::HostOptions::default();
        let fs = HostFs::new(open(dir.path()), open("/proc/self/fd".as_ref()), options).unwrap();
        let worker = Context { uid: 0, gid: 0, pid: 1, groups: None, label: None, may_block: false };
        let node = fs.do_lookup(&worker, NodeId::ROOT, c"file").unwrap().node;
        let host = std::fs::File::open(dir.path().join("file")).unwrap();
        super::super::sys::set_read_lease(host.as_fd()).unwrap();
        let write = libc::O_WRONLY as u32;
        assert_eq!(fs.do_open(&worker, node, write, false).err(), Some(Errno::AGAIN));
        drop(host);
        assert!(fs.do_open(&worker, node, write, false).is_ok());
    }
}
