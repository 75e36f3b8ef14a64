//! `flock` and POSIX locks, held on the host, so that every DPU and every host program sees them.
//!
//! # Theory of operation
//!
//! **`flock`** belongs to an open file description on the DPU, and so to a handle; it is taken on the
//! handle's own descriptor.
//!
//! **POSIX locks** belong to (inode, lock owner), an owner being a process of the DPU. `fcntl(F_SETLK)` would make all of
//! them this daemon's. So each (inode, owner) gets a description of its own and open file description locks
//! on it: these conflict between owners and with the locks of host programs. The description is made by
//! the first lock and closed when the owner holds nothing any more. FLUSH (a `close(2)` on the DPU) drops
//! all that its owner has on the inode, the last RELEASE all that anybody has.
//!
//! What each owner holds is kept here as well ([`RangeSet`]). It changes under the owner's own mutex together with
//! the system call, so both always agree. It answers whose lock stands in the way, when a
//! description can be closed, how much is held in all (the kernel sets no limit), and whether waiting
//! would close a circle (`EDEADLK`; the kernel looks for that with process locks only).
//!
//! **Waiting** happens in a blocking `fcntl` or `flock` of the calling thread, with no mutex held. When it returns,
//! the lock is asked for once more under the owner's mutex (which is granted, or waits again if another
//! thread of the owner has just dropped it). The virtio-fs driver cannot interrupt a
//! request, but the file system can end: each waiting thread is registered, and
//! [`Locks::cancel_all`] signals it (empty handler, no `SA_RESTART`) again and again until it has left, so
//! a signal that comes just before the thread sleeps is not lost.
//!
//! **Order of mutexes**: waits, then a shard, then an owner's state. Registry: alone.
//!
//! **Limits**: waiting threads and ranges (`ENOLCK`); each description counts in the descriptor budget.
#![forbid(unsafe_code)]

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::Guard;
use rustix::fs::{FlockOperation, OFlags};
use rustix::io::Errno;
use rustix::thread::Pid;

use super::HostFs;
use super::fd_budget::BudgetedFd;
use super::handle::Handle;
use super::lock_ranges::{Range, RangeSet};
use super::sys::{self, OfdLock};
use super::table::lock;
use crate::filesystem::{Context, LockRequest, NodeId, Result};
use crate::fuse::abi;

const READ: u32 = libc::F_RDLCK as u32;
const WRITE: u32 = libc::F_WRLCK as u32;
const UNLOCK: u32 = libc::F_UNLCK as u32;

/// Last byte of the longest file (`OFFSET_MAX`); as the end of a range it means "however long".
const LAST_BYTE: u64 = i64::MAX as u64;

const SHARDS: usize = 16;

/// Ranges that an export may hold in all. Each takes some 200 bytes of kernel memory, and the kernel looks
/// through those of a file one by one.
const MAX_RANGES: usize = 1 << 14;

/// How long [`Locks::cancel_all`] waits before it signals again.
const SIGNAL_AGAIN: Duration = Duration::from_millis(1);

/// One process of the DPU in one inode.
struct Owner {
    file: BudgetedFd,
    state: Mutex<OwnerState>,
}

#[derive(Default)]
struct OwnerState {
    held: RangeSet,
    /// Process id on the DPU, of the last one that locked.
    pid: u32,
}

/// An owner and how many threads use it now. It stays while anybody does.
struct OwnerEntry {
    owner: Arc<Owner>,
    users: usize,
}

type Owners = HashMap<u64, HashMap<u64, OwnerEntry>>;

/// A thread that waits, or is about to.
#[derive(Clone, Copy)]
struct Wait {
    node: u64,
    owner: u64,
    range: Range,
}

#[derive(Default)]
struct Registry {
    next: u64,
    threads: HashMap<u64, Waiter>,
}

/// A thread that waits: for whom, and before which interruption it began.
#[derive(Clone, Copy)]
struct Waiter {
    thread: Pid,
    epoch: u64,
    interruption: u64,
}

