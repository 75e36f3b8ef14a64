//! Directory entries as FUSE carries them (`struct fuse_dirent`, `struct fuse_direntplus`).
#![forbid(unsafe_code)]

use zerocopy::IntoBytes;

use super::abi::{Dirent, EntryOut};
use super::reply;
use crate::filesystem::Entry;

/// Bytes before the name of a plain entry (`FUSE_NAME_OFFSET`).
const PLAIN: usize = size_of::<Dirent>();
/// Bytes before the name of an entry with attributes (`FUSE_NAME_OFFSET_DIRENTPLUS`).
const PLUS: usize = size_of::<EntryOut>() + PLAIN;

/// A bounded buffer that is filled with whole directory entries.
#[derive(Debug)]
pub struct DirBuffer<'a> {
    bytes: &'a mut Vec<u8>,
    limit: usize,
}

impl<'a> DirBuffer<'a> {
    /// A buffer that takes at most `limit` bytes, appended to `bytes`.
    pub fn new(bytes: &'a mut Vec<u8>, limit: usize) -> Self {
        let limit = bytes.len() + limit;
        Self { bytes, limit }
    }

    /// Whether a plain entry with a name of `name_len` bytes fits.
    pub fn fits(&self, name_len: usize) -> bool {
        self.has_room(PLAIN + name_len)
    }

    /// Whether an entry with attributes and a name of `name_len` bytes fits.
    pub fn fits_plus(&self, name_len: usize) -> bool {
        self.has_room(PLUS + name_len)
    }

    /// Appends a plain entry; false when it does not fit. `next` is the offset *after* the entry,
    /// `kind` a `DT_*` value.
    pub fn push(&mut self, name: &[u8], ino: u64, next: u64, kind: u32) -> bool {
        if !self.fits(name.len()) {
            return false;
        }
        self.append(name, ino, next, kind);
        true
    }

    /// Appends an entry with attributes; `None` means "attributes not known" (node id 0), which is
    /// also right for `.` and `..`: the DPU takes no reference then.
    pub fn push_plus(&mut self, name: &[u8], ino: u64, next: u64, kind: u32, entry: Option<&Entry>) -> bool {
        if !self.fits_plus(name.len()) {
            return false;
        }
        let entry = entry.map(reply::entry_out).unwrap_or_default();
        self.bytes.extend_from_slice(entry.as_bytes());
        self.append(name, ino, next, kind);
        true
    }

    fn has_room(&self, len: usize) -> bool {
        self.bytes.len() + len.next_multiple_of(8) <= self.limit
    }

    /// The part both forms share. Both start on a multiple of 8, so the padding is the same.
    fn append(&mut self, name: &[u8], ino: u64, next: u64, kind: u32) {
        let dirent = Dirent { ino, off: next, namelen: name.len() as u32, kind };
        self.bytes.extend_from_slice(dirent.as_bytes());
        self.bytes.extend_from_slice(name);
        let padding = (PLAIN + name.len()).next_multiple_of(8) - (PLAIN + name.len());
        self.bytes.extend_from_slice(&[0; 8][..padding]);
    }
}
