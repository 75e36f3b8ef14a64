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

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use zerocopy::FromBytes;

    use super::*;

    #[test]
    fn names_are_padded_with_nuls_to_eight_bytes() {
        let mut bytes = vec![0xff; 16];
        let mut buffer = DirBuffer::new(&mut bytes, 1000);
        assert!(buffer.push(b"12345678", 1, 2, 8));
        assert!(buffer.push(b"123456789", 3, 4, 4));
        assert_eq!(bytes.len(), 16 + 32 + 40);
        assert_eq!(bytes[72..], [b"123456789", &[0; 7][..]].concat());
        assert_eq!(bytes[..16], [0xff; 16]);
    }

    #[test]
    fn a_full_buffer_takes_nothing_more_and_stays_as_it_is() {
        let mut bytes = Vec::new();
        let mut buffer = DirBuffer::new(&mut bytes, 63);
        assert!(buffer.fits(8) && buffer.push(b"a", 1, 1, 8));
        assert!(!buffer.fits(1) && !buffer.push(b"b", 2, 2, 8));
        assert!(!buffer.fits_plus(1) && !buffer.push_plus(b"b", 2, 2, 8, None));
        assert_eq!(bytes.len(), 32);
    }

    /// Reads a buffer as `parse_dirfile` of the kernel's `fs/fuse/readdir.c` does.
    fn read_back(mut bytes: &[u8], plus: bool) -> Vec<(Vec<u8>, u64, u64)> {
        let mut entries = Vec::new();
        while !bytes.is_empty() {
            let before = if plus { size_of::<EntryOut>() } else { 0 };
            let (dirent, rest) = Dirent::read_from_prefix(&bytes[before..]).unwrap();
            let name = rest[..dirent.namelen as usize].to_vec();
            entries.push((name, dirent.ino, dirent.off));
            bytes = &bytes[(before + 24 + dirent.namelen as usize).next_multiple_of(8)..];
        }
        entries
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

        #[test]
        fn whole_entries_come_back_and_the_limit_holds(
            names in vec(vec(1..=255_u8, 1..=255), 0..40),
            limit in 0..8192_usize,
            plus: bool,
        ) {
            let mut bytes = Vec::new();
            let mut buffer = DirBuffer::new(&mut bytes, limit);
            let mut taken = Vec::new();
            for (index, name) in names.iter().enumerate() {
                let (ino, next) = (index as u64 + 2, index as u64 + 1);
                let fits = if plus { buffer.fits_plus(name.len()) } else { buffer.fits(name.len()) };
                let pushed = if plus {
                    buffer.push_plus(name, ino, next, 8, None)
                } else {
                    buffer.push(name, ino, next, 8)
                };
                prop_assert_eq!(fits, pushed);
                if !pushed {
                    break;
                }
                taken.push((name.clone(), ino, next));
            }
            prop_assert!(bytes.len() <= limit);
            prop_assert_eq!(read_back(&bytes, plus), taken);
        }
    }
}
