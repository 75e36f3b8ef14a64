//! The host's file system behind an export: one directory tree, passed through.
//!
//! | module | job |
//! |---|---|
//! | [`options`] | what the command line decides |
//! | `lookup` | names to inodes, beneath the root |
//! | `handle` | open files and directories |
//! | `namespace` | create, link, rename, remove |
//! | `io` | read, write and what else acts on an open file |
//! | `attr` | attributes of inodes and of the file system |
//! | `dir` | directory listings |
//! | `xattr` | extended attributes, renamed by [`xattrmap`] |
//! | `lock`, `lock_ranges` | `flock` and POSIX locks on the host |
//! | `inode`, `table`, `mount`, `fd_budget` | what the DPU knows, within its budgets |
//! | `cred` | acting as the caller; ids translated by [`idmap`] |
//! | `sys` | system calls without a safe wrapper |
//!
//! Rules that hold throughout:
//! - Nothing is opened through a symbolic link, by a path of more than one component, or above the root.
//! - Only regular files and directories are ever opened for input or output; every other inode is
//!   touched through an `O_PATH` descriptor alone.
//! - `EAGAIN` for a thread that may not block comes before any effect.
//! - On a file system that may wait for another machine (`mount::FsKind::Remote`) every operation blocks.

mod attr;
mod cred;
mod dir;
mod fd_budget;
mod handle;
pub mod idmap;
mod inode;
mod io;
mod lock;
mod lock_ranges;
mod lookup;
mod mount;
mod namespace;
pub mod options;
mod sys;
mod table;
mod xattr;
pub mod xattrmap;

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use arc_swap::Guard;
use rustix::io::Errno;
use vring::chain::Slices;

pub use self::sys::CALLS;

use self::fd_budget::FdBudget;
use self::handle::Handle;
use self::inode::{Inode, InodeStore};
use self::lock::Locks;
use self::mount::{FsKind, Mounts};
use self::options::{FileHandles, HostOptions};
use self::table::Table;
use crate::filesystem::{
    Context, CopyRange, Entry, FileSystem, HandleId, LockRequest, Negotiated, NewInode, NodeId, Opened,
    Release, Result, SetAttr,
};
use crate::fuse::abi;
use crate::fuse::dirent::DirBuffer;

/// Passes a directory of the host through to one DPU.
pub struct HostFs {
    options: HostOptions,
    negotiated: AtomicU32,
    inodes: InodeStore,
    handles: Table<Handle>,
    locks: Locks,
    /// The host's name for `security.capability` when the map renames it: nobody but this daemon then
    /// removes it when the file changes (CVE-2021-20263).
    mapped_capability: Option<CString>,
}

/// What an export holds and what went wrong in it, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostCounts {
    /// Inodes the DPU holds references to, with the root.
    pub inodes: usize,
    /// Open files and directories.
    pub handles: usize,
    /// Descriptors in use of [`HostOptions::fd_budget`].
    pub fds: usize,
    /// Threads that wait for a lock.
    pub lock_waiters: usize,
    /// FORGETs of more references than there were.
    pub forget_underflows: u64,
    /// FORGETs of node ids that do not exist.
    pub forget_unknown: u64,
    /// Inodes that gave their descriptor back.
    pub evictions: u64,
    /// Opens of an evicted inode by handle.
    pub reopens: u64,
    /// Inode numbers that were found to belong to another file now.
    pub reused_inodes: u64,
}

const WRITEBACK: u32 = 1 << 0;
const KILLPRIV_V2: u32 = 1 << 1;
const POSIX_ACL: u32 = 1 << 2;
const DONT_MASK: u32 = 1 << 3;
const SUBMOUNTS: u32 = 1 << 4;

fn pack(negotiated: Negotiated) -> u32 {
    [
        (negotiated.writeback, WRITEBACK),
        (negotiated.killpriv_v2, KILLPRIV_V2),
        (negotiated.posix_acl, POSIX_ACL),
        (negotiated.dont_mask, DONT_MASK),
        (negotiated.submounts, SUBMOUNTS),
    ]
    .into_iter()
    .filter(|(set, _)| *set)
    .fold(0, |bits, (_, bit)| bits | bit)
}

