//! Names that come, move and go.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use backend_fs::filesystem::{FileSystem, NewInode, SetAttr};
use rustix::io::Errno;

use crate::support::*;

const EXCL: u32 = libc::O_EXCL as u32;

#[test]
fn created_files_are_open_and_known() {
    let export = Export::new();
    let (entry, opened) = export.create(&AS_ROOT, "file", 0o640, RDWR | EXCL).unwrap();
    assert_eq!(entry.attr.mode, libc::S_IFREG | 0o640);
    assert_eq!(export.node("file"), entry.node);
    assert_eq!(export.write(&AS_ROOT, (entry.node, opened.handle), 0, b"content"), Ok(7));
    assert_eq!(export.get("file"), b"content");
    assert_eq!(export.create(&AS_ROOT, "file", 0o640, RDWR | EXCL).err(), Some(Errno::EXIST));
}

#[test]
fn creating_what_exists_opens_it() {
    let export = Export::new();
    export.put("file", "content");
    let (entry, opened) = export.create(&AS_ROOT, "file", 0o600, RDWR).unwrap();
    assert_eq!(entry.attr.size, 7);
    assert_eq!(export.read(&AS_ROOT, (entry.node, opened.handle), 0, 7).unwrap(), b"content");
    export.create(&AS_ROOT, "file", 0o600, RDWR | libc::O_TRUNC as u32).unwrap();
    assert_eq!(export.get("file"), b"");
    std::fs::create_dir(export.path.join("dir")).unwrap();
    assert_eq!(export.create(&AS_ROOT, "dir", 0o600, RDWR).err(), Some(Errno::ISDIR));
    // Nothing that failed left a reference: the file has two.
    let node = entry.node;
    export.fs.forget(node, 2);
    assert_eq!(export.fs.counts().inodes, 1);
}

#[test]
fn odd_flags_of_create_are_not_the_hosts_business() {
    let export = Export::new();
    for (number, flag) in [libc::O_PATH, libc::O_TMPFILE, libc::O_DIRECTORY, libc::O_NOCTTY, libc::O_NOFOLLOW]
        .into_iter()
        .enumerate()
    {
        let name = format!("file-{number}");
        let (entry, opened) = export.create(&AS_ROOT, &name, 0o600, RDWR | flag as u32).unwrap();
        assert_eq!(export.write(&AS_ROOT, (entry.node, opened.handle), 0, b"x"), Ok(1));
        assert_eq!(export.get(&name), b"x");
    }
    assert_eq!(export.create(&AS_ROOT, "file", 0o600, 3).err(), Some(Errno::INVAL));
}

#[test]
fn paths_are_refused_wherever_a_name_is_expected() {
    let export = Export::new();
    export.put("file", "");
    std::fs::write(export.outside.join("canary"), "").unwrap();
    let node = export.node("file");
    let fs = &export.fs;
    for name in [c"../outside/x", c"..", c".", c"/tmp/backend-fs-escape", c"../outside/canary", c"a/"] {
        let refused = [
            fs.mkdir(&AS_ROOT, ROOT, name, new(0o755)).err(),
            fs.mknod(&AS_ROOT, ROOT, name, new(libc::S_IFREG | 0o644)).err(),
            fs.symlink(&AS_ROOT, ROOT, name, c"x").err(),
            fs.link(&AS_ROOT, node, ROOT, name).err(),
            fs.create(&AS_ROOT, ROOT, name, new(0o644), RDWR, false).err(),
            fs.unlink(&AS_ROOT, ROOT, name).err(),
            fs.rmdir(&AS_ROOT, ROOT, name).err(),
            fs.rename(&AS_ROOT, (ROOT, c"file"), (ROOT, name), 0).err(),
            fs.rename(&AS_ROOT, (ROOT, name), (ROOT, c"stolen"), 0).err(),
        ];
        assert_eq!(refused, [Some(Errno::INVAL); 9], "{}", text(name));
    }
    assert!(export.outside.join("canary").exists());
    assert_eq!(std::fs::read_dir(&export.outside).unwrap().count(), 1);
    assert_eq!(std::fs::read_dir(&export.path).unwrap().count(), 1);
}

