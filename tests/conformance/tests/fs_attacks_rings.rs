//! Attacks on the rings (V01 to V06, V09): chains and indices that no driver makes.
//!
//! A chain that is wrong in itself must come back, exactly once, and the ring goes on. A ring that contradicts itself
//! may stop; then it must start again when the driver sets it up anew, and nothing else may suffer.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use conformance::export::{Export, Sandbox};
use conformance::race::race;
use rustix::event::EventfdFlags;
use virtio_driver::Error;
use virtio_driver::device::DeviceOptions;
use virtio_driver::fuse::abi::*;
use virtio_driver::fuse::{Call, Payload, Session, SessionOptions};
use virtio_driver::hostile::{Attacker, linked, message};
use virtio_driver::memory::DpuBuffer;
use virtio_driver::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, RawDescriptor};
use zerocopy::IntoBytes;

/// A request that would be answered if its chain were right, and room for the answer.
struct Parts {
    request: DpuBuffer,
    reply: DpuBuffer,
}

impl Parts {
    fn new(attacker: &Attacker<'_>) -> anyhow::Result<Self> {
        let request = attacker.buffer(&message(Opcode::Getattr as u32, ROOT, &[0; 16], None))?;
        Ok(Parts { request, reply: attacker.reply_buffer(4096)? })
    }

    fn readable(&self) -> (u64, u32, bool) {
        (self.request.gpa(), self.request.len() as u32, false)
    }

    fn writable(&self) -> (u64, u32, bool) {
        (self.reply.gpa(), 120, true)
    }
}

/// What a bent chain looks like: from parts, slots and a hole in memory to table entries.
type Bend = fn(&Parts, &[u16], u64) -> Vec<RawDescriptor>;

fn raw(addr: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor { addr, len, flags, next }
}

/// V01 and V02: chains that are wrong in themselves.
const BENT: &[(&str, usize, Bend)] = &[
    ("the first entry is next of itself", 1, |p, s, _| vec![raw(p.request.gpa(), 56, DESC_NEXT, s[0])]),
    ("two entries are next of each other", 2, |p, s, _| {
        vec![raw(p.request.gpa(), 56, DESC_NEXT, s[1]), raw(p.reply.gpa(), 120, DESC_NEXT | DESC_WRITE, s[0])]
    }),
    ("the next entry is beyond the table", 1, |p, _, _| vec![raw(p.request.gpa(), 56, DESC_NEXT, 1024)]),
    ("the next entry is 65,535", 1, |p, _, _| vec![raw(p.request.gpa(), 56, DESC_NEXT, u16::MAX)]),
    ("readable behind writable", 2, |p, s, _| {
        linked(&[(p.reply.gpa(), 120, true), (p.request.gpa(), 56, false)], s)
    }),
    ("an entry without bytes", 3, |p, s, _| {
        linked(&[p.readable(), (p.reply.gpa(), 0, true), p.writable()], s)
    }),
    ("only an entry without bytes", 1, |p, s, _| linked(&[(p.request.gpa(), 0, false)], s)),
    ("lengths that sum up beyond 4 GiB", 3, |p, s, _| {
        linked(&[p.readable(), (p.reply.gpa(), u32::MAX, true), (p.reply.gpa(), u32::MAX, true)], s)
    }),
    ("a request in a hole", 2, |p, s, hole| linked(&[(hole, 56, false), p.writable()], s)),
    ("a reply in a hole", 2, |p, s, hole| linked(&[p.readable(), (hole, 120, true)], s)),
    ("a request at address 0", 2, |p, s, _| linked(&[(0, 56, false), p.writable()], s)),
    ("a reply at the end of all addresses", 2, |p, s, _| linked(&[p.readable(), (u64::MAX, 120, true)], s)),
    ("a reply that wraps around", 2, |p, s, _| linked(&[p.readable(), (u64::MAX - 15, 120, true)], s)),
    ("a request that leaves its region", 2, |p, s, hole| {
        // The hole starts 64 KiB behind the region.
        linked(&[(hole - 65_536 - 8, 56, false), p.writable()], s)
    }),
    ("an indirect table in a hole", 1, |_, _, hole| vec![raw(hole, 32, DESC_INDIRECT, 0)]),
    ("an indirect table of 0 bytes", 1, |p, _, _| vec![raw(p.request.gpa(), 0, DESC_INDIRECT, 0)]),
    ("an indirect table of 17 bytes", 1, |p, _, _| vec![raw(p.request.gpa(), 17, DESC_INDIRECT, 0)]),
    ("an indirect table of 4 GiB", 1, |p, _, _| vec![raw(p.request.gpa(), u32::MAX, DESC_INDIRECT, 0)]),
    ("an indirect table with a next entry", 2, |p, s, _| {
        vec![
            raw(p.request.gpa(), 48, DESC_INDIRECT | DESC_NEXT, s[1]),
            raw(p.reply.gpa(), 120, DESC_WRITE, 0),
        ]
    }),
    ("an indirect table that is writable", 1, |p, _, _| {
        vec![raw(p.request.gpa(), 48, DESC_INDIRECT | DESC_WRITE, 0)]
    }),
];