impl HostFs {
    /// Serves the directory `root` (`O_PATH` is enough). `proc_self_fd` is an `O_PATH` descriptor of
    /// `/proc/self/fd`; it goes on working after `pivot_root(2)`.
    ///
    /// # Errors
    /// The root cannot be looked at, or file handles are mandatory and cannot be had for it.
    pub fn new(root: OwnedFd, proc_self_fd: OwnedFd, options: HostOptions) -> std::io::Result<Self> {
        let budget = FdBudget::new(options.fd_budget);
        let mounts = Mounts::new(options.file_handles);
        let inodes = InodeStore::new(root, proc_self_fd, mounts, budget, options.max_inodes)?;
        let root = inodes.get(NodeId::ROOT)?;
        if !root.is_directory() {
            return Err(std::io::Error::new(
                std::io::ErrorKind::NotADirectory,
                "the export is not a directory",
            ));
        }
        if root.mount.handle_fd().is_none() {
            match options.file_handles {
                FileHandles::Never => {}
                FileHandles::Prefer => tracing::warn!(
                    budget = options.fd_budget,
                    "no file handles for this export (file system or CAP_DAC_READ_SEARCH): \
                     the DPU can know as many files as the descriptor budget allows"
                ),
                FileHandles::Mandatory => {
                    return Err(std::io::Error::other(
                        "file handles cannot be had for the export: its file system has none or \
                         CAP_DAC_READ_SEARCH is missing; use --inode-file-handles=prefer",
                    ));
                }
            }
        }
        drop(root);
        let handles = Table::new(options.fd_budget, Arc::new(Handle::vacant(&inodes)?));
        let locks = Locks::new(options.max_lock_waiters)?;
        let mapped_capability = xattr::mapped_capability(&options);
        Ok(Self { options, negotiated: AtomicU32::new(0), inodes, handles, locks, mapped_capability })
    }

    /// What this export holds now.
    pub fn counts(&self) -> HostCounts {
        let counters = &self.inodes.counters;
        HostCounts {
            inodes: self.inodes.len(),
            handles: self.handles.len(),
            fds: self.inodes.budget.used(),
            lock_waiters: self.locks.waiters(),
            forget_underflows: counters.forget_underflows.load(Ordering::Relaxed),
            forget_unknown: counters.forget_unknown.load(Ordering::Relaxed),
            evictions: counters.evictions.load(Ordering::Relaxed),
            reopens: counters.reopens.load(Ordering::Relaxed),
            reused_inodes: counters.reused.load(Ordering::Relaxed),
        }
    }

    fn negotiated(&self, bit: u32) -> bool {
        self.negotiated.load(Ordering::Relaxed) & bit != 0
    }

    /// The inode of a request.
    ///
    /// # Errors
    /// `EBADF`: no such node. `EAGAIN`: it is on a remote file system and this thread may not block.
    fn inode(&self, cx: &Context, node: NodeId) -> Result<Guard<Arc<Inode>>> {
        let inode = self.inodes.get(node)?;
        if !cx.may_block && inode.mount.kind == FsKind::Remote {
            return Err(Errno::AGAIN);
        }
        Ok(inode)
    }

