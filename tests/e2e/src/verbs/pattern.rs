//! Files whose content is a function of a seed and the offset: any block can be checked without the others, and a
//! block at the wrong place, a stale one or a torn one shows.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use super::{Tried, print};

/// Alignment of buffers, sizes and offsets for direct I/O.
const DIRECT_ALIGNMENT: usize = 4096;

/// What to do with a pattern.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Write the pattern.
    Write(Pattern),
    /// Read the file and compare.
    Check(Pattern),
}

/// A pattern and how to go over it.
#[derive(Clone, Debug, Args)]
pub struct Pattern {
    /// The file.
    #[arg(long)]
    file: PathBuf,
    /// Its size in bytes; a multiple of the block size.
    #[arg(long)]
    size: u64,
    /// Bytes per read or write.
    #[arg(long, default_value_t = 1 << 20)]
    block: usize,
    /// Decides the content.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Go over the blocks in a random order (the same for the same seed).
    #[arg(long)]
    random: bool,
    /// Use direct I/O.
    #[arg(long)]
    direct: bool,
}

/// What was moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moved {
    /// Bytes.
    pub bytes: u64,
    /// Time taken, flush included.
    pub microseconds: u64,
}

impl Moved {
    /// Mega-bytes (10^6) per second.
    #[must_use]
    pub fn megabytes_per_second(&self) -> u64 {
        self.bytes / self.microseconds.max(1)
    }
}

impl Verb {
    /// Does it and prints a [`Moved`].
    ///
    /// # Errors
    /// When a read or write fails, or the content differs.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Write(pattern) => print(&pattern.write()?),
            Self::Check(pattern) => print(&pattern.check()?),
        }
    }
}

impl Pattern {
    fn write(&self) -> Result<Moved> {
        let file = self.open(OpenOptions::new().write(true).create(true))?;
        let mut buffer = Aligned::new(self.block);
        let blocks = self.blocks()?;
        let start = Instant::now();
        for block in blocks {
            let offset = block * self.block as u64;
            fill(buffer.bytes(), self.seed, offset);
            file.write_all_at(buffer.bytes(), offset).tried("write")?;
        }
        file.sync_all().tried("fsync")?;
        Ok(self.moved(start))
    }

    fn check(&self) -> Result<Moved> {
        let file = self.open(OpenOptions::new().read(true))?;
        let size = file.metadata().tried("stat")?.len();
        if size != self.size {
            bail!("the file has {size} bytes in place of {}", self.size);
        }
        let mut buffer = Aligned::new(self.block);
        let mut expected = vec![0; self.block];
        let blocks = self.blocks()?;
        let start = Instant::now();
        for block in blocks {
            let offset = block * self.block as u64;
            file.read_exact_at(buffer.bytes(), offset).tried("read")?;
            fill(&mut expected, self.seed, offset);
            let found = buffer.bytes();
            if *found != expected[..] {
                let wrong = found.iter().zip(&expected).position(|(a, b)| a != b).unwrap_or_default();
                bail!("wrong content at offset {}", offset + wrong as u64);
            }
        }
        Ok(self.moved(start))
    }

    fn open(&self, options: &mut OpenOptions) -> Result<File> {
        if self.direct {
            options.custom_flags(libc::O_DIRECT);
        }
        options.open(&self.file).tried("open")
    }

    fn moved(&self, start: Instant) -> Moved {
        let elapsed = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        Moved { bytes: self.size, microseconds: elapsed }
    }

    /// The numbers of the blocks in the order of going over them.
    fn blocks(&self) -> Result<Vec<u64>> {
        if self.block == 0 || !self.block.is_multiple_of(8) || !self.size.is_multiple_of(self.block as u64) {
            bail!("the size must be a multiple of the block size, and that of 8");
        }
        if self.direct && !self.block.is_multiple_of(DIRECT_ALIGNMENT) {
            bail!("direct I/O needs blocks of a multiple of {DIRECT_ALIGNMENT} bytes");
        }
        let mut blocks: Vec<u64> = (0..self.size / self.block as u64).collect();
        if self.random {
            let mut state = self.seed;
            for last in (1..blocks.len()).rev() {
                state = mix(state);
                // The remainder is below the length, which is a usize.
                blocks.swap(last, (state % (last as u64 + 1)) as usize);
            }
        }
        Ok(blocks)
    }
}

/// The output function of SplitMix64 (Steele, Lea, Flood, 2014) on a counter.
fn mix(counter: u64) -> u64 {
    let mut value = counter.wrapping_add(0x9e37_79b9_7f4a_7c15);
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Fills a buffer with what belongs at `offset` (a multiple of 8).
fn fill(buffer: &mut [u8], seed: u64, offset: u64) {
    let base = mix(seed);
    for (index, word) in buffer.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&mix(base ^ (offset / 8 + index as u64)).to_le_bytes());
    }
}

/// A buffer that starts at an address fit for direct I/O.
struct Aligned {
    storage: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    fn new(len: usize) -> Self {
        let storage = vec![0; len + DIRECT_ALIGNMENT];
        let start = storage.as_ptr().align_offset(DIRECT_ALIGNMENT);
        Self { storage, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(file: PathBuf, random: bool) -> Pattern {
        Pattern { file, size: 64 << 10, block: 4096, seed: 3, random, direct: false }
    }

    #[test]
    fn the_order_of_writing_does_not_matter_but_the_place_does() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("f");
        pattern(file.clone(), true).write().unwrap();
        pattern(file.clone(), false).check().unwrap();
        let handle = OpenOptions::new().write(true).open(&file).unwrap();
        let mut block = vec![0; 4096];
        fill(&mut block, 3, 0);
        handle.write_all_at(&block, 8192).unwrap();
        let error = pattern(file.clone(), false).check().unwrap_err().to_string();
        assert!(error.contains("offset 8192"), "{error}");
        handle.set_len(1).unwrap();
        assert!(pattern(file, false).check().is_err());
    }

    #[test]
    fn a_random_order_visits_every_block_once() {
        let mut blocks = pattern(PathBuf::new(), true).blocks().unwrap();
        assert!(!blocks.is_sorted());
        blocks.sort_unstable();
        assert_eq!(blocks, (0..16).collect::<Vec<_>>());
    }
}