/// The bent chain must come back once; then the same ring must serve.
fn expect_disposed(export: &mut Export, session: &mut Session, case: &str) -> anyhow::Result<()> {
    let used = Attacker::new_in_flight(session.client()).wait();
    let used = export.explain(used).map_err(|error| error.context(case.to_owned()))?;
    assert!(used.len <= 136, "{case}: {used:?}");
    for _ in 0..3 {
        session.client().getattr(ROOT, None).map_err(|error| anyhow::anyhow!("after {case}: {error}"))?;
    }
    Ok(())
}

#[test]
fn chains_that_are_wrong_in_themselves_come_back_once() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    for (case, count, bend) in BENT {
        let mut attacker = Attacker::new(session.client());
        let (parts, hole) = (Parts::new(&attacker)?, attacker.hole());
        attacker.submit_entries(*count, |slots| bend(&parts, slots, hole))?;
        expect_disposed(&mut export, &mut session, case)?;
    }
    export.check(&mut session)?;
    export.check_memory()
}

/// V03: what an indirect table may not hold.
#[test]
fn indirect_tables_are_checked_like_the_ring_itself() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    type Table = fn(&Parts, u64) -> Vec<RawDescriptor>;
    let tables: [(&str, Table); 8] = [
        ("a table within a table", |p, table| {
            vec![raw(table, 16, DESC_INDIRECT, 0), raw(p.reply.gpa(), 120, DESC_WRITE, 0)]
        }),
        ("a nested table behind a buffer", |p, table| {
            vec![raw(p.request.gpa(), 56, DESC_NEXT, 1), raw(table, 32, DESC_INDIRECT, 0)]
        }),
        ("a loop in the table", |p, _| {
            vec![raw(p.request.gpa(), 56, DESC_NEXT, 1), raw(p.reply.gpa(), 120, DESC_NEXT | DESC_WRITE, 0)]
        }),
        ("a next beyond the table", |p, _| {
            vec![raw(p.request.gpa(), 56, DESC_NEXT, 2), raw(p.reply.gpa(), 120, DESC_WRITE, 0)]
        }),
        ("a next of 65,535", |p, _| vec![raw(p.request.gpa(), 56, DESC_NEXT, u16::MAX)]),
        ("addresses in a hole", |p, _| {
            vec![raw(p.request.gpa(), 56, DESC_NEXT, 1), raw(1 << 60, 120, DESC_WRITE, 0)]
        }),
        ("more entries than the ring", |p, _| {
            (0..2048u16)
                .map(|n| raw(p.request.gpa(), 1, if n < 2047 { DESC_NEXT } else { 0 }, n + 1))
                .collect()
        }),
        ("the longest table there can be", |p, _| {
            (0..65_535u16)
                .map(|n| raw(p.reply.gpa(), 1, DESC_WRITE | if n < 65_534 { DESC_NEXT } else { 0 }, n + 1))
                .collect()
        }),
    ];
    for (case, fill) in tables {
        let mut attacker = Attacker::new(session.client());
        let parts = Parts::new(&attacker)?;
        let table = attacker.reply_buffer(1 << 20)?;
        let entries = fill(&parts, table.gpa());
        for (index, entry) in entries.iter().enumerate() {
            table.put(16 * index, entry);
        }
        let len = 16 * entries.len() as u32;
        attacker.submit_entries(1, |_| vec![raw(table.gpa(), len, DESC_INDIRECT, 0)])?;
        expect_disposed(&mut export, &mut session, case)?;
    }
    export.check(&mut session)
}

