//! Unix sockets of the daemon: those that front ends connect to, and those of host programs.
//!
//! 1. What lies at a path is removed only when it is a socket that nobody listens on. The kernel's table
//!    of Unix sockets is asked before `connect`, which would disturb a listener.
//! 2. The socket is bound with mode 0600, given to its owner and group, and only then opened up to its
//!    final mode: at no time can anybody connect who may not in the end.
//!
//! A path that is too long for a socket address is bound as `/proc/self/fd/<directory>/<name>`.
//! The files are removed when the daemon ends ([`Leftovers`]), if they are still the ones made here.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Stat, Uid, chmodat, chownat, fchmod, openat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getpeername, listen, socket_with,
};

use crate::config::{Access, SocketPath};
use crate::packet::Kind;
use crate::sandbox::descriptors;
use crate::sandbox::seccomp::Call;

/// Front ends that may wait for their turn. One is served at a time; with more than a few waiting,
/// the next is better told at once.
pub const FRONT_END_BACKLOG: i32 = 8;

/// Host programs that may wait while the daemon is busy, or without descriptors.
pub const PROGRAM_BACKLOG: i32 = 128;

/// System calls of accepting, and of removing the sockets at the end.
pub const CALLS: &[Call] = &[
    Call::any(libc::SYS_accept4, "connections of front ends and host programs"),
    Call::any(libc::SYS_newfstatat, "whether a socket at the end is still the own one"),
    Call::any(libc::SYS_unlinkat, "removing it"),
];

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another program listens.
    #[error("{}: another program listens on it; end it or choose another path", .0.display())]
    Busy(PathBuf),
    /// Something that is not a socket.
    #[error("{}: exists and is not a socket; remove it or choose another path", .0.display())]
    Occupied(PathBuf),
    /// A step of making the socket.
    #[error("{}: cannot {step}", .path.display())]
    File {
        /// On what.
        path: PathBuf,
        /// What.
        step: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// `--fd` is not what it should be.
    #[error("--fd {fd}: {what}; pass a listening or a connected Unix stream socket")]
    Inherited {
        /// The number.
        fd: RawFd,
        /// What is wrong.
        what: String,
    },
}

/// What a front end comes from.
#[derive(Debug)]
pub enum Socket {
    /// Front ends connect to it.
    Listening(UnixListener),
    /// It is the front end.
    Connected(UnixStream),
}

/// Takes an inherited socket over.
///
/// # Errors
/// [`Error::Inherited`].
pub fn inherited(fd: RawFd) -> Result<Socket, Error> {
    let refuse = |what: String| Error::Inherited { fd, what };
    let socket = descriptors::take_inherited(fd).map_err(|error| refuse(error.to_string()))?;
    let domain = socket_domain(&socket).map_err(|errno| refuse(format!("not a socket ({errno})")))?;
    let kind = socket_type(&socket).map_err(|errno| refuse(errno.to_string()))?;
    if domain != AddressFamily::UNIX || kind != SocketType::STREAM {
        return Err(refuse("not a Unix stream socket".into()));
    }
    if socket_acceptconn(&socket).map_err(|errno| refuse(errno.to_string()))? {
        return Ok(Socket::Listening(socket.into()));
    }
    match getpeername(&socket) {
        Ok(_) => Ok(Socket::Connected(socket.into())),
        Err(_) => Err(refuse("a socket that neither listens nor is connected".into())),
    }
}

/// Sockets to be removed when the daemon ends.
#[derive(Debug, Default)]
pub struct Leftovers(Vec<Leftover>);

#[derive(Debug)]
struct Leftover {
    directory: OwnedFd,
    name: OsString,
    /// Device and inode.
    identity: (u64, u64),
}

impl Leftovers {
    /// The directories that the sockets are in.
    pub fn directories(&self) -> impl Iterator<Item = &OwnedFd> {
        self.0.iter().map(|leftover| &leftover.directory)
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        for file in self.0.drain(..) {
            if look(&file.directory, &file.name).is_ok_and(|stat| identity(&stat) == file.identity)
                && let Err(errno) = unlinkat(&file.directory, &file.name, AtFlags::empty())
            {
                tracing::warn!("cannot remove {}: {errno}", Path::new(&file.name).display());
            }
        }
    }
}

fn look(directory: &OwnedFd, name: &OsString) -> rustix::io::Result<Stat> {
    statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
}

#[allow(clippy::useless_conversion, reason = "the types differ between architectures")]
fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev.into(), stat.st_ino.into())
}

