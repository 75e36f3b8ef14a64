//! The DPU's virtio-fs driver as a typed client.
//!
//! | module | what |
//! |---|---|
//! | [`abi`] | structures and constants of the wire |
//! | [`request`] | a request in DPU memory: its chain has the shape Linux's `fs/fuse/virtio_fs.c` gives it |
//! | [`session`] | rings of a device, the INIT handshake of a given DPU kernel, the FORGET queue |
//! | [`client`] | one request ring: submit and complete, any number outstanding |
//! | [`ops`] | one method per FUSE operation |
//! | [`dirent`] | READDIR and READDIRPLUS payloads |

pub mod abi;
pub mod client;
pub mod dirent;
pub mod ops;
pub mod request;
pub mod session;

pub use client::{Caller, Client, Reply, Ticket};
pub use request::{Call, Payload, Request};
pub use session::{DpuKernel, Session, SessionOptions};

use crate::Error;

/// Why an operation did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum FuseError {
    /// The file system said no.
    #[error("the file system answers {0}")]
    Errno(rustix::io::Errno),
    /// Transport, ring or protocol trouble.
    #[error(transparent)]
    Driver(#[from] Error),
}

impl FuseError {
    /// The errno if the file system answered one.
    pub fn errno(&self) -> Option<rustix::io::Errno> {
        match self {
            FuseError::Errno(errno) => Some(*errno),
            FuseError::Driver(_) => None,
        }
    }
}

/// Result of an operation.
pub type FuseResult<T> = std::result::Result<T, FuseError>;
