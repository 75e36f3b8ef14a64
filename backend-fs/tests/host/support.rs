//! An exported temporary directory, and the DPU's side of its requests.

use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use backend_fs::filesystem::{
    Context, Entry, FileSystem, HandleId, Negotiated, NewInode, NodeId, Opened, Release, Result,
};
use backend_fs::fuse::dirent::DirBuffer;
use backend_fs::host::HostFs;
use backend_fs::host::options::HostOptions;
use rustix::fs::{CWD, Mode, OFlags};
use tempfile::TempDir;
use vring::chain::{Chain, SliceBuf};
use vring::memory::DpuMemory;

pub const ROOT: NodeId = NodeId::ROOT;
pub const RDONLY: u32 = libc::O_RDONLY as u32;
pub const WRONLY: u32 = libc::O_WRONLY as u32;
pub const RDWR: u32 = libc::O_RDWR as u32;

/// The DPU's root, on a thread that may block.
pub const AS_ROOT: Context<'static> =
    Context { uid: 0, gid: 0, pid: 1, groups: None, label: None, may_block: true };

/// The same on a queue worker.
pub const ON_WORKER: Context<'static> = Context { may_block: false, ..AS_ROOT };

pub fn user(uid: u32, gid: u32) -> Context<'static> {
    Context { uid, gid, ..AS_ROOT }
}

/// A regular file, a directory, ... with these permission bits.
pub fn new(mode: u32) -> NewInode {
    NewInode { mode, umask: 0, rdev: 0 }
}

/// Where a test's directory lies.
#[derive(Clone, Copy)]
pub enum On {
    /// A disk file system with file handles and `RWF_NOWAIT`.
    Disk,
    /// tmpfs.
    Memory,
}

pub struct Export {
    pub fs: HostFs,
    /// The export on the host.
    pub path: PathBuf,
    /// A directory beside it, out of the DPU's reach.
    pub outside: PathBuf,
    _dir: TempDir,
}

pub fn directory(path: &std::path::Path) -> OwnedFd {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

pub fn serve(path: &std::path::Path, options: HostOptions) -> std::io::Result<HostFs> {
    HostFs::new(directory(path), directory("/proc/self/fd".as_ref()), options)
}

impl Export {
    pub fn new() -> Self {
        Self::with(On::Disk, HostOptions::default())
    }

    pub fn with(on: On, options: HostOptions) -> Self {
        let place = match on {
            On::Disk => std::env::temp_dir(),
            On::Memory => "/dev/shm".into(),
        };
        let dir = tempfile::Builder::new().prefix("backend-fs-").tempdir_in(place).unwrap();
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let path = dir.path().join("export");
        let outside = dir.path().join("outside");
        for path in [&path, &outside] {
            std::fs::create_dir(path).unwrap();
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
        }
        let fs = serve(&path, options).unwrap();
        fs.init(Negotiated::default());
        Self { fs, path, outside, _dir: dir }
    }

    /// Another device over the same directory, as for another DPU.
    pub fn second(&self) -> HostFs {
        let fs = serve(&self.path, HostOptions::default()).unwrap();
        fs.init(Negotiated::default());
        fs
    }

    /// A file of the host's, in the export.
    pub fn put(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub fn get(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path.join(name)).unwrap()
    }

    pub fn lookup(&self, name: &str) -> Result<Entry> {
        lookup(&self.fs, name)
    }

    pub fn node(&self, name: &str) -> NodeId {
        self.lookup(name).unwrap().node
    }

    pub fn open(&self, name: &str, flags: u32) -> (NodeId, HandleId) {
        let node = self.node(name);
        (node, self.fs.open(&AS_ROOT, node, flags, false).unwrap().handle)
    }

    pub fn create(&self, cx: &Context, name: &str, mode: u32, flags: u32) -> Result<(Entry, Opened)> {
        self.fs.create(cx, ROOT, &c(name), new(libc::S_IFREG | mode), flags | libc::O_CREAT as u32, false)
    }

    pub fn release(&self, node: NodeId, handle: HandleId) {
        self.fs.release(&AS_ROOT, node, Release { handle, flock_owner: None }).unwrap();
    }

    pub fn read(&self, cx: &Context, file: (NodeId, HandleId), offset: u64, len: usize) -> Result<Vec<u8>> {
        read(&self.fs, cx, file, offset, &[len])
    }

    pub fn write(&self, cx: &Context, file: (NodeId, HandleId), offset: u64, bytes: &[u8]) -> Result<usize> {
        write(&self.fs, cx, file, offset, bytes, Write::default())
    }

    /// Names of a directory, and node ids where the listing gives some.
    pub fn list(&self, node: NodeId, reply_size: usize, plus: bool) -> Vec<Listed> {
        let opened = self.fs.opendir(&AS_ROOT, node, 0).unwrap();
        let mut found = Vec::new();
        let mut offset = 0;
        loop {
            let page = self.list_page(node, opened.handle, offset, reply_size, plus).unwrap();
            let Some(last) = page.last() else { break };
            offset = last.next;
            found.extend(page);
        }
        self.fs.releasedir(&AS_ROOT, node, Release { handle: opened.handle, flock_owner: None }).unwrap();
        found
    }

    pub fn list_page(
        &self,
        node: NodeId,
        handle: HandleId,
        offset: u64,
        reply_size: usize,
        plus: bool,
    ) -> Result<Vec<Listed>> {
        let mut bytes = Vec::new();
        let mut buffer = DirBuffer::new(&mut bytes, reply_size);
        if plus {
            self.fs.readdirplus(&AS_ROOT, node, handle, offset, &mut buffer)?;
        } else {
            self.fs.readdir(&AS_ROOT, node, handle, offset, &mut buffer)?;
        }
        assert!(bytes.len() <= reply_size);
        Ok(parse_listing(&bytes, plus))
    }
}

/// An entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: String,
    pub ino: u64,
    pub next: u64,
    pub kind: u32,
    /// Node id; 0 without attributes.
    pub node: u64,
}

