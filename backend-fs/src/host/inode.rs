//! The inodes the DPU knows: by node id, and by identity on the host.
//!
//! # Theory of operation
//!
//! Two ways lead to an [`Inode`]:
//! - [`Table`]: node id → inode, without a lock. Every request takes it.
//! - a sharded map: (mount, inode number) → inode, one mutex per shard. Only lookups that find or make
//!   an inode and the last FORGET take it.
//!
//! **References.** `nlookup` counts what the DPU will give back by FORGET. It grows only under the
//! shard's lock and only while the inode is in the map; FORGET lowers it without a lock and, at 0, takes the
//! lock and looks again. So an inode that a lookup has just found is never removed under it.
//!
//! **Descriptors.** An inode is *pinned* (it has an `O_PATH` descriptor from the budget) or *evicted* (it
//! has a file handle, `name_to_handle_at(2)`). A pinned inode's number cannot be reused on the host; this is
//! why a lookup may take (mount, inode number) for its identity. An evicted one is only believed to be the
//! same file when the handles are equal. If they are not, the number was reused: the old inode stays reachable by its node id
//! (and answers `ESTALE`) but leaves the map to the new one.
//!
//! When the budget is used up, a clock hand goes over the shards' queues of pinned inodes: one that was used since the hand passed
//! stays, another is evicted. Its descriptor is closed when the last operation that still uses it ends. An
//! evicted inode that is used is pinned again, and another goes. Where files have no handles the budget is the end:
//! `ENFILE`.
//!
//! **Limits.** `max_inodes` (`ENOMEM`), the descriptor budget. About 200 bytes per evicted inode.
#![forbid(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::{ArcSwap, Guard};
use rustix::fs::{OFlags, Statx};
use rustix::io::Errno;

use super::fd_budget::{BudgetedFd, FdBudget, FdToken};
use super::mount::{Mount, Mounts};
use super::sys::{self, FileHandle};
use super::table::{Identified, Table, lock};
use crate::filesystem::{NodeId, Result};

const SHARDS: usize = 64;

/// A file the DPU has a node id for.
pub(super) struct Inode {
    id: u64,
    ino: u64,
    /// Creation time in nanoseconds, 0 where the file system has none.
    btime: i64,
    /// `S_IFMT` bits; they never change.
    kind: u32,
    /// Open files on it.
    opens: AtomicU32,
    pub(super) mount: Arc<Mount>,
    nlookup: AtomicU64,
    /// The store's *absent* descriptor when evicted.
    fd: ArcSwap<BudgetedFd>,
    /// Set before the first eviction.
    handle: OnceLock<FileHandle>,
    /// Used since the clock hand passed.
    used: AtomicBool,
    /// May not be evicted: it has no name yet (`O_TMPFILE`), so that its last descriptor is its life.
    keep: AtomicBool,
}

impl Identified for Inode {
    fn id(&self) -> u64 {
        self.id
    }
}

impl Inode {
    pub(super) fn node(&self) -> NodeId {
        NodeId(self.id)
    }

    /// `S_IFMT` bits.
    pub(super) fn kind(&self) -> u32 {
        self.kind
    }

    pub(super) fn is_directory(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Counts an open file.
    pub(super) fn opened(&self) {
        self.opens.fetch_add(1, Ordering::AcqRel);
    }

    /// Counts an open file off; true when it was the last.
    pub(super) fn closed(&self) -> bool {
        self.opens.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// It must stay pinned (`true`) or need not any more.
    pub(super) fn set_keep(&self, keep: bool) {
        self.keep.store(keep, Ordering::Relaxed);
    }

    fn key(&self) -> Key {
        Key { ino: self.ino, mount: self.mount.index }
    }

    fn pinned(&self) -> Option<Guard<Arc<BudgetedFd>>> {
        let fd = self.fd.load();
        (!fd.is_uncounted() || self.id == NodeId::ROOT.0).then_some(fd)
    }

    /// It has a descriptor now.
    pub(super) fn is_pinned(&self) -> bool {
        self.pinned().is_some()
    }

    fn touch(&self) {
        // Written only when it changes, so that the line stays shared between the queues.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }
}

/// An `O_PATH` descriptor of an inode, good while it is borrowed.
pub(super) enum InodeFd {
    Pinned(Guard<Arc<BudgetedFd>>),
    Repinned(Arc<BudgetedFd>),
    Transient(OwnedFd),
}

impl AsFd for InodeFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            InodeFd::Pinned(fd) => fd.as_fd(),
            InodeFd::Repinned(fd) => fd.as_fd(),
            InodeFd::Transient(fd) => fd.as_fd(),
        }
    }
}

