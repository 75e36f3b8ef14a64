//! The host's side of a connection: Unix sockets.

pub mod hello;
pub mod socket;
pub mod sys;
