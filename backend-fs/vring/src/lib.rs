//! Device side of a vhost-user device: everything between a connected front end and the descriptor
//! chains that a device serves.
//!
//! | module | job |
//! |---|---|
//! | [`message`] | vhost-user bytes to requests and back; pure |
//! | `connection` | the front end's socket: whole messages, file descriptors, waits that can be ended |
//! | [`session`] | one front end: negotiation, ring and memory set-up, start and stop of queues |
//! | [`memory`] | the DPU memory the front end shared; address translation, dirty log |
//! | [`sigbus`] | a front end that takes shared memory away again does not kill the daemon |
//! | [`ring`] | one split virtqueue: pop chains, push used entries, notification suppression |
//! | [`chain`] | one descriptor chain: bounded copies in and out, slices for vectored I/O |
//! | [`poll`] | how long a queue worker spins before it sleeps; pure |
//!
//! Calls go down (`session` owns `memory`, hands [`ring::Ring`]s to the device); nothing here knows
//! FUSE or vsock.

pub mod chain;
mod connection;
pub mod memory;
pub mod message;
pub mod poll;
pub mod ring;
pub mod session;
pub mod sigbus;
