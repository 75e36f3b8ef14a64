//! One test per rule of the parser, and random bytes.

use proptest::collection::vec;
use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::super::abi::fattr;
use super::super::arguments::MAX_WRITE;
use super::super::extension::Accepted;
use super::*;
use crate::filesystem::SetTime;

const CLOSED: Layout = Layout {
    setxattr_ext: false,
    extensions: Accepted { groups: false, label: false },
    uncounted_label: false,
};
const OPEN: Layout =
    Layout { setxattr_ext: true, extensions: Accepted { groups: true, label: true }, uncounted_label: false };
const ROOM: usize = 1 << 16;

fn header(opcode: Opcode) -> InHeader {
    InHeader {
        opcode: opcode as u32,
        unique: 7,
        nodeid: 1,
        uid: 1000,
        gid: 1000,
        pid: 42,
        ..Default::default()
    }
}

fn bytes(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

/// The parsed request as text: requests hold nothing but values, so that is all there is to compare.
fn parse_with(opcode: Opcode, body: &[u8], room: usize, layout: Layout) -> Result<String, Errno> {
    let message = Message { header: header(opcode), body, body_len: body.len(), room };
    parse(opcode, &message, layout).map(|(request, _)| format!("{request:?}"))
}

fn parsed(opcode: Opcode, parts: &[&[u8]]) -> Result<String, Errno> {
    parse_with(opcode, &bytes(parts), ROOM, OPEN)
}

fn refused(opcode: Opcode, parts: &[&[u8]]) {
    assert_eq!(parsed(opcode, parts), Err(Errno::INVAL), "{opcode:?} {parts:?}");
}

/// What stands before each name of the operations that take one.
fn named_operations() -> Vec<(Opcode, Vec<u8>, &'static [u8])> {
    vec![
        (Opcode::Lookup, vec![], b""),
        (Opcode::Unlink, vec![], b""),
        (Opcode::Rmdir, vec![], b""),
        (Opcode::Symlink, vec![], b"target\0"),
        (Opcode::Mknod, abi::MknodIn { mode: libc::S_IFREG, ..Default::default() }.as_bytes().to_vec(), b""),
        (Opcode::Mkdir, abi::MkdirIn::default().as_bytes().to_vec(), b""),
        (Opcode::Create, abi::CreateIn::default().as_bytes().to_vec(), b""),
        (Opcode::Link, abi::LinkIn::default().as_bytes().to_vec(), b""),
        (Opcode::Rename, abi::RenameIn::default().as_bytes().to_vec(), b"other\0"),
        (Opcode::Rename2, abi::Rename2In::default().as_bytes().to_vec(), b"other\0"),
        (Opcode::Rename, [abi::RenameIn::default().as_bytes(), b"other\0"].concat(), b""),
        (Opcode::Rename2, [abi::Rename2In::default().as_bytes(), b"other\0"].concat(), b""),
    ]
}

#[test]
fn names_that_leave_their_directory_are_refused_in_every_operation() {
    let long = [&[b'a'; 256][..], b"\0"].concat();
    let longest = [&[b'a'; 255][..], b"\0"].concat();
    for (opcode, before, after) in named_operations() {
        for name in [&b"\0"[..], b".\0", b"..\0", b"/\0", b"/etc\0", b"a/b\0", b"../b\0", b"a/\0"] {
            refused(opcode, &[&before, name, after]);
        }
        assert_eq!(parsed(opcode, &[&before, &long, after]), Err(Errno::NAMETOOLONG), "{opcode:?}");
        assert!(parsed(opcode, &[&before, &longest, after]).is_ok(), "{opcode:?}");
        assert!(parsed(opcode, &[&before, b"...\0", after]).is_ok(), "{opcode:?}");
    }
}

#[test]
fn a_name_with_an_inner_nul_or_without_its_final_one_is_refused() {
    for (opcode, before, after) in named_operations() {
        refused(opcode, &[&before, b"a\0b\0", after]);
        if after.is_empty() {
            refused(opcode, &[&before, b"ab"]);
            refused(opcode, &[&before]);
        } else {
            refused(opcode, &[&before, b"ab\0"]);
        }
    }
}

#[test]
fn targets_may_be_any_path_up_to_their_limit() {
    let target = |len| [b"name\0", &vec![b'/'; len][..], b"\0"].concat();
    assert!(parsed(Opcode::Symlink, &[&target(1)]).is_ok());
    assert!(parsed(Opcode::Symlink, &[&target(4095)]).is_ok());
    assert_eq!(parsed(Opcode::Symlink, &[&target(4096)]), Err(Errno::NAMETOOLONG));
    refused(Opcode::Symlink, &[&target(0)]);
    refused(Opcode::Symlink, &[b"name\0target"]);
}

#[test]
fn every_operation_refuses_a_body_that_ends_early() {
    let least = |opcode| match opcode {
        Opcode::Readlink | Opcode::Statfs | Opcode::Syncfs | Opcode::Destroy | Opcode::Interrupt => 0,
        Opcode::Bmap | Opcode::Ioctl | Opcode::Poll | Opcode::NotifyReply => 0,
        Opcode::Setupmapping | Opcode::Removemapping => 0,
        Opcode::Forget | Opcode::BatchForget | Opcode::Access | Opcode::Listxattr | Opcode::Opendir => 8,
        Opcode::Open | Opcode::Init => 8,
        Opcode::Getattr | Opcode::Fsync | Opcode::Fsyncdir => 16,
        Opcode::Statx | Opcode::Release | Opcode::Releasedir | Opcode::Flush | Opcode::Lseek => 24,
        Opcode::Tmpfile => 17,
        Opcode::Fallocate => 32,
        Opcode::Read | Opcode::Readdir | Opcode::Readdirplus | Opcode::Write => 40,
        Opcode::Getlk | Opcode::Setlk | Opcode::Setlkw => 48,
        Opcode::CopyFileRange | Opcode::CopyFileRange64 => 56,
        Opcode::Setattr => 88,
        // Those end with a string: a body of zeros never is one.
        _ => usize::MAX,
    };
    for &opcode in Opcode::ALL {
        for len in 0..least(opcode).min(100) {
            refused(opcode, &[&vec![0; len]]);
        }
    }
}

#[test]
fn an_id_that_means_unchanged_to_a_system_call_is_refused() {
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX)] {
        let header = InHeader { uid, gid, ..header(Opcode::Lookup) };
        let message = Message { header, body: b"a\0", body_len: 2, room: ROOM };
        assert_eq!(parse(Opcode::Lookup, &message, OPEN).unwrap_err(), Errno::INVAL);
        let valid = fattr::UID | fattr::GID;
        refused(Opcode::Setattr, &[abi::SetattrIn { valid, uid, gid, ..Default::default() }.as_bytes()]);
    }
    // Without its flag the field says nothing.
    let unset = abi::SetattrIn { uid: u32::MAX, gid: u32::MAX, ..Default::default() };
    assert!(parsed(Opcode::Setattr, &[unset.as_bytes()]).is_ok());
}

