//! The endpoint that a front end connects to: a socket of our own with its pid file, or an inherited one.
//!
//! # A socket of our own
//!
//! 1. `<socket>.pid` is opened and locked (`flock`), the way virtiofsd does: two daemons with the same
//!    path exclude each other, whichever of the two programs they are.
//! 2. What lies at the path is removed only when it is a socket that nobody listens on. Asking by
//!    `connect` disturbs a listener (virtiofsd ends when its first peer goes away), so the kernel's table
//!    of Unix sockets is asked first.
//! 3. The socket is bound with mode 0600, given to its owner and group, and only then opened up to its
//!    final mode: at no time can anybody connect who may not in the end.
//!
//! A path that is too long for a socket address is bound as `/proc/self/fd/<directory>/<name>`.
//!
//! The supervisor removes both files when the daemon ends ([`Leftovers`]), if they are still the ones
//! that were made here.
#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Gid, Mode, OFlags, Stat, Uid, chmodat, chownat, fchmod, flock,
    openat, statat, unlinkat,
};
use rustix::io::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, getpeername, listen, socket_with,
};

use crate::config::{Endpoint, SocketOptions};
use crate::sandbox::descriptors;
use crate::sandbox::seccomp::Call;

/// Front ends that may wait for their turn. One is served at a time; with more than a few waiting,
/// the next is better told at once.
const BACKLOG: i32 = 8;

/// Attempts to lock a pid file that somebody else removes at the same time.
const PID_FILE_ATTEMPTS: u32 = 16;

/// System calls of accepting front ends.
pub const CALLS: &[Call] = &[Call::any(libc::SYS_accept4, "the front end's connection")];

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another daemon has the pid file.
    #[error("--socket-path {}: another daemon{} serves it ({} is locked); end it or choose another path",
        .socket.display(), .pid.as_ref().map(|pid| format!(" (pid {pid})")).unwrap_or_default(), .file.display())]
    Locked {
        /// The socket.
        socket: PathBuf,
        /// The pid file.
        file: PathBuf,
        /// What it says.
        pid: Option<String>,
    },
    /// Another program listens.
    #[error("--socket-path {}: another program listens on it; end it or choose another path", .0.display())]
    Busy(PathBuf),
    /// Something that is not a socket.
    #[error("--socket-path {}: exists and is not a socket; remove it or choose another path", .0.display())]
    Occupied(PathBuf),
    /// A step of making the files.
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

/// Opens the endpoint. The files made for it are removed when the [`Leftovers`] are dropped.
///
/// # Errors
/// [`Error`]; no file is left behind then.
pub fn open(endpoint: &Endpoint) -> Result<(Socket, Leftovers), Error> {
    match endpoint {
        Endpoint::Fd(fd) => Ok((inherited(*fd)?, Leftovers::default())),
        Endpoint::Path(options) => {
            let (listener, leftovers) = make(options)?;
            Ok((Socket::Listening(listener), leftovers))
        }
    }
}

