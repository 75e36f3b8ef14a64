//! Requests through real chains over DPU memory to a file system that notes what it is asked.
//!
//! Replies are compared byte for byte with what `include/uapi/linux/fuse.h` lays down.

mod notes;

use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use rustix::io::Errno;
use vring::chain::Chain;
use vring::memory::DpuMemory;
use zerocopy::{FromBytes, IntoBytes};

use self::notes::NotingFs;
use super::super::abi::{self, InHeader, InitIn, InitOut, OutHeader};
use super::super::init_flags::InitFlags;
use super::super::opcode::Opcode;
use super::super::request::MAX_ARGUMENTS;
use super::super::session::Session;
use super::{Blocked, Scratch, Served, refuse, serve};
use crate::host::options::HostOptions;

/// Where requests lie in DPU memory.
const REQUEST: u64 = 0;
/// Where replies go.
const REPLY: u64 = 2 << 20;
/// What no reply may touch.
const CANARY: u8 = 0xa5;
const UNIQUE: u64 = 0x0102_0304_0506_0708;

/// A DPU with one export.
struct Dpu {
    memory: Arc<DpuMemory>,
    fs: NotingFs,
    session: Session,
    scratch: Scratch,
}

impl Dpu {
    /// Nothing negotiated yet.
    fn new() -> Self {
        Self::with(&HostOptions::default())
    }

    fn with(options: &HostOptions) -> Self {
        let memory = Arc::new(DpuMemory::anonymous(4 << 20).unwrap());
        let session = Session::new(options);
        let scratch = Scratch::new(&session);
        Self { fs: NotingFs::new(&memory, REPLY), memory, session, scratch }
    }

    /// After a successful `INIT`.
    fn mounted() -> Self {
        let mut dpu = Self::new();
        let (served, _) = dpu.init(init_in());
        assert_eq!(served, Served::Reply(80));
        dpu.fs.notes();
        dpu
    }

    fn init(&mut self, asked: InitIn) -> (Served, InitOut) {
        let (served, reply) = self.ask(Opcode::Init, 0, asked.as_bytes(), 64);
        (served, InitOut::read_from_prefix(&reply[16..]).map(|(out, _)| out).unwrap_or_default())
    }

    /// Sends an operation; gives what became of it and the whole reply area.
    fn ask(&mut self, opcode: Opcode, node: u64, body: &[u8], room: usize) -> (Served, Vec<u8>) {
        self.send(&request(opcode as u32, node, body), 16 + room, false)
    }

    /// Sends any bytes, with a reply area of any size.
    fn send(&mut self, request: &[u8], area: usize, may_block: bool) -> (Served, Vec<u8>) {
        // Cut as Linux cuts it: header, arguments, the rest.
        let cuts = [0, 40.min(request.len()), 80.min(request.len()), request.len()];
        let readable: Vec<_> = cuts
            .windows(2)
            .map(|cut| (REQUEST + cut[0] as u64, cut[1] - cut[0]))
            .filter(|(_, len)| *len != 0)
            .collect();
        self.memory.write(REQUEST, request).unwrap();
        self.memory.write(REPLY, &vec![CANARY; area + 64]).unwrap();
        let header = area.min(16);
        let writable: Vec<_> = [(REPLY, header), (REPLY + header as u64, area - header)]
            .into_iter()
            .filter(|(_, len)| *len != 0)
            .collect();
        let mut chain = Chain::for_memory(&self.memory, &readable, &writable).unwrap();
        let served = serve(&self.fs, &self.session, &mut chain, &mut self.scratch, may_block);
        let mut reply = vec![0; area + 64];
        self.memory.read(REPLY, &mut reply).unwrap();
        assert!(reply[area..].iter().all(|&byte| byte == CANARY), "wrote beyond the reply area");
        reply.truncate(area);
        if let Served::Reply(len) = served {
            assert!(len <= area, "used length {len} of {area}");
            if len != 0 {
                let (header, _) = OutHeader::read_from_prefix(&reply).unwrap();
                assert_eq!((header.len as usize, header.unique), (len, unique_of(request)));
                assert!((-4095..=0).contains(&header.error));
            }
            // Data of a READ may lie in the room of a reply that then became an error.
            reply.truncate(len.max(16).min(area));
        }
        (served, reply)
    }

    /// Sends an operation that must succeed; gives the body of the reply.
    fn body(&mut self, opcode: Opcode, body: &[u8], room: usize) -> Vec<u8> {
        let (served, reply) = self.ask(opcode, 5, body, room);
        let Served::Reply(len) = served else { panic!("{opcode:?}: {served:?}") };
        assert_eq!(errno_of(&reply), None, "{opcode:?}");
        reply[16..len].to_vec()
    }

    /// Sends an operation that must fail; gives the error.
    fn errno(&mut self, opcode: Opcode, body: &[u8], room: usize) -> Errno {
        let (served, reply) = self.ask(opcode, 5, body, room);
        assert_eq!(served, Served::Reply(16), "{opcode:?}");
        errno_of(&reply).unwrap_or_else(|| panic!("{opcode:?} succeeded"))
    }
}

fn init_in() -> InitIn {
    let flags = InitFlags::all().bits();
    InitIn {
        major: 7,
        minor: 41,
        max_readahead: 131_072,
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        unused: [0; 11],
    }
}

