//! Queues and memory: depth, overlap, hotplug, several request queues.

use std::collections::HashMap;

use zerocopy::IntoBytes;

use super::{Bench, Problem, Step, ensure, pattern, same, same_bytes};
use crate::fuse::abi::{InitOut, Opcode, ROOT, ReadIn, WriteIn, WriteOut};
use crate::fuse::request::{Call, Payload};
use crate::fuse::{Client, Ticket};
use crate::memory::PAGE;

pub(super) fn init_answers_sane_limits(b: &mut Bench<'_>) -> Step {
    let InitOut { minor, max_write, max_pages, time_gran, .. } = b.session.init();
    ensure(&format!("protocol 7.{minor} is 7.27 or later"), minor >= 27)?;
    ensure(&format!("max_write {max_write} is at least 128 KiB"), max_write >= 128 << 10)?;
    ensure(
        &format!("max_pages {max_pages} hold max_write"),
        u32::from(max_pages) * PAGE as u32 >= max_write,
    )?;
    ensure(&format!("time granularity {time_gran} ns"), (1..=1_000_000_000).contains(&time_gran))
}

fn read_call_args(handle: u64, offset: u64, size: usize) -> ReadIn {
    ReadIn { fh: handle, offset, size: size as u32, ..Default::default() }
}

fn submit_read(client: &mut Client, node: u64, args: ReadIn) -> crate::Result<Ticket> {
    let parts = [args.as_bytes()];
    let call = Call::new(Opcode::Read, node, &parts, 0);
    client.submit(&call.payload(Payload::FromDevice(args.size as usize)).variable())
}

pub(super) fn many_requests_in_flight(b: &mut Bench<'_>) -> Step {
    const BLOCKS: u64 = 400;
    let data = pattern(BLOCKS as usize * PAGE, 11);
    std::fs::write(b.host("deep"), &data)?;
    let node = b.client().lookup(ROOT, "deep")?.nodeid;
    let handle = b.client().open(node, libc::O_RDONLY)?.fh;
    let client = b.client();
    let mut wanted: HashMap<Ticket, u64> = HashMap::new();
    for block in 0..BLOCKS {
        let block = block * 7 % BLOCKS; // Not in file order.
        let ticket = submit_read(client, node, read_call_args(handle, block * PAGE as u64, PAGE))?;
        wanted.insert(ticket, block);
    }
    while !wanted.is_empty() {
        let (ticket, reply) = client.wait_any()?;
        let Some(block) = wanted.remove(&ticket) else {
            return Err(Problem("a reply to nothing".into()));
        };
        let want = &data[block as usize * PAGE..][..PAGE];
        same_bytes(&format!("block {block}"), &reply.ok()?, want)?;
    }
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "deep")?)
}

pub(super) fn large_transfers_overlap(b: &mut Bench<'_>) -> Step {
    const PIECES: usize = 8;
    let size = b.client().max_payload();
    let data = pattern(PIECES * size, 12);
    let file = b.client().create(ROOT, "large", libc::O_RDWR, 0o600)?;
    let (node, handle) = (file.entry.nodeid, file.open.fh);
    let client = b.client();
    let mut tickets = Vec::new();
    for (index, piece) in data.chunks(size).enumerate() {
        let args =
            WriteIn { fh: handle, offset: (index * size) as u64, size: size as u32, ..Default::default() };
        let parts = [args.as_bytes()];
        let call = Call::new(Opcode::Write, node, &parts, size_of::<WriteOut>());
        tickets.push(client.submit(&call.payload(Payload::ToDevice(piece)))?);
    }
    for ticket in tickets.drain(..) {
        let body = client.wait(ticket)?.ok()?;
        same("bytes written", &body[..4], &(size as u32).to_ne_bytes()[..])?;
    }
    for index in 0..PIECES {
        tickets.push(submit_read(client, node, read_call_args(handle, (index * size) as u64, size))?);
    }
    for (ticket, piece) in tickets.into_iter().zip(data.chunks(size)) {
        same_bytes("piece", &client.wait(ticket)?.ok()?, piece)?;
    }
    same_bytes("file on the host", &std::fs::read(b.host("large"))?, &data)?;
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "large")?)
}

pub(super) fn memory_comes_and_goes(b: &mut Bench<'_>) -> Step {
    let data = pattern(3 * PAGE, 13);
    std::fs::write(b.host("plugged"), &data)?;
    let node = b.client().lookup(ROOT, "plugged")?.nodeid;
    let handle = b.client().open(node, libc::O_RDONLY)?.fh;
    let region = b.session.device().plug_memory(4 << 20)?;
    {
        let args = read_call_args(handle, 0, data.len());
        let parts = [args.as_bytes()];
        let call = Call::new(Opcode::Read, node, &parts, 0);
        let call = call.payload(Payload::FromDevice(data.len())).variable();
        let request = b.client().prepare_in(&region, &call)?;
        ensure("the pages lie in the new region", {
            let range = region.gpa()..region.gpa() + region.size() as u64;
            request.pages().iter().all(|page| range.contains(&page.gpa()))
        })?;
        let ticket = b.client().submit_prepared(request)?;
        same_bytes("through new memory", &b.client().wait(ticket)?.ok()?, &data)?;
    }
    b.session.device().unplug_memory(&region)?;
    same_bytes("after removal", &b.client().read(node, handle, 0, data.len())?, &data)?;
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "plugged")?)
}

pub(super) fn all_queues_serve_at_once(b: &mut Bench<'_>) -> Step {
    const ROUNDS: u64 = 100;
    let data = pattern(64 * PAGE, 14);
    std::fs::write(b.host("wide"), &data)?;
    let node = b.client().lookup(ROOT, "wide")?.nodeid;
    let handle = b.client().open(node, libc::O_RDONLY)?.fh;
    let serve = |client: &mut Client, seed: u64| -> Step {
        for round in 0..ROUNDS {
            let at = (round * 13 + seed * 29) % 60 * PAGE as u64;
            let want = &data[at as usize..][..4 * PAGE];
            same_bytes("read", &client.read(node, handle, at, 4 * PAGE)?, want)?;
            same("size", client.getattr(node, None)?.attr.size, data.len() as u64)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = b
            .session
            .clients()
            .iter_mut()
            .enumerate()
            .map(|(index, client)| scope.spawn(move || serve(client, index as u64)))
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|_| Err(Problem("a queue panicked".into()))))
    })?;
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "wide")?)
}
