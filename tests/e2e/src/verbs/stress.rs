//! Random operations on a tree, with a model of what must come out.
//!
//! The sequence follows from a seed alone: every operation is chosen so that it must succeed, and the model tells
//! its result. So the side that works and the side that only looks compute the same model, and each compares the
//! tree with it: names, kinds, links, targets, attributes, and every byte of content.
//!
//! A second form (`chaos`) lets any number of processes, on both sides, work on the same few names: nothing can be
//! foretold then except which errors are possible.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Subcommand};
use rustix::io::Errno;

use super::{Tried, print};

/// Files stay below this size.
const MAX_SIZE: u64 = 96 << 10;

/// The tree stays below this number of entries.
const MAX_ENTRIES: usize = 300;

/// Names of one chaos directory.
const CHAOS_NAMES: u64 = 12;

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Perform the operations, then compare.
    Run(Sequence),
    /// Only compare.
    Check(Sequence),
    /// Perform operations on few names that others work on too.
    Chaos(Sequence),
}

/// A sequence of operations.
#[derive(Clone, Debug, Args)]
pub struct Sequence {
    /// An empty directory.
    #[arg(long)]
    root: PathBuf,
    /// Decides the operations.
    #[arg(long)]
    seed: u64,
    /// Number of operations.
    #[arg(long)]
    operations: u64,
}

impl Verb {
    /// Does it and prints the number of entries, or of operations that went through.
    ///
    /// # Errors
    /// When an operation fails or the tree is not what the model says.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Run(sequence) => {
                let model = sequence.model(Some(&sequence.root))?;
                print(&model.compare(&sequence.root)?)
            }
            Self::Check(sequence) => print(&sequence.model(None)?.compare(&sequence.root)?),
            Self::Chaos(sequence) => print(&chaos(sequence)?),
        }
    }
}

/// A source of numbers (xorshift64*, Vigna 2016).
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn roll(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.roll() % limit.max(1)
    }

    fn pick<'list, T>(&mut self, list: &'list [T]) -> Option<&'list T> {
        let index = usize::try_from(self.below(list.len() as u64)).unwrap_or(0);
        list.get(index)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Directory,
    File(u64),
    Link(String),
}

/// What a file must hold; several names may lead to it.
#[derive(Clone, Debug, Default)]
struct Inode {
    content: Vec<u8>,
    attribute: Option<String>,
    links: u64,
}

#[derive(Debug, Default)]
struct Model {
    entries: BTreeMap<PathBuf, Node>,
    inodes: BTreeMap<u64, Inode>,
    next: u64,
}

impl Sequence {
    /// Computes the model; with `root`, performs each operation as well.
    fn model(&self, root: Option<&Path>) -> Result<Model> {
        let mut model = Model::default();
        let mut dice = Dice::new(self.seed);
        for number in 0..self.operations {
            model
                .step(&mut dice, root)
                .with_context(|| format!("operation {number} of seed {}", self.seed))?;
        }
        Ok(model)
    }
}

impl Model {
    fn paths(&self, wanted: impl Fn(&Node) -> bool) -> Vec<PathBuf> {
        self.entries.iter().filter(|(_, node)| wanted(node)).map(|(path, _)| path.clone()).collect()
    }

    /// A new path below a directory of the tree.
    fn fresh(&mut self, dice: &mut Dice) -> PathBuf {
        let mut directories = self.paths(|node| *node == Node::Directory);
        directories.push(PathBuf::new());
        self.next += 1;
        let parent = dice.pick(&directories).cloned().unwrap_or_default();
        // Now and then a long name.
        let name = match dice.below(8) {
            0 => format!("{}-{}", "long".repeat(40), self.next),
            _ => format!("n{}", self.next),
        };
        parent.join(name)
    }

    fn step(&mut self, dice: &mut Dice, root: Option<&Path>) -> Result<()> {
        let files = self.paths(|node| matches!(node, Node::File(_)));
        let full = self.entries.len() >= MAX_ENTRIES;
        match dice.below(14) {
            0 | 1 if !full => self.create(dice, root),
            2 if !full => {
                let path = self.fresh(dice);
                if let Some(root) = root {
                    fs::create_dir(root.join(&path)).tried("mkdir")?;
                }
                self.entries.insert(path, Node::Directory);
                Ok(())
            }
            3 if !full => {
                let path = self.fresh(dice);
                let target = format!("target/{}", dice.roll());
                if let Some(root) = root {
                    symlink(&target, root.join(&path)).tried("symlink")?;
                }
                self.entries.insert(path, Node::Link(target));
                Ok(())
            }
            4 if !full => {
                let Some(from) = dice.pick(&files).cloned() else { return Ok(()) };
                self.link(dice, root, &from)
            }
            5 | 6 => self.rename(dice, root),
            7 => self.remove(dice, root),
            _ => {
                let Some(path) = dice.pick(&files).cloned() else { return Ok(()) };
                self.change(dice, root, &path)
            }
        }
    }

