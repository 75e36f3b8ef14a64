//! Reads and writes straight between a file and DPU memory, and the other operations on open files.
//!
//! # What may wait
//!
//! On a thread that may not block:
//! - READ uses `RWF_NOWAIT`; what is not in the page cache is `EAGAIN` for the caller, who gives the
//!   request to a thread that may wait. File systems that do not know the flag are read as they are when
//!   they wait for a local device at most (overlayfs, vfat, tmpfs), as any other virtio-fs daemon does; remote
//!   ones are not. Direct I/O always waits, so it is never tried.
//! - WRITE is done at once: it goes to the page cache. Where it does not (`O_SYNC`, `O_DIRECT`, remote), `EAGAIN`.
//! - FSYNC waits unless all is in memory; so do SYNCFS and long copies.
//!
//! READ and WRITE do one system call, allocate nothing and lock nothing; a second call is needed only
//! to tell the end of the file from an incomplete read, and past 1024 pieces.
#![forbid(unsafe_code)]

use std::os::fd::AsFd;

use rustix::fs::{AtFlags, FallocateFlags, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;
use vring::chain::Slices;

use super::cred::WithoutFsetid;
use super::handle::{Handle, ReadMode};
use super::mount::FsKind;
use super::{HostFs, SUBMOUNTS, sys};
use crate::filesystem::{Context, CopyRange, HandleId, NodeId, Result};

/// Bytes that may be copied inside the host on a thread that may not block.
const SHORT_COPY: u64 = 64 << 10;

/// FUSE gives the length of a copy back in 32 bits.
const MAX_COPY: u64 = 0x7fff_f000;

/// An offset that the kernel takes; -1 would mean the file's own position to some calls.
fn file_offset(offset: u64) -> Result<i64> {
    i64::try_from(offset).map_err(|_| Errno::INVAL)
}

/// Reads until `into` is full or the file ends.
fn read_all(handle: &Handle, offset: i64, into: &Slices, nowait: bool) -> Result<usize> {
    let mut done = 0;
    while done < into.len() {
        let at = offset.checked_add(done as i64).ok_or(Errno::INVAL)?;
        match sys::read_at(handle.as_fd(), into, done, at, nowait) {
            Ok((0, _)) => break,
            Ok((read, tried)) => {
                done += read;
                // On a disk a read that may wait is short at the end only; what proc and the like give is
                // cut into pieces.
                if read < tried && !nowait && handle.mount.kind == FsKind::Disk {
                    break;
                }
            }
            // With `nowait` the rest is not in memory; what was read is read again then.
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) if nowait => return Err(Errno::AGAIN),
            Err(_) if done > 0 && !nowait => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

/// Writes until all of `from` is written or an error stops it.
fn write_all(handle: &Handle, offset: i64, from: &Slices, append: bool) -> Result<usize> {
    let mut done = 0;
    while done < from.len() {
        let at = offset.checked_add(done as i64).ok_or(Errno::INVAL)?;
        match sys::write_at(handle.as_fd(), from, done, at, append) {
            Ok((written, tried)) => {
                done += written;
                if written < tried {
                    break;
                }
            }
            Err(Errno::INTR) => {}
            // The caller learns the error from its next write.
            Err(_) if done > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

fn sync(cx: &Context, handle: &Handle, data_only: bool) -> Result<()> {
    if !cx.may_block && handle.mount.kind != FsKind::Memory {
        return Err(Errno::AGAIN);
    }
    if data_only { rustix::fs::fdatasync(handle) } else { rustix::fs::fsync(handle) }
}

/// Whether the file has bits that a write by a caller without privilege clears. A DPU's kernel marks every
/// write of such a caller, and changing capabilities twice costs several times what this question does.
fn has_set_id(handle: &Handle) -> Result<bool> {
    let stat = rustix::fs::statx(handle, c"", AtFlags::EMPTY_PATH, StatxFlags::MODE)?;
    Ok(u32::from(stat.stx_mode) & (libc::S_ISUID | libc::S_ISGID) != 0)
}

impl HostFs {
    pub(super) fn do_read(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: Slices,
    ) -> Result<usize> {
        let offset = file_offset(offset)?;
        let handle = self.file(cx, node, handle)?;
        if cx.may_block {
            return read_all(&handle, offset, &into, false);
        }
        match handle.read_mode() {
            ReadMode::Inline => read_all(&handle, offset, &into, false),
            ReadMode::Offload => Err(Errno::AGAIN),
            ReadMode::Nowait => match read_all(&handle, offset, &into, true) {
                Err(Errno::OPNOTSUPP) => {
                    handle.read_inline();
                    read_all(&handle, offset, &into, false)
                }
                result => result,
            },
        }
    }

    #[allow(clippy::too_many_arguments, reason = "the protocol's own arguments")]
    pub(super) fn do_write(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        from: Slices,
        kill_suidgid: bool,
        append: bool,
    ) -> Result<usize> {
        self.writable()?;
        let offset = file_offset(offset)?;
        let handle = self.file(cx, node, handle)?;
        if handle.slow_writes && !cx.may_block {
            return Err(Errno::AGAIN);
        }
        let _without_fsetid = WithoutFsetid::enter(kill_suidgid && has_set_id(&handle)?)?;
        self.drop_mapped_capability(handle.as_fd())?;
        write_all(&handle, offset, &from, append)
    }

    /// Lets the host's file system do what it does at `close(2)`, and drops the owner's POSIX locks.
    pub(super) fn do_flush(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        lock_owner: u64,
    ) -> Result<()> {
        let handle = self.file(cx, node, handle)?;
        self.locks.drop_owner(node, lock_owner);
        match handle.mount.kind {
            // These have nothing to do at close.
            FsKind::Memory | FsKind::Disk => Ok(()),
            FsKind::Other | FsKind::Remote => {
                let copy =
                    self.inodes.with_descriptors(|| rustix::io::fcntl_dupfd_cloexec(handle.as_fd(), 0))?;
                sys::close(copy)
            }
        }
    }

    pub(super) fn do_fsync(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        data_only: bool,
    ) -> Result<()> {
        let handle = self.file(cx, node, handle)?;
        sync(cx, &handle, data_only)
    }

    pub(super) fn do_fsyncdir(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        data_only: bool,
    ) -> Result<()> {
        let handle = self.directory(cx, node, handle)?;
        sync(cx, &handle, data_only)
    }

    /// Syncs the file system of `node`; from the root without announced submounts, every one below too,
    /// since the DPU cannot tell them apart.
    pub(super) fn do_syncfs(&self, cx: &Context, node: NodeId) -> Result<()> {
        let inode = self.inode(cx, node)?;
        if !cx.may_block {
            return Err(Errno::AGAIN);
        }
        let below = if node == NodeId::ROOT && !self.negotiated(SUBMOUNTS) {
            self.inodes.mounts.all()
        } else {
            Vec::new()
        };
        let mut result = Ok(());
        for mount in below.iter().filter(|mount| mount.index != inode.mount.index) {
            if let Some(fd) = mount.open_by_handle_fd() {
                result = result.and(rustix::fs::syncfs(fd));
            }
        }
        let own = match inode.mount.open_by_handle_fd() {
            Some(fd) => rustix::fs::syncfs(fd),
            None if inode.is_regular() || inode.is_directory() => {
                rustix::fs::syncfs(self.inodes.open(&inode, OFlags::RDONLY | OFlags::NONBLOCK)?)
            }
            None => Err(Errno::INVAL),
        };
        own.and(result)
    }

    pub(super) fn do_fallocate(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.writable()?;
        let handle = self.file(cx, node, handle)?;
        let known = FallocateFlags::KEEP_SIZE
            | FallocateFlags::PUNCH_HOLE
            | FallocateFlags::COLLAPSE_RANGE
            | FallocateFlags::ZERO_RANGE
            | FallocateFlags::INSERT_RANGE
            | FallocateFlags::UNSHARE_RANGE;
        let mode = FallocateFlags::from_bits_retain(mode);
        if !known.contains(mode) {
            return Err(Errno::OPNOTSUPP);
        }
        let end = file_offset(offset)?.checked_add(file_offset(len)?).ok_or(Errno::FBIG)?;
        if len == 0 || end <= 0 {
            return Err(Errno::INVAL);
        }
        // The protocol has no flag for it; a caller that is not root loses set-id bits as it does locally.
        let _without_fsetid = WithoutFsetid::enter(cx.uid != 0)?;
        self.drop_mapped_capability(handle.as_fd())?;
        rustix::fs::fallocate(handle.as_fd(), mode, offset, len)
    }

    /// `SEEK_DATA` and `SEEK_HOLE`; the DPU does the others itself.
    pub(super) fn do_lseek(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        whence: u32,
    ) -> Result<u64> {
        let handle = self.file(cx, node, handle)?;
        file_offset(offset)?;
        let from = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        rustix::fs::seek(handle.as_fd(), from)
    }

    pub(super) fn do_copy_file_range(&self, cx: &Context, range: CopyRange) -> Result<usize> {
        self.writable()?;
        let (source_node, source, mut source_offset) = range.source;
        let (target_node, target, mut target_offset) = range.target;
        if range.flags != 0 {
            return Err(Errno::INVAL);
        }
        let source = self.file(cx, source_node, source)?;
        let target = self.file(cx, target_node, target)?;
        let len = range.len.min(MAX_COPY);
        for start in [source_offset, target_offset] {
            file_offset(start)?.checked_add(len as i64).ok_or(Errno::OVERFLOW)?;
        }
        if !cx.may_block && (len > SHORT_COPY || target.slow_writes) {
            return Err(Errno::AGAIN);
        }
        let _without_fsetid = WithoutFsetid::enter(cx.uid != 0)?;
        self.drop_mapped_capability(target.as_fd())?;
        rustix::fs::copy_file_range(
            source.as_fd(),
            Some(&mut source_offset),
            target.as_fd(),
            Some(&mut target_offset),
            len as usize,
        )
    }
}