/// All locks of an export.
pub(super) struct Locks {
    owners: [Mutex<Owners>; SHARDS],
    /// Owners there are, so that a FLUSH without any costs nothing.
    owner_count: AtomicUsize,
    range_count: AtomicUsize,
    waits: Mutex<HashMap<u64, Wait>>,
    next_wait: AtomicU64,
    registry: Mutex<Registry>,
    left: Condvar,
    /// Each new one cancels what was begun in the ones before.
    epoch: AtomicU64,
    /// Number of [`Locks::interrupt_all`] calls so far.
    interruptions: AtomicU64,
    max_waiters: usize,
}

/// A request's range in the forms that are needed of it.
#[derive(Clone, Copy)]
struct Asked {
    range: Range,
    host: OfdLock,
}

fn asked(request: &abi::FileLock) -> Result<Asked> {
    let abi::FileLock { start, end, kind, .. } = *request;
    if start > end || end > LAST_BYTE || ![READ, WRITE, UNLOCK].contains(&kind) {
        return Err(Errno::INVAL);
    }
    let len = if end == LAST_BYTE { 0 } else { end - start + 1 };
    Ok(Asked {
        range: Range { start, end, write: kind == WRITE },
        host: OfdLock { kind, start: start as i64, len: len as i64, pid: 0 },
    })
}

impl Locks {
    pub(super) fn new(max_waiters: usize) -> Result<Self> {
        sys::install_wake_handler()?;
        Ok(Self {
            owners: Default::default(),
            owner_count: AtomicUsize::new(0),
            range_count: AtomicUsize::new(0),
            waits: Mutex::default(),
            next_wait: AtomicU64::new(0),
            registry: Mutex::default(),
            left: Condvar::new(),
            epoch: AtomicU64::new(0),
            interruptions: AtomicU64::new(0),
            max_waiters,
        })
    }

    /// Threads that wait for a lock now.
    pub(super) fn waiters(&self) -> usize {
        lock(&self.registry).threads.len()
    }

    fn shard(&self, node: u64) -> &Mutex<Owners> {
        &self.owners[(node % SHARDS as u64) as usize]
    }

    /// The owner, kept until [`Locks::done`].
    fn find(&self, node: u64, owner: u64) -> Option<Arc<Owner>> {
        let mut shard = lock(self.shard(node));
        let entry = shard.get_mut(&node)?.get_mut(&owner)?;
        entry.users += 1;
        Some(Arc::clone(&entry.owner))
    }

    /// As [`Locks::find`], for a new owner with its description `file`, unless another thread was first.
    fn find_or_insert(&self, node: u64, owner: u64, file: BudgetedFd) -> Arc<Owner> {
        let mut shard = lock(self.shard(node));
        let entry = shard.entry(node).or_default().entry(owner).or_insert_with(|| {
            self.owner_count.fetch_add(1, Ordering::Relaxed);
            OwnerEntry { owner: Arc::new(Owner { file, state: Mutex::default() }), users: 0 }
        });
        entry.users += 1;
        Arc::clone(&entry.owner)
    }

    /// Ends what [`Locks::find`] began. An owner that holds nothing and is used by nobody goes.
    fn done(&self, node: u64, owner: u64) {
        let mut shard = lock(self.shard(node));
        if let Some(entry) = shard.get_mut(&node).and_then(|owners| owners.get_mut(&owner)) {
            entry.users -= 1;
        }
        let gone = self.remove_idle(&mut shard, node, owner);
        drop(shard);
        drop(gone);
    }

    fn remove_idle(&self, shard: &mut Owners, node: u64, owner: u64) -> Option<OwnerEntry> {
        let owners = shard.get_mut(&node)?;
        let entry = owners.get(&owner)?;
        if entry.users > 0 || !lock(&entry.owner.state).held.is_empty() {
            return None;
        }
        let gone = owners.remove(&owner);
        if owners.is_empty() {
            shard.remove(&node);
        }
        self.owner_count.fetch_sub(1, Ordering::Relaxed);
        gone
    }

    /// Drops all that `owner` holds in `node`.
    pub(super) fn drop_owner(&self, node: NodeId, owner: u64) {
        if self.owner_count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut shard = lock(self.shard(node.0));
        if let Some(entry) = shard.get(&node.0).and_then(|owners| owners.get(&owner)) {
            self.release_all(&entry.owner);
        }
        let gone = self.remove_idle(&mut shard, node.0, owner);
        drop(shard);
        drop(gone);
    }