    /// # Errors
    /// `EROFS` when the export is read-only.
    fn writable(&self) -> Result<()> {
        if self.options.readonly { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// The umask that the host's kernel is to apply for a new inode.
    fn umask(&self, new: &NewInode) -> u32 {
        if self.negotiated(DONT_MASK) { new.umask } else { 0 }
    }

    fn valid_for(&self) -> Duration {
        self.options.cache.timeout()
    }

    /// Drops what the DPU's kernel held: handles with their locks, then inodes.
    fn reset(&self) {
        self.locks.cancel_all(|| {
            for id in self.handles.ids() {
                self.close(HandleId(id));
            }
        });
        self.inodes.clear();
    }
}

impl FileSystem for HostFs {
    fn init(&self, negotiated: Negotiated) {
        self.reset();
        self.negotiated.store(pack(negotiated), Ordering::Relaxed);
    }

    fn destroy(&self) {
        self.reset();
        self.negotiated.store(0, Ordering::Relaxed);
    }

    fn lookup(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.do_lookup(cx, parent, name)
    }

    fn forget(&self, node: NodeId, count: u64) {
        self.inodes.forget(node, count);
    }

    fn getattr(&self, cx: &Context, node: NodeId, handle: Option<HandleId>) -> Result<(abi::Attr, Duration)> {
        self.do_getattr(cx, node, handle)
    }

    fn statx(
        &self,
        cx: &Context,
        node: NodeId,
        handle: Option<HandleId>,
        flags: u32,
        mask: u32,
    ) -> Result<(abi::Statx, Duration)> {
        self.do_statx(cx, node, handle, flags, mask)
    }

    fn setattr(&self, cx: &Context, node: NodeId, change: SetAttr) -> Result<(abi::Attr, Duration)> {
        self.do_setattr(cx, node, &change)
    }

    fn access(&self, cx: &Context, node: NodeId, mask: u32) -> Result<()> {
        self.do_access(cx, node, mask)
    }

    fn readlink(&self, cx: &Context, node: NodeId, target: &mut Vec<u8>) -> Result<()> {
        self.do_readlink(cx, node, target)
    }

    fn symlink(&self, cx: &Context, parent: NodeId, name: &CStr, target: &CStr) -> Result<Entry> {
        self.do_symlink(cx, parent, name, target)
    }

    fn mknod(&self, cx: &Context, parent: NodeId, name: &CStr, new: NewInode) -> Result<Entry> {
        self.do_mknod(cx, parent, name, new)
    }

    fn mkdir(&self, cx: &Context, parent: NodeId, name: &CStr, new: NewInode) -> Result<Entry> {
        self.do_mkdir(cx, parent, name, new)
    }

    fn unlink(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<()> {
        self.remove(cx, parent, name, rustix::fs::AtFlags::empty())
    }

    fn rmdir(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<()> {
        self.remove(cx, parent, name, rustix::fs::AtFlags::REMOVEDIR)
    }

    fn rename(&self, cx: &Context, from: (NodeId, &CStr), to: (NodeId, &CStr), flags: u32) -> Result<()> {
        self.do_rename(cx, from, to, flags)
    }

    fn link(&self, cx: &Context, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.do_link(cx, node, parent, name)
    }

    fn open(&self, cx: &Context, node: NodeId, flags: u32, kill_suidgid: bool) -> Result<Opened> {
        self.do_open(cx, node, flags, kill_suidgid)
    }

    fn create(
        &self,
        cx: &Context,
        parent: NodeId,
        name: &CStr,
        new: NewInode,
        flags: u32,
        kill_suidgid: bool,
    ) -> Result<(Entry, Opened)> {
        self.do_create(cx, parent, name, new, flags, kill_suidgid)
    }

    fn tmpfile(&self, cx: &Context, parent: NodeId, new: NewInode, flags: u32) -> Result<(Entry, Opened)> {
        self.do_tmpfile(cx, parent, new, flags)
    }

    fn read(&self, cx: &Context, node: NodeId, handle: HandleId, offset: u64, into: Slices) -> Result<usize> {
        self.do_read(cx, node, handle, offset, into)
    }

    fn write(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        from: Slices,
        kill_suidgid: bool,
        _cached: bool,
    ) -> Result<usize> {
        self.do_write(cx, node, handle, offset, from, kill_suidgid, false)
    }

    fn append(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        from: Slices,
        kill_suidgid: bool,
    ) -> Result<usize> {
        self.do_write(cx, node, handle, offset, from, kill_suidgid, true)
    }

    fn flush(&self, cx: &Context, node: NodeId, handle: HandleId, lock_owner: u64) -> Result<()> {
        self.do_flush(cx, node, handle, lock_owner)
    }

    fn release(&self, _cx: &Context, node: NodeId, release: Release) -> Result<()> {
        self.do_release(node, release, false)
    }

    fn fsync(&self, cx: &Context, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.do_fsync(cx, node, handle, data_only)
    }

    fn fallocate(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.do_fallocate(cx, node, handle, mode, offset, len)
    }

    fn lseek(&self, cx: &Context, node: NodeId, handle: HandleId, offset: u64, whence: u32) -> Result<u64> {
        self.do_lseek(cx, node, handle, offset, whence)
    }

    fn copy_file_range(&self, cx: &Context, range: CopyRange) -> Result<usize> {
        self.do_copy_file_range(cx, range)
    }

    fn opendir(&self, cx: &Context, node: NodeId, flags: u32) -> Result<Opened> {
        self.do_opendir(cx, node, flags)
    }

    fn readdir(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: &mut DirBuffer,
    ) -> Result<()> {
        self.do_readdir(cx, node, handle, offset, into)
    }

    fn readdirplus(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: &mut DirBuffer,
    ) -> Result<()> {
        self.do_readdirplus(cx, node, handle, offset, into)
    }

    fn releasedir(&self, _cx: &Context, node: NodeId, release: Release) -> Result<()> {
        self.do_release(node, release, true)
    }

    fn fsyncdir(&self, cx: &Context, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.do_fsyncdir(cx, node, handle, data_only)
    }

    fn statfs(&self, cx: &Context, node: NodeId) -> Result<abi::Kstatfs> {
        self.do_statfs(cx, node)
    }

    fn syncfs(&self, cx: &Context, node: NodeId) -> Result<()> {
        self.do_syncfs(cx, node)
    }

    fn setxattr(
        &self,
        cx: &Context,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<()> {
        self.do_setxattr(cx, node, name, value, flags, kill_sgid)
    }

    fn getxattr(
        &self,
        cx: &Context,
        node: NodeId,
        name: &CStr,
        size: u32,
        value: &mut Vec<u8>,
    ) -> Result<usize> {
        self.do_getxattr(cx, node, name, size, value)
    }

    fn listxattr(&self, cx: &Context, node: NodeId, size: u32, names: &mut Vec<u8>) -> Result<usize> {
        self.do_listxattr(cx, node, size, names)
    }

    fn removexattr(&self, cx: &Context, node: NodeId, name: &CStr) -> Result<()> {
        self.do_removexattr(cx, node, name)
    }

    fn getlk(&self, cx: &Context, node: NodeId, request: LockRequest) -> Result<abi::FileLock> {
        self.do_getlk(cx, node, request)
    }

    fn setlk(&self, cx: &Context, node: NodeId, request: LockRequest, wait: bool) -> Result<()> {
        self.do_setlk(cx, node, request, wait)
    }

    fn interrupt_locks(&self) {
        self.locks.interrupt_all();
    }
}