    fn create(&mut self, dice: &mut Dice, root: Option<&Path>) -> Result<()> {
        let path = self.fresh(dice);
        if let Some(root) = root {
            File::create_new(root.join(&path)).tried("create")?;
        }
        self.next += 1;
        self.inodes.insert(self.next, Inode { links: 1, ..Inode::default() });
        self.entries.insert(path, Node::File(self.next));
        Ok(())
    }

    fn link(&mut self, dice: &mut Dice, root: Option<&Path>, from: &Path) -> Result<()> {
        let path = self.fresh(dice);
        if let Some(root) = root {
            fs::hard_link(root.join(from), root.join(&path)).tried("link")?;
        }
        if let Some(Node::File(inode)) = self.entries.get(from).cloned() {
            if let Some(inode) = self.inodes.get_mut(&inode) {
                inode.links += 1;
            }
            self.entries.insert(path, Node::File(inode));
        }
        Ok(())
    }

    /// Renames to a new name, or over another file; a directory takes its content along.
    fn rename(&mut self, dice: &mut Dice, root: Option<&Path>) -> Result<()> {
        let all = self.paths(|_| true);
        let Some(from) = dice.pick(&all).cloned() else { return Ok(()) };
        let plain = self.entries.get(&from) != Some(&Node::Directory);
        let others = self.paths(|node| *node != Node::Directory);
        let over = dice.pick(&others).cloned().filter(|over| *over != from);
        let to = match over {
            Some(over) if plain && dice.below(2) == 0 => over,
            _ => self.fresh(dice),
        };
        // Two names of one file: rename does nothing (rename(2)); a directory cannot move into itself.
        if to.starts_with(&from)
            || (self.entries.contains_key(&to) && self.entries.get(&to) == self.entries.get(&from))
        {
            return Ok(());
        }
        if let Some(root) = root {
            fs::rename(root.join(&from), root.join(&to)).tried("rename")?;
        }
        self.forget(&to);
        let moved = self.paths_below(&from);
        for path in moved {
            if let (Some(node), Ok(rest)) = (self.entries.remove(&path), path.strip_prefix(&from)) {
                let place = if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) };
                self.entries.insert(place, node);
            }
        }
        Ok(())
    }

    fn paths_below(&self, top: &Path) -> Vec<PathBuf> {
        self.entries.keys().filter(|path| path.starts_with(top)).cloned().collect()
    }

    fn forget(&mut self, path: &Path) {
        if let Some(Node::File(number)) = self.entries.remove(path) {
            let left = self.inodes.get_mut(&number).map(|inode| {
                inode.links -= 1;
                inode.links
            });
            if left == Some(0) {
                self.inodes.remove(&number);
            }
        }
    }

    fn remove(&mut self, dice: &mut Dice, root: Option<&Path>) -> Result<()> {
        let all = self.paths(|_| true);
        let Some(path) = dice.pick(&all).cloned() else { return Ok(()) };
        let below = self.paths_below(&path);
        let directory = self.entries.get(&path) == Some(&Node::Directory);
        if let Some(root) = root {
            match directory {
                true if below.len() > 1 => fs::remove_dir_all(root.join(&path)).tried("remove a tree")?,
                true => fs::remove_dir(root.join(&path)).tried("rmdir")?,
                false => fs::remove_file(root.join(&path)).tried("unlink")?,
            }
        }
        for path in below {
            self.forget(&path);
        }
        Ok(())
    }

    /// Changes content or attribute of a file.
    fn change(&mut self, dice: &mut Dice, root: Option<&Path>, path: &Path) -> Result<()> {
        let Some(Node::File(number)) = self.entries.get(path) else { return Ok(()) };
        let Some(inode) = self.inodes.get_mut(number) else { return Ok(()) };
        let place = root.map(|root| root.join(path));
        let open = |place: &Path| OpenOptions::new().read(true).write(true).open(place).tried("open");
        match dice.below(8) {
            0 => {
                let size = dice.below(MAX_SIZE);
                inode.content.resize(usize::try_from(size)?, 0);
                if let Some(place) = &place {
                    open(place)?.set_len(size).tried("truncate")?;
                }
            }
            1 => {
                let value = format!("value {}", dice.roll());
                if let Some(place) = &place {
                    let flags = rustix::fs::XattrFlags::empty();
                    rustix::fs::setxattr(place, "user.stress", value.as_bytes(), flags).tried("setxattr")?;
                }
                inode.attribute = Some(value);
            }
            2 => {
                // Read all of it, as the model has it now.
                if let Some(place) = &place {
                    let content = fs::read(place).tried("read")?;
                    ensure!(content == inode.content, "{} differs while in use", place.display());
                }
            }
            3 => {
                let (offset, len) = (dice.below(MAX_SIZE), 1 + dice.below(MAX_SIZE / 4));
                if let Some(place) = &place {
                    use rustix::fs::FallocateFlags;
                    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                    rustix::fs::fallocate(&open(place)?, mode, offset, len).tried("punch a hole")?;
                }
                let end = usize::try_from(offset + len)?.min(inode.content.len());
                let start = usize::try_from(offset)?.min(end);
                inode.content[start..end].fill(0);
            }
            _ => {
                let append = dice.below(3) == 0;
                let len = usize::try_from(1 + dice.below(12_000))?;
                let offset = if append { inode.content.len() as u64 } else { dice.below(MAX_SIZE) };
                let bytes: Vec<u8> = (0..len).map(|_| (dice.roll() >> 32) as u8).collect();
                if let Some(place) = &place {
                    if append {
                        let mut file = OpenOptions::new().append(true).open(place).tried("open")?;
                        std::io::Write::write_all(&mut file, &bytes).tried("append")?;
                    } else {
                        open(place)?.write_all_at(&bytes, offset).tried("write")?;
                    }
                }
                let start = usize::try_from(offset)?;
                if inode.content.len() < start + len {
                    inode.content.resize(start + len, 0);
                }
                inode.content[start..start + len].copy_from_slice(&bytes);
            }
        }
        Ok(())
    }

    /// Compares the tree with the model; returns the number of entries.
    fn compare(&self, root: &Path) -> Result<usize> {
        let mut found = 0;
        let mut open = vec![PathBuf::new()];
        while let Some(directory) = open.pop() {
            for entry in fs::read_dir(root.join(&directory)).tried("readdir")? {
                let path = directory.join(entry.tried("readdir")?.file_name());
                let Some(node) = self.entries.get(&path) else {
                    bail!("{} must not be there", path.display())
                };
                self.compare_entry(root, &path, node).with_context(|| path.display().to_string())?;
                if *node == Node::Directory {
                    open.push(path);
                }
                found += 1;
            }
        }
        ensure!(found == self.entries.len(), "{found} entries in place of {}", self.entries.len());
        Ok(found)
    }

    fn compare_entry(&self, root: &Path, path: &Path, node: &Node) -> Result<()> {
        let place = root.join(path);
        let meta = fs::symlink_metadata(&place).tried("stat")?;
        match node {
            Node::Directory => ensure!(meta.is_dir(), "no directory"),
            Node::Link(target) => {
                let found = fs::read_link(&place).tried("readlink")?;
                ensure!(found == Path::new(target), "the link leads to {}", found.display());
            }
            Node::File(number) => {
                let inode = self.inodes.get(number).context("the model lacks an inode")?;
                ensure!(meta.is_file(), "no file");
                ensure!(meta.nlink() == inode.links, "{} names in place of {}", meta.nlink(), inode.links);
                let content = fs::read(&place).tried("read")?;
                ensure!(
                    content.len() == inode.content.len(),
                    "{} bytes in place of {}",
                    content.len(),
                    inode.content.len()
                );
                let wrong = content.iter().zip(&inode.content).position(|(a, b)| a != b);
                ensure!(wrong.is_none(), "wrong content at offset {}", wrong.unwrap_or_default());
                if let Some(expected) = &inode.attribute {
                    let mut room = [0; 64];
                    let len = rustix::fs::getxattr(&place, "user.stress", &mut room[..]).tried("getxattr")?;
                    ensure!(room[..len] == *expected.as_bytes(), "the attribute differs");
                }
            }
        }
        Ok(())
    }
}

