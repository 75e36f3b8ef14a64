//! One request ring: submitting calls, taking replies, any number outstanding.
//!
//! A client is one CPU of the DPU that uses one request queue. It is `Send`; give each thread its own. Typed
//! operations (in [`super::ops`]) wait for their own reply and leave others for whoever holds their [`Ticket`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::io::Errno;

use super::abi::{BatchForgetIn, ForgetIn, ForgetOne, InHeader, InitOut, Opcode, init};
use super::request::{Call, Request};
use super::{FuseError, FuseResult};
use crate::memory::{DpuMemory, PAGE, Region};
use crate::ring::{Ring, Used};
use crate::{Error, Result};
use zerocopy::{FromBytes, IntoBytes};

/// Longest wait for one reply.
pub const REPLY_LIMIT: Duration = Duration::from_secs(20);

/// On whose behalf a request is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id.
    pub pid: u32,
}

impl Caller {
    /// The DPU's root.
    pub const ROOT: Caller = Caller { uid: 0, gid: 0, pid: 1 };
}

/// Names an outstanding request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket(u64);

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Positive errno, 0 for success.
    pub errno: i32,
    /// Results behind the header.
    pub body: Vec<u8>,
}

impl Reply {
    /// The body, or the errno as an error.
    pub fn ok(self) -> FuseResult<Vec<u8>> {
        match self.errno {
            0 => Ok(self.body),
            errno => Err(FuseError::Errno(Errno::from_raw_os_error(errno))),
        }
    }
}

/// The ring for FORGET, shared by all clients of a session.
#[derive(Debug)]
pub struct ForgetQueue {
    ring: Ring,
    outstanding: Vec<Option<Request>>,
}

impl ForgetQueue {
    pub(super) fn new(ring: Ring) -> Self {
        let outstanding = (0..ring.config().size).map(|_| None).collect();
        ForgetQueue { ring, outstanding }
    }

    /// Sends a request without reply; waits only while the ring is full.
    pub fn send(&mut self, request: Request) -> Result<()> {
        while let Some(used) = self.ring.take_used()? {
            self.finish(used)?;
        }
        while self.ring.free_slots() < request.chain().descriptors().len() {
            let used = self.ring.wait_used(REPLY_LIMIT)?;
            self.finish(used)?;
        }
        let head = self.ring.submit(request.chain())?;
        self.outstanding[usize::from(head)] = Some(request);
        Ok(())
    }

    /// Waits until the device has taken everything.
    pub fn drain(&mut self) -> Result<()> {
        while self.ring.in_flight() > 0 {
            let used = self.ring.wait_used(REPLY_LIMIT)?;
            self.finish(used)?;
        }
        Ok(())
    }

    /// The ring itself.
    pub fn ring_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }

    fn finish(&mut self, used: Used) -> Result<()> {
        let request = self.outstanding[usize::from(used.head)].take();
        request.map_or(Ok(()), |request| request.check_reply(0, used.len).map(drop))
    }
}

#[derive(Debug)]
struct Outstanding {
    ticket: Ticket,
    request: Request,
}

/// A client on one request ring.
#[derive(Debug)]
pub struct Client {
    ring: Ring,
    memory: Arc<DpuMemory>,
    indirect: bool,
    forgets: Arc<Mutex<ForgetQueue>>,
    init: InitOut,
    caller: Caller,
    unique: u64,
    limit: Duration,
    outstanding: Vec<Option<Outstanding>>,
    finished: Vec<(Ticket, Reply)>,
}

impl Client {
    pub(super) fn new(
        ring: Ring,
        memory: Arc<DpuMemory>,
        indirect: bool,
        forgets: Arc<Mutex<ForgetQueue>>,
    ) -> Self {
        let outstanding = (0..ring.config().size).map(|_| None).collect();
        Client {
            ring,
            memory,
            indirect,
            forgets,
            init: InitOut::default(),
            caller: Caller::ROOT,
            unique: 0,
            limit: REPLY_LIMIT,
            outstanding,
            finished: Vec::new(),
        }
    }

