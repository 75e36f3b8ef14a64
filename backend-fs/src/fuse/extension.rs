//! Extensions at the end of a request that makes an inode: supplementary groups and security label.
//!
//! An extension is a [`ExtHeader`] with its total size, then its content, padded to 8 bytes. Kinds
//! up to 31 are the number of security contexts that follow, 32 is a list of groups. Linux sends at
//! most one label and one group (that of the parent directory). Kernels from 5.17 to 6.2 (7.36 and
//! 7.37) append the label without counting it in the header; see [`super::session::Layout`].
//!
//! What was not negotiated is refused: a DPU kernel that keeps the protocol never sends it.
#![forbid(unsafe_code)]

use std::ffi::CStr;

use arrayvec::ArrayVec;
use rustix::io::Errno;
use zerocopy::FromBytes;

use super::abi::{EXT_GROUPS, ExtHeader, MAX_NR_SECCTX, Secctx};
use super::name;

/// Most supplementary groups of one request. Linux sends one.
pub const GROUPS_MAX: usize = 32;
/// Longest security label, in bytes (`XATTR_SIZE_MAX`, `linux/limits.h`).
pub const LABEL_MAX: usize = 65536;

/// What the extensions of one request say. Small: nearly every request goes without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extensions<'a> {
    /// Supplementary groups of the caller.
    pub groups: Option<Groups<'a>>,
    /// Extended attribute, name and value, to give to the new inode.
    pub label: Option<(&'a CStr, &'a [u8])>,
}

/// A checked list of group ids, as it lies in the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups<'a>(&'a [u8]);

impl Groups<'_> {
    /// The ids, at most [`GROUPS_MAX`].
    pub fn ids(self) -> ArrayVec<u32, GROUPS_MAX> {
        let ids = self.0.chunks_exact(size_of::<u32>());
        ids.filter_map(|id| u32::read_from_bytes(id).ok()).take(GROUPS_MAX).collect()
    }
}

/// Which kinds were negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepted {
    /// `FUSE_CREATE_SUPP_GROUP`.
    pub groups: bool,
    /// `FUSE_SECURITY_CTX`.
    pub label: bool,
}

impl<'a> Extensions<'a> {
    /// Reads all extensions; `bytes` is exactly the part of the request that holds them.
    ///
    /// # Errors
    /// `EINVAL` for a truncated, repeated, unknown or not negotiated one.
    pub fn parse(mut bytes: &'a [u8], accepted: Accepted) -> Result<Self, Errno> {
        let mut all = Extensions::default();
        while !bytes.is_empty() {
            let (header, _) = ExtHeader::read_from_prefix(bytes).map_err(|_| Errno::INVAL)?;
            let size = header.size as usize;
            if size < size_of::<ExtHeader>() || !size.is_multiple_of(8) || size > bytes.len() {
                return Err(Errno::INVAL);
            }
            let (extension, rest) = bytes.split_at(size);
            let content = &extension[size_of::<ExtHeader>()..];
            match header.kind {
                contexts @ 0..=MAX_NR_SECCTX if accepted.label && all.label.is_none() => {
                    all.label = parse_label(content, contexts)?;
                }
                EXT_GROUPS if accepted.groups && all.groups.is_none() => {
                    all.groups = Some(parse_groups(content)?);
                }
                _ => return Err(Errno::INVAL),
            }
            bytes = rest;
        }
        Ok(all)
    }
}

/// `struct fuse_secctx`, name, value; at most once.
fn parse_label(content: &[u8], contexts: u32) -> Result<Option<(&CStr, &[u8])>, Errno> {
    match contexts {
        0 => Ok(None),
        1 => {
            let (context, rest) = Secctx::read_from_prefix(content).map_err(|_| Errno::INVAL)?;
            let (label_name, rest) = name::split_string(rest)?;
            name::check_xattr_name(label_name)?;
            let size = context.size as usize;
            if size > LABEL_MAX {
                return Err(Errno::INVAL);
            }
            let value = rest.get(..size).ok_or(Errno::INVAL)?;
            Ok(Some((label_name, value)))
        }
        _ => Err(Errno::INVAL),
    }
}

