//! Loads of dependent requests: each waits for the one before.

use std::collections::HashSet;
use std::mem::offset_of;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use virtio_driver::fuse::abi::{CreateIn, EntryOut, GetattrIn, Opcode, OpenIn, OpenOut, ReadIn, ReleaseIn};
use virtio_driver::fuse::request::{joined, name_bytes};
use virtio_driver::fuse::{Call, Client, Payload, Request, dirent};
use virtio_driver::memory::PAGE;
use zerocopy::{FromBytes, IntoBytes};

use crate::contender::Rig;
use crate::fixture::{LISTED, listed_name};
use crate::measure::{Latencies, let_pass};

const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Sends a request that was laid out before and waits for its reply. Returns the length of the results.
fn exchange(client: &mut Client, request: &Request, unique: &mut u64) -> anyhow::Result<usize> {
    *unique += 2;
    request.set_unique(*unique);
    let ring = client.ring_mut();
    ring.submit(request.chain())?;
    let used = ring.wait_used(REPLY_LIMIT)?;
    let (errno, len) = request.check_reply(*unique, used.len)?;
    ensure!(errno == 0, "{:?} answered with errno {errno}", request.opcode());
    Ok(len)
}

fn release_request(client: &Client, node: u64) -> anyhow::Result<Request> {
    Ok(client.prepare(&Call::new(Opcode::Release, node, &[ReleaseIn::default().as_bytes()], 0))?)
}

pub(super) fn open_release(rig: &mut Rig, length: Duration) -> anyhow::Result<Latencies> {
    let node = rig.small[0].node;
    let client = rig.session.client();
    let args = OpenIn { flags: libc::O_RDONLY as u32, open_flags: 0 };
    let open = client.prepare(&Call::new(Opcode::Open, node, &[args.as_bytes()], size_of::<OpenOut>()))?;
    let release = release_request(client, node)?;
    let (mut latencies, mut unique) = (Latencies::default(), 1 << 41);
    let start = Instant::now();
    while start.elapsed() < length {
        let begin = Instant::now();
        let len = exchange(client, &open, &mut unique)?;
        let out = OpenOut::read_from_bytes(&open.results(len)).ok().context("a cut reply to OPEN")?;
        release.set_args(offset_of!(ReleaseIn, fh), out.fh.as_bytes());
        exchange(client, &release, &mut unique)?;
        latencies.push(begin.elapsed());
    }
    Ok(latencies)
}

pub(super) fn create_unlink(rig: &mut Rig, length: Duration) -> anyhow::Result<Latencies> {
    const NAME: &str = "newborn";
    let (nursery, nursery_path) = (rig.nursery, rig.nursery_path.clone());
    let client = rig.session.client();
    let args = CreateIn {
        flags: (libc::O_RDWR | libc::O_CREAT | libc::O_EXCL) as u32,
        mode: libc::S_IFREG | 0o644,
        umask: 0o022,
        open_flags: 0,
    };
    let args = joined(&args, &[NAME.as_bytes()]);
    let results = size_of::<EntryOut>() + size_of::<OpenOut>();
    let create = client.prepare(&Call::new(Opcode::Create, nursery, &[&args], results))?;
    let unlink = client.prepare(&Call::new(Opcode::Unlink, nursery, &[&name_bytes(NAME)], 0))?;
    let release = release_request(client, 0)?;
    let (mut latencies, mut unique) = (Latencies::default(), 1 << 42);
    let mut first = true;
    let start = Instant::now();
    while start.elapsed() < length {
        let begin = Instant::now();
        let len = exchange(client, &create, &mut unique)?;
        let body = create.results(len);
        let (entry, rest) = EntryOut::read_from_prefix(&body).ok().context("a cut reply to CREATE")?;
        let open = OpenOut::read_from_bytes(rest).ok().context("a cut reply to CREATE")?;
        release.set_header(virtio_driver::fuse::abi::InHeader { nodeid: entry.nodeid, ..release.header() });
        release.set_args(offset_of!(ReleaseIn, fh), open.fh.as_bytes());
        exchange(client, &release, &mut unique)?;
        if first {
            ensure!(nursery_path.join(NAME).is_file(), "CREATE made no file on the host");
        }
        exchange(client, &unlink, &mut unique)?;
        client.forget(entry.nodeid, 1)?;
        latencies.push(begin.elapsed());
        first = false;
    }
    client.drain_forgets()?;
    ensure!(std::fs::read_dir(&nursery_path)?.next().is_none(), "UNLINK left a file on the host");
    Ok(latencies)
}

pub(super) fn readdirplus(rig: &mut Rig, length: Duration) -> anyhow::Result<Latencies> {
    let (node, fh) = rig.listed;
    let client = rig.session.client();
    let args = ReadIn { fh, size: PAGE as u32, ..Default::default() };
    let parts = [args.as_bytes()];
    let call = Call::new(Opcode::Readdirplus, node, &parts, 0).payload(Payload::FromDevice(PAGE)).variable();
    let request = client.prepare(&call)?;
    let (mut latencies, mut unique) = (Latencies::default(), 1 << 43);
    let mut checked = false;
    let start = Instant::now();
    while start.elapsed() < length {
        let (mut offset, mut entries, mut names) = (0u64, 0u32, HashSet::new());
        loop {
            request.set_args(offset_of!(ReadIn, offset), offset.as_bytes());
            let begin = Instant::now();
            let len = exchange(client, &request, &mut unique)?;
            let spent = begin.elapsed();
            if len == 0 {
                break;
            }
            // What the DPU's kernel does with the entries is not the daemon's time.
            let page = dirent::parse(&request.results(len), true)?;
            entries += page.len() as u32;
            let each = spent / page.len() as u32;
            page.iter().for_each(|_| latencies.push(each));
            offset = page.last().map_or(offset, |entry| entry.offset);
            if !checked {
                names.extend(page.into_iter().map(|entry| entry.name));
            }
        }
        if !checked {
            let all = (0..LISTED).all(|index| names.contains(listed_name(index).as_bytes()));
            ensure!(all, "the listing of {LISTED} names has only {} entries", names.len());
            checked = true;
        }
        ensure!(entries as usize >= LISTED, "a listing of {LISTED} names has only {entries} entries");
    }
    Ok(latencies)
}

pub(super) fn paced(rig: &mut Rig, length: Duration) -> anyhow::Result<Latencies> {
    let node = rig.small[0].node;
    let client = rig.session.client();
    let results = size_of::<virtio_driver::fuse::abi::AttrOut>();
    let request =
        client.prepare(&Call::new(Opcode::Getattr, node, &[GetattrIn::default().as_bytes()], results))?;
    let (mut latencies, mut unique) = (Latencies::default(), 1 << 44);
    let start = Instant::now();
    while start.elapsed() < length {
        let begin = Instant::now();
        exchange(client, &request, &mut unique)?;
        latencies.push(begin.elapsed());
        let_pass(Duration::from_millis(1).saturating_sub(begin.elapsed()));
    }
    Ok(latencies)
}
