//! FUSE wire structures and constants (`include/uapi/linux/fuse.h`, protocol 7.45). Layout only.
//!
//! Names are the kernel's without their `FUSE_`/`fuse_` prefix. Every structure states its size,
//! which is checked when this is compiled, and has no implicit padding (`IntoBytes` refuses it).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Major version of the protocol.
pub const MAJOR: u32 = 7;
/// Newest minor version known here (Linux 6.18).
pub const MINOR: u32 = 45;
/// Oldest minor version served: 7.23 gave the reply to `FUSE_INIT` its present size.
pub const MINOR_OLDEST: u32 = 23;
/// First minor version whose request header counts its extensions (`total_extlen`).
pub const MINOR_EXTENSIONS: u32 = 38;

/// Defines wire structures: `#[repr(C)]`, convertible from and to bytes, of the stated size.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident: $size:literal { $($(#[$field_doc:meta])* $field:ident: $kind:ty,)* })*) => {$(
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[allow(missing_docs, reason = "fields are the kernel header's")]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $kind,)*
        }
        const _: () = assert!(size_of::<$name>() == $size);
    )*};
}

wire! {
    /// `struct fuse_in_header`: starts every request.
    InHeader: 40 {
        /// Bytes of the whole request, this header included.
        len: u32,
        opcode: u32,
        unique: u64,
        nodeid: u64,
        uid: u32,
        gid: u32,
        pid: u32,
        /// Length of all extensions at the end of the request, in units of 8 bytes (7.38).
        total_extlen: u16,
        padding: u16,
    }

    /// `struct fuse_out_header`: starts every reply.
    OutHeader: 16 {
        /// Bytes of the whole reply, this header included.
        len: u32,
        /// 0 or a negated errno.
        error: i32,
        unique: u64,
    }

    /// `struct fuse_attr`.
    Attr: 88 {
        ino: u64,
        size: u64,
        blocks: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        nlink: u32,
        uid: u32,
        gid: u32,
        /// Linux 32-bit encoding of the device number (`new_encode_dev`).
        rdev: u32,
        blksize: u32,
        /// [`ATTR_SUBMOUNT`] and friends.
        flags: u32,
    }

    /// `struct fuse_kstatfs`, the body of the reply to `FUSE_STATFS`.
    Kstatfs: 80 {
        blocks: u64,
        bfree: u64,
        bavail: u64,
        files: u64,
        ffree: u64,
        bsize: u32,
        namelen: u32,
        frsize: u32,
        padding: u32,
        spare: [u32; 6],
    }

    /// `struct fuse_sx_time`.
    SxTime: 16 {
        tv_sec: i64,
        tv_nsec: u32,
        reserved: i32,
    }

    /// `struct fuse_statx`: the part of `struct statx` that FUSE carries.
    Statx: 256 {
        mask: u32,
        blksize: u32,
        attributes: u64,
        nlink: u32,
        uid: u32,
        gid: u32,
        mode: u16,
        spare0: [u16; 1],
        ino: u64,
        size: u64,
        blocks: u64,
        attributes_mask: u64,
        atime: SxTime,
        btime: SxTime,
        ctime: SxTime,
        mtime: SxTime,
        rdev_major: u32,
        rdev_minor: u32,
        dev_major: u32,
        dev_minor: u32,
        spare2: [u64; 14],
    }

    /// `struct fuse_file_lock`.
    FileLock: 24 {
        start: u64,
        /// Last byte, inclusive; `u64::MAX >> 1` (`OFFSET_MAX`) means to the end of the file.
        end: u64,
        /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
        kind: u32,
        pid: u32,
    }

    /// `struct fuse_init_in` up to 7.35.
    InitInShort: 16 {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
    }

    /// `struct fuse_init_in`.
    InitIn: 64 {
        major: u32,
        minor: u32,
        /// Bytes.
        max_readahead: u32,
        /// Low half of [`InitFlags`](super::init_flags::InitFlags).
        flags: u32,
        /// High half, valid with `INIT_EXT`.
        flags2: u32,
        unused: [u32; 11],
    }

    /// `struct fuse_init_out`.
    InitOut: 64 {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u32,
        max_background: u16,
        congestion_threshold: u16,
        /// Bytes of data in one `FUSE_WRITE`.
        max_write: u32,
        /// Nanoseconds.
        time_gran: u32,
        /// Pages (of the DPU) in one request, valid with `MAX_PAGES`.
        max_pages: u16,
        map_alignment: u16,
        flags2: u32,
        max_stack_depth: u32,
        /// Seconds, valid with `REQUEST_TIMEOUT`.
        request_timeout: u16,
        unused: [u16; 11],
    }

    /// `struct fuse_entry_out`.
    EntryOut: 128 {
        nodeid: u64,
        generation: u64,
        entry_valid: u64,
        attr_valid: u64,
        entry_valid_nsec: u32,
        attr_valid_nsec: u32,
        attr: Attr,
    }

    /// `struct fuse_attr_out`.
    AttrOut: 104 {
        attr_valid: u64,
        attr_valid_nsec: u32,
        dummy: u32,
        attr: Attr,
    }

    /// `struct fuse_statx_out`.
    StatxOut: 288 {
        attr_valid: u64,
        attr_valid_nsec: u32,
        flags: u32,
        spare: [u64; 2],
        stat: Statx,
    }

    /// `struct fuse_open_out`.
    OpenOut: 16 {
        fh: u64,
        /// `FOPEN_*`.
        open_flags: u32,
        backing_id: i32,
    }

    /// `struct fuse_write_out`.
    WriteOut: 8 {
        size: u32,
        padding: u32,
    }

    /// `struct fuse_copy_file_range_out`.
    CopyFileRangeOut: 8 {
        bytes_copied: u64,
    }

    /// `struct fuse_lseek_out`.
    LseekOut: 8 {
        offset: u64,
    }

    /// `struct fuse_getxattr_out`.
    GetxattrOut: 8 {
        size: u32,
        padding: u32,
    }

    /// `struct fuse_dirent` without its name.
    Dirent: 24 {
        ino: u64,
        /// Offset of the entry that follows.
        off: u64,
        namelen: u32,
        /// `DT_*`.
        kind: u32,
    }

    /// `struct fuse_forget_in`.
    ForgetIn: 8 {
        nlookup: u64,
    }

    /// `struct fuse_forget_one`.
    ForgetOne: 16 {
        nodeid: u64,
        nlookup: u64,
    }

    /// `struct fuse_batch_forget_in`.
    BatchForgetIn: 8 {
        count: u32,
        dummy: u32,
    }

    /// `struct fuse_getattr_in`.
    GetattrIn: 16 {
        getattr_flags: u32,
        dummy: u32,
        fh: u64,
    }

    /// `struct fuse_statx_in`.
    StatxIn: 24 {
        getattr_flags: u32,
        reserved: u32,
        fh: u64,
        sx_flags: u32,
        sx_mask: u32,
    }

    /// `struct fuse_setattr_in`.
    SetattrIn: 88 {
        /// `FATTR_*`.
        valid: u32,
        padding: u32,
        fh: u64,
        size: u64,
        lock_owner: u64,
        atime: u64,
        mtime: u64,
        ctime: u64,
        atimensec: u32,
        mtimensec: u32,
        ctimensec: u32,
        mode: u32,
        unused4: u32,
        uid: u32,
        gid: u32,
        unused5: u32,
    }

    /// `struct fuse_mknod_in`.
    MknodIn: 16 {
        mode: u32,
        rdev: u32,
        umask: u32,
        padding: u32,
    }

    /// `struct fuse_mkdir_in`.
    MkdirIn: 8 {
        mode: u32,
        umask: u32,
    }

    /// `struct fuse_rename_in`.
    RenameIn: 8 {
        newdir: u64,
    }

    /// `struct fuse_rename2_in`.
    Rename2In: 16 {
        newdir: u64,
        flags: u32,
        padding: u32,
    }

    /// `struct fuse_link_in`.
    LinkIn: 8 {
        oldnodeid: u64,
    }

    /// `struct fuse_open_in`.
    OpenIn: 8 {
        flags: u32,
        /// `FUSE_OPEN_*`.
        open_flags: u32,
    }

    /// `struct fuse_create_in`.
    CreateIn: 16 {
        flags: u32,
        mode: u32,
        umask: u32,
        /// `FUSE_OPEN_*`.
        open_flags: u32,
    }

    /// `struct fuse_read_in`.
    ReadIn: 40 {
        fh: u64,
        offset: u64,
        size: u32,
        read_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    /// `struct fuse_write_in`.
    WriteIn: 40 {
        fh: u64,
        offset: u64,
        size: u32,
        /// `FUSE_WRITE_*`.
        write_flags: u32,
        lock_owner: u64,
        flags: u32,
        padding: u32,
    }

    /// `struct fuse_release_in`.
    ReleaseIn: 24 {
        fh: u64,
        flags: u32,
        release_flags: u32,
        lock_owner: u64,
    }

    /// `struct fuse_flush_in`.
    FlushIn: 24 {
        fh: u64,
        unused: u32,
        padding: u32,
        lock_owner: u64,
    }

    /// `struct fuse_fsync_in`.
    FsyncIn: 16 {
        fh: u64,
        fsync_flags: u32,
        padding: u32,
    }

    /// `struct fuse_setxattr_in` without `SETXATTR_EXT`.
    SetxattrInShort: 8 {
        size: u32,
        flags: u32,
    }

    /// `struct fuse_setxattr_in`.
    SetxattrIn: 16 {
        size: u32,
        flags: u32,
        setxattr_flags: u32,
        padding: u32,
    }

    /// `struct fuse_getxattr_in`.
    GetxattrIn: 8 {
        size: u32,
        padding: u32,
    }

    /// `struct fuse_lk_in`.
    LkIn: 48 {
        fh: u64,
        owner: u64,
        lk: FileLock,
        lk_flags: u32,
        padding: u32,
    }

    /// `struct fuse_access_in`.
    AccessIn: 8 {
        mask: u32,
        padding: u32,
    }

    /// `struct fuse_fallocate_in`.
    FallocateIn: 32 {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
        padding: u32,
    }

    /// `struct fuse_lseek_in`.
    LseekIn: 24 {
        fh: u64,
        offset: u64,
        whence: u32,
        padding: u32,
    }

    /// `struct fuse_copy_file_range_in`.
    CopyFileRangeIn: 56 {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    }

    /// `struct fuse_ext_header`; with a `kind` up to [`MAX_NR_SECCTX`] a `struct
    /// fuse_secctx_header`, whose `nr_secctx` is in the same place.
    ExtHeader: 8 {
        /// Bytes, this header included.
        size: u32,
        kind: u32,
    }

    /// `struct fuse_secctx`; name and value follow.
    Secctx: 8 {
        /// Bytes of the value.
        size: u32,
        padding: u32,
    }
}

/// `FUSE_ATTR_SUBMOUNT`: the inode is the root of a mount (announced submounts).
pub const ATTR_SUBMOUNT: u32 = 1 << 0;

/// `FATTR_*`: bits of [`SetattrIn::valid`].
#[allow(missing_docs, reason = "names are the kernel header's")]
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
    pub const LOCKOWNER: u32 = 1 << 9;
    pub const CTIME: u32 = 1 << 10;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// `FOPEN_DIRECT_IO`: no page cache for this open file.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// `FOPEN_KEEP_CACHE`: cached pages survive this open.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_NONSEEKABLE`: the file has no position that can be set.
pub const FOPEN_NONSEEKABLE: u32 = 1 << 2;
/// `FOPEN_CACHE_DIR`: the listing of this directory may be cached.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// `FOPEN_STREAM`: the file has no position at all.
pub const FOPEN_STREAM: u32 = 1 << 4;
/// `FOPEN_NOFLUSH`: no `FUSE_FLUSH` on close.
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// `FOPEN_PARALLEL_DIRECT_WRITES`: direct writes to one inode may run at the same time.
pub const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

/// `FUSE_GETATTR_FH`: the handle is valid (`FUSE_GETATTR`, `FUSE_STATX`).
pub const GETATTR_FH: u32 = 1 << 0;
/// `FUSE_OPEN_KILL_SUIDGID`.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `FUSE_WRITE_CACHE`: written back from the page cache; the handle is guessed.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `FUSE_WRITE_KILL_SUIDGID`.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_RELEASE_FLOCK_UNLOCK`.
pub const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
/// `FUSE_FSYNC_FDATASYNC`.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `FUSE_LK_FLOCK`.
pub const LK_FLOCK: u32 = 1 << 0;
/// `FUSE_SETXATTR_ACL_KILL_SGID`.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;

/// `FUSE_MAX_NR_SECCTX`: extension kinds up to here are counts of security contexts.
pub const MAX_NR_SECCTX: u32 = 31;
/// `FUSE_EXT_GROUPS`: supplementary groups.
pub const EXT_GROUPS: u32 = 32;
