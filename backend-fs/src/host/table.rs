//! Numbers the DPU uses (node ids, handles) to the objects behind them, without a lock.
//!
//! A slot is an atomically replaceable reference; [`Table::get`] reads it through `arc-swap`, which
//! writes to no memory that threads share. That is why this is not `sharded-slab`: its lookups
//! write to the entry they find, and its keys come back after some thousand reuses.
//!
//! An id is the slot's index in its low [`INDEX_BITS`] and the slot's generation above. A freed slot
//! returns with the next generation; when that would overflow it is retired. So **an id is never used
//! twice**, and an id of the DPU that is out of date finds nothing. An empty slot holds the table's
//! *vacant* object, whose id is 0.
//!
//! Slots live in pages that are made on first use and stay. Ids are given out from sharded lists of
//! free ids; only inserting and removing, which always come with slower system calls, take those locks.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use arc_swap::{ArcSwap, Guard};

/// Bits of an id that say which slot it is: 2^26 = 67 million slots.
const INDEX_BITS: u32 = 26;
const INDEX_MASK: u64 = (1 << INDEX_BITS) - 1;
const PAGE_SLOTS: usize = 4096;
const SHARDS: usize = 16;

/// Largest number of objects a table can be made for.
pub(super) const MAX_CAPACITY: usize = (INDEX_MASK as usize) - PAGE_SLOTS;

/// An object that knows the id it has in its table; 0 for the vacant one.
pub(super) trait Identified {
    fn id(&self) -> u64;
}

/// [`PAGE_SLOTS`] slots.
type Page<T> = Box<[ArcSwap<T>]>;

/// See the module's description.
pub(super) struct Table<T> {
    pages: Box<[OnceLock<Page<T>>]>,
    /// Index of the first slot that was never used.
    fresh: AtomicU64,
    free: [Mutex<Vec<u64>>; SHARDS],
    vacant: Arc<T>,
    live: AtomicUsize,
    capacity: usize,
}

/// No slot is left.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

impl<T: Identified> Table<T> {
    /// A table for at most `capacity` objects (and at most [`MAX_CAPACITY`]).
    pub(super) fn new(capacity: usize, vacant: Arc<T>) -> Self {
        let capacity = capacity.min(MAX_CAPACITY);
        // Slots can lie unused in another thread's free list, so there are some more than objects.
        let pages = capacity.div_ceil(PAGE_SLOTS) + 2;
        Self {
            pages: (0..pages).map(|_| OnceLock::new()).collect(),
            fresh: AtomicU64::new(1),
            free: std::array::from_fn(|_| Mutex::new(Vec::new())),
            vacant,
            live: AtomicUsize::new(0),
            capacity,
        }
    }

    /// Objects in the table.
    pub(super) fn len(&self) -> usize {
        self.live.load(Ordering::Relaxed)
    }

    /// The object with this id.
    pub(super) fn get(&self, id: u64) -> Option<Guard<Arc<T>>> {
        let found = self.slot(id)?.load();
        (id != 0 && found.id() == id).then_some(found)
    }

