//! Directory entries as FUSE carries them (`struct fuse_dirent`, `struct fuse_direntplus`).

use crate::filesystem::Entry;

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
        self.bytes.len() + (24 + name_len).next_multiple_of(8) <= self.limit
    }

    /// Whether an entry with attributes and a name of `name_len` bytes fits.
    pub fn fits_plus(&self, name_len: usize) -> bool {
        self.bytes.len() + (128 + 24 + name_len).next_multiple_of(8) <= self.limit
    }

    /// Appends a plain entry; false when it does not fit. `next` is the offset *after* the entry.
    pub fn push(&mut self, _name: &[u8], _ino: u64, _next: u64, _kind: u32) -> bool {
        false
    }

    /// Appends an entry with attributes; `None` means "attributes not known" (node id 0).
    pub fn push_plus(
        &mut self,
        _name: &[u8],
        _ino: u64,
        _next: u64,
        _kind: u32,
        _entry: Option<&Entry>,
    ) -> bool {
        false
    }
}