/// V03: a table where the feature was not negotiated.
#[test]
fn indirect_tables_without_the_feature_are_refused() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let device = DeviceOptions { indirect: false, ..Default::default() };
    let mut session = export.mount_with(SessionOptions { device, ..Default::default() })?;
    let mut attacker = Attacker::new(session.client());
    let parts = Parts::new(&attacker)?;
    let table = attacker.reply_buffer(32)?;
    table.put(0, &raw(parts.request.gpa(), 56, DESC_NEXT, 1));
    table.put(16, &raw(parts.reply.gpa(), 120, DESC_WRITE, 0));
    attacker.submit_entries(1, |_| vec![raw(table.gpa(), 32, DESC_INDIRECT, 0)])?;
    expect_disposed(&mut export, &mut session, "a table without the feature")?;
    export.check(&mut session)
}

/// V02: the reply goes into the ring itself. The ring is the DPU's to break; the daemon must survive it.
#[test]
fn replies_into_the_ring_break_only_the_ring() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    for part in 0..3 {
        let mut attacker = Attacker::new(session.client());
        let parts = Parts::new(&attacker)?;
        let target = attacker.ring_addresses()[part];
        attacker
            .submit(&[Descriptor::readable(parts.request.gpa(), 56), Descriptor::writable(target, 120)])?;
        // Anything may come of it except the end of the daemon.
        match attacker.wait() {
            Ok(_) | Err(Error::RingProtocol(_) | Error::Timeout { .. }) => {}
            Err(error) => return export.explain(Err(error)),
        }
        session.restart_queue(0)?;
        export.check(&mut session)?;
    }
    Ok(())
}

/// V04: indices and heads that contradict the ring.
#[test]
fn a_ring_that_contradicts_itself_can_be_set_up_again() -> anyhow::Result<()> {
    type Break = fn(&mut Attacker<'_>) -> virtio_driver::Result<()>;
    let breaks: [(&str, Break); 9] = [
        ("the available index jumps by 1,025", |a| a.jump_available_index(1025)),
        ("the available index jumps by 5,000", |a| a.jump_available_index(5_000)),
        ("the available index jumps by 32,768", |a| a.jump_available_index(32_768)),
        ("the available index goes back by 1", |a| a.jump_available_index(u16::MAX)),
        ("the available index goes back by 1,000", |a| a.jump_available_index(64_536)),
        ("a head beyond the table", |a| a.make_heads_available(&[1024])),
        ("a head of 65,535", |a| a.make_heads_available(&[u16::MAX])),
        ("one head three times", |a| a.make_heads_available(&[5, 5, 5])),
        ("a ring full of the same empty head", |a| a.make_heads_available(&[0; 1024])),
    ];
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount_with(SessionOptions {
        request_queues: 2,
        device: DeviceOptions { ring_size: 1024, ..Default::default() },
        ..Default::default()
    })?;
    for (case, break_ring) in breaks {
        break_ring(&mut Attacker::new(session.client()))?;
        // The other queue does not notice.
        let other = session.clients()[1].getattr(ROOT, None);
        export.explain(other).map_err(|error| error.context(case))?;
        session.restart_queue(0).map_err(|error| anyhow::anyhow!("{case}: {error}"))?;
        export.check(&mut session).map_err(|error| error.context(case))?;
    }
    export.check_usage()
}

/// V04: the table changes while the daemon walks it.
#[test]
fn a_table_that_changes_while_it_is_walked_does_no_harm() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount_polling()?;
    let mut rounds = 0u32;
    {
        let mut attacker = Attacker::new(session.client());
        let parts = Parts::new(&attacker)?;
        let hole = attacker.hole();
        let table = attacker.reply_buffer(16 * 8)?;
        let good = [
            raw(parts.request.gpa(), 56, DESC_NEXT, 1),
            raw(parts.reply.gpa(), 16, DESC_NEXT | DESC_WRITE, 2),
            raw(parts.reply.gpa() + 16, 104, DESC_WRITE, 0),
        ];
        let evil = [
            raw(parts.request.gpa(), u32::MAX, DESC_NEXT, 7),
            raw(hole, 16, DESC_NEXT, 0),
            raw(table.gpa(), 128, DESC_INDIRECT | DESC_NEXT | DESC_WRITE, 1),
        ];
        table.write(0, good.as_bytes());
        let swap = || {
            for (index, entry) in evil.iter().enumerate() {
                table.put(16 * index, entry);
            }
            table.write(0, good.as_bytes());
        };
        let outcome = race(vec![Box::new(swap)], || -> anyhow::Result<()> {
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(1500) {
                attacker.submit_entries(1, |_| vec![raw(table.gpa(), 48, DESC_INDIRECT, 0)])?;
                attacker.wait()?;
                rounds += 1;
            }
            Ok(())
        });
        export.explain(outcome)?;
    }
    assert!(rounds > 100, "only {rounds} rounds");
    export.check(&mut session)?;
    export.check_usage()
}

