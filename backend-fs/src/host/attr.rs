//! Attributes: GETATTR, STATX, SETATTR, ACCESS and STATFS.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Statx, StatxFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::cred::{AsCaller, WithoutFsetid};
use super::inode::Inode;
use super::{HostFs, sys};
use crate::filesystem::{Context, HandleId, NodeId, Result, SetAttr, SetTime};
use crate::fuse::abi;

/// Permission bits with set-id and sticky bits.
const MODE_BITS: u32 = 0o7777;

/// A device number as FUSE carries it (`new_encode_dev`, `include/linux/kdev_t.h`).
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn fuse_time(time: rustix::fs::StatxTimestamp) -> abi::SxTime {
    abi::SxTime { tv_sec: time.tv_sec, tv_nsec: time.tv_nsec, reserved: 0 }
}

fn host_time(time: Option<SetTime>) -> Result<Timespec> {
    Ok(match time {
        None => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        Some(SetTime::Now) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
        // The special values are above a second.
        Some(SetTime::At(_, nanos)) if nanos >= 1_000_000_000 => return Err(Errno::INVAL),
        Some(SetTime::At(seconds, nanos)) => Timespec { tv_sec: seconds, tv_nsec: nanos.into() },
    })
}

impl HostFs {
    /// What the DPU sees of `stat`.
    pub(super) fn attr(&self, stat: &Statx) -> abi::Attr {
        abi::Attr {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: stat.stx_atime.tv_sec as u64,
            mtime: stat.stx_mtime.tv_sec as u64,
            ctime: stat.stx_ctime.tv_sec as u64,
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: stat.stx_mtime.tv_nsec,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode: stat.stx_mode.into(),
            nlink: stat.stx_nlink,
            uid: self.options.uid_map.to_dpu(stat.stx_uid),
            gid: self.options.gid_map.to_dpu(stat.stx_gid),
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: 0,
        }
    }

    /// `statx` of a node: through its own descriptor, or through an open file's when it has none now.
    fn stat_node(
        &self,
        cx: &Context,
        node: NodeId,
        handle: Option<HandleId>,
        flags: AtFlags,
        mask: StatxFlags,
    ) -> Result<Statx> {
        let inode = self.inode(cx, node)?;
        if let Some(handle) = handle
            && !inode.is_pinned()
            && let Ok(handle) = self.handle(cx, node, handle)
        {
            return rustix::fs::statx(handle.as_fd(), c"", flags | AtFlags::EMPTY_PATH, mask);
        }
        rustix::fs::statx(self.inodes.fd(&inode)?, c"", flags | AtFlags::EMPTY_PATH, mask)
    }

    pub(super) fn do_getattr(
        &self,
        cx: &Context,
        node: NodeId,
        handle: Option<HandleId>,
    ) -> Result<(abi::Attr, Duration)> {
        let stat = self.stat_node(cx, node, handle, AtFlags::empty(), StatxFlags::BASIC_STATS)?;
        Ok((self.attr(&stat), self.valid_for()))
    }

    pub(super) fn do_statx(
        &self,
        cx: &Context,
        node: NodeId,
        handle: Option<HandleId>,
        flags: u32,
        mask: u32,
    ) -> Result<(abi::Statx, Duration)> {
        let sync = AtFlags::STATX_FORCE_SYNC | AtFlags::STATX_DONT_SYNC;
        let flags = AtFlags::from_bits(flags).filter(|flags| sync.contains(*flags)).ok_or(Errno::INVAL)?;
        // Mount ids and I/O alignment of the host mean nothing to the DPU.
        let known = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let wanted = StatxFlags::from_bits_retain(mask) & known;
        let stat = self.stat_node(cx, node, handle, flags, wanted)?;
        let found = abi::Statx {
            mask: stat.stx_mask & known.bits(),
            blksize: stat.stx_blksize,
            attributes: stat.stx_attributes.bits(),
            nlink: stat.stx_nlink,
            uid: self.options.uid_map.to_dpu(stat.stx_uid),
            gid: self.options.gid_map.to_dpu(stat.stx_gid),
            mode: stat.stx_mode,
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            attributes_mask: stat.stx_attributes_mask.bits(),
            atime: fuse_time(stat.stx_atime),
            btime: fuse_time(stat.stx_btime),
            ctime: fuse_time(stat.stx_ctime),
            mtime: fuse_time(stat.stx_mtime),
            rdev_major: stat.stx_rdev_major,
            rdev_minor: stat.stx_rdev_minor,
            dev_major: stat.stx_dev_major,
            dev_minor: stat.stx_dev_minor,
            ..Default::default()
        };
        Ok((found, self.valid_for()))
    }

