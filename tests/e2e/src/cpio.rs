//! Writer for the "newc" cpio format, of which the kernel unpacks any number in a row as its first root
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::{self, Write};

/// File type bits of the mode field (the classic `S_IFMT` values).
const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// Archives and their parts are padded to this many bytes.
const ALIGNMENT: usize = 4;

/// Builds one archive. Parent directories are added as needed, once each.
#[derive(Debug)]
pub struct Archive<W: Write> {
    out: W,
    written: usize,
    inode: u32,
    directories: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    /// Starts an archive.
    pub fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0, directories: BTreeSet::new() }
    }

    /// Adds a directory and its parents.
    ///
    /// # Errors
    /// Whatever the underlying writer reports.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.directories.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.entry(path, DIRECTORY | 0o755, &[])?;
        self.directories.insert(path.to_owned());
        Ok(())
    }

    /// Adds a regular file.
    ///
    /// # Errors
    /// Whatever the underlying writer reports; `InvalidInput` for content of 4 GiB or more.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.parents(path)?;
        self.entry(path, REGULAR | permissions, content)
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// Whatever the underlying writer reports.
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        let path = path.trim_matches('/');
        self.parents(path)?;
        self.entry(path, SYMLINK | 0o777, target.as_bytes())
    }

    /// Ends the archive and gives the writer back.
    ///
    /// # Errors
    /// Whatever the underlying writer reports.
    pub fn finish(mut self) -> io::Result<W> {
        self.inode = 0;
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        match path.rfind('/') {
            Some(slash) => self.directory(&path[..slash]),
            None => Ok(()),
        }
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let size = u32::try_from(content.len()).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is too large for cpio"))
        })?;
        let name_size = name.len() + 1;
        self.inode += 1;
        let links = if mode & DIRECTORY == DIRECTORY && mode & REGULAR == 0 { 2 } else { 1 };
        // magic, ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let header = format!(
            "070701{:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
            self.inode, 0, 0, 0, 0, 0, 0, 0, 0
        );
        self.write(header.as_bytes())?;
        self.write(name.as_bytes())?;
        self.write(&[0])?;
        self.pad()?;
        self.write(content)?;
        self.pad()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self) -> io::Result<()> {
        let over = self.written % ALIGNMENT;
        if over == 0 { Ok(()) } else { self.write(&[0; ALIGNMENT][over..]) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn parents_come_first_and_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/a/b/one", 0o644, b"1").unwrap();
        archive.file("a/b/two", 0o755, b"22").unwrap();
        archive.symlink("a/three", "b/one").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % ALIGNMENT, 0);
        assert_eq!(listing(&bytes), ["a", "a/b", "a/b/one", "a/b/two", "a/three"]);
    }

    /// Lists with the real cpio, which is what proves the format.
    fn listing(bytes: &[u8]) -> Vec<String> {
        let mut child = Command::new("cpio")
            .args(["--list", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
    }
}
