//! Attributes, extended attributes, identity, locks.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use rustix::io::Errno;

use super::{Bench, Step, ensure, pattern, refused, same, same_bytes};
use crate::fuse::Caller;
use crate::fuse::abi::{FileLock, LK_FLOCK, LkIn, ROOT, SetattrIn, fattr, init};

pub(super) fn attributes_agree_with_the_host(b: &mut Bench<'_>) -> Step {
    std::fs::write(b.host("attr"), pattern(12_345, 1))?;
    let entry = b.client().lookup(ROOT, "attr")?;
    let attr = b.client().getattr(entry.nodeid, None)?.attr;
    let host = std::fs::metadata(b.host("attr"))?;
    same("from lookup and getattr", entry.attr, attr)?;
    same("ino", attr.ino, host.ino())?;
    same("size", attr.size, host.size())?;
    same("blocks", attr.blocks, host.blocks())?;
    same("mode", attr.mode, host.mode())?;
    same("nlink", u64::from(attr.nlink), host.nlink())?;
    same("owner", (attr.uid, attr.gid), (host.uid(), host.gid()))?;
    same("mtime", (attr.mtime as i64, i64::from(attr.mtimensec)), (host.mtime(), host.mtime_nsec()))?;
    same("ctime", (attr.ctime as i64, i64::from(attr.ctimensec)), (host.ctime(), host.ctime_nsec()))?;
    let root = b.client().getattr(ROOT, None)?.attr;
    same("root's inode", root.ino, std::fs::metadata(b.shared)?.ino())?;
    Ok(b.client().unlink(ROOT, "attr")?)
}

pub(super) fn attributes_can_be_set(b: &mut Bench<'_>) -> Step {
    std::fs::write(b.host("set"), pattern(9_000, 1))?;
    let node = b.client().lookup(ROOT, "set")?.nodeid;
    same("mode in the reply", b.client().chmod(node, 0o4711)?.attr.mode & 0o7777, 0o4711)?;
    same("mode", std::fs::metadata(b.host("set"))?.permissions().mode() & 0o7777, 0o4711)?;
    for size in [20_000, 5, 0] {
        same("size in the reply", b.client().truncate(node, size)?.attr.size, size)?;
        same("size", std::fs::metadata(b.host("set"))?.len(), size)?;
    }
    let times = SetattrIn {
        valid: fattr::ATIME | fattr::MTIME,
        atime: 1_000_000_000,
        atimensec: 123_456_789,
        mtime: 1_500_000_000,
        mtimensec: 987_654_321,
        ..Default::default()
    };
    b.client().setattr(node, times)?;
    let host = std::fs::metadata(b.host("set"))?;
    same("atime", (host.atime(), host.atime_nsec()), (1_000_000_000, 123_456_789))?;
    same("mtime", (host.mtime(), host.mtime_nsec()), (1_500_000_000, 987_654_321))?;
    let now = SetattrIn { valid: fattr::MTIME | fattr::MTIME_NOW, ..Default::default() };
    b.client().setattr(node, now)?;
    ensure("mtime is now", std::fs::metadata(b.host("set"))?.mtime() > 1_700_000_000)?;
    if b.expect.identities {
        let owner = SetattrIn { valid: fattr::UID | fattr::GID, uid: 1234, gid: 2345, ..Default::default() };
        b.client().setattr(node, owner)?;
        let host = std::fs::metadata(b.host("set"))?;
        same("owner", (host.uid(), host.gid()), (1234, 2345))?;
    }
    let handle = b.client().open(node, libc::O_RDWR)?.fh;
    let by_handle = SetattrIn { valid: fattr::SIZE | fattr::FH, fh: handle, size: 77, ..Default::default() };
    same("size by handle", b.client().setattr(node, by_handle)?.attr.size, 77)?;
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "set")?)
}

pub(super) fn extended_attributes_round_trip(b: &mut Bench<'_>) -> Step {
    std::fs::write(b.host("xattr"), "")?;
    let node = b.client().lookup(ROOT, "xattr")?.nodeid;
    if !b.expect.xattr {
        refused("GETXATTR without support", b.client().getxattr(node, "user.a", 64), Errno::NOSYS)?;
        return Ok(b.client().unlink(ROOT, "xattr")?);
    }
    let large = pattern(3_000, 8);
    b.client().setxattr(node, "user.small", b"value", 0)?;
    b.client().setxattr(node, "user.large", &large, 0)?;
    same_bytes("small", &b.client().getxattr(node, "user.small", 256)?, b"value")?;
    same_bytes("large", &b.client().getxattr(node, "user.large", 4_096)?, &large)?;
    same("size alone", b.client().getxattr_size(node, "user.large")?, 3_000)?;
    refused("buffer too small", b.client().getxattr(node, "user.large", 100), Errno::RANGE)?;
    refused("missing", b.client().getxattr(node, "user.none", 100), Errno::NODATA)?;
    refused("XATTR_CREATE over one", b.client().setxattr(node, "user.small", b"x", 1), Errno::EXIST)?;
    let mut names = b.client().listxattr(node, 1_024)?;
    names.retain(|name| name.starts_with(b"user."));
    names.sort();
    same("names", names, vec![b"user.large".to_vec(), b"user.small".to_vec()])?;
    b.client().removexattr(node, "user.small")?;
    refused("removed", b.client().getxattr(node, "user.small", 100), Errno::NODATA)?;
    Ok(b.client().unlink(ROOT, "xattr")?)
}

