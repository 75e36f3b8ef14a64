//! A file system that notes each call and answers with values that are easy to find in a reply.

use std::ffi::CStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::io::Errno;
use vring::chain::Slices;
use vring::memory::DpuMemory;

use crate::filesystem::*;
use crate::fuse::abi::{Attr, FileLock, Kstatfs, Statx, SxTime};
use crate::fuse::dirent::DirBuffer;

pub const ATTR: Attr = Attr {
    ino: 11,
    size: 12,
    blocks: 13,
    atime: 14,
    mtime: 15,
    ctime: 16,
    atimensec: 17,
    mtimensec: 18,
    ctimensec: 19,
    mode: 0o100_644,
    nlink: 21,
    uid: 22,
    gid: 23,
    rdev: 24,
    blksize: 25,
    flags: 26,
};
const ATTR_VALID: Duration = Duration::from_millis(2250);
pub const ENTRY: Entry = Entry {
    node: NodeId(77),
    generation: 0,
    attr: ATTR,
    attr_valid: ATTR_VALID,
    entry_valid: Duration::from_millis(1500),
};
const OPENED: Opened = Opened { handle: HandleId(9), flags: 2 };

type Caller = (u32, u32, u32, Option<Vec<u32>>);

#[derive(Default)]
struct State {
    notes: Vec<String>,
    fail: Option<Errno>,
    claim: Option<usize>,
    caller: Caller,
    first_slice: u64,
}

pub struct NotingFs {
    memory: Arc<DpuMemory>,
    /// Where replies go, for data that is "read" into DPU memory.
    reply: u64,
    state: Mutex<State>,
}

impl NotingFs {
    pub fn new(memory: &Arc<DpuMemory>, reply: u64) -> Self {
        Self { memory: Arc::clone(memory), reply, state: Mutex::default() }
    }

    /// The notes so far, which are then forgotten.
    pub fn notes(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().notes)
    }

    /// Who asked last.
    pub fn caller(&self) -> Caller {
        self.state.lock().unwrap().caller.clone()
    }

    /// DPU address of the first slice of the last read or write.
    pub fn first_slice(&self) -> u64 {
        self.state.lock().unwrap().first_slice
    }

    /// From now on every operation fails like this.
    pub fn fail_with(&self, errno: Option<Errno>) {
        self.state.lock().unwrap().fail = errno;
    }

    /// From now on reads and writes claim to have moved so many bytes.
    pub fn claim(&self, bytes: usize) {
        self.state.lock().unwrap().claim = Some(bytes);
    }

    fn note(&self, cx: &Context, note: String) -> Result<()> {
        let mut state = self.state.lock().unwrap();
        state.notes.push(note);
        state.caller = (cx.uid, cx.gid, cx.pid, cx.groups.map(<[u32]>::to_vec));
        state.fail.map_or(Ok(()), Err)
    }

    /// Remembers where the data lies and gives the number of bytes to claim.
    fn data(&self, slices: Slices, honest: usize) -> usize {
        let host = self.memory.regions().next().unwrap().host_addr;
        let mut state = self.state.lock().unwrap();
        state.first_slice =
            slices.as_iovecs().first().map_or(0, |first| (first.iov_base as usize - host) as u64);
        state.claim.unwrap_or(honest)
    }
}

fn append(value: &[u8], into: &mut Vec<u8>, size: u32) -> usize {
    if size != 0 {
        into.extend_from_slice(value);
    }
    value.len()
}