fn set_attr(arg: abi::SetattrIn) -> SetAttr {
    let body = arg.as_bytes();
    let message = Message { header: header(Opcode::Setattr), body, body_len: body.len(), room: ROOM };
    match parse(Opcode::Setattr, &message, OPEN).unwrap().0 {
        Request::Setattr(change) => change,
        other => panic!("{other:?}"),
    }
}

#[test]
fn setattr_takes_what_its_flags_name_and_nothing_else() {
    let everything = abi::SetattrIn {
        valid: 0,
        fh: 9,
        size: 10,
        atime: u64::MAX,
        mtime: 12,
        ctime: 13,
        atimensec: 999_999_999,
        mtimensec: 2,
        ctimensec: 3,
        mode: libc::S_IFREG | 0o6755,
        uid: 5,
        gid: 6,
        ..Default::default()
    };
    let none = set_attr(everything);
    assert!(none.handle.is_none() && none.mode.is_none() && none.uid.is_none() && none.gid.is_none());
    assert!(none.size.is_none() && none.atime.is_none() && none.mtime.is_none() && none.ctime.is_none());
    let all = set_attr(abi::SetattrIn { valid: 0x07f | fattr::CTIME | fattr::KILL_SUIDGID, ..everything });
    assert_eq!((all.handle, all.mode, all.uid, all.gid), (Some(HandleId(9)), Some(0o6755), Some(5), Some(6)));
    assert_eq!((all.size, all.kill_suidgid), (Some(10), true));
    // Seconds before the epoch.
    assert_eq!(all.atime, Some(SetTime::At(-1, 999_999_999)));
    assert_eq!((all.mtime, all.ctime), (Some(SetTime::At(12, 2)), Some(SetTime::At(13, 3))));
    let now = fattr::ATIME | fattr::ATIME_NOW | fattr::MTIME | fattr::MTIME_NOW;
    let now = set_attr(abi::SetattrIn { valid: now, ..everything });
    assert_eq!((now.atime, now.mtime), (Some(SetTime::Now), Some(SetTime::Now)));
}