/// `struct fuse_supp_groups`: a count and as many ids.
fn parse_groups(content: &[u8]) -> Result<Groups<'_>, Errno> {
    let (count, rest) = u32::read_from_prefix(content).map_err(|_| Errno::INVAL)?;
    let count = count as usize;
    if count > GROUPS_MAX {
        return Err(Errno::INVAL);
    }
    let groups = Groups(rest.get(..count * size_of::<u32>()).ok_or(Errno::INVAL)?);
    // (gid_t)-1 means "unchanged" to the system calls that take a group id.
    if groups.ids().contains(&u32::MAX) { Err(Errno::INVAL) } else { Ok(groups) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOTH: Accepted = Accepted { groups: true, label: true };

    fn groups(count: u32, ids: &[u32]) -> Vec<u8> {
        let mut content = count.to_le_bytes().to_vec();
        ids.iter().for_each(|id| content.extend(id.to_le_bytes()));
        extension(EXT_GROUPS, &content)
    }

    fn label(size: u32, name: &[u8], value: &[u8]) -> Vec<u8> {
        let content = [&size.to_le_bytes()[..], &[0; 4], name, value].concat();
        extension(1, &content)
    }

    fn extension(kind: u32, content: &[u8]) -> Vec<u8> {
        let size = (8 + content.len()).next_multiple_of(8);
        let mut bytes = (size as u32).to_le_bytes().to_vec();
        bytes.extend(kind.to_le_bytes());
        bytes.extend(content);
        bytes.resize(size, 0);
        bytes
    }

    fn refused(bytes: &[u8]) {
        assert_eq!(Extensions::parse(bytes, BOTH), Err(Errno::INVAL), "{bytes:?}");
    }

    #[test]
    fn label_and_group_as_linux_sends_them() {
        let bytes = [label(6, b"security.selinux\0", b"labelX"), groups(1, &[1000])].concat();
        let all = Extensions::parse(&bytes, BOTH).unwrap();
        assert_eq!(all.groups.unwrap().ids().as_slice(), [1000]);
        assert_eq!(all.label.unwrap(), (c"security.selinux", &b"labelX"[..]));
    }

    #[test]
    fn nothing_and_no_context_are_fine() {
        assert_eq!(Extensions::parse(b"", BOTH), Ok(Extensions::default()));
        assert_eq!(Extensions::parse(&extension(0, b""), BOTH), Ok(Extensions::default()));
    }

    #[test]
    fn truncation_at_any_byte_is_refused() {
        let whole = [label(6, b"security.selinux\0", b"labelX"), groups(2, &[1, 2])].concat();
        let first = label(6, b"security.selinux\0", b"labelX").len();
        for len in (1..whole.len()).filter(|&len| len != first) {
            refused(&whole[..len]);
        }
    }

    #[test]
    fn counts_and_sizes_that_lie_are_refused() {
        refused(&groups(2, &[1]));
        refused(&groups(u32::MAX, &[1]));
        refused(&groups(GROUPS_MAX as u32 + 1, &[7; GROUPS_MAX + 1]));
        refused(&groups(1, &[u32::MAX]));
        refused(&label(7, b"a\0", b"12345"));
        refused(&label(u32::MAX, b"a\0", b""));
        refused(&label(0, b"\0", b""));
        refused(&label(0, b"no-end--", b""));
        refused(&extension(2, &[0; 64]));
        refused(&extension(33, b""));
        refused(&[4, 0, 0, 0, 32, 0, 0, 0]);
        refused(&[0; 8]);
    }

    #[test]
    fn what_was_not_negotiated_or_comes_twice_is_refused() {
        let one = groups(1, &[1]);
        assert_eq!(Extensions::parse(&one, Accepted { groups: false, label: true }), Err(Errno::INVAL));
        refused(&[one.clone(), one].concat());
        let one = label(1, b"a\0", b"b");
        assert_eq!(Extensions::parse(&one, Accepted { groups: true, label: false }), Err(Errno::INVAL));
        refused(&[one.clone(), one].concat());
    }
}
