//! The boundary between the FUSE protocol and a file system: one method per operation, typed
//! arguments in, values out. No wire format, no virtqueue, no policy above this line.
//!
//! Rules every implementation keeps:
//! - Names were validated by the protocol layer: no `/`, no NUL, not `.` or `..`, at most 255 bytes.
//! - With [`Context::may_block`] false (a queue worker) nothing may block. An operation that would
//!   block returns `Err(Errno::AGAIN)` *before it had any effect*; the caller then runs the same
//!   request again on a thread that may block.
//! - Nothing the DPU sends makes a method panic; running out of a budget is `ENFILE` or `ENOMEM`.

use std::ffi::CStr;
use std::time::Duration;

use rustix::io::Errno;
use vring::chain::Slices;

use crate::fuse::abi;
use crate::fuse::dirent::DirBuffer;

/// Result of an operation; the error goes to the DPU as it is.
pub type Result<T> = std::result::Result<T, Errno>;

/// A DPU-visible inode number of the FUSE protocol ("node id"). [`NodeId::ROOT`] is the export's root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NodeId(pub u64);

impl NodeId {
    /// `FUSE_ROOT_ID`.
    pub const ROOT: NodeId = NodeId(1);
}

/// An open file or directory (`fh` of the protocol).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HandleId(pub u64);

/// Who asks, and how the request may be served.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Caller's fsuid on the DPU.
    pub uid: u32,
    /// Caller's fsgid on the DPU.
    pub gid: u32,
    /// Caller's thread id on the DPU; 0 for requests of the kernel's own.
    pub pid: u32,
    /// Supplementary groups that came with the request (`FUSE_EXT_GROUPS`); `None` when that was
    /// not negotiated, so that nothing is known of them.
    pub groups: Option<&'a [u32]>,
    /// Security label for a new inode: xattr name and value (`FUSE_SECURITY_CTX`).
    pub label: Option<(&'a CStr, &'a [u8])>,
    /// This thread may block. See the module's rules.
    pub may_block: bool,
}

/// What was negotiated by `FUSE_INIT`, as far as a file system must know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// `FUSE_WRITEBACK_CACHE`.
    pub writeback: bool,
    /// `FUSE_HANDLE_KILLPRIV_V2`.
    pub killpriv_v2: bool,
    /// `FUSE_POSIX_ACL`.
    pub posix_acl: bool,
    /// `FUSE_DONT_MASK`: the umask is applied here, not by the DPU.
    pub dont_mask: bool,
    /// `FUSE_SUBMOUNTS`.
    pub submounts: bool,
    /// `FUSE_CREATE_SUPP_GROUP`.
    pub supplementary_groups: bool,
    /// `FUSE_SECURITY_CTX`.
    pub security_label: bool,
    /// `FUSE_DO_READDIRPLUS`.
    pub readdirplus: bool,
    /// `FUSE_DIRECT_IO_ALLOW_MMAP`.
    pub allow_mmap: bool,
}

/// A looked-up or created inode; the DPU now holds one more reference to `node`.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// Node id.
    pub node: NodeId,
    /// Distinguishes reuses of a node id; node ids are never reused here, so always 0.
    pub generation: u64,
    /// Attributes.
    pub attr: abi::Attr,
    /// How long the DPU may cache `attr`.
    pub attr_valid: Duration,
    /// How long the DPU may cache the name.
    pub entry_valid: Duration,
}

/// An opened file or directory.
#[derive(Clone, Copy, Debug)]
pub struct Opened {
    /// Handle.
    pub handle: HandleId,
    /// `FOPEN_*` flags.
    pub flags: u32,
}

/// `FUSE_SETATTR`: only what is `Some` changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttr {
    /// Open file to act on.
    pub handle: Option<HandleId>,
    /// Permission bits.
    pub mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Size: truncate or extend.
    pub size: Option<u64>,
    /// Access time.
    pub atime: Option<SetTime>,
    /// Modification time.
    pub mtime: Option<SetTime>,
    /// Change time (writeback cache only; hosts cannot set it and ignore it).
    pub ctime: Option<SetTime>,
    /// `FATTR_KILL_SUIDGID`: drop set-id bits although the caller is privileged here.
    pub kill_suidgid: bool,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The host's now.
    Now,
    /// Seconds and nanoseconds since the epoch.
    At(i64, u32),
}

