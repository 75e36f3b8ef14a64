//! Holes, allocation, and copying inside the file system.

use std::fs::{File, OpenOptions};
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Subcommand, ValueEnum};
use rustix::fs::{FallocateFlags, SeekFrom};

use super::{Tried, print};

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Allocate or free a range (`fallocate(2)`).
    Allocate {
        /// The way.
        #[arg(long)]
        how: How,
        /// First byte.
        #[arg(long)]
        offset: u64,
        /// Number of bytes.
        #[arg(long)]
        len: u64,
        /// The file.
        file: PathBuf,
    },
    /// Print the ranges that hold data: a list of start and end.
    Data {
        /// The file.
        file: PathBuf,
    },
    /// Copy a range to another file (`copy_file_range(2)`) and print the number of bytes.
    Copy {
        /// First byte in the source.
        #[arg(long)]
        from_offset: u64,
        /// First byte in the target.
        #[arg(long)]
        to_offset: u64,
        /// Number of bytes.
        #[arg(long)]
        len: u64,
        /// The source.
        from: PathBuf,
        /// The target; made if it does not exist.
        to: PathBuf,
    },
}

/// Ways to allocate.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum How {
    /// Allocate, and grow the file if needed.
    Extend,
    /// Allocate without growing the file.
    KeepSize,
    /// Make a hole.
    Punch,
    /// Make the range read as zeros.
    Zero,
}

impl Verb {
    /// Does it.
    ///
    /// # Errors
    /// When the operation is refused.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Allocate { how, offset, len, file } => {
                let file = OpenOptions::new().write(true).open(file).tried("open")?;
                let mode = match how {
                    How::Extend => FallocateFlags::empty(),
                    How::KeepSize => FallocateFlags::KEEP_SIZE,
                    How::Punch => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                    How::Zero => FallocateFlags::ZERO_RANGE,
                };
                rustix::fs::fallocate(&file, mode, *offset, *len).tried("fallocate")
            }
            Self::Data { file } => print(&data_ranges(&File::open(file).tried("open")?)?),
            Self::Copy { from_offset, to_offset, len, from, to } => {
                let from = File::open(from).tried("open")?;
                let to =
                    OpenOptions::new().write(true).create(true).truncate(false).open(to).tried("open")?;
                print(&copy(&from, *from_offset, &to, *to_offset, *len)?)
            }
        }
    }
}

fn data_ranges(file: &File) -> Result<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    let mut end = 0;
    loop {
        let start = match rustix::fs::seek(file, SeekFrom::Data(end)) {
            Ok(start) => start,
            // No data from here to the end.
            Err(rustix::io::Errno::NXIO) => return Ok(ranges),
            Err(error) => return Err(error).tried("lseek with SEEK_DATA"),
        };
        end = rustix::fs::seek(file, SeekFrom::Hole(start)).tried("lseek with SEEK_HOLE")?;
        ranges.push((start, end));
    }
}

fn copy(from: &File, mut from_offset: u64, to: &File, mut to_offset: u64, len: u64) -> Result<u64> {
    let mut left = usize::try_from(len)?;
    while left > 0 {
        let count = rustix::fs::copy_file_range(from, Some(&mut from_offset), to, Some(&mut to_offset), left)
            .tried("copy_file_range")?;
        if count == 0 {
            bail!("the source ended {left} bytes too early");
        }
        left -= count;
    }
    Ok(len)
}
