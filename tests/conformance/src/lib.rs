//! What the conformance tests share: a real daemon with an export, and a witness that nothing outside it changed.
//!
//! A test starts an [`export::Export`], mounts it through the `virtio-driver`, attacks, and then asks the export
//! whether all is well: the daemon runs and serves, nothing outside the export changed, and its descriptors and
//! memory are within limits. The daemon under test is the one that `BACKEND_FS` names, by default the release build.
//! A test of sockets starts a [`mux::Mux`]; its daemon is the one that `BACKEND_VSOCK_UDS` names.

pub mod export;
pub mod mux;
pub mod race;
pub mod snapshot;