/// How a new inode is made.
#[derive(Clone, Copy, Debug)]
pub struct NewInode {
    /// File type and permission bits as the caller gave them.
    pub mode: u32,
    /// Caller's umask, to be applied only with [`Negotiated::dont_mask`].
    pub umask: u32,
    /// Device number of a device node, Linux 32-bit encoding.
    pub rdev: u32,
}

/// A lock request: `flock(2)` or `fcntl(2)` kind.
#[derive(Clone, Copy, Debug)]
pub struct LockRequest {
    /// Open file it came through.
    pub handle: HandleId,
    /// Lock owner (a files table of the DPU).
    pub owner: u64,
    /// Range and kind.
    pub lock: abi::FileLock,
    /// A whole-file `flock(2)` lock.
    pub flock: bool,
}

/// `FUSE_RELEASE` and `FUSE_RELEASEDIR`.
#[derive(Clone, Copy, Debug)]
pub struct Release {
    /// Handle that goes.
    pub handle: HandleId,
    /// Lock owner whose `flock` goes with it (`FUSE_RELEASE_FLOCK_UNLOCK`).
    pub flock_owner: Option<u64>,
}

/// `FUSE_COPY_FILE_RANGE`.
#[derive(Clone, Copy, Debug)]
pub struct CopyRange {
    /// Source file.
    pub source: (NodeId, HandleId, u64),
    /// Target file.
    pub target: (NodeId, HandleId, u64),
    /// Bytes.
    pub len: u64,
    /// Must be 0.
    pub flags: u64,
}

/// A file system that can be exported. Shared by all queue workers.
#[allow(missing_docs, reason = "one method per FUSE operation, named after it")]
pub trait FileSystem: Send + Sync {
    /// What of the offered features this file system wants is decided by its options; this tells
    /// it the outcome. Called for each `FUSE_INIT`: a second one (a rebooted DPU) drops all state
    /// of the previous DPU kernel first.
    fn init(&self, negotiated: Negotiated);
    /// Drops every inode reference, handle and lock; wakes every waiting lock with `EINTR`.
    fn destroy(&self);