    /// Drops all that anybody of the DPU holds in `node`.
    pub(super) fn drop_inode(&self, node: NodeId) {
        if self.owner_count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let owners: Vec<u64> = lock(self.shard(node.0))
            .get(&node.0)
            .map(|owners| owners.keys().copied().collect())
            .unwrap_or_default();
        for owner in owners {
            self.drop_owner(node, owner);
        }
    }

    fn release_all(&self, owner: &Owner) {
        let mut state = lock(&owner.state);
        if state.held.is_empty() {
            return;
        }
        let everything = OfdLock { kind: UNLOCK, start: 0, len: 0, pid: 0 };
        if let Err(errno) = sys::set_ofd_lock(owner.file.as_fd(), everything, false) {
            tracing::error!(%errno, "could not drop the locks of an owner; closing the file drops them");
        }
        self.range_count.fetch_sub(state.held.len(), Ordering::Relaxed);
        state.held.clear();
    }

    /// One attempt, with the bookkeeping that belongs to it.
    fn attempt(&self, owner: &Owner, asked: &Asked, pid: u32) -> Result<()> {
        let mut state = lock(&owner.state);
        let locking = asked.host.kind != UNLOCK;
        // A range can split another in two.
        if locking && self.range_count.load(Ordering::Relaxed) + 2 > MAX_RANGES {
            return Err(Errno::NOLCK);
        }
        sys::set_ofd_lock(owner.file.as_fd(), asked.host, false)?;
        let before = state.held.len();
        if locking {
            state.held.lock(asked.range);
            state.pid = pid;
        } else {
            state.held.unlock(asked.range.start, asked.range.end);
        }
        let after = state.held.len();
        self.range_count.fetch_add(after, Ordering::Relaxed);
        self.range_count.fetch_sub(before, Ordering::Relaxed);
        Ok(())
    }

    /// Owners of `wait`'s inode, other than its own, that hold what it waits for.
    fn blockers(&self, wait: &Wait) -> Vec<u64> {
        let shard = lock(self.shard(wait.node));
        let Some(owners) = shard.get(&wait.node) else { return Vec::new() };
        owners
            .iter()
            .filter(|(owner, entry)| {
                **owner != wait.owner && lock(&entry.owner.state).held.conflict(&wait.range).is_some()
            })
            .map(|(owner, _)| *owner)
            .collect()
    }

    /// Notes that a thread is going to wait.
    ///
    /// # Errors
    /// `EDEADLK`: someone whom it would wait for waits, perhaps through others, for it.
    fn begin_wait(&self, wait: Wait) -> Result<u64> {
        let mut waits = lock(&self.waits);
        let mut seen = HashSet::new();
        let mut ahead = self.blockers(&wait);
        while let Some(owner) = ahead.pop() {
            if owner == wait.owner {
                return Err(Errno::DEADLK);
            }
            if seen.insert(owner) {
                ahead.extend(
                    waits
                        .values()
                        .filter(|other| other.owner == owner)
                        .flat_map(|other| self.blockers(other)),
                );
            }
        }
        let number = self.next_wait.fetch_add(1, Ordering::Relaxed);
        waits.insert(number, wait);
        Ok(number)
    }

    fn end_wait(&self, number: u64) {
        lock(&self.waits).remove(&number);
    }

    fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Does `sleep`, a blocking system call, so that [`Locks::cancel_all`] and [`Locks::interrupt_all`] can
    /// end it. A lock that is granted in the moment of an interruption stays granted.
    ///
    /// # Errors
    /// `EINTR`: cancelled, now or before, or interrupted. `ENOLCK`: too many wait already. Those of `sleep`.
    fn sleep(&self, epoch: u64, sleep: impl Fn() -> Result<()>) -> Result<()> {
        sys::allow_wake_signal()?;
        let (number, interruption) = {
            let mut registry = lock(&self.registry);
            // Read with the registry locked, as the epoch is: an interruption that comes later finds this
            // thread there.
            let interruption = self.interruptions.load(Ordering::SeqCst);
            // Raised before the registry is looked through: whoever sees the old value here is seen there.
            if self.epoch() != epoch {
                return Err(Errno::INTR);
            }
            if registry.threads.len() >= self.max_waiters {
                return Err(Errno::NOLCK);
            }
            registry.next += 1;
            let number = registry.next;
            let thread = rustix::thread::gettid();
            registry.threads.insert(number, Waiter { thread, epoch, interruption });
            (number, interruption)
        };
        let result = loop {
            match sleep() {
                // Some other signal.
                Err(Errno::INTR)
                    if self.epoch() == epoch && self.interruptions.load(Ordering::SeqCst) == interruption => {
                }
                result => break result,
            }
        };
        lock(&self.registry).threads.remove(&number);
        self.left.notify_all();
        if self.epoch() == epoch { result } else { Err(Errno::INTR) }
    }

