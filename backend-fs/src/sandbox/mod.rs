//! Isolation of the daemon from the host.

pub mod options;
