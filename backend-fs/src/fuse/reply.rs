//! Replies as bytes: values of the file system boundary to wire structures, header in front.
//!
//! A reply is built in a reused buffer and copied into DPU memory in one go. The header is filled
//! last, when the length is known.
#![forbid(unsafe_code)]

use std::time::Duration;

use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use super::abi::{Attr, AttrOut, EntryOut, OpenOut, OutHeader, Statx, StatxOut};
use crate::filesystem::{Entry, Opened};

/// Bytes of the header.
pub const HEADER: usize = size_of::<OutHeader>();

/// Header of a reply with `body` bytes after it.
#[inline]
pub fn header(unique: u64, body: usize) -> OutHeader {
    OutHeader { len: (HEADER + body) as u32, error: 0, unique }
}

/// A whole reply that carries only an error.
pub fn error(unique: u64, errno: Errno) -> OutHeader {
    OutHeader { len: HEADER as u32, error: -errno.raw_os_error(), unique }
}

/// A reply under construction in a reused buffer.
#[derive(Debug)]
pub struct ReplyBuffer {
    bytes: Vec<u8>,
}

impl Default for ReplyBuffer {
    fn default() -> Self {
        Self { bytes: Vec::with_capacity(HEADER + 4096) }
    }
}

impl ReplyBuffer {
    /// Starts a reply; the buffer then holds room for the header and nothing else.
    #[inline]
    pub fn start(&mut self) {
        self.bytes.clear();
        self.bytes.extend_from_slice(&[0; HEADER]);
    }

    /// Appends a structure.
    #[inline]
    pub fn push<T: IntoBytes + Immutable>(&mut self, value: &T) {
        self.bytes.extend_from_slice(value.as_bytes());
    }

    /// The buffer, for whoever appends bytes of its own: directory entries, attribute values.
    #[inline]
    pub fn body(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Bytes appended so far, the header not counted.
    #[inline]
    pub fn body_len(&self) -> usize {
        self.bytes.len().saturating_sub(HEADER)
    }

    /// Fills in the header and gives the whole reply.
    #[inline]
    pub fn finish(&mut self, unique: u64) -> &[u8] {
        let header = header(unique, self.body_len());
        if let Some(place) = self.bytes.first_chunk_mut::<HEADER>() {
            place.copy_from_slice(header.as_bytes());
        }
        &self.bytes
    }
}

/// A looked-up or created inode.
#[inline]
pub fn entry_out(entry: &Entry) -> EntryOut {
    EntryOut {
        nodeid: entry.node.0,
        generation: entry.generation,
        entry_valid: entry.entry_valid.as_secs(),
        attr_valid: entry.attr_valid.as_secs(),
        entry_valid_nsec: entry.entry_valid.subsec_nanos(),
        attr_valid_nsec: entry.attr_valid.subsec_nanos(),
        attr: entry.attr,
    }
}

/// Attributes and how long they may be cached.
#[inline]
pub fn attr_out((attr, valid): (Attr, Duration)) -> AttrOut {
    AttrOut { attr_valid: valid.as_secs(), attr_valid_nsec: valid.subsec_nanos(), dummy: 0, attr }
}

/// The same for `FUSE_STATX`.
pub fn statx_out((stat, valid): (Statx, Duration)) -> StatxOut {
    StatxOut {
        attr_valid: valid.as_secs(),
        attr_valid_nsec: valid.subsec_nanos(),
        flags: 0,
        spare: [0; 2],
        stat,
    }
}

/// An opened file or directory.
#[inline]
pub fn open_out(opened: Opened) -> OpenOut {
    OpenOut { fh: opened.handle.0, open_flags: opened.flags, backing_id: 0 }
}
