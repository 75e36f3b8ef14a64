//! Hugepage memory for DPUs: reserve it, back it, see who holds it, and tell what a front end really shared.
//!
//! A vhost-user daemon works in memory that the front end (QEMU, Cloud Hypervisor, …) shares with it. Backed by
//! hugepages this memory costs fewer TLB misses; it is the fast choice and never a requirement.
//!
//! | module | subject | side effects |
//! |---|---|---|
//! | [`size`] | amounts and page sizes | none |
//! | [`plan`] | request and topology → pages per NUMA node | none |
//! | [`sysfs`] | the kernel's pools and memory figures, under any root | reads, and one write per pool |
//! | [`state`] | record and lock of what was taken | `/run/dpu-hugepages` |
//! | [`reserve`] | take and give back, all or nothing | pools |
//! | [`backing`] | makes memory to share | a memfd |
//! | [`probe`] | what kind of memory a front end shared | maps it, touches nothing |
//! | [`smaps`] | parsers of a process's mappings | none |
//! | [`sys`] | system calls without a safe wrapper; the only `unsafe` | |

pub mod backing;
pub mod cgroup;
pub mod doctor;
pub mod facts;
pub mod mounts;
pub mod persist;
pub mod plan;
pub mod probe;
pub mod qemu;
pub mod qemu_argv;
pub mod reserve;
pub mod size;
pub mod smaps;
pub mod state;
pub mod status;
pub mod sys;
pub mod sysfs;