    fn lookup(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<Entry>;
    fn forget(&self, node: NodeId, count: u64);
    fn getattr(&self, cx: &Context, node: NodeId, handle: Option<HandleId>) -> Result<(abi::Attr, Duration)>;
    fn statx(
        &self,
        cx: &Context,
        node: NodeId,
        handle: Option<HandleId>,
        flags: u32,
        mask: u32,
    ) -> Result<(abi::Statx, Duration)>;
    fn setattr(&self, cx: &Context, node: NodeId, change: SetAttr) -> Result<(abi::Attr, Duration)>;
    fn access(&self, cx: &Context, node: NodeId, mask: u32) -> Result<()>;

    /// Appends the link's target to `target`.
    fn readlink(&self, cx: &Context, node: NodeId, target: &mut Vec<u8>) -> Result<()>;
    fn symlink(&self, cx: &Context, parent: NodeId, name: &CStr, target: &CStr) -> Result<Entry>;
    fn mknod(&self, cx: &Context, parent: NodeId, name: &CStr, new: NewInode) -> Result<Entry>;
    fn mkdir(&self, cx: &Context, parent: NodeId, name: &CStr, new: NewInode) -> Result<Entry>;
    fn unlink(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<()>;
    fn rmdir(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<()>;
    fn rename(&self, cx: &Context, from: (NodeId, &CStr), to: (NodeId, &CStr), flags: u32) -> Result<()>;
    fn link(&self, cx: &Context, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry>;

    /// `flags` are the DPU's open flags; `kill_suidgid` is `FUSE_OPEN_KILL_SUIDGID`.
    fn open(&self, cx: &Context, node: NodeId, flags: u32, kill_suidgid: bool) -> Result<Opened>;
    fn create(
        &self,
        cx: &Context,
        parent: NodeId,
        name: &CStr,
        new: NewInode,
        flags: u32,
        kill_suidgid: bool,
    ) -> Result<(Entry, Opened)>;
    fn tmpfile(&self, cx: &Context, parent: NodeId, new: NewInode, flags: u32) -> Result<(Entry, Opened)>;
    /// Reads up to `into.len()` bytes at `offset` straight into DPU memory. Short only at the end of the file.
    fn read(&self, cx: &Context, node: NodeId, handle: HandleId, offset: u64, into: Slices) -> Result<usize>;
    /// Writes `from` at `offset` straight from DPU memory. `kill_suidgid`: `FUSE_WRITE_KILL_SUIDGID`;
    /// `cached`: `FUSE_WRITE_CACHE`, a page written back with a guessed handle.
    #[allow(clippy::too_many_arguments, reason = "the protocol's own arguments")]
    fn write(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        from: Slices,
        kill_suidgid: bool,
        cached: bool,
    ) -> Result<usize>;
    /// A write through a file that has `O_APPEND` set now (`fuse_write_in.flags`) and that is not a
    /// page written back: the bytes go to the end of the host's file, wherever that is, in one step.
    /// `offset` is where the DPU believes that to be.
    fn append(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        from: Slices,
        kill_suidgid: bool,
    ) -> Result<usize> {
        self.write(cx, node, handle, offset, from, kill_suidgid, false)
    }
    fn flush(&self, cx: &Context, node: NodeId, handle: HandleId, lock_owner: u64) -> Result<()>;
    fn release(&self, cx: &Context, node: NodeId, release: Release) -> Result<()>;
    fn fsync(&self, cx: &Context, node: NodeId, handle: HandleId, data_only: bool) -> Result<()>;
    fn fallocate(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<()>;
    fn lseek(&self, cx: &Context, node: NodeId, handle: HandleId, offset: u64, whence: u32) -> Result<u64>;
    fn copy_file_range(&self, cx: &Context, range: CopyRange) -> Result<usize>;

    fn opendir(&self, cx: &Context, node: NodeId, flags: u32) -> Result<Opened>;
    /// Fills `into` with entries after `offset`.
    fn readdir(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: &mut DirBuffer,
    ) -> Result<()>;
    /// Like `readdir`, with a lookup per entry; an entry that does not fit takes no reference.
    fn readdirplus(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: &mut DirBuffer,
    ) -> Result<()>;
    fn releasedir(&self, cx: &Context, node: NodeId, release: Release) -> Result<()>;
    fn fsyncdir(&self, cx: &Context, node: NodeId, handle: HandleId, data_only: bool) -> Result<()>;

    fn statfs(&self, cx: &Context, node: NodeId) -> Result<abi::Kstatfs>;
    fn syncfs(&self, cx: &Context, node: NodeId) -> Result<()>;

    fn setxattr(
        &self,
        cx: &Context,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<()>;
    /// With `size` 0 only the value's size is returned; otherwise the value (at most `size` bytes) is
    /// appended to `value` and its length returned; `ERANGE` when it is longer.
    fn getxattr(
        &self,
        cx: &Context,
        node: NodeId,
        name: &CStr,
        size: u32,
        value: &mut Vec<u8>,
    ) -> Result<usize>;
    /// As `getxattr`, for the NUL-separated list of names.
    fn listxattr(&self, cx: &Context, node: NodeId, size: u32, names: &mut Vec<u8>) -> Result<usize>;
    fn removexattr(&self, cx: &Context, node: NodeId, name: &CStr) -> Result<()>;

    /// The lock that stands in the way, or `F_UNLCK`.
    fn getlk(&self, cx: &Context, node: NodeId, request: LockRequest) -> Result<abi::FileLock>;
    /// Takes, changes or drops a lock. `wait` without [`Context::may_block`] answers `EAGAIN` when
    /// the lock is taken; with it the thread waits until it has the lock or [`FileSystem::destroy`].
    fn setlk(&self, cx: &Context, node: NodeId, request: LockRequest, wait: bool) -> Result<()>;
    /// Makes every [`FileSystem::setlk`] that waits now return `EINTR`. Locks that are held stay, and
    /// so do later waits: this is how a queue is emptied before it stops.
    fn interrupt_locks(&self) {}
}
