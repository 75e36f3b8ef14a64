//! Attacks by the front end (V05, V07, V08): malformed vhost-user messages, impossible rings and memory tables.
//!
//! The daemon may refuse a message or close the connection. It must go on: the next front end mounts and works.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use conformance::export::{Export, Sandbox};
use rustix::event::EventfdFlags;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use virtio_driver::device::{Device, DeviceOptions};
use virtio_driver::frontend::wire::{
    FLAG_NEED_REPLY, FLAG_REPLY, MemRegion, Message, Request, VringAddr, VringState,
};
use virtio_driver::frontend::{Frontend, describe, wire};
use virtio_driver::fuse::abi::{Opcode, ROOT, ReadIn};
use virtio_driver::fuse::{Call, Payload};
use virtio_driver::memory::{Backing, DpuMemory};
use virtio_driver::{Error, Result};
use zerocopy::IntoBytes;

/// A daemon that survives its front ends.
fn listening() -> anyhow::Result<Export> {
    let mut export = Export::start(Sandbox::Namespace, &["--keep-listening"])?;
    let mut session = export.mount()?;
    export.check(&mut session)?;
    Ok(export)
}

/// The next front end finds everything in order.
fn expect_service(export: &mut Export, case: &str) -> anyhow::Result<()> {
    let mut session = export.mount().map_err(|error| error.context(format!("after {case}")))?;
    export.check(&mut session).map_err(|error| error.context(format!("after {case}")))
}

/// Sends one message on a connection of its own that has got no further than connecting.
fn throw(export: &mut Export, case: &str, message: &Message<'_>) -> anyhow::Result<()> {
    let frontend = Frontend::new(export.daemon.connect()?)?;
    match frontend.send_raw(message) {
        Ok(()) | Err(Error::Disconnected { .. }) => Ok(()),
        Err(error) => Err(anyhow::Error::from(error).context(case.to_owned())),
    }
}

/// V07: every request number with payloads of every small size.
#[test]
fn messages_with_impossible_payloads_end_only_their_connection() -> anyhow::Result<()> {
    let mut export = listening()?;
    for request in (0..=50).chain([255, 4711, u32::MAX]) {
        for len in [0, 1, 7, 8, 9, 40, 300] {
            let payload = vec![0xFF; len];
            let message = Message { request, ..Message::new(Request::GetFeatures, &payload) };
            throw(&mut export, &format!("request {request} with {len} bytes"), &message)?;
        }
        expect_service(&mut export, &format!("request {request}"))?;
    }
    export.check_usage()
}

/// V07: header fields that lie.
#[test]
fn headers_that_lie_end_only_their_connection() -> anyhow::Result<()> {
    let mut export = listening()?;
    let payload = 0u64.to_ne_bytes();
    for size in [0, 1, 7, 9, 4096, 1 << 20, u32::MAX] {
        let message = Message { size: Some(size), ..Message::new(Request::SetFeatures, &payload) };
        throw(&mut export, "size", &message)?;
        expect_service(&mut export, &format!("SET_FEATURES that says {size} bytes"))?;
    }
    for flags in [0, 2, 3, 1 | FLAG_REPLY, 1 | FLAG_NEED_REPLY, u32::MAX] {
        for request in [Request::GetFeatures, Request::SetOwner, Request::SetFeatures] {
            let payload = if request == Request::SetFeatures { &payload[..] } else { &[] };
            let message = Message { flags, ..Message::new(request, payload) };
            throw(&mut export, "flags", &message)?;
        }
        expect_service(&mut export, &format!("flags {flags:#x}"))?;
    }
    // Cut off in the middle of the header and of the payload.
    let whole = Message::new(Request::SetFeatures, &payload).to_bytes();
    for len in 0..whole.len() {
        let stream = export.daemon.connect()?;
        wire::send(&stream, &whole[..len], &[], "a cut message")?;
        drop(stream);
    }
    expect_service(&mut export, "messages cut off")?;
    export.check_usage()
}

