//! A FUSE request in DPU memory.
//!
//! Linux (6.1 to 6.12, `virtio_fs_enqueue_req`) builds a chain of at most six kinds of element, in this order:
//!
//! ```text
//! device reads:   fuse_in_header (40) | all small arguments, joined in one buffer | payload, one element per page
//! device writes:  fuse_out_header (16) | all small results, joined in one buffer  | payload, one element per page
//! ```
//!
//! The joined buffers of both directions are one allocation, the results behind the arguments. Pages are whole pages;
//! only the last one may be cut short. READ, READDIR(PLUS), READLINK take pages for their answer and WRITE for its
//! data; everything else fits into the joined buffers. FORGET and BATCH_FORGET have no device-written part.

use std::sync::Arc;

use zerocopy::IntoBytes;

use super::abi::{InHeader, Opcode, OutHeader};
use crate::memory::{DpuBuffer, DpuMemory, PAGE, Region};
use crate::ring::{Chain, Descriptor};
use crate::{Error, Result};

/// Offset of the reply header in the header block; in Linux both live in one `struct fuse_req`.
const OUT_HEADER: usize = 64;
/// Size of the header block.
const HEADERS: usize = 128;

/// Bytes that travel in pages of their own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Payload<'a> {
    /// No pages.
    #[default]
    None,
    /// The device reads these bytes (WRITE).
    ToDevice(&'a [u8]),
    /// The device writes up to this many bytes (READ, READDIR, READLINK).
    FromDevice(usize),
}

/// What to ask.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Operation.
    pub opcode: Opcode,
    /// Node it is about.
    pub node: u64,
    /// Small arguments, in order; joined in one buffer.
    pub args: &'a [&'a [u8]],
    /// Size of the joined results.
    pub results: usize,
    /// Whether the results may be shorter than `results`.
    pub variable: bool,
    /// Pages.
    pub payload: Payload<'a>,
    /// Size of the extensions at the end of the arguments, in units of 8 bytes.
    pub extension_units: u16,
    /// Whether there is a reply at all (not for FORGET).
    pub reply: bool,
}

impl<'a> Call<'a> {
    /// A call without pages whose results have a fixed size.
    pub fn new(opcode: Opcode, node: u64, args: &'a [&'a [u8]], results: usize) -> Self {
        Call {
            opcode,
            node,
            args,
            results,
            variable: false,
            payload: Payload::None,
            extension_units: 0,
            reply: true,
        }
    }

    /// Lets the results be shorter.
    pub fn variable(self) -> Self {
        Call { variable: true, ..self }
    }

    /// Adds pages.
    pub fn payload(self, payload: Payload<'a>) -> Self {
        Call { payload, ..self }
    }
}

/// A request laid out in DPU memory; it can be put on a ring any number of times, one after the other.
#[derive(Debug)]
pub struct Request {
    chain: Chain,
    headers: DpuBuffer,
    /// Arguments and results; none if there are neither.
    joined: Option<DpuBuffer>,
    pages: Vec<DpuBuffer>,
    opcode: Opcode,
    args: usize,
    results: usize,
    variable: bool,
    /// Bytes of pages the device writes.
    incoming: usize,
    reply: bool,
}

impl Request {
    /// Lays out a call. `indirect` puts the chain into a table of its own, as Linux does when it may.
    pub fn new(memory: &Arc<DpuMemory>, call: &Call<'_>, indirect: bool) -> Result<Self> {
        Self::with_pages_from(memory, call, indirect, || memory.allocate(PAGE))
    }

    /// Lays out a call whose payload pages lie in one given region.
    pub fn with_pages_in(
        memory: &Arc<DpuMemory>,
        region: &Arc<Region>,
        call: &Call<'_>,
        indirect: bool,
    ) -> Result<Self> {
        Self::with_pages_from(memory, call, indirect, || memory.allocate_in(region, PAGE))
    }