/// Makes a listening socket, and notes it in `leftovers`.
///
/// # Errors
/// [`Error`]; what was made is among the leftovers then.
pub fn make(
    path: &SocketPath,
    kind: Kind,
    access: Access,
    backlog: i32,
    leftovers: &mut Leftovers,
) -> Result<OwnedFd, Error> {
    let failed = |step: &'static str| {
        move |errno: Errno| Error::File { path: path.as_path().to_owned(), step, source: errno.into() }
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory =
        openat(CWD, path.directory(), flags, Mode::empty()).map_err(failed("open its directory"))?;
    let name = path.as_path().file_name().unwrap_or_default().to_owned();
    clear_the_way(path.as_path(), &directory, &name)?;

    let socket_type = if kind == Kind::SeqPacket { SocketType::SEQPACKET } else { SocketType::STREAM };
    let socket = socket_with(AddressFamily::UNIX, socket_type, SocketFlags::CLOEXEC, None)
        .map_err(failed("make a socket"))?;
    // The mode of the file comes from the socket's own (unix(7), net/unix/af_unix.c: unix_bind).
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("set the mode of the socket"))?;
    let address = address(path, &directory, &name).map_err(failed("use the path"))?;
    bind(&socket, &address).map_err(failed("bind the socket"))?;
    let made = look(&directory, &name).map_err(failed("look at the socket"))?;
    let kept = directory.try_clone().map_err(|source| Error::File {
        path: path.as_path().to_owned(),
        step: "keep its directory",
        source,
    })?;
    leftovers.0.push(Leftover { directory: kept, name: name.clone(), identity: identity(&made) });
    if access.owner.is_some() || access.group.is_some() {
        let (owner, group) = (access.owner.map(Uid::from_raw), access.group.map(Gid::from_raw));
        chownat(&directory, &name, owner, group, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("give the socket to its owner and group"))?;
    }
    listen(&socket, backlog).map_err(failed("listen on the socket"))?;
    chmodat(&directory, &name, Mode::from_raw_mode(access.mode), AtFlags::empty())
        .map_err(failed("set the mode of the socket"))?;
    Ok(socket)
}

/// The path itself, or for a long one a short way to its directory.
fn address(path: &SocketPath, directory: &OwnedFd, name: &OsString) -> rustix::io::Result<SocketAddrUnix> {
    if path.fits_address() {
        return SocketAddrUnix::new(path.as_path());
    }
    let mut short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()));
    short.push(name);
    SocketAddrUnix::new(short)
}

/// Removes a socket that nobody listens on.
fn clear_the_way(path: &Path, directory: &OwnedFd, name: &OsString) -> Result<(), Error> {
    let failed =
        |step: &'static str, errno: Errno| Error::File { path: path.to_owned(), step, source: errno.into() };
    let stat = match look(directory, name) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(failed("look at the socket", errno)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(Error::Occupied(path.to_owned()));
    }
    if kernel_knows_listener(path) || accepts_connections(directory, name) {
        return Err(Error::Busy(path.to_owned()));
    }
    tracing::debug!("removing the stale socket {}", path.display());
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(failed("remove the stale socket", errno)),
    }
}

/// Whether a listening socket of this network namespace was bound to the path, by the kernel's table.
fn kernel_knows_listener(path: &Path) -> bool {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    std::fs::read("/proc/net/unix").is_ok_and(|table| lists_listener(&table, absolute.as_os_str().as_bytes()))
}

/// `__SO_ACCEPTCON` in the flags column of `/proc/net/unix` (net/unix/af_unix.c).
const LISTENS: u32 = 1 << 16;

/// `Num RefCount Protocol Flags Type St Inode Path`; the path is as it was given to `bind`.
fn lists_listener(table: &[u8], path: &[u8]) -> bool {
    table.split(|byte| *byte == b'\n').skip(1).any(|line| {
        let mut columns = line.split(|byte| *byte == b' ').filter(|column| !column.is_empty());
        let flags = columns.nth(3).and_then(|flags| std::str::from_utf8(flags).ok());
        let listens =
            flags.and_then(|flags| u32::from_str_radix(flags, 16).ok()).is_some_and(|f| f & LISTENS != 0);
        listens && line.strip_suffix(path).is_some_and(|rest| rest.ends_with(b" "))
    })
}

/// Whether somebody would take a connection. In doubt, yes.
fn accepts_connections(directory: &OwnedFd, name: &OsString) -> bool {
    let mut short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()));
    short.push(name);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let attempt = SocketAddrUnix::new(short).and_then(|address| {
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)
    });
    match attempt {
        Err(Errno::CONNREFUSED | Errno::NOENT) => false,
        // Another kind of Unix socket has the name, for example a datagram socket.
        Err(Errno::PROTOTYPE) | Ok(()) => true,
        Err(errno) => {
            tracing::debug!("asking the old socket: {errno}");
            true
        }
    }
}

#[cfg(test)]
mod tests;
