//! Operations that make, link, rename or remove names.
//!
//! An inode is made as the caller ([`super::cred`]). What the reply says of it comes from a descriptor: of the
//! file itself when CREATE or TMPFILE opened it, else of what has the name right after. If the new inode
//! cannot be handed to the DPU (a budget is used up, its security label is refused) it is removed again.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::cred::{AsCaller, WithoutFsetid};
use super::fd_budget::FdToken;
use super::inode::Inode;
use super::lookup::component;
use super::{HostFs, sys};
use crate::filesystem::{Context, Entry, NewInode, NodeId, Opened, Result};

/// Permission bits with set-id and sticky bits.
const MODE_BITS: u32 = 0o7777;

fn mode_bits(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & MODE_BITS)
}

/// A device number that FUSE carried (`new_decode_dev`, `include/linux/kdev_t.h`).
fn decode_device(device: u32) -> u64 {
    let major = (device & 0xfff00) >> 8;
    let minor = (device & 0xff) | ((device >> 12) & 0xfff00);
    rustix::fs::makedev(major, minor)
}

impl HostFs {
    pub(super) fn do_create(
        &self,
        cx: &Context,
        parent: NodeId,
        name: &CStr,
        new: NewInode,
        flags: u32,
        kill_suidgid: bool,
    ) -> Result<(Entry, Opened)> {
        self.writable()?;
        component(name)?;
        let dir = self.inode(cx, parent)?;
        let fd = self.inodes.fd(&dir)?;
        let host_flags = self.host_flags(flags)?;
        let token = self.inodes.take_token().ok_or(Errno::NFILE)?;
        let created = {
            let _caller = AsCaller::create(cx, &self.options, self.umask(&new))?;
            // Always exclusively: what exists is opened in another way, with other rights.
            let flags = host_flags | OFlags::CREATE | OFlags::EXCL;
            self.inodes.with_descriptors(|| sys::open_name(fd.as_fd(), name, flags, mode_bits(new.mode)))
        };
        match created {
            Ok(file) => {
                let finished = self.finish_file(cx, &dir, file, host_flags, token).map(|(_, made)| made);
                if finished.is_err() {
                    let _ = rustix::fs::unlinkat(fd.as_fd(), name, AtFlags::empty());
                }
                finished
            }
            Err(Errno::EXIST) if flags & libc::O_EXCL as u32 == 0 => {
                self.open_existing(cx, &dir, fd.as_fd(), name, host_flags, kill_suidgid, token)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Hands a file that CREATE or TMPFILE has made to the DPU.
    fn finish_file(
        &self,
        cx: &Context,
        dir: &Inode,
        file: OwnedFd,
        flags: OFlags,
        token: FdToken,
    ) -> Result<(NodeId, (Entry, Opened))> {
        if let Some((name, value)) = cx.label {
            self.label_path(file.as_fd(), name, value)?;
        }
        let path = self
            .inodes
            .with_descriptors(|| sys::reopen(self.inodes.proc_self_fd(), file.as_fd(), OFlags::PATH))?;
        let (inode, entry) = self.adopt(dir, path)?;
        match self.insert_handle(&inode, file, flags, token) {
            Ok(opened) => Ok((inode.node(), (entry, opened))),
            Err(errno) => {
                self.inodes.forget(inode.node(), 1);
                Err(errno)
            }
        }
    }

    /// CREATE without `O_EXCL` of a name that somebody else made first. The DPU's kernel believed that
    /// there is no file and has checked the directory only, so the file is opened with the caller's rights.
    #[allow(clippy::too_many_arguments, reason = "the rest of one operation")]
    fn open_existing(
        &self,
        cx: &Context,
        dir: &Inode,
        fd: BorrowedFd,
        name: &CStr,
        flags: OFlags,
        kill_suidgid: bool,
        token: FdToken,
    ) -> Result<(Entry, Opened)> {
        let (inode, entry) = self.adopt(dir, self.open_path(fd, name)?)?;
        let opened = match inode.kind() {
            libc::S_IFREG => {
                let file = {
                    let caller = AsCaller::checked(cx, &self.options)?;
                    // Whoever is not user 0 has no such capability anyway.
                    let kill = kill_suidgid && flags.contains(OFlags::TRUNC) && !caller.is_other_user();
                    let _without_fsetid = WithoutFsetid::enter(kill)?;
                    self.open_file(cx, &inode, flags)
                };
                match file {
                    // The right may come from a group that was not sent. The DPU's kernel takes this to
                    // look the name up again and to check the access itself.
                    Err(Errno::ACCESS) if cx.groups.is_none() => Err(Errno::STALE),
                    result => result,
                }
            }
            libc::S_IFDIR => Err(Errno::ISDIR),
            libc::S_IFLNK => Err(Errno::LOOP),
            _ => Err(Errno::NXIO),
        };
        let handed = opened.and_then(|file| {
            if flags.contains(OFlags::TRUNC) {
                self.drop_mapped_capability(file.as_fd())?;
            }
            self.insert_handle(&inode, file, flags, token)
        });
        match handed {
            Ok(opened) => Ok((entry, opened)),
            Err(errno) => {
                self.inodes.forget(inode.node(), 1);
                Err(errno)
            }
        }
    }

    pub(super) fn do_tmpfile(
        &self,
        cx: &Context,
        parent: NodeId,
        new: NewInode,
        flags: u32,
    ) -> Result<(Entry, Opened)> {
        self.writable()?;
        let dir = self.inode(cx, parent)?;
        let fd = self.inodes.fd(&dir)?;
        let host_flags = self.host_flags(flags)?;
        let token = self.inodes.take_token().ok_or(Errno::NFILE)?;
        let file = {
            let _caller = AsCaller::create(cx, &self.options, self.umask(&new))?;
            // `O_EXCL` means here that no link may ever be made.
            let exclusive = OFlags::from_bits_retain(flags) & OFlags::EXCL;
            let flags = host_flags | OFlags::TMPFILE | exclusive;
            self.inodes.with_descriptors(|| sys::open_name(fd.as_fd(), c".", flags, mode_bits(new.mode)))?
        };
        let (node, made) = self.finish_file(cx, &dir, file, host_flags, token)?;
        // By handle it could not be found again once it is closed.
        if let Ok(inode) = self.inodes.get(node) {
            inode.set_keep(true);
        }
        Ok(made)
    }

    pub(super) fn do_mkdir(&self, cx: &Context, parent: NodeId, name: &CStr, new: NewInode) -> Result<Entry> {
        let umask = self.umask(&new);
        self.make(cx, parent, name, umask, AtFlags::REMOVEDIR, |dir| {
            rustix::fs::mkdirat(dir, name, mode_bits(new.mode))
        })
    }

    pub(super) fn do_mknod(&self, cx: &Context, parent: NodeId, name: &CStr, new: NewInode) -> Result<Entry> {
        let (kind, device) = match new.mode & libc::S_IFMT {
            0 | libc::S_IFREG => (FileType::RegularFile, 0),
            libc::S_IFIFO => (FileType::Fifo, 0),
            libc::S_IFSOCK => (FileType::Socket, 0),
            libc::S_IFCHR => (FileType::CharacterDevice, decode_device(new.rdev)),
            libc::S_IFBLK => (FileType::BlockDevice, decode_device(new.rdev)),
            _ => return Err(Errno::INVAL),
        };
        let umask = self.umask(&new);
        self.make(cx, parent, name, umask, AtFlags::empty(), |dir| {
            rustix::fs::mknodat(dir, name, kind, mode_bits(new.mode), device)
        })
    }

    pub(super) fn do_symlink(
        &self,
        cx: &Context,
        parent: NodeId,
        name: &CStr,
        target: &CStr,
    ) -> Result<Entry> {
        self.make(cx, parent, name, 0, AtFlags::empty(), |dir| rustix::fs::symlinkat(target, dir, name))
    }

    /// Makes an inode that is not opened, as the caller.
    fn make(
        &self,
        cx: &Context,
        parent: NodeId,
        name: &CStr,
        umask: u32,
        undo: AtFlags,
        make: impl FnOnce(BorrowedFd) -> Result<()>,
    ) -> Result<Entry> {
        self.writable()?;
        component(name)?;
        let dir = self.inode(cx, parent)?;
        let fd = self.inodes.fd(&dir)?;
        {
            let _caller = AsCaller::create(cx, &self.options, umask)?;
            make(fd.as_fd())?;
        }
        let finished = self.open_path(fd.as_fd(), name).and_then(|path| {
            if let Some((name, value)) = cx.label {
                self.label_path(path.as_fd(), name, value)?;
            }
            self.adopt(&dir, path)
        });
        match finished {
            Ok((_, entry)) => Ok(entry),
            Err(errno) => {
                let _ = rustix::fs::unlinkat(fd.as_fd(), name, undo);
                Err(errno)
            }
        }
    }

    pub(super) fn remove(&self, cx: &Context, parent: NodeId, name: &CStr, flags: AtFlags) -> Result<()> {
        self.writable()?;
        component(name)?;
        let dir = self.inode(cx, parent)?;
        rustix::fs::unlinkat(self.inodes.fd(&dir)?, name, flags)
    }

    pub(super) fn do_rename(
        &self,
        cx: &Context,
        from: (NodeId, &CStr),
        to: (NodeId, &CStr),
        flags: u32,
    ) -> Result<()> {
        self.writable()?;
        component(from.1)?;
        component(to.1)?;
        let known = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        let flags = RenameFlags::from_bits_retain(flags);
        if !known.contains(flags) {
            return Err(Errno::INVAL);
        }
        let from_dir = self.inode(cx, from.0)?;
        let to_dir = self.inode(cx, to.0)?;
        let from_fd = self.inodes.fd(&from_dir)?;
        let to_fd = self.inodes.fd(&to_dir)?;
        // A whiteout is a new inode, and the caller's.
        let _caller = if flags.contains(RenameFlags::WHITEOUT) {
            Some(AsCaller::create(cx, &self.options, 0)?)
        } else {
            None
        };
        rustix::fs::renameat_with(from_fd, from.1, to_fd, to.1, flags)
    }

    pub(super) fn do_link(&self, cx: &Context, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.writable()?;
        component(name)?;
        let inode = self.inode(cx, node)?;
        let dir = self.inode(cx, parent)?;
        let fd = self.inodes.fd(&inode)?;
        let dir_fd = self.inodes.fd(&dir)?;
        // Follows the link of `/proc/self/fd` to the file itself, but no symbolic link that this may be.
        rustix::fs::linkat(
            self.inodes.proc_self_fd(),
            DecInt::from_fd(fd.as_fd()).as_c_str(),
            dir_fd.as_fd(),
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        inode.set_keep(false);
        self.lookup_in(&dir, dir_fd.as_fd(), name)
    }

    pub(super) fn do_readlink(&self, cx: &Context, node: NodeId, target: &mut Vec<u8>) -> Result<()> {
        let inode = self.inode(cx, node)?;
        if inode.kind() != libc::S_IFLNK {
            return Err(Errno::INVAL);
        }
        target.reserve(libc::PATH_MAX as usize);
        rustix::fs::readlinkat_raw(self.inodes.fd(&inode)?, c"", rustix::buffer::spare_capacity(target))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_keep_all_their_bits() {
        assert_eq!(decode_device(0x801), rustix::fs::makedev(8, 1));
        assert_eq!(decode_device(0xffff_ffff), rustix::fs::makedev(0xfff, 0xfffff));
        assert_eq!(decode_device(0x10_0100), rustix::fs::makedev(1, 0x100));
    }
}
