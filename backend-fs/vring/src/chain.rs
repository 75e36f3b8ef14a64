//! One descriptor chain, taken from a ring and already checked against the memory table.
//!
//! The device-readable descriptors come first (request), the device-writable ones after (reply).
//! Every address was translated and bounds-checked once, when the chain was popped; from here on
//! only offsets into the two byte streams exist. The DPU can change the bytes at any time, so
//! whatever is to be checked is copied out first ([`Chain::copy_out`]) and used from the copy.
//!
//! A chain goes back to the DPU by [`crate::ring::Ring::push_used`]. One that is dropped instead
//! (a panic in the code that served it) leaves its head in the ring's [`Abandoned`] list, and the
//! ring returns it with length 0: no descriptor of the DPU is ever lost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::memory::{DpuMemory, NotShared};

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

/// Heads of chains that were dropped without being completed. One list per ring.
#[derive(Debug, Default)]
pub(crate) struct Abandoned {
    any: AtomicBool,
    /// Head and number of pieces.
    heads: Mutex<Vec<(u16, usize)>>,
}

impl Abandoned {
    fn add(&self, head: u16, pieces: usize) {
        self.heads.lock().unwrap_or_else(PoisonError::into_inner).push((head, pieces));
        self.any.store(true, Ordering::Release);
    }

    /// Takes the heads; nearly always there are none, which costs one load.
    #[inline]
    pub(crate) fn take(&self) -> Vec<(u16, usize)> {
        if !self.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut heads = self.heads.lock().unwrap_or_else(PoisonError::into_inner);
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut heads)
    }
}

/// One request of the DPU. Owned by exactly one thread at a time.
#[derive(Debug)]
pub struct Chain {
    pub(crate) head: u16,
    pub(crate) readable: Stream,
    pub(crate) writable: Stream,
    /// Keeps the mappings alive that the pieces point into.
    pub(crate) memory: Arc<DpuMemory>,
    /// The ring that waits for this chain; `None` for a chain made by hand.
    pub(crate) ring: Option<Arc<Abandoned>>,
    /// The head is in flight: the ring must get it back.
    pub(crate) owed: bool,
}

// SAFETY: the pieces point into mappings that `memory` keeps alive, and the memory behind them is
// shared with the DPU anyway: it is only ever accessed through raw copies and system calls.
unsafe impl Send for Chain {}

/// Reusable storage for [`Slices`], so that the hot path does not allocate.
#[derive(Debug, Default)]
pub struct SliceBuf(Vec<libc::iovec>);

// SAFETY: the vector is emptied and refilled before each use; its stale pointers are never read.
unsafe impl Send for SliceBuf {}

/// A byte range of a chain as iovecs, for `preadv`, `pwritev` and the like.
///
/// There may be more than `IOV_MAX` (1024) of them; a DPU decides into how many descriptors it cuts
/// its memory.
#[derive(Clone, Copy, Debug)]
pub struct Slices<'a> {
    iovecs: &'a [libc::iovec],
    len: usize,
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

/// One direction of a chain: a byte stream cut into pieces.
#[derive(Debug, Default)]
pub(crate) struct Stream {
    pub(crate) pieces: Vec<Piece>,
    pub(crate) len: usize,
}

impl Stream {
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.len = 0;
    }

    /// Appends a piece; memory that continues the last piece makes that one longer.
    #[inline]
    pub(crate) fn push(&mut self, piece: Piece) {
        self.len += piece.len;
        if let Some(last) = self.pieces.last_mut()
            && last.addr.wrapping_add(last.len) == piece.addr
            && last.dpu_addr.wrapping_add(last.len as u64) == piece.dpu_addr
        {
            last.len += piece.len;
            return;
        }
        self.pieces.push(piece);
    }

    /// Calls `visit(address, done, count)` for each contiguous part of `offset..offset + len`.
    #[inline]
    fn for_each(
        &self,
        offset: usize,
        len: usize,
        mut visit: impl FnMut(*mut u8, usize, usize),
    ) -> Result<(), ShortChain> {
        if offset > self.len || len > self.len - offset {
            return Err(ShortChain);
        }
        let (mut skip, mut done) = (offset, 0);
        for piece in &self.pieces {
            if done == len {
                break;
            }
            if skip >= piece.len {
                skip -= piece.len;
                continue;
            }
            let count = (piece.len - skip).min(len - done);
            // `skip < piece.len`, so the address stays inside the piece.
            visit(piece.addr.wrapping_add(skip), done, count);
            done += count;
            skip = 0;
        }
        Ok(())
    }

    fn slices<'a>(&self, offset: usize, len: usize, buf: &'a mut SliceBuf) -> Result<Slices<'a>, ShortChain> {
        let iovecs = &mut buf.0;
        iovecs.clear();
        self.for_each(offset, len, |addr, _, count| {
            iovecs.push(libc::iovec { iov_base: addr.cast(), iov_len: count });
        })?;
        Ok(Slices { iovecs, len })
    }
}

