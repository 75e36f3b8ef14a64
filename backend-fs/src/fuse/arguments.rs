//! Arguments of single operations: one structure in, one checked value out. Part of the parser; the
//! rules are those of [`super::request`].
#![forbid(unsafe_code)]

use rustix::io::Errno;

use super::abi::{self, fattr};
use crate::filesystem::{CopyRange, HandleId, LockRequest, NewInode, NodeId, Release, SetAttr, SetTime};

/// Most bytes of data in one `FUSE_WRITE`, negotiated as `max_write`.
pub const MAX_WRITE: u32 = 1 << 20;
/// Most bytes of a `FUSE_READDIR` reply. Linux asks for a page, newer ones for a few.
pub const MAX_LISTING: u32 = 1 << 20;
/// Largest value of an extended attribute (`XATTR_SIZE_MAX`, `linux/limits.h`).
pub const XATTR_SIZE_MAX: u32 = 65536;

/// Largest offset (`OFFSET_MAX`).
const OFFSET_MAX: u64 = i64::MAX as u64;
/// Permission bits of a mode.
const PERMISSIONS: u32 = 0o7777;
/// Flags of `setxattr(2)` that may come through.
const XATTR_FLAGS: u32 = (libc::XATTR_CREATE | libc::XATTR_REPLACE) as u32;
/// Flags of `renameat2(2)` that may come through.
const RENAME_FLAGS: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;

/// A handle that a flag says is valid.
#[inline]
pub(super) fn handle_if(valid: bool, fh: u64) -> Option<HandleId> {
    valid.then_some(HandleId(fh))
}

/// Bytes from `offset` to the largest offset.
#[inline]
fn left_after(offset: u64) -> Result<u64, Errno> {
    OFFSET_MAX.checked_sub(offset).ok_or(Errno::INVAL)
}

/// A range that is not empty and ends at the largest offset at the latest.
pub(super) fn check_range(offset: u64, len: u64) -> Result<(), Errno> {
    if len == 0 || len > left_after(offset)? { Err(Errno::INVAL) } else { Ok(()) }
}

/// Room for directory entries.
pub(super) fn listing_room(size: u32, room: usize) -> usize {
    (size.min(MAX_LISTING) as usize).min(room)
}

/// Whether only data is to be written out.
pub(super) fn data_only(arg: &abi::FsyncIn) -> bool {
    arg.fsync_flags & abi::FSYNC_FDATASYNC != 0
}

/// What a release gives up.
pub(super) fn release(arg: &abi::ReleaseIn) -> Release {
    let unlock = arg.release_flags & abi::RELEASE_FLOCK_UNLOCK != 0;
    Release { handle: HandleId(arg.fh), flock_owner: unlock.then_some(arg.lock_owner) }
}

/// Bytes to read: what is asked for, as far as there is room and a file can reach.
///
/// The room, not `max_write`, is the limit: a kernel with pages of 64 KiB sends reads beyond 1 MiB,
/// and takes a reply that is shorter than asked for as the end of the file.
#[inline]
pub(super) fn read_size(arg: &abi::ReadIn, room: usize) -> Result<usize, Errno> {
    let left = usize::try_from(left_after(arg.offset)?).unwrap_or(usize::MAX);
    Ok((arg.size as usize).min(room).min(left))
}

/// Bytes to write. The payload must be exactly as long as the arguments say.
#[inline]
pub(super) fn write_size(arg: &abi::WriteIn, payload: usize) -> Result<usize, Errno> {
    let size = arg.size as usize;
    if arg.size > MAX_WRITE || size != payload || u64::from(arg.size) > left_after(arg.offset)? {
        return Err(Errno::INVAL);
    }
    Ok(size)
}

/// Positions are the DPU's: there is none here that `SEEK_CUR` could start from.
pub(super) fn check_seek(arg: &abi::LseekIn) -> Result<(), Errno> {
    let beyond = match arg.whence.cast_signed() {
        libc::SEEK_SET | libc::SEEK_END => Errno::INVAL,
        libc::SEEK_DATA | libc::SEEK_HOLE => Errno::NXIO,
        _ => return Err(Errno::INVAL),
    };
    if arg.offset > OFFSET_MAX { Err(beyond) } else { Ok(()) }
}

/// `wide`: the reply has 64 bits for the number of bytes copied. With 32 the length is cut to what
/// they can tell, at a multiple of the largest page size so that extents stay aligned.
pub(super) fn copy_range(node: NodeId, arg: &abi::CopyFileRangeIn, wide: bool) -> Result<CopyRange, Errno> {
    check_range(arg.off_in, arg.len)?;
    check_range(arg.off_out, arg.len)?;
    if arg.flags != 0 {
        return Err(Errno::INVAL);
    }
    Ok(CopyRange {
        source: (node, HandleId(arg.fh_in), arg.off_in),
        target: (NodeId(arg.nodeid_out), HandleId(arg.fh_out), arg.off_out),
        len: if wide { arg.len } else { arg.len.min(u64::from(!0xffff_u32)) },
        flags: 0,
    })
}