/// Takes `struct fuse_dirent`s or `struct fuse_direntplus`es apart.
fn parse_listing(mut bytes: &[u8], plus: bool) -> Vec<Listed> {
    let mut found = Vec::new();
    let head = if plus { 128 } else { 0 };
    while !bytes.is_empty() {
        let u64_at = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        let u32_at = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let name_len = u32_at(head + 16) as usize;
        let name = std::str::from_utf8(&bytes[head + 24..head + 24 + name_len]).unwrap().to_owned();
        found.push(Listed {
            name,
            ino: u64_at(head),
            next: u64_at(head + 8),
            kind: u32_at(head + 20),
            node: if plus { u64_at(0) } else { 0 },
        });
        bytes = &bytes[(head + 24 + name_len).next_multiple_of(8)..];
    }
    found
}

pub fn c(name: &str) -> CString {
    CString::new(name).unwrap()
}

pub fn lookup(fs: &HostFs, name: &str) -> Result<Entry> {
    let mut entry = None;
    let mut parent = ROOT;
    for part in name.split('/') {
        let found = fs.lookup(&AS_ROOT, parent, &c(part))?;
        parent = found.node;
        entry = Some(found);
    }
    Ok(entry.unwrap())
}

/// A READ into pieces of these lengths.
pub fn read(
    fs: &HostFs,
    cx: &Context,
    (node, handle): (NodeId, HandleId),
    offset: u64,
    pieces: &[usize],
) -> Result<Vec<u8>> {
    let (memory, chain, len) = memory(pieces, false);
    let mut slices = SliceBuf::default();
    let into = chain.writable_slices(0, len, &mut slices).unwrap();
    let read = fs.read(cx, node, handle, offset, into)?;
    Ok(gather(&memory, pieces, read))
}

#[derive(Clone, Copy, Default)]
pub struct Write<'a> {
    pub pieces: Option<&'a [usize]>,
    pub kill_suidgid: bool,
    pub append: bool,
}

pub fn write(
    fs: &HostFs,
    cx: &Context,
    (node, handle): (NodeId, HandleId),
    offset: u64,
    bytes: &[u8],
    how: Write,
) -> Result<usize> {
    let whole = [bytes.len()];
    let pieces = how.pieces.unwrap_or(&whole);
    let (memory, chain, len) = memory(pieces, true);
    assert_eq!(len, bytes.len());
    let mut rest = bytes;
    for (at, len) in layout(pieces) {
        memory.write(at, &rest[..len]).unwrap();
        rest = &rest[len..];
    }
    let mut slices = SliceBuf::default();
    let from = chain.readable_slices(0, len, &mut slices).unwrap();
    if how.append {
        fs.append(cx, node, handle, offset, from, how.kill_suidgid)
    } else {
        fs.write(cx, node, handle, offset, from, how.kill_suidgid, false)
    }
}

/// Where pieces lie in DPU memory: apart from one another.
fn layout(pieces: &[usize]) -> impl Iterator<Item = (u64, usize)> {
    pieces.iter().scan(0u64, |at, len| {
        let piece = (*at, *len);
        *at += *len as u64 + 16;
        Some(piece)
    })
}

fn memory(pieces: &[usize], readable: bool) -> (Arc<DpuMemory>, Chain, usize) {
    let len: usize = pieces.iter().sum();
    let size = (len + 16 * pieces.len() + 4096).next_multiple_of(4096);
    let memory = Arc::new(DpuMemory::anonymous(size).unwrap());
    let ranges: Vec<(u64, usize)> = layout(pieces).collect();
    let chain = if readable {
        Chain::for_memory(&memory, &ranges, &[])
    } else {
        Chain::for_memory(&memory, &[], &ranges)
    };
    (memory, chain.unwrap(), len)
}

fn gather(memory: &DpuMemory, pieces: &[usize], len: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (at, piece) in layout(pieces) {
        let mut part = vec![0; piece];
        memory.read(at, &mut part).unwrap();
        bytes.extend(part);
    }
    bytes.truncate(len);
    bytes
}

/// Waits until `condition` holds; panics after 20 s.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        // wait-loop: the caller's condition
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub fn text(name: &CStr) -> String {
    name.to_str().unwrap().to_owned()
}