    /// Ends every wait with `EINTR`. Locks that are held stay.
    pub(super) fn interrupt_all(&self) {
        let interruption = self.interruptions.fetch_add(1, Ordering::SeqCst) + 1;
        self.wake_until_gone(|waiter| waiter.interruption < interruption);
    }

    /// Signals the threads that `wanted` names until none of them waits any more.
    fn wake_until_gone(&self, wanted: impl Fn(&Waiter) -> bool) {
        let mut registry = lock(&self.registry);
        loop {
            let mut waiting = registry.threads.values().filter(|waiter| wanted(waiter)).peekable();
            if waiting.peek().is_none() {
                break;
            }
            // They cannot end while the registry is locked.
            waiting.for_each(|waiter| sys::interrupt_thread(waiter.thread));
            registry =
                self.left.wait_timeout(registry, SIGNAL_AGAIN).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Closes the files by `close_files`, ends every wait with `EINTR` and drops every lock.
    ///
    /// The epoch ends twice. Before the files are closed: their locks go with them, and a thread that gets
    /// one of these must not take it for its own. And after: a request that still found its file has read an
    /// epoch that is over, one that reads the new epoch finds no file.
    pub(super) fn cancel_all(&self, close_files: impl FnOnce()) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        close_files();
        let epoch = self.epoch.fetch_add(1, Ordering::SeqCst) + 1;
        self.wake_until_gone(|waiter| waiter.epoch < epoch);
        for shard in &self.owners {
            let nodes: Vec<u64> = lock(shard).keys().copied().collect();
            nodes.into_iter().for_each(|node| self.drop_inode(NodeId(node)));
        }
    }
}

impl HostFs {
    pub(super) fn do_getlk(&self, cx: &Context, node: NodeId, request: LockRequest) -> Result<abi::FileLock> {
        self.locks_exist()?;
        let handle = self.handle(cx, node, request.handle)?;
        let asked = asked(&request.lock)?;
        if request.flock || asked.host.kind == UNLOCK {
            return Err(Errno::INVAL);
        }
        // An owner's own locks are not in its way. The handle's description never has any.
        let owner = self.locks.find(node.0, request.owner);
        let found = match &owner {
            Some(owner) => sys::get_ofd_lock(owner.file.as_fd(), asked.host),
            None => sys::get_ofd_lock(handle.as_fd(), asked.host),
        };
        if owner.is_some() {
            self.locks.done(node.0, request.owner);
        }
        let found = found?;
        if found.kind == UNLOCK {
            return Ok(abi::FileLock { kind: UNLOCK, ..Default::default() });
        }
        let start = found.start as u64;
        let end = if found.len == 0 { LAST_BYTE } else { start + found.len as u64 - 1 };
        let pid = match u32::try_from(found.pid) {
            Ok(process) => process,
            // Not a process lock: one of ours, or of a host program that has no pid to show either.
            Err(_) => {
                self.locks.holder(node, request.owner, &Range { start, end, write: found.kind == WRITE })
            }
        };
        Ok(abi::FileLock { start, end, kind: found.kind, pid })
    }

    pub(super) fn do_setlk(
        &self,
        cx: &Context,
        node: NodeId,
        request: LockRequest,
        wait: bool,
    ) -> Result<()> {
        self.locks_exist()?;
        let epoch = self.locks.epoch();
        let handle = self.handle(cx, node, request.handle)?;
        let wait = wait && cx.may_block;
        if request.flock {
            return self.set_flock(epoch, &handle, request.lock.kind, wait);
        }
        let asked = asked(&request.lock)?;
        let owner = match self.locks.find(node.0, request.owner) {
            Some(owner) => owner,
            None if asked.host.kind == UNLOCK => return Ok(()),
            None => {
                let file = self.lock_file(&handle)?;
                self.locks.find_or_insert(node.0, request.owner, file)
            }
        };
        // Only a copy is kept while the thread waits: a guard would be one of few.
        let _handle = Guard::into_inner(handle);
        let mut result = self.set_posix(epoch, node, &owner, &request, &asked, wait);
        if self.locks.epoch() != epoch {
            // Cancelled, perhaps at the moment when the lock was granted and after all locks were dropped.
            self.locks.release_all_at_host(&owner);
            result = Err(Errno::INTR);
        }
        self.locks.done(node.0, request.owner);
        result
    }

