//! Extended attributes.
//!
//! They are reached by path: `/proc/self/fd` is the thread's working directory and the path is the number of
//! the inode's `O_PATH` descriptor. That leads to the inode itself, of whatever kind, without opening it: a
//! symbolic link is not followed, a FIFO does not block.
//!
//! Names go through the map of the options both ways. POSIX ACLs exist only when they were negotiated.
//! Where the map gives `security.capability` another name, the host's kernel does not see it for what it is, so
//! this daemon removes it whenever the file's content or owner changes, as a kernel does.
#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{Mode, XattrFlags};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::cred::{self, WithoutFsetid};
use super::options::HostOptions;
use super::xattrmap::ToHost;
use super::{HostFs, POSIX_ACL, sys};
use crate::filesystem::{Context, NodeId, Result};

const ACL_ACCESS: &CStr = c"system.posix_acl_access";
const ACL_DEFAULT: &CStr = c"system.posix_acl_default";
const CAPABILITY: &CStr = c"security.capability";

/// Longest value and longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const LONGEST: usize = 65536;

fn is_acl(name: &CStr) -> bool {
    name == ACL_ACCESS || name == ACL_DEFAULT
}

/// The host's name of `security.capability`, if the map gives it another.
pub(super) fn mapped_capability(options: &HostOptions) -> Option<CString> {
    match options.xattrmap.as_ref()?.to_host(CAPABILITY) {
        ToHost::Name(name) if *name != *CAPABILITY => Some(name.into_owned()),
        _ => None,
    }
}

impl HostFs {
    fn host_name<'a>(&self, name: &'a CStr) -> Result<Cow<'a, CStr>> {
        if is_acl(name) && !self.negotiated(POSIX_ACL) {
            return Err(Errno::OPNOTSUPP);
        }
        match &self.options.xattrmap {
            None => Ok(Cow::Borrowed(name)),
            Some(map) => match map.to_host(name) {
                ToHost::Name(name) => Ok(name),
                ToHost::Denied => Err(Errno::PERM),
                ToHost::Unsupported => Err(Errno::OPNOTSUPP),
            },
        }
    }

    /// Does `call` with a path that leads to the file of `fd`.
    fn with_path<T>(&self, fd: BorrowedFd, call: impl FnOnce(&CStr) -> Result<T>) -> Result<T> {
        cred::enter_proc(self.inodes.proc_self_fd())?;
        call(DecInt::from_fd(fd).as_c_str())
    }

    /// The checks that all four operations share.
    fn xattrs_exist(&self) -> Result<()> {
        if self.options.xattr { Ok(()) } else { Err(Errno::NOSYS) }
    }

    pub(super) fn do_setxattr(
        &self,
        cx: &Context,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<()> {
        self.xattrs_exist()?;
        self.writable()?;
        let inode = self.inode(cx, node)?;
        let host_name = self.host_name(name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let fd = self.inodes.fd(&inode)?;
        let kill_sgid = kill_sgid && name == ACL_ACCESS;
        let _without_fsetid = WithoutFsetid::enter(kill_sgid)?;
        self.with_path(fd.as_fd(), |path| rustix::fs::setxattr(path, &*host_name, value, flags))?;
        if kill_sgid {
            // The kernel has not cleared it if the file's group is one of this daemon's.
            let mode = u32::from(sys::stat_fd(fd.as_fd())?.stx_mode);
            if mode & libc::S_ISGID != 0 {
                self.chmod(fd.as_fd(), Mode::from_raw_mode(mode & 0o7777 & !libc::S_ISGID))?;
            }
        }
        Ok(())
    }

    pub(super) fn do_getxattr(
        &self,
        cx: &Context,
        node: NodeId,
        name: &CStr,
        size: u32,
        value: &mut Vec<u8>,
    ) -> Result<usize> {
        self.xattrs_exist()?;
        let inode = self.inode(cx, node)?;
        // A name that may not be seen is not there.
        let name =
            self.host_name(name).map_err(|errno| if errno == Errno::PERM { Errno::NODATA } else { errno })?;
        let fd = self.inodes.fd(&inode)?;
        let size = LONGEST.min(size as usize);
        self.with_path(fd.as_fd(), |path| {
            if size == 0 {
                return rustix::fs::getxattr_query(path, &*name);
            }
            let start = value.len();
            value.resize(start + size, 0);
            let result = rustix::fs::getxattr(path, &*name, &mut value[start..]);
            value.truncate(start + result.unwrap_or(0));
            result
        })
    }

    pub(super) fn do_listxattr(
        &self,
        cx: &Context,
        node: NodeId,
        size: u32,
        names: &mut Vec<u8>,
    ) -> Result<usize> {
        self.xattrs_exist()?;
        let inode = self.inode(cx, node)?;
        let fd = self.inodes.fd(&inode)?;
        let host = self.with_path(fd.as_fd(), |path| {
            let len = rustix::fs::listxattr_query(path)?;
            if len == 0 {
                return Ok(Vec::new());
            }
            // Names that are added meanwhile have room too.
            let mut host = vec![0; LONGEST.min(2 * len + 256)];
            let len = rustix::fs::listxattr(path, &mut host[..])?;
            host.truncate(len);
            Ok(host)
        })?;
        let mut shown = Vec::with_capacity(host.len());
        for name in host.split_inclusive(|byte| *byte == 0) {
            let Ok(name) = CStr::from_bytes_with_nul(name) else { continue };
            let mapped = match &self.options.xattrmap {
                None => Some(Cow::Borrowed(name)),
                Some(map) => map.to_dpu(name),
            };
            if let Some(name) = mapped
                && (self.negotiated(POSIX_ACL) || !is_acl(&name))
            {
                shown.extend_from_slice(name.to_bytes_with_nul());
            }
        }
        match size as usize {
            0 => {}
            size if shown.len() > size => return Err(Errno::RANGE),
            _ => names.extend_from_slice(&shown),
        }
        Ok(shown.len())
    }

    pub(super) fn do_removexattr(&self, cx: &Context, node: NodeId, name: &CStr) -> Result<()> {
        self.xattrs_exist()?;
        self.writable()?;
        let inode = self.inode(cx, node)?;
        let name = self.host_name(name)?;
        let fd = self.inodes.fd(&inode)?;
        self.with_path(fd.as_fd(), |path| rustix::fs::removexattr(path, &*name))
    }

    /// Sets the security label of a new inode, `O_PATH` being enough.
    pub(super) fn label_path(&self, path: BorrowedFd, name: &CStr, value: &[u8]) -> Result<()> {
        let name = self.host_name(name)?;
        self.with_path(path, |path| rustix::fs::setxattr(path, &*name, value, XattrFlags::empty()))
    }

    /// Removes file capabilities that the host's kernel does not recognise, after or before a change.
    pub(super) fn drop_mapped_capability(&self, fd: BorrowedFd) -> Result<()> {
        let Some(name) = &self.mapped_capability else { return Ok(()) };
        match self.with_path(fd, |path| rustix::fs::removexattr(path, name.as_c_str())) {
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
            result => result,
        }
    }
}
