//! Open files.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use backend_fs::filesystem::{CopyRange, FileSystem, HandleId, Negotiated, NodeId, Release};
use backend_fs::fuse::abi;
use backend_fs::host::options::{CachePolicy, HostOptions};
use rustix::io::Errno;

use crate::support::*;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251) as u8).collect()
}

#[test]
fn bytes_come_back_through_any_pieces() {
    for on in [On::Disk, On::Memory] {
        let export = Export::with(on, HostOptions::default());
        let (entry, opened) = export.create(&AS_ROOT, "file", 0o644, RDWR).unwrap();
        let file = (entry.node, opened.handle);
        let bytes = pattern(100_000);
        for pieces in [&[100_000][..], &[1, 99_999], &[4096, 4096, 91_808], &[33_333, 33_333, 33_334]] {
            let how = Write { pieces: Some(pieces), ..Default::default() };
            assert_eq!(write(&export.fs, &AS_ROOT, file, 0, &bytes, how), Ok(100_000));
            assert_eq!(export.get("file"), bytes);
            for cx in [AS_ROOT, ON_WORKER] {
                assert_eq!(read(&export.fs, &cx, file, 0, pieces).unwrap(), bytes);
            }
        }
    }
}

#[test]
fn more_pieces_than_one_call_takes() {
    let export = Export::new();
    let (entry, opened) = export.create(&AS_ROOT, "file", 0o644, RDWR).unwrap();
    let file = (entry.node, opened.handle);
    let bytes = pattern(3 * 2500);
    let pieces = [3; 2500];
    let how = Write { pieces: Some(&pieces), ..Default::default() };
    assert_eq!(write(&export.fs, &AS_ROOT, file, 11, &bytes, how), Ok(7500));
    assert_eq!(export.get("file")[11..], bytes);
    for cx in [AS_ROOT, ON_WORKER] {
        assert_eq!(read(&export.fs, &cx, file, 11, &pieces).unwrap(), bytes);
    }
}

#[test]
fn reads_end_where_the_file_ends() {
    for on in [On::Disk, On::Memory] {
        let export = Export::with(on, HostOptions::default());
        export.put("file", pattern(5000));
        let file = export.open("file", RDONLY);
        for cx in [AS_ROOT, ON_WORKER] {
            assert_eq!(export.read(&cx, file, 4000, 4096).unwrap(), pattern(5000)[4000..]);
            assert_eq!(export.read(&cx, file, 5000, 10).unwrap(), b"");
            assert_eq!(export.read(&cx, file, 1 << 40, 10).unwrap(), b"");
            assert_eq!(export.read(&cx, file, 0, 0).unwrap(), b"");
            assert_eq!(read(&export.fs, &cx, file, 4990, &[4, 4, 4, 4]).unwrap(), pattern(5000)[4990..]);
        }
    }
}

#[test]
fn offsets_that_mean_something_else_are_refused() {
    let export = Export::new();
    export.put("file", "content");
    let (node, handle) = export.open("file", RDWR);
    // -1 is "the file's own position" to preadv2.
    for offset in [u64::MAX, 1 << 63] {
        assert_eq!(export.read(&AS_ROOT, (node, handle), offset, 4), Err(Errno::INVAL));
        assert_eq!(export.write(&AS_ROOT, (node, handle), offset, b"x"), Err(Errno::INVAL));
        assert!(export.fs.fallocate(&AS_ROOT, node, handle, 0, offset, 1).is_err());
        assert!(export.fs.fallocate(&AS_ROOT, node, handle, 0, 1, offset).is_err());
        assert_eq!(export.fs.lseek(&AS_ROOT, node, handle, offset, 3), Err(Errno::INVAL));
        for (from, to) in [(offset, 0), (0, offset)] {
            let range =
                CopyRange { source: (node, handle, from), target: (node, handle, to), len: 1, flags: 0 };
            assert!(export.fs.copy_file_range(&AS_ROOT, range).is_err());
        }
    }
    assert_eq!(export.get("file"), b"content");
}

