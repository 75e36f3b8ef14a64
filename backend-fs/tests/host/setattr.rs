//! Attributes that the DPU asks for and sets.

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};

use backend_fs::filesystem::{FileSystem, HandleId, NodeId, SetAttr, SetTime};
use rustix::io::Errno;

use crate::support::*;

fn set(export: &Export, node: NodeId, change: SetAttr) -> Result<backend_fs::fuse::abi::Attr, Errno> {
    export.fs.setattr(&AS_ROOT, node, change).map(|(attr, _)| attr)
}

/// With and without an open file.
fn both_ways(test: impl Fn(&Export, NodeId, Option<HandleId>)) {
    for open in [false, true] {
        let export = Export::new();
        export.put("file", "content");
        let node = export.node("file");
        let handle = open.then(|| export.open("file", RDWR).1);
        test(&export, node, handle);
    }
}

#[test]
fn mode_owner_and_size_change() {
    both_ways(|export, node, handle| {
        let change = SetAttr {
            handle,
            mode: Some(libc::S_IFREG | 0o4751),
            uid: Some(12),
            gid: Some(34),
            size: Some(3),
            ..Default::default()
        };
        let attr = set(export, node, change).unwrap();
        // A change of owner clears set-user-id.
        assert_eq!((attr.mode & 0o7777, attr.uid, attr.gid, attr.size), (0o751, 12, 34, 3));
        let host = export.path.join("file").metadata().unwrap();
        assert_eq!((host.mode() & 0o7777, host.uid(), host.gid(), host.size()), (0o751, 12, 34, 3));
        let grown = set(export, node, SetAttr { handle, size: Some(1 << 30), ..Default::default() }).unwrap();
        assert_eq!((grown.size, grown.uid), (1 << 30, 12));
    });
}

#[test]
fn times_are_set_one_by_one() {
    both_ways(|export, node, handle| {
        let at = |seconds, nanos| Some(SetTime::At(seconds, nanos));
        let change =
            SetAttr { handle, atime: at(-5, 123), mtime: at(1 << 33, 999_999_999), ..Default::default() };
        let attr = set(export, node, change).unwrap();
        assert_eq!((attr.atime as i64, attr.atimensec), (-5, 123));
        assert_eq!((attr.mtime, attr.mtimensec), (1 << 33, 999_999_999));
        let before = SystemTime::now() - Duration::from_secs(2);
        let attr =
            set(export, node, SetAttr { handle, mtime: Some(SetTime::Now), ..Default::default() }).unwrap();
        assert_eq!((attr.atime as i64, attr.atimensec), (-5, 123));
        assert!(SystemTime::UNIX_EPOCH + Duration::from_secs(attr.mtime) >= before);
        let ctime = set(export, node, SetAttr { handle, ctime: at(1, 1), ..Default::default() }).unwrap();
        assert_ne!(ctime.ctime, 1);
    });
}

#[test]
fn values_that_mean_something_else_to_the_host_change_nothing() {
    both_ways(|export, node, handle| {
        let base = SetAttr { handle, mode: Some(0o600), ..Default::default() };
        let before = set(export, node, SetAttr::default()).unwrap();
        let time = SetAttr { mtime: Some(SetTime::At(1, 1_000_000_000)), ..base };
        assert_eq!(set(export, node, time), Err(Errno::INVAL));
        assert_eq!(set(export, node, SetAttr::default()).unwrap(), before);
        for change in [SetAttr { uid: Some(u32::MAX), ..base }, SetAttr { gid: Some(u32::MAX), ..base }] {
            assert!(set(export, node, change).is_err());
        }
        for size in [1 << 63, u64::MAX] {
            assert_eq!(
                set(export, node, SetAttr { handle, size: Some(size), ..Default::default() }),
                Err(Errno::FBIG)
            );
        }
        let after = set(export, node, SetAttr::default()).unwrap();
        assert_eq!((after.uid, after.gid, after.size), (before.uid, before.gid, before.size));
    });
}

#[test]
fn links_are_changed_and_not_what_they_point_to() {
    let export = Export::new();
    let canary = export.outside.join("canary");
    std::fs::write(&canary, "canary").unwrap();
    let before = canary.metadata().unwrap();
    std::os::unix::fs::symlink(&canary, export.path.join("link")).unwrap();
    let node = export.node("link");
    let change = SetAttr { uid: Some(7), mtime: Some(SetTime::At(9, 9)), ..Default::default() };
    let attr = set(&export, node, change).unwrap();
    assert_eq!((attr.uid, attr.mtime, attr.mode & libc::S_IFMT), (7, 9, libc::S_IFLNK));
    assert_eq!(set(&export, node, SetAttr { size: Some(0), ..Default::default() }), Err(Errno::INVAL));
    assert!(set(&export, node, SetAttr { mode: Some(0o600), ..Default::default() }).is_err());
    let after = canary.metadata().unwrap();
    assert_eq!(
        (after.uid(), after.mtime(), after.mode(), after.size()),
        (before.uid(), before.mtime(), before.mode(), 6)
    );
}

#[test]
fn only_files_have_a_size_to_set() {
    let export = Export::new();
    assert_eq!(set(&export, ROOT, SetAttr { size: Some(0), ..Default::default() }), Err(Errno::ISDIR));
    let fifo = export.fs.mknod(&AS_ROOT, ROOT, c"fifo", new(libc::S_IFIFO | 0o600)).unwrap().node;
    assert_eq!(set(&export, fifo, SetAttr { size: Some(0), ..Default::default() }), Err(Errno::INVAL));
    assert_eq!(
        set(&export, fifo, SetAttr { mode: Some(0o640), ..Default::default() }).unwrap().mode & 0o777,
        0o640
    );
}

#[test]
fn statx_gives_the_creation_time() {
    let export = Export::new();
    let path = export.put("file", "content");
    let born = path.metadata().unwrap().created().unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let node = export.node("file");
    let basic_and_birth = 0xfff;
    let (found, _) = export.fs.statx(&AS_ROOT, node, None, 0, basic_and_birth).unwrap();
    assert_eq!(found.mask, basic_and_birth);
    assert_eq!((found.btime.tv_sec as u64, found.btime.tv_nsec), (born.as_secs(), born.subsec_nanos()));
    assert_eq!((found.size, u32::from(found.mode) & libc::S_IFMT), (7, libc::S_IFREG));
    let host_only = 0x1000;
    assert_eq!(export.fs.statx(&AS_ROOT, node, None, 0, u32::MAX).unwrap().0.mask & host_only, 0);
    for flags in [libc::AT_STATX_FORCE_SYNC, libc::AT_STATX_DONT_SYNC] {
        assert!(export.fs.statx(&AS_ROOT, node, None, flags as u32, basic_and_birth).is_ok());
    }
    for flags in [libc::AT_SYMLINK_FOLLOW, libc::AT_NO_AUTOMOUNT, 1 << 31] {
        assert_eq!(export.fs.statx(&AS_ROOT, node, None, flags as u32, 0xfff).err(), Some(Errno::INVAL));
    }
}

#[test]
fn statfs_tells_of_the_hosts_file_system() {
    let export = Export::new();
    let host = rustix::fs::statvfs(&export.path).unwrap();
    let seen = export.fs.statfs(&AS_ROOT, ROOT).unwrap();
    assert_eq!((seen.blocks, seen.files), (host.f_blocks, host.f_files));
    assert_eq!((u64::from(seen.frsize), u64::from(seen.namelen)), (host.f_frsize, host.f_namemax));
}
