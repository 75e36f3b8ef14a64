//! Bytes of a request to a typed [`Request`]. Pure: every rule about what a DPU may send is here.
//!
//! The caller has copied the request out of DPU memory once, so nothing changes while it is checked
//! (the payload of a `FUSE_WRITE` stays where it is; it is never interpreted). The rules:
//!
//! - No number the DPU sends is used as a length before it was compared with the bytes at hand.
//!   Sizes of replies are capped to the room for the reply, so they never become allocations.
//! - Structures may be followed by bytes not known here (a newer kernel may extend them). Where
//!   strings or payload follow, every byte has a meaning, so lengths must match exactly.
//! - Offsets and lengths are those of `loff_t`: beyond `i64::MAX`, or with a sum beyond, is `EINVAL`
//!   (`ENXIO` for `SEEK_DATA` and `SEEK_HOLE`, as every local file system says).
//! - An id of `u32::MAX` is refused: system calls take it for "leave unchanged", which would run the
//!   operation as the daemon's own user.
#![forbid(unsafe_code)]

use std::ffi::CStr;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::abi::{self, InHeader, InitIn};
use super::arguments as args;
use super::extension::Extensions;
use super::name;
use super::opcode::Opcode;
use super::session::Layout;
use crate::filesystem::{CopyRange, HandleId, LockRequest, NewInode, NodeId, Release, SetAttr};

/// Largest request that is no `FUSE_WRITE`: `FUSE_SETXATTR` with the largest value, or a new
/// symbolic link with the largest label, and some room.
pub const MAX_ARGUMENTS: usize = 128 << 10;

/// One request as it was copied out of DPU memory.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Header.
    pub header: InHeader,
    /// What follows the header; of a `FUSE_WRITE` at least the arguments and none of the rest is read.
    pub body: &'a [u8],
    /// Bytes that follow the header, whether they are in `body` or not.
    pub body_len: usize,
    /// Bytes of room for the reply, its header not counted.
    pub room: usize,
}

/// A checked request. Node id and caller are in the header.
#[derive(Clone, Debug)]
#[allow(missing_docs, reason = "arguments of the operation of the same name in `FileSystem`")]
pub enum Request<'a> {
    Lookup {
        name: &'a CStr,
    },
    Forget {
        count: u64,
    },
    BatchForget(Forgets<'a>),
    Getattr {
        handle: Option<HandleId>,
    },
    Statx {
        handle: Option<HandleId>,
        flags: u32,
        mask: u32,
    },
    Setattr(SetAttr),
    Access {
        mask: u32,
    },
    Readlink,
    Symlink {
        name: &'a CStr,
        target: &'a CStr,
    },
    Mknod {
        name: &'a CStr,
        new: NewInode,
    },
    Mkdir {
        name: &'a CStr,
        new: NewInode,
    },
    Unlink {
        name: &'a CStr,
    },
    Rmdir {
        name: &'a CStr,
    },
    Rename {
        from: &'a CStr,
        to: (NodeId, &'a CStr),
        flags: u32,
    },
    Link {
        node: NodeId,
        name: &'a CStr,
    },
    Open {
        flags: u32,
        kill_suidgid: bool,
    },
    Create {
        name: &'a CStr,
        new: NewInode,
        flags: u32,
        kill_suidgid: bool,
    },
    Tmpfile {
        new: NewInode,
        flags: u32,
    },
    Read {
        handle: HandleId,
        offset: u64,
        size: usize,
    },
    Write {
        handle: HandleId,
        offset: u64,
        size: usize,
        kill_suidgid: bool,
        cached: bool,
        /// The file has `O_APPEND` set, and this is not a page written back.
        append: bool,
    },
    Statfs,
    Flush {
        handle: HandleId,
        lock_owner: u64,
    },
    Release(Release),
    Releasedir(Release),
    Fsync {
        handle: HandleId,
        data_only: bool,
    },
    Fsyncdir {
        handle: HandleId,
        data_only: bool,
    },
    Fallocate {
        handle: HandleId,
        mode: u32,
        offset: u64,
        len: u64,
    },
    Lseek {
        handle: HandleId,
        offset: u64,
        whence: u32,
    },
    CopyFileRange {
        range: CopyRange,
        wide: bool,
    },
    Opendir {
        flags: u32,
    },
    Readdir {
        handle: HandleId,
        offset: u64,
        size: usize,
    },
    Readdirplus {
        handle: HandleId,
        offset: u64,
        size: usize,
    },
    Syncfs,
    Setxattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
        kill_sgid: bool,
    },
    Getxattr {
        name: &'a CStr,
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a CStr,
    },
    Getlk(LockRequest),
    Setlk {
        lock: LockRequest,
        wait: bool,
    },
    Init(InitIn),
    Destroy,
    Interrupt,
    /// A known operation that is not served.
    Unsupported,
}