#[test]
fn handles_of_other_files_and_released_handles_are_refused() {
    let export = Export::new();
    export.put("a", "a");
    export.put("b", "b");
    let (a, handle) = export.open("a", RDONLY);
    let b = export.node("b");
    assert_eq!(export.read(&AS_ROOT, (b, handle), 0, 1), Err(Errno::BADF));
    assert_eq!(export.read(&AS_ROOT, (a, HandleId(handle.0 + 1)), 0, 1), Err(Errno::BADF));
    let release = Release { handle, flock_owner: None };
    assert_eq!(export.fs.release(&AS_ROOT, b, release), Err(Errno::BADF));
    assert_eq!(export.fs.releasedir(&AS_ROOT, a, release), Err(Errno::BADF));
    assert_eq!(export.fs.fsyncdir(&AS_ROOT, a, handle, false), Err(Errno::BADF));
    assert_eq!(export.fs.release(&AS_ROOT, a, release), Ok(()));
    let dir = export.fs.opendir(&AS_ROOT, ROOT, 0).unwrap().handle;
    assert_eq!(export.read(&AS_ROOT, (ROOT, dir), 0, 1), Err(Errno::BADF));
    assert_eq!(export.fs.fsync(&AS_ROOT, ROOT, dir, false), Err(Errno::BADF));
    assert_eq!(export.fs.fsyncdir(&AS_ROOT, ROOT, dir, false), Ok(()));
    assert_eq!(export.fs.release(&AS_ROOT, a, release), Err(Errno::BADF));
    assert_eq!(export.read(&AS_ROOT, (a, handle), 0, 1), Err(Errno::BADF));
}