pub(super) fn figures_agree_with_the_host(b: &mut Bench<'_>) -> Step {
    let figures = b.client().statfs(ROOT)?;
    let host = rustix::fs::statvfs(b.shared).map_err(std::io::Error::from)?;
    same("blocks", figures.blocks, host.f_blocks)?;
    same("block size", u64::from(figures.bsize), host.f_bsize)?;
    same("name length", u64::from(figures.namelen), host.f_namemax)
}

pub(super) fn requests_run_as_their_caller(b: &mut Bench<'_>) -> Step {
    if !b.expect.identities {
        return Ok(());
    }
    let user = Caller { uid: 4321, gid: 5432, pid: 99 };
    let open = b.client().mkdir(ROOT, "open-to-all", 0o755)?.nodeid;
    b.client().chmod(open, 0o777)?;
    let closed = b.client().mkdir(ROOT, "closed", 0o700)?.nodeid;

    b.client().set_caller(user);
    let made = b.client().create(open, "mine", libc::O_RDWR, 0o600);
    let made_dir = b.client().mkdir(open, "my-dir", 0o700);
    let denied = b.client().create(closed, "not-mine", libc::O_RDWR, 0o600);
    b.client().set_caller(Caller::ROOT);

    let made = made?;
    made_dir?;
    // Without the extension the daemon does not know the caller's groups; it then has to trust the DPU's own check.
    if b.client().init_flags() & init::CREATE_SUPP_GROUP != 0 {
        refused("create in a closed directory", denied, Errno::ACCESS)?;
    }
    for name in ["mine", "my-dir"] {
        let host = std::fs::metadata(b.host("open-to-all").join(name))?;
        same("owner", (host.uid(), host.gid()), (4321, 5432))?;
    }
    // The daemon must be itself again.
    b.client().create(closed, "by-root", libc::O_RDWR, 0o600)?;
    same("owner after", std::fs::metadata(b.host("closed/by-root"))?.uid(), 0)?;
    b.client().release(made.entry.nodeid, made.open.fh)?;
    std::fs::remove_dir_all(b.host("open-to-all"))?;
    Ok(std::fs::remove_dir_all(b.host("closed"))?)
}

pub(super) fn locks_conflict_between_owners(b: &mut Bench<'_>) -> Step {
    let taken = b.client().init_flags();
    std::fs::write(b.host("locked"), "0123456789")?;
    let node = b.client().lookup(ROOT, "locked")?.nodeid;
    let first = b.client().open(node, libc::O_RDWR)?.fh;
    let second = b.client().open(node, libc::O_RDWR)?.fh;
    let lock = |fh, owner, kind: i32, flock: bool| LkIn {
        fh,
        owner,
        lk: FileLock {
            start: 0,
            end: if flock { i64::MAX as u64 } else { 4 },
            kind: kind as u32,
            pid: owner as u32,
        },
        lk_flags: if flock { LK_FLOCK } else { 0 },
        padding: 0,
    };
    let kinds = [(init::POSIX_LOCKS, false), (init::FLOCK_LOCKS, true)];
    for (_, flock) in kinds.into_iter().filter(|(flag, _)| taken & flag != 0) {
        b.client().setlk(node, lock(first, 1, libc::F_WRLCK, flock))?;
        refused(
            "lock of another owner",
            b.client().setlk(node, lock(second, 2, libc::F_WRLCK, flock)),
            Errno::AGAIN,
        )?;
        if !flock {
            let conflict = b.client().getlk(node, lock(second, 2, libc::F_WRLCK, false))?;
            same(
                "conflicting lock",
                (conflict.kind, conflict.start, conflict.end),
                (libc::F_WRLCK as u32, 0, 4),
            )?;
        }
        b.client().setlk(node, lock(first, 1, libc::F_UNLCK, flock))?;
        b.client().setlk(node, lock(second, 2, libc::F_WRLCK, flock))?;
        b.client().setlk(node, lock(second, 2, libc::F_UNLCK, flock))?;
    }
    b.client().release(node, first)?;
    b.client().release(node, second)?;
    Ok(b.client().unlink(ROOT, "locked")?)
}