#[test]
fn setattr_refuses_times_and_sizes_that_cannot_be() {
    let with = |valid, arg: abi::SetattrIn| abi::SetattrIn { valid, ..arg };
    let nanoseconds = abi::SetattrIn { atimensec: 1_000_000_000, mtimensec: u32::MAX, ..Default::default() };
    refused(Opcode::Setattr, &[with(fattr::ATIME, nanoseconds).as_bytes()]);
    refused(Opcode::Setattr, &[with(fattr::MTIME, nanoseconds).as_bytes()]);
    let size = abi::SetattrIn { size: 1 << 63, ..Default::default() };
    refused(Opcode::Setattr, &[with(fattr::SIZE, size).as_bytes()]);
}

#[test]
fn a_write_carries_exactly_what_it_says() {
    let write = |size: u32, payload: usize, offset| {
        let arg = abi::WriteIn { fh: 3, offset, size, ..Default::default() };
        let message =
            Message { header: header(Opcode::Write), body: arg.as_bytes(), body_len: 40 + payload, room: 8 };
        parse(Opcode::Write, &message, OPEN).map(|(request, _)| format!("{request:?}"))
    };
    assert!(write(4096, 4096, 0).is_ok());
    assert!(write(MAX_WRITE, MAX_WRITE as usize, 0).is_ok());
    assert!(write(0, 0, 0).is_ok());
    assert!(write(1, 1, i64::MAX as u64 - 1).is_ok());
    for (size, payload, offset) in [
        (4096, 4095, 0),
        (4096, 4097, 0),
        (u32::MAX, 0, 0),
        (MAX_WRITE + 1, MAX_WRITE as usize + 1, 0),
        (1, 1, i64::MAX as u64),
        (1, 1, u64::MAX),
    ] {
        assert_eq!(write(size, payload, offset), Err(Errno::INVAL), "{size} {payload} {offset}");
    }
}

#[test]
fn sizes_of_replies_are_cut_to_the_room_there_is() {
    let ask = |size| abi::ReadIn { fh: 1, offset: 0, size, ..Default::default() };
    let read = |size, room| parse_with(Opcode::Read, ask(size).as_bytes(), room, OPEN).unwrap();
    assert_eq!(read(u32::MAX, 4096), "Read { handle: HandleId(1), offset: 0, size: 4096 }");
    assert_eq!(read(100, 4096), "Read { handle: HandleId(1), offset: 0, size: 100 }");
    // A kernel with large pages asks for more than `max_write`; a short answer would end its file.
    assert_eq!(read(16 << 20, 32 << 20), "Read { handle: HandleId(1), offset: 0, size: 16777216 }");
    let list = |size, room| parse_with(Opcode::Readdir, ask(size).as_bytes(), room, OPEN).unwrap();
    assert_eq!(list(u32::MAX, usize::MAX), "Readdir { handle: HandleId(1), offset: 0, size: 1048576 }");
    assert_eq!(list(4096, 100), "Readdir { handle: HandleId(1), offset: 0, size: 100 }");
    let xattr = |size: u32, room| {
        let arg = abi::GetxattrIn { size, padding: 0 };
        parse_with(Opcode::Listxattr, arg.as_bytes(), room, OPEN)
    };
    assert_eq!(xattr(u32::MAX, usize::MAX).unwrap(), "Listxattr { size: 65536 }");
    assert_eq!(xattr(100, 50).unwrap(), "Listxattr { size: 50 }");
    assert_eq!(xattr(0, 8).unwrap(), "Listxattr { size: 0 }");
    // Cut to 0 it would ask for the size instead.
    assert_eq!(xattr(100, 0), Err(Errno::RANGE));
}

