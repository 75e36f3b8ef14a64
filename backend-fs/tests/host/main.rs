//! The host file system on real directories, driven as the FUSE layer drives it. Needs root.
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
