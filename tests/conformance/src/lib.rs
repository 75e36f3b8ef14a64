//! What the conformance tests share: a real daemon with an export, and a witness that nothing outside it changed.
//!
//! A test starts an [`export::Export`], mounts it through the `virtio-driver`, attacks, and then asks the export
//! whether all is well: the daemon runs and serves, nothing outside the export changed, and its descriptors and
//! memory are within limits. The daemon under test is the one that `BACKEND_FS` names, by default the release build.
//! A test of sockets starts a [`mux::Mux`]; its daemon is the one that `BACKEND_VSOCK_UDS` names.
//!
//! | tests | what they show |
//! |---|---|
//! | `fs_workout` | every operation works, over every kind of ring, memory, sandbox and cache policy |
//! | `fs_attacks_names` | F01 to F05, F17: names, symlinks, directories that move, races |
//! | `fs_attacks_nodes` | F06 to F10, F18, F19: special files, set-id bits, attributes, ids, mappings, read-only |
//! | `fs_attacks_resources` | F11 to F13: limits, listings under pressure, stale and foreign references |
//! | `fs_attacks_messages` | F14 to F17: malformed messages and buffers |
//! | `fs_attacks_rings` | V01 to V04, V06, V09: chains, tables and indices that no driver makes |
//! | `fs_attacks_frontend` | V05, V07, V08: vhost-user messages, rings and memory that cannot be |
//! | `vsock_streams` | bytes both ways through the mux, in every ring mode; no state keeps the processor busy |
//! | `vsock_life` | DPUs that come, go, pause, reboot and meet; S01 to S05, S11, S12: hostile packets, records, resets |
//!
//! F, S and V are the attack classes for file servers, for sockets, and for rings and front ends in the project's threat list.

pub mod answers;
pub mod export;
pub mod mux;
pub mod race;
pub mod snapshot;
