//! The FUSE protocol as the stock virtio-fs driver speaks it.

pub mod abi;
pub mod dirent;
