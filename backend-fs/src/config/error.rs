//! Everything that can be wrong with a command line, each as one line: what, on what, what to do.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use crate::host::idmap;
use crate::limits;

/// Why the daemon does not start. Nothing has been changed anywhere when one of these comes up.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither `--shared-dir` nor `-o source`.
    #[error("no directory to export: give --shared-dir DIR")]
    NoSharedDir,
    /// None of `--socket-path`, `--socket`, `--fd`.
    #[error("no endpoint: give --socket-path PATH, or --fd N for an inherited socket")]
    NoEndpoint,
    /// Id translation and ACLs contradict each other.
    #[error(
        "--{0} cannot be used with --posix-acl: the ids inside an ACL would not be translated; \
         drop one of the two"
    )]
    TranslateWithPosixAcl(&'static str),
    /// The rules of one direction overlap.
    #[error("--{option}: {error}")]
    IdMap {
        /// Which option.
        option: &'static str,
        /// What is wrong.
        error: idmap::OverlapError,
    },
    /// Only meaningful for paths.
    #[error("{0} cannot be used with --migration-mode=file-handles, which makes it unnecessary")]
    MigrationWithFileHandles(&'static str),
    /// Not a power of two in range.
    #[error("--queue-size {0}: a ring has a power of two of entries, 2 to 32768")]
    QueueSize(u16),
    /// File handles need the capability that is to be dropped.
    #[error(
        "--modcaps drops dac_read_search, which --inode-file-handles=mandatory needs; drop one of the two"
    )]
    HandlesWithoutCapability,
    /// The limit leaves nothing for the DPU.
    #[error("--rlimit-nofile: {0}")]
    RlimitTooSmall(limits::Error),
    /// The limit is more than this kernel allows.
    #[error(transparent)]
    RlimitTooLarge(limits::Error),
    /// A user namespace map where none is made.
    #[error(
        "--{0} needs --sandbox=namespace and a daemon that does not run as root; for root use --translate-{1}"
    )]
    NamespaceMap(&'static str, &'static str),
    /// The export is missing or unreadable.
    #[error("--shared-dir {}: {}; name an existing directory or file", .0.display(), .1)]
    SharedDir(PathBuf, String),
    /// No file name in the socket path.
    #[error("--socket-path {}: not the name of a socket; give a path that ends in a file name", .0.display())]
    SocketPathHasNoName(PathBuf),
    /// Over-long path whose last component is over-long as well.
    #[error(
        "--socket-path {}: the path is over 107 bytes and its file name over {} bytes; use a shorter file name",
        .0.display(), super::listen::LONG_PATH_NAME_MAX
    )]
    SocketNameTooLong(PathBuf),
    /// The socket's directory is missing.
    #[error("--socket-path: directory {}: {}; create it or choose another path", .0.display(), .1)]
    SocketDirectory(PathBuf, String),
    /// Something that is not a socket has the name.
    #[error("--socket-path {}: exists and is not a socket; remove it or choose another path", .0.display())]
    SocketPathOccupied(PathBuf),
    /// `--fd` names nothing.
    #[error("--fd {0}: no such open descriptor; the caller must pass the socket on under this number")]
    FdClosed(i32),
    /// `--fd` names something else.
    #[error("--fd {0}: not a socket but {1}; pass a listening or connected Unix socket")]
    FdNotSocket(i32, String),
    /// No such user.
    #[error("--socket-owner {0}: no such user")]
    NoSuchUser(String),
    /// No such group.
    #[error("--socket-group {0}: no such group")]
    NoSuchGroup(String),
    /// The user database could not be read.
    #[error("{option} {name}: cannot look it up: {error}")]
    Lookup {
        /// Which option.
        option: &'static str,
        /// Its value.
        name: String,
        /// What the library said.
        error: String,
    },
    /// `chroot(2)` is for root.
    #[error("--sandbox=chroot needs root; use --sandbox=namespace")]
    ChrootNeedsRoot,
}

impl Error {
    /// Exit status: 2 when the command line itself is wrong, 1 when it does not fit this host.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::NoSharedDir
            | Error::NoEndpoint
            | Error::TranslateWithPosixAcl(_)
            | Error::IdMap { .. }
            | Error::MigrationWithFileHandles(_)
            | Error::QueueSize(_)
            | Error::HandlesWithoutCapability
            | Error::RlimitTooSmall(_)
            | Error::NamespaceMap(..)
            | Error::SocketPathHasNoName(_)
            | Error::SocketNameTooLong(_) => 2,
            Error::SharedDir(..)
            | Error::SocketDirectory(..)
            | Error::SocketPathOccupied(_)
            | Error::FdClosed(_)
            | Error::FdNotSocket(..)
            | Error::NoSuchUser(_)
            | Error::NoSuchGroup(_)
            | Error::Lookup { .. }
            | Error::RlimitTooLarge(_)
            | Error::ChrootNeedsRoot => 1,
        }
    }
}

/// The reason of a failed look at the file system, without Rust's "(os error 2)".
pub(super) fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    chars.next().map(|first| first.to_lowercase().chain(chars).collect()).unwrap_or_default()
}
