//! A file system whose answers a test holds back, to see what the queues do meanwhile.

use std::ffi::CStr;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use vring::chain::Slices;

use crate::filesystem::*;
use crate::fuse::abi::{Attr, FileLock, Kstatfs, Statx};
use crate::fuse::dirent::DirBuffer;

/// GETATTR of this node is answered at once.
pub const READY: u64 = 1;
/// GETATTR of this node would block; on a thread that may, it waits for [`GateFs::open_gate`].
pub const GATED: u64 = 2;
/// GETATTR of this node panics.
pub const PANICS: u64 = 3;
/// GETATTR of this node would block, and panics on a thread that may.
pub const PANICS_LATER: u64 = 4;

#[derive(Debug, Default)]
pub struct State {
    pub gate_open: bool,
    /// Threads that wait at the gate, and for locks.
    pub at_gate: usize,
    pub at_lock: usize,
    pub lock_free: bool,
    pub interruptions: u64,
    pub forgotten: u64,
    pub inits: u32,
    pub destroys: u32,
}

#[derive(Debug, Default)]
pub struct GateFs {
    state: Mutex<State>,
    changed: Condvar,
}

impl GateFs {
    pub fn open_gate(&self) {
        self.change(|state| state.gate_open = true);
    }

    pub fn free_lock(&self) {
        self.change(|state| state.lock_free = true);
    }

    pub fn look<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state.lock().unwrap())
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    /// Waits until the state is as wanted; panics after a long time.
    pub fn wait_until(&self, what: &str, wanted: impl Fn(&State) -> bool) {
        let state = self.state.lock().unwrap();
        let limit = Duration::from_secs(20);
        let waited = self.changed.wait_timeout_while(state, limit, |state| !wanted(state)).unwrap();
        assert!(!waited.1.timed_out(), "{what}: not within {limit:?}");
    }
}

/// Operations that no test here asks for.
macro_rules! absent {
    ($($name:ident($($argument:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $(_: $argument),*) -> Result<$result> {
            Err(Errno::NOSYS)
        })*
    };
}

impl FileSystem for GateFs {
    fn init(&self, _: Negotiated) {
        self.change(|state| state.inits += 1);
    }

    fn destroy(&self) {
        self.change(|state| {
            state.destroys += 1;
            state.interruptions += 1;
        });
    }

    fn interrupt_locks(&self) {
        self.change(|state| state.interruptions += 1);
    }

    fn forget(&self, _: NodeId, count: u64) {
        self.change(|state| state.forgotten += count);
    }

    fn getattr(&self, cx: &Context, node: NodeId, _: Option<HandleId>) -> Result<(Attr, Duration)> {
        let answer = Ok((Attr { ino: node.0, ..Attr::default() }, Duration::ZERO));
        match node.0 {
            READY => answer,
            PANICS => panic!("as the test wants"),
            GATED | PANICS_LATER if !cx.may_block => Err(Errno::AGAIN),
            PANICS_LATER => panic!("as the test wants, later"),
            GATED => {
                self.change(|state| state.at_gate += 1);
                let state = self.state.lock().unwrap();
                let mut state = self.changed.wait_while(state, |state| !state.gate_open).unwrap();
                state.at_gate -= 1;
                drop(state);
                self.changed.notify_all();
                answer
            }
            _ => Err(Errno::NOENT),
        }
    }

    fn setlk(&self, cx: &Context, _: NodeId, _: LockRequest, wait: bool) -> Result<()> {
        assert!(wait, "only waiting locks are asked for here");
        if !cx.may_block {
            return Err(Errno::AGAIN);
        }
        let mut state = self.state.lock().unwrap();
        let before = state.interruptions;
        state.at_lock += 1;
        self.changed.notify_all();
        let waiting = |state: &mut State| !state.lock_free && state.interruptions == before;
        let mut state = self.changed.wait_while(state, waiting).unwrap();
        state.at_lock -= 1;
        let granted = state.lock_free;
        drop(state);
        self.changed.notify_all();
        if granted { Ok(()) } else { Err(Errno::INTR) }
    }

    absent! {
        lookup(&Context, NodeId, &CStr) -> Entry;
        statx(&Context, NodeId, Option<HandleId>, u32, u32) -> (Statx, Duration);
        setattr(&Context, NodeId, SetAttr) -> (Attr, Duration);
        access(&Context, NodeId, u32) -> ();
        readlink(&Context, NodeId, &mut Vec<u8>) -> ();
        symlink(&Context, NodeId, &CStr, &CStr) -> Entry;
        mknod(&Context, NodeId, &CStr, NewInode) -> Entry;
        mkdir(&Context, NodeId, &CStr, NewInode) -> Entry;
        unlink(&Context, NodeId, &CStr) -> ();
        rmdir(&Context, NodeId, &CStr) -> ();
        rename(&Context, (NodeId, &CStr), (NodeId, &CStr), u32) -> ();
        link(&Context, NodeId, NodeId, &CStr) -> Entry;
        open(&Context, NodeId, u32, bool) -> Opened;
        create(&Context, NodeId, &CStr, NewInode, u32, bool) -> (Entry, Opened);
        tmpfile(&Context, NodeId, NewInode, u32) -> (Entry, Opened);
        read(&Context, NodeId, HandleId, u64, Slices) -> usize;
        write(&Context, NodeId, HandleId, u64, Slices, bool, bool) -> usize;
        flush(&Context, NodeId, HandleId, u64) -> ();
        release(&Context, NodeId, Release) -> ();
        fsync(&Context, NodeId, HandleId, bool) -> ();
        fallocate(&Context, NodeId, HandleId, u32, u64, u64) -> ();
        lseek(&Context, NodeId, HandleId, u64, u32) -> u64;
        copy_file_range(&Context, CopyRange) -> usize;
        opendir(&Context, NodeId, u32) -> Opened;
        readdir(&Context, NodeId, HandleId, u64, &mut DirBuffer) -> ();
        readdirplus(&Context, NodeId, HandleId, u64, &mut DirBuffer) -> ();
        releasedir(&Context, NodeId, Release) -> ();
        fsyncdir(&Context, NodeId, HandleId, bool) -> ();
        statfs(&Context, NodeId) -> Kstatfs;
        syncfs(&Context, NodeId) -> ();
        setxattr(&Context, NodeId, &CStr, &[u8], u32, bool) -> ();
        getxattr(&Context, NodeId, &CStr, u32, &mut Vec<u8>) -> usize;
        listxattr(&Context, NodeId, u32, &mut Vec<u8>) -> usize;
        removexattr(&Context, NodeId, &CStr) -> ();
        getlk(&Context, NodeId, LockRequest) -> FileLock;
    }
}