/// Flags of a rename.
pub(super) fn rename_flags(flags: u32) -> Result<u32, Errno> {
    if flags & !RENAME_FLAGS == 0 { Ok(flags) } else { Err(Errno::INVAL) }
}

/// The regular file that `FUSE_CREATE` and `FUSE_TMPFILE` make.
pub(super) fn new_file(arg: &abi::CreateIn) -> NewInode {
    NewInode { mode: libc::S_IFREG | arg.mode & PERMISSIONS, umask: arg.umask, rdev: 0 }
}

/// The directory that `FUSE_MKDIR` makes.
pub(super) fn new_directory(arg: &abi::MkdirIn) -> NewInode {
    NewInode { mode: libc::S_IFDIR | arg.mode & PERMISSIONS, umask: arg.umask, rdev: 0 }
}

/// What `mknod(2)` can make; a device number counts only for device nodes.
pub(super) fn new_node(arg: &abi::MknodIn) -> Result<NewInode, Errno> {
    let (kind, rdev) = match arg.mode & libc::S_IFMT {
        0 => (libc::S_IFREG, 0),
        kind @ (libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK) => (kind, 0),
        kind @ (libc::S_IFCHR | libc::S_IFBLK) => (kind, arg.rdev),
        _ => return Err(Errno::INVAL),
    };
    Ok(NewInode { mode: kind | arg.mode & PERMISSIONS, umask: arg.umask, rdev })
}

/// What `FUSE_SETATTR` changes.
pub(super) fn set_attr(arg: &abi::SetattrIn) -> Result<SetAttr, Errno> {
    let has = |bit| arg.valid & bit != 0;
    let id = |bit, id| match (has(bit), id) {
        (false, _) => Ok(None),
        (true, u32::MAX) => Err(Errno::INVAL),
        (true, id) => Ok(Some(id)),
    };
    let time = |bit, now, seconds: u64, nanoseconds| match (has(now), has(bit), nanoseconds) {
        (true, ..) => Ok(Some(SetTime::Now)),
        (false, false, _) => Ok(None),
        // Seconds are signed; the wire type is not.
        (false, true, 0..=999_999_999) => Ok(Some(SetTime::At(seconds.cast_signed(), nanoseconds))),
        (false, true, _) => Err(Errno::INVAL),
    };
    if has(fattr::SIZE) && arg.size > OFFSET_MAX {
        return Err(Errno::INVAL);
    }
    Ok(SetAttr {
        handle: handle_if(has(fattr::FH), arg.fh),
        mode: has(fattr::MODE).then_some(arg.mode & PERMISSIONS),
        uid: id(fattr::UID, arg.uid)?,
        gid: id(fattr::GID, arg.gid)?,
        size: has(fattr::SIZE).then_some(arg.size),
        atime: time(fattr::ATIME, fattr::ATIME_NOW, arg.atime, arg.atimensec)?,
        mtime: time(fattr::MTIME, fattr::MTIME_NOW, arg.mtime, arg.mtimensec)?,
        ctime: time(fattr::CTIME, 0, arg.ctime, arg.ctimensec)?,
        kill_suidgid: has(fattr::KILL_SUIDGID),
    })
}

/// The value must be exactly what is left of the request.
pub(super) fn check_set_xattr(arg: &abi::SetxattrIn, value: &[u8]) -> Result<(), Errno> {
    if arg.size as usize != value.len() || arg.flags & !XATTR_FLAGS != 0 {
        return Err(Errno::INVAL);
    }
    if arg.size > XATTR_SIZE_MAX { Err(Errno::TOOBIG) } else { Ok(()) }
}

/// How large a value may come back. 0 asks for the size alone, so a capped size must not become 0.
pub(super) fn xattr_room(size: u32, room: usize) -> Result<u32, Errno> {
    let capped = size.min(XATTR_SIZE_MAX).min(u32::try_from(room).unwrap_or(u32::MAX));
    if capped == 0 && size != 0 { Err(Errno::RANGE) } else { Ok(capped) }
}

/// A lock request whose range and kind are right.
pub(super) fn lock(arg: &abi::LkIn) -> Result<LockRequest, Errno> {
    let lock = arg.lk;
    let known = matches!(lock.kind.cast_signed(), libc::F_RDLCK | libc::F_WRLCK | libc::F_UNLCK);
    if !known || lock.start > lock.end || lock.end > OFFSET_MAX {
        return Err(Errno::INVAL);
    }
    let flock = arg.lk_flags & abi::LK_FLOCK != 0;
    Ok(LockRequest { handle: HandleId(arg.fh), owner: arg.owner, lock, flock })
}
