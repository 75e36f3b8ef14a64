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

/// Set in a record's length when it carried `MSG_EOR`. Windows are far below 2 GiB.
const EOR: u32 = 1 << 31;

/// The buffer.
#[derive(Debug, Default)]
pub struct TxBuf {
    bytes: VecDeque<u8>,
    /// Lengths of the complete records, with [`EOR`]. Four bytes each, because a DPU may send a window
    /// full of records of one byte.
    records: VecDeque<u32>,
    /// Bytes at the end that belong to a record that is not complete.
    partial: usize,
}

impl TxBuf {
    /// Bytes in the buffer.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether the buffer holds no byte and no record.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.records.is_empty()
    }

    /// Complete records.
    pub fn records(&self) -> usize {
        self.records.len()
    }

    /// Bytes of a record whose end has not come.
    pub fn partial_len(&self) -> usize {
        self.partial
    }

    /// Appends `len` bytes that `fill` writes, called with the offset and the place of each piece.
    pub fn append(&mut self, len: usize, mut fill: impl FnMut(usize, &mut [u8])) {
        let start = self.bytes.len();
        self.bytes.resize(start + len, 0);
        self.partial += len;
        let (first, second) = self.bytes.as_mut_slices();
        let split = first.len();
        if start < split {
            fill(0, &mut first[start..]);
            fill(split - start, second);
        } else {
            fill(0, &mut second[start - split..]);
        }
    }

    /// Appends bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.append(bytes.len(), |offset, place| place.copy_from_slice(&bytes[offset..offset + place.len()]));
    }

    /// Ends a record after the bytes so far.
    pub fn end_record(&mut self, eor: bool) {
        let len = std::mem::take(&mut self.partial) as u32;
        self.records.push_back(if eor { len | EOR } else { len });
    }

    /// The buffered bytes, in order, in at most two pieces.
    pub fn as_slices(&self) -> (&[u8], &[u8]) {
        self.bytes.as_slices()
    }

    /// The first complete record: its bytes (made contiguous) and whether it carried `MSG_EOR`.
    pub fn first_record(&mut self) -> Option<(&[u8], bool)> {
        let record = *self.records.front()?;
        Some((&self.bytes.make_contiguous()[..(record & !EOR) as usize], record & EOR != 0))
    }

    /// Drops the first complete record and returns its length.
    pub fn pop_record(&mut self) -> usize {
        let Some(record) = self.records.pop_front() else { return 0 };
        let len = (record & !EOR) as usize;
        self.bytes.drain(..len);
        self.release();
        len
    }

    /// Drops `count` bytes from the front of a buffer without records.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.bytes.len());
        self.bytes.drain(..count);
        self.partial -= count;
        self.release();
    }

    /// Drops the bytes of a record whose end will never come, and returns how many.
    pub fn drop_partial(&mut self) -> usize {
        let dropped = std::mem::take(&mut self.partial);
        self.bytes.truncate(self.bytes.len() - dropped);
        self.release();
        dropped
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn release(&mut self) {
        if self.bytes.is_empty() && self.bytes.capacity() > KEPT {
            self.bytes = VecDeque::new();
        }
        if self.records.is_empty() && self.records.capacity() > KEPT / size_of::<u32>() {
            self.records = VecDeque::new();
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
        assert_eq!((buffer.records(), buffer.partial_len()), (0, 5));
        buffer.end_record(false);
        assert_eq!(buffer.first_record(), Some((&b"three"[..], false)));
    }

    #[test]
    fn a_record_without_its_end_can_be_dropped() {
        let mut buffer = TxBuf::default();
        buffer.push(b"whole");
        buffer.end_record(false);
        buffer.push(b"half");
        assert_eq!(buffer.drop_partial(), 4);
        assert_eq!(buffer.first_record(), Some((&b"whole"[..], false)));
        assert_eq!(buffer.pop_record(), 5);
        assert!(buffer.is_empty());
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
