//! From a name in a known directory to an inode.
//!
//! A name whose file is known and pinned costs one `statx(2)`: the inode number cannot belong to
//! another file meanwhile. Every other existing name costs an `openat2(2)` for the new `O_PATH` descriptor
//! and a `statx(2)` *of that descriptor*, so that number and descriptor belong together whatever is
//! renamed in between.
#![forbid(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, Statx};
use rustix::io::Errno;

use super::inode::{Inode, kind_of};
use super::mount::Mount;
use super::{HostFs, SUBMOUNTS, sys};
use crate::filesystem::{Context, Entry, NodeId, Result};
use crate::fuse::abi;

/// Checks that `name` is one plain component. The protocol layer has done so; this is the second wall,
/// because most system calls would take a path.
pub(super) fn component(name: &CStr) -> Result<()> {
    match name.to_bytes() {
        b"" => Err(Errno::NOENT),
        b"." | b".." => Err(Errno::INVAL),
        bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
        _ => Ok(()),
    }
}

impl HostFs {
    pub(super) fn do_lookup(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<Entry> {
        component(name)?;
        let dir = self.inode(cx, parent)?;
        let fd = self.inodes.fd(&dir)?;
        self.lookup_in(&dir, fd.as_fd(), name)
    }

    /// Looks `name` up in the directory `dir`, which `fd` is a descriptor of.
    pub(super) fn lookup_in(&self, dir: &Inode, fd: BorrowedFd, name: &CStr) -> Result<Entry> {
        let stat = sys::stat_name(fd, name)?;
        if let Some((node, mount)) = self.inodes.find(&stat, dir) {
            return Ok(self.entry(node, dir, &mount, &stat));
        }
        let path = self.open_path(fd, name)?;
        self.adopt(dir, path).map(|(_, entry)| entry)
    }

    /// An `O_PATH` descriptor of `name` in `dir`, whatever it is.
    pub(super) fn open_path(&self, dir: BorrowedFd, name: &CStr) -> Result<OwnedFd> {
        self.inodes.with_descriptors(|| sys::open_name(dir, name, OFlags::PATH, Mode::empty()))
    }

    /// The entry of the file that `path` (`O_PATH`) is a descriptor of and that was found in `dir`.
    pub(super) fn adopt(&self, dir: &Inode, path: OwnedFd) -> Result<(Arc<Inode>, Entry)> {
        let stat = sys::stat_fd(path.as_fd())?;
        let inode = self.inodes.adopt(path, &stat)?;
        let entry = self.entry(inode.node(), dir, &inode.mount, &stat);
        Ok((inode, entry))
    }

    fn entry(&self, node: NodeId, dir: &Inode, mount: &Mount, stat: &Statx) -> Entry {
        let mut attr = self.attr(stat);
        if kind_of(stat) == libc::S_IFDIR && mount.index != dir.mount.index && self.negotiated(SUBMOUNTS) {
            attr.flags |= abi::ATTR_SUBMOUNT;
        }
        Entry { node, generation: 0, attr, attr_valid: self.valid_for(), entry_valid: self.valid_for() }
    }
}
