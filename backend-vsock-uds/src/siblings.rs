//! DPUs of one process that may connect to each other: those that share a group.
//!
//! A connection between two DPUs is two connections, each with its own state machine and credit, and a pair
//! of Unix sockets between them: to either mux the other DPU looks like a host program. All that crosses
//! from one DPU's thread to the other's is one end of the pair, by way of this directory.
#![forbid(unsafe_code)]

use std::collections::{BTreeSet, HashMap};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::packet::Kind;

/// A DPU wants to connect to another one.
#[derive(Debug)]
pub struct Call {
    /// The end of the pair that stands for the caller.
    pub socket: OwnedFd,
    /// Socket type.
    pub kind: Kind,
    /// Context id of the caller.
    pub from_cid: u64,
    /// Port of the caller.
    pub from_port: u32,
    /// Port of the callee.
    pub to_port: u32,
}

/// Where the calls for one DPU go.
pub trait Callee: Send + Sync + std::fmt::Debug {
    /// Hands a call over; one that cannot be taken is dropped, which the caller sees as a refusal.
    fn call(&self, call: Call);
}

/// The DPUs of this process that can be called, by context id.
#[derive(Debug, Default)]
pub struct Directory(Mutex<HashMap<u64, Entry>>);

#[derive(Debug)]
struct Entry {
    groups: BTreeSet<String>,
    callee: Arc<dyn Callee>,
}

impl Directory {
    /// Adds a DPU.
    pub fn insert(&self, cid: u64, groups: BTreeSet<String>, callee: Arc<dyn Callee>) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.insert(cid, Entry { groups, callee });
    }

    /// Where calls for `cid` go, if it is there and in one of `groups`.
    fn find(&self, cid: u64, groups: &BTreeSet<String>) -> Option<Arc<dyn Callee>> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(&cid)?;
        (!entry.groups.is_disjoint(groups)).then(|| Arc::clone(&entry.callee))
    }
}

/// What one DPU sees of the others.
#[derive(Clone, Debug, Default)]
pub struct Siblings {
    directory: Arc<Directory>,
    cid: u64,
    groups: BTreeSet<String>,
}

impl Siblings {
    /// The view of the DPU `cid`, which is in `groups`.
    pub fn new(directory: Arc<Directory>, cid: u64, groups: BTreeSet<String>) -> Self {
        Self { directory, cid, groups }
    }

    /// Where calls for another DPU go, if this one may call it.
    pub fn find(&self, cid: u64) -> Option<Arc<dyn Callee>> {
        if cid == self.cid { None } else { self.directory.find(cid, &self.groups) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Nobody;

    impl Callee for Nobody {
        fn call(&self, _call: Call) {}
    }

    fn groups(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn a_shared_group_is_needed_and_nobody_calls_himself() {
        let directory = Arc::new(Directory::default());
        for (cid, names) in [(3, &["a", "b"][..]), (4, &["b", "c"]), (5, &["c"])] {
            directory.insert(cid, groups(names), Arc::new(Nobody));
        }
        let third = Siblings::new(Arc::clone(&directory), 3, groups(&["a", "b"]));
        assert!(third.find(4).is_some());
        for stranger in [5, 3, 2, 99] {
            assert!(third.find(stranger).is_none(), "{stranger}");
        }
    }
}
