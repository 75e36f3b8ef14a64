//! `backend-fs`: a vhost-user virtio-fs device that exports a host directory to a DPU.
//!
//! A request flows down once and its value comes back up:
//! `vring` (kick, chain) → [`fuse`] (bytes to request) → [`filesystem`] (the API boundary) →
//! [`host`] (system calls) → reply → `vring` (used ring, signal).

pub mod args;
pub mod capabilities_json;
pub mod config;
pub mod daemon;
pub mod device;
pub mod filesystem;
pub mod fuse;
pub mod host;
pub mod limits;
pub mod listener;
pub mod logging;
pub mod offload;
pub mod sandbox;
pub mod worker;