    fn set_posix(
        &self,
        epoch: u64,
        node: NodeId,
        owner: &Owner,
        request: &LockRequest,
        asked: &Asked,
        wait: bool,
    ) -> Result<()> {
        loop {
            match self.locks.attempt(owner, asked, request.lock.pid) {
                Err(Errno::AGAIN | Errno::ACCESS) if wait => {}
                Err(Errno::ACCESS) => return Err(Errno::AGAIN),
                result => return result,
            }
            let number =
                self.locks.begin_wait(Wait { node: node.0, owner: request.owner, range: asked.range })?;
            let slept = self.locks.sleep(epoch, || sys::set_ofd_lock(owner.file.as_fd(), asked.host, true));
            self.locks.end_wait(number);
            slept?;
        }
    }

    fn set_flock(&self, epoch: u64, handle: &Guard<Arc<Handle>>, kind: u32, wait: bool) -> Result<()> {
        let (now, sleeping) = match kind {
            READ => (FlockOperation::NonBlockingLockShared, FlockOperation::LockShared),
            WRITE => (FlockOperation::NonBlockingLockExclusive, FlockOperation::LockExclusive),
            UNLOCK => (FlockOperation::NonBlockingUnlock, FlockOperation::Unlock),
            _ => return Err(Errno::INVAL),
        };
        match rustix::fs::flock(handle.as_fd(), now) {
            Err(Errno::AGAIN) if wait => {}
            result => return result,
        }
        let handle = Arc::clone(handle);
        self.locks.sleep(epoch, || rustix::fs::flock(handle.as_fd(), sleeping))
    }

    /// A new description of an open file, to hold an owner's locks. It can take write locks where the
    /// file can be written at all; whether this owner may is the DPU's kernel's to say.
    fn lock_file(&self, handle: &Handle) -> Result<BudgetedFd> {
        let token = self.inodes.take_token().ok_or(Errno::NOLCK)?;
        let open = |flags| {
            self.inodes.with_descriptors(|| {
                sys::reopen(self.inodes.proc_self_fd(), handle.as_fd(), flags | OFlags::NONBLOCK)
            })
        };
        let read_only = || open(OFlags::RDONLY);
        let file = if self.options.readonly {
            read_only()
        } else {
            match open(OFlags::RDWR) {
                Err(Errno::ACCESS | Errno::PERM | Errno::ROFS | Errno::TXTBSY | Errno::ISDIR) => read_only(),
                result => result,
            }
        };
        Ok(BudgetedFd::new(file?, token))
    }

    fn locks_exist(&self) -> Result<()> {
        if self.options.host_locks { Ok(()) } else { Err(Errno::NOSYS) }
    }
}

impl Locks {
    /// Process id on the DPU of an owner other than `asking` that holds a lock like `range`; 0 for nobody here.
    fn holder(&self, node: NodeId, asking: u64, range: &Range) -> u32 {
        let shard = lock(self.shard(node.0));
        let Some(owners) = shard.get(&node.0) else { return 0 };
        owners
            .iter()
            .filter(|(owner, _)| **owner != asking)
            .find_map(|(_, entry)| {
                let state = lock(&entry.owner.state);
                let other = Range { write: true, ..*range };
                state.held.conflict(&other).is_some_and(|held| held.write == range.write).then_some(state.pid)
            })
            .unwrap_or(0)
    }

    /// Drops the owner's locks whatever the bookkeeping says.
    fn release_all_at_host(&self, owner: &Owner) {
        self.release_all(owner);
        let everything = OfdLock { kind: UNLOCK, start: 0, len: 0, pid: 0 };
        if let Err(errno) = sys::set_ofd_lock(owner.file.as_fd(), everything, false) {
            tracing::error!(%errno, "could not drop the locks of an owner; closing the file drops them");
        }
    }
}
