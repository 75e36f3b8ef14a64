//! Directory entries and attributes: what a shell has no word for.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Subcommand, ValueEnum};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags, StatxFlags, XattrFlags};
use serde::{Deserialize, Serialize};

use super::{Tried, print};

/// Room for one extended attribute or a list of names (`XATTR_SIZE_MAX`, limits.h).
const XATTR_ROOM: usize = 64 << 10;

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Print the attributes of an entry, links not followed.
    Stat {
        /// The entry.
        path: PathBuf,
    },
    /// Make a file without a name, write to it, and give it a name.
    Tmpfile {
        /// Directory to make it in.
        #[arg(long)]
        directory: PathBuf,
        /// The name to give.
        #[arg(long)]
        name: PathBuf,
        /// The content.
        #[arg(long)]
        text: String,
    },
    /// Rename in a special way.
    Rename {
        /// The way.
        #[arg(long)]
        how: How,
        /// Old name.
        from: PathBuf,
        /// New name.
        to: PathBuf,
    },
    /// Set an extended attribute.
    SetXattr {
        /// The file.
        path: PathBuf,
        /// Name of the attribute.
        name: String,
        /// Its value.
        value: String,
        /// It must not exist yet.
        #[arg(long, conflicts_with = "replace")]
        create: bool,
        /// It must exist.
        #[arg(long)]
        replace: bool,
    },
    /// Print the value of an extended attribute.
    GetXattr {
        /// The file.
        path: PathBuf,
        /// Name of the attribute.
        name: String,
    },
    /// Print the names of the extended attributes.
    ListXattr {
        /// The file.
        path: PathBuf,
    },
    /// Remove an extended attribute.
    RemoveXattr {
        /// The file.
        path: PathBuf,
        /// Name of the attribute.
        name: String,
    },
    /// Open a file, remove its name, and go on with it.
    Orphan {
        /// The file.
        path: PathBuf,
    },
    /// Bind a socket, connect to it by name, and say something.
    Socket {
        /// The socket.
        path: PathBuf,
    },
    /// Append numbered lines, one write each.
    Append {
        /// The file.
        path: PathBuf,
        /// How each line starts.
        #[arg(long)]
        label: String,
        /// Number of lines.
        #[arg(long)]
        lines: u32,
    },
}

/// Special ways to rename (`renameat2(2)`).
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum How {
    /// Only if the new name is free.
    NoReplace,
    /// Swap the two.
    Exchange,
    /// Leave a whiteout at the old name.
    Whiteout,
}

/// The attributes of an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Inode number.
    pub inode: u64,
    /// Device that holds it: major and minor number.
    pub device: (u32, u32),
    /// Number of names.
    pub links: u32,
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes that are allocated.
    pub blocks: u64,
    /// Device number of a device node.
    pub rdev: (u32, u32),
    /// Time of the last change of the content: seconds and nanoseconds.
    pub modified: (i64, u32),
}

impl Verb {
    /// Does it.
    ///
    /// # Errors
    /// When the operation is refused.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Stat { path } => print(&attributes(path)?),
            Self::Tmpfile { directory, name, text } => tmpfile(directory, name, text),
            Self::Rename { how, from, to } => {
                let flags = match how {
                    How::NoReplace => RenameFlags::NOREPLACE,
                    How::Exchange => RenameFlags::EXCHANGE,
                    How::Whiteout => RenameFlags::WHITEOUT,
                };
                rustix::fs::renameat_with(CWD, from, CWD, to, flags).tried("renameat2")
            }
            Self::SetXattr { path, name, value, create, replace } => {
                let mut flags = XattrFlags::empty();
                flags.set(XattrFlags::CREATE, *create);
                flags.set(XattrFlags::REPLACE, *replace);
                rustix::fs::setxattr(path, name, value.as_bytes(), flags).tried("setxattr")
            }
            Self::GetXattr { path, name } => {
                let mut value = vec![0; XATTR_ROOM];
                let len = rustix::fs::getxattr(path, name, &mut value[..]).tried("getxattr")?;
                print(&String::from_utf8_lossy(&value[..len]))
            }
            Self::ListXattr { path } => print(&xattr_names(path)?),
            Self::RemoveXattr { path, name } => rustix::fs::removexattr(path, name).tried("removexattr"),
            Self::Orphan { path } => orphan(path),
            Self::Socket { path } => socket(path),
            Self::Append { path, label, lines } => append(path, label, *lines),
        }
    }
}

