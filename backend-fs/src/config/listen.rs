//! Where the daemon waits for its vhost-user front end.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::Error;

/// Longest path that fits into `sockaddr_un.sun_path` with its NUL (`unix(7)`).
pub const SUN_PATH_MAX: usize = 107;

/// Longest file name of a socket whose whole path is longer than [`SUN_PATH_MAX`]: such a socket is
/// bound through its directory's descriptor, as `/proc/self/fd/<up to 4 digits>/<name>`.
pub const LONG_PATH_NAME_MAX: usize = SUN_PATH_MAX - "/proc/self/fd/9999/".len();

/// The endpoint and how long to stay at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenOptions {
    /// What the front end connects to.
    pub endpoint: Endpoint,
    /// Wait for the next front end when one goes, instead of ending with 0 (`--keep-listening`).
    pub keep_listening: bool,
}

/// What the front end connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket to be made by the daemon (`--socket-path`).
    Path(SocketOptions),
    /// An inherited socket, listening or connected (`--fd`); known to be open and a socket.
    Fd(RawFd),
}

/// A socket to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOptions {
    /// Where.
    pub path: SocketPath,
    /// Owner (`--socket-owner`), resolved; `None`: the daemon's own user.
    pub owner: Option<u32>,
    /// Group (`--socket-group`), resolved; `None`: the daemon's own group.
    pub group: Option<u32>,
    /// Permission bits of the socket, to be in force before anybody can connect. Without
    /// `--socket-mode`: 0700, and 0770 with `--socket-group`, as virtiofsd's umask makes them.
    pub mode: u32,
}

/// Path of a socket to be made. Its directory exists, and nothing but a socket is in the way.
/// It may be relative, and it may be longer than [`SUN_PATH_MAX`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPath(PathBuf);

impl SocketPath {
    /// Checks the path against the file system; changes nothing there.
    pub fn new(path: PathBuf) -> Result<Self, Error> {
        let bytes = path.as_os_str().as_bytes();
        let name = match path.file_name() {
            Some(name) if !bytes.ends_with(b"/") => name,
            _ => return Err(Error::SocketPathHasNoName(path)),
        };
        if bytes.len() > SUN_PATH_MAX && name.len() > LONG_PATH_NAME_MAX {
            return Err(Error::SocketNameTooLong(path));
        }
        let directory = directory_of(&path);
        match directory.metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => return Err(Error::SocketDirectory(directory.to_owned(), "is not a directory".into())),
            Err(error) => return Err(Error::SocketDirectory(directory.to_owned(), super::reason(&error))),
        }
        match path.symlink_metadata() {
            Ok(metadata) if !metadata.file_type().is_socket() => Err(Error::SocketPathOccupied(path)),
            _ => Ok(Self(path)),
        }
    }

    /// The path as it was given.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The directory of the socket: `.` for a bare name.
    pub fn directory(&self) -> &Path {
        directory_of(&self.0)
    }

    /// Whether the path fits into a socket address as it is.
    pub fn fits_address(&self) -> bool {
        self.0.as_os_str().len() <= SUN_PATH_MAX
    }

    /// Where the daemon leaves its pid, locked: the socket's path with `.pid` appended.
    pub fn pid_file(&self) -> PathBuf {
        let mut name = OsString::from(&self.0);
        name.push(".pid");
        name.into()
    }
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
