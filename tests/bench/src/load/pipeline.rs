//! A number of equal requests in flight: each reply is checked and its slot sent again.
//!
//! The requests are laid out in DPU memory once; per operation only the offset and the unique number change, so that
//! the driver's own work stays small against the daemon's. Replies that are there together are taken together and
//! their slots published together, as a driver does that serves several submitters.

use std::mem::offset_of;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use virtio_driver::fuse::abi::{AttrOut, EntryOut, GetattrIn, Opcode, ROOT, ReadIn, WriteIn, WriteOut};
use virtio_driver::fuse::request::name_bytes;
use virtio_driver::fuse::{Call, Client, Payload, Request};
use virtio_driver::memory::PAGE;
use virtio_driver::ring::Used;
use zerocopy::{FromBytes, IntoBytes};

use super::Operation;
use crate::contender::{Rig, SmallFile};
use crate::fixture::{DATA_SIZE, check_data, word_at};
use crate::measure::{Latencies, Random};

/// Longest wait for a reply before the daemon is called stuck.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Every how many operations a whole reply is compared instead of its first and last words.
const FULL_CHECK_EVERY: u64 = 64;

/// Written blocks that are compared with the file after a round.
const CHECKED_WRITES: usize = 2_000;

struct Slot {
    request: Request,
    unique: u64,
    sent: Instant,
    offset: u64,
    stamp: u64,
}

struct Pipeline<'a> {
    operation: Operation,
    small: &'a [SmallFile],
    random: Random,
    blocks: u64,
    unique: u64,
    /// Last stamp written to each block, 0 for none.
    written: Vec<u64>,
    completed: u64,
}

pub(super) fn run(
    rig: &mut Rig,
    operation: Operation,
    depth: usize,
    length: Duration,
    seed: u64,
) -> anyhow::Result<Latencies> {
    let small = rig.small.clone();
    let file = match operation {
        Operation::Write(_) => rig.scratch,
        _ => rig.data,
    };
    let block = match operation {
        Operation::Read(size) | Operation::Write(size) => size as u64,
        _ => DATA_SIZE,
    };
    let mut pipeline = Pipeline {
        operation,
        small: &small,
        random: Random::new(seed + 1),
        blocks: DATA_SIZE / block,
        unique: 1 << 40,
        written: vec![0; (DATA_SIZE / block) as usize],
        completed: 0,
    };
    let client = rig.session.client();
    let mut slots: Vec<Slot> =
        (0..depth).map(|index| pipeline.slot(client, file, index)).collect::<anyhow::Result<_>>()?;
    let latencies = pipeline.pump(client, &mut slots, length)?;
    if let Operation::Write(size) = operation {
        check_written(&pipeline.written, size, rig)?;
    }
    Ok(latencies)
}

