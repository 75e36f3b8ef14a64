//! `backend-vsock-uds`: a vhost-user virtio-vsock device that muxes Unix sockets of the host.
//!
//! | module | job |
//! |---|---|
//! | [`packet`] | packet headers; pure |
//! | [`conn`] | one connection: state machine, credit, bytes that wait for the host; pure |
//! | [`mux`] | the connections of one DPU: table, turns, deadlines; pure |
//! | [`route`] | which port leads to which host socket; pure |
//! | [`host`] | the Unix socket side: greeting of host programs |

pub mod conn;
pub mod host;
pub mod mux;
pub mod packet;
pub mod route;