fn attributes(path: &Path) -> Result<Attributes> {
    let found =
        rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS).tried("statx")?;
    Ok(Attributes {
        inode: found.stx_ino,
        device: (found.stx_dev_major, found.stx_dev_minor),
        links: found.stx_nlink,
        mode: found.stx_mode.into(),
        uid: found.stx_uid,
        gid: found.stx_gid,
        size: found.stx_size,
        blocks: found.stx_blocks,
        rdev: (found.stx_rdev_major, found.stx_rdev_minor),
        modified: (found.stx_mtime.tv_sec, found.stx_mtime.tv_nsec),
    })
}

fn tmpfile(directory: &Path, name: &Path, text: &str) -> Result<()> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let fd = rustix::fs::open(directory, flags, Mode::from_raw_mode(0o640)).tried("open with O_TMPFILE")?;
    let mut file = File::from(fd);
    file.write_all(text.as_bytes()).tried("write")?;
    let own = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    rustix::fs::linkat(CWD, own, CWD, name, AtFlags::SYMLINK_FOLLOW).tried("linkat")
}

fn xattr_names(path: &Path) -> Result<Vec<String>> {
    let mut room = vec![0_u8; XATTR_ROOM];
    let len = rustix::fs::listxattr(path, &mut room[..]).tried("listxattr")?;
    let names = room[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut names: Vec<String> = names.map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    names.sort();
    Ok(names)
}

/// A file without a name must go on holding its content, growing, and knowing that it has no name.
fn orphan(path: &Path) -> Result<()> {
    use std::os::unix::fs::{FileExt, MetadataExt};
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path).tried("open")?;
    file.write_all_at(b"before", 0).tried("write")?;
    std::fs::remove_file(path).tried("unlink")?;
    file.write_all_at(b" after", 6).tried("write to the orphan")?;
    file.sync_all().tried("fsync of the orphan")?;
    let mut content = [0; 12];
    file.read_exact_at(&mut content, 0).tried("read from the orphan")?;
    let meta = file.metadata().tried("stat of the orphan")?;
    anyhow::ensure!(content == *b"before after", "the orphan holds {:?}", String::from_utf8_lossy(&content));
    anyhow::ensure!(meta.nlink() == 0, "the orphan has {} names", meta.nlink());
    anyhow::ensure!(meta.len() == 12, "the orphan has {} bytes", meta.len());
    file.set_len(3).tried("truncate of the orphan")
}

/// Both ends are on this side: a socket's name is on the file system, its data are not.
fn socket(path: &Path) -> Result<()> {
    use std::io::Read;
    use std::os::unix::net::{UnixListener, UnixStream};
    let listener = UnixListener::bind(path).tried("bind")?;
    let mut client = UnixStream::connect(path).tried("connect")?;
    let (mut server, _) = listener.accept().tried("accept")?;
    client.write_all(b"hello").tried("send")?;
    let mut heard = [0; 5];
    server.read_exact(&mut heard).tried("receive")?;
    anyhow::ensure!(heard == *b"hello", "the socket said {heard:?}");
    Ok(())
}

fn append(path: &Path, label: &str, lines: u32) -> Result<()> {
    let mut file = File::options().append(true).create(true).open(path).tried("open")?;
    for number in 0..lines {
        file.write_all(format!("{label} {number:05}\n").as_bytes()).tried("append")?;
    }
    Ok(())
}