#[test]
fn a_read_that_would_wait_for_the_disk_is_left_to_a_thread_that_may() {
    let export = Export::new();
    let path = export.put("file", pattern(1 << 20));
    let file = export.open("file", RDONLY);
    let uncached = || {
        let host = std::fs::File::open(&path).unwrap();
        host.sync_all().unwrap();
        rustix::fs::fadvise(&host, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    };
    uncached();
    assert_eq!(export.read(&ON_WORKER, file, 0, 4096), Err(Errno::AGAIN));
    // The end is in the cache, the middle is not: no short read.
    uncached();
    export.read(&AS_ROOT, file, 0, 4096).unwrap();
    match export.read(&ON_WORKER, file, 0, 1 << 20) {
        Ok(bytes) => assert_eq!(bytes.len(), 1 << 20, "read ahead"),
        Err(errno) => assert_eq!(errno, Errno::AGAIN),
    }
    assert_eq!(export.read(&AS_ROOT, file, 0, 1 << 20).unwrap(), pattern(1 << 20));
    assert_eq!(export.read(&ON_WORKER, file, 0, 1 << 20).unwrap(), pattern(1 << 20));
}

#[test]
fn what_waits_for_the_disk_is_left_to_a_thread_that_may() {
    let options = HostOptions { allow_direct_io: true, ..Default::default() };
    let export = Export::with(On::Disk, options);
    export.put("file", pattern(8192));
    let (node, handle) = export.open("file", RDWR | libc::O_SYNC as u32);
    assert_eq!(export.write(&ON_WORKER, (node, handle), 0, b"x"), Err(Errno::AGAIN));
    assert_eq!(export.get("file"), pattern(8192));
    assert_eq!(export.write(&AS_ROOT, (node, handle), 0, b"x"), Ok(1));
    assert_eq!(export.fs.fsync(&ON_WORKER, node, handle, true), Err(Errno::AGAIN));
    assert_eq!(export.fs.fsync(&AS_ROOT, node, handle, true), Ok(()));
    assert_eq!(export.fs.fsync(&AS_ROOT, node, handle, false), Ok(()));
    assert_eq!(export.fs.syncfs(&ON_WORKER, node), Err(Errno::AGAIN));
    assert_eq!(export.fs.syncfs(&AS_ROOT, ROOT), Ok(()));
    assert_eq!(export.fs.syncfs(&AS_ROOT, node), Ok(()));
    let direct = export.open("file", RDWR | libc::O_DIRECT as u32);
    assert_eq!(export.read(&ON_WORKER, direct, 0, 4096), Err(Errno::AGAIN));
}

#[test]
fn memory_is_never_waited_for() {
    let export = Export::with(On::Memory, HostOptions::default());
    export.put("file", pattern(8192));
    let (node, handle) = export.open("file", RDWR);
    assert_eq!(export.read(&ON_WORKER, (node, handle), 0, 8192).unwrap(), pattern(8192));
    assert_eq!(export.fs.fsync(&ON_WORKER, node, handle, false), Ok(()));
}

#[test]
fn appended_bytes_go_to_the_end_whatever_the_offset() {
    let export = Export::new();
    export.put("file", "one");
    let file = export.open("file", WRONLY | libc::O_APPEND as u32);
    let append = Write { append: true, ..Default::default() };
    assert_eq!(write(&export.fs, &AS_ROOT, file, 0, b"two", append), Ok(3));
    assert_eq!(export.get("file"), b"onetwo");
    // A page written back through the same handle keeps its place.
    assert_eq!(export.write(&AS_ROOT, file, 0, b"O"), Ok(1));
    assert_eq!(export.get("file"), b"Onetwo");
}

#[test]
fn opening_with_truncation_empties_the_file() {
    let export = Export::new();
    export.put("file", "content");
    export.open("file", WRONLY | libc::O_TRUNC as u32);
    assert_eq!(export.get("file"), b"");
}

#[test]
fn writeback_makes_write_only_files_readable() {
    let export = Export::new();
    export.fs.init(Negotiated { writeback: true, ..Default::default() });
    export.put("file", "content");
    let file = export.open("file", WRONLY);
    assert_eq!(export.read(&AS_ROOT, file, 0, 7).unwrap(), b"content");
    export.fs.init(Negotiated::default());
    let file = export.open("file", WRONLY);
    assert_eq!(export.read(&AS_ROOT, file, 0, 7), Err(Errno::BADF));
}

#[test]
fn direct_io_reaches_the_host_only_when_it_may() {
    let direct = |allow_direct_io| {
        let export = Export::with(On::Disk, HostOptions { allow_direct_io, ..Default::default() });
        export.put("file", pattern(8192));
        let file = export.open("file", RDONLY | libc::O_DIRECT as u32);
        // Three bytes are no block.
        export.read(&AS_ROOT, file, 1, 3)
    };
    assert_eq!(direct(false).unwrap(), pattern(8192)[1..4]);
    assert_eq!(direct(true), Err(Errno::INVAL));
}

#[test]
fn cache_policy_decides_what_the_dpu_may_keep() {
    let flags = |cache| {
        let export = Export::with(On::Disk, HostOptions { cache, ..Default::default() });
        export.put("file", "");
        let file = export.fs.open(&AS_ROOT, export.node("file"), RDONLY, false).unwrap().flags;
        let made = export.create(&AS_ROOT, "made", 0o644, RDWR).unwrap().1.flags;
        let dir = export.fs.opendir(&AS_ROOT, ROOT, RDONLY).unwrap().flags;
        assert_eq!(file, made);
        let valid = export.lookup("file").unwrap().attr_valid.as_secs();
        (file, dir, valid)
    };
    let dir = abi::FOPEN_KEEP_CACHE | abi::FOPEN_CACHE_DIR;
    assert_eq!(flags(CachePolicy::Auto), (0, 0, 1));
    assert_eq!(flags(CachePolicy::Never), (abi::FOPEN_DIRECT_IO, 0, 0));
    assert_eq!(flags(CachePolicy::Metadata), (abi::FOPEN_DIRECT_IO, dir, 86400));
    assert_eq!(flags(CachePolicy::Always), (abi::FOPEN_KEEP_CACHE, dir, 86400));
}

#[test]
fn only_regular_files_are_opened_and_fifos_do_not_block() {
    let export = Export::new();
    for (name, kind) in [
        ("fifo", libc::S_IFIFO),
        ("socket", libc::S_IFSOCK),
        ("char", libc::S_IFCHR),
        ("block", libc::S_IFBLK),
    ] {
        let made = backend_fs::filesystem::NewInode { mode: kind | 0o666, umask: 0, rdev: 0x103 };
        let entry = export.fs.mknod(&AS_ROOT, ROOT, &c(name), made).unwrap();
        for flags in
            [RDONLY, WRONLY, RDWR, RDWR | libc::O_TRUNC as u32, libc::O_PATH as u32, libc::O_CREAT as u32]
        {
            for cx in [AS_ROOT, ON_WORKER] {
                assert_eq!(export.fs.open(&cx, entry.node, flags, false).err(), Some(Errno::NXIO), "{name}");
            }
            let again = export.create(&AS_ROOT, name, 0o666, flags);
            assert!(matches!(again.err(), Some(Errno::NXIO | Errno::INVAL)), "{name} {flags:o}");
        }
        assert_eq!(export.fs.opendir(&AS_ROOT, entry.node, 0).err(), Some(Errno::NOTDIR));
    }
    std::os::unix::fs::symlink("/etc/passwd", export.path.join("link")).unwrap();
    assert_eq!(export.fs.open(&AS_ROOT, export.node("link"), RDONLY, false).err(), Some(Errno::LOOP));
    assert_eq!(export.create(&AS_ROOT, "link", 0o666, RDONLY).err(), Some(Errno::LOOP));
    assert_eq!(export.fs.open(&AS_ROOT, ROOT, RDONLY, false).err(), Some(Errno::ISDIR));
    assert_eq!(export.fs.counts().handles, 0);
}

fn mode_after(kill: bool, act: impl FnOnce(&Export, (NodeId, HandleId), bool)) -> u32 {
    let export = Export::new();
    let path = export.put("file", "content");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o6777)).unwrap();
    let file = export.open("file", RDWR);
    act(&export, file, kill);
    path.metadata().unwrap().mode() & 0o7777
}

