//! Plays VMM and DPU driver against any vhost-user daemon, without a VM.
//!
//! What a real system spreads over QEMU and the DPU's kernel happens here in one process, so that a test or a
//! benchmark sees every byte the daemon sees, and can send bytes no kernel would send.
//!
//! | module | plays | what it does |
//! |---|---|---|
//! | [`daemon`] | the management tool | starts a real daemon process, waits for its socket, watches and ends it |
//! | [`frontend`] | the VMM | vhost-user messages, well-formed or not |
//! | [`memory`] | the DPU's RAM | memfd or hugetlb regions with an allocator inside |
//! | [`ring`] | the DPU's virtio core | driver side of a split virtqueue, with strict checks of what the device does |
//! | [`device`] | VMM and virtio core | negotiation, memory table, ring set-up: from a socket to running rings |
//! | [`fuse`] | the DPU's virtio-fs driver | typed FUSE client whose chains look like Linux's |
//! | [`vsock`] | the DPU's virtio-vsock driver and its sockets | packets and connections as Linux makes them |
//! | [`hostile`] | an attacker in the DPU | descriptor tables and ring states that no driver makes |
//! | [`workout`] | an application in the DPU | a full round of file operations with checked results |
//! | [`wait`] | – | waiting for a condition with a deadline |
//!
//! The crate shares no code with the daemons under test: structures and constants are written down a second time,
//! so that a mistake in one place shows as a failing test and not as two ends that agree on it.
//!
//! A new device type gets its own module beside [`fuse`] and builds on [`device`], [`ring`] and [`memory`].

pub mod daemon;
pub mod device;
mod error;
pub mod frontend;
pub mod fuse;
pub mod hostile;
pub mod memory;
pub mod ring;
pub mod vsock;
pub mod wait;
pub mod workout;

pub use error::{Error, Result};
