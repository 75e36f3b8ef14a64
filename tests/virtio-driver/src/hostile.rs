//! An attacker in the DPU: chains and ring states that no driver makes.
//!
//! A DPU owns its memory, its rings and every byte of every request, so each of these is something a daemon must
//! answer or drop without harm. [`Attacker`] borrows a client's ring while nothing is outstanding on it; afterwards
//! the client is a witness: if its ring still works, the daemon survived. An attack that breaks the ring for good
//! (available index, descriptor loops) is followed by [`super::fuse::Session::restart_queue`], as a DPU's driver
//! would reset its device.

use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use crate::Result;
use crate::fuse::Client;
use crate::fuse::abi::{InHeader, OutHeader};
use crate::memory::DpuBuffer;
use crate::ring::{Chain, DESC_NEXT, DESC_WRITE, Descriptor, RawDescriptor, Used};

/// How long a daemon may take to dispose of a malformed chain.
pub const DISPOSAL_LIMIT: Duration = Duration::from_secs(5);

/// What came back for a raw message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawReply {
    /// Length of the used entry.
    pub used_len: u32,
    /// Everything in the writable part, whether written or not (0xEE where not).
    pub bytes: Vec<u8>,
}

impl RawReply {
    /// The reply header, if one was written.
    pub fn header(&self) -> Option<OutHeader> {
        if (self.used_len as usize) < size_of::<OutHeader>() {
            return None;
        }
        OutHeader::read_from_prefix(&self.bytes).ok().map(|(header, _)| header)
    }

    /// Positive errno of the reply, 0 for success, if there is a reply header.
    pub fn errno(&self) -> Option<i32> {
        self.header().map(|header| -header.error)
    }
}

/// Filling of buffers the device should or should not write.
const UNTOUCHED: u8 = 0xEE;

/// Raw access to the ring of a client.
#[derive(Debug)]
pub struct Attacker<'a> {
    client: &'a mut Client,
}

impl<'a> Attacker<'a> {
    /// Takes the ring of a client that has nothing outstanding.
    pub fn new(client: &'a mut Client) -> Self {
        assert_eq!(client.outstanding(), 0, "an attack needs a ring of its own");
        Attacker { client }
    }

    /// Takes the ring of a client on which an attack is under way.
    pub fn new_in_flight(client: &'a mut Client) -> Self {
        Attacker { client }
    }

    /// A buffer in DPU memory with these bytes.
    pub fn buffer(&self, bytes: &[u8]) -> Result<DpuBuffer> {
        let buffer = self.client.memory().allocate(bytes.len())?;
        buffer.write(0, bytes);
        Ok(buffer)
    }

    /// A buffer for replies, filled with a mark.
    pub fn reply_buffer(&self, len: usize) -> Result<DpuBuffer> {
        let buffer = self.client.memory().allocate(len)?;
        buffer.fill(UNTOUCHED);
        Ok(buffer)
    }

    /// An address outside all regions.
    pub fn hole(&self) -> u64 {
        self.client.memory().hole()
    }

    /// Addresses of the attacked ring's descriptor table, available and used ring.
    pub fn ring_addresses(&self) -> [u64; 3] {
        self.client.ring().dpu_addresses()
    }

    /// Sends any buffers as a well-linked chain.
    pub fn submit(&mut self, descriptors: &[Descriptor]) -> Result<u16> {
        self.client.ring_mut().submit(&Chain::direct(descriptors.to_vec()))
    }

    /// Sends `count` table entries, written by `fill` from their slot numbers. The first is the head.
    pub fn submit_entries(
        &mut self,
        count: usize,
        fill: impl FnOnce(&[u16]) -> Vec<RawDescriptor>,
    ) -> Result<u16> {
        let ring = self.client.ring_mut();
        let head = ring.add_raw(count, fill)?;
        ring.publish();
        ring.notify()?;
        Ok(head)
    }

