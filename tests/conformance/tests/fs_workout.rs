//! The workout that proved the driver right against the reference daemon, now against ours: every operation, over
//! every kind of ring and memory, in every sandbox mode.

use std::num::NonZeroUsize;

use conformance::export::{Export, Sandbox};
use virtio_driver::device::DeviceOptions;
use virtio_driver::fuse::{DpuKernel, SessionOptions};
use virtio_driver::memory::{Backing, HugepageReservation};
use virtio_driver::ring::Completion;
use virtio_driver::workout::{self, Expectations};

const OURS: Expectations = Expectations { xattr: true, tmpfile: true, identities: true };

fn work_out(sandbox: Sandbox, options: SessionOptions, extra: &[&str]) -> anyhow::Result<()> {
    let mut export = Export::start(sandbox, &[&["--xattr"], extra].concat())?;
    let mut session = export.mount_with(options)?;
    std::fs::remove_dir_all(export.inside("sub"))?;
    std::fs::remove_file(export.inside("witness"))?;
    let outcome = workout::run(&mut session, &export.yard.share(), OURS);
    export.explain(outcome)?;
    std::fs::write(export.inside("witness"), conformance::export::WITNESS)?;
    export.check(&mut session)?;
    export.check_usage()
}

fn options(device: DeviceOptions) -> SessionOptions {
    SessionOptions { device, ..Default::default() }
}

#[test]
fn workout_passes_in_every_sandbox() -> anyhow::Result<()> {
    for sandbox in Sandbox::ALL {
        work_out(sandbox, SessionOptions::default(), &[])?;
    }
    Ok(())
}

#[test]
fn workout_passes_with_polling() -> anyhow::Result<()> {
    let device = DeviceOptions { completion: Completion::Polling, ..Default::default() };
    work_out(Sandbox::None, options(device), &[])
}

#[test]
fn workout_passes_without_indirect_descriptors() -> anyhow::Result<()> {
    work_out(Sandbox::None, options(DeviceOptions { indirect: false, ..Default::default() }), &[])
}

#[test]
fn workout_passes_without_event_idx_on_a_large_ring() -> anyhow::Result<()> {
    let device = DeviceOptions { event_idx: false, ring_size: 1024, ..Default::default() };
    work_out(Sandbox::None, options(device), &[])
}

#[test]
fn workout_passes_polling_a_plain_ring_with_a_memory_table() -> anyhow::Result<()> {
    let device = DeviceOptions {
        event_idx: false,
        indirect: false,
        completion: Completion::Polling,
        memory_slots: false,
        ..Default::default()
    };
    work_out(Sandbox::None, options(device), &[])
}

#[test]
fn workout_passes_as_linux_6_1() -> anyhow::Result<()> {
    let options = SessionOptions { kernel: DpuKernel::V6_1, ..Default::default() };
    work_out(Sandbox::Namespace, options, &[])
}

#[test]
fn workout_passes_over_hugepages() -> anyhow::Result<()> {
    let memory = 64 << 20;
    let pages = NonZeroUsize::new(memory + (4 << 20)).unwrap();
    let _reservation = HugepageReservation::new(pages)?;
    work_out(
        Sandbox::None,
        options(DeviceOptions { backing: Backing::Hugetlb2M, memory, ..Default::default() }),
        &[],
    )
}

#[test]
fn workout_passes_with_four_request_queues() -> anyhow::Result<()> {
    work_out(Sandbox::None, SessionOptions { request_queues: 4, ..Default::default() }, &[])
}

#[test]
fn workout_passes_with_every_cache_policy() -> anyhow::Result<()> {
    for policy in ["auto", "always", "metadata", "never"] {
        work_out(Sandbox::None, SessionOptions::default(), &["--cache", policy])?;
    }
    Ok(())
}

#[test]
fn workout_passes_without_file_handles() -> anyhow::Result<()> {
    work_out(Sandbox::None, SessionOptions::default(), &["--inode-file-handles=never"])
}

#[test]
fn a_session_after_a_disconnect_starts_afresh() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::Namespace, &["--keep-listening"])?;
    for _ in 0..10 {
        let mut session = export.mount()?;
        let client = session.client();
        let node = client.lookup(1, "witness")?.nodeid;
        client.open(node, libc::O_RDONLY)?; // Left open on purpose.
        export.check(&mut session)?;
        drop(session);
    }
    let mut session = export.mount()?;
    export.check(&mut session)?;
    export.check_usage()
}