#[test]
fn directories_are_made_and_removed() {
    let export = Export::new();
    let entry = export.fs.mkdir(&AS_ROOT, ROOT, c"dir", new(0o1750)).unwrap();
    assert_eq!(entry.attr.mode, libc::S_IFDIR | 0o1750);
    export.fs.mkdir(&AS_ROOT, entry.node, c"below", new(0o755)).unwrap();
    assert_eq!(export.fs.rmdir(&AS_ROOT, ROOT, c"dir"), Err(Errno::NOTEMPTY));
    assert_eq!(export.fs.unlink(&AS_ROOT, ROOT, c"dir"), Err(Errno::ISDIR));
    export.fs.rmdir(&AS_ROOT, entry.node, c"below").unwrap();
    export.fs.rmdir(&AS_ROOT, ROOT, c"dir").unwrap();
    assert_eq!(export.lookup("dir").err(), Some(Errno::NOENT));
    assert_eq!(export.fs.mkdir(&AS_ROOT, entry.node, c"below", new(0o755)).err(), Some(Errno::NOENT));
}

#[test]
fn every_kind_of_node_is_made() {
    let export = Export::new();
    let make = |name: &str, mode, rdev| {
        let entry = export.fs.mknod(&AS_ROOT, ROOT, &c(name), NewInode { mode, umask: 0, rdev }).unwrap();
        assert_eq!(entry.attr.mode, mode);
        assert_eq!(entry.attr.rdev, rdev);
        export.path.join(name).symlink_metadata().unwrap()
    };
    assert!(make("file", libc::S_IFREG | 0o600, 0).is_file());
    assert!(make("fifo", libc::S_IFIFO | 0o600, 0).file_type().is_fifo());
    assert!(make("socket", libc::S_IFSOCK | 0o600, 0).file_type().is_socket());
    let null = make("char", libc::S_IFCHR | 0o600, 0x103);
    assert!(null.file_type().is_char_device());
    assert_eq!(null.rdev(), rustix::fs::makedev(1, 3));
    let large = make("block", libc::S_IFBLK | 0o600, 0xabc1_23de);
    assert_eq!(large.rdev(), rustix::fs::makedev(0x123, 0xabcde));
    for mode in [libc::S_IFDIR, libc::S_IFLNK, libc::S_IFMT] {
        assert_eq!(export.fs.mknod(&AS_ROOT, ROOT, c"odd", new(mode)).err(), Some(Errno::INVAL));
    }
}

#[test]
fn device_nodes_are_for_root() {
    let export = Export::new();
    let device = NewInode { mode: libc::S_IFCHR | 0o600, umask: 0, rdev: 0x103 };
    assert_eq!(export.fs.mknod(&user(1000, 1000), ROOT, c"null", device).err(), Some(Errno::PERM));
}

#[test]
fn links_of_every_kind_of_inode() {
    let export = Export::new();
    export.put("file", "content");
    std::os::unix::fs::symlink("file", export.path.join("link")).unwrap();
    export.fs.mknod(&AS_ROOT, ROOT, c"fifo", new(libc::S_IFIFO | 0o600)).unwrap();
    for name in ["file", "link", "fifo"] {
        let node = export.node(name);
        let entry = export.fs.link(&AS_ROOT, node, ROOT, &c(&format!("{name}-2"))).unwrap();
        assert_eq!((entry.node, entry.attr.nlink), (node, 2));
    }
    assert!(export.path.join("link-2").is_symlink());
    let node = export.node("file");
    assert_eq!(export.fs.link(&AS_ROOT, node, ROOT, c"link").err(), Some(Errno::EXIST));
    assert_eq!(export.fs.link(&AS_ROOT, ROOT, ROOT, c"root").err(), Some(Errno::PERM));
}

