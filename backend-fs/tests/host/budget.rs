//! What the DPU can make this daemon hold.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

use backend_fs::filesystem::{FileSystem, NodeId};
use backend_fs::host::options::{FileHandles, HostOptions};
use rustix::io::Errno;

use crate::support::*;

fn budget(fd_budget: usize) -> HostOptions {
    HostOptions { fd_budget, ..Default::default() }
}

/// Descriptors of this process that lie below the export.
fn descriptors_below(export: &Export) -> usize {
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|target| target.starts_with(&export.path))
        .count()
}

#[test]
fn fifty_thousand_files_fit_a_budget_of_two_hundred() {
    for (on, directories) in [(On::Disk, 10), (On::Memory, 50)] {
        let export = Export::with(on, budget(200));
        let mut nodes = HashMap::new();
        for directory in 0..directories {
            std::fs::create_dir(export.path.join(directory.to_string())).unwrap();
            let dir = export.node(&directory.to_string());
            for file in 0..1000 {
                let name = format!("{directory}/{file}");
                export.put(&name, "");
                let node = export.fs.lookup(&AS_ROOT, dir, &c(&file.to_string())).unwrap().node;
                nodes.insert(name, node);
            }
        }
        let counts = export.fs.counts();
        assert_eq!(counts.inodes, 1 + 1001 * directories);
        assert!(counts.fds <= 200, "{counts:?}");
        assert!(counts.evictions > 1000 * directories as u64 - 200);
        // The root and the mount are not the DPU's to count.
        assert!(descriptors_below(&export) <= 202);
        // All are still what they were.
        for (name, node) in nodes.iter().step_by(7) {
            let host = export.path.join(name).metadata().unwrap();
            assert_eq!(export.fs.getattr(&AS_ROOT, *node, None).unwrap().0.ino, host.ino());
            assert_eq!(export.node(name), *node);
        }
        assert!(export.fs.counts().fds <= 200);
        export.fs.destroy();
        assert_eq!((export.fs.counts().inodes, export.fs.counts().fds), (1, 0));
        assert!(descriptors_below(&export) <= 2);
    }
}

#[test]
fn everything_works_on_evicted_inodes() {
    let export = Export::with(On::Memory, budget(4));
    for number in 0..20 {
        std::fs::create_dir(export.path.join(format!("dir-{number}"))).unwrap();
        export.put(&format!("dir-{number}/file"), format!("content-{number}"));
    }
    for round in 0..3 {
        for number in 0..20 {
            let dir = export.node(&format!("dir-{number}"));
            let node = export.fs.lookup(&AS_ROOT, dir, c"file").unwrap().node;
            let opened = export.fs.open(&AS_ROOT, node, RDWR, false).unwrap();
            let content = format!("content-{number}");
            assert_eq!(export.read(&AS_ROOT, (node, opened.handle), 0, 100).unwrap(), content.as_bytes());
            export.release(node, opened.handle);
            let name = format!("made-{round}");
            let (made, opened) = export.fs.create(&AS_ROOT, dir, &c(&name), new(0o600), RDWR, false).unwrap();
            export.release(made.node, opened.handle);
            export.fs.link(&AS_ROOT, made.node, dir, &c(&format!("linked-{round}"))).unwrap();
            assert_eq!(export.list(dir, 4096, true).len(), 3 + 2 * (round + 1));
        }
    }
    assert!(export.fs.counts().fds <= 4);
    assert!(export.fs.counts().reopens > 0);
}

