//! FUSE wire structures and constants (`include/uapi/linux/fuse.h`, protocol 7.41). Layout only.
//!
//! Written down independently of the daemons under test; field names are the kernel's.

#![forbid(unsafe_code)]
#![allow(missing_docs)]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

macro_rules! wire {
    ($($(#[$meta:meta])* pub struct $name:ident { $($field:ident: $kind:ty,)* })*) => { $(
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        pub struct $name { $(pub $field: $kind,)* }
    )* };
}

wire! {
    /// `struct fuse_in_header`.
    pub struct InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16,
        padding: u16,
    }
    /// `struct fuse_out_header`.
    pub struct OutHeader { len: u32, error: i32, unique: u64, }
    /// `struct fuse_attr`.
    pub struct Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32,
        ctimensec: u32, mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// `struct fuse_entry_out`.
    pub struct EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32,
        attr_valid_nsec: u32, attr: Attr,
    }
    /// `struct fuse_attr_out`.
    pub struct AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr, }
    /// `struct fuse_kstatfs`.
    pub struct Kstatfs {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32,
        padding: u32, spare: [u32; 6],
    }
    /// `struct fuse_sx_time`.
    pub struct SxTime { tv_sec: i64, tv_nsec: u32, reserved: i32, }
    /// `struct fuse_statx`.
    pub struct Statx {
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16, spare0: [u16; 1],
        ino: u64, size: u64, blocks: u64, attributes_mask: u64, atime: SxTime, btime: SxTime, ctime: SxTime,
        mtime: SxTime, rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    /// `struct fuse_statx_in`.
    pub struct StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32, }
    /// `struct fuse_statx_out`.
    pub struct StatxOut { attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2], stat: Statx, }
    /// `struct fuse_file_lock`.
    pub struct FileLock { start: u64, end: u64, kind: u32, pid: u32, }
    /// `struct fuse_init_in`.
    pub struct InitIn {
        major: u32, minor: u32, max_readahead: u32, flags: u32, flags2: u32, unused: [u32; 11],
    }
    /// `struct fuse_init_out`.
    pub struct InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16,
        max_write: u32, time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, max_stack_depth: u32,
        unused: [u32; 6],
    }
    /// `struct fuse_forget_in`.
    pub struct ForgetIn { nlookup: u64, }
    /// `struct fuse_forget_one`.
    pub struct ForgetOne { nodeid: u64, nlookup: u64, }
    /// `struct fuse_batch_forget_in`.
    pub struct BatchForgetIn { count: u32, dummy: u32, }
    /// `struct fuse_getattr_in`.
    pub struct GetattrIn { getattr_flags: u32, dummy: u32, fh: u64, }
    /// `struct fuse_setattr_in`.
    pub struct SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    /// `struct fuse_mknod_in`.
    pub struct MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32, }
    /// `struct fuse_mkdir_in`.
    pub struct MkdirIn { mode: u32, umask: u32, }
    /// `struct fuse_rename_in`.
    pub struct RenameIn { newdir: u64, }
    /// `struct fuse_rename2_in`.
    pub struct Rename2In { newdir: u64, flags: u32, padding: u32, }
    /// `struct fuse_link_in`.
    pub struct LinkIn { oldnodeid: u64, }
    /// `struct fuse_open_in`.
    pub struct OpenIn { flags: u32, open_flags: u32, }
    /// `struct fuse_create_in`.
    pub struct CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32, }
    /// `struct fuse_open_out`.
    pub struct OpenOut { fh: u64, open_flags: u32, backing_id: i32, }
    /// `struct fuse_release_in`.
    pub struct ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64, }
    /// `struct fuse_flush_in`.
    pub struct FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64, }
    /// `struct fuse_read_in`.
    pub struct ReadIn {
        fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// `struct fuse_write_in`.
    pub struct WriteIn {
        fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32,
    }
    /// `struct fuse_write_out`.
    pub struct WriteOut { size: u32, padding: u32, }
    /// `struct fuse_fsync_in`.
    pub struct FsyncIn { fh: u64, fsync_flags: u32, padding: u32, }
    /// `struct fuse_setxattr_in` as it is with `FUSE_SETXATTR_EXT`.
    pub struct SetxattrIn { size: u32, flags: u32, setxattr_flags: u32, padding: u32, }
    /// `struct fuse_setxattr_in` without `FUSE_SETXATTR_EXT`.
    pub struct SetxattrInCompat { size: u32, flags: u32, }
    /// `struct fuse_getxattr_in`.
    pub struct GetxattrIn { size: u32, padding: u32, }
    /// `struct fuse_getxattr_out`.
    pub struct GetxattrOut { size: u32, padding: u32, }
    /// `struct fuse_lk_in`.
    pub struct LkIn { fh: u64, owner: u64, lk: FileLock, lk_flags: u32, padding: u32, }
    /// `struct fuse_access_in`.
    pub struct AccessIn { mask: u32, padding: u32, }
    /// `struct fuse_interrupt_in`.
    pub struct InterruptIn { unique: u64, }
    /// `struct fuse_ioctl_in`.
    pub struct IoctlIn { fh: u64, flags: u32, cmd: u32, arg: u64, in_size: u32, out_size: u32, }
    /// `struct fuse_poll_in`.
    pub struct PollIn { fh: u64, kh: u64, flags: u32, events: u32, }
    /// `struct fuse_bmap_in`.
    pub struct BmapIn { block: u64, blocksize: u32, padding: u32, }
    /// `struct fuse_fallocate_in`.
    pub struct FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32, }
    /// `struct fuse_lseek_in`.
    pub struct LseekIn { fh: u64, offset: u64, whence: u32, padding: u32, }
    /// `struct fuse_lseek_out`.
    pub struct LseekOut { offset: u64, }
    /// `struct fuse_copy_file_range_in`.
    pub struct CopyFileRangeIn {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    /// `struct fuse_setupmapping_in`.
    pub struct SetupmappingIn { fh: u64, foffset: u64, len: u64, flags: u64, moffset: u64, }
    /// `struct fuse_removemapping_in`.
    pub struct RemovemappingIn { count: u32, }
    /// `struct fuse_removemapping_one`.
    pub struct RemovemappingOne { moffset: u64, len: u64, }
    /// `struct fuse_syncfs_in`.
    pub struct SyncfsIn { padding: u64, }
    /// `struct fuse_dirent` without the name.
    pub struct Dirent { ino: u64, off: u64, namelen: u32, kind: u32, }
    /// `struct fuse_secctx_header`.
    pub struct SecctxHeader { size: u32, nr_secctx: u32, }
    /// `struct fuse_secctx`.
    pub struct Secctx { size: u32, padding: u32, }
    /// `struct fuse_ext_header`.
    pub struct ExtHeader { size: u32, kind: u32, }
}