    pub(super) fn set_init(&mut self, init: InitOut) {
        self.init = init;
    }

    pub(super) fn replace_ring(&mut self, ring: Ring) {
        self.outstanding.iter_mut().for_each(|slot| *slot = None);
        self.ring = ring;
    }

    /// What INIT was answered with.
    pub fn init(&self) -> &InitOut {
        &self.init
    }

    /// Flags of the INIT answer, both words.
    pub fn init_flags(&self) -> u64 {
        u64::from(self.init.flags) | u64::from(self.init.flags2) << 32
    }

    /// Sends what follows on behalf of `caller`.
    pub fn set_caller(&mut self, caller: Caller) {
        self.caller = caller;
    }

    /// On whose behalf requests are sent.
    pub fn caller(&self) -> Caller {
        self.caller
    }

    /// Largest payload of one request, as Linux computes it from INIT and ring size (`FUSE_HEADER_OVERHEAD` is 4).
    pub fn max_payload(&self) -> usize {
        let pages = if self.init_flags() & init::MAX_PAGES != 0 { self.init.max_pages } else { 32 };
        let pages = pages.clamp(1, 256).min(self.ring.config().size - 4);
        (usize::from(pages) * PAGE).min((self.init.max_write as usize).max(PAGE))
    }

    /// Longest wait for one reply.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// The request ring.
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// The request ring, for benchmarks and attacks that go below the typed operations. Nothing may be outstanding.
    pub fn ring_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }

    /// The DPU's memory.
    pub fn memory(&self) -> &Arc<DpuMemory> {
        &self.memory
    }

    /// Whether chains go into indirect tables.
    pub fn indirect(&self) -> bool {
        self.indirect
    }

    /// Lays out a call in DPU memory with this client's caller, ready for the ring.
    pub fn prepare(&self, call: &Call<'_>) -> Result<Request> {
        let request = Request::new(&self.memory, call, self.indirect)?;
        self.sign(&request);
        Ok(request)
    }

    /// Like [`Client::prepare`] with the payload's pages in one given region.
    pub fn prepare_in(&self, region: &Arc<Region>, call: &Call<'_>) -> Result<Request> {
        let request = Request::with_pages_in(&self.memory, region, call, self.indirect)?;
        self.sign(&request);
        Ok(request)
    }

    fn sign(&self, request: &Request) {
        let Caller { uid, gid, pid } = self.caller;
        request.set_header(InHeader { uid, gid, pid, ..request.header() });
    }

    /// Sends a call and returns at once.
    pub fn submit(&mut self, call: &Call<'_>) -> Result<Ticket> {
        let request = self.prepare(call)?;
        self.submit_prepared(request)
    }

    /// Sends a request that was laid out before.
    pub fn submit_prepared(&mut self, request: Request) -> Result<Ticket> {
        self.unique += 2; // Linux counts in steps of two (FUSE_REQ_ID_STEP).
        let ticket = Ticket(self.unique);
        request.set_unique(self.unique);
        while self.needs_room(&request) {
            self.collect_one()?;
        }
        let head = self.ring.submit(request.chain())?;
        self.outstanding[usize::from(head)] = Some(Outstanding { ticket, request });
        Ok(ticket)
    }

    /// Whether the ring must give something back before the request fits.
    fn needs_room(&self, request: &Request) -> bool {
        let slots = if self.indirect { 1 } else { request.chain().descriptors().len() };
        self.ring.free_slots() < slots && self.ring.in_flight() > 0
    }

    /// Waits for the reply to one request.
    pub fn wait(&mut self, ticket: Ticket) -> Result<Reply> {
        loop {
            if let Some(at) = self.finished.iter().position(|(finished, _)| *finished == ticket) {
                return Ok(self.finished.swap_remove(at).1);
            }
            self.collect_one()?;
        }
    }

    /// Waits for whichever reply comes next.
    pub fn wait_any(&mut self) -> Result<(Ticket, Reply)> {
        if self.finished.is_empty() {
            self.collect_one()?;
        }
        Ok(self.finished.remove(0))
    }

    /// Takes a reply if one is there already.
    pub fn try_wait(&mut self, ticket: Ticket) -> Result<Option<Reply>> {
        while let Some(used) = self.ring.take_used()? {
            self.finish(used)?;
        }
        let at = self.finished.iter().position(|(finished, _)| *finished == ticket);
        Ok(at.map(|at| self.finished.swap_remove(at).1))
    }

    /// Requests without a reply yet.
    pub fn outstanding(&self) -> usize {
        usize::from(self.ring.in_flight())
    }

    fn collect_one(&mut self) -> Result<()> {
        let used = self.ring.wait_used(self.limit).map_err(|error| match error {
            Error::Timeout { waited, .. } => {
                let waiting = self.outstanding.iter().flatten().map(|o| format!("{:?}", o.request.opcode()));
                Error::Timeout {
                    what: format!("the reply to {}", waiting.collect::<Vec<_>>().join(", ")),
                    waited,
                }
            }
            other => other,
        })?;
        self.finish(used)
    }

    fn finish(&mut self, used: Used) -> Result<()> {
        let Some(Outstanding { ticket, request }) = self.outstanding[usize::from(used.head)].take() else {
            return Err(Error::RingProtocol(format!("chain {} came back, but was not sent here", used.head)));
        };
        let (errno, len) = request.check_reply(ticket.0, used.len)?;
        self.finished.push((ticket, Reply { errno, body: request.results(len) }));
        Ok(())
    }

    /// Sends a call and waits for its reply.
    pub fn call(&mut self, call: &Call<'_>) -> FuseResult<Vec<u8>> {
        let ticket = self.submit(call)?;
        self.wait(ticket)?.ok()
    }

    /// Sends a call whose results are one structure.
    pub fn call_for<T: FromBytes>(&mut self, call: &Call<'_>) -> FuseResult<T> {
        let body = self.call(call)?;
        T::read_from_bytes(&body).map_err(|_| {
            FuseError::Driver(Error::FuseProtocol {
                operation: format!("{:?}", call.opcode),
                problem: format!("{} bytes of results", body.len()),
            })
        })
    }

    /// FORGET: the DPU drops `nlookup` references to a node. Does not wait.
    pub fn forget(&mut self, node: u64, nlookup: u64) -> Result<()> {
        let header = InHeader { opcode: Opcode::Forget as u32, nodeid: node, ..Default::default() };
        let request = Request::without_reply(&self.memory, header, ForgetIn { nlookup }.as_bytes())?;
        self.forgets.lock().unwrap_or_else(PoisonError::into_inner).send(request)
    }

    /// BATCH_FORGET. Linux's virtio-fs sends single FORGETs only; other DPU kernels may batch.
    pub fn batch_forget(&mut self, nodes: &[(u64, u64)]) -> Result<()> {
        let mut args = BatchForgetIn { count: nodes.len() as u32, dummy: 0 }.as_bytes().to_vec();
        for (nodeid, nlookup) in nodes {
            args.extend_from_slice(ForgetOne { nodeid: *nodeid, nlookup: *nlookup }.as_bytes());
        }
        let header = InHeader { opcode: Opcode::BatchForget as u32, ..Default::default() };
        let request = Request::without_reply(&self.memory, header, &args)?;
        self.forgets.lock().unwrap_or_else(PoisonError::into_inner).send(request)
    }

    /// Waits until the device has taken all FORGETs.
    pub fn drain_forgets(&mut self) -> Result<()> {
        self.forgets.lock().unwrap_or_else(PoisonError::into_inner).drain()
    }
}