    fn with_pages_from(
        memory: &Arc<DpuMemory>,
        call: &Call<'_>,
        indirect: bool,
        page: impl Fn() -> Result<DpuBuffer>,
    ) -> Result<Self> {
        let args: usize = call.args.iter().map(|arg| arg.len()).sum();
        let headers = memory.allocate(HEADERS)?;
        let joined = match args + call.results {
            0 => None,
            len => Some(memory.allocate(len)?),
        };
        if let Some(joined) = &joined {
            let mut at = 0;
            for arg in call.args {
                joined.write(at, arg);
                at += arg.len();
            }
        }
        let (outgoing, incoming) = match call.payload {
            Payload::None => (0, 0),
            Payload::ToDevice(bytes) => (bytes.len(), 0),
            Payload::FromDevice(len) => (0, len),
        };
        let pages = (0..(outgoing + incoming).div_ceil(PAGE)).map(|_| page()).collect::<Result<Vec<_>>>()?;
        if let Payload::ToDevice(bytes) = call.payload {
            for (page, bytes) in pages.iter().zip(bytes.chunks(PAGE)) {
                page.write(0, bytes);
            }
        }

        let mut elements = vec![Descriptor::readable(headers.gpa(), size_of::<InHeader>())];
        let page_elements = |total: usize, writable| {
            pages.iter().enumerate().map(move |(index, page)| Descriptor {
                addr: page.gpa(),
                len: PAGE.min(total - index * PAGE) as u32,
                writable,
            })
        };
        if let Some(joined) = joined.as_ref().filter(|_| args > 0) {
            elements.push(Descriptor::readable(joined.gpa(), args));
        }
        if outgoing > 0 {
            elements.extend(page_elements(outgoing, false));
        }
        if call.reply {
            elements.push(Descriptor::writable(headers.gpa() + OUT_HEADER as u64, size_of::<OutHeader>()));
            if let Some(joined) = joined.as_ref().filter(|_| call.results > 0) {
                elements.push(Descriptor::writable(joined.gpa() + args as u64, call.results));
            }
            if incoming > 0 {
                elements.extend(page_elements(incoming, true));
            }
        }
        let chain = if indirect { Chain::indirect(memory, elements)? } else { Chain::direct(elements) };

        let header = InHeader {
            len: (size_of::<InHeader>() + args + outgoing) as u32,
            opcode: call.opcode as u32,
            nodeid: call.node,
            total_extlen: call.extension_units,
            ..Default::default()
        };
        headers.put(0, &header);
        Ok(Request {
            chain,
            headers,
            joined,
            pages,
            opcode: call.opcode,
            args,
            results: call.results,
            variable: call.variable,
            incoming,
            reply: call.reply,
        })
    }

    /// A FORGET or BATCH_FORGET: header and arguments in one element, no reply, as Linux sends them.
    pub fn without_reply(memory: &Arc<DpuMemory>, header: InHeader, args: &[u8]) -> Result<Self> {
        let len = size_of::<InHeader>() + args.len();
        let headers = memory.allocate(len)?;
        headers.put(0, &InHeader { len: len as u32, ..header });
        headers.write(size_of::<InHeader>(), args);
        let chain = Chain::direct(vec![Descriptor::readable(headers.gpa(), len)]);
        Ok(Request {
            chain,
            headers,
            joined: None,
            pages: Vec::new(),
            opcode: if header.opcode == Opcode::Forget as u32 { Opcode::Forget } else { Opcode::BatchForget },
            args: 0,
            results: 0,
            variable: false,
            incoming: 0,
            reply: false,
        })
    }

    /// The chain for [`crate::ring::Ring::add`].
    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Operation.
    pub fn opcode(&self) -> Opcode {
        self.opcode
    }

    /// The request header as it stands.
    pub fn header(&self) -> InHeader {
        self.headers.get(0)
    }

