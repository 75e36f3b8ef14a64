//! Everything that can be wrong with a command line or a configuration file, each as one line: what, on
//! what, what to do.
#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use crate::args::vm::FORWARDING;
use crate::device::{FIRST_CID, LAST_CID};
use crate::route::RuleError;

/// Why the daemon does not start. Nothing has been changed anywhere when one of these comes up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Neither a path nor a descriptor.
    #[error(
        "DPU {0}: no endpoint: give --socket-path PATH (`socket` in --vm and --config), or --fd N for an \
         inherited socket"
    )]
    NoEndpoint(u64),
    /// No rule and no listener.
    #[error("DPU {0}: nothing could be reached: give --uds-path, --port or --listen")]
    NothingReachable(u64),
    /// Forwarding to host vsock.
    #[error("--forward-cid: {FORWARDING}")]
    Forwarding,
    /// Not a context id of a DPU.
    #[error("--guest-cid {0}: a DPU has a context id from {FIRST_CID} to {LAST_CID}")]
    Cid(u64),
    /// Two DPUs with one.
    #[error("context id {0} is given to two DPUs; give each its own --guest-cid")]
    CidTwice(u64),
    /// Two sockets with one path.
    #[error("{}: two sockets cannot have the same path", .0.display())]
    PathTwice(PathBuf),
    /// Two rules for a port.
    #[error("--port {0}: there are two rules for this port")]
    PortTwice(u32),
    /// A rule that cannot be read.
    #[error(transparent)]
    Rule(RuleError),
    /// Not a power of two in range.
    #[error("--queue-size {0}: a ring has a power of two of entries, 2 to 32768")]
    QueueSize(u32),
    /// A window out of range.
    #[error("--tx-buffer-size {0}: give 4096 to 67108864 bytes")]
    Window(u32),
    /// No or too many connections.
    #[error("--max-connections {0}: give 1 to 1048576")]
    MaxConnections(usize),
    /// A path of the command line that is not UTF-8.
    #[error("{}: paths of sockets must be UTF-8", .0.display())]
    NotText(PathBuf),
    /// The configuration file cannot be read.
    #[error("--config {}: {}", .0.display(), .1)]
    File(PathBuf, String),
    /// The configuration file says something impossible.
    #[error("--config {}: {}", .0.display(), .1)]
    FileContent(PathBuf, String),
    /// No file name in the socket path.
    #[error("{}: not the name of a socket; give a path that ends in a file name", .0.display())]
    SocketPathHasNoName(PathBuf),
    /// Over-long path whose last component is over-long as well.
    #[error("{}: the path is over 107 bytes and its file name over 88; use a shorter file name", .0.display())]
    SocketNameTooLong(PathBuf),
    /// The socket's directory is missing.
    #[error("directory {} of a socket: {}; create it or choose another path", .0.display(), .1)]
    SocketDirectory(PathBuf, String),
    /// Something that is not a socket has the name.
    #[error("{}: exists and is not a socket; remove it or choose another path", .0.display())]
    SocketPathOccupied(PathBuf),
    /// No such user or group.
    #[error("{option} {name}: there is none of that name")]
    NoSuchName {
        /// Which option.
        option: String,
        /// Its value.
        name: String,
    },
    /// The user database could not be read.
    #[error("{option} {name}: cannot look it up: {error}")]
    Lookup {
        /// Which option.
        option: String,
        /// Its value.
        name: String,
        /// What the library said.
        error: String,
    },
}

impl Error {
    /// Exit status: 2 when the command line or the file is wrong, 1 when it does not fit this host.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::NoEndpoint(_)
            | Error::NothingReachable(_)
            | Error::Forwarding
            | Error::Cid(_)
            | Error::CidTwice(_)
            | Error::PathTwice(_)
            | Error::PortTwice(_)
            | Error::Rule(_)
            | Error::QueueSize(_)
            | Error::Window(_)
            | Error::MaxConnections(_)
            | Error::NotText(_)
            | Error::FileContent(..)
            | Error::SocketPathHasNoName(_)
            | Error::SocketNameTooLong(_) => 2,
            Error::File(..)
            | Error::SocketDirectory(..)
            | Error::SocketPathOccupied(_)
            | Error::NoSuchName { .. }
            | Error::Lookup { .. } => 1,
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