/// V07: descriptors where none belong, and none where one belongs.
#[test]
fn wrong_numbers_of_descriptors_leak_nothing() -> anyhow::Result<()> {
    let mut export = listening()?;
    let event: OwnedFd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
    let fds = |count: usize| -> Vec<BorrowedFd<'_>> { vec![event.as_fd(); count] };
    let index = 1u64.to_ne_bytes();
    let one_region = [[1, 0].as_bytes(), MemRegion { size: 4096, ..Default::default() }.as_bytes()].concat();
    let requests: [(Request, &[u8]); 7] = [
        (Request::GetFeatures, &[]),
        (Request::SetOwner, &[]),
        (Request::SetFeatures, &index),
        (Request::SetVringKick, &index),
        (Request::SetVringCall, &index),
        (Request::SetMemTable, &one_region),
        (Request::SetVringNum, &index),
    ];
    for (request, payload) in requests {
        for count in [0, 1, 2, 8, 9, 33, 250] {
            let message = Message { fds: fds(count), ..Message::new(request, payload) };
            throw(&mut export, &format!("{request:?} with {count} descriptors"), &message)?;
        }
        expect_service(&mut export, &format!("{request:?} with wrong descriptors"))?;
    }
    // Twenty thousand descriptors on one connection, none of them wanted.
    let frontend = Frontend::new(export.daemon.connect()?)?;
    for _ in 0..100 {
        let message = Message { fds: fds(200), ..Message::new(Request::GetFeatures, &[]) };
        if frontend.send_raw(&message).is_err() || frontend.receive_raw().is_err() {
            break;
        }
    }
    export.check_usage()?;
    drop(frontend);
    expect_service(&mut export, "a flood of descriptors")?;
    export.check_usage()
}

/// A connection as far as features, without memory.
fn negotiated(export: &mut Export) -> anyhow::Result<Device> {
    let memory = DpuMemory::new(1 << 20, Backing::Memfd)?;
    Ok(Device::negotiate(export.daemon.connect()?, DeviceOptions::default(), memory)?)
}