    /// Replaces the request header (also by one that lies).
    pub fn set_header(&self, header: InHeader) {
        self.headers.put(0, &header);
    }

    /// Sets the request's unique number and wipes the reply header, so that an old reply cannot pass for a new one.
    pub fn set_unique(&self, unique: u64) {
        self.headers.write(std::mem::offset_of!(InHeader, unique), &unique.to_ne_bytes());
        if self.reply {
            self.headers.put(OUT_HEADER, &OutHeader::default());
        }
    }

    /// Overwrites argument bytes of a request that is not on a ring.
    pub fn set_args(&self, offset: usize, bytes: &[u8]) {
        if let Some(joined) = &self.joined {
            assert!(offset + bytes.len() <= self.args, "arguments have {} bytes", self.args);
            joined.write(offset, bytes);
        }
    }

    /// Page buffers of the payload.
    pub fn pages(&self) -> &[DpuBuffer] {
        &self.pages
    }

    /// The reply header as it stands.
    pub fn reply_header(&self) -> OutHeader {
        self.headers.get(OUT_HEADER)
    }

    /// Overwrites the joined results and the incoming pages, so that what the device does not write is seen.
    pub fn poison_reply(&self, value: u8) {
        if let Some(joined) = &self.joined {
            joined.write(self.args, &vec![value; self.results]);
        }
        if self.incoming > 0 {
            self.pages.iter().for_each(|page| page.fill(value));
        }
    }

    /// Checks the reply header against the request and against what the ring says was written. Returns the errno
    /// (0: success) and the number of bytes behind the header.
    pub fn check_reply(&self, unique: u64, used_len: u32) -> Result<(i32, usize)> {
        let problem =
            |problem: String| Error::FuseProtocol { operation: format!("{:?}", self.opcode), problem };
        if !self.reply {
            return if used_len == 0 {
                Ok((0, 0))
            } else {
                Err(problem(format!("{used_len} bytes written into a chain without writable part")))
            };
        }
        let header = self.reply_header();
        if header.unique != unique {
            return Err(problem(format!("reply has unique {}, the request {unique}", header.unique)));
        }
        if header.len != used_len {
            return Err(problem(format!("reply header says {} bytes, the ring {used_len}", header.len)));
        }
        let Some(body) = (header.len as usize).checked_sub(size_of::<OutHeader>()) else {
            return Err(problem(format!("reply of {} bytes", header.len)));
        };
        if header.error != 0 {
            // The kernel rejects what is outside this range (fuse_dev_do_write).
            return if (-511..0).contains(&header.error) && body == 0 {
                Ok((-header.error, 0))
            } else {
                Err(problem(format!("error {} with {body} bytes of results", header.error)))
            };
        }
        let room = self.results + self.incoming;
        if body > room || (body < room && !self.variable) {
            return Err(problem(format!("{body} bytes of results where {room} fit")));
        }
        Ok((0, body))
    }

    /// The first `len` bytes of the results, joined buffer first, then pages.
    pub fn results(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let (joined, paged) = bytes.split_at_mut(len.min(self.results));
        if let Some(buffer) = &self.joined {
            buffer.read(self.args, joined);
        }
        for (page, bytes) in self.pages.iter().zip(paged.chunks_mut(PAGE)) {
            page.read(0, bytes);
        }
        bytes
    }
}

/// A name as FUSE sends it: bytes and a NUL.
pub fn name_bytes(name: impl AsRef<[u8]>) -> Vec<u8> {
    let mut bytes = name.as_ref().to_vec();
    bytes.push(0);
    bytes
}

/// A structure followed by names, as most operations on names send it.
pub fn joined<T: IntoBytes + zerocopy::Immutable>(head: &T, names: &[&[u8]]) -> Vec<u8> {
    let mut bytes = head.as_bytes().to_vec();
    for name in names {
        bytes.extend_from_slice(&name_bytes(name));
    }
    bytes
}
