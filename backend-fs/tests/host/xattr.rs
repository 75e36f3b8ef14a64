//! Extended attributes.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use backend_fs::filesystem::{Context, FileSystem, Negotiated, NodeId};
use backend_fs::host::options::HostOptions;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::support::*;

fn with_xattrs() -> HostOptions {
    HostOptions { xattr: true, ..Default::default() }
}

fn get(export: &Export, node: NodeId, name: &str) -> Result<Vec<u8>, Errno> {
    let mut value = b"before:".to_vec();
    let len = export.fs.getxattr(&AS_ROOT, node, &c(name), 65536, &mut value)?;
    assert_eq!(value.len(), 7 + len);
    Ok(value.split_off(7))
}

fn list(export: &Export, node: NodeId) -> Vec<String> {
    let mut names = Vec::new();
    let len = export.fs.listxattr(&AS_ROOT, node, 65536, &mut names).unwrap();
    assert_eq!(export.fs.listxattr(&AS_ROOT, node, 0, &mut Vec::new()), Ok(len));
    let mut names: Vec<String> = names
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| String::from_utf8(name.to_vec()).unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn they_do_not_exist_unless_switched_on() {
    let export = Export::new();
    assert_eq!(export.fs.setxattr(&AS_ROOT, ROOT, c"user.a", b"", 0, false), Err(Errno::NOSYS));
    assert_eq!(export.fs.getxattr(&AS_ROOT, ROOT, c"user.a", 0, &mut Vec::new()), Err(Errno::NOSYS));
    assert_eq!(export.fs.listxattr(&AS_ROOT, ROOT, 0, &mut Vec::new()), Err(Errno::NOSYS));
    assert_eq!(export.fs.removexattr(&AS_ROOT, ROOT, c"user.a"), Err(Errno::NOSYS));
}

#[test]
fn they_are_set_read_listed_and_removed() {
    let export = Export::with(On::Disk, with_xattrs());
    let path = export.put("file", "");
    let node = export.node("file");
    let set = |value: &[u8], flags| export.fs.setxattr(&AS_ROOT, node, c"user.a", value, flags, false);
    assert_eq!(set(b"x", libc::XATTR_REPLACE as u32), Err(Errno::NODATA));
    assert_eq!(set(b"one", libc::XATTR_CREATE as u32), Ok(()));
    assert_eq!(set(b"x", libc::XATTR_CREATE as u32), Err(Errno::EXIST));
    assert_eq!(set(b"two", 0), Ok(()));
    assert_eq!(set(b"x", 4), Err(Errno::INVAL));
    assert_eq!(get(&export, node, "user.a").unwrap(), b"two");
    let mut host = [0; 10];
    assert_eq!(rustix::fs::getxattr(&path, c"user.a", &mut host[..]), Ok(3));
    assert_eq!(list(&export, node), ["user.a"]);
    assert_eq!(export.fs.getxattr(&AS_ROOT, node, c"user.a", 0, &mut Vec::new()), Ok(3));
    let mut small = Vec::new();
    assert_eq!(export.fs.getxattr(&AS_ROOT, node, c"user.a", 2, &mut small), Err(Errno::RANGE));
    assert_eq!(export.fs.listxattr(&AS_ROOT, node, 2, &mut small), Err(Errno::RANGE));
    assert_eq!(small, b"");
    assert_eq!(export.fs.removexattr(&AS_ROOT, node, c"user.a"), Ok(()));
    assert_eq!(get(&export, node, "user.a"), Err(Errno::NODATA));
    assert_eq!(list(&export, node), [""; 0]);
}

#[test]
fn an_empty_value_is_a_value() {
    let export = Export::with(On::Disk, with_xattrs());
    export.fs.setxattr(&AS_ROOT, ROOT, c"user.empty", b"", 0, false).unwrap();
    assert_eq!(get(&export, ROOT, "user.empty").unwrap(), b"");
    assert_eq!(export.fs.getxattr(&AS_ROOT, ROOT, c"user.empty", 0, &mut Vec::new()), Ok(0));
}

#[test]
fn a_size_of_four_gigabytes_allocates_no_such_thing() {
    let export = Export::with(On::Disk, with_xattrs());
    export.fs.setxattr(&AS_ROOT, ROOT, c"user.a", b"one", 0, false).unwrap();
    let mut value = Vec::new();
    assert_eq!(export.fs.getxattr(&AS_ROOT, ROOT, c"user.a", u32::MAX, &mut value), Ok(3));
    assert!(value.capacity() <= 1 << 17);
    assert_eq!(export.fs.listxattr(&AS_ROOT, ROOT, u32::MAX, &mut Vec::new()), Ok(7));
}

#[test]
fn links_and_special_files_are_not_followed_or_opened() {
    let export = Export::with(On::Disk, with_xattrs());
    let canary = export.outside.join("canary");
    std::fs::write(&canary, "").unwrap();
    rustix::fs::setxattr(&canary, c"user.secret", b"secret", XattrFlags::empty()).unwrap();
    std::os::unix::fs::symlink(&canary, export.path.join("link")).unwrap();
    let link = export.node("link");
    let fifo = export.fs.mknod(&AS_ROOT, ROOT, c"fifo", new(libc::S_IFIFO | 0o600)).unwrap().node;
    for node in [link, fifo] {
        assert!(get(&export, node, "user.secret").is_err());
        assert_eq!(export.fs.setxattr(&AS_ROOT, node, c"user.a", b"x", 0, false), Err(Errno::PERM));
        assert!(export.fs.removexattr(&AS_ROOT, node, c"user.secret").is_err());
        // What may be had for every kind of inode works.
        assert_eq!(export.fs.setxattr(&AS_ROOT, node, c"trusted.a", b"x", 0, false), Ok(()));
        assert_eq!(list(&export, node), ["trusted.a"]);
    }
    let mut value = [0; 10];
    assert_eq!(rustix::fs::getxattr(&canary, c"user.secret", &mut value[..]), Ok(6));
    assert_eq!(rustix::fs::getxattr(&canary, c"trusted.a", &mut value[..]), Err(Errno::NODATA));
}

/// user::rw- group::r-- other::r--, version 2 (`include/uapi/linux/posix_acl_xattr.h`).
fn acl() -> Vec<u8> {
    let entry = |tag: u16, perm: u16| [tag.to_le_bytes(), perm.to_le_bytes(), [0xff; 2], [0xff; 2]].concat();
    [2u32.to_le_bytes().to_vec(), entry(1, 6), entry(4, 4), entry(32, 4)].concat()
}

#[test]
fn acls_exist_only_when_they_were_negotiated() {
    let export = Export::with(On::Disk, with_xattrs());
    let path = export.put("file", "");
    let named = {
        // With a named user, so that it is stored and listed.
        let entry = |tag: u16, perm: u16, id: u32| {
            [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let none = u32::MAX;
        [
            2u32.to_le_bytes().to_vec(),
            entry(1, 6, none),
            entry(2, 6, 77),
            entry(4, 4, none),
            entry(16, 6, none),
            entry(32, 4, none),
        ]
        .concat()
    };
    rustix::fs::setxattr(&path, c"system.posix_acl_access", &named, XattrFlags::empty()).unwrap();
    for posix_acl in [false, true] {
        export.fs.init(Negotiated { posix_acl, ..Default::default() });
        let node = export.node("file");
        let name = "system.posix_acl_access";
        if posix_acl {
            assert_eq!(get(&export, node, name).unwrap(), named);
            assert_eq!(list(&export, node), [name]);
            assert_eq!(export.fs.removexattr(&AS_ROOT, node, &c(name)), Ok(()));
        } else {
            assert_eq!(get(&export, node, name), Err(Errno::OPNOTSUPP));
            assert_eq!(list(&export, node), [""; 0]);
            assert_eq!(export.fs.setxattr(&AS_ROOT, node, &c(name), &acl(), 0, false), Err(Errno::OPNOTSUPP));
            assert_eq!(export.fs.removexattr(&AS_ROOT, node, &c(name)), Err(Errno::OPNOTSUPP));
        }
    }
}

#[test]
fn an_acl_takes_set_group_id_away_when_the_dpu_says_so() {
    let export = Export::with(On::Disk, with_xattrs());
    export.fs.init(Negotiated { posix_acl: true, ..Default::default() });
    let path = export.put("file", "");
    for group in [0, 5555] {
        for (kill_sgid, wanted) in [(false, 0o2644), (true, 0o644)] {
            std::os::unix::fs::chown(&path, None, Some(group)).unwrap();
            std::fs::set_permissions(&path, PermissionsExt::from_mode(0o2644)).unwrap();
            let node = export.node("file");
            export.fs.setxattr(&AS_ROOT, node, c"system.posix_acl_access", &acl(), 0, kill_sgid).unwrap();
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, wanted, "{group}");
        }
    }
}

fn mapped() -> HostOptions {
    let rules = ":prefix:all:security.capability:user.virtiofs.:\
                 :prefix:client:trusted.:user.virtiofs.:\
                 :prefix:server::user.virtiofs.:\
                 :bad:client:user.virtiofs.::\
                 :ok:all:::";
    HostOptions { xattrmap: Some(rules.parse().unwrap()), ..with_xattrs() }
}

#[test]
fn names_are_mapped_both_ways() {
    let export = Export::with(On::Disk, mapped());
    let path = export.put("file", "");
    let node = export.node("file");
    export.fs.setxattr(&AS_ROOT, node, c"trusted.a", b"x", 0, false).unwrap();
    let mut value = [0; 10];
    assert_eq!(rustix::fs::getxattr(&path, c"user.virtiofs.trusted.a", &mut value[..]), Ok(1));
    assert_eq!(rustix::fs::getxattr(&path, c"trusted.a", &mut value[..]), Err(Errno::NODATA));
    assert_eq!(list(&export, node), ["trusted.a"]);
    assert_eq!(get(&export, node, "trusted.a").unwrap(), b"x");
    // The host's own name of it is not the DPU's to use.
    assert_eq!(get(&export, node, "user.virtiofs.trusted.a"), Err(Errno::NODATA));
    assert_eq!(export.fs.setxattr(&AS_ROOT, node, c"user.virtiofs.x", b"", 0, false), Err(Errno::PERM));
    assert_eq!(export.fs.removexattr(&AS_ROOT, node, c"user.virtiofs.trusted.a"), Err(Errno::PERM));
}

#[test]
fn mapped_file_capabilities_go_when_the_file_changes() {
    let export = Export::with(On::Disk, mapped());
    let path = export.put("file", "content");
    let node = export.node("file");
    let set = || export.fs.setxattr(&AS_ROOT, node, c"security.capability", b"caps", 0, false).unwrap();
    let gone = || {
        let mut value = [0; 10];
        rustix::fs::getxattr(&path, c"user.virtiofs.security.capability", &mut value[..])
            == Err(Errno::NODATA)
    };
    let (_, handle) = export.open("file", RDWR);
    set();
    assert!(!gone());
    export.write(&AS_ROOT, (node, handle), 0, b"x").unwrap();
    assert!(gone());
    set();
    let size = backend_fs::filesystem::SetAttr { size: Some(1), ..Default::default() };
    export.fs.setattr(&AS_ROOT, node, size).unwrap();
    assert!(gone());
    set();
    let owner = backend_fs::filesystem::SetAttr { uid: Some(1), ..Default::default() };
    export.fs.setattr(&AS_ROOT, node, owner).unwrap();
    assert!(gone());
    set();
    export.open("file", RDWR | libc::O_TRUNC as u32);
    assert!(gone());
    set();
    export.fs.fallocate(&AS_ROOT, node, handle, 0, 0, 10).unwrap();
    assert!(gone());
}

#[test]
fn security_labels_are_there_from_the_start() {
    let export = Export::with(On::Disk, with_xattrs());
    let cx = Context { label: Some((c"trusted.label", b"value")), ..user(1234, 4321) };
    export.create(&cx, "file", 0o600, RDWR).unwrap();
    export.fs.mkdir(&cx, ROOT, c"dir", new(0o700)).unwrap();
    export.fs.symlink(&cx, ROOT, c"link", c"target").unwrap();
    export.fs.mknod(&cx, ROOT, c"fifo", new(libc::S_IFIFO | 0o600)).unwrap();
    for name in ["file", "dir", "link", "fifo"] {
        assert_eq!(get(&export, export.node(name), "trusted.label").unwrap(), b"value", "{name}");
    }
    // What cannot be labelled is not made.
    let cx = Context { label: Some((c"nonsense", b"value")), ..AS_ROOT };
    assert!(export.create(&cx, "file-2", 0o600, RDWR).is_err());
    assert!(export.fs.mkdir(&cx, ROOT, c"dir-2", new(0o700)).is_err());
    assert!(export.fs.symlink(&cx, ROOT, c"link-2", c"target").is_err());
    assert_eq!(std::fs::read_dir(&export.path).unwrap().count(), 4);
    assert_eq!(export.fs.counts().handles, 1);
}
