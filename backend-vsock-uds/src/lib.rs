//! `backend-vsock-uds`: a vhost-user virtio-vsock device that muxes Unix sockets of the host.
//!
//! | module | job |
//! |---|---|
//! | [`packet`] | packet headers; pure |
//! | [`host`] | the Unix socket side: greeting of host programs |
//! | [`conn`] | one connection: state machine and credit; pure |

pub mod conn;
pub mod host;
pub mod packet;
