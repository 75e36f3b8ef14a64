//! The FUSE protocol as the stock virtio-fs driver speaks it (Linux 5.4 to 6.18 and later).
//!
//! | module | job |
//! |---|---|
//! | [`abi`] | wire structures and constants; layout only |
//! | [`init_flags`] | flags of `FUSE_INIT` |
//! | [`opcode`] | operation codes |
//! | [`name`] | the one place where names are checked |
//! | [`extension`] | supplementary groups and labels at the end of a request |
//! | [`request`] | bytes to [`request::Request`], every field checked; pure |
//! | [`arguments`] | the arguments of single operations; pure |
//! | [`init`] | version and feature negotiation; pure |
//! | [`session`] | what was negotiated, shared by all threads |
//! | [`counters`] | what was served and refused |
//! | [`dirent`], [`reply`] | values to bytes |
//! | [`dispatch`] | chain to file system to reply |

pub mod abi;
pub mod arguments;
pub mod counters;
pub mod dirent;
pub mod dispatch;
pub mod extension;
pub mod init;
pub mod init_flags;
pub mod name;
pub mod opcode;
pub mod reply;
pub mod request;
pub mod session;

pub use dispatch::{Blocked, Scratch, Served, refuse, serve};
pub use session::Session;
