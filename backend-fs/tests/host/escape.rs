//! A DPU and a host program that change names under one another's feet.

use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use backend_fs::filesystem::FileSystem;
use backend_fs::host::options::HostOptions;

use crate::support::*;

/// Runs `attack` while another thread swaps the entries `a` and `b` of the export all the time.
fn while_swapping(export: &Export, rounds: usize, mut attack: impl FnMut()) {
    let done = AtomicBool::new(false);
    let (a, b) = (export.path.join("a"), export.path.join("b"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let exchange = rustix::fs::RenameFlags::EXCHANGE;
                rustix::fs::renameat_with(rustix::fs::CWD, &a, rustix::fs::CWD, &b, exchange).unwrap();
            }
        });
        for _ in 0..rounds {
            attack();
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_link_that_takes_the_place_of_a_file_is_never_followed() {
    // With a budget for no inode at all, so that every use goes the long way round; and for all.
    for fd_budget in [8, 8192] {
        let export = Export::with(On::Disk, HostOptions { fd_budget, ..Default::default() });
        let canary = export.outside.join("canary");
        std::fs::write(&canary, "canary").unwrap();
        export.put("a", "inside");
        symlink(&canary, export.path.join("b")).unwrap();
        let mut opened = 0;
        while_swapping(&export, 3000, || {
            if let Ok(entry) = export.lookup("a") {
                if let Ok(file) = export.fs.open(&AS_ROOT, entry.node, RDWR, false) {
                    let file = (entry.node, file.handle);
                    assert_eq!(export.read(&AS_ROOT, file, 0, 6).unwrap(), b"inside");
                    export.write(&AS_ROOT, file, 0, b"inside").unwrap();
                    export.release(file.0, file.1);
                    opened += 1;
                }
                export.fs.forget(entry.node, 1);
            }
            if let Ok((entry, file)) = export.create(&AS_ROOT, "a", 0o600, RDWR | libc::O_TRUNC as u32) {
                export.write(&AS_ROOT, (entry.node, file.handle), 0, b"inside").unwrap();
                export.release(entry.node, file.handle);
                export.fs.forget(entry.node, 1);
            }
        });
        assert!(opened > 0);
        assert_eq!(std::fs::read(&canary).unwrap(), b"canary");
        assert_eq!(export.fs.counts().handles, 0);
        assert_eq!(export.fs.counts().inodes, 1);
    }
}

#[test]
fn a_link_that_takes_the_place_of_a_directory_leads_nowhere() {
    let export = Export::new();
    std::fs::write(export.outside.join("secret"), "canary").unwrap();
    std::fs::create_dir(export.path.join("a")).unwrap();
    symlink(&export.outside, export.path.join("b")).unwrap();
    while_swapping(&export, 3000, || {
        let Ok(dir) = export.lookup("a") else { return };
        assert!(export.fs.lookup(&AS_ROOT, dir.node, c"secret").is_err());
        if export.fs.mkdir(&AS_ROOT, dir.node, c"made", new(0o700)).is_ok() {
            export.fs.rmdir(&AS_ROOT, dir.node, c"made").unwrap();
        }
        let _ = export.fs.unlink(&AS_ROOT, dir.node, c"secret");
        export.fs.forget(dir.node, 1);
    });
    assert_eq!(std::fs::read_dir(&export.outside).unwrap().count(), 1);
}

#[test]
fn an_open_directory_that_moves_stays_itself() {
    let export = Export::new();
    std::fs::create_dir(export.path.join("a")).unwrap();
    std::fs::create_dir(export.path.join("b")).unwrap();
    export.put("a/in-a", "");
    export.put("b/in-b", "");
    let a = export.node("a");
    while_swapping(&export, 3000, || {
        assert!(export.fs.lookup(&AS_ROOT, a, c"in-a").is_ok());
        assert!(export.fs.lookup(&AS_ROOT, a, c"in-b").is_err());
    });
}
