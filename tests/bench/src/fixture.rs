//! The shared directory: on tmpfs, with content that can be checked from any offset.
//!
//! Every 8 bytes of the data file hold a number made of their own position, so that a reader knows what a block must
//! be without keeping a copy.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use tempfile::TempDir;

/// Size of the files that are read and written.
pub const DATA_SIZE: u64 = 64 << 20;
/// Small files for metadata requests.
pub const SMALL_FILES: usize = 16;
/// Entries of the directory that is listed.
pub const LISTED: usize = 1_000;
/// Directory that is listed.
pub const LISTED_DIR: &str = "listed";
/// File that is read.
pub const DATA: &str = "data";

/// The directory; removed on drop.
#[derive(Debug)]
pub struct Fixture {
    dir: TempDir,
}

/// Start of the directory's name, before the process id.
const PREFIX: &str = "bench-fs-";

/// Removes directories whose process is gone. What cannot be removed is not ours to complain about.
fn remove_leftovers() {
    let Ok(entries) = std::fs::read_dir("/dev/shm") else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// The 8 bytes at position `word` of the data file.
pub fn word_at(word: u64) -> u64 {
    (word ^ 0x5DEE_CE66).wrapping_mul(0xD134_2543_DE82_EF95)
}

/// Name of a small file.
pub fn small_name(index: usize) -> String {
    format!("file-{index:02}")
}

/// Size of a small file.
pub fn small_size(index: usize) -> u64 {
    100 + index as u64
}

/// Name of a listed file.
pub fn listed_name(index: usize) -> String {
    format!("entry-{index:04}.dat")
}

impl Fixture {
    /// Fills a fresh directory in /dev/shm, after removing those of runs that were killed.
    pub fn new() -> anyhow::Result<Self> {
        remove_leftovers();
        let dir = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .tempdir_in("/dev/shm")
            .context("cannot make a directory in /dev/shm")?;
        let fixture = Fixture { dir };
        fixture.fill().context("cannot fill the shared directory; /dev/shm needs 512 MiB free")?;
        Ok(fixture)
    }

    fn fill(&self) -> anyhow::Result<()> {
        let mut data = BufWriter::with_capacity(1 << 20, File::create(self.path().join(DATA))?);
        for word in 0..DATA_SIZE / 8 {
            data.write_all(&word_at(word).to_le_bytes())?;
        }
        data.flush()?;
        for index in 0..SMALL_FILES {
            std::fs::write(self.path().join(small_name(index)), vec![b'x'; small_size(index) as usize])?;
        }
        let listed = self.path().join(LISTED_DIR);
        std::fs::create_dir(&listed)?;
        for index in 0..LISTED {
            std::fs::write(listed.join(listed_name(index)), b"")?;
        }
        Ok(())
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A file of [`DATA_SIZE`] bytes for one contender to write.
    pub fn scratch(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.path().join(name);
        let file = File::create(&path)?;
        let zeros = vec![0; 1 << 20];
        for piece in 0..DATA_SIZE >> 20 {
            file.write_all_at(&zeros, piece << 20)?; // Allocated, so that no round pays for first touches.
        }
        Ok(path)
    }
}

/// Fails unless `bytes` are what the data file holds at `offset` (a multiple of 8).
pub fn check_data(bytes: &[u8], offset: u64) -> anyhow::Result<()> {
    for (index, word) in bytes.chunks_exact(8).enumerate() {
        let want = word_at(offset / 8 + index as u64).to_le_bytes();
        ensure!(
            word == want,
            "wrong data at offset {}: {word:02x?}, want {want:02x?}",
            offset + 8 * index as u64
        );
    }
    Ok(())
}