fn request(opcode: u32, nodeid: u64, body: &[u8]) -> Vec<u8> {
    let header = InHeader {
        len: (40 + body.len()) as u32,
        opcode,
        unique: UNIQUE,
        nodeid,
        uid: 1000,
        gid: 100,
        pid: 42,
        ..Default::default()
    };
    [header.as_bytes(), body].concat()
}

fn unique_of(request: &[u8]) -> u64 {
    InHeader::read_from_prefix(request).unwrap().0.unique
}

fn errno_of(reply: &[u8]) -> Option<Errno> {
    let (header, _) = OutHeader::read_from_prefix(reply).unwrap();
    (header.error != 0).then(|| Errno::from_raw_os_error(-header.error))
}

/// A body that is right for the operation, and the room Linux gives for its answer.
fn example(opcode: Opcode) -> (Vec<u8>, usize) {
    let join = |parts: &[&[u8]]| parts.concat();
    let read = abi::ReadIn { fh: 9, offset: 4096, size: 100, ..Default::default() };
    let write = abi::WriteIn { fh: 9, offset: 4096, size: 4, ..Default::default() };
    let copy = abi::CopyFileRangeIn { fh_in: 1, nodeid_out: 6, fh_out: 2, len: 10, ..Default::default() };
    let lock = abi::FileLock { start: 1, end: 2, kind: 1, pid: 3 };
    let lock = abi::LkIn { fh: 9, owner: 8, lk: lock, ..Default::default() };
    let open = abi::OpenIn { flags: 2, open_flags: 1 };
    let create = abi::CreateIn { flags: 66, mode: 0o600, umask: 0o22, open_flags: 0 };
    let getxattr = abi::GetxattrIn { size: 64, padding: 0 };
    let setxattr = abi::SetxattrIn { size: 3, ..Default::default() };
    let release = abi::ReleaseIn { fh: 9, release_flags: 2, lock_owner: 8, ..Default::default() };
    let fsync = abi::FsyncIn { fh: 9, fsync_flags: 1, padding: 0 };
    match opcode {
        Opcode::Lookup => (b"name\0".to_vec(), 128),
        Opcode::Forget => (3_u64.to_le_bytes().to_vec(), 0),
        Opcode::BatchForget => (join(&[&1_u64.to_le_bytes(), &6_u64.to_le_bytes(), &4_u64.to_le_bytes()]), 0),
        Opcode::Getattr => (abi::GetattrIn::default().as_bytes().to_vec(), 104),
        Opcode::Statx => {
            (abi::StatxIn { sx_flags: 1, sx_mask: 0xfff, ..Default::default() }.as_bytes().to_vec(), 288)
        }
        Opcode::Setattr => {
            (abi::SetattrIn { valid: 1, mode: 0o644, ..Default::default() }.as_bytes().to_vec(), 104)
        }
        Opcode::Access => (abi::AccessIn { mask: 4, padding: 0 }.as_bytes().to_vec(), 0),
        Opcode::Readlink => (vec![], 4095),
        Opcode::Symlink => (b"name\0target\0".to_vec(), 128),
        Opcode::Mknod => {
            let arg = abi::MknodIn { mode: libc::S_IFIFO | 0o644, rdev: 0, umask: 0o22, padding: 0 };
            (join(&[arg.as_bytes(), b"name\0"]), 128)
        }
        Opcode::Mkdir => (join(&[abi::MkdirIn { mode: 0o755, umask: 0o22 }.as_bytes(), b"name\0"]), 128),
        Opcode::Unlink | Opcode::Rmdir => (b"name\0".to_vec(), 0),
        Opcode::Rename => (join(&[&6_u64.to_le_bytes(), b"from\0to\0"]), 0),
        Opcode::Rename2 => {
            (join(&[abi::Rename2In { newdir: 6, flags: 1, padding: 0 }.as_bytes(), b"from\0to\0"]), 0)
        }
        Opcode::Link => (join(&[&6_u64.to_le_bytes(), b"name\0"]), 128),
        Opcode::Open | Opcode::Opendir => (open.as_bytes().to_vec(), 16),
        Opcode::Create => (join(&[create.as_bytes(), b"name\0"]), 144),
        Opcode::Tmpfile => (join(&[create.as_bytes(), b"/\0"]), 144),
        Opcode::Read => (read.as_bytes().to_vec(), 100),
        Opcode::Write => (join(&[write.as_bytes(), b"data"]), 8),
        Opcode::Statfs | Opcode::Syncfs | Opcode::Destroy => (vec![], 80),
        Opcode::Flush => (abi::FlushIn { fh: 9, lock_owner: 8, ..Default::default() }.as_bytes().to_vec(), 0),
        Opcode::Release | Opcode::Releasedir => (release.as_bytes().to_vec(), 0),
        Opcode::Fsync | Opcode::Fsyncdir => (fsync.as_bytes().to_vec(), 0),
        Opcode::Fallocate => {
            let arg = abi::FallocateIn { fh: 9, offset: 1, length: 2, mode: 3, padding: 0 };
            (arg.as_bytes().to_vec(), 0)
        }
        Opcode::Lseek => (abi::LseekIn { fh: 9, offset: 7, whence: 3, padding: 0 }.as_bytes().to_vec(), 8),
        Opcode::CopyFileRange | Opcode::CopyFileRange64 => (copy.as_bytes().to_vec(), 8),
        Opcode::Readdir | Opcode::Readdirplus => {
            (abi::ReadIn { fh: 9, offset: 3, size: 4096, ..Default::default() }.as_bytes().to_vec(), 4096)
        }
        Opcode::Setxattr => (join(&[setxattr.as_bytes(), b"user.a\0", b"val"]), 0),
        Opcode::Getxattr => (join(&[getxattr.as_bytes(), b"user.a\0"]), 64),
        Opcode::Listxattr => (getxattr.as_bytes().to_vec(), 64),
        Opcode::Removexattr => (b"user.a\0".to_vec(), 0),
        Opcode::Getlk => (lock.as_bytes().to_vec(), 24),
        Opcode::Setlk | Opcode::Setlkw => (lock.as_bytes().to_vec(), 0),
        Opcode::Init => (init_in().as_bytes().to_vec(), 64),
        Opcode::Interrupt => (8_u64.to_le_bytes().to_vec(), 0),
        Opcode::Bmap | Opcode::Ioctl | Opcode::Poll | Opcode::NotifyReply => (vec![0; 32], 16),
        Opcode::Setupmapping | Opcode::Removemapping => (vec![0; 40], 0),
    }
}