/// V06: kicks without end and without buffers.
#[test]
fn a_flood_of_kicks_is_only_noise() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let mut attacker = Attacker::new(session.client());
    for _ in 0..500_000 {
        attacker.kick()?;
    }
    export.check(&mut session)?;
    export.check_usage()
}

/// V06: call descriptors that cannot be signalled. The daemon must neither block nor end.
#[test]
fn a_call_descriptor_that_blocks_does_not_stop_the_queue() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount_polling()?;
    let full: OwnedFd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?;
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes())?;
    let (reader, closed_pipe) = rustix::pipe::pipe()?;
    drop(reader);
    let (_reader, full_pipe) = rustix::pipe::pipe()?;
    rustix::io::ioctl_fionbio(&full_pipe, true)?;
    while rustix::io::write(&full_pipe, &[0; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&full_pipe, false)?;
    let (socket, peer) = std::os::unix::net::UnixStream::pair()?;
    drop(peer);
    let directory: OwnedFd = std::fs::File::open("/proc/self")?.into();
    let null: OwnedFd = std::fs::File::open("/dev/null")?.into();
    let calls = [
        ("a full eventfd", full.as_fd()),
        ("a pipe without reader", closed_pipe.as_fd()),
        ("a full pipe", full_pipe.as_fd()),
        ("a socket without peer", socket.as_fd()),
        ("a directory", directory.as_fd()),
        ("/dev/null opened for reading", null.as_fd()),
    ];
    let frontend_refuses = |error: &Error| matches!(error, Error::Refused { .. });
    for (case, call) in calls {
        match session.device().frontend().set_vring_call(1, call) {
            Ok(()) => {}
            Err(error) if frontend_refuses(&error) => continue,
            Err(error) => return export.explain(Err(error)).map_err(|error| error.context(case)),
        }
        let client = session.client();
        // Interrupts stay wanted, so that the daemon has a reason to signal each time.
        client.ring_mut().keep_interrupts(true);
        for _ in 0..200 {
            client.getattr(ROOT, None).map_err(|error| anyhow::anyhow!("with {case} to call: {error}"))?;
        }
    }
    session.restart_queue(0)?;
    export.check(&mut session)
}

/// V09: memory comes and goes while requests are under way.
#[test]
fn memory_changes_during_traffic_lose_no_request() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    std::fs::write(export.inside("traffic"), vec![7; 1 << 20])?;
    let mut session = export.mount_with(SessionOptions {
        request_queues: 2,
        device: DeviceOptions { ring_size: 1024, ..Default::default() },
        ..Default::default()
    })?;
    let node = session.client().lookup(ROOT, "traffic")?.nodeid;
    let fh = session.client().open(node, libc::O_RDONLY)?.fh;
    let (device, mut clients) = session.split();
    let mut changes = 0;
    let mut failure = None;
    std::thread::scope(|scope| {
        let workers: Vec<_> = clients
            .iter_mut()
            .map(|client| {
                scope.spawn(move || -> anyhow::Result<()> {
                    let start = Instant::now();
                    while start.elapsed() < Duration::from_secs(2) {
                        let args = ReadIn { fh, size: 256 << 10, ..Default::default() };
                        let parts = [args.as_bytes()];
                        let call = Call::new(Opcode::Read, node, &parts, 0);
                        let call = call.payload(Payload::FromDevice(256 << 10)).variable();
                        let tickets: Vec<_> =
                            (0..4).map(|_| client.submit(&call)).collect::<Result<_, _>>()?;
                        for ticket in tickets {
                            let body = client.wait(ticket)?.ok()?;
                            anyhow::ensure!(body.len() == 256 << 10 && body.iter().all(|byte| *byte == 7));
                        }
                    }
                    Ok(())
                })
            })
            .collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            let change = device.plug_memory(2 << 20).and_then(|region| device.unplug_memory(&region));
            failure = failure.take().or(change.err().map(anyhow::Error::from));
            changes += 1;
        }
        for worker in workers {
            failure = failure.take().or(worker.join().unwrap().err());
        }
    });
    if let Some(failure) = failure {
        return export.explain(Err(failure));
    }
    assert!(changes > 20, "only {changes} changes");
    export.check_alive()?;
    export.check_usage()
}