impl Request<'_> {
    /// Least bytes of body that an answer to this request has. The room for them is checked before
    /// the operation runs, so that no reference or handle is made that the DPU never learns of.
    #[inline]
    pub fn least_reply(&self) -> usize {
        match self {
            Request::Lookup { .. }
            | Request::Symlink { .. }
            | Request::Mknod { .. }
            | Request::Mkdir { .. }
            | Request::Link { .. } => size_of::<abi::EntryOut>(),
            Request::Getattr { .. } | Request::Setattr(_) => size_of::<abi::AttrOut>(),
            Request::Statx { .. } => size_of::<abi::StatxOut>(),
            Request::Open { .. } | Request::Opendir { .. } => size_of::<abi::OpenOut>(),
            Request::Create { .. } | Request::Tmpfile { .. } => {
                size_of::<abi::EntryOut>() + size_of::<abi::OpenOut>()
            }
            Request::Write { .. } => size_of::<abi::WriteOut>(),
            Request::Statfs => size_of::<abi::Kstatfs>(),
            Request::Lseek { .. } => size_of::<abi::LseekOut>(),
            Request::CopyFileRange { wide: true, .. } => size_of::<abi::CopyFileRangeOut>(),
            Request::CopyFileRange { wide: false, .. } => size_of::<abi::WriteOut>(),
            Request::Getxattr { size: 0, .. } | Request::Listxattr { size: 0 } => {
                size_of::<abi::GetxattrOut>()
            }
            Request::Getlk(_) => size_of::<abi::FileLock>(),
            // `FUSE_COMPAT_22_INIT_OUT_SIZE`: as far as `max_write`.
            Request::Init(_) => 24,
            _ => 0,
        }
    }
}

/// The references a `FUSE_BATCH_FORGET` gives back.
#[derive(Clone, Copy, Debug)]
pub struct Forgets<'a>(&'a [u8]);

impl Forgets<'_> {
    /// Node and number of references, one after the other.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, u64)> {
        self.0
            .chunks_exact(size_of::<abi::ForgetOne>())
            .filter_map(|one| abi::ForgetOne::read_from_bytes(one).ok())
            .map(|one| (NodeId(one.nodeid), one.nlookup))
    }
}

/// Checks one request; `opcode` is the header's.
///
/// # Errors
/// What the DPU is told: `EINVAL` unless a rule names another.
#[inline]
pub fn parse<'a>(
    opcode: Opcode,
    message: &Message<'a>,
    layout: Layout,
) -> Result<(Request<'a>, Extensions<'a>), Errno> {
    let header = &message.header;
    if header.uid == u32::MAX || header.gid == u32::MAX {
        return Err(Errno::INVAL);
    }
    let mut body = Body { rest: message.body };
    let counted = if header.total_extlen == 0 { &[][..] } else { body.split_extensions(message)? };
    let request = parse_body(opcode, message, &mut body, layout)?;
    if !opcode.makes_inode() {
        return Ok((request, Extensions::default()));
    }
    let extensions = match body.rest {
        [] => counted,
        uncounted if counted.is_empty() && layout.uncounted_label => uncounted,
        _ => return Err(Errno::INVAL),
    };
    Ok((request, Extensions::parse(extensions, layout.extensions)?))
}

