//! The host file system on real directories, driven as the FUSE layer drives it. Needs root, and a temporary
//! directory (`TMPDIR`) on ext4: it has file handles, knows `RWF_NOWAIT` and reuses inode numbers at once.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

mod budget;
mod caller;
mod dir;
mod escape;
mod io;
mod life;
mod lock;
mod lookup;
mod namespace;
mod readonly;
mod setattr;
mod support;
mod xattr;
