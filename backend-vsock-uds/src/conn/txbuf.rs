//! Bytes of the DPU that the host socket has not taken yet: a ring that grows on demand up to the
//! window that was advertised, and gives its memory back when it is empty.
//!
//! Most bytes never come here: what the host socket takes at once goes straight from DPU memory.
//! Records (SEQPACKET) are kept apart by their ends.
#![forbid(unsafe_code)]

use std::collections::VecDeque;

/// Capacity kept by an empty buffer, so that a channel that is often nearly empty does not allocate
/// again and again. Bytes.
const KEPT: usize = 4096;

/// End of a record in the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordEnd {
    /// Bytes from the start of the buffer to the end of the record.
    pub at: usize,
    /// The record carried `MSG_EOR`.
    pub eor: bool,
}

/// The buffer.
#[derive(Debug, Default)]
pub struct TxBuf {
    bytes: VecDeque<u8>,
    ends: VecDeque<RecordEnd>,
}

impl TxBuf {
    /// Bytes in the buffer.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether the buffer holds no byte and no record.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.ends.is_empty()
    }

    /// Appends bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// Ends a record after the bytes so far.
    pub fn end_record(&mut self, eor: bool) {
        self.ends.push_back(RecordEnd { at: self.bytes.len(), eor });
    }

    /// The buffered bytes, in order, in at most two pieces.
    pub fn as_slices(&self) -> (&[u8], &[u8]) {
        self.bytes.as_slices()
    }

    /// The first complete record: its bytes (made contiguous) and whether it carried `MSG_EOR`.
    pub fn first_record(&mut self) -> Option<(&[u8], bool)> {
        let end = *self.ends.front()?;
        Some((&self.bytes.make_contiguous()[..end.at], end.eor))
    }

    /// Drops the first complete record and returns its length.
    pub fn pop_record(&mut self) -> usize {
        let Some(end) = self.ends.pop_front() else { return 0 };
        self.bytes.drain(..end.at);
        for later in &mut self.ends {
            later.at -= end.at;
        }
        self.release();
        end.at
    }

    /// Drops `count` bytes from the front.
    pub fn consume(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
        self.release();
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn release(&mut self) {
        if self.bytes.is_empty() && self.bytes.capacity() > KEPT {
            self.bytes = VecDeque::new();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn records_keep_their_bounds_and_marks() {
        let mut buffer = TxBuf::default();
        buffer.push(b"one");
        buffer.end_record(false);
        buffer.end_record(true);
        buffer.push(b"three");
        assert_eq!(buffer.first_record(), Some((&b"one"[..], false)));
        assert_eq!(buffer.pop_record(), 3);
        assert_eq!(buffer.first_record(), Some((&b""[..], true)), "an empty record is a record");
        assert_eq!(buffer.pop_record(), 0);
        assert_eq!(buffer.first_record(), None, "an unfinished record is not given out");
        buffer.end_record(false);
        assert_eq!(buffer.first_record(), Some((&b"three"[..], false)));
    }

    #[test]
    fn an_emptied_buffer_gives_its_memory_back() {
        let mut buffer = TxBuf::default();
        buffer.push(&[7; 100_000]);
        buffer.consume(100_000);
        assert!(buffer.bytes.capacity() <= KEPT);
    }

    proptest! {
        #[test]
        fn bytes_come_out_as_they_went_in(steps in proptest::collection::vec((proptest::collection::vec(any::<u8>(), 0..50), 0usize..60), 0..60)) {
            let mut buffer = TxBuf::default();
            let (mut written, mut read) = (Vec::new(), Vec::new());
            for (push, take) in steps {
                buffer.push(&push);
                written.extend_from_slice(&push);
                let (first, second) = buffer.as_slices();
                let taken: Vec<u8> = first.iter().chain(second).copied().take(take).collect();
                buffer.consume(taken.len());
                read.extend(taken);
            }
            let (first, second) = buffer.as_slices();
            read.extend(first.iter().chain(second));
            prop_assert_eq!(read, written);
        }
    }
}
