//! One descriptor chain, taken from a ring and already checked against the memory table.
//!
//! The device-readable descriptors come first (request), the device-writable ones after (reply).
//! Every address was translated and bounds-checked once, when the chain was popped; from here on
//! only offsets into the two byte streams exist. The DPU can change the bytes at any time, so
//! whatever is to be checked is copied out first ([`Chain::copy_out`]) and used from the copy.

use std::sync::Arc;

use crate::memory::DpuMemory;

/// The chain ends before the bytes that were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("descriptor chain is too short")]
pub struct ShortChain;

/// A contiguous piece of DPU memory, translated and bounds-checked.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where this process sees the piece.
    pub(crate) addr: *mut u8,
    /// Bytes.
    pub(crate) len: usize,
    /// DPU physical address, for the dirty log.
    pub(crate) dpu_addr: u64,
}

/// One request of the DPU. Owned by exactly one thread at a time.
#[derive(Debug)]
pub struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Vec<Piece>,
    pub(crate) writable: Vec<Piece>,
    pub(crate) readable_len: usize,
    pub(crate) writable_len: usize,
    /// Keeps the mappings alive that the pieces point into.
    pub(crate) memory: Arc<DpuMemory>,
}

// SAFETY: the pieces point into mappings that `memory` keeps alive, and the memory behind them is
// shared with the DPU anyway: it is only ever accessed through raw copies and system calls.
unsafe impl Send for Chain {}

/// Reusable storage for [`Slices`], so that the hot path does not allocate.
#[derive(Debug, Default)]
pub struct SliceBuf(pub(crate) Vec<libc::iovec>);

// SAFETY: the vector is emptied and refilled before each use; its stale pointers are never read.
unsafe impl Send for SliceBuf {}

/// A byte range of a chain as iovecs, for `preadv`, `pwritev` and the like.
#[derive(Clone, Copy, Debug)]
pub struct Slices<'a> {
    pub(crate) iovecs: &'a [libc::iovec],
    pub(crate) len: usize,
}

impl<'a> Slices<'a> {
    /// Total bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the range is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The iovecs. Each points into DPU memory that stays mapped for `'a`.
    pub fn as_iovecs(&self) -> &'a [libc::iovec] {
        self.iovecs
    }
}

impl Chain {
    /// Bytes the device may read (the request).
    pub fn readable_len(&self) -> usize {
        self.readable_len
    }

    /// Bytes the device may write (room for the reply).
    pub fn writable_len(&self) -> usize {
        self.writable_len
    }

    /// Copies `buf.len()` request bytes from `offset` on.
    ///
    /// # Errors
    /// [`ShortChain`] when the request ends before; `buf` is then unchanged.
    pub fn copy_out(&self, _offset: usize, _buf: &mut [u8]) -> Result<(), ShortChain> {
        Err(ShortChain)
    }

    /// Copies `bytes` into the reply at `offset`.
    ///
    /// # Errors
    /// [`ShortChain`] when the reply area ends before; nothing is written then.
    pub fn copy_in(&mut self, _offset: usize, _bytes: &[u8]) -> Result<(), ShortChain> {
        Err(ShortChain)
    }

    /// Request bytes `offset..offset + len` as iovecs.
    ///
    /// # Errors
    /// [`ShortChain`] when the request ends before.
    pub fn readable_slices<'a>(
        &'a self,
        _offset: usize,
        _len: usize,
        _buf: &'a mut SliceBuf,
    ) -> Result<Slices<'a>, ShortChain> {
        Err(ShortChain)
    }

    /// Reply bytes `offset..offset + len` as iovecs.
    ///
    /// # Errors
    /// [`ShortChain`] when the reply area ends before.
    pub fn writable_slices<'a>(
        &'a self,
        _offset: usize,
        _len: usize,
        _buf: &'a mut SliceBuf,
    ) -> Result<Slices<'a>, ShortChain> {
        Err(ShortChain)
    }
}