/// The arguments of one operation.
#[inline]
fn parse_body<'a>(
    opcode: Opcode,
    message: &Message<'a>,
    body: &mut Body<'a>,
    layout: Layout,
) -> Result<Request<'a>, Errno> {
    Ok(match opcode {
        Opcode::Lookup => Request::Lookup { name: body.only_component()? },
        Opcode::Forget => Request::Forget { count: body.take::<abi::ForgetIn>()?.nlookup },
        Opcode::BatchForget => {
            let count = body.take::<abi::BatchForgetIn>()?.count as usize;
            let len = count.checked_mul(size_of::<abi::ForgetOne>()).ok_or(Errno::INVAL)?;
            Request::BatchForget(Forgets(body.rest.get(..len).ok_or(Errno::INVAL)?))
        }
        Opcode::Getattr => {
            let arg: abi::GetattrIn = body.take()?;
            Request::Getattr { handle: args::handle_if(arg.getattr_flags & abi::GETATTR_FH != 0, arg.fh) }
        }
        Opcode::Statx => {
            let arg: abi::StatxIn = body.take()?;
            let handle = args::handle_if(arg.getattr_flags & abi::GETATTR_FH != 0, arg.fh);
            Request::Statx { handle, flags: arg.sx_flags, mask: arg.sx_mask }
        }
        Opcode::Setattr => Request::Setattr(args::set_attr(&body.take()?)?),
        Opcode::Access => match body.take::<abi::AccessIn>()?.mask {
            mask @ 0..=7 => Request::Access { mask },
            _ => return Err(Errno::INVAL),
        },
        Opcode::Readlink => Request::Readlink,
        Opcode::Symlink => {
            let name = body.component()?;
            Request::Symlink { name, target: name::check_target(body.string()?)? }
        }
        Opcode::Mknod => {
            let arg: abi::MknodIn = body.take()?;
            Request::Mknod { name: body.component()?, new: args::new_node(&arg)? }
        }
        Opcode::Mkdir => {
            let arg: abi::MkdirIn = body.take()?;
            Request::Mkdir { name: body.component()?, new: args::new_directory(&arg) }
        }
        Opcode::Unlink => Request::Unlink { name: body.only_component()? },
        Opcode::Rmdir => Request::Rmdir { name: body.only_component()? },
        Opcode::Rename => {
            let arg: abi::RenameIn = body.take()?;
            body.rename(NodeId(arg.newdir), 0)?
        }
        Opcode::Rename2 => {
            let arg: abi::Rename2In = body.take()?;
            body.rename(NodeId(arg.newdir), args::rename_flags(arg.flags)?)?
        }
        Opcode::Link => {
            let arg: abi::LinkIn = body.take()?;
            Request::Link { node: NodeId(arg.oldnodeid), name: body.only_component()? }
        }
        Opcode::Open => {
            let arg: abi::OpenIn = body.take()?;
            let kill_suidgid = arg.open_flags & abi::OPEN_KILL_SUIDGID != 0;
            Request::Open { flags: arg.flags, kill_suidgid }
        }
        Opcode::Create => {
            let arg: abi::CreateIn = body.take()?;
            let kill_suidgid = arg.open_flags & abi::OPEN_KILL_SUIDGID != 0;
            Request::Create {
                name: body.component()?,
                new: args::new_file(&arg),
                flags: arg.flags,
                kill_suidgid,
            }
        }
        Opcode::Tmpfile => {
            let arg: abi::CreateIn = body.take()?;
            // Linux sends "/" (`slash_name` of `vfs_tmpfile`): a place holder that names nothing.
            body.string()?;
            Request::Tmpfile { new: args::new_file(&arg), flags: arg.flags }
        }
        Opcode::Read => {
            let arg: abi::ReadIn = body.take()?;
            let size = args::read_size(&arg, message.room)?;
            Request::Read { handle: HandleId(arg.fh), offset: arg.offset, size }
        }
        Opcode::Write => {
            let arg: abi::WriteIn = body.take()?;
            let payload = message.body_len - size_of::<abi::WriteIn>();
            let cached = arg.write_flags & abi::WRITE_CACHE != 0;
            Request::Write {
                handle: HandleId(arg.fh),
                offset: arg.offset,
                size: args::write_size(&arg, payload)?,
                kill_suidgid: arg.write_flags & abi::WRITE_KILL_SUIDGID != 0,
                cached,
                append: !cached && arg.flags & libc::O_APPEND as u32 != 0,
            }
        }
        Opcode::Statfs => Request::Statfs,
        Opcode::Flush => {
            let arg: abi::FlushIn = body.take()?;
            Request::Flush { handle: HandleId(arg.fh), lock_owner: arg.lock_owner }
        }
        Opcode::Release => Request::Release(args::release(&body.take()?)),
        Opcode::Releasedir => Request::Releasedir(args::release(&body.take()?)),
        Opcode::Fsync => {
            let arg: abi::FsyncIn = body.take()?;
            Request::Fsync { handle: HandleId(arg.fh), data_only: args::data_only(&arg) }
        }
        Opcode::Fsyncdir => {
            let arg: abi::FsyncIn = body.take()?;
            Request::Fsyncdir { handle: HandleId(arg.fh), data_only: args::data_only(&arg) }
        }
        Opcode::Fallocate => {
            let abi::FallocateIn { fh, offset, length: len, mode, .. } = body.take()?;
            args::check_range(offset, len)?;
            Request::Fallocate { handle: HandleId(fh), mode, offset, len }
        }
        Opcode::Lseek => {
            let arg: abi::LseekIn = body.take()?;
            args::check_seek(&arg)?;
            Request::Lseek { handle: HandleId(arg.fh), offset: arg.offset, whence: arg.whence }
        }
        Opcode::CopyFileRange => body.copy_range(message, false)?,
        Opcode::CopyFileRange64 => body.copy_range(message, true)?,
        Opcode::Opendir => Request::Opendir { flags: body.take::<abi::OpenIn>()?.flags },
        Opcode::Readdir => {
            let arg: abi::ReadIn = body.take()?;
            Request::Readdir {
                handle: HandleId(arg.fh),
                offset: arg.offset,
                size: args::listing_room(arg.size, message.room),
            }
        }
        Opcode::Readdirplus => {
            let arg: abi::ReadIn = body.take()?;
            Request::Readdirplus {
                handle: HandleId(arg.fh),
                offset: arg.offset,
                size: args::listing_room(arg.size, message.room),
            }
        }
        Opcode::Syncfs => Request::Syncfs,
        Opcode::Setxattr => body.set_xattr(layout)?,
        Opcode::Getxattr => {
            let arg: abi::GetxattrIn = body.take()?;
            let name = name::check_xattr_name(body.string()?)?;
            body.end()?;
            Request::Getxattr { name, size: args::xattr_room(arg.size, message.room)? }
        }
        Opcode::Listxattr => {
            let arg: abi::GetxattrIn = body.take()?;
            Request::Listxattr { size: args::xattr_room(arg.size, message.room)? }
        }
        Opcode::Removexattr => {
            let name = name::check_xattr_name(body.string()?)?;
            body.end()?;
            Request::Removexattr { name }
        }
        Opcode::Getlk => Request::Getlk(args::lock(&body.take()?)?),
        Opcode::Setlk => Request::Setlk { lock: args::lock(&body.take()?)?, wait: false },
        Opcode::Setlkw => Request::Setlk { lock: args::lock(&body.take()?)?, wait: true },
        Opcode::Init => Request::Init(body.init()?),
        Opcode::Destroy => Request::Destroy,
        Opcode::Interrupt => Request::Interrupt,
        Opcode::Bmap
        | Opcode::Ioctl
        | Opcode::Poll
        | Opcode::NotifyReply
        | Opcode::Setupmapping
        | Opcode::Removemapping => Request::Unsupported,
    })
}

