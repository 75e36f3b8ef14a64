//! Unix sockets to be made: paths, owners and modes.
#![forbid(unsafe_code)]

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Group, User};

use super::Error;

/// Longest path that fits into `sockaddr_un.sun_path` with its NUL (`unix(7)`).
pub const SUN_PATH_MAX: usize = 107;

/// Longest file name of a socket whose whole path is longer than [`SUN_PATH_MAX`]: such a socket is
/// bound through its directory's descriptor, as `/proc/self/fd/<up to 4 digits>/<name>`.
const LONG_PATH_NAME_MAX: usize = SUN_PATH_MAX - "/proc/self/fd/9999/".len();

/// Path of a socket to be made. It may be relative, and it may be longer than [`SUN_PATH_MAX`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketPath(PathBuf);

impl SocketPath {
    /// Checks the path by itself.
    ///
    /// # Errors
    /// [`Error::SocketPathHasNoName`], [`Error::SocketNameTooLong`].
    pub fn new(path: PathBuf) -> Result<Self, Error> {
        let bytes = path.as_os_str().as_bytes();
        let name = match path.file_name() {
            Some(name) if !bytes.ends_with(b"/") && !bytes.contains(&0) => name,
            _ => return Err(Error::SocketPathHasNoName(path)),
        };
        if bytes.len() > SUN_PATH_MAX && name.len() > LONG_PATH_NAME_MAX {
            return Err(Error::SocketNameTooLong(path));
        }
        Ok(Self(path))
    }

    /// Checks the path against the file system; changes nothing there.
    ///
    /// # Errors
    /// [`Error::SocketDirectory`], [`Error::SocketPathOccupied`].
    pub fn check(&self) -> Result<(), Error> {
        match self.directory().metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(Error::SocketDirectory(self.directory().into(), "is not a directory".into()));
            }
            Err(error) => {
                return Err(Error::SocketDirectory(self.directory().into(), super::error::reason(&error)));
            }
        }
        match self.0.symlink_metadata() {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                Err(Error::SocketPathOccupied(self.0.clone()))
            }
            _ => Ok(()),
        }
    }

    /// The path as it was given.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// The directory of the socket: `.` for a bare name.
    pub fn directory(&self) -> &Path {
        match self.0.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        }
    }

    /// Whether the path fits into a socket address as it is.
    pub fn fits_address(&self) -> bool {
        self.0.as_os_str().len() <= SUN_PATH_MAX
    }
}

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Owner; `None`: the daemon's own user.
    pub owner: Option<u32>,
    /// Group; `None`: the daemon's own group.
    pub group: Option<u32>,
    /// Permission bits, in force before anybody can connect.
    pub mode: u32,
}

impl Access {
    /// Resolves names; `prefix` is that of the options.
    ///
    /// # Errors
    /// [`Error::NoSuchName`], [`Error::Lookup`].
    pub fn new(
        prefix: &'static str,
        owner: Option<&str>,
        group: Option<&str>,
        mode: Option<u32>,
    ) -> Result<Self, Error> {
        let user_of = |name: &str| User::from_name(name).map(|user| user.map(|user| user.uid.as_raw()));
        let group_of = |name: &str| Group::from_name(name).map(|group| group.map(|group| group.gid.as_raw()));
        Ok(Self {
            owner: owner.map(|name| resolve(prefix, "owner", name, user_of)).transpose()?,
            group: group.map(|name| resolve(prefix, "group", name, group_of)).transpose()?,
            mode: mode.unwrap_or(if group.is_some() { 0o770 } else { 0o700 }),
        })
    }
}

fn resolve(
    prefix: &'static str,
    what: &'static str,
    name: &str,
    look_up: impl FnOnce(&str) -> nix::Result<Option<u32>>,
) -> Result<u32, Error> {
    // -1 leaves the owner as it is (chown(2)), so it is no id.
    if let Ok(id) = name.parse::<u32>()
        && id != u32::MAX
    {
        return Ok(id);
    }
    let option = format!("--{prefix}-{what}");
    match look_up(name) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(Error::NoSuchName { option, name: name.into() }),
        Err(errno) => Err(Error::Lookup { option, name: name.into(), error: errno.to_string() }),
    }
}