/// Errors that are an answer when others work on the same names.
const EXPECTED: [Errno; 14] = [
    Errno::NOENT,
    Errno::EXIST,
    Errno::NOTEMPTY,
    Errno::ISDIR,
    Errno::NOTDIR,
    Errno::INVAL,
    Errno::LOOP,
    Errno::PERM,
    Errno::ACCESS,
    Errno::NAMETOOLONG,
    Errno::NODATA,
    Errno::STALE,
    Errno::BUSY,
    Errno::NXIO,
];

fn chaos(sequence: &Sequence) -> Result<u64> {
    let mut dice = Dice::new(sequence.seed);
    let mut done = 0;
    for number in 0..sequence.operations {
        let mut name = || {
            let depth = 1 + dice.below(3);
            let parts: Vec<String> = (0..depth).map(|_| format!("c{}", dice.below(CHAOS_NAMES))).collect();
            sequence.root.join(parts.join("/"))
        };
        // Nothing moves further down than it was, or the tree would grow deeper without end.
        let (one, two) = (name(), name());
        let (one, two) =
            if one.components().count() < two.components().count() { (two, one) } else { (one, two) };
        match disturb(dice.below(18), dice.roll(), &one, &two) {
            Ok(()) => done += 1,
            Err(error) => {
                let known = Errno::from_io_error(&error).is_some_and(|errno| EXPECTED.contains(&errno));
                ensure!(known, "operation {number} of seed {}: {error}", sequence.seed);
            }
        }
    }
    Ok(done)
}