#[test]
fn a_number_that_was_reused_is_another_file() {
    let export = Export::with(On::Disk, budget(2));
    let mut reused = 0;
    // Other tests take numbers too, so it may need some rounds.
    for round in 0..2000 {
        if reused == 5 {
            break;
        }
        let name = format!("file-{round}");
        export.put(&name, "old");
        let old = export.lookup(&name).unwrap();
        // Push it out, so that nothing holds the inode any more.
        for filler in 0..8 {
            let filler = format!("filler-{filler}");
            export.put(&filler, "");
            let node = export.node(&filler);
            export.fs.getattr(&AS_ROOT, node, None).unwrap();
        }
        std::fs::remove_file(export.path.join(&name)).unwrap();
        let host = export.put(&name, "newer").metadata().unwrap();
        let new = export.lookup(&name).unwrap();
        assert_ne!(new.node, old.node);
        assert_eq!(new.attr.size, 5);
        if host.ino() == old.attr.ino {
            reused += 1;
            assert_eq!(export.fs.getattr(&AS_ROOT, old.node, None).err(), Some(Errno::STALE));
            assert_eq!(export.fs.open(&AS_ROOT, old.node, RDWR, false).err(), Some(Errno::STALE));
            // Forgetting the old one leaves the new one alone.
            export.fs.forget(old.node, 1);
            assert_eq!(export.node(&name), new.node);
        }
    }
    assert!(reused > 0, "this file system reuses no inode numbers; set TMPDIR to a directory on ext4");
    assert_eq!(export.fs.counts().reused_inodes, reused);
}

#[test]
fn without_file_handles_the_budget_is_the_end_and_forgetting_helps() {
    let export = Export::with(On::Memory, HostOptions { file_handles: FileHandles::Never, ..budget(10) });
    for number in 0..20 {
        export.put(&number.to_string(), "");
    }
    let nodes: Vec<NodeId> = (0..10).map(|number| export.node(&number.to_string())).collect();
    assert_eq!(export.lookup("10").err(), Some(Errno::NFILE));
    assert_eq!(export.fs.open(&AS_ROOT, nodes[0], RDONLY, false).err(), Some(Errno::NFILE));
    assert_eq!(export.fs.opendir(&AS_ROOT, ROOT, 0).err(), Some(Errno::NFILE));
    assert_eq!(export.create(&AS_ROOT, "new", 0o600, RDWR).err(), Some(Errno::NFILE));
    assert!(!export.path.join("new").exists());
    assert_eq!(export.fs.mkdir(&AS_ROOT, ROOT, c"dir", new(0o700)).err(), Some(Errno::NFILE));
    assert!(!export.path.join("dir").exists());
    // What is known goes on working.
    assert!(export.fs.getattr(&AS_ROOT, nodes[3], None).is_ok());
    assert_eq!(export.node("3"), nodes[3]);
    export.fs.forget(nodes[9], 1);
    assert!(export.lookup("10").is_ok());
}

#[test]
fn listings_drop_no_entry_when_descriptors_or_inodes_run_out() {
    let tight = [
        HostOptions { file_handles: FileHandles::Never, ..budget(10) },
        HostOptions { max_inodes: 5, ..Default::default() },
        budget(3),
    ];
    for options in tight {
        let max_inodes = options.max_inodes;
        let export = Export::with(On::Memory, options);
        for number in 0..300 {
            export.put(&number.to_string(), "");
        }
        let listed = export.list(ROOT, 4096, true);
        assert_eq!(listed.len(), 302);
        let known = listed.iter().filter(|entry| entry.node != 0).count();
        assert!(known > 0 && known <= max_inodes);
        assert_eq!(export.fs.counts().inodes, 1 + known);
    }
}

#[test]
fn inodes_have_a_budget() {
    let export = Export::with(On::Memory, HostOptions { max_inodes: 3, ..Default::default() });
    for name in ["a", "b", "c", "d"] {
        export.put(name, "");
    }
    let a = export.node("a");
    export.node("b");
    export.node("c");
    assert_eq!(export.lookup("d").err(), Some(Errno::NOMEM));
    assert_eq!(export.create(&AS_ROOT, "e", 0o600, RDWR).err(), Some(Errno::NOMEM));
    assert!(!export.path.join("e").exists());
    assert_eq!(export.fs.counts().handles, 0);
    export.fs.forget(a, 1);
    assert!(export.lookup("d").is_ok());
}