/// Identity on the host while an inode is pinned.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Key {
    ino: u64,
    mount: u32,
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.ino ^ (u64::from(self.mount) << 48));
    }
}

/// Inode numbers come from the host, so a mixing function (the finaliser of MurmurHash3) will do.
#[derive(Default)]
struct InodeHasher(u64);

impl Hasher for InodeHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mut mixed = self.0 ^ value;
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed = (mixed ^ (mixed >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        self.0 = mixed ^ (mixed >> 33);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

type InodeHash = BuildHasherDefault<InodeHasher>;

#[derive(Default)]
struct Shard {
    inodes: HashMap<Key, Arc<Inode>, InodeHash>,
    /// Node ids in the order in which they were pinned; may hold some that are gone or evicted.
    pinned: VecDeque<u64>,
}

/// What went wrong without anybody being told.
#[derive(Debug, Default)]
pub(super) struct InodeCounters {
    /// FORGETs of more references than there were.
    pub(super) forget_underflows: AtomicU64,
    /// FORGETs of node ids that do not exist.
    pub(super) forget_unknown: AtomicU64,
    /// Inodes that gave their descriptor back.
    pub(super) evictions: AtomicU64,
    /// Evicted inodes that were opened by handle.
    pub(super) reopens: AtomicU64,
    /// Inode numbers that another file has now.
    pub(super) reused: AtomicU64,
}

/// See the module's description.
pub(super) struct InodeStore {
    table: Table<Inode>,
    shards: Box<[Mutex<Shard>]>,
    pub(super) mounts: Mounts,
    pub(super) budget: Arc<FdBudget>,
    proc_self_fd: OwnedFd,
    /// Stands in an evicted inode's place for a descriptor. Never used as one.
    absent: Arc<BudgetedFd>,
    /// Shard where the clock hand stands.
    hand: AtomicUsize,
    pub(super) counters: InodeCounters,
}

fn birth(stat: &Statx) -> i64 {
    stat.stx_btime.tv_sec.wrapping_mul(1_000_000_000).wrapping_add(i64::from(stat.stx_btime.tv_nsec))
}

pub(super) fn kind_of(stat: &Statx) -> u32 {
    u32::from(stat.stx_mode) & libc::S_IFMT
}

impl InodeStore {
    /// A store whose root is the directory `root`.
    ///
    /// # Errors
    /// Of the first look at the root.
    pub(super) fn new(
        root: OwnedFd,
        proc_self_fd: OwnedFd,
        mounts: Mounts,
        budget: Arc<FdBudget>,
        max_inodes: usize,
    ) -> Result<Self> {
        let absent =
            Arc::new(BudgetedFd::uncounted(rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)?));
        let stat = sys::stat_fd(root.as_fd())?;
        let mount = mounts.get(proc_self_fd.as_fd(), root.as_fd(), &stat)?;
        let inode = |id, ino, btime, kind, mount, fd, nlookup| Inode {
            id,
            ino,
            btime,
            kind,
            opens: AtomicU32::new(0),
            mount,
            nlookup: AtomicU64::new(nlookup),
            fd: ArcSwap::new(fd),
            handle: OnceLock::new(),
            used: AtomicBool::new(true),
            keep: AtomicBool::new(false),
        };
        let vacant = inode(0, 0, 0, 0, Mount::none(), Arc::clone(&absent), 0);
        // The root is not the DPU's to count.
        let table = Table::new(max_inodes.saturating_add(1), Arc::new(vacant));
        let store = Self {
            table,
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            mounts,
            budget,
            proc_self_fd,
            absent,
            hand: AtomicUsize::new(0),
            counters: InodeCounters::default(),
        };
        let root = store
            .table
            .insert(|id| {
                let fd = Arc::new(BudgetedFd::uncounted(root));
                inode(id, stat.stx_ino, birth(&stat), kind_of(&stat), mount, fd, 1)
            })
            .map_err(|_| Errno::NOMEM)?;
        lock(store.shard(root.key())).inodes.insert(root.key(), root);
        Ok(store)
    }

    /// `/proc/self/fd`.
    pub(super) fn proc_self_fd(&self) -> BorrowedFd<'_> {
        self.proc_self_fd.as_fd()
    }

    /// The descriptor that stands for none.
    pub(super) fn absent_fd(&self) -> Arc<BudgetedFd> {
        Arc::clone(&self.absent)
    }

    /// Inodes the DPU knows, with the root.
    pub(super) fn len(&self) -> usize {
        self.table.len()
    }

    /// The inode with this node id.
    ///
    /// # Errors
    /// `EBADF`: there is none.
    pub(super) fn get(&self, node: NodeId) -> Result<Guard<Arc<Inode>>> {
        self.table.get(node.0).ok_or(Errno::BADF)
    }

    /// An `O_PATH` descriptor of the inode.
    ///
    /// # Errors
    /// `ESTALE`: it was evicted and the file is gone.
    pub(super) fn fd(&self, inode: &Inode) -> Result<InodeFd> {
        inode.touch();
        match inode.pinned() {
            Some(fd) => Ok(InodeFd::Pinned(fd)),
            None => self.repin(inode),
        }
    }

    /// Opens the inode's file anew, for input and output. The caller has checked its kind.
    pub(super) fn open(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        inode.touch();
        self.with_descriptors(|| match inode.pinned() {
            Some(fd) => sys::reopen(self.proc_self_fd.as_fd(), fd.as_fd(), flags),
            None => self.open_handle(inode, flags),
        })
    }

    /// Does `open`, which makes a descriptor; when the process has none left an inode gives one back first.
    pub(super) fn with_descriptors<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.evict(8);
                open().map_err(|errno| if errno == Errno::MFILE { Errno::NFILE } else { errno })
            }
            result => result,
        }
    }

    /// Room for a descriptor, at the cost of an inode's if need be.
    pub(super) fn take_token(&self) -> Option<FdToken> {
        // Another thread may take what this one has freed; each round frees one, so this ends.
        for _ in 0..4 {
            if let Some(token) = self.budget.take() {
                return Some(token);
            }
            if self.evict(1) == 0 {
                return None;
            }
        }
        self.budget.take()
    }

    fn open_handle(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        let handle = inode.handle.get().ok_or(Errno::STALE)?;
        let mount = inode.mount.open_by_handle_fd().ok_or(Errno::STALE)?;
        self.counters.reopens.fetch_add(1, Ordering::Relaxed);
        handle.open(mount, flags)
    }

    fn repin(&self, inode: &Inode) -> Result<InodeFd> {
        let fd = self.with_descriptors(|| self.open_handle(inode, OFlags::PATH | OFlags::NOFOLLOW))?;
        let Some(token) = self.take_token() else { return Ok(InodeFd::Transient(fd)) };
        let fd = Arc::new(BudgetedFd::new(fd, token));
        let mut shard = lock(self.shard(inode.key()));
        // Not when it was forgotten meanwhile: nobody would ever evict it.
        if self.table.get(inode.id).is_some() {
            self.pin(&mut shard, inode, Arc::clone(&fd));
        }
        Ok(InodeFd::Repinned(fd))
    }

    /// Gives an inode of this shard a descriptor.
    fn pin(&self, shard: &mut Shard, inode: &Inode, fd: Arc<BudgetedFd>) {
        let before = inode.fd.swap(fd);
        if before.is_uncounted() {
            self.enqueue(shard, inode.id);
        }
    }

    /// Puts a pinned inode where the clock hand finds it.
    fn enqueue(&self, shard: &mut Shard, id: u64) {
        if shard.pinned.len() > 2 * shard.inodes.len() + 64 {
            shard.pinned.retain(|id| self.table.get(*id).is_some_and(|inode| inode.pinned().is_some()));
            shard.pinned.shrink_to(2 * shard.inodes.len() + 64);
        }
        shard.pinned.push_back(id);
    }

    /// Takes the descriptors of up to `wanted` inodes. Returns how many were taken.
    pub(super) fn evict(&self, wanted: usize) -> usize {
        let mut evicted = 0;
        if !self.mounts.any_handles() {
            return 0;
        }
        // Twice around: the first pass may do no more than clear the marks.
        for _ in 0..2 * SHARDS {
            let index = self.hand.load(Ordering::Relaxed) % SHARDS;
            let mut visits = lock(&self.shards[index]).pinned.len();
            while visits > 0 && evicted < wanted {
                visits -= 1;
                let Some(candidate) = self.next_candidate(index) else { break };
                if self.evict_one(&candidate) {
                    evicted += 1;
                } else {
                    lock(&self.shards[index]).pinned.push_back(candidate.id);
                }
            }
            if evicted >= wanted {
                break;
            }
            // Whoever is first moves the hand on.
            let _ =
                self.hand.compare_exchange(index, (index + 1) % SHARDS, Ordering::Relaxed, Ordering::Relaxed);
        }
        self.counters.evictions.fetch_add(evicted as u64, Ordering::Relaxed);
        evicted
    }

    /// The next pinned inode of a shard that may go, taken off its queue.
    fn next_candidate(&self, index: usize) -> Option<Arc<Inode>> {
        let mut shard = lock(&self.shards[index]);
        for _ in 0..shard.pinned.len() {
            let id = shard.pinned.pop_front()?;
            let Some(inode) = self.table.get(id) else { continue };
            if inode.pinned().is_none() {
                continue;
            }
            let must_stay = inode.keep.load(Ordering::Relaxed) || inode.mount.handle_fd().is_none();
            if must_stay || inode.used.swap(false, Ordering::Relaxed) {
                shard.pinned.push_back(id);
                continue;
            }
            return Some(Guard::into_inner(inode));
        }
        None
    }

    fn evict_one(&self, inode: &Inode) -> bool {
        if inode.handle.get().is_none() {
            let Some(fd) = inode.pinned() else { return true };
            match FileHandle::of(fd.as_fd()) {
                // Another thread may have been first, with the same handle.
                Ok(handle) => drop(inode.handle.set(handle)),
                Err(_) => {
                    inode.mount.give_up_handles();
                    return false;
                }
            }
        }
        inode.fd.store(Arc::clone(&self.absent));
        true
    }

    /// The shard of an identity. The map inside uses other bits of the hash.
    fn shard(&self, key: Key) -> &Mutex<Shard> {
        let hash = InodeHash::default().hash_one(key);
        &self.shards[(hash >> 40) as usize % SHARDS]
    }

    /// The inode that `stat`, taken by name, describes, with one more reference; only if it is known and
    /// certain without another system call.
    pub(super) fn find(&self, stat: &Statx, near: &Inode) -> Option<(NodeId, Arc<Mount>)> {
        let mount = if near.mount.holds(stat) { Arc::clone(&near.mount) } else { self.mounts.find(stat)? };
        let key = Key { ino: stat.stx_ino, mount: mount.index };
        let shard = lock(self.shard(key));
        let inode = shard.inodes.get(&key)?;
        // The creation time tells a number that was reused between the call and the lock.
        if inode.btime != birth(stat) || inode.kind != kind_of(stat) || inode.pinned().is_none() {
            return None;
        }
        inode.nlookup.fetch_add(1, Ordering::Relaxed);
        inode.touch();
        let node = inode.node();
        drop(shard);
        Some((node, mount))
    }

    /// The inode of the open file `fd` (`O_PATH`) with attributes `stat`, new or known, with one more
    /// reference.
    ///
    /// # Errors
    /// `ENFILE`, `ENOMEM`: a budget is used up.
    pub(super) fn adopt(&self, fd: OwnedFd, stat: &Statx) -> Result<Arc<Inode>> {
        let mount = self.mounts.get(self.proc_self_fd.as_fd(), fd.as_fd(), stat)?;
        let key = Key { ino: stat.stx_ino, mount: mount.index };
        let mut token = self.take_token();
        let mut handle = None;
        if token.is_none() {
            mount.handle_fd().ok_or(Errno::NFILE)?;
            handle = Some(FileHandle::of(fd.as_fd()).map_err(|_| Errno::NFILE)?);
        }
        loop {
            let mut shard = lock(self.shard(key));
            if let Some(known) = shard.inodes.get(&key).map(Arc::clone) {
                // While both descriptors are open one number is one file.
                let mut same = known.pinned().is_some();
                if !same {
                    let Some(handle) = &handle else {
                        drop(shard);
                        handle = Some(FileHandle::of(fd.as_fd())?);
                        continue;
                    };
                    same = known.handle.get() == Some(handle);
                }
                if same {
                    known.nlookup.fetch_add(1, Ordering::Relaxed);
                    known.touch();
                    if let Some(token) = token.take_if(|_| known.pinned().is_none()) {
                        self.pin(&mut shard, &known, Arc::new(BudgetedFd::new(fd, token)));
                    }
                    return Ok(known);
                }
                self.counters.reused.fetch_add(1, Ordering::Relaxed);
            }
            let pinned = token.is_some();
            let fd = match token {
                Some(token) => Arc::new(BudgetedFd::new(fd, token)),
                None => Arc::clone(&self.absent),
            };
            let inode = self
                .table
                .insert(|id| Inode {
                    id,
                    ino: stat.stx_ino,
                    btime: birth(stat),
                    kind: kind_of(stat),
                    opens: AtomicU32::new(0),
                    mount,
                    nlookup: AtomicU64::new(1),
                    fd: ArcSwap::new(fd),
                    handle: handle.map(OnceLock::from).unwrap_or_default(),
                    used: AtomicBool::new(true),
                    keep: AtomicBool::new(false),
                })
                .map_err(|_| Errno::NOMEM)?;
            let replaced = shard.inodes.insert(key, Arc::clone(&inode));
            if pinned {
                self.enqueue(&mut shard, inode.id);
            }
            drop(shard);
            drop(replaced);
            return Ok(inode);
        }
    }

    /// The DPU gives `count` references back. The root stays.
    pub(super) fn forget(&self, node: NodeId, count: u64) {
        if node == NodeId::ROOT {
            return;
        }
        let Some(inode) = self.table.get(node.0) else {
            self.counters.forget_unknown.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let mut underflow = false;
        let left = inode.nlookup.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |held| {
            underflow = held < count;
            Some(held.saturating_sub(count))
        });
        if underflow {
            self.counters.forget_underflows.fetch_add(1, Ordering::Relaxed);
        }
        if left.is_ok_and(|held| held <= count) {
            self.remove_unreferenced(&inode);
        }
    }

    fn remove_unreferenced(&self, inode: &Inode) {
        let key = inode.key();
        let mut shard = lock(self.shard(key));
        // A lookup that came first has taken a reference under this lock.
        if inode.nlookup.load(Ordering::Acquire) != 0 {
            return;
        }
        // Not when another file has the number now.
        let mapped = shard.inodes.get(&key).is_some_and(|mapped| mapped.id == inode.id);
        let from_map = mapped.then(|| shard.inodes.remove(&key));
        let from_table = self.table.remove(inode.id);
        let room = shard.inodes.capacity();
        if room > 256 && shard.inodes.len() < room / 8 {
            shard.inodes.shrink_to(room / 4);
        }
        // The descriptor is closed after the lock is free.
        drop(shard);
        drop((from_map, from_table));
    }

    /// Forgets every inode but the root.
    pub(super) fn clear(&self) {
        for id in self.table.ids().filter(|id| *id != NodeId::ROOT.0) {
            if let Some(inode) = self.table.get(id) {
                inode.nlookup.store(0, Ordering::Release);
                self.remove_unreferenced(&inode);
            }
        }
        for shard in &self.shards {
            let mut shard = lock(shard);
            shard.pinned.retain(|id| self.table.get(*id).is_some());
            shard.pinned.shrink_to_fit();
        }
    }
}