impl FileSystem for NotingFs {
    fn init(&self, _negotiated: Negotiated) {
        self.state.lock().unwrap().notes.push("init".to_owned());
    }
    fn destroy(&self) {
        self.state.lock().unwrap().notes.push("destroy".to_owned());
    }
    fn lookup(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.note(cx, format!("lookup {} {name:?}", parent.0)).map(|()| ENTRY)
    }
    fn forget(&self, node: NodeId, count: u64) {
        self.state.lock().unwrap().notes.push(format!("forget {} {count}", node.0));
    }
    fn getattr(&self, cx: &Context, node: NodeId, handle: Option<HandleId>) -> Result<(Attr, Duration)> {
        self.note(cx, format!("getattr {} {handle:?}", node.0)).map(|()| (ATTR, ATTR_VALID))
    }
    fn statx(
        &self,
        cx: &Context,
        node: NodeId,
        handle: Option<HandleId>,
        flags: u32,
        mask: u32,
    ) -> Result<(Statx, Duration)> {
        self.note(cx, format!("statx {} {handle:?} {flags} {mask}", node.0))?;
        let btime = SxTime { tv_sec: -5, tv_nsec: 6, reserved: 0 };
        let stat = Statx { mask, blksize: 4096, mode: 0o100_644, ino: 11, btime, ..Default::default() };
        Ok((stat, ATTR_VALID))
    }
    fn setattr(&self, cx: &Context, node: NodeId, change: SetAttr) -> Result<(Attr, Duration)> {
        self.note(cx, format!("setattr {} {change:?}", node.0)).map(|()| (ATTR, ATTR_VALID))
    }
    fn access(&self, cx: &Context, node: NodeId, mask: u32) -> Result<()> {
        self.note(cx, format!("access {} {mask}", node.0))
    }
    fn readlink(&self, cx: &Context, node: NodeId, target: &mut Vec<u8>) -> Result<()> {
        target.extend_from_slice(b"target/of/link");
        self.note(cx, format!("readlink {}", node.0))
    }
    fn symlink(&self, cx: &Context, parent: NodeId, name: &CStr, target: &CStr) -> Result<Entry> {
        self.note(cx, format!("symlink {} {name:?} {target:?}", parent.0)).map(|()| ENTRY)
    }
    fn mknod(&self, cx: &Context, parent: NodeId, name: &CStr, new: NewInode) -> Result<Entry> {
        let NewInode { mode, umask, rdev } = new;
        self.note(cx, format!("mknod {} {name:?} {mode:o} {umask:o} {rdev}", parent.0)).map(|()| ENTRY)
    }
    fn mkdir(&self, cx: &Context, parent: NodeId, name: &CStr, new: NewInode) -> Result<Entry> {
        self.note(cx, format!("mkdir {} {name:?} {:o} {:o}", parent.0, new.mode, new.umask)).map(|()| ENTRY)
    }
    fn unlink(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<()> {
        self.note(cx, format!("unlink {} {name:?}", parent.0))
    }
    fn rmdir(&self, cx: &Context, parent: NodeId, name: &CStr) -> Result<()> {
        self.note(cx, format!("rmdir {} {name:?}", parent.0))
    }
    fn rename(&self, cx: &Context, from: (NodeId, &CStr), to: (NodeId, &CStr), flags: u32) -> Result<()> {
        self.note(cx, format!("rename {} {:?} {} {:?} {flags}", from.0.0, from.1, to.0.0, to.1))
    }
    fn link(&self, cx: &Context, node: NodeId, parent: NodeId, name: &CStr) -> Result<Entry> {
        self.note(cx, format!("link {} {} {name:?}", node.0, parent.0)).map(|()| ENTRY)
    }
    fn open(&self, cx: &Context, node: NodeId, flags: u32, kill_suidgid: bool) -> Result<Opened> {
        self.note(cx, format!("open {} {flags} {kill_suidgid}", node.0)).map(|()| OPENED)
    }
    fn create(
        &self,
        cx: &Context,
        parent: NodeId,
        name: &CStr,
        new: NewInode,
        flags: u32,
        kill_suidgid: bool,
    ) -> Result<(Entry, Opened)> {
        let NewInode { mode, umask, .. } = new;
        self.note(cx, format!("create {} {name:?} {mode:o} {umask:o} {flags} {kill_suidgid}", parent.0))
            .map(|()| (ENTRY, OPENED))
    }
    fn tmpfile(&self, cx: &Context, parent: NodeId, new: NewInode, flags: u32) -> Result<(Entry, Opened)> {
        self.note(cx, format!("tmpfile {} {:o} {:o} {flags}", parent.0, new.mode, new.umask))
            .map(|()| (ENTRY, OPENED))
    }
    fn read(&self, cx: &Context, node: NodeId, handle: HandleId, offset: u64, into: Slices) -> Result<usize> {
        let data = b"data of the file";
        if into.len() >= data.len() {
            self.memory.write(self.reply + 16, data).unwrap();
        }
        let claim = self.data(into, data.len().min(into.len()));
        self.note(cx, format!("read {} {} {offset} {}", node.0, handle.0, into.len())).map(|()| claim)
    }
    fn write(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        from: Slices,
        kill_suidgid: bool,
        cached: bool,
    ) -> Result<usize> {
        let claim = self.data(from, from.len());
        let size = from.len();
        self.note(cx, format!("write {} {} {offset} {size} {kill_suidgid} {cached}", node.0, handle.0))
            .map(|()| claim)
    }
    fn append(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        from: Slices,
        kill_suidgid: bool,
    ) -> Result<usize> {
        let claim = self.data(from, from.len());
        let size = from.len();
        self.note(cx, format!("append {} {} {offset} {size} {kill_suidgid}", node.0, handle.0))
            .map(|()| claim)
    }
    fn flush(&self, cx: &Context, node: NodeId, handle: HandleId, lock_owner: u64) -> Result<()> {
        self.note(cx, format!("flush {} {} {lock_owner}", node.0, handle.0))
    }
    fn release(&self, cx: &Context, node: NodeId, release: Release) -> Result<()> {
        self.note(cx, format!("release {} {} {:?}", node.0, release.handle.0, release.flock_owner))
    }
    fn fsync(&self, cx: &Context, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.note(cx, format!("fsync {} {} {data_only}", node.0, handle.0))
    }
    fn fallocate(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        mode: u32,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        self.note(cx, format!("fallocate {} {} {mode} {offset} {len}", node.0, handle.0))
    }
    fn lseek(&self, cx: &Context, node: NodeId, handle: HandleId, offset: u64, whence: u32) -> Result<u64> {
        self.note(cx, format!("lseek {} {} {offset} {whence}", node.0, handle.0)).map(|()| 8192)
    }
    fn copy_file_range(&self, cx: &Context, range: CopyRange) -> Result<usize> {
        let CopyRange { source: from, target: to, len, .. } = range;
        let note = format!("{} {} {} {} {} {}", from.0.0, from.1.0, from.2, to.0.0, to.1.0, to.2);
        self.note(cx, format!("copy_file_range {note} {len}")).map(|()| len as usize)
    }
    fn opendir(&self, cx: &Context, node: NodeId, flags: u32) -> Result<Opened> {
        self.note(cx, format!("opendir {} {flags}", node.0)).map(|()| OPENED)
    }
    fn readdir(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: &mut DirBuffer,
    ) -> Result<()> {
        into.push(b"a", 31, 1, 8);
        self.note(cx, format!("readdir {} {} {offset}", node.0, handle.0))
    }
    fn readdirplus(
        &self,
        cx: &Context,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        into: &mut DirBuffer,
    ) -> Result<()> {
        let _ = into.push_plus(b"abc", 77, 1, 8, Some(&ENTRY)) && into.push_plus(b"..", 31, 2, 4, None);
        self.note(cx, format!("readdirplus {} {} {offset}", node.0, handle.0))
    }
    fn releasedir(&self, cx: &Context, node: NodeId, release: Release) -> Result<()> {
        self.note(cx, format!("releasedir {} {}", node.0, release.handle.0))
    }
    fn fsyncdir(&self, cx: &Context, node: NodeId, handle: HandleId, data_only: bool) -> Result<()> {
        self.note(cx, format!("fsyncdir {} {} {data_only}", node.0, handle.0))
    }
    fn statfs(&self, cx: &Context, node: NodeId) -> Result<Kstatfs> {
        self.note(cx, format!("statfs {}", node.0))?;
        Ok(Kstatfs {
            blocks: 1,
            bfree: 2,
            bavail: 3,
            files: 4,
            ffree: 5,
            bsize: 6,
            namelen: 255,
            frsize: 7,
            ..Default::default()
        })
    }
    fn syncfs(&self, cx: &Context, node: NodeId) -> Result<()> {
        self.note(cx, format!("syncfs {}", node.0))
    }
    fn setxattr(
        &self,
        cx: &Context,
        node: NodeId,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<()> {
        self.note(cx, format!("setxattr {} {name:?} {} {flags} {kill_sgid}", node.0, value.len()))
    }
    fn getxattr(
        &self,
        cx: &Context,
        node: NodeId,
        name: &CStr,
        size: u32,
        value: &mut Vec<u8>,
    ) -> Result<usize> {
        let len = append(b"value", value, size);
        self.note(cx, format!("getxattr {} {name:?} {size}", node.0)).map(|()| len)
    }
    fn listxattr(&self, cx: &Context, node: NodeId, size: u32, names: &mut Vec<u8>) -> Result<usize> {
        let len = append(b"user.a\0user.b\0", names, size);
        self.note(cx, format!("listxattr {} {size}", node.0)).map(|()| len)
    }
    fn removexattr(&self, cx: &Context, node: NodeId, name: &CStr) -> Result<()> {
        self.note(cx, format!("removexattr {} {name:?}", node.0))
    }
    fn getlk(&self, cx: &Context, node: NodeId, request: LockRequest) -> Result<FileLock> {
        self.note(cx, format!("getlk {}", lock_text(node, &request))).map(|()| request.lock)
    }
    fn setlk(&self, cx: &Context, node: NodeId, request: LockRequest, wait: bool) -> Result<()> {
        self.note(cx, format!("setlk {} {wait}", lock_text(node, &request)))
    }
}

fn lock_text(node: NodeId, request: &LockRequest) -> String {
    let LockRequest { handle, owner, lock, flock } = request;
    format!("{} {} {owner} {}..{} {} {flock}", node.0, handle.0, lock.start, lock.end, lock.kind)
}