#[test]
fn files_without_a_name_can_get_one() {
    let export = Export::new();
    let (entry, opened) = export.fs.tmpfile(&AS_ROOT, ROOT, new(0o600), RDWR).unwrap();
    let file = (entry.node, opened.handle);
    assert_eq!(entry.attr.nlink, 0);
    export.write(&AS_ROOT, file, 0, b"content").unwrap();
    assert_eq!(std::fs::read_dir(&export.path).unwrap().count(), 0);
    let linked = export.fs.link(&AS_ROOT, entry.node, ROOT, c"named").unwrap();
    assert_eq!(linked.node, entry.node);
    assert_eq!(export.get("named"), b"content");
    let (never, _) = export.fs.tmpfile(&AS_ROOT, ROOT, new(0o600), RDWR | EXCL).unwrap();
    assert_eq!(export.fs.link(&AS_ROOT, never.node, ROOT, c"x").err(), Some(Errno::NOENT));
    // It cannot be written, so it can never have content.
    assert_eq!(export.fs.tmpfile(&AS_ROOT, ROOT, new(0o600), RDONLY).err(), Some(Errno::INVAL));
}

#[test]
fn renames_keep_their_flags() {
    let export = Export::new();
    export.put("a", "a");
    export.put("b", "b");
    let rename =
        |from: &str, to: &str, flags| export.fs.rename(&AS_ROOT, (ROOT, &c(from)), (ROOT, &c(to)), flags);
    assert_eq!(rename("a", "b", libc::RENAME_NOREPLACE), Err(Errno::EXIST));
    rename("a", "b", libc::RENAME_EXCHANGE).unwrap();
    assert_eq!((export.get("a"), export.get("b")), (b"b".to_vec(), b"a".to_vec()));
    rename("a", "b", 0).unwrap();
    assert_eq!(export.get("b"), b"b");
    assert_eq!(rename("b", "c", 8), Err(Errno::INVAL));
    assert_eq!(rename("b", "c", libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE), Err(Errno::INVAL));
    assert_eq!(rename("nothing", "c", 0), Err(Errno::NOENT));
}

#[test]
fn a_whiteout_is_the_callers() {
    let export = Export::new();
    export.put("a", "a");
    let caller = user(1234, 4321);
    export.fs.rename(&caller, (ROOT, c"a"), (ROOT, c"b"), libc::RENAME_WHITEOUT).unwrap();
    let whiteout = export.path.join("a").symlink_metadata().unwrap();
    assert!(whiteout.file_type().is_char_device());
    assert_eq!((whiteout.rdev(), whiteout.uid(), whiteout.gid()), (0, 1234, 4321));
}

#[test]
fn a_directory_does_not_move_below_itself() {
    let export = Export::new();
    let outer = export.fs.mkdir(&AS_ROOT, ROOT, c"outer", new(0o755)).unwrap().node;
    assert_eq!(export.fs.rename(&AS_ROOT, (ROOT, c"outer"), (outer, c"inner"), 0), Err(Errno::INVAL));
}

#[test]
fn an_open_file_survives_its_name() {
    let export = Export::new();
    let (entry, opened) = export.create(&AS_ROOT, "file", 0o600, RDWR).unwrap();
    let file = (entry.node, opened.handle);
    export.fs.unlink(&AS_ROOT, ROOT, c"file").unwrap();
    assert_eq!(export.write(&AS_ROOT, file, 0, b"content"), Ok(7));
    assert_eq!(export.read(&AS_ROOT, file, 0, 7).unwrap(), b"content");
    let change =
        SetAttr { handle: Some(opened.handle), size: Some(3), mode: Some(0o640), ..Default::default() };
    let attr = export.fs.setattr(&AS_ROOT, entry.node, change).unwrap().0;
    assert_eq!((attr.size, attr.mode & 0o7777, attr.nlink), (3, 0o640, 0));
    assert_eq!(export.fs.link(&AS_ROOT, entry.node, ROOT, c"again").err(), Some(Errno::NOENT));
}