#[test]
fn set_id_bits_go_when_a_caller_without_privilege_changes_the_file() {
    let write_file = |export: &Export, file, kill_suidgid| {
        let how = Write { kill_suidgid, ..Default::default() };
        write(&export.fs, &AS_ROOT, file, 0, b"x", how).unwrap();
    };
    assert_eq!(mode_after(true, write_file), 0o777);
    assert_eq!(mode_after(false, write_file), 0o6777);

    let truncate = |export: &Export, (node, _), kill_suidgid| {
        let change = backend_fs::filesystem::SetAttr { size: Some(1), kill_suidgid, ..Default::default() };
        export.fs.setattr(&AS_ROOT, node, change).unwrap();
    };
    assert_eq!(mode_after(true, truncate), 0o777);
    assert_eq!(mode_after(false, truncate), 0o6777);

    let reopen = |export: &Export, (node, _), kill_suidgid| {
        export.fs.open(&AS_ROOT, node, RDWR | libc::O_TRUNC as u32, kill_suidgid).unwrap();
    };
    assert_eq!(mode_after(true, reopen), 0o777);
    assert_eq!(mode_after(false, reopen), 0o6777);

    // These have no flag: the caller decides.
    let as_user = |kill| if kill { user(1000, 1000) } else { AS_ROOT };
    let fallocate = |export: &Export, (node, handle), kill| {
        export.fs.fallocate(&as_user(kill), node, handle, 0, 0, 100).unwrap();
    };
    assert_eq!(mode_after(true, fallocate), 0o777);
    assert_eq!(mode_after(false, fallocate), 0o6777);

    let copy = |export: &Export, (node, handle), kill| {
        let range = CopyRange { source: (node, handle, 0), target: (node, handle, 4), len: 2, flags: 0 };
        assert_eq!(export.fs.copy_file_range(&as_user(kill), range), Ok(2));
    };
    assert_eq!(mode_after(true, copy), 0o777);
    assert_eq!(mode_after(false, copy), 0o6777);

    let chown = |export: &Export, (node, _), _| {
        let change = backend_fs::filesystem::SetAttr { uid: Some(1000), ..Default::default() };
        export.fs.setattr(&AS_ROOT, node, change).unwrap();
    };
    assert_eq!(mode_after(true, chown), 0o777);
}

