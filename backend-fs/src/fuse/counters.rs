//! What was served and what was refused, counted per thread and summed when somebody asks.
//!
//! Each thread that serves owns one set and is its only writer, so counting is a load and a store
//! to a cache line of its own; nothing is shared on the request path. Sets of threads that ended
//! are folded into one total.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::opcode::Opcode;

/// One set of counters.
#[derive(Debug)]
pub struct Counters {
    operations: [AtomicU64; Opcode::TABLE],
    /// Requests answered with an error.
    pub errors: Counter,
    /// Requests that broke the protocol: answered with an error or, without room, not at all.
    pub malformed: Counter,
    /// Chains completed without a reply although one was due.
    pub unanswered: Counter,
    /// Requests with an operation not known here.
    pub unknown: Counter,
    /// Requests handed to a thread that may block.
    pub blocked: Counter,
    /// Bytes of file data read.
    pub read_bytes: Counter,
    /// Bytes of file data written.
    pub written_bytes: Counter,
}

/// One number with a single writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it. Only the owning thread calls this, hence no read-modify-write.
    #[inline]
    pub fn add(&self, amount: u64) {
        add(&self.0, amount);
    }

    fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

#[inline]
fn add(counter: &AtomicU64, amount: u64) {
    counter.store(counter.load(Relaxed).wrapping_add(amount), Relaxed);
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            operations: [const { AtomicU64::new(0) }; Opcode::TABLE],
            errors: Counter::default(),
            malformed: Counter::default(),
            unanswered: Counter::default(),
            unknown: Counter::default(),
            blocked: Counter::default(),
            read_bytes: Counter::default(),
            written_bytes: Counter::default(),
        }
    }
}

impl Counters {
    /// Counts one operation.
    #[inline]
    pub fn operation(&self, opcode: Opcode) {
        add(&self.operations[opcode.index()], 1);
    }
}

/// Sums of all sets at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in `Counters`")]
pub struct Totals {
    /// Operations that were served at least once.
    pub operations: Vec<(Opcode, u64)>,
    pub errors: u64,
    pub malformed: u64,
    pub unanswered: u64,
    pub unknown: u64,
    pub blocked: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
}

impl Totals {
    /// How often an operation was served.
    pub fn operation(&self, opcode: Opcode) -> u64 {
        self.operations.iter().find(|(known, _)| *known == opcode).map_or(0, |(_, count)| *count)
    }
}

/// All sets of one session.
#[derive(Debug, Default)]
pub struct Registry {
    sets: Mutex<Sets>,
}

#[derive(Debug, Default)]
struct Sets {
    live: Vec<Arc<Counters>>,
    /// Sum of the sets whose threads ended.
    ended: Counters,
}

impl Registry {
    /// A new set for the thread that asks.
    pub fn join(self: &Arc<Self>) -> Member {
        let counters = Arc::new(Counters::default());
        self.lock().live.push(Arc::clone(&counters));
        Member { counters, registry: Arc::clone(self) }
    }

    /// Sums up.
    pub fn totals(&self) -> Totals {
        let sets = self.lock();
        let sum = Counters::default();
        sets.live.iter().map(Arc::as_ref).chain([&sets.ended]).for_each(|set| fold(&sum, set));
        let served = |&opcode: &Opcode| {
            let count = sum.operations[opcode.index()].load(Relaxed);
            (count != 0).then_some((opcode, count))
        };
        Totals {
            operations: Opcode::ALL.iter().filter_map(served).collect(),
            errors: sum.errors.get(),
            malformed: sum.malformed.get(),
            unanswered: sum.unanswered.get(),
            unknown: sum.unknown.get(),
            blocked: sum.blocked.get(),
            read_bytes: sum.read_bytes.get(),
            written_bytes: sum.written_bytes.get(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Sets> {
        self.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn fold(into: &Counters, from: &Counters) {
    for (into, from) in into.operations.iter().zip(&from.operations) {
        add(into, from.load(Relaxed));
    }
    let pairs = [
        (&into.errors, &from.errors),
        (&into.malformed, &from.malformed),
        (&into.unanswered, &from.unanswered),
        (&into.unknown, &from.unknown),
        (&into.blocked, &from.blocked),
        (&into.read_bytes, &from.read_bytes),
        (&into.written_bytes, &from.written_bytes),
    ];
    for (into, from) in pairs {
        into.add(from.get());
    }
}

/// A set of counters and its place in the registry, given back when the thread ends.
#[derive(Debug)]
pub struct Member {
    counters: Arc<Counters>,
    registry: Arc<Registry>,
}

impl std::ops::Deref for Member {
    type Target = Counters;

    #[inline]
    fn deref(&self) -> &Counters {
        &self.counters
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        let mut sets = self.registry.lock();
        sets.live.retain(|set| !Arc::ptr_eq(set, &self.counters));
        fold(&sets.ended, &self.counters);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_keep_what_ended_threads_counted() {
        let registry = Arc::new(Registry::default());
        let (one, two) = (registry.join(), registry.join());
        one.operation(Opcode::Lookup);
        one.errors.add(1);
        two.operation(Opcode::Lookup);
        two.read_bytes.add(4096);
        drop(one);
        let totals = registry.totals();
        assert_eq!(totals.operations, [(Opcode::Lookup, 2)]);
        assert_eq!((totals.errors, totals.read_bytes), (1, 4096));
        drop(two);
        assert_eq!(registry.totals(), totals);
        assert!(registry.lock().live.is_empty());
    }
}