impl Chain {
    /// An empty chain to be filled by a ring.
    pub(crate) fn new(memory: Arc<DpuMemory>, ring: Option<Arc<Abandoned>>) -> Chain {
        let stream = Stream::default;
        Chain { head: 0, readable: stream(), writable: stream(), memory, ring, owed: false }
    }

    /// A chain over the given DPU address ranges that belongs to no ring; for tests of code that
    /// serves chains.
    ///
    /// # Errors
    /// [`NotShared`] when a range lies outside of `memory`.
    pub fn for_memory(
        memory: &Arc<DpuMemory>,
        readable: &[(u64, usize)],
        writable: &[(u64, usize)],
    ) -> Result<Chain, NotShared> {
        let mut chain = Chain::new(Arc::clone(memory), None);
        let mut hint = 0;
        for &(addr, len) in readable {
            memory.translate(addr, len as u64, &mut hint, |piece| chain.readable.push(piece))?;
        }
        for &(addr, len) in writable {
            memory.translate(addr, len as u64, &mut hint, |piece| chain.writable.push(piece))?;
        }
        Ok(chain)
    }

    /// Bytes the device may read (the request).
    pub fn readable_len(&self) -> usize {
        self.readable.len
    }

    /// Bytes the device may write (room for the reply).
    pub fn writable_len(&self) -> usize {
        self.writable.len
    }

    /// Copies `buf.len()` request bytes from `offset` on.
    ///
    /// # Errors
    /// [`ShortChain`] when the request ends before; `buf` is then unchanged.
    #[inline]
    pub fn copy_out(&self, offset: usize, buf: &mut [u8]) -> Result<(), ShortChain> {
        self.readable.for_each(offset, buf.len(), |addr, done, count| {
            // SAFETY: `addr..addr + count` lies inside a mapped piece, `done + count <= buf.len()`,
            // and a buffer of this process never overlaps a mapping of DPU memory. The DPU may change
            // the bytes meanwhile; any value is a valid `u8`.
            unsafe { std::ptr::copy_nonoverlapping(addr, buf.as_mut_ptr().add(done), count) };
        })
    }

    /// Copies `bytes` into the reply at `offset`.
    ///
    /// # Errors
    /// [`ShortChain`] when the reply area ends before; nothing is written then.
    #[inline]
    pub fn copy_in(&mut self, offset: usize, bytes: &[u8]) -> Result<(), ShortChain> {
        self.writable.for_each(offset, bytes.len(), |addr, done, count| {
            // SAFETY: as in `copy_out`; the piece is writable, mappings are made so.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(done), addr, count) };
        })
    }

    /// Request bytes `offset..offset + len` as iovecs.
    ///
    /// # Errors
    /// [`ShortChain`] when the request ends before.
    pub fn readable_slices<'a>(
        &'a self,
        offset: usize,
        len: usize,
        buf: &'a mut SliceBuf,
    ) -> Result<Slices<'a>, ShortChain> {
        self.readable.slices(offset, len, buf)
    }

    /// Reply bytes `offset..offset + len` as iovecs.
    ///
    /// # Errors
    /// [`ShortChain`] when the reply area ends before.
    pub fn writable_slices<'a>(
        &'a self,
        offset: usize,
        len: usize,
        buf: &'a mut SliceBuf,
    ) -> Result<Slices<'a>, ShortChain> {
        self.writable.slices(offset, len, buf)
    }

    pub(crate) fn pieces(&self) -> usize {
        self.readable.pieces.len() + self.writable.pieces.len()
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if self.owed
            && let Some(ring) = &self.ring
        {
            ring.add(self.head, self.pieces());
        }
    }
}

#[cfg(test)]
mod tests;