#[test]
fn fallocate_makes_and_takes_room() {
    let export = Export::new();
    export.put("file", pattern(16384));
    let (node, handle) = export.open("file", RDWR);
    export.fs.fallocate(&AS_ROOT, node, handle, 0, 0, 32768).unwrap();
    assert_eq!(export.lookup("file").unwrap().attr.size, 32768);
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    export.fs.fallocate(&AS_ROOT, node, handle, punch, 4096, 4096).unwrap();
    assert_eq!(export.get("file")[4096..8192], [0; 4096]);
    let unknown = 1 << 20;
    assert_eq!(export.fs.fallocate(&AS_ROOT, node, handle, unknown, 0, 1), Err(Errno::OPNOTSUPP));
    assert_eq!(export.fs.fallocate(&AS_ROOT, node, handle, 0, 0, 0), Err(Errno::INVAL));
}

#[test]
fn holes_are_found() {
    let export = Export::new();
    let path = export.put("file", "");
    let host = std::fs::File::options().write(true).open(path).unwrap();
    host.set_len(1 << 20).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&host, b"data", 1 << 19).unwrap();
    let (node, handle) = export.open("file", RDONLY);
    let data = export.fs.lseek(&AS_ROOT, node, handle, 0, libc::SEEK_DATA as u32).unwrap();
    assert_eq!(data, 1 << 19);
    let hole = export.fs.lseek(&AS_ROOT, node, handle, data, libc::SEEK_HOLE as u32).unwrap();
    assert!(hole > data && hole < 1 << 20);
    assert_eq!(export.fs.lseek(&AS_ROOT, node, handle, 1 << 20, libc::SEEK_DATA as u32), Err(Errno::NXIO));
    assert_eq!(export.fs.lseek(&AS_ROOT, node, handle, 0, libc::SEEK_SET as u32), Err(Errno::INVAL));
}

#[test]
fn ranges_are_copied_inside_the_host() {
    let export = Export::new();
    export.put("source", pattern(200_000));
    export.put("target", "");
    let (source, from) = export.open("source", RDONLY);
    let (target, to) = export.open("target", RDWR);
    let range = |len| CopyRange { source: (source, from, 1000), target: (target, to, 10), len, flags: 0 };
    assert_eq!(export.fs.copy_file_range(&ON_WORKER, range(1 << 30)), Err(Errno::AGAIN));
    assert_eq!(export.fs.copy_file_range(&ON_WORKER, range(1000)), Ok(1000));
    assert_eq!(export.fs.copy_file_range(&AS_ROOT, range(u64::MAX)), Ok(199_000));
    assert_eq!(export.get("target")[10..], pattern(200_000)[1000..]);
    let flagged = CopyRange { flags: 1, ..range(10) };
    assert_eq!(export.fs.copy_file_range(&AS_ROOT, flagged), Err(Errno::INVAL));
}

#[test]
fn flush_closes_nothing() {
    let export = Export::new();
    export.put("file", "content");
    let (node, handle) = export.open("file", RDWR);
    assert_eq!(export.fs.flush(&AS_ROOT, node, handle, 1), Ok(()));
    assert_eq!(export.read(&AS_ROOT, (node, handle), 0, 7).unwrap(), b"content");
    assert_eq!(export.fs.flush(&AS_ROOT, ROOT, handle, 1), Err(Errno::BADF));
}
