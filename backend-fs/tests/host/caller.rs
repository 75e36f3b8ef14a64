//! Whose new files are.

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

use backend_fs::filesystem::{Context, FileSystem, Negotiated, NewInode};
use backend_fs::host::idmap::IdMap;
use backend_fs::host::options::HostOptions;
use rustix::io::Errno;

use crate::support::*;

const MEMBER: u32 = 5555;

/// `dir` in the export, of this owner, group and mode.
fn dir(export: &Export, uid: u32, gid: u32, mode: u32) -> backend_fs::filesystem::NodeId {
    let path = export.path.join("dir");
    std::fs::create_dir(&path).unwrap();
    chown(&path, Some(uid), Some(gid)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    export.node("dir")
}

#[test]
fn whatever_is_made_is_the_callers() {
    let export = Export::new();
    let caller = user(1234, 4321);
    export.create(&caller, "file", 0o600, RDWR).unwrap();
    export.fs.mkdir(&caller, ROOT, c"dir", new(0o700)).unwrap();
    export.fs.mknod(&caller, ROOT, c"fifo", new(libc::S_IFIFO | 0o600)).unwrap();
    export.fs.symlink(&caller, ROOT, c"link", c"target").unwrap();
    for name in ["file", "dir", "fifo", "link"] {
        let made = export.path.join(name).symlink_metadata().unwrap();
        assert_eq!((made.uid(), made.gid()), (1234, 4321), "{name}");
        let attr = export.lookup(name).unwrap().attr;
        assert_eq!((attr.uid, attr.gid), (1234, 4321), "{name}");
    }
    let (tmpfile, _) = export.fs.tmpfile(&caller, ROOT, new(0o600), RDWR).unwrap();
    assert_eq!((tmpfile.attr.uid, tmpfile.attr.gid), (1234, 4321));
}

#[test]
fn the_thread_is_itself_again_afterwards() {
    let export = Export::new();
    let groups = [MEMBER];
    let callers = [
        user(1234, 4321),
        user(0, 77),
        user(77, 0),
        Context { groups: Some(&groups), ..user(1234, 4321) },
        user(1234, 4321),
    ];
    let own = || {
        let status = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        let wanted = ["Uid:", "Gid:", "CapEff:", "CapPrm:"];
        status
            .lines()
            .filter(|line| wanted.iter().any(|key| line.starts_with(key)))
            .collect::<Vec<_>>()
            .join("\n")
    };
    let before = own();
    for (number, caller) in callers.iter().enumerate() {
        let made = export.create(caller, &number.to_string(), 0o600, RDWR).unwrap().0;
        assert_eq!((made.attr.uid, made.attr.gid), (caller.uid, caller.gid));
        assert_eq!(own(), before);
        // An error on the way does not change that.
        assert!(export.create(caller, &number.to_string(), 0o600, RDWR | libc::O_EXCL as u32).is_err());
        assert_eq!(own(), before);
    }
    // Nobody else's thread was touched, nor the umask of this process.
    let elsewhere = std::thread::spawn(own).join().unwrap();
    assert_eq!(elsewhere, before);
}

#[test]
fn a_group_that_was_sent_opens_the_directory_and_no_other() {
    let export = Export::new();
    let dir = dir(&export, 0, MEMBER, 0o770);
    let create = |groups: Option<&[u32]>, name| {
        let caller = Context { groups, ..user(1234, 4321) };
        export.fs.create(&caller, dir, name, new(0o600), RDWR, false).err()
    };
    assert_eq!(create(Some(&[MEMBER]), c"member"), None);
    assert_eq!(create(Some(&[1, MEMBER, 3]), c"among"), None);
    assert_eq!(create(Some(&[]), c"none"), Some(Errno::ACCESS));
    assert_eq!(create(Some(&[MEMBER + 1]), c"other"), Some(Errno::ACCESS));
    // Not sent: the DPU's kernel has looked.
    assert_eq!(create(None, c"unknown"), None);
}

#[test]
fn set_group_id_is_not_given_to_strangers() {
    let export = Export::new();
    // The daemon's own group, and a set-group-id directory of it (CVE-2022-0358).
    let dir = dir(&export, 0, 0, 0o2777);
    let made = |cx: &Context, name| export.fs.create(cx, dir, name, new(0o2755), RDWR, false).unwrap().0.attr;
    let stranger = made(&user(1234, 4321), c"stranger");
    assert_eq!((stranger.gid, stranger.mode & 0o7777), (0, 0o755));
    let member = made(&Context { groups: Some(&[0]), ..user(1234, 4321) }, c"member");
    assert_eq!((member.gid, member.mode & 0o7777), (0, 0o2755));
    let below = export.fs.mkdir(&user(1234, 4321), dir, c"below", new(0o755)).unwrap().attr;
    assert_eq!((below.gid, below.mode & 0o7777), (0, 0o2755));
}

#[test]
fn the_umask_counts_only_when_the_dpu_left_it_to_the_host() {
    for (dont_mask, wanted) in [(false, 0o777), (true, 0o750)] {
        let export = Export::new();
        export.fs.init(Negotiated { dont_mask, ..Default::default() });
        let made = NewInode { mode: 0o777, umask: 0o027, rdev: 0 };
        let dir = export.fs.mkdir(&AS_ROOT, ROOT, c"dir", made).unwrap();
        assert_eq!(dir.attr.mode & 0o7777, wanted);
        let file = export.fs.create(&AS_ROOT, ROOT, c"file", made, RDWR, false).unwrap().0;
        assert_eq!(file.attr.mode & 0o7777, wanted);
        let fifo = NewInode { mode: libc::S_IFIFO | 0o777, ..made };
        assert_eq!(export.fs.mknod(&AS_ROOT, ROOT, c"fifo", fifo).unwrap().attr.mode & 0o7777, wanted);
        // And the next one has its own.
        assert_eq!(export.fs.mkdir(&AS_ROOT, ROOT, c"next", new(0o777)).unwrap().attr.mode & 0o7777, 0o777);
    }
}

#[test]
fn a_default_acl_stands_in_for_the_umask() {
    let export = Export::new();
    export.fs.init(Negotiated { dont_mask: true, posix_acl: true, ..Default::default() });
    let dir = dir(&export, 0, 0, 0o777);
    // Version 2; user::rwx group::rwx other::r-x (`include/uapi/linux/posix_acl_xattr.h`).
    let entry = |tag: u16, perm: u16| [tag.to_le_bytes(), perm.to_le_bytes(), [0xff; 2], [0xff; 2]].concat();
    let acl = [2u32.to_le_bytes().to_vec(), entry(1, 7), entry(4, 7), entry(32, 5)].concat();
    let path = export.path.join("dir");
    rustix::fs::setxattr(&path, c"system.posix_acl_default", &acl, rustix::fs::XattrFlags::empty()).unwrap();
    let made = NewInode { mode: 0o777, umask: 0o077, rdev: 0 };
    let below = export.fs.mkdir(&AS_ROOT, dir, c"below", made).unwrap();
    assert_eq!(below.attr.mode & 0o777, 0o775);
}

#[test]
fn ids_are_translated_both_ways() {
    use backend_fs::host::idmap::Rule;
    let map = |rule: &str| IdMap::new(&[rule.parse::<Rule>().unwrap()]).unwrap();
    let options = HostOptions {
        uid_map: map("map:1000:501000:10"),
        gid_map: map("map:2000:602000:10"),
        ..Default::default()
    };
    let export = Export::with(On::Disk, options);
    let entry = export.create(&user(1003, 2004), "file", 0o600, RDWR).unwrap().0;
    let host = export.path.join("file").metadata().unwrap();
    assert_eq!((host.uid(), host.gid()), (501003, 602004));
    assert_eq!((entry.attr.uid, entry.attr.gid), (1003, 2004));
}

#[test]
fn ids_without_a_translation_are_refused() {
    use backend_fs::host::idmap::Rule;
    let rule = "forbid-guest:66:1".parse::<Rule>().unwrap();
    let options = HostOptions { uid_map: IdMap::new(&[rule]).unwrap(), ..Default::default() };
    let export = Export::with(On::Disk, options);
    assert_eq!(export.create(&user(66, 66), "file", 0o600, RDWR).err(), Some(Errno::PERM));
    assert_eq!(std::fs::read_dir(&export.path).unwrap().count(), 0);
    assert!(export.create(&user(67, 66), "file", 0o600, RDWR).is_ok());
}

#[test]
fn existing_files_are_opened_by_create_with_the_callers_rights() {
    let export = Export::new();
    let secret = export.put("secret", "secret");
    std::fs::set_permissions(&secret, PermissionsExt::from_mode(0o600)).unwrap();
    let create = |cx: &Context| export.create(cx, "secret", 0o600, RDWR).err();
    // Without groups the DPU's kernel is made to look again.
    assert_eq!(create(&user(1234, 4321)), Some(Errno::STALE));
    assert_eq!(create(&Context { groups: Some(&[1]), ..user(1234, 4321) }), Some(Errno::ACCESS));
    assert_eq!(create(&AS_ROOT), None);
    chown(&secret, Some(1234), None).unwrap();
    assert_eq!(create(&user(1234, 4321)), None);
}

#[test]
fn access_is_what_the_host_would_grant() {
    let export = Export::new();
    let path = export.put("file", "");
    chown(&path, Some(1000), Some(MEMBER)).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap();
    let node = export.node("file");
    let access = |cx: &Context, mask: i32| export.fs.access(cx, node, mask as u32);
    assert_eq!(access(&user(1000, 1), libc::R_OK | libc::W_OK), Ok(()));
    assert_eq!(access(&user(1000, 1), libc::X_OK), Err(Errno::ACCESS));
    assert_eq!(access(&user(1001, MEMBER), libc::R_OK), Ok(()));
    assert_eq!(access(&user(1001, MEMBER), libc::W_OK), Err(Errno::ACCESS));
    assert_eq!(access(&Context { groups: Some(&[MEMBER]), ..user(1001, 1) }, libc::R_OK), Ok(()));
    assert_eq!(access(&user(1001, 1), libc::R_OK), Err(Errno::ACCESS));
    assert_eq!(access(&user(1001, 1), libc::F_OK), Ok(()));
    assert_eq!(access(&AS_ROOT, libc::R_OK | libc::W_OK), Ok(()));
    assert_eq!(access(&AS_ROOT, libc::X_OK), Err(Errno::ACCESS));
    assert_eq!(access(&AS_ROOT, 64), Err(Errno::INVAL));
}

#[test]
fn invalid_ids_are_no_way_to_stay_root() {
    let export = Export::new();
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        assert_eq!(export.create(&user(uid, gid), "file", 0o600, RDWR).err(), Some(Errno::PERM));
    }
    assert_eq!(std::fs::read_dir(&export.path).unwrap().count(), 0);
}