    /// Writes a table entry that belongs to no chain of the driver.
    pub fn write_entry(&mut self, slot: u16, raw: RawDescriptor) {
        self.client.ring_mut().put_descriptor(slot, raw);
    }

    /// Waits for the device to give the chain back.
    pub fn wait(&mut self) -> Result<Used> {
        self.client.ring_mut().wait_used(DISPOSAL_LIMIT)
    }

    /// Sends bytes as one request and takes what comes back: `message` cut into readable elements at `cuts`, then
    /// writable elements of the given sizes.
    pub fn exchange(&mut self, message: &[u8], cuts: &[usize], replies: &[usize]) -> Result<RawReply> {
        let source = if message.is_empty() { None } else { Some(self.buffer(message)?) };
        let mut elements = Vec::new();
        if let Some(source) = &source {
            let mut at = 0;
            for cut in cuts.iter().copied().chain([message.len()]) {
                if cut > at {
                    elements.push(Descriptor::readable(source.gpa() + at as u64, cut - at));
                    at = cut;
                }
            }
        }
        let total: usize = replies.iter().sum();
        let target = self.reply_buffer(total.max(1))?;
        let mut at = 0;
        for len in replies {
            elements.push(Descriptor::writable(target.gpa() + at, *len));
            at += *len as u64;
        }
        self.submit(&elements)?;
        let used = self.wait()?;
        Ok(RawReply { used_len: used.len, bytes: target.to_vec(0, total) })
    }

    /// Kicks without adding anything.
    pub fn kick(&mut self) -> Result<()> {
        self.client.ring_mut().kick()
    }

    /// Stores an available index that has nothing to do with what was added, and kicks.
    pub fn jump_available_index(&mut self, by: u16) -> Result<()> {
        let ring = self.client.ring_mut();
        ring.force_available_index(ring.next_available().wrapping_add(by));
        ring.kick()
    }

    /// Makes any heads available in the next entries of the ring, and kicks. Their descriptors are wiped: left as they
    /// are they would point to buffers that other requests, on other queues too, use by now.
    pub fn make_heads_available(&mut self, heads: &[u16]) -> Result<()> {
        let ring = self.client.ring_mut();
        for head in heads.iter().filter(|head| **head < ring.config().size) {
            ring.put_descriptor(*head, RawDescriptor::default());
        }
        let next = ring.next_available();
        for (offset, head) in heads.iter().enumerate() {
            ring.force_available_entry(next.wrapping_add(offset as u16), *head);
        }
        ring.force_available_index(next.wrapping_add(heads.len() as u16));
        ring.kick()
    }

    /// Used index as the device last stored it.
    pub fn device_used_index(&self) -> u16 {
        self.client.ring().device_used_index()
    }
}

/// A request header followed by bytes, with a header length that may lie.
pub fn message(opcode: u32, node: u64, body: &[u8], claimed_len: Option<u32>) -> Vec<u8> {
    let true_len = (size_of::<InHeader>() + body.len()) as u32;
    let header = InHeader {
        len: claimed_len.unwrap_or(true_len),
        opcode,
        unique: 0xBAD,
        nodeid: node,
        pid: 1,
        ..Default::default()
    };
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(body);
    bytes
}

/// Table entries that form a proper chain of `buffers`, for attacks that then bend one of them.
pub fn linked(buffers: &[(u64, u32, bool)], slots: &[u16]) -> Vec<RawDescriptor> {
    buffers
        .iter()
        .enumerate()
        .map(|(index, (addr, len, writable))| {
            let next = slots.get(index + 1).filter(|_| index + 1 < buffers.len());
            RawDescriptor {
                addr: *addr,
                len: *len,
                flags: if *writable { DESC_WRITE } else { 0 } | if next.is_some() { DESC_NEXT } else { 0 },
                next: next.copied().unwrap_or(0),
            }
        })
        .collect()
}