#[test]
fn a_read_ends_where_files_end() {
    let read = |offset| {
        let arg = abi::ReadIn { fh: 1, offset, size: 4096, ..Default::default() };
        parsed(Opcode::Read, &[arg.as_bytes()])
    };
    let last_page = i64::MAX as u64 - 4095;
    assert_eq!(
        read(last_page).unwrap(),
        format!("Read {{ handle: HandleId(1), offset: {last_page}, size: 4095 }}")
    );
    assert_eq!(read(1 << 63), Err(Errno::INVAL));
    assert_eq!(read(u64::MAX), Err(Errno::INVAL));
}

#[test]
fn ranges_beyond_the_largest_offset_are_refused() {
    let largest = i64::MAX as u64;
    for (offset, length) in [(0, 0), (largest, 1), (1, largest), (u64::MAX, 1), (1, u64::MAX), (1 << 63, 1)] {
        refused(Opcode::Fallocate, &[abi::FallocateIn { offset, length, ..Default::default() }.as_bytes()]);
        let from = abi::CopyFileRangeIn { off_in: offset, len: length, ..Default::default() };
        let to = abi::CopyFileRangeIn { off_out: offset, len: length, ..Default::default() };
        for opcode in [Opcode::CopyFileRange, Opcode::CopyFileRange64] {
            refused(opcode, &[from.as_bytes()]);
            refused(opcode, &[to.as_bytes()]);
        }
    }
    let fine = abi::FallocateIn { offset: largest - 1, length: 1, ..Default::default() };
    assert!(parsed(Opcode::Fallocate, &[fine.as_bytes()]).is_ok());
    refused(
        Opcode::CopyFileRange,
        &[abi::CopyFileRangeIn { len: 1, flags: 1, ..Default::default() }.as_bytes()],
    );
}

#[test]
fn a_copy_is_cut_to_what_its_reply_can_tell() {
    let arg = abi::CopyFileRangeIn { len: 1 << 40, ..Default::default() };
    let len = |opcode| match parsed(opcode, &[arg.as_bytes()]) {
        Ok(text) => text.split("len: ").nth(1).and_then(|rest| rest.split(',').next()).unwrap().to_owned(),
        Err(errno) => panic!("{errno}"),
    };
    assert_eq!(len(Opcode::CopyFileRange), 0xffff_0000_u64.to_string());
    assert_eq!(len(Opcode::CopyFileRange64), (1_u64 << 40).to_string());
}

#[test]
fn seeks_beyond_the_largest_offset_fail_as_on_a_local_file() {
    let seek = |whence: i32, offset| {
        let arg = abi::LseekIn { fh: 1, offset, whence: whence as u32, padding: 0 };
        parsed(Opcode::Lseek, &[arg.as_bytes()]).map(|_| ())
    };
    for whence in [libc::SEEK_SET, libc::SEEK_END, libc::SEEK_DATA, libc::SEEK_HOLE] {
        assert_eq!(seek(whence, 0), Ok(()));
    }
    assert_eq!(seek(libc::SEEK_DATA, u64::MAX), Err(Errno::NXIO));
    assert_eq!(seek(libc::SEEK_HOLE, 1 << 63), Err(Errno::NXIO));
    assert_eq!(seek(libc::SEEK_SET, 1 << 63), Err(Errno::INVAL));
    assert_eq!(seek(libc::SEEK_CUR, 0), Err(Errno::INVAL));
    assert_eq!(seek(5, 0), Err(Errno::INVAL));
    assert_eq!(seek(-1, 0), Err(Errno::INVAL));
}