/// Node id of the root (`FUSE_ROOT_ID`).
pub const ROOT: u64 = 1;

/// `FUSE_EXT_GROUPS`.
pub const EXT_GROUPS: u32 = 32;

/// `enum fuse_opcode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Opcode {
    Lookup = 1,
    Forget = 2,
    Getattr = 3,
    Setattr = 4,
    Readlink = 5,
    Symlink = 6,
    Mknod = 8,
    Mkdir = 9,
    Unlink = 10,
    Rmdir = 11,
    Rename = 12,
    Link = 13,
    Open = 14,
    Read = 15,
    Write = 16,
    Statfs = 17,
    Release = 18,
    Fsync = 20,
    Setxattr = 21,
    Getxattr = 22,
    Listxattr = 23,
    Removexattr = 24,
    Flush = 25,
    Init = 26,
    Opendir = 27,
    Readdir = 28,
    Releasedir = 29,
    Fsyncdir = 30,
    Getlk = 31,
    Setlk = 32,
    Setlkw = 33,
    Access = 34,
    Create = 35,
    Interrupt = 36,
    Bmap = 37,
    Destroy = 38,
    Ioctl = 39,
    Poll = 40,
    BatchForget = 42,
    Fallocate = 43,
    Readdirplus = 44,
    Rename2 = 45,
    Lseek = 46,
    CopyFileRange = 47,
    Setupmapping = 48,
    Removemapping = 49,
    Syncfs = 50,
    Tmpfile = 51,
    Statx = 52,
}

/// Bits of `fuse_init_in.flags` and `flags2` (shifted up by 32).
pub mod init {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const POSIX_LOCKS: u64 = 1 << 1;
    pub const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DONT_MASK: u64 = 1 << 6;
    pub const SPLICE_WRITE: u64 = 1 << 7;
    pub const SPLICE_MOVE: u64 = 1 << 8;
    pub const SPLICE_READ: u64 = 1 << 9;
    pub const FLOCK_LOCKS: u64 = 1 << 10;
    pub const HAS_IOCTL_DIR: u64 = 1 << 11;
    pub const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub const ASYNC_DIO: u64 = 1 << 15;
    pub const WRITEBACK_CACHE: u64 = 1 << 16;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const HANDLE_KILLPRIV: u64 = 1 << 19;
    pub const POSIX_ACL: u64 = 1 << 20;
    pub const ABORT_ERROR: u64 = 1 << 21;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub const MAP_ALIGNMENT: u64 = 1 << 26;
    pub const SUBMOUNTS: u64 = 1 << 27;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const SETXATTR_EXT: u64 = 1 << 29;
    pub const INIT_EXT: u64 = 1 << 30;
    pub const SECURITY_CTX: u64 = 1 << 32;
    pub const CREATE_SUPP_GROUP: u64 = 1 << 34;
    pub const HAS_EXPIRE_ONLY: u64 = 1 << 35;
    pub const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
    pub const NO_EXPORT_SUPPORT: u64 = 1 << 38;
    pub const HAS_RESEND: u64 = 1 << 39;
    pub const ALLOW_IDMAP: u64 = 1 << 40;
}

/// Bits of `fuse_setattr_in.valid`.
pub mod fattr {
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const CTIME: u32 = 1 << 10;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FUSE_WRITE_CACHE`.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `FUSE_WRITE_KILL_SUIDGID`.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_GETATTR_FH`.
pub const GETATTR_FH: u32 = 1;
/// `FUSE_LK_FLOCK`.
pub const LK_FLOCK: u32 = 1;
/// `FUSE_FSYNC_FDATASYNC`.
pub const FSYNC_FDATASYNC: u32 = 1;
/// `FUSE_OPEN_KILL_SUIDGID`.
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// `FUSE_RELEASE_FLUSH`.
pub const RELEASE_FLUSH: u32 = 1;
/// `FUSE_RELEASE_FLOCK_UNLOCK`.
pub const RELEASE_FLOCK_UNLOCK: u32 = 2;

const _: () = {
    assert!(size_of::<InHeader>() == 40 && size_of::<OutHeader>() == 16);
    assert!(size_of::<Attr>() == 88 && size_of::<EntryOut>() == 128 && size_of::<AttrOut>() == 104);
    assert!(size_of::<Statx>() == 256 && size_of::<StatxOut>() == 288 && size_of::<Kstatfs>() == 80);
    assert!(size_of::<InitIn>() == 64 && size_of::<InitOut>() == 64);
    assert!(size_of::<SetattrIn>() == 88 && size_of::<LkIn>() == 48 && size_of::<CopyFileRangeIn>() == 56);
    assert!(size_of::<Dirent>() == 24);
};