fn disturb(kind: u64, value: u64, one: &Path, two: &Path) -> std::io::Result<()> {
    let offset = value % MAX_SIZE;
    match kind {
        // What makes names comes more often than what takes them away, or there would be nothing to meet.
        0 | 12..=14 => fs::create_dir(one),
        1 | 15..=17 => File::create(one).map(drop),
        2 => File::create_new(one)?.write_all_at(&value.to_le_bytes(), offset),
        3 => fs::remove_file(one),
        4 => fs::remove_dir(one),
        5 | 6 => fs::rename(one, two),
        7 => fs::hard_link(one, two),
        8 => symlink(format!("c{}", value % CHAOS_NAMES), one),
        9 => fs::read_dir(one)?.try_for_each(|entry| entry.and_then(|entry| entry.metadata()).map(drop)),
        10 => {
            let file = OpenOptions::new().read(true).write(true).open(one)?;
            file.write_all_at(&value.to_le_bytes(), offset)?;
            file.set_len(offset / 2 + 4)?;
            file.read_at(&mut [0; 4096], 0).map(drop)
        }
        _ => {
            let flags = rustix::fs::XattrFlags::empty();
            rustix::fs::setxattr(one, "user.chaos", &value.to_le_bytes(), flags).map_err(Into::into)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(root: &Path, seed: u64) -> Sequence {
        Sequence { root: root.to_owned(), seed, operations: 600 }
    }

    #[test]
    fn a_local_file_system_agrees_with_the_model() {
        for seed in 0..4 {
            let place = tempfile::tempdir().unwrap();
            let sequence = sequence(place.path(), seed);
            Verb::Run(sequence.clone()).perform().unwrap();
            Verb::Check(sequence).perform().unwrap();
        }
    }

    #[test]
    fn a_changed_byte_and_a_lost_name_show() {
        let place = tempfile::tempdir().unwrap();
        let sequence = sequence(place.path(), 1);
        let model = sequence.model(Some(place.path())).unwrap();
        let victim = model
            .entries
            .iter()
            .find(|(_, node)| matches!(node, Node::File(number) if !model.inodes[number].content.is_empty()))
            .map(|(path, _)| place.path().join(path))
            .unwrap();
        let mut content = fs::read(&victim).unwrap();
        content[0] ^= 1;
        fs::write(&victim, &content).unwrap();
        assert!(model.compare(place.path()).is_err());
        content[0] ^= 1;
        fs::write(&victim, &content).unwrap();
        model.compare(place.path()).unwrap();
        fs::remove_file(&victim).unwrap();
        assert!(model.compare(place.path()).is_err());
    }

    #[test]
    fn chaos_does_work_and_meets_only_expected_errors() {
        let place = tempfile::tempdir().unwrap();
        let done = chaos(&sequence(place.path(), 5)).unwrap();
        assert!(done > 50, "only {done} operations did anything");
    }
}
