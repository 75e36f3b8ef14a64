//! READDIR and READDIRPLUS payloads (`struct fuse_dirent`, `struct fuse_direntplus`).

#![forbid(unsafe_code)]

use zerocopy::FromBytes;

use super::abi::{Dirent, EntryOut};
use crate::{Error, Result};

/// One directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// Inode number.
    pub ino: u64,
    /// Offset to continue behind this entry.
    pub offset: u64,
    /// `DT_*`.
    pub kind: u32,
    /// Name without NUL.
    pub name: Vec<u8>,
    /// Node and attributes, from READDIRPLUS.
    pub entry: Option<EntryOut>,
}

/// Splits a payload, strictly: every record must be whole, padded to 8 bytes, and named.
pub fn parse(payload: &[u8], plus: bool) -> Result<Vec<DirEntry>> {
    let problem = |at: usize, what: &str| Error::FuseProtocol {
        operation: if plus { "Readdirplus" } else { "Readdir" }.to_owned(),
        problem: format!("{what} at byte {at} of {}", payload.len()),
    };
    let mut entries = Vec::new();
    let mut rest = payload;
    while !rest.is_empty() {
        let at = payload.len() - rest.len();
        let mut record = rest;
        let entry = if plus {
            let (entry, tail) =
                EntryOut::read_from_prefix(record).map_err(|_| problem(at, "a cut fuse_entry_out"))?;
            record = tail;
            Some(entry)
        } else {
            None
        };
        let (dirent, tail) =
            Dirent::read_from_prefix(record).map_err(|_| problem(at, "a cut fuse_dirent"))?;
        let name = tail
            .get(..dirent.namelen as usize)
            .ok_or_else(|| problem(at, "a name longer than the payload"))?;
        if name.is_empty() || name.contains(&0) || (name.contains(&b'/')) {
            return Err(problem(at, "an impossible name"));
        }
        let head = size_of::<Dirent>() + entry.map_or(0, |_| size_of::<EntryOut>());
        let size = (head + name.len()).next_multiple_of(8);
        rest = rest.get(size..).ok_or_else(|| problem(at, "missing padding"))?;
        entries.push(DirEntry {
            ino: dirent.ino,
            offset: dirent.off,
            kind: dirent.kind,
            name: name.to_vec(),
            entry,
        });
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::IntoBytes;

    fn record(name: &[u8], offset: u64) -> Vec<u8> {
        let mut bytes =
            Dirent { ino: 7, off: offset, namelen: name.len() as u32, kind: 8 }.as_bytes().to_vec();
        bytes.extend_from_slice(name);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    #[test]
    fn entries_are_split_at_padded_boundaries() {
        let payload = [record(b"a", 1), record(b"longer-name", 2)].concat();
        let entries = parse(&payload, false).unwrap();
        let names: Vec<_> = entries.iter().map(|entry| entry.name.as_slice()).collect();
        assert_eq!(names, [b"a".as_slice(), b"longer-name"]);
        assert_eq!(entries[1].offset, 2);
    }

    #[test]
    fn a_cut_record_is_refused() {
        let payload = record(b"name", 1);
        assert!(parse(&payload[..payload.len() - 1], false).is_err());
        assert!(parse(&payload[..20], false).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_either_refused_or_accounted_for(payload: Vec<u8>, plus: bool) {
            if let Ok(entries) = parse(&payload, plus) {
                prop_assert!(entries.iter().map(|entry| entry.name.len() + 24).sum::<usize>() <= payload.len());
            }
        }
    }
}
