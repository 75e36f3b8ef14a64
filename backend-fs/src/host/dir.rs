//! Directory listings: READDIR and READDIRPLUS.
//!
//! Offsets are the host's own cookies (`d_off`), so a listing goes on where it stopped whatever changed in
//! between, as far as the host's file system promises that. The descriptor has one position, so a seek and
//! the read after it are one step under the handle's own lock; the entries are worked on after that,
//! from a buffer of the thread. How much is read at a time follows the room in the reply, since what
//! does not fit is read again.
//!
//! READDIRPLUS looks each entry up. An entry whose lookup fails (gone, or a budget is used up) is
//! listed all the same, without attributes: the DPU asks again when it wants them.
#![forbid(unsafe_code)]

use std::cell::RefCell;
use std::ffi::CStr;
use std::os::fd::AsFd;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::handle::Handle;
use super::table::lock;
use super::{HostFs, sys};
use crate::filesystem::{Context, HandleId, NodeId, Result};
use crate::fuse::dirent::DirBuffer;

/// Most that is read from a directory at a time.
const LARGEST_READ: usize = 32 << 10;
/// Least: more than the longest entry takes (19 bytes and a name of 256 bytes with its end).
const SMALLEST_READ: usize = 512;

/// Bytes of `struct linux_dirent64` before the name.
const NAME_OFFSET: usize = 19;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One `struct linux_dirent64`.
struct HostEntry<'a> {
    ino: u64,
    /// Cookie of the entry after it.
    next: u64,
    kind: u32,
    name: &'a CStr,
}

/// Splits the first entry off what `getdents64` gave.
fn split_first(bytes: &[u8]) -> Option<(HostEntry<'_>, &[u8])> {
    let len = u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?) as usize;
    let (entry, rest) = bytes.split_at_checked(len)?;
    let ino = u64::from_ne_bytes(entry.get(..8)?.try_into().ok()?);
    let next = u64::from_ne_bytes(entry.get(8..16)?.try_into().ok()?);
    let kind = u32::from(*entry.get(18)?);
    let name = CStr::from_bytes_until_nul(entry.get(NAME_OFFSET..)?).ok()?;
    Some((HostEntry { ino, next, kind, name }, rest))
}

/// Reads entries from `offset` on into `buf`.
fn fill(handle: &Handle, offset: u64, buf: &mut [u8]) -> Result<usize> {
    let mut position = lock(&handle.position);
    if *position != Some(offset) {
        *position = None;
        rustix::fs::seek(handle.as_fd(), SeekFrom::Start(offset))?;
    }
    let filled = sys::getdents(handle.as_fd(), buf)?;
    // The cookie of the last entry is where the kernel stands now.
    let mut rest = &buf[..filled];
    let mut end = Some(offset);
    while let Some((entry, after)) = split_first(rest) {
        end = Some(entry.next);
        rest = after;
    }
    *position = end;
    Ok(filled)
}

impl HostFs {
    /// Gives the entries after `offset` to `take` until it wants no more or the directory ends.
    fn list(
        &self,
        handle: &Handle,
        mut offset: u64,
        read_size: impl Fn() -> usize,
        mut take: impl FnMut(&HostEntry) -> bool,
    ) -> Result<()> {
        if i64::try_from(offset).is_err() {
            return Err(Errno::INVAL);
        }
        // Taken out, so that nothing is borrowed while entries are looked up.
        let mut buffer = BUFFER.take();
        buffer.resize(LARGEST_READ, 0);
        let mut first = true;
        let result = loop {
            let size = read_size().clamp(SMALLEST_READ, LARGEST_READ);
            let filled = match fill(handle, offset, &mut buffer[..size]) {
                Ok(0) => break Ok(()),
                Ok(filled) => filled,
                // What was listed so far counts; the error comes again with the next request.
                Err(_) if !first => break Ok(()),
                Err(errno) => break Err(errno),
            };
            first = false;
            let mut rest = &buffer[..filled];
            let mut full = false;
            while let Some((entry, after)) = split_first(rest) {
                if !take(&entry) {
                    full = true;
                    break;
                }
                offset = entry.next;
                rest = after;
            }
            if full {
                break Ok(());
            }
        };
        BUFFER.replace(buffer);
        result
    }

    pub(super) fn do_readdir(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: &mut DirBuffer,
    ) -> Result<()> {
        let handle = self.directory(cx, node, handle)?;
        let into = RefCell::new(into);
        self.list(
            &handle,
            offset,
            // An entry takes at least as much room in the reply as here.
            || room(|len| into.borrow().fits(len)),
            |entry| {
                let name = entry.name.to_bytes();
                into.borrow_mut().push(name, self.shown_ino(node, entry), entry.next, entry.kind)
            },
        )
    }

    pub(super) fn do_readdirplus(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: &mut DirBuffer,
    ) -> Result<()> {
        let dir = self.inode(cx, node)?;
        let handle = self.directory(cx, node, handle)?;
        let into = RefCell::new(into);
        self.list(
            &handle,
            offset,
            // 152 bytes and the name there are 24 and the name here, roughly a fourth.
            || room(|len| into.borrow().fits_plus(len)) / 4,
            |entry| {
                let name = entry.name.to_bytes();
                let mut into = into.borrow_mut();
                if !into.fits_plus(name.len()) {
                    return false;
                }
                let found = match name {
                    b"." | b".." => None,
                    _ => self.lookup_in(&dir, handle.as_fd(), entry.name).ok(),
                };
                let ino = found.map_or_else(|| self.shown_ino(node, entry), |found| found.attr.ino);
                let kind = found.map_or(entry.kind, |found| (found.attr.mode & libc::S_IFMT) >> 12);
                let taken = into.push_plus(name, ino, entry.next, kind, found.as_ref());
                if !taken && let Some(found) = found {
                    self.inodes.forget(found.node, 1);
                }
                taken
            },
        )
    }

    /// The inode number to show. What is above the export is nobody's business there.
    fn shown_ino(&self, dir: NodeId, entry: &HostEntry) -> u64 {
        if dir == NodeId::ROOT && entry.name == c".." { NodeId::ROOT.0 } else { entry.ino }
    }
}

/// Room in a reply, as a power of two, found by asking.
fn room(fits: impl Fn(usize) -> bool) -> usize {
    let mut size = LARGEST_READ;
    while size > SMALLEST_READ && !fits(size) {
        size /= 2;
    }
    size
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &[u8], next: u64) -> Vec<u8> {
        let len = (NAME_OFFSET + name.len() + 1).next_multiple_of(8);
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&7u64.to_ne_bytes());
        bytes.extend_from_slice(&next.to_ne_bytes());
        bytes.extend_from_slice(&(len as u16).to_ne_bytes());
        bytes.push(4);
        bytes.extend_from_slice(name);
        bytes.resize(len, 0);
        bytes
    }

    #[test]
    fn entries_split_off_one_by_one() {
        let bytes = [entry(b"a", 1), entry(b"longer name", 2)].concat();
        let (first, rest) = split_first(&bytes).unwrap();
        assert_eq!((first.ino, first.next, first.kind, first.name), (7, 1, 4, c"a"));
        let (second, rest) = split_first(rest).unwrap();
        assert_eq!((second.next, second.name), (2, c"longer name"));
        assert!(split_first(rest).is_none());
    }

    #[test]
    fn torn_entries_end_the_listing() {
        let whole = entry(b"name", 1);
        for len in 0..whole.len() {
            assert!(split_first(&whole[..len]).is_none(), "{len}");
        }
    }
}