/// What is left of the bytes after the header.
struct Body<'a> {
    rest: &'a [u8],
}

impl<'a> Body<'a> {
    /// The next structure.
    #[inline]
    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = rest;
        Ok(value)
    }

    /// The next string, not checked further.
    #[inline]
    fn string(&mut self) -> Result<&'a CStr, Errno> {
        let (string, rest) = name::split_string(self.rest)?;
        self.rest = rest;
        Ok(string)
    }

    /// The next name of a directory entry.
    #[inline]
    fn component(&mut self) -> Result<&'a CStr, Errno> {
        name::check_component(self.string()?)
    }

    /// A name of a directory entry that ends the request.
    #[inline]
    fn only_component(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.component()?;
        self.end()?;
        Ok(name)
    }

    /// Nothing may be left: a name with an inner NUL ends up here.
    #[inline]
    fn end(&self) -> Result<(), Errno> {
        if self.rest.is_empty() { Ok(()) } else { Err(Errno::INVAL) }
    }

    /// Both names of a rename.
    fn rename(&mut self, parent: NodeId, flags: u32) -> Result<Request<'a>, Errno> {
        let from = self.component()?;
        Ok(Request::Rename { from, to: (parent, self.only_component()?), flags })
    }

    /// A copy from the node of the header to the one in the arguments.
    fn copy_range(&mut self, message: &Message, wide: bool) -> Result<Request<'a>, Errno> {
        let range = args::copy_range(NodeId(message.header.nodeid), &self.take()?, wide)?;
        Ok(Request::CopyFileRange { range, wide })
    }

    /// `struct fuse_setxattr_in`, whose length was negotiated, name and value.
    fn set_xattr(&mut self, layout: Layout) -> Result<Request<'a>, Errno> {
        let arg = if layout.setxattr_ext {
            self.take()?
        } else {
            let abi::SetxattrInShort { size, flags } = self.take()?;
            abi::SetxattrIn { size, flags, ..Default::default() }
        };
        let name = name::check_xattr_name(self.string()?)?;
        let value = self.rest;
        args::check_set_xattr(&arg, value)?;
        let kill_sgid = arg.setxattr_flags & abi::SETXATTR_ACL_KILL_SGID != 0;
        Ok(Request::Setxattr { name, value, flags: arg.flags, kill_sgid })
    }

    /// `struct fuse_init_in`, which grew over time; what an old kernel does not send is 0.
    fn init(&mut self) -> Result<InitIn, Errno> {
        let mut bytes = [0; size_of::<InitIn>()];
        let len = self.rest.len().min(bytes.len());
        if len < 8 {
            return Err(Errno::INVAL);
        }
        bytes[..len].copy_from_slice(&self.rest[..len]);
        InitIn::read_from_bytes(&bytes).map_err(|_| Errno::INVAL)
    }

    /// Cuts the extensions that the header counts off the end.
    fn split_extensions(&mut self, message: &Message<'a>) -> Result<&'a [u8], Errno> {
        let len = usize::from(message.header.total_extlen) * 8;
        if self.rest.len() != message.body_len {
            return Err(Errno::INVAL);
        }
        let split = self.rest.len().checked_sub(len).ok_or(Errno::INVAL)?;
        let (rest, extensions) = self.rest.split_at(split);
        self.rest = rest;
        Ok(extensions)
    }
}

#[cfg(test)]
mod tests;
