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
//! | [`status`] | the pools and who holds their pages | reads |
//! | [`mounts`] | hugetlbfs mounts | mounts |
//! | [`backing`] | makes memory to share | a memfd |
//! | [`probe`] | what kind of memory a front end shared | maps it, touches nothing |
//! | [`qemu`] | the lines for QEMU and libvirt | none |
//! | [`qemu_argv`] | mistakes in a running QEMU's arguments | none |
//! | [`persist`] | reservations that outlive a boot | files in `/etc` |
//! | [`facts`], [`doctor`] | looks at the machine; judges it | reads; none |
//! | [`cgroup`], [`smaps`] | limits of control groups; a process's mappings | reads; none |
//! | [`sys`] | system calls without a safe wrapper; the only `unsafe` | |
//!
//! Arrows go up this table. The binary (`main.rs`, `args.rs`, `commands.rs`, `tables.rs`) only reads values, calls
//! the library and prints. No module writes to the terminal, none ends the process, and none calls back: a long
//! operation is stepped by its caller ([`reserve::Reservation::step`]).
//!
//! A daemon needs one call:
//!
//! ```no_run
//! # use std::os::fd::BorrowedFd;
//! # fn region(fd: BorrowedFd<'_>, offset: u64, size: u64, front_end: Option<i32>) -> Result<(), hugepages::probe::NotShared> {
//! use hugepages::probe::{Region, probe_region};
//!
//! let kind = probe_region(Region { fd, offset, size, front_end })?;
//! println!("{kind}"); // DPU memory: 4 GiB shared, memfd on hugepages of 2M, NUMA node 0, sealed
//! # Ok(())
//! # }
//! ```

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
