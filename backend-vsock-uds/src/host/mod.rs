//! The host's side of a connection: Unix sockets.

pub mod hello;
