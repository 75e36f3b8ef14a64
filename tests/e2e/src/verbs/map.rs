//! Memory mappings of files.

use std::fs::OpenOptions;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use super::Tried;
use crate::sys::{Mapping, Sharing};

/// What to do with a mapping.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Store text through a shared mapping and write it back.
    Store(Place),
    /// Store text through a private mapping; the file must keep what it has.
    StorePrivate(Place),
    /// Load text through a shared mapping and compare.
    Load(Place),
}

/// A text in a mapped file.
#[derive(Clone, Debug, Args)]
pub struct Place {
    /// The file.
    #[arg(long)]
    file: PathBuf,
    /// Where in the file.
    #[arg(long, default_value_t = 0)]
    offset: usize,
    /// The text.
    #[arg(long)]
    text: String,
}

impl Verb {
    /// Does it.
    ///
    /// # Errors
    /// When the mapping is refused or the text differs.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Store(place) => {
                let mut mapping = place.map(Sharing::Shared)?;
                place.store(&mut mapping)?;
                mapping.sync().tried("msync")
            }
            Self::StorePrivate(place) => {
                let mut mapping = place.map(Sharing::Private)?;
                place.store(&mut mapping)?;
                place.compare(&mapping)
            }
            Self::Load(place) => place.compare(&place.map(Sharing::Shared)?),
        }
    }
}

impl Place {
    fn map(&self, sharing: Sharing) -> Result<Mapping> {
        let file = OpenOptions::new().read(true).write(true).open(&self.file).tried("open")?;
        let len = file.metadata().tried("stat")?.len();
        let len = usize::try_from(len).context("the file is too large to map")?;
        Mapping::new(&file, len, sharing).tried("mmap")
    }

    fn store(&self, mapping: &mut Mapping) -> Result<()> {
        if mapping.store(self.offset, self.text.as_bytes()) {
            Ok(())
        } else {
            bail!("the text is outside of the file")
        }
    }

    fn compare(&self, mapping: &Mapping) -> Result<()> {
        let found = mapping.load(self.offset, self.text.len()).context("the text is outside of the file")?;
        if found == self.text.as_bytes() {
            return Ok(());
        }
        bail!("the mapping shows {:?} in place of {:?}", String::from_utf8_lossy(&found), self.text)
    }
}