#[test]
fn a_batch_of_forgets_has_as_many_as_it_says() {
    let batch = |count, pairs: &[(u64, u64)]| {
        let mut body = abi::BatchForgetIn { count, dummy: 0 }.as_bytes().to_vec();
        for &(nodeid, nlookup) in pairs {
            body.extend(abi::ForgetOne { nodeid, nlookup }.as_bytes());
        }
        body
    };
    let body = batch(2, &[(5, 1), (6, u64::MAX)]);
    let message = Message { header: header(Opcode::BatchForget), body: &body, body_len: body.len(), room: 0 };
    match parse(Opcode::BatchForget, &message, OPEN).unwrap().0 {
        Request::BatchForget(forgets) => {
            assert_eq!(forgets.iter().collect::<Vec<_>>(), [(NodeId(5), 1), (NodeId(6), u64::MAX)]);
        }
        other => panic!("{other:?}"),
    }
    refused(Opcode::BatchForget, &[&batch(3, &[(5, 1), (6, 1)])]);
    refused(Opcode::BatchForget, &[&batch(u32::MAX, &[(5, 1)])]);
    assert!(parsed(Opcode::BatchForget, &[&batch(0, &[])]).is_ok());
}

#[test]
fn the_arguments_of_setxattr_have_the_negotiated_length() {
    let short = bytes(&[abi::SetxattrInShort { size: 3, flags: 1 }.as_bytes(), b"user.a\0", b"val"]);
    let long = abi::SetxattrIn { size: 3, flags: 1, setxattr_flags: abi::SETXATTR_ACL_KILL_SGID, padding: 0 };
    let long = bytes(&[long.as_bytes(), b"user.a\0", b"val"]);
    let expect = |kill| {
        format!(r#"Setxattr {{ name: "user.a", value: [118, 97, 108], flags: 1, kill_sgid: {kill} }}"#)
    };
    assert_eq!(parse_with(Opcode::Setxattr, &short, ROOM, CLOSED), Ok(expect(false)));
    assert_eq!(parse_with(Opcode::Setxattr, &long, ROOM, OPEN), Ok(expect(true)));
    assert_eq!(parse_with(Opcode::Setxattr, &long, ROOM, CLOSED), Err(Errno::INVAL));
    assert_eq!(parse_with(Opcode::Setxattr, &short, ROOM, OPEN), Err(Errno::INVAL));
}

#[test]
fn setxattr_refuses_values_that_are_not_there_or_too_long() {
    let set = |size, flags, name: &[u8], value: &[u8]| {
        let arg = abi::SetxattrIn { size, flags, ..Default::default() };
        parsed(Opcode::Setxattr, &[arg.as_bytes(), name, value]).map(|_| ())
    };
    assert_eq!(set(0, 0, b"user.a\0", b""), Ok(()));
    assert_eq!(set(65536, 2, b"user.a\0", &[0; 65536]), Ok(()));
    assert_eq!(set(65537, 0, b"user.a\0", &[0; 65537]), Err(Errno::TOOBIG));
    assert_eq!(set(4, 0, b"user.a\0", b"abc"), Err(Errno::INVAL));
    assert_eq!(set(2, 0, b"user.a\0", b"abc"), Err(Errno::INVAL));
    assert_eq!(set(u32::MAX, 0, b"user.a\0", b"abc"), Err(Errno::INVAL));
    assert_eq!(set(0, 4, b"user.a\0", b""), Err(Errno::INVAL));
    assert_eq!(set(0, 0, b"\0", b""), Err(Errno::INVAL));
    assert_eq!(set(0, 0, &[&[b'a'; 256][..], b"\0"].concat(), b""), Err(Errno::NAMETOOLONG));
    assert_eq!(set(0, 0, b"user.a", b""), Err(Errno::INVAL));
}

#[test]
fn names_of_attributes_are_whole_strings_in_every_operation() {
    let ask = abi::GetxattrIn { size: 64, padding: 0 };
    assert!(parsed(Opcode::Getxattr, &[ask.as_bytes(), b"user.a/b\0"]).is_ok());
    assert!(parsed(Opcode::Removexattr, &[b"user.a\0"]).is_ok());
    for name in [&b"\0"[..], b"", b"user.a", b"user.a\0b\0"] {
        refused(Opcode::Getxattr, &[ask.as_bytes(), name]);
        refused(Opcode::Removexattr, &[name]);
    }
}

#[test]
fn locks_have_a_known_kind_and_a_range() {
    let lock = |kind, start, end| {
        let arg = abi::LkIn { fh: 1, lk: abi::FileLock { start, end, kind, pid: 0 }, ..Default::default() };
        parsed(Opcode::Setlk, &[arg.as_bytes()]).map(|_| ())
    };
    let largest = i64::MAX as u64;
    for kind in [libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK] {
        assert_eq!(lock(kind as u32, 0, largest), Ok(()));
    }
    assert_eq!(lock(3, 0, 0), Err(Errno::INVAL));
    assert_eq!(lock(u32::MAX, 0, 0), Err(Errno::INVAL));
    assert_eq!(lock(0, 2, 1), Err(Errno::INVAL));
    assert_eq!(lock(0, 0, largest + 1), Err(Errno::INVAL));
}

#[test]
fn mknod_makes_what_mknod_can_make() {
    let node = |mode, rdev| {
        let arg = abi::MknodIn { mode, rdev, umask: 0o22, padding: 0 };
        let body = bytes(&[arg.as_bytes(), b"a\0"]);
        let message =
            Message { header: header(Opcode::Mknod), body: &body, body_len: body.len(), room: ROOM };
        match parse(Opcode::Mknod, &message, OPEN)?.0 {
            Request::Mknod { new, .. } => Ok((new.mode, new.umask, new.rdev)),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(node(0o644, 5), Ok((libc::S_IFREG | 0o644, 0o22, 0)));
    assert_eq!(node(libc::S_IFCHR | 0o600, 259), Ok((libc::S_IFCHR | 0o600, 0o22, 259)));
    assert_eq!(node(libc::S_IFSOCK | 0o600, 259), Ok((libc::S_IFSOCK | 0o600, 0o22, 0)));
    for kind in [libc::S_IFDIR, libc::S_IFLNK, libc::S_IFMT] {
        assert_eq!(node(kind, 0), Err(Errno::INVAL));
    }
}

#[test]
fn tmpfile_has_a_place_holder_for_a_name() {
    let arg = abi::CreateIn { flags: 2, mode: 0o600, ..Default::default() };
    assert!(parsed(Opcode::Tmpfile, &[arg.as_bytes(), b"/\0"]).is_ok());
    refused(Opcode::Tmpfile, &[arg.as_bytes()]);
    refused(Opcode::Tmpfile, &[arg.as_bytes(), b"/\0x"]);
}

#[test]
fn flags_not_known_are_refused() {
    refused(Opcode::Rename2, &[abi::Rename2In { newdir: 1, flags: 8, padding: 0 }.as_bytes(), b"a\0b\0"]);
    assert!(
        parsed(Opcode::Rename2, &[abi::Rename2In { newdir: 1, flags: 7, padding: 0 }.as_bytes(), b"a\0b\0"])
            .is_ok()
    );
    refused(Opcode::Access, &[abi::AccessIn { mask: 8, padding: 0 }.as_bytes()]);
    assert!(parsed(Opcode::Access, &[abi::AccessIn { mask: 7, padding: 0 }.as_bytes()]).is_ok());
}

fn with_extensions(body: &[u8], total_extlen: u16, layout: Layout) -> Result<(String, Option<u32>), Errno> {
    let header = InHeader { total_extlen, ..header(Opcode::Mkdir) };
    let message = Message { header, body, body_len: body.len(), room: ROOM };
    parse(Opcode::Mkdir, &message, layout).map(|(request, extensions)| {
        let label = extensions.label.map_or(String::new(), |(name, value)| format!(" {name:?} {value:?}"));
        (format!("{request:?}{label}"), extensions.groups.and_then(|groups| groups.ids().first().copied()))
    })
}

#[test]
fn extensions_are_cut_off_by_the_length_in_the_header() {
    let group = [16_u32, 32, 1, 77].map(u32::to_le_bytes).concat();
    let body = bytes(&[abi::MkdirIn::default().as_bytes(), b"dir\0", &group]);
    let (request, group) = with_extensions(&body, 2, OPEN).unwrap();
    assert!(request.contains(r#"name: "dir""#), "{request}");
    assert_eq!(group, Some(77));
    // One unit short, one too long, longer than the body.
    for total_extlen in [1, 3, 4, u16::MAX] {
        assert_eq!(with_extensions(&body, total_extlen, OPEN), Err(Errno::INVAL), "{total_extlen}");
    }
    // Not counted, so the name does not end the request.
    assert_eq!(with_extensions(&body, 0, OPEN), Err(Errno::INVAL));
    assert_eq!(with_extensions(&body, 2, CLOSED), Err(Errno::INVAL));
}

#[test]
fn a_label_of_an_older_kernel_is_not_counted_in_the_header() {
    // size, contexts; size, padding; name, value, padding.
    let mut label = [32_u32, 1, 3, 0].map(u32::to_le_bytes).concat();
    label.extend(b"security.x\0lab\0\0");
    let body = bytes(&[abi::MkdirIn::default().as_bytes(), b"dir\0", &label]);
    let old = Layout { uncounted_label: true, ..OPEN };
    let (request, _) = with_extensions(&body, 0, old).unwrap();
    assert!(request.ends_with(r#""security.x" [108, 97, 98]"#), "{request}");
    assert_eq!(with_extensions(&body[..body.len() - 8], 0, old), Err(Errno::INVAL));
    // A newer kernel counts, and what it counts is all there is.
    assert!(with_extensions(&body, 4, OPEN).is_ok());
    assert_eq!(with_extensions(&body, 3, old), Err(Errno::INVAL));
}

#[test]
fn init_of_any_age_is_read() {
    let init = |len: usize| {
        let whole = InitIn { major: 7, minor: 45, max_readahead: 1, flags: 2, flags2: 3, unused: [9; 11] };
        let body = &whole.as_bytes()[..len];
        let message = Message { header: header(Opcode::Init), body, body_len: len, room: ROOM };
        match parse(Opcode::Init, &message, CLOSED) {
            Ok((Request::Init(init), _)) => Ok((init.major, init.minor, init.flags, init.flags2)),
            Ok(other) => panic!("{other:?}"),
            Err(errno) => Err(errno),
        }
    };
    assert_eq!(init(64), Ok((7, 45, 2, 3)));
    assert_eq!(init(16), Ok((7, 45, 2, 0)));
    assert_eq!(init(8), Ok((7, 45, 0, 0)));
    assert_eq!(init(7), Err(Errno::INVAL));
}

#[test]
fn operations_that_need_a_window_or_a_device_are_known_and_not_served() {
    for opcode in [
        Opcode::Bmap,
        Opcode::Ioctl,
        Opcode::Poll,
        Opcode::NotifyReply,
        Opcode::Setupmapping,
        Opcode::Removemapping,
    ] {
        assert_eq!(parsed(opcode, &[]).unwrap(), "Unsupported");
    }
}

fn layouts() -> impl Strategy<Value = Layout> {
    any::<[bool; 4]>().prop_map(|[setxattr_ext, groups, label, uncounted_label]| Layout {
        setxattr_ext,
        extensions: Accepted { groups, label },
        uncounted_label,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..Default::default() })]

    #[test]
    fn random_bodies_are_parsed_or_refused(
        opcode in prop::sample::select(Opcode::ALL),
        body in vec(any::<u8>(), 0..512),
        total_extlen in prop_oneof![Just(0_u16), 0..64_u16, any::<u16>()],
        room in prop_oneof![0..300_usize, any::<usize>()],
        layout in layouts(),
    ) {
        let header = InHeader { total_extlen, ..header(opcode) };
        let message = Message { header, body: &body, body_len: body.len(), room };
        if let Ok((request, _)) = parse(opcode, &message, layout) {
            prop_assert!(request.least_reply() <= 512);
        }
    }

    #[test]
    fn no_accepted_name_leaves_its_directory(
        (opcode, before, after) in prop::sample::select(named_operations()),
        name in vec(prop::sample::select(&b"./a\0\xff"[..]), 0..8),
    ) {
        let body = bytes(&[&before, &name, b"\0", after]);
        let message = Message { header: header(opcode), body: &body, body_len: body.len(), room: ROOM };
        let expected = !name.is_empty() && name != b"." && name != b".."
            && !name.contains(&b'/') && !name.contains(&0);
        prop_assert_eq!(parse(opcode, &message, OPEN).is_ok(), expected, "{:?}", name);
    }
}
