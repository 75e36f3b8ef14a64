//! A read-only export refuses every change itself, whatever the DPU believes.

use backend_fs::filesystem::{CopyRange, FileSystem, NewInode, SetAttr, SetTime};
use backend_fs::host::options::HostOptions;
use rustix::io::Errno;

use crate::support::*;

#[test]
fn nothing_changes_a_read_only_export() {
    let export = Export::with(On::Disk, HostOptions { readonly: true, xattr: true, ..Default::default() });
    export.put("file", "content");
    std::fs::create_dir(export.path.join("dir")).unwrap();
    let (node, handle) = export.open("file", RDONLY);
    let fs = &export.fs;
    let copy = CopyRange { source: (node, handle, 0), target: (node, handle, 0), len: 1, flags: 0 };
    let change = |change: SetAttr| fs.setattr(&AS_ROOT, node, change).err();
    let device = NewInode { mode: libc::S_IFREG | 0o600, umask: 0, rdev: 0 };
    let refused = [
        ("open for writing", fs.open(&AS_ROOT, node, WRONLY, false).err()),
        ("open for both", fs.open(&AS_ROOT, node, RDWR, false).err()),
        ("open to truncate", fs.open(&AS_ROOT, node, RDONLY | libc::O_TRUNC as u32, false).err()),
        ("create", export.create(&AS_ROOT, "new", 0o600, RDONLY).err()),
        ("create what exists", export.create(&AS_ROOT, "file", 0o600, RDONLY).err()),
        ("tmpfile", fs.tmpfile(&AS_ROOT, ROOT, new(0o600), RDWR).err()),
        ("write", export.write(&AS_ROOT, (node, handle), 0, b"x").err()),
        (
            "append",
            write(fs, &AS_ROOT, (node, handle), 0, b"x", Write { append: true, ..Default::default() }).err(),
        ),
        ("fallocate", fs.fallocate(&AS_ROOT, node, handle, 0, 0, 1).err()),
        ("copy", fs.copy_file_range(&AS_ROOT, copy).err()),
        ("chmod", change(SetAttr { mode: Some(0), ..Default::default() })),
        ("chown", change(SetAttr { uid: Some(0), ..Default::default() })),
        ("truncate", change(SetAttr { size: Some(0), ..Default::default() })),
        ("utimens", change(SetAttr { mtime: Some(SetTime::Now), ..Default::default() })),
        ("mkdir", fs.mkdir(&AS_ROOT, ROOT, c"new", new(0o700)).err()),
        ("mknod", fs.mknod(&AS_ROOT, ROOT, c"new", device).err()),
        ("symlink", fs.symlink(&AS_ROOT, ROOT, c"new", c"x").err()),
        ("link", fs.link(&AS_ROOT, node, ROOT, c"new").err()),
        ("unlink", fs.unlink(&AS_ROOT, ROOT, c"file").err()),
        ("rmdir", fs.rmdir(&AS_ROOT, ROOT, c"dir").err()),
        ("rename", fs.rename(&AS_ROOT, (ROOT, c"file"), (ROOT, c"new"), 0).err()),
        ("setxattr", fs.setxattr(&AS_ROOT, node, c"user.a", b"", 0, false).err()),
        ("removexattr", fs.removexattr(&AS_ROOT, node, c"user.a").err()),
        ("access", fs.access(&AS_ROOT, node, libc::W_OK as u32).err()),
    ];
    for (what, errno) in refused {
        assert_eq!(errno, Some(Errno::ROFS), "{what}");
    }
    assert_eq!(export.get("file"), b"content");
    assert_eq!(std::fs::read_dir(&export.path).unwrap().count(), 2);
    assert_eq!(export.read(&AS_ROOT, (node, handle), 0, 7).unwrap(), b"content");
    assert_eq!(export.list(ROOT, 4096, true).len(), 4);
}