    /// Adds what `make` makes of its id. The first object of a table gets id 1.
    ///
    /// # Errors
    /// [`Full`].
    pub(super) fn insert(&self, make: impl FnOnce(u64) -> T) -> Result<Arc<T>, Full> {
        let admitted = self.live.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |live| {
            (live < self.capacity).then_some(live + 1)
        });
        if admitted.is_err() {
            return Err(Full);
        }
        let Some((id, slot)) = self.vacant_slot() else {
            self.live.fetch_sub(1, Ordering::Relaxed);
            return Err(Full);
        };
        let object = Arc::new(make(id));
        slot.store(Arc::clone(&object));
        Ok(object)
    }

    /// Takes the object out. Of several threads that try, one gets it.
    pub(super) fn remove(&self, id: u64) -> Option<Arc<T>> {
        let slot = self.slot(id)?;
        let found = self.get(id)?;
        let before = slot.compare_and_swap(&*found, Arc::clone(&self.vacant));
        if !Arc::ptr_eq(&before, &found) {
            return None;
        }
        self.live.fetch_sub(1, Ordering::Relaxed);
        // Retired when the generation would overflow.
        if let Some(next) = id.checked_add(1 << INDEX_BITS) {
            lock(&self.free[(id & INDEX_MASK) as usize % SHARDS]).push(next);
        }
        Some(Guard::into_inner(before))
    }

    /// The ids in use at some time during the call.
    pub(super) fn ids(&self) -> impl Iterator<Item = u64> {
        self.pages
            .iter()
            .filter_map(OnceLock::get)
            .flat_map(|page| page.iter())
            .map(|slot| slot.load().id())
            .filter(|id| *id != 0)
    }

    fn vacant_slot(&self) -> Option<(u64, &ArcSwap<T>)> {
        let home = home_shard();
        let freed = lock(&self.free[home]).pop();
        let id = match freed.or_else(|| self.fresh_id()) {
            Some(id) => id,
            None => self.free.iter().find_map(|shard| lock(shard).pop())?,
        };
        Some((id, self.slot(id)?))
    }

    fn fresh_id(&self) -> Option<u64> {
        let end = (self.pages.len() * PAGE_SLOTS) as u64;
        let index = self
            .fresh
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |fresh| (fresh < end).then_some(fresh + 1))
            .ok()?;
        self.pages[index as usize / PAGE_SLOTS]
            .get_or_init(|| (0..PAGE_SLOTS).map(|_| ArcSwap::new(Arc::clone(&self.vacant))).collect());
        Some(index)
    }

    fn slot(&self, id: u64) -> Option<&ArcSwap<T>> {
        let index = (id & INDEX_MASK) as usize;
        self.pages.get(index / PAGE_SLOTS)?.get()?.get(index % PAGE_SLOTS)
    }
}

/// Locks; the data of a thread that panicked while it had the lock are whole all the same.
pub(super) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The free list that the calling thread prefers.
fn home_shard() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static HOME: Cell<Option<usize>> = const { Cell::new(None) };
    }
    HOME.with(|home| {
        let shard = home.get().unwrap_or_else(|| NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
        home.set(Some(shard));
        shard
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    struct Object(u64);

    impl Identified for Object {
        fn id(&self) -> u64 {
            self.0
        }
    }

    fn table(capacity: usize) -> Table<Object> {
        Table::new(capacity, Arc::new(Object(0)))
    }

    #[test]
    fn first_id_is_one_and_zero_is_never_found() {
        let table = table(10);
        assert!(table.get(0).is_none());
        assert_eq!(table.insert(Object).unwrap().0, 1);
        assert!(table.get(0).is_none());
        assert!(table.get(1).is_some());
    }

    #[test]
    fn ids_are_never_used_twice() {
        let table = table(10);
        let mut seen = HashSet::new();
        for _ in 0..100_000 {
            let id = table.insert(Object).unwrap().0;
            assert!(seen.insert(id));
            assert!(table.remove(id).is_some());
            assert!(table.get(id).is_none());
        }
    }

    #[test]
    fn a_slot_whose_generations_are_used_up_is_retired() {
        let table = table(10);
        let id = table.insert(Object).unwrap().0;
        let last = id | !INDEX_MASK;
        table.slot(id).unwrap().store(Arc::new(Object(last)));
        assert!(table.remove(last).is_some());
        assert_ne!(table.insert(Object).unwrap().0 & INDEX_MASK, id);
    }

    #[test]
    fn capacity_holds_and_comes_back() {
        let table = table(3);
        let ids: Vec<u64> = (0..3).map(|_| table.insert(Object).unwrap().0).collect();
        assert_eq!(table.insert(Object).err(), Some(Full));
        table.remove(ids[1]);
        assert!(table.insert(Object).is_ok());
        assert_eq!(table.len(), 3);
    }

    #[test]
    fn made_up_ids_find_nothing() {
        let table = table(10);
        table.insert(Object).unwrap();
        for id in [2, 5000, INDEX_MASK, 1 + (1 << INDEX_BITS), u64::MAX] {
            assert!(table.get(id).is_none(), "{id}");
            assert!(table.remove(id).is_none(), "{id}");
        }
    }

    #[test]
    fn of_racing_removers_one_wins() {
        let table = table(1000);
        for _ in 0..200 {
            let id = table.insert(Object).unwrap().0;
            let winners: usize = std::thread::scope(|scope| {
                let threads: Vec<_> =
                    (0..4).map(|_| scope.spawn(|| usize::from(table.remove(id).is_some()))).collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).sum()
            });
            assert_eq!(winners, 1);
        }
        assert_eq!(table.len(), 0);
    }
}
