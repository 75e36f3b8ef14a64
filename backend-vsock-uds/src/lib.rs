//! `backend-vsock-uds`: a vhost-user virtio-vsock device that muxes Unix sockets of the host.
//!
//! A packet flows down once: `vring` (kick, chain) → [`worker`] (one thread per DPU) → [`mux`] (which
//! connection) → [`conn`] (what follows) → [`host`] (the Unix socket). Bytes of host programs go back the
//! same way.
//!
//! | module | job |
//! |---|---|
//! | [`packet`] | packet headers; pure |
//! | [`conn`] | one connection: state machine, credit, bytes that wait for the host; pure |
//! | [`route`] | which port leads to which host socket; pure |
//! | [`mux`] | the connections of one DPU: table, turns, deadlines, sockets |
//! | [`host`] | Unix sockets of host programs, and their greeting |
//! | [`siblings`] | DPUs of one process that may connect to each other |
//! | [`worker`] | the thread that serves the queues of one DPU |
//! | [`device`] | the device as the front end sees it |
//! | [`daemon`] | start, isolation ([`sandbox`]), front ends that come and go, end |
//! | [`args`], [`config`], [`listener`], [`logging`] | command line, what it means, sockets, log |

pub mod args;
pub mod config;
pub mod conn;
pub mod daemon;
pub mod device;
pub mod host;
pub mod listener;
pub mod logging;
pub mod mux;
pub mod packet;
pub mod route;
pub mod sandbox;
pub mod siblings;
pub mod worker;
