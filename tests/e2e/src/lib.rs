//! The emulated DPU: a QEMU guest with a stock Debian kernel that mounts exports of this host through a daemon
//! under test.
//!
//! # Roles
//! `dpu-e2e` is one program with three lives. On the **host** it fetches kernels, starts the daemon and QEMU,
//! gives orders, looks at the export, and judges. In the **DPU** it is init and agent ([`agent`]): it runs what
//! the host orders and reports. On **both** sides it is a tool that performs single file operations
//! ([`verbs`], `dpu-e2e do …`), so that a case can do the same thing on either side and compare.
//!
//! # Code map
//! | Module | Subject |
//! |---|---|
//! | [`cache`], [`apt`], [`kernel`] | artefacts: fetched from Debian, unpacked, kept |
//! | [`suites`] | third-party programs for the DPU |
//! | [`cpio`], [`initramfs`] | the DPU's first root |
//! | [`wire`], [`agent`] | the protocol and its DPU side |
//! | [`dpu`], [`daemon`] | the two processes of a case |
//! | [`side`], [`lab`] | what cases work with |
//! | [`cases`], [`expect`], [`runner`] | the cases, known differences, the score |
//! | [`demo`] | what a newcomer sees |
//! | [`registry`], [`deadline`], [`sys`] | cleaning up, waiting, system calls |
//!
//! # Limits
//! QEMU translates (TCG); KVM is neither needed nor used. Times measured in the DPU say nothing about a real card.

pub mod agent;
pub mod apt;
pub mod cache;
pub mod cases;
pub mod cpio;
pub mod daemon;
pub mod deadline;
pub mod demo;
pub mod dpu;
pub mod expect;
pub mod initramfs;
pub mod kernel;
pub mod lab;
pub mod registry;
pub mod runner;
pub mod side;
pub mod suites;
pub mod sys;
pub mod verbs;
pub mod wire;
