//! Names to nodes.

use std::os::unix::fs::{MetadataExt, symlink};

use backend_fs::filesystem::{FileSystem, Negotiated, NodeId};
use backend_fs::fuse::abi;
use backend_fs::host::options::HostOptions;
use rustix::io::Errno;

use crate::support::*;

#[test]
fn entry_shows_what_the_host_shows() {
    let export = Export::new();
    let path = export.put("file", "content");
    let host = path.metadata().unwrap();
    let attr = export.lookup("file").unwrap().attr;
    assert_eq!((attr.ino, attr.size, attr.mode, attr.nlink), (host.ino(), 7, host.mode(), 1));
    assert_eq!((attr.mtime as i64, i64::from(attr.mtimensec)), (host.mtime(), host.mtime_nsec()));
    assert_eq!((attr.ctime as i64, attr.blocks, attr.uid), (host.ctime(), host.blocks(), host.uid()));
}

#[test]
fn missing_names_are_enoent() {
    let export = Export::new();
    assert_eq!(export.lookup("nothing").err(), Some(Errno::NOENT));
}

#[test]
fn names_that_are_paths_are_refused() {
    let export = Export::new();
    std::fs::create_dir(export.path.join("dir")).unwrap();
    export.put("dir/file", "");
    for name in ["..", ".", "dir/file", "/etc", "../outside", "dir/"] {
        let found = export.fs.lookup(&AS_ROOT, ROOT, &c(name));
        assert_eq!(found.err(), Some(Errno::INVAL), "{name}");
    }
    assert_eq!(export.fs.lookup(&AS_ROOT, ROOT, c"").err(), Some(Errno::NOENT));
}

#[test]
fn looking_below_a_file_is_enotdir() {
    let export = Export::new();
    export.put("file", "");
    assert_eq!(export.lookup("file/x").err(), Some(Errno::NOTDIR));
}

#[test]
fn one_file_is_one_node_by_every_name() {
    let export = Export::new();
    export.put("a", "");
    std::fs::hard_link(export.path.join("a"), export.path.join("b")).unwrap();
    assert_eq!(export.node("a"), export.node("b"));
    assert_eq!(export.node("a"), export.node("a"));
}

#[test]
fn symbolic_links_are_shown_and_not_followed() {
    let export = Export::new();
    for target in ["/etc/passwd", "nowhere", "../outside"] {
        let _ = std::fs::remove_file(export.path.join("link"));
        symlink(target, export.path.join("link")).unwrap();
        let entry = export.lookup("link").unwrap();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        let mut found = b"before:".to_vec();
        export.fs.readlink(&AS_ROOT, entry.node, &mut found).unwrap();
        assert_eq!(found, [b"before:", target.as_bytes()].concat());
        assert_eq!(export.fs.lookup(&AS_ROOT, entry.node, c"passwd").err(), Some(Errno::NOTDIR));
    }
}

#[test]
fn only_links_have_a_target() {
    let export = Export::new();
    export.put("file", "");
    let node = export.node("file");
    assert_eq!(export.fs.readlink(&AS_ROOT, node, &mut Vec::new()), Err(Errno::INVAL));
}

#[test]
fn references_are_counted_until_the_last_is_forgotten() {
    let export = Export::new();
    export.put("file", "");
    let node = export.node("file");
    export.node("file");
    export.node("file");
    export.fs.forget(node, 2);
    assert!(export.fs.getattr(&AS_ROOT, node, None).is_ok());
    export.fs.forget(node, 1);
    assert_eq!(export.fs.getattr(&AS_ROOT, node, None).err(), Some(Errno::BADF));
    assert_ne!(export.node("file"), node);
    assert_eq!(export.fs.counts().inodes, 2);
}

#[test]
fn forgetting_too_much_is_counted_and_harmless() {
    let export = Export::new();
    export.put("file", "");
    let node = export.node("file");
    export.fs.forget(node, u64::MAX);
    export.fs.forget(node, 1);
    export.fs.forget(NodeId(999), 1);
    let counts = export.fs.counts();
    assert_eq!((counts.forget_underflows, counts.forget_unknown, counts.inodes), (1, 2, 1));
    assert!(export.lookup("file").is_ok());
}

