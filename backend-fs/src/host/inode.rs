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
//! why a lookup may take (mount, inode number) for its identity. An evicted one is only believed to be
//! the same file when the handles are equal. If they are not, the number was reused: the old inode stays
//! reachable by its node id (and answers `ESTALE`) but leaves the map to the new one.
//!
//! When the budget is used up, the inode that was not used for longest, roughly, is evicted ([`evict`]). One
//! that is used is pinned again, and another goes. Where files have no handles the budget is the end:
//! `ENFILE`.
//!
//! **Limits.** `max_inodes` (`ENOMEM`), the descriptor budget. About 200 bytes per evicted inode.
#![forbid(unsafe_code)]

mod evict;
mod identity;

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use arc_swap::{ArcSwap, Guard};
use rustix::fs::Statx;
use rustix::io::Errno;

pub(super) use self::identity::kind_of;
use self::identity::{InodeHash, Key, birth};
use super::fd_budget::{BudgetedFd, FdBudget};
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
