//! The host's file system behind an export.

pub mod idmap;
pub mod options;
pub mod xattrmap;