/// An answer that is no trouble: done, refused, or the connection closed.
fn tolerable<T>(result: Result<T>) -> anyhow::Result<()> {
    match result {
        Ok(_) | Err(Error::Refused { .. } | Error::Disconnected { .. } | Error::VhostUser { .. }) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// V07: features that were not offered, steps in the wrong order, rings that do not exist.
#[test]
fn steps_out_of_order_end_only_their_connection() -> anyhow::Result<()> {
    let mut export = listening()?;
    let event: OwnedFd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
    type Step = fn(&mut Frontend, BorrowedFd<'_>) -> Result<()>;
    let steps: [(&str, Step); 16] = [
        ("features never offered", |f, _| f.set_features(u64::MAX)),
        ("no features at all", |f, _| f.set_features(0)),
        ("protocol features never offered", |f, _| f.set_protocol_features(u64::MAX)),
        ("protocol features taken back", |f, _| {
            // Whether this one is still acknowledged is anybody's guess.
            f.send_raw(&Message::new(Request::SetProtocolFeatures, &[0; 8]))?;
            f.send_raw(&Message::new(Request::SetProtocolFeatures, &[0xFF; 8]))
        }),
        ("the owner twice", |f, _| f.set_owner().and_then(|()| f.set_owner())),
        ("status without the feature", |f, _| f.set_status(15)),
        ("a ring that does not exist", |f, _| f.set_vring_num(100, 128)),
        ("the last ring there can be", |f, _| f.set_vring_num(u32::MAX, 128)),
        ("a base without a ring", |f, _| f.get_vring_base(1).map(drop)),
        ("a base of a ring that does not exist", |f, _| f.get_vring_base(u32::MAX).map(drop)),
        ("enabling an empty ring", |f, _| f.set_vring_enable(1, true)),
        ("enabling a ring that does not exist", |f, _| f.set_vring_enable(u32::MAX, true)),
        ("a kick for a ring without addresses", |f, fd| {
            f.set_vring_kick(1, fd)?;
            f.set_vring_enable(1, true)?;
            rustix::io::write(fd, &1u64.to_ne_bytes()).map(drop).map_err(|_| Error::RingFull)
        }),
        ("a kick for a ring that does not exist", |f, fd| f.set_vring_kick(200, fd)),
        ("the base of a ring beyond its size", |f, _| f.set_vring_base(1, u32::MAX)),
        ("a reset before anything", |f, _| f.reset_device()),
    ];
    for (case, step) in steps {
        for with_features in [false, true] {
            if with_features {
                let mut device = negotiated(&mut export)?;
                tolerable(step(device.frontend_mut(), event.as_fd())).map_err(|error| error.context(case))?;
            } else {
                let mut frontend = Frontend::new(export.daemon.connect()?)?;
                tolerable(step(&mut frontend, event.as_fd())).map_err(|error| error.context(case))?;
            }
            expect_service(&mut export, case)?;
        }
    }
    export.check_usage()
}

/// V05: ring sizes and addresses that cannot be, before and while the ring runs.
#[test]
fn impossible_rings_end_only_their_connection() -> anyhow::Result<()> {
    let mut export = listening()?;
    type Change = fn(&Frontend, VringAddr) -> Result<()>;
    let changes: [(&str, Change); 14] = [
        ("size 0", |f, _| f.set_vring_num(1, 0)),
        ("size 3", |f, _| f.set_vring_num(1, 3)),
        ("size 32,768", |f, _| f.set_vring_num(1, 32_768)),
        ("size 65,536", |f, _| f.set_vring_num(1, 65_536)),
        ("size 2^32 - 1", |f, _| f.set_vring_num(1, u32::MAX)),
        ("a smaller size", |f, _| f.set_vring_num(1, 2)),
        ("a table outside memory", |f, a| f.set_vring_addr(VringAddr { descriptor: 4096, ..a })),
        ("a used ring outside memory", |f, a| f.set_vring_addr(VringAddr { used: u64::MAX - 4095, ..a })),
        ("an available ring at 0", |f, a| f.set_vring_addr(VringAddr { available: 0, ..a })),
        ("a used ring that leaves memory", |f, a| {
            f.set_vring_addr(VringAddr { used: a.descriptor + (64 << 20) - 8, ..a })
        }),
        ("a table at an odd address", |f, a| {
            f.set_vring_addr(VringAddr { descriptor: a.descriptor + 1, ..a })
        }),
        ("an available ring at an odd address", |f, a| {
            f.set_vring_addr(VringAddr { available: a.available + 1, ..a })
        }),
        ("all parts at one place", |f, a| {
            f.set_vring_addr(VringAddr { used: a.descriptor, available: a.descriptor, ..a })
        }),
        ("all log flags", |f, a| f.set_vring_addr(VringAddr { flags: u32::MAX, log: u64::MAX, ..a })),
    ];
    for (case, change) in changes {
        for running in [true, false] {
            let mut session = export.mount()?;
            let [descriptor, available, used] = session.clients()[0].ring().addresses();
            let address = VringAddr { index: 1, flags: 0, descriptor, used, available, log: 0 };
            let kick = session.clients()[0].ring().kick_fd().try_clone_to_owned()?;
            let frontend = session.device().frontend();
            let attack = (|| {
                if !running {
                    frontend.get_vring_base(1)?;
                }
                change(frontend, address)?;
                frontend.set_vring_base(1, 0)?;
                frontend.set_vring_kick(1, kick.as_fd())?;
                frontend.set_vring_enable(1, true)
            })();
            tolerable(attack).map_err(|error| error.context(case))?;
            // Whatever the ring is now: it may be kicked.
            rustix::io::write(&kick, &1u64.to_ne_bytes())?;
            let _ = session.device().frontend().get_features();
            drop(session);
            expect_service(&mut export, case)?;
        }
    }
    export.check_usage()
}

/// Descriptors that are no memory.
fn foreign_descriptors() -> anyhow::Result<Vec<(&'static str, OwnedFd)>> {
    let (pipe, _write) = rustix::pipe::pipe()?;
    let read_only = {
        use std::os::fd::AsRawFd;
        let memfd = rustix::fs::memfd_create("read-only", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&memfd, 1 << 20)?;
        let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?
    };
    Ok(vec![
        ("a pipe", pipe),
        ("a directory", rustix::fs::open("/tmp", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?),
        ("/dev/null", rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?),
        ("an O_PATH descriptor", rustix::fs::open("/tmp", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?),
        ("an eventfd", rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?),
        ("memory opened for reading", read_only),
    ])
}

/// V08: memory tables that describe no memory. Each must be refused.
#[test]
fn impossible_memory_tables_are_refused() -> anyhow::Result<()> {
    let mut export = listening()?;
    let memfd = |len: u64| -> anyhow::Result<OwnedFd> {
        let fd = rustix::fs::memfd_create("attack", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&fd, len)?;
        Ok(fd)
    };
    let good = memfd(1 << 20)?;
    let region = MemRegion { gpa: 0x4000_0000, size: 1 << 20, user: 0x7F00_0000_0000, offset: 0 };
    let bent = [
        ("no bytes", MemRegion { size: 0, ..region }),
        ("all bytes there are", MemRegion { size: u64::MAX, ..region }),
        ("a size that leaves the address space", MemRegion { gpa: u64::MAX - 4095, ..region }),
        ("user addresses that wrap", MemRegion { user: u64::MAX - 4095, ..region }),
        ("an offset that overflows", MemRegion { offset: u64::MAX - 4095, ..region }),
        ("an offset within a page", MemRegion { offset: 1, ..region }),
        ("half of all bytes", MemRegion { size: 1 << 63, ..region }),
    ];
    let refused = |case: &str, result: Result<()>| match result {
        Err(Error::Refused { .. } | Error::Disconnected { .. }) => Ok(()),
        Err(error) => Err(anyhow::Error::from(error).context(case.to_owned())),
        Ok(()) => Err(anyhow::anyhow!("{case} was accepted")),
    };
    let table = |regions: &[MemRegion], count: u32| -> Vec<u8> {
        [[count, 0].as_bytes(), regions.as_bytes()].concat()
    };
    let slot = |region: MemRegion| -> Vec<u8> { [0u64.as_bytes(), region.as_bytes()].concat() };

    for (case, region) in bent {
        let device = negotiated(&mut export)?;
        refused(case, device.frontend().send(Request::SetMemTable, &table(&[region], 1), &[good.as_fd()]))?;
        drop(device);
        let device = negotiated(&mut export)?;
        refused(case, device.frontend().send(Request::AddMemReg, &slot(region), &[good.as_fd()]))?;
        drop(device);
        expect_service(&mut export, case)?;
    }
    for (case, fd) in foreign_descriptors()? {
        let device = negotiated(&mut export)?;
        refused(case, device.frontend().send(Request::SetMemTable, &table(&[region], 1), &[fd.as_fd()]))?;
        drop(device);
        let device = negotiated(&mut export)?;
        refused(case, device.frontend().send(Request::AddMemReg, &slot(region), &[fd.as_fd()]))?;
        drop(device);
        expect_service(&mut export, case)?;
    }
    let second = MemRegion { gpa: region.gpa + (1 << 19), user: region.user + (1 << 32), ..region };
    let device = negotiated(&mut export)?;
    let overlap = table(&[region, second], 2);
    refused(
        "a table with an overlap",
        device.frontend().send(Request::SetMemTable, &overlap, &[good.as_fd(); 2]),
    )?;
    drop(device);
    let device = negotiated(&mut export)?;
    device.frontend().send(Request::AddMemReg, &slot(region), &[good.as_fd()])?;
    refused(
        "an overlapping region",
        device.frontend().send(Request::AddMemReg, &slot(second), &[good.as_fd()]),
    )?;
    drop(device);
    expect_service(&mut export, "overlapping regions")?;
    for count in [2, 9, 509, u32::MAX] {
        let device = negotiated(&mut export)?;
        let case = format!("a table that counts {count} regions and has one");
        refused(
            &case,
            device.frontend().send(Request::SetMemTable, &table(&[region], count), &[good.as_fd()]),
        )?;
        drop(device);
        expect_service(&mut export, &case)?;
    }
    export.check_usage()
}

/// V08: more regions than slots, regions that are not there.
#[test]
fn memory_slots_end_and_strangers_are_not_removed() -> anyhow::Result<()> {
    let mut export = listening()?;
    let device = negotiated(&mut export)?;
    let slots = device.frontend().get_max_mem_slots()?;
    assert!((8..=1024).contains(&slots), "{slots} slots");
    let fd = rustix::fs::memfd_create("slots", MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, 4096)?;
    let region = |number: u64| {
        let region = MemRegion {
            gpa: 0x1_0000_0000 + number * 0x10_000,
            size: 4096,
            user: 0x7000_0000_0000 + number * 0x10_000,
            offset: 0,
        };
        [0u64.as_bytes(), region.as_bytes()].concat()
    };
    for number in 0..slots {
        device.frontend().send(Request::AddMemReg, &region(number), &[fd.as_fd()])?;
    }
    let more = device.frontend().send(Request::AddMemReg, &region(slots), &[fd.as_fd()]);
    assert!(matches!(more, Err(Error::Refused { .. } | Error::Disconnected { .. })), "{more:?}");
    drop(device);
    expect_service(&mut export, "more regions than slots")?;

    let device = negotiated(&mut export)?;
    device.frontend().send(Request::AddMemReg, &region(1), &[fd.as_fd()])?;
    let stranger = device.frontend().send(Request::RemMemReg, &region(2), &[]);
    assert!(matches!(stranger, Err(Error::Refused { .. } | Error::Disconnected { .. })), "{stranger:?}");
    drop(device);
    expect_service(&mut export, "the removal of a stranger")?;
    export.check_usage()
}

/// V08: the file behind the payload shrinks while it is mapped. The request fails, the queue goes on.
#[test]
fn a_payload_whose_memory_is_gone_is_an_error_reply() -> anyhow::Result<()> {
    let mut export = listening()?;
    let mut session = export.mount()?;
    let client = session.client();
    let node = client.lookup(ROOT, "witness")?.nodeid;
    let fh = client.open(node, libc::O_RDONLY)?.fh;
    let region = session.device().plug_memory(1 << 20)?;
    let args = ReadIn { fh, size: 4096, ..Default::default() };
    let parts = [args.as_bytes()];
    let call = Call::new(Opcode::Read, node, &parts, 0).payload(Payload::FromDevice(4096)).variable();
    let request = session.client().prepare_in(&region, &call)?;
    rustix::fs::ftruncate(region.fd(), 0)?;
    let head = {
        request.set_unique(77);
        let ring = session.client().ring_mut();
        let head = ring.submit(request.chain())?;
        let used = ring.wait_used(std::time::Duration::from_secs(5))?;
        assert_eq!(used.head, head);
        used
    };
    assert!(request.reply_header().error < 0 || head.len == 0, "{:?}", request.reply_header());
    // The pages are gone for this process too: they must not be looked at again.
    rustix::fs::ftruncate(region.fd(), 1 << 20)?;
    drop(request);
    export.check(&mut session)?;
    session.device().unplug_memory(&region)?;
    export.check(&mut session)
}

/// V08: the file behind everything shrinks while requests wait. The daemon survives.
#[test]
fn a_front_end_that_takes_its_memory_away_ends_only_its_connection() -> anyhow::Result<()> {
    let mut export = listening()?;
    for round in 0..5 {
        let mut session = export.mount()?;
        let client = session.client();
        let requests: Vec<_> = (0..round + 1)
            .map(|_| {
                let request = client.prepare(&Call::new(Opcode::Getattr, ROOT, &[&[0; 16]], 104))?;
                client.ring_mut().add(request.chain())?;
                Ok(request)
            })
            .collect::<Result<Vec<_>>>()?;
        client.ring_mut().publish();
        let regions = session.device().memory().regions();
        for region in &regions {
            rustix::fs::ftruncate(region.fd(), 0)?;
        }
        // From here on this process must not touch the memory either: a kick is a system call.
        session.client().ring_mut().kick()?;
        session.client().ring_mut().kick()?;
        let alive = session.device().frontend().get_features();
        tolerable(alive)?;
        drop(requests);
        drop(session);
        expect_service(&mut export, "memory that went away")?;
    }
    export.check_usage()
}

/// V07: connections in great number, closed at every stage.
#[test]
fn connections_come_and_go_at_every_stage() -> anyhow::Result<()> {
    let mut export = listening()?;
    for _ in 0..200 {
        drop(export.daemon.connect()?);
        Frontend::new(export.daemon.connect()?)?.get_features()?;
        drop(negotiated(&mut export)?);
        let memory = DpuMemory::new(1 << 20, Backing::Memfd)?;
        let device =
            Device::negotiate(export.daemon.connect()?, DeviceOptions::default(), Arc::clone(&memory))?;
        device.share_memory()?;
        let ring = device.new_ring()?;
        let [descriptor, available, used] = ring.addresses();
        device.frontend().set_vring_num(0, 128)?;
        device.frontend().set_vring_addr(VringAddr {
            index: 0,
            descriptor,
            available,
            used,
            ..Default::default()
        })?;
        let region = &memory.regions()[0];
        assert_eq!(describe(region).size, 1 << 20);
        let base = VringState { index: 0, num: 0 };
        device.frontend().send(Request::SetVringBase, base.as_bytes(), &[])?;
    }
    expect_service(&mut export, "many connections")?;
    export.check_usage()
}