#[test]
fn the_root_cannot_be_forgotten() {
    let export = Export::new();
    export.put("file", "");
    export.fs.forget(ROOT, u64::MAX);
    assert!(export.fs.getattr(&AS_ROOT, ROOT, None).is_ok());
    assert!(export.lookup("file").is_ok());
}

#[test]
fn a_replaced_file_is_another_node() {
    let export = Export::new();
    export.put("file", "old");
    let old = export.node("file");
    std::fs::remove_file(export.path.join("file")).unwrap();
    export.put("file", "newer");
    let new = export.lookup("file").unwrap();
    assert_ne!(old, new.node);
    assert_eq!(new.attr.size, 5);
    // The old one is a removed file that the DPU still knows.
    assert_eq!(export.fs.getattr(&AS_ROOT, old, None).unwrap().0.nlink, 0);
}

#[test]
fn racing_lookups_and_forgets_lose_no_reference() {
    let export = Export::new();
    for name in ["a", "b", "c"] {
        export.put(name, "");
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for round in 0..5000 {
                    let name = ["a", "b", "c"][round % 3];
                    let node = export.node(name);
                    export.fs.getattr(&AS_ROOT, node, None).unwrap();
                    export.fs.forget(node, 1);
                }
            });
        }
    });
    let counts = export.fs.counts();
    assert_eq!((counts.inodes, counts.fds), (1, 0));
    assert_eq!((counts.forget_underflows, counts.forget_unknown), (0, 0));
}

#[test]
fn a_directory_moved_out_of_the_export_leads_nowhere_else() {
    let export = Export::new();
    std::fs::create_dir(export.path.join("dir")).unwrap();
    export.put("dir/inside", "");
    std::fs::write(export.outside.join("secret"), "").unwrap();
    let dir = export.node("dir");
    std::fs::rename(export.path.join("dir"), export.outside.join("dir")).unwrap();
    assert_eq!(export.fs.lookup(&AS_ROOT, dir, c"..").err(), Some(Errno::INVAL));
    assert_eq!(export.fs.lookup(&AS_ROOT, dir, c"secret").err(), Some(Errno::NOENT));
    assert_eq!(export.lookup("dir").err(), Some(Errno::NOENT));
}

/// Runs `test` with a tmpfs mounted on `mount` in the export, seen by the calling thread alone.
fn with_mount(export: &Export, test: impl FnOnce() + Send) {
    std::fs::create_dir(export.path.join("mount")).unwrap();
    let at = export.path.join("mount");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
            let private = nix::mount::MsFlags::MS_REC | nix::mount::MsFlags::MS_PRIVATE;
            nix::mount::mount::<str, str, str, str>(None, "/", None, private, None).unwrap();
            let none = nix::mount::MsFlags::empty();
            nix::mount::mount::<str, _, str, str>(Some("none"), &at, Some("tmpfs"), none, None).unwrap();
            test();
        });
    });
}

#[test]
fn a_mount_below_is_announced_when_that_was_negotiated() {
    let export = Export::new();
    with_mount(&export, || {
        for submounts in [true, false] {
            let fs = serve(&export.path, HostOptions::default()).unwrap();
            fs.init(Negotiated { submounts, ..Default::default() });
            std::fs::write(export.path.join("mount/file"), "").unwrap();
            let entry = lookup(&fs, "mount").unwrap();
            assert_eq!(entry.attr.flags, if submounts { abi::ATTR_SUBMOUNT } else { 0 });
            assert_eq!(lookup(&fs, "mount/file").unwrap().attr.flags, 0);
            assert_eq!(lookup(&fs, "mount").unwrap().attr.flags, entry.attr.flags);
        }
    });
}

#[test]
fn names_and_links_do_not_cross_mounts() {
    let export = Export::new();
    export.put("file", "");
    with_mount(&export, || {
        let fs = export.second();
        let mount = lookup(&fs, "mount").unwrap().node;
        let file = lookup(&fs, "file").unwrap().node;
        assert_eq!(fs.rename(&AS_ROOT, (ROOT, c"file"), (mount, c"file"), 0), Err(Errno::XDEV));
        assert_eq!(fs.link(&AS_ROOT, file, mount, c"file").err(), Some(Errno::XDEV));
        let exchange = libc::RENAME_EXCHANGE;
        assert_eq!(fs.rename(&AS_ROOT, (ROOT, c"file"), (ROOT, c"mount"), exchange), Err(Errno::BUSY));
    });
}