    /// Changes in the order mode, owner, size, times: a change of owner clears set-id bits, and times are
    /// what the caller said even when the size changes too.
    pub(super) fn do_setattr(
        &self,
        cx: &Context,
        node: NodeId,
        change: &SetAttr,
    ) -> Result<(abi::Attr, Duration)> {
        self.writable()?;
        let inode = self.inode(cx, node)?;
        let handle = change.handle.map(|handle| self.handle(cx, node, handle)).transpose()?;
        let open = handle.as_ref().map(|handle| handle.as_fd());
        let path = if open.is_none() { Some(self.inodes.fd(&inode)?) } else { None };
        let any = open.or(path.as_ref().map(|path| path.as_fd())).ok_or(Errno::BADF)?;
        let times =
            Timestamps { last_access: host_time(change.atime)?, last_modification: host_time(change.mtime)? };

        if let Some(mode) = change.mode {
            let mode = Mode::from_raw_mode(mode & MODE_BITS);
            match open {
                Some(open) => rustix::fs::fchmod(open, mode)?,
                None => self.chmod(any, mode)?,
            }
        }
        if change.uid.is_some() || change.gid.is_some() {
            let uid = self.host_id(change.uid, |id| self.options.uid_map.to_host(id))?.map(Uid::from_raw);
            let gid = self.host_id(change.gid, |id| self.options.gid_map.to_host(id))?.map(Gid::from_raw);
            let _without_fsetid = WithoutFsetid::enter(change.kill_suidgid)?;
            if inode.is_regular() {
                self.drop_mapped_capability(any)?;
            }
            rustix::fs::chownat(any, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if let Some(size) = change.size {
            self.truncate(cx, &inode, open, size, change.kill_suidgid)?;
        }
        if change.atime.is_some() || change.mtime.is_some() {
            match open {
                Some(open) => rustix::fs::futimens(open, &times)?,
                None => rustix::fs::utimensat(any, c"", &times, AtFlags::EMPTY_PATH)?,
            }
        }
        let stat = sys::stat_fd(any)?;
        Ok((self.attr(&stat), self.valid_for()))
    }

    /// Changes the mode of an `O_PATH` descriptor's file.
    pub(super) fn chmod(&self, path: BorrowedFd, mode: Mode) -> Result<()> {
        let name = DecInt::from_fd(path);
        rustix::fs::chmodat(self.inodes.proc_self_fd(), name.as_c_str(), mode, AtFlags::empty())
    }

    /// The host's id for one to set. The id that means "no change" to the host is no id.
    fn host_id(&self, id: Option<u32>, map: impl Fn(u32) -> Option<u32>) -> Result<Option<u32>> {
        let Some(id) = id else { return Ok(None) };
        if id == u32::MAX {
            return Err(Errno::INVAL);
        }
        match map(id) {
            Some(u32::MAX) => Err(Errno::INVAL),
            Some(host) => Ok(Some(host)),
            None => Err(Errno::PERM),
        }
    }

    fn truncate(
        &self,
        cx: &Context,
        inode: &Inode,
        open: Option<BorrowedFd>,
        size: u64,
        kill_suidgid: bool,
    ) -> Result<()> {
        if i64::try_from(size).is_err() {
            return Err(Errno::FBIG);
        }
        let reopened;
        let file = match open {
            Some(open) => open,
            None if inode.is_regular() => {
                reopened = self.open_file(cx, inode, OFlags::WRONLY)?;
                reopened.as_fd()
            }
            None if inode.is_directory() => return Err(Errno::ISDIR),
            None => return Err(Errno::INVAL),
        };
        let _without_fsetid = WithoutFsetid::enter(kill_suidgid)?;
        self.drop_mapped_capability(file)?;
        rustix::fs::ftruncate(file, size)
    }

    /// Asks the host's kernel, as the caller: mode bits, ACLs and groups count as they do on the host.
    pub(super) fn do_access(&self, cx: &Context, node: NodeId, mask: u32) -> Result<()> {
        let inode = self.inode(cx, node)?;
        let fd = self.inodes.fd(&inode)?;
        if mask & !(libc::R_OK | libc::W_OK | libc::X_OK) as u32 != 0 {
            return Err(Errno::INVAL);
        }
        if mask & libc::W_OK as u32 != 0 {
            self.writable()?;
        }
        let _caller = AsCaller::checked(cx, &self.options)?;
        sys::access(fd.as_fd(), mask)
    }

    pub(super) fn do_statfs(&self, cx: &Context, node: NodeId) -> Result<abi::Kstatfs> {
        let inode = self.inode(cx, node)?;
        let stat = rustix::fs::fstatfs(self.inodes.fd(&inode)?)?;
        Ok(abi::Kstatfs {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: stat.f_bsize as u32,
            namelen: stat.f_namelen as u32,
            frsize: stat.f_frsize as u32,
            ..Default::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_keep_all_their_bits() {
        assert_eq!(encode_device(8, 1), 0x801);
        assert_eq!(encode_device(0xfff, 0xfffff), 0xffff_ffff);
        assert_eq!(encode_device(1, 0x100), 0x10_0100);
    }

    #[test]
    fn times_that_mean_something_else_to_the_host_are_refused() {
        for nanos in [1_000_000_000, UTIME_NOW as u32, UTIME_OMIT as u32, u32::MAX] {
            assert_eq!(host_time(Some(SetTime::At(0, nanos))).err(), Some(Errno::INVAL));
        }
        assert!(host_time(Some(SetTime::At(-1, 999_999_999))).is_ok());
    }
}