impl Pipeline<'_> {
    fn slot(&self, client: &Client, file: (u64, u64), index: usize) -> anyhow::Result<Slot> {
        let (node, fh) = file;
        let small = &self.small[index % self.small.len()];
        let request = match self.operation {
            Operation::Getattr => client.prepare(&Call::new(
                Opcode::Getattr,
                small.node,
                &[GetattrIn::default().as_bytes()],
                size_of::<AttrOut>(),
            )),
            Operation::Lookup => {
                let name = name_bytes(&small.name);
                client.prepare(&Call::new(Opcode::Lookup, ROOT, &[&name], size_of::<EntryOut>()))
            }
            Operation::Read(size) => {
                let args = ReadIn { fh, size: size as u32, ..Default::default() };
                let parts = [args.as_bytes()];
                client.prepare(&Call::new(Opcode::Read, node, &parts, 0).payload(Payload::FromDevice(size)))
            }
            Operation::Write(size) => {
                let args = WriteIn { fh, size: size as u32, ..Default::default() };
                let (parts, zeros) = ([args.as_bytes()], vec![0; size]);
                let call = Call::new(Opcode::Write, node, &parts, size_of::<WriteOut>());
                client.prepare(&call.payload(Payload::ToDevice(&zeros)))
            }
        }?;
        Ok(Slot { request, unique: 0, sent: Instant::now(), offset: index as u64, stamp: 0 })
    }

    /// Gives a slot its next request. `offset` of a metadata slot is the number of its file.
    fn arm(&mut self, slot: &mut Slot) {
        self.unique += 2;
        slot.unique = self.unique;
        slot.request.set_unique(self.unique);
        match self.operation {
            Operation::Getattr | Operation::Lookup => {}
            Operation::Read(size) => {
                slot.offset = self.random.below(self.blocks) * size as u64;
                slot.request.set_args(offset_of!(ReadIn, offset), slot.offset.as_bytes());
            }
            Operation::Write(size) => {
                // A walk over all blocks in a scattered order: no block is in flight twice.
                slot.stamp = self.unique / 2;
                slot.offset = slot.stamp.wrapping_mul(0x9E37_79B1) % self.blocks * size as u64;
                slot.request.set_args(offset_of!(WriteIn, offset), slot.offset.as_bytes());
                for (index, page) in slot.request.pages().iter().enumerate() {
                    let word = word_at(slot.stamp + index as u64);
                    page.write(0, word.as_bytes());
                    page.write(PAGE - 8, word.as_bytes());
                }
                self.written[(slot.offset / size as u64) as usize] = slot.stamp;
            }
        }
    }

    fn pump(
        &mut self,
        client: &mut Client,
        slots: &mut [Slot],
        length: Duration,
    ) -> anyhow::Result<Latencies> {
        let ring = client.ring_mut();
        let mut latencies = Latencies::default();
        let mut by_head = vec![0usize; usize::from(ring.config().size)];
        let start = Instant::now();
        for (index, slot) in slots.iter_mut().enumerate() {
            self.arm(slot);
            slot.sent = start;
            by_head[usize::from(ring.add(slot.request.chain())?)] = index;
        }
        ring.publish();
        ring.notify()?;
        let mut in_flight = slots.len();
        let mut replied: Vec<(usize, Used)> = Vec::with_capacity(slots.len());
        while in_flight > 0 {
            let mut next = Some(ring.wait_used(REPLY_LIMIT)?);
            while let Some(used) = next {
                // A head is free for the next request as soon as it is taken: look its slot up before that.
                replied.push((by_head[usize::from(used.head)], used));
                next = ring.take_used()?;
            }
            let now = Instant::now();
            let go_on = now.duration_since(start) < length;
            in_flight -= replied.len();
            for (index, used) in &replied {
                let slot = &mut slots[*index];
                latencies.push(now.duration_since(slot.sent));
                self.check(slot, used.len)?;
                if go_on {
                    self.arm(slot);
                    by_head[usize::from(ring.add(slot.request.chain())?)] = *index;
                }
            }
            if go_on {
                in_flight += replied.len();
                let sent = Instant::now(); // All that is published together is sent together.
                replied.iter().for_each(|(index, _)| slots[*index].sent = sent);
                ring.publish();
                ring.notify()?;
            }
            replied.clear();
        }
        Ok(latencies)
    }

    fn check(&mut self, slot: &Slot, used_len: u32) -> anyhow::Result<()> {
        self.completed += 1;
        let (errno, len) = slot.request.check_reply(slot.unique, used_len)?;
        ensure!(errno == 0, "{:?} answered with errno {errno}", self.operation);
        let full = self.completed % FULL_CHECK_EVERY == 1;
        match self.operation {
            // Sizes and inode numbers prove that the reply is about the right file.
            Operation::Getattr | Operation::Lookup if full => {
                let small = &self.small[slot.offset as usize % self.small.len()];
                let body = slot.request.results(len);
                let attr = match self.operation {
                    Operation::Getattr => AttrOut::read_from_bytes(&body).ok().map(|out| out.attr),
                    _ => EntryOut::read_from_bytes(&body)
                        .ok()
                        .filter(|entry| entry.nodeid == small.node)
                        .map(|entry| entry.attr),
                };
                let attr = attr.context("a reply about another file")?;
                ensure!(
                    (attr.ino, attr.size) == (small.ino, small.size),
                    "attributes of another file: {attr:?}"
                );
            }
            Operation::Getattr | Operation::Lookup => {}
            Operation::Read(size) => {
                ensure!(len == size, "a read of {size} bytes gave {len}");
                for (index, page) in slot.request.pages().iter().enumerate() {
                    let at = slot.offset + (index * PAGE) as u64;
                    if full {
                        check_data(&page.to_vec(0, PAGE), at)?;
                    } else {
                        let words: [u64; 2] = [page.get(0), page.get(PAGE - 8)];
                        let last = (at + PAGE as u64) / 8 - 1;
                        if words != [word_at(at / 8), word_at(last)] {
                            bail!("wrong data at offset {at}: {words:x?}");
                        }
                    }
                }
            }
            Operation::Write(size) => {
                let out: WriteOut = WriteOut::read_from_bytes(&slot.request.results(len))
                    .ok()
                    .context("a cut reply to a write")?;
                ensure!(out.size as usize == size, "a write of {size} bytes took {}", out.size);
            }
        }
        Ok(())
    }
}

/// Compares blocks of the file on the host with what was written last.
fn check_written(written: &[u64], size: usize, rig: &Rig) -> anyhow::Result<()> {
    let file = std::fs::File::open(&rig.scratch_path)?;
    let blocks = written.iter().enumerate().filter(|(_, stamp)| **stamp != 0);
    for (block, stamp) in blocks.take(CHECKED_WRITES) {
        for page in 0..size / PAGE {
            let want = word_at(stamp + page as u64);
            for place in [0, PAGE - 8] {
                let mut word = [0; 8];
                let at = (block * size + page * PAGE + place) as u64;
                file.read_exact_at(&mut word, at)?;
                ensure!(u64::from_ne_bytes(word) == want, "a write was lost or misplaced at offset {at}");
            }
        }
    }
    Ok(())
}