#[test]
fn open_files_push_inodes_out_and_then_fail() {
    let export = Export::with(On::Memory, budget(20));
    for number in 0..30 {
        export.put(&number.to_string(), "");
        export.node(&number.to_string());
    }
    let node = export.node("0");
    let handles: Vec<_> =
        std::iter::from_fn(|| export.fs.open(&AS_ROOT, node, RDONLY, false).ok()).take(100).collect();
    assert_eq!(handles.len(), 20);
    assert_eq!(export.fs.open(&AS_ROOT, node, RDONLY, false).err(), Some(Errno::NFILE));
    // Inodes need none.
    for number in 0..30 {
        let node = export.node(&number.to_string());
        assert!(export.fs.getattr(&AS_ROOT, node, None).is_ok());
    }
    export.put("new", "");
    assert!(export.lookup("new").is_ok());
    assert_eq!(export.fs.counts().fds, 20);
    export.release(node, handles[0].handle);
    assert!(export.fs.open(&AS_ROOT, node, RDONLY, false).is_ok());
}

#[test]
fn a_file_without_a_name_outlives_the_pressure() {
    let export = Export::with(On::Memory, budget(4));
    let (entry, opened) = export.fs.tmpfile(&AS_ROOT, ROOT, new(0o600), RDWR).unwrap();
    export.write(&AS_ROOT, (entry.node, opened.handle), 0, b"content").unwrap();
    export.release(entry.node, opened.handle);
    for number in 0..50 {
        export.put(&number.to_string(), "");
        export.node(&number.to_string());
    }
    export.fs.link(&AS_ROOT, entry.node, ROOT, c"named").unwrap();
    assert_eq!(export.get("named"), b"content");
}

#[test]
fn a_removed_file_that_is_open_is_still_there_when_it_was_evicted() {
    for on in [On::Disk, On::Memory] {
        let export = Export::with(on, budget(4));
        let (entry, opened) = export.create(&AS_ROOT, "file", 0o600, RDWR).unwrap();
        let push_out = || {
            for number in 0..50 {
                export.put(&number.to_string(), "");
                export.node(&number.to_string());
            }
        };
        push_out();
        std::fs::remove_file(export.path.join("file")).unwrap();
        for handle in [None, Some(opened.handle)] {
            push_out();
            let attr = export.fs.getattr(&AS_ROOT, entry.node, handle).unwrap().0;
            assert_eq!((attr.nlink, attr.ino), (0, entry.attr.ino));
        }
        let again = export.fs.open(&AS_ROOT, entry.node, RDWR, false).unwrap();
        export.release(entry.node, again.handle);
        assert!(export.fs.counts().reopens > 0);
    }
}

#[test]
fn threads_under_pressure_never_meet_the_wrong_file() {
    for fd_budget in [6, 40] {
        let export = Export::with(On::Memory, budget(fd_budget));
        for number in 0..100 {
            export.put(&number.to_string(), format!("content of {number}"));
        }
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let export = &export;
                scope.spawn(move || {
                    for round in 0..1500 {
                        let number = (round * (7 + thread) + thread) % 100;
                        let entry = match export.lookup(&number.to_string()) {
                            Ok(entry) => entry,
                            Err(errno) => panic!("{errno}"),
                        };
                        let attr = export.fs.getattr(&AS_ROOT, entry.node, None).unwrap().0;
                        assert_eq!(attr.ino, entry.attr.ino);
                        match export.fs.open(&AS_ROOT, entry.node, RDONLY, false) {
                            Ok(opened) => {
                                let content =
                                    export.read(&AS_ROOT, (entry.node, opened.handle), 0, 100).unwrap();
                                assert_eq!(content, format!("content of {number}").as_bytes());
                                export.release(entry.node, opened.handle);
                            }
                            Err(errno) => assert_eq!(errno, Errno::NFILE),
                        }
                        if round % 3 == 0 {
                            export.fs.forget(entry.node, 1);
                        }
                    }
                });
            }
        });
        let counts = export.fs.counts();
        assert!(counts.fds <= fd_budget && counts.handles == 0, "{counts:?}");
        assert_eq!(counts.forget_underflows, 0);
        export.fs.destroy();
        assert_eq!((export.fs.counts().inodes, export.fs.counts().fds), (1, 0));
    }
}
