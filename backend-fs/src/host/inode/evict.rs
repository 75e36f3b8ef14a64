//! Descriptors of inodes: pinned, evicted, and pinned again.
//!
//! The clock hand stands at a shard and goes over its queue of pinned inodes: one that was used since the
//! hand passed is put back with its mark cleared, another is evicted. An inode whose files have no handles, or
//! that must stay, is put back as it is. Two rounds over all shards without success mean that nothing can
//! be evicted.
//!
//! Evicting replaces the inode's descriptor by the store's *absent* one. Whoever still uses the old one
//! holds a reference to it; it is closed with the last.
#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arc_swap::Guard;
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::{Inode, InodeStore, SHARDS, Shard};
use crate::filesystem::Result;
use crate::host::fd_budget::{BudgetedFd, FdToken};
use crate::host::sys::{self, FileHandle};
use crate::host::table::lock;

/// An `O_PATH` descriptor of an inode, good while it is borrowed.
pub(in crate::host) enum InodeFd {
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

impl InodeStore {
    /// An `O_PATH` descriptor of the inode.
    ///
    /// # Errors
    /// `ESTALE`: it was evicted and the file is gone.
    pub(in crate::host) fn fd(&self, inode: &Inode) -> Result<InodeFd> {
        inode.touch();
        match inode.pinned() {
            Some(fd) => Ok(InodeFd::Pinned(fd)),
            None => self.repin(inode),
        }
    }

    /// Opens the inode's file anew, for input and output. The caller has checked its kind.
    pub(in crate::host) fn open(&self, inode: &Inode, flags: OFlags) -> Result<OwnedFd> {
        inode.touch();
        self.with_descriptors(|| match inode.pinned() {
            Some(fd) => sys::reopen(self.proc_self_fd.as_fd(), fd.as_fd(), flags),
            None => self.open_handle(inode, flags),
        })
    }

    /// Does `open`, which makes a descriptor; when the process has none left an inode gives one back first.
    pub(in crate::host) fn with_descriptors<T>(&self, open: impl Fn() -> Result<T>) -> Result<T> {
        match open() {
            Err(Errno::MFILE | Errno::NFILE) => {
                self.evict(8);
                open().map_err(|errno| if errno == Errno::MFILE { Errno::NFILE } else { errno })
            }
            result => result,
        }
    }

    /// Room for a descriptor, at the cost of an inode's if need be.
    pub(in crate::host) fn take_token(&self) -> Option<FdToken> {
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
    pub(super) fn pin(&self, shard: &mut Shard, inode: &Inode, fd: Arc<BudgetedFd>) {
        let before = inode.fd.swap(fd);
        if before.is_uncounted() {
            self.enqueue(shard, inode.id);
        }
    }

    /// Puts a pinned inode where the clock hand finds it.
    pub(super) fn enqueue(&self, shard: &mut Shard, id: u64) {
        if shard.pinned.len() > 2 * shard.inodes.len() + 64 {
            shard.pinned.retain(|id| self.table.get(*id).is_some_and(|inode| inode.pinned().is_some()));
            shard.pinned.shrink_to(2 * shard.inodes.len() + 64);
        }
        shard.pinned.push_back(id);
    }

    /// Takes the descriptors of up to `wanted` inodes. Returns how many were taken.
    pub(in crate::host) fn evict(&self, wanted: usize) -> usize {
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
}