const WAITS: &[Opcode] = &[
    Opcode::Fsync,
    Opcode::Fsyncdir,
    Opcode::Syncfs,
    Opcode::Fallocate,
    Opcode::CopyFileRange,
    Opcode::CopyFileRange64,
];
const UNSERVED: &[Opcode] = &[
    Opcode::Bmap,
    Opcode::Ioctl,
    Opcode::Poll,
    Opcode::NotifyReply,
    Opcode::Setupmapping,
    Opcode::Removemapping,
];

#[test]
fn every_operation_reaches_its_method_with_its_arguments() {
    let expected = [
        (Opcode::Lookup, r#"lookup 5 "name""#),
        (Opcode::Forget, "forget 5 3"),
        (Opcode::BatchForget, "forget 6 4"),
        (Opcode::Getattr, "getattr 5 None"),
        (Opcode::Statx, "statx 5 None 1 4095"),
        (Opcode::Access, "access 5 4"),
        (Opcode::Readlink, "readlink 5"),
        (Opcode::Symlink, r#"symlink 5 "name" "target""#),
        (Opcode::Mknod, r#"mknod 5 "name" 10644 22 0"#),
        (Opcode::Mkdir, r#"mkdir 5 "name" 40755 22"#),
        (Opcode::Unlink, r#"unlink 5 "name""#),
        (Opcode::Rmdir, r#"rmdir 5 "name""#),
        (Opcode::Rename, r#"rename 5 "from" 6 "to" 0"#),
        (Opcode::Rename2, r#"rename 5 "from" 6 "to" 1"#),
        (Opcode::Link, r#"link 6 5 "name""#),
        (Opcode::Open, "open 5 2 true"),
        (Opcode::Create, r#"create 5 "name" 100600 22 66 false"#),
        (Opcode::Tmpfile, "tmpfile 5 100600 22 66"),
        (Opcode::Read, "read 5 9 4096 100"),
        (Opcode::Write, "write 5 9 4096 4 false false"),
        (Opcode::Statfs, "statfs 5"),
        (Opcode::Flush, "flush 5 9 8"),
        (Opcode::Release, "release 5 9 Some(8)"),
        (Opcode::Releasedir, "releasedir 5 9"),
        (Opcode::Fsync, "fsync 5 9 true"),
        (Opcode::Fsyncdir, "fsyncdir 5 9 true"),
        (Opcode::Fallocate, "fallocate 5 9 3 1 2"),
        (Opcode::Lseek, "lseek 5 9 7 3"),
        (Opcode::CopyFileRange, "copy_file_range 5 1 0 6 2 0 10"),
        (Opcode::CopyFileRange64, "copy_file_range 5 1 0 6 2 0 10"),
        (Opcode::Opendir, "opendir 5 2"),
        (Opcode::Readdir, "readdir 5 9 3"),
        (Opcode::Readdirplus, "readdirplus 5 9 3"),
        (Opcode::Syncfs, "syncfs 5"),
        (Opcode::Setxattr, r#"setxattr 5 "user.a" 3 0 false"#),
        (Opcode::Getxattr, r#"getxattr 5 "user.a" 64"#),
        (Opcode::Listxattr, "listxattr 5 64"),
        (Opcode::Removexattr, r#"removexattr 5 "user.a""#),
        (Opcode::Getlk, "getlk 5 9 8 1..2 1 false"),
        (Opcode::Setlk, "setlk 5 9 8 1..2 1 false false"),
        (Opcode::Setlkw, "setlk 5 9 8 1..2 1 false true"),
        (Opcode::Destroy, "destroy"),
    ];
    for (opcode, note) in expected {
        let mut dpu = Dpu::mounted();
        let (body, room) = example(opcode);
        let request = request(opcode as u32, 5, &body);
        let (served, _) = dpu.send(&request, 16 + room, true);
        assert!(matches!(served, Served::Reply(_)));
        assert_eq!(dpu.fs.notes(), [note], "{opcode:?}");
        assert_eq!(dpu.session.totals().operation(opcode), 1, "{opcode:?}");
    }
    let covered = expected.len() + UNSERVED.len() + [Opcode::Setattr, Opcode::Init, Opcode::Interrupt].len();
    assert_eq!(covered, Opcode::ALL.len(), "an operation has no expectation");
}

#[test]
fn the_caller_is_passed_on() {
    let mut dpu = Dpu::mounted();
    dpu.ask(Opcode::Lookup, 5, b"name\0", 128);
    assert_eq!(dpu.fs.caller(), (1000, 100, 42, None));
    let group = [16_u32, 32, 1, 77].map(u32::to_le_bytes).concat();
    let body = [abi::MkdirIn::default().as_bytes(), b"dir\0", &group].concat();
    let mut bytes = request(Opcode::Mkdir as u32, 5, &body);
    bytes[36..38].copy_from_slice(&2_u16.to_le_bytes());
    assert_eq!(dpu.send(&bytes, 144, false).0, Served::Reply(144));
    assert_eq!(dpu.fs.caller(), (1000, 100, 42, Some(vec![77])));
    let body = [abi::MkdirIn::default().as_bytes(), b"dir\0"].concat();
    dpu.ask(Opcode::Mkdir, 5, &body, 128);
    assert_eq!(dpu.fs.caller(), (1000, 100, 42, Some(vec![])), "none of the caller's groups matters");
}

/// `struct fuse_attr` of `notes::ATTR`.
fn attr_bytes() -> Vec<u8> {
    let wide = [11_u64, 12, 13, 14, 15, 16].map(u64::to_le_bytes).concat();
    let narrow = [17_u32, 18, 19, 0o100_644, 21, 22, 23, 24, 25, 26].map(u32::to_le_bytes).concat();
    [wide, narrow].concat()
}

/// `struct fuse_entry_out` of `notes::ENTRY`: valid 1.5 s and 2.25 s.
fn entry_bytes() -> Vec<u8> {
    let wide = [77_u64, 0, 1, 2].map(u64::to_le_bytes).concat();
    let narrow = [500_000_000_u32, 250_000_000].map(u32::to_le_bytes).concat();
    [wide, narrow, attr_bytes()].concat()
}

#[test]
fn replies_have_the_layout_of_the_kernel_header() {
    let mut dpu = Dpu::mounted();
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let open = words(&[9, 2]);
    let attr = [words(&[2, 250_000_000]), attr_bytes()].concat();
    let entry = entry_bytes();
    let both = [entry.clone(), open.clone()].concat();
    let plain = [words(&[31, 1]), vec![1, 0, 0, 0, 8, 0, 0, 0], b"a\0\0\0\0\0\0\0".to_vec()].concat();
    let plus =
        [entry.clone(), words(&[77, 1]), vec![3, 0, 0, 0, 8, 0, 0, 0], b"abc\0\0\0\0\0".to_vec()].concat();
    let unknown =
        [vec![0; 128], words(&[31, 2]), vec![2, 0, 0, 0, 4, 0, 0, 0], b"..\0\0\0\0\0\0".to_vec()].concat();
    let expected = [
        (Opcode::Lookup, entry.clone()),
        (Opcode::Symlink, entry.clone()),
        (Opcode::Mknod, entry.clone()),
        (Opcode::Mkdir, entry.clone()),
        (Opcode::Link, entry),
        (Opcode::Getattr, attr.clone()),
        (Opcode::Setattr, attr),
        (Opcode::Open, open.clone()),
        (Opcode::Opendir, open),
        (Opcode::Create, both.clone()),
        (Opcode::Tmpfile, both),
        (Opcode::Readlink, b"target/of/link".to_vec()),
        (Opcode::Read, b"data of the file".to_vec()),
        (Opcode::Write, words(&[4])),
        (Opcode::Lseek, words(&[8192])),
        (Opcode::Readdir, plain),
        (Opcode::Readdirplus, [plus, unknown].concat()),
        (Opcode::Getxattr, b"value".to_vec()),
        (Opcode::Listxattr, b"user.a\0user.b\0".to_vec()),
        (Opcode::Getlk, [words(&[1, 2]), vec![1, 0, 0, 0, 3, 0, 0, 0]].concat()),
        (
            Opcode::Statfs,
            [words(&[1, 2, 3, 4, 5]), [6_u32, 255, 7, 0].map(u32::to_le_bytes).concat(), vec![0; 24]]
                .concat(),
        ),
        (Opcode::Unlink, vec![]),
        (Opcode::Rmdir, vec![]),
        (Opcode::Rename, vec![]),
        (Opcode::Rename2, vec![]),
        (Opcode::Access, vec![]),
        (Opcode::Flush, vec![]),
        (Opcode::Release, vec![]),
        (Opcode::Releasedir, vec![]),
        (Opcode::Setxattr, vec![]),
        (Opcode::Removexattr, vec![]),
        (Opcode::Setlk, vec![]),
        (Opcode::Setlkw, vec![]),
    ];
    for (opcode, expected) in expected {
        let (body, room) = example(opcode);
        assert_eq!(dpu.body(opcode, &body, room), expected, "{opcode:?}");
    }
}

#[test]
fn replies_of_operations_that_may_wait_have_their_layout() {
    let mut dpu = Dpu::mounted();
    let mut body = |opcode| {
        let (body, room) = example(opcode);
        let (served, reply) = dpu.send(&request(opcode as u32, 5, &body), 16 + room, true);
        let Served::Reply(len) = served else { panic!("{served:?}") };
        reply[16..len].to_vec()
    };
    assert_eq!(body(Opcode::CopyFileRange), [10, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(body(Opcode::CopyFileRange64), [10, 0, 0, 0, 0, 0, 0, 0]);
    for opcode in [Opcode::Fsync, Opcode::Fsyncdir, Opcode::Syncfs, Opcode::Fallocate] {
        assert_eq!(body(opcode), b"");
    }
}

#[test]
fn statx_has_its_layout() {
    let mut dpu = Dpu::mounted();
    let (body, room) = example(Opcode::Statx);
    let reply = dpu.body(Opcode::Statx, &body, room);
    assert_eq!(reply.len(), 288);
    assert_eq!(reply[..16], [2_u64, 250_000_000].map(u64::to_le_bytes).concat());
    assert_eq!(reply[16..32], [0; 16]);
    // mask, blksize, attributes, nlink, uid, gid, mode, spare, ino
    assert_eq!(reply[32..40], [0xff, 0x0f, 0, 0, 0, 16, 0, 0]);
    assert_eq!(reply[60..64], [0xa4, 0x81, 0, 0]);
    assert_eq!(reply[64..72], 11_u64.to_le_bytes());
    // btime
    assert_eq!(reply[112..124], [&(-5_i64).to_le_bytes()[..], &6_u32.to_le_bytes()].concat());
}

#[test]
fn a_size_query_is_answered_with_the_size() {
    let mut dpu = Dpu::mounted();
    let ask = abi::GetxattrIn::default();
    let body = [ask.as_bytes(), b"user.a\0"].concat();
    assert_eq!(dpu.body(Opcode::Getxattr, &body, 8), [5, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(dpu.body(Opcode::Listxattr, ask.as_bytes(), 8), [14, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn a_value_longer_than_asked_for_never_leaves() {
    let mut dpu = Dpu::mounted();
    let ask = abi::GetxattrIn { size: 4, padding: 0 };
    let body = [ask.as_bytes(), b"user.a\0"].concat();
    // The file system of this test does not look at the size; the protocol layer does.
    assert_eq!(dpu.errno(Opcode::Getxattr, &body, 64), Errno::RANGE);
    assert_eq!(dpu.errno(Opcode::Readlink, b"", 5), Errno::NAMETOOLONG);
}

#[test]
fn an_error_is_a_header_with_its_negation() {
    let mut dpu = Dpu::mounted();
    for &opcode in Opcode::ALL {
        if opcode.is_unanswered()
            || UNSERVED.contains(&opcode)
            || matches!(opcode, Opcode::Init | Opcode::Destroy)
        {
            continue;
        }
        dpu.fs.fail_with(Some(Errno::NOSPC));
        let (body, room) = example(opcode);
        let (served, reply) = dpu.send(&request(opcode as u32, 5, &body), 16 + room, true);
        assert_eq!(served, Served::Reply(16), "{opcode:?}");
        let expected = [&16_u32.to_le_bytes()[..], &(-28_i32).to_le_bytes(), &UNIQUE.to_le_bytes()].concat();
        assert_eq!(reply, expected, "{opcode:?}");
    }
}

#[test]
fn what_is_not_served_is_enosys() {
    let mut dpu = Dpu::mounted();
    for &opcode in UNSERVED {
        let (body, room) = example(opcode);
        assert_eq!(dpu.errno(opcode, &body, room), Errno::NOSYS);
    }
    for opcode in [0, 7, 54, 4096, u32::MAX] {
        let (served, reply) = dpu.send(&request(opcode, 5, &[0; 64]), 64, false);
        assert_eq!((served, errno_of(&reply)), (Served::Reply(16), Some(Errno::NOSYS)));
        // Also where the kernel left no room for an answer.
        assert_eq!(dpu.send(&request(opcode, 5, &[0; 64]), 0, false).0, Served::Reply(0));
    }
    assert_eq!(dpu.session.totals().unknown, 10);
    assert!(dpu.fs.notes().is_empty());
}

#[test]
fn a_sync_that_is_not_there_is_an_error_and_not_a_promise() {
    let mut dpu = Dpu::mounted();
    dpu.fs.fail_with(Some(Errno::NOSYS));
    for opcode in [Opcode::Fsync, Opcode::Fsyncdir] {
        let (_, reply) = dpu.send(&request(opcode as u32, 5, &example(opcode).0), 16, true);
        assert_eq!(errno_of(&reply), Some(Errno::IO));
    }
    // Elsewhere it is the right way to say that there is no such thing.
    assert_eq!(dpu.errno(Opcode::Removexattr, b"user.a\0", 0), Errno::NOSYS);
}

#[test]
fn forgets_and_interrupts_are_never_answered() {
    let mut dpu = Dpu::mounted();
    for opcode in [Opcode::Forget, Opcode::BatchForget, Opcode::Interrupt] {
        for area in [0, 8, 16, 256] {
            for body in [example(opcode).0, vec![], vec![0xff; 24]] {
                let (served, reply) = dpu.send(&request(opcode as u32, 5, &body), area, false);
                assert_eq!(served, Served::Reply(0));
                assert!(reply.iter().all(|&byte| byte == CANARY));
            }
        }
    }
}

#[test]
fn a_request_without_a_header_is_completed_and_counted() {
    let mut dpu = Dpu::mounted();
    for len in 0..40 {
        assert_eq!(dpu.send(&vec![0; len], 128, false).0, Served::Reply(0));
    }
    let totals = dpu.session.totals();
    assert_eq!((totals.malformed, totals.unanswered), (40, 40));
}

#[test]
fn a_request_without_room_for_an_answer_has_no_effect() {
    let mut dpu = Dpu::mounted();
    for &opcode in Opcode::ALL {
        if opcode.is_unanswered() {
            continue;
        }
        let (body, _) = example(opcode);
        for area in [0, 1, 15] {
            assert_eq!(dpu.send(&request(opcode as u32, 5, &body), area, true).0, Served::Reply(0));
        }
    }
    assert!(dpu.fs.notes().is_empty());
    assert!(dpu.session.is_open());
    assert_eq!(dpu.session.totals().unanswered, 3 * (Opcode::ALL.len() as u64 - 3));
}

#[test]
fn an_answer_that_cannot_fit_is_refused_before_anything_happens() {
    let mut dpu = Dpu::mounted();
    let fixed = [
        (Opcode::Lookup, 128),
        (Opcode::Symlink, 128),
        (Opcode::Mknod, 128),
        (Opcode::Mkdir, 128),
        (Opcode::Link, 128),
        (Opcode::Getattr, 104),
        (Opcode::Setattr, 104),
        (Opcode::Statx, 288),
        (Opcode::Open, 16),
        (Opcode::Opendir, 16),
        (Opcode::Create, 144),
        (Opcode::Tmpfile, 144),
        (Opcode::Write, 8),
        (Opcode::Statfs, 80),
        (Opcode::Lseek, 8),
        (Opcode::CopyFileRange, 8),
        (Opcode::CopyFileRange64, 8),
        (Opcode::Getlk, 24),
        (Opcode::Init, 24),
    ];
    for (opcode, least) in fixed {
        let (body, _) = example(opcode);
        assert_eq!(dpu.errno(opcode, &body, least - 1), Errno::INVAL, "{opcode:?}");
    }
    assert!(dpu.fs.notes().is_empty());
    assert!(dpu.session.is_open());
}

#[test]
fn directory_entries_that_do_not_fit_stay_behind() {
    let mut dpu = Dpu::mounted();
    let ask = abi::ReadIn { fh: 9, size: 4096, ..Default::default() };
    // One entry with attributes and a name of three bytes takes 160 bytes.
    assert_eq!(dpu.body(Opcode::Readdirplus, ask.as_bytes(), 4096).len(), 320);
    assert_eq!(dpu.body(Opcode::Readdirplus, ask.as_bytes(), 319).len(), 160);
    assert_eq!(dpu.body(Opcode::Readdirplus, ask.as_bytes(), 159).len(), 0);
    assert_eq!(dpu.body(Opcode::Readdir, ask.as_bytes(), 31).len(), 0);
    assert_eq!(dpu.body(Opcode::Readdir, ask.as_bytes(), 32).len(), 32);
}

#[test]
fn a_length_in_the_header_that_lies_is_refused() {
    let mut dpu = Dpu::mounted();
    for len in [0, 39, 46, u32::MAX] {
        let mut bytes = request(Opcode::Lookup as u32, 5, b"name\0");
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        let (served, reply) = dpu.send(&bytes, 144, false);
        assert_eq!((served, errno_of(&reply)), (Served::Reply(16), Some(Errno::INVAL)), "{len}");
    }
    let mut long = request(Opcode::Setxattr as u32, 5, &vec![0; MAX_ARGUMENTS + 1]);
    let (served, reply) = dpu.send(&long, 16, false);
    assert_eq!((served, errno_of(&reply)), (Served::Reply(16), Some(Errno::INVAL)));
    // Bytes behind the length that the header states are not part of the request.
    long = request(Opcode::Lookup as u32, 5, b"name\0");
    long.extend([0xff; 400]);
    assert_eq!(dpu.send(&long, 144, false).0, Served::Reply(144));
    assert_eq!(dpu.fs.notes(), [r#"lookup 5 "name""#]);
    assert_eq!(dpu.session.totals().malformed, 5);
}

#[test]
fn long_requests_are_copied_whole() {
    let mut dpu = Dpu::mounted();
    let value = vec![7; 65536];
    let arg = abi::SetxattrIn { size: 65536, ..Default::default() };
    let body = [arg.as_bytes(), b"user.a\0", &value].concat();
    assert_eq!(dpu.body(Opcode::Setxattr, &body, 0), b"");
    assert_eq!(dpu.fs.notes(), [r#"setxattr 5 "user.a" 65536 0 false"#]);
    // A shorter one after it does not see what the longer one left.
    assert_eq!(dpu.errno(Opcode::Lookup, b"name", 128), Errno::INVAL);
}

#[test]
fn data_of_a_write_is_handed_over_where_it_lies() {
    let mut dpu = Dpu::mounted();
    let data: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    let arg = abi::WriteIn { fh: 9, size: 1 << 20, write_flags: 5, ..Default::default() };
    let body = [arg.as_bytes(), &data].concat();
    assert_eq!(dpu.body(Opcode::Write, &body, 8), [0, 0, 16, 0, 0, 0, 0, 0]);
    assert_eq!(dpu.fs.notes(), ["write 5 9 0 1048576 true true"]);
    assert_eq!(dpu.fs.first_slice(), REQUEST + 80);
    assert_eq!(dpu.session.totals().written_bytes, 1 << 20);
}

#[test]
fn a_write_to_a_file_in_append_mode_is_appended_unless_it_is_a_page_written_back() {
    for (write_flags, note) in [(0, "append 5 9 7 4 false"), (1, "write 5 9 7 4 false true")] {
        let mut dpu = Dpu::mounted();
        let flags = (libc::O_APPEND | libc::O_RDWR) as u32;
        let arg = abi::WriteIn { fh: 9, offset: 7, size: 4, flags, write_flags, ..Default::default() };
        let body = [arg.as_bytes(), b"data"].concat();
        assert_eq!(dpu.body(Opcode::Write, &body, 8), [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(dpu.fs.notes(), [note]);
    }
}

#[test]
fn data_of_a_read_is_put_behind_the_header() {
    let mut dpu = Dpu::mounted();
    let (body, room) = example(Opcode::Read);
    assert_eq!(dpu.body(Opcode::Read, &body, room), b"data of the file");
    assert_eq!(dpu.fs.first_slice(), REPLY + 16);
    assert_eq!(dpu.session.totals().read_bytes, 16);
}

#[test]
fn what_may_wait_is_handed_back_before_it_has_an_effect() {
    let mut dpu = Dpu::mounted();
    for &opcode in WAITS {
        let (body, room) = example(opcode);
        let (served, reply) = dpu.ask(opcode, 5, &body, room);
        assert_eq!(served, Served::Blocked(Blocked::Io), "{opcode:?}");
        assert!(reply.iter().all(|&byte| byte == CANARY), "{opcode:?}");
        assert!(dpu.fs.notes().is_empty(), "{opcode:?}");
        // A wrong one is refused at once.
        if opcode != Opcode::Syncfs {
            assert_eq!(dpu.errno(opcode, b"", room), Errno::INVAL);
        }
    }
    let totals = dpu.session.totals();
    assert_eq!(totals.blocked, WAITS.len() as u64);
    assert!(WAITS[..2].iter().all(|&opcode| totals.operation(opcode) == 1), "a blocked request counts once");
}

#[test]
fn eagain_hands_a_request_back_until_the_thread_may_block() {
    for &opcode in Opcode::ALL {
        if opcode.is_unanswered() || UNSERVED.contains(&opcode) || WAITS.contains(&opcode) {
            continue;
        }
        let expected = match opcode {
            Opcode::Init | Opcode::Destroy => continue,
            // The answer to "is it free?" is no.
            Opcode::Setlk => Served::Reply(16),
            Opcode::Setlkw => Served::Blocked(Blocked::Lock),
            _ => Served::Blocked(Blocked::Io),
        };
        let mut dpu = Dpu::mounted();
        let (body, room) = example(opcode);
        dpu.fs.fail_with(Some(Errno::AGAIN));
        assert_eq!(dpu.ask(opcode, 5, &body, room).0, expected, "{opcode:?}");
        let (served, reply) = dpu.send(&request(opcode as u32, 5, &body), 16 + room, true);
        assert_eq!((served, errno_of(&reply)), (Served::Reply(16), Some(Errno::AGAIN)), "{opcode:?}");
    }
}

#[test]
fn before_init_everything_fails_and_nothing_happens() {
    let mut dpu = Dpu::new();
    for &opcode in Opcode::ALL {
        if opcode == Opcode::Init {
            continue;
        }
        let (body, room) = example(opcode);
        let (served, reply) = dpu.ask(opcode, 5, &body, room);
        if opcode.is_unanswered() {
            assert_eq!(served, Served::Reply(0));
        } else {
            assert_eq!((served, errno_of(&reply)), (Served::Reply(16), Some(Errno::IO)), "{opcode:?}");
        }
    }
    assert!(dpu.fs.notes().is_empty());
}

#[test]
fn a_second_init_drops_the_state_of_the_first() {
    let mut dpu = Dpu::new();
    assert_eq!(dpu.init(init_in()).0, Served::Reply(80));
    assert_eq!(dpu.init(init_in()).0, Served::Reply(80));
    assert_eq!(dpu.fs.notes(), ["init", "destroy", "init"]);
    // One that fails leaves the export closed and ready for the next.
    let (_, reply) = dpu.ask(Opcode::Init, 0, InitIn { major: 6, ..init_in() }.as_bytes(), 64);
    assert_eq!(errno_of(&reply), Some(Errno::PROTO));
    assert_eq!(dpu.fs.notes(), ["destroy"]);
    assert_eq!(dpu.errno(Opcode::Lookup, b"name\0", 128), Errno::IO);
    assert_eq!(dpu.init(init_in()).0, Served::Reply(80));
    assert_eq!(dpu.fs.notes(), ["init"]);
}

#[test]
fn after_destroy_only_init_is_served() {
    let mut dpu = Dpu::mounted();
    assert_eq!(dpu.ask(Opcode::Destroy, 0, b"", 0).0, Served::Reply(16));
    assert_eq!(dpu.ask(Opcode::Destroy, 0, b"", 0).0, Served::Reply(16));
    assert_eq!(dpu.errno(Opcode::Lookup, b"name\0", 128), Errno::IO);
    assert_eq!(dpu.fs.notes(), ["destroy"]);
    assert_eq!(dpu.init(init_in()).0, Served::Reply(80));
    dpu.body(Opcode::Lookup, b"name\0", 128);
}

#[test]
fn a_kernel_with_a_newer_protocol_is_asked_to_come_again() {
    let mut dpu = Dpu::new();
    let (served, out) = dpu.init(InitIn { major: 8, ..init_in() });
    assert_eq!((served, out.major, out.flags), (Served::Reply(80), 7, 0));
    assert!(dpu.fs.notes().is_empty() && !dpu.session.is_open());
    assert_eq!(dpu.init(init_in()).0, Served::Reply(80));
}

#[test]
fn a_short_room_for_init_gets_what_old_kernels_know() {
    let mut dpu = Dpu::new();
    let (served, reply) = dpu.ask(Opcode::Init, 0, init_in().as_bytes(), 24);
    assert_eq!(served, Served::Reply(40));
    assert_eq!(reply[16..24], [7, 0, 0, 0, 41, 0, 0, 0]);
}

#[test]
fn a_refusal_answers_whatever_has_an_answer() {
    let dpu = Dpu::mounted();
    let refuse_one = |request: &[u8], area: usize| {
        dpu.memory.write(REQUEST, request).unwrap();
        let mut chain =
            Chain::for_memory(&dpu.memory, &[(REQUEST, request.len())], &[(REPLY, area)]).unwrap();
        let len = refuse(&mut chain, Errno::NOMEM);
        let mut reply = vec![0; len];
        dpu.memory.read(REPLY, &mut reply).unwrap();
        reply
    };
    let reply = refuse_one(&request(Opcode::Lookup as u32, 5, b"name\0"), 144);
    assert_eq!((reply.len(), errno_of(&reply)), (16, Some(Errno::NOMEM)));
    assert_eq!(refuse_one(&request(Opcode::Forget as u32, 5, &[0; 8]), 144), b"");
    assert_eq!(refuse_one(&request(Opcode::Lookup as u32, 5, b"name\0"), 15), b"");
    assert_eq!(refuse_one(&[0; 39], 144), b"");
}

#[test]
fn a_file_system_that_claims_more_than_there_is_is_not_believed() {
    let mut dpu = Dpu::mounted();
    dpu.fs.claim(usize::MAX);
    let (body, room) = example(Opcode::Read);
    assert_eq!(dpu.body(Opcode::Read, &body, room).len(), 100);
    let (body, room) = example(Opcode::Write);
    assert_eq!(dpu.body(Opcode::Write, &body, room), [4, 0, 0, 0, 0, 0, 0, 0]);
}

/// A queue that mounts and unmounts over and over must neither stop nor break one that works.
#[test]
fn other_queues_go_on_while_the_session_changes() {
    let Dpu { memory, fs, session, .. } = Dpu::mounted();
    let serve_one = |scratch: &mut Scratch, at: u64, bytes: &[u8]| {
        memory.write(at, bytes).unwrap();
        let mut chain = Chain::for_memory(&memory, &[(at, bytes.len())], &[(at + 4096, 160)]).unwrap();
        let served = serve(&fs, &session, &mut chain, scratch, false);
        let mut reply = [0; 16];
        memory.read(at + 4096, &mut reply).unwrap();
        (served, errno_of(&reply))
    };
    std::thread::scope(|scope| {
        for queue in 0..2 {
            let mut scratch = Scratch::new(&session);
            let serve_one = &serve_one;
            scope.spawn(move || {
                let lookup = request(Opcode::Lookup as u32, 5, b"name\0");
                for _ in 0..2000 {
                    match serve_one(&mut scratch, 16384 * (queue + 1), &lookup) {
                        (Served::Reply(144), None) | (Served::Reply(16), Some(Errno::IO)) => {}
                        other => panic!("{other:?}"),
                    }
                }
            });
        }
        let mut scratch = Scratch::new(&session);
        for _ in 0..500 {
            assert_eq!(serve_one(&mut scratch, 0, &request(26, 0, init_in().as_bytes())).1, None);
            assert_eq!(serve_one(&mut scratch, 0, &request(38, 0, b"")).1, None);
        }
    });
    let totals = session.totals();
    assert_eq!((totals.operation(Opcode::Lookup), totals.operation(Opcode::Destroy)), (4000, 500));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2048, failure_persistence: None, ..Default::default() })]

    /// `Dpu::send` checks every reply: inside its area, with a true length and the right id.
    #[test]
    fn random_requests_never_panic_and_stay_inside_their_reply(
        requests in vec(
            (
                prop_oneof![0..60_u32, any::<u32>()],
                vec(any::<u8>(), 0..600),
                prop_oneof![Just(None), any::<u32>().prop_map(Some), (0..700_u32).prop_map(Some)],
                prop_oneof![0..400_usize, Just(4112)],
                any::<(bool, u16)>(),
            ),
            1..8,
        ),
    ) {
        let mut dpu = Dpu::mounted();
        for (opcode, body, len, area, (may_block, total_extlen)) in requests {
            let mut bytes = request(opcode, 5, &body);
            if let Some(len) = len {
                bytes[..4].copy_from_slice(&len.to_le_bytes());
            }
            if may_block {
                bytes[36..38].copy_from_slice(&(total_extlen % 80).to_le_bytes());
            }
            dpu.send(&bytes, area, may_block);
        }
    }

    #[test]
    fn random_bytes_never_panic_and_stay_inside_their_reply(
        bytes in vec(any::<u8>(), 0..700),
        area in 0..400_usize,
    ) {
        Dpu::mounted().send(&bytes, area, true);
    }
}
