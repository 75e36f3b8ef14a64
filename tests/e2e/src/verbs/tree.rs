//! Trees of many small files, each holding its own name.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

use super::{Tried, print};

/// What to do with a tree.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Make it.
    Make(Tree),
    /// Look at each name, the attributes and the content of each file, and that there is nothing else.
    Check(Tree),
    /// Look at each name and its attributes, but open no file.
    Walk(Tree),
}

/// A tree of `files` files, `per_directory` in each directory.
#[derive(Clone, Debug, Args)]
pub struct Tree {
    /// Its root; it must exist.
    #[arg(long)]
    root: PathBuf,
    /// Number of files.
    #[arg(long)]
    files: u32,
    /// Files per directory.
    #[arg(long, default_value_t = 1000)]
    per_directory: u32,
}

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Files.
    pub files: u32,
    /// Directories below the root.
    pub directories: u32,
    /// Time taken.
    pub milliseconds: u64,
}

impl Verb {
    /// Does it and prints a [`Seen`].
    ///
    /// # Errors
    /// When an operation fails or the tree is not what it must be.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Make(tree) => print(&tree.visit(|file, name| fs::write(file, name).tried("write"))?),
            Self::Check(tree) => {
                tree.check_names()?;
                print(&tree.visit(|file, name| {
                    let content = fs::read(file).tried("read")?;
                    if content != name.as_bytes() {
                        bail!("{} holds {:?}", file.display(), String::from_utf8_lossy(&content));
                    }
                    Ok(())
                })?)
            }
            Self::Walk(tree) => {
                tree.check_names()?;
                print(&tree.visit(|file, name| {
                    let size = fs::symlink_metadata(file).tried("stat")?.len();
                    if size != name.len() as u64 {
                        bail!("{} has {size} bytes", file.display());
                    }
                    Ok(())
                })?)
            }
        }
    }
}

impl Tree {
    /// Names of the files of one directory.
    fn names(&self, directory: u32) -> impl Iterator<Item = String> + use<> {
        let first = directory * self.per_directory;
        let last = self.files.min(first + self.per_directory);
        (first..last).map(|number| format!("file-{number:06}"))
    }

    fn directories(&self) -> u32 {
        self.files.div_ceil(self.per_directory.max(1))
    }

    fn directory(&self, number: u32) -> PathBuf {
        self.root.join(format!("directory-{number:04}"))
    }

    fn visit(&self, mut each: impl FnMut(&Path, &str) -> Result<()>) -> Result<Seen> {
        let start = Instant::now();
        let mut files = 0;
        for number in 0..self.directories() {
            let directory = self.directory(number);
            match fs::create_dir(&directory) {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(error).tried("mkdir");
                }
                _ => {}
            }
            for name in self.names(number) {
                each(&directory.join(&name), &name)?;
                files += 1;
            }
        }
        let milliseconds = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Seen { files, directories: self.directories(), milliseconds })
    }

    /// Lists every directory and compares with what must be there: nothing lost, nothing twice, nothing else.
    fn check_names(&self) -> Result<()> {
        let count = fs::read_dir(&self.root).tried("readdir")?.count();
        if count != self.directories() as usize {
            bail!("{} has {count} entries in place of {}", self.root.display(), self.directories());
        }
        for number in 0..self.directories() {
            let directory = self.directory(number);
            let mut missing: BTreeSet<String> = self.names(number).collect();
            for entry in fs::read_dir(&directory).tried("readdir")? {
                let name = entry.tried("readdir")?.file_name().to_string_lossy().into_owned();
                if !missing.remove(&name) {
                    bail!("{} lists {name} twice or out of place", directory.display());
                }
            }
            if let Some(name) = missing.first() {
                bail!("{} lacks {} names, {name} is the first", directory.display(), missing.len());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_a_foreign_and_a_changed_file_show() {
        let place = tempfile::tempdir().unwrap();
        let tree = Tree { root: place.path().to_owned(), files: 25, per_directory: 10 };
        Verb::Make(tree.clone()).perform().unwrap();
        Verb::Check(tree.clone()).perform().unwrap();
        let victim = place.path().join("directory-0002/file-000024");
        fs::write(&victim, "file-00002X").unwrap();
        Verb::Walk(tree.clone()).perform().unwrap();
        assert!(Verb::Check(tree.clone()).perform().is_err());
        fs::remove_file(&victim).unwrap();
        assert!(Verb::Walk(tree.clone()).perform().is_err());
        fs::write(&victim, "file-000024").unwrap();
        fs::write(place.path().join("directory-0000/more"), "").unwrap();
        assert!(Verb::Walk(tree).perform().is_err());
    }
}