fn inherited(fd: RawFd) -> Result<Socket, Error> {
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

/// Files of the endpoint, removed on drop. The server forgets them ([`Leftovers::forget`]): they are
/// the supervisor's.
#[derive(Debug, Default)]
pub struct Leftovers {
    files: Vec<Leftover>,
    /// Keeps the lock. Shared with every process forked from here; the last one to close it unlocks.
    lock: Option<OwnedFd>,
}

#[derive(Debug)]
struct Leftover {
    directory: OwnedFd,
    name: OsString,
    /// Device and inode.
    identity: (u64, u64),
}

impl Leftovers {
    /// Leaves the files where they are.
    pub fn forget(mut self) {
        self.files.clear();
    }
}

impl Drop for Leftovers {
    fn drop(&mut self) {
        // The socket first: while the pid file is locked nobody else makes one.
        for file in self.files.drain(..) {
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

fn make(options: &SocketOptions) -> Result<(UnixListener, Leftovers), Error> {
    let path = options.path.as_path();
    let failed = |step: &'static str| {
        move |errno: Errno| Error::File { path: path.to_owned(), step, source: errno.into() }
    };
    let directory = openat(
        CWD,
        options.path.directory(),
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed("open its directory"))?;
    let name = path.file_name().unwrap_or_default().to_owned();

    let mut leftovers = Leftovers::default();
    lock_pid_file(options, &directory, &mut leftovers)?;
    clear_the_way(path, &directory, &name)?;

    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(failed("make a socket"))?;
    // The mode of the file comes from the socket's own (unix(7), net/unix/af_unix.c: unix_bind).
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(failed("set the mode of the socket"))?;
    let address = address(options, &directory, &name).map_err(failed("use the path"))?;
    bind(&socket, &address).map_err(failed("bind the socket"))?;
    let made = look(&directory, &name).map_err(failed("look at the socket"))?;
    // Last in, first out of the directory.
    leftovers.files.insert(
        0,
        Leftover {
            directory: directory.try_clone().map_err(|source| Error::File {
                path: path.to_owned(),
                step: "keep its directory",
                source,
            })?,
            name: name.clone(),
            identity: identity(&made),
        },
    );
    if options.owner.is_some() || options.group.is_some() {
        let (owner, group) = (options.owner.map(Uid::from_raw), options.group.map(Gid::from_raw));
        chownat(&directory, &name, owner, group, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(failed("give the socket to its owner and group"))?;
    }
    listen(&socket, BACKLOG).map_err(failed("listen on the socket"))?;
    chmodat(&directory, &name, Mode::from_raw_mode(options.mode), AtFlags::empty())
        .map_err(failed("set the mode of the socket"))?;
    Ok((socket.into(), leftovers))
}

/// The path itself, or for a long one a short way to its directory.
fn address(
    options: &SocketOptions,
    directory: &OwnedFd,
    name: &OsString,
) -> rustix::io::Result<SocketAddrUnix> {
    if options.path.fits_address() {
        return SocketAddrUnix::new(options.path.as_path());
    }
    let mut short = PathBuf::from(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()));
    short.push(name);
    SocketAddrUnix::new(short)
}

fn lock_pid_file(
    options: &SocketOptions,
    directory: &OwnedFd,
    leftovers: &mut Leftovers,
) -> Result<(), Error> {
    let path = options.path.pid_file();
    let name = path.file_name().unwrap_or_default().to_owned();
    let failed =
        |step: &'static str, errno: Errno| Error::File { path: path.clone(), step, source: errno.into() };
    for _ in 0..PID_FILE_ATTEMPTS {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(directory, &name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| failed("make the pid file", errno))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let pid = std::fs::read_to_string(&path).ok().map(|text| text.trim().to_owned());
                let pid = pid.filter(|text| !text.is_empty());
                return Err(Error::Locked { socket: options.path.as_path().to_owned(), file: path, pid });
            }
            Err(errno) => return Err(failed("lock the pid file", errno)),
        }
        // Whoever had it before may have removed it between our open and our lock.
        let locked = rustix::fs::fstat(&file).map_err(|errno| failed("look at the pid file", errno))?;
        if !look(directory, &name).is_ok_and(|stat| identity(&stat) == identity(&locked)) {
            continue;
        }
        let keep = directory.try_clone().map_err(|source| Error::File {
            path: path.clone(),
            step: "keep its directory",
            source,
        })?;
        leftovers.files.push(Leftover { directory: keep, name, identity: identity(&locked) });
        let mut file = std::fs::File::from(file);
        file.set_len(0)
            .and_then(|()| writeln!(file, "{}", std::process::id()))
            .map_err(|source| Error::File { path: path.clone(), step: "write the pid file", source })?;
        leftovers.lock = Some(file.into());
        return Ok(());
    }
    Err(failed("lock the pid file, which others keep removing", Errno::AGAIN))
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
