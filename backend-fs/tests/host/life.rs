//! One DPU's kernel after another.

use backend_fs::filesystem::{FileSystem, LockRequest, Negotiated};
use backend_fs::fuse::abi;
use backend_fs::host::options::{FileHandles, HostOptions};
use rustix::io::Errno;

use crate::support::*;

#[test]
fn a_new_kernel_finds_nothing_of_the_old_one() {
    let export = Export::new();
    export.put("file", "content");
    let (node, handle) = export.open("file", RDWR);
    let dir = export.fs.opendir(&AS_ROOT, ROOT, 0).unwrap().handle;
    let lock = abi::FileLock { start: 0, end: 9, kind: libc::F_WRLCK as u32, pid: 1 };
    let request = LockRequest { handle, owner: 1, lock, flock: false };
    export.fs.setlk(&AS_ROOT, node, request, false).unwrap();
    for end in [(|fs| fs.init(Negotiated::default())) as fn(&dyn FileSystem), |fs| fs.destroy()] {
        end(&export.fs);
        let counts = export.fs.counts();
        assert_eq!((counts.inodes, counts.handles, counts.fds), (1, 0, 0));
        assert_eq!(export.fs.getattr(&AS_ROOT, node, None).err(), Some(Errno::BADF));
        assert_eq!(export.read(&AS_ROOT, (node, handle), 0, 1), Err(Errno::BADF));
        assert_eq!(export.list_page(ROOT, dir, 0, 4096, false), Err(Errno::BADF));
        assert_eq!(export.get("file"), b"content");
        // The lock went too.
        let other = export.second();
        let entry = lookup(&other, "file").unwrap();
        let opened = other.open(&AS_ROOT, entry.node, RDWR, false).unwrap();
        let request = LockRequest { handle: opened.handle, ..request };
        assert_eq!(other.setlk(&AS_ROOT, entry.node, request, false), Ok(()));
    }
    let again = export.node("file");
    assert_ne!(again, node);
}

#[test]
fn a_kernel_that_comes_and_goes_leaves_nothing_behind() {
    let export = Export::new();
    export.put("file", "content");
    for _ in 0..200 {
        export.fs.init(Negotiated::default());
        for _ in 0..20 {
            export.open("file", RDWR);
            export.fs.opendir(&AS_ROOT, ROOT, 0).unwrap();
        }
    }
    export.fs.destroy();
    let counts = export.fs.counts();
    assert_eq!((counts.inodes, counts.handles, counts.fds), (1, 0, 0));
}

#[test]
fn requests_of_an_old_kernel_run_into_the_new_one() {
    let export = Export::new();
    for number in 0..20 {
        export.put(&number.to_string(), "content");
    }
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let mut number = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    number += 1;
                    let Ok(entry) = export.lookup(&(number % 20).to_string()) else { continue };
                    let Ok(opened) = export.fs.open(&AS_ROOT, entry.node, RDWR, false) else { continue };
                    match export.read(&AS_ROOT, (entry.node, opened.handle), 0, 7) {
                        Ok(bytes) => assert_eq!(bytes, b"content"),
                        Err(errno) => assert_eq!(errno, Errno::BADF),
                    }
                    let _ = export.list_page(ROOT, opened.handle, 0, 4096, true);
                }
            });
        }
        for _ in 0..100 {
            export.fs.init(Negotiated::default());
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    export.fs.destroy();
    assert_eq!(export.fs.counts().inodes, 1);
    assert_eq!(export.fs.counts().fds, 0);
}

#[test]
fn the_export_must_be_a_directory() {
    let export = Export::new();
    let path = export.put("file", "");
    let file = rustix::fs::open(path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    let proc_self_fd = directory("/proc/self/fd".as_ref());
    assert!(backend_fs::host::HostFs::new(file, proc_self_fd, HostOptions::default()).is_err());
}

#[test]
fn mandatory_file_handles_are_refused_where_there_are_none() {
    let options = |file_handles| HostOptions { file_handles, ..Default::default() };
    // procfs has none.
    let proc = std::path::Path::new("/proc/sys");
    assert!(serve(proc, options(FileHandles::Mandatory)).is_err());
    assert!(serve(proc, options(FileHandles::Prefer)).is_ok());
    let export = Export::with(On::Memory, HostOptions::default());
    assert!(serve(&export.path, options(FileHandles::Mandatory)).is_ok());
}
