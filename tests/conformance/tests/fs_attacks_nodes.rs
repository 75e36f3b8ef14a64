//! Attacks by what a node is and who asks (F06 to F10, F19): special files, set-id bits, attribute names, ids,
//! read-only exports.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use conformance::answers::refusal;
use conformance::export::{Export, Sandbox};
use conformance::snapshot::Snapshot;
use rustix::io::Errno;
use virtio_driver::fuse::abi::*;
use virtio_driver::fuse::ops::group_extension;
use virtio_driver::fuse::{Call, Caller, Client, FuseResult, Session};
use virtio_driver::hostile::{Attacker, message};
use zerocopy::IntoBytes;

/// Longest time an operation that must not block may take on a busy machine.
const PROMPT: Duration = Duration::from_secs(2);

/// The errno of an operation that must be refused.
#[track_caller]
fn errno<T: std::fmt::Debug>(result: FuseResult<T>) -> Errno {
    refusal("the operation", result)
}

/// F06: a node made by the DPU is never opened on the host unless it is a file or a directory.
#[test]
fn special_nodes_are_not_opened_and_nothing_blocks() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let nodes = [
        ("fifo", libc::S_IFIFO, 0),
        ("socket", libc::S_IFSOCK, 0),
        ("null", libc::S_IFCHR, 0x103),
        ("tty", libc::S_IFCHR, 0x500),
        ("disk", libc::S_IFBLK, 0x800),
    ];
    let flags = [
        libc::O_RDONLY,
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDONLY | libc::O_NONBLOCK,
        libc::O_WRONLY | libc::O_NONBLOCK,
        libc::O_RDWR | libc::O_CREAT | libc::O_TRUNC,
        libc::O_PATH,
        libc::O_RDONLY | libc::O_DIRECTORY,
        libc::O_RDWR | libc::O_TMPFILE,
    ];
    for (name, kind, rdev) in nodes {
        let client = session.client();
        // Device nodes may be refused altogether.
        let node = match client.mknod(ROOT, name, kind | 0o666, rdev) {
            Ok(entry) => entry.nodeid,
            Err(error) => {
                assert_eq!(error.errno(), Some(Errno::PERM), "{name}: {error}");
                continue;
            }
        };
        for flags in flags {
            let begin = Instant::now();
            let refusal = errno(client.open(node, flags));
            let allowed = [Errno::BADF, Errno::NXIO, Errno::INVAL, Errno::PERM, Errno::ACCESS, Errno::NOTDIR];
            assert!(allowed.contains(&refusal), "OPEN of a {name} with {flags:#x}: {refusal}");
            assert!(begin.elapsed() < PROMPT, "OPEN of a {name} with {flags:#x} took {:?}", begin.elapsed());
        }
        refusal(&format!("OPENDIR of a {name}"), client.opendir(node));
        let begin = Instant::now();
        refusal(&format!("truncating a {name}"), client.truncate(node, 0));
        // CREATE on an existing special file must not open it either.
        let created = client.create(ROOT, name, libc::O_RDWR | libc::O_CREAT, 0o644);
        refusal(&format!("CREATE over a {name}: {created:?}"), created);
        assert!(begin.elapsed() < PROMPT, "a {name} held the daemon for {:?}", begin.elapsed());
        client.unlink(ROOT, name)?;
    }
    export.check(&mut session)?;
    export.check_usage()
}

/// F06: open flags with a meaning of their own do not become another operation.
#[test]
fn strange_open_flags_stay_within_the_file() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let inside = Snapshot::of(&export.yard.share())?;
    let client = session.client();
    let file = client.lookup(ROOT, "witness")?.nodeid;
    let dir = client.lookup(ROOT, "sub")?.nodeid;
    for node in [file, dir, ROOT] {
        for flags in [
            libc::O_PATH,
            libc::O_TMPFILE,
            libc::O_TMPFILE | libc::O_RDWR,
            libc::O_DIRECTORY,
            libc::O_CREAT,
            -1,
        ] {
            if let Ok(open) = client.open(node, flags & !libc::O_TRUNC) {
                let _ = client.read(node, open.fh, 0, 16);
                client.release(node, open.fh)?;
            }
            if let Ok(open) = client.open_with(Opcode::Opendir, node, flags & !libc::O_TRUNC, u32::MAX) {
                let _ = client.readdir(node, open.fh, 0, 4096);
                client.releasedir(node, open.fh)?;
            }
        }
    }
    assert_eq!(inside.changes()?, [""; 0], "opening changed something");
    let listed = std::fs::read_dir(export.yard.share())?.count();
    assert_eq!(listed, 2, "opening made a file");
    export.check(&mut session)?;
    export.check_usage()
}

/// F07: a mode may carry set-id bits, but type bits that contradict the operation do not make another kind of node.
#[test]
fn a_mode_does_not_change_the_kind_of_a_new_node() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let client = session.client();
    for kind in [libc::S_IFCHR, libc::S_IFBLK, libc::S_IFIFO, libc::S_IFDIR, libc::S_IFLNK] {
        let args = CreateIn { flags: libc::O_RDWR as u32, mode: kind | 0o644, umask: 0, open_flags: 0 };
        let body = [args.as_bytes(), b"odd\0"].concat();
        let reply = Attacker::new(client).exchange(
            &message(Opcode::Create as u32, ROOT, &body, None),
            &[40],
            &[16, 144],
        )?;
        if reply.errno() == Some(0) {
            assert!(export.inside("odd").symlink_metadata()?.is_file(), "CREATE with type {kind:#o}");
            std::fs::remove_file(export.inside("odd"))?;
        }
        if let Ok(entry) = client.mkdir(ROOT, "odd-dir", kind | 0o755) {
            assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFDIR, "MKDIR with type {kind:#o}");
            client.rmdir(ROOT, "odd-dir")?;
        }
    }
    for kind in [libc::S_IFDIR, libc::S_IFLNK, 0o030_000, 0o170_000] {
        let made = client.mknod(ROOT, "odd-node", kind | 0o644, 0);
        refusal(&format!("MKNOD of type {kind:#o}: {made:?}"), made);
        assert!(!export.inside("odd-node").exists());
    }
    export.check(&mut session)
}

/// F08: set-id bits go when somebody else writes, truncates or takes the file over.
#[test]
fn set_id_bits_are_dropped_when_the_dpu_says_so() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &["--killpriv-v2"])?;
    let mut session = export.mount()?;
    let client = session.client();
    assert!(client.init_flags() & init::HANDLE_KILLPRIV_V2 != 0, "HANDLE_KILLPRIV_V2 was not taken");
    let path = export.inside("set-id");
    let with_bits = |client: &mut Client| -> anyhow::Result<u64> {
        std::fs::write(&path, b"0123456789")?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o6777))?;
        Ok(client.lookup(ROOT, "set-id")?.nodeid)
    };
    let bits = || std::fs::metadata(&path).unwrap().mode() & 0o6000;
    let user = Caller { uid: 1000, gid: 1000, pid: 7 };

    let node = with_bits(client)?;
    let fh = client.open(node, libc::O_RDWR)?.fh;
    client.write(node, fh, 0, b"x")?;
    assert_eq!(bits(), 0o6000, "a write of somebody who may keep the bits");
    client.set_caller(user);
    let write = WriteIn { fh, size: 1, write_flags: WRITE_KILL_SUIDGID, ..Default::default() };
    client.write_with(node, write, b"x")?;
    assert_eq!(bits(), 0, "WRITE with KILL_SUIDGID");

    with_bits(client)?;
    let shrink = SetattrIn { valid: fattr::SIZE | fattr::KILL_SUIDGID, size: 3, ..Default::default() };
    client.setattr(node, shrink)?;
    assert_eq!(bits(), 0, "truncation with KILL_SUIDGID");

    with_bits(client)?;
    let flags = libc::O_RDWR | libc::O_TRUNC;
    let truncating = client.open_with(Opcode::Open, node, flags, OPEN_KILL_SUIDGID)?.fh;
    assert_eq!(bits(), 0, "O_TRUNC with KILL_SUIDGID");
    client.release(node, truncating)?;
    client.set_caller(Caller::ROOT);

    with_bits(client)?;
    let owner = SetattrIn { valid: fattr::UID | fattr::GID, uid: 1000, gid: 1000, ..Default::default() };
    client.setattr(node, owner)?;
    assert_eq!(bits(), 0, "chown");
    client.release(node, fh)?;
    export.check(&mut session)
}

/// F09: what the map hides cannot be reached under another name.
#[test]
fn mapped_attribute_names_do_not_collide() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &["--xattrmap", ":map::user.virtiofs.:"])?;
    let mut session = export.mount()?;
    let path = export.inside("witness");
    let on_host = |name: &str| {
        let mut value = [0; 256];
        rustix::fs::getxattr(&path, name, &mut value).map(|len| value[..len].to_vec())
    };
    rustix::fs::setxattr(&path, "user.host-only", b"secret", rustix::fs::XattrFlags::empty())?;
    rustix::fs::setxattr(&path, "trusted.host-only", b"secret", rustix::fs::XattrFlags::empty())?;
    let client = session.client();
    let node = client.lookup(ROOT, "witness")?.nodeid;

    client.setxattr(node, "security.capability", b"\x01\x00\x00\x02forged-value-1234567", 0)?;
    assert!(on_host("security.capability").is_err(), "the DPU gave a file of the host a capability");
    assert!(on_host("user.virtiofs.security.capability").is_ok());
    client.setxattr(node, "trusted.mine", b"v", 0)?;
    assert!(on_host("trusted.mine").is_err());

    for hidden in ["user.host-only", "trusted.host-only"] {
        refusal(&format!("{hidden} of the host is read"), client.getxattr(node, hidden, 64));
    }
    let names = client.listxattr(node, 4096)?;
    let names: Vec<_> = names.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    assert!(!names.iter().any(|name| name.contains("host-only")), "{names:?}");
    assert!(names.contains(&"security.capability".to_owned()), "{names:?}");

    // The mapped name itself, sent by the DPU, is one more name and no way to the one it collides with.
    if client.setxattr(node, "user.virtiofs.security.capability", b"collision", 0).is_ok() {
        let value = client.getxattr(node, "security.capability", 64)?;
        assert_ne!(value, b"collision", "two names of the DPU are one on the host");
    }
    export.check(&mut session)
}

/// Sends MKDIR with any caller and any extension bytes; the count in the header may lie.
fn mkdir_raw(
    session: &mut Session,
    name: &str,
    caller: (u32, u32),
    extension: &[u8],
    units: u16,
) -> anyhow::Result<Option<i32>> {
    let body = [MkdirIn { mode: 0o755, umask: 0 }.as_bytes(), name.as_bytes(), b"\0", extension].concat();
    let mut request = message(Opcode::Mkdir as u32, ROOT, &body, None);
    request[24..28].copy_from_slice(&caller.0.to_ne_bytes());
    request[28..32].copy_from_slice(&caller.1.to_ne_bytes());
    request[36..38].copy_from_slice(&units.to_ne_bytes());
    Ok(Attacker::new(session.client()).exchange(&request, &[40], &[16, 128])?.errno())
}

/// F10: ids and groups at the edges of their ranges.
#[test]
fn impossible_ids_and_groups_are_refused_without_effect() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    assert!(session.client().init_flags() & init::CREATE_SUPP_GROUP != 0, "CREATE_SUPP_GROUP was not taken");
    let inside = Snapshot::of(&export.yard.share())?;

    for caller in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
        let answer = mkdir_raw(&mut session, "no-such-id", caller, &[], 0);
        assert_eq!(export.explain(answer)?, Some(libc::EINVAL), "caller {caller:?}");
    }
    let group = |count: u32, size: u32, kind: u32| -> Vec<u8> {
        [size, kind, count, 4321].into_iter().flat_map(u32::to_ne_bytes).collect()
    };
    let one = group_extension(&[4321]);
    let broken: [(&str, Vec<u8>, u16); 9] = [
        ("a count larger than the list", group(2, 16, EXT_GROUPS), 2),
        ("2^32 - 1 groups", group(u32::MAX, 16, EXT_GROUPS), 2),
        ("a count that wraps", group(0x4000_0001, 16, EXT_GROUPS), 2),
        ("a size of 0", group(1, 0, EXT_GROUPS), 2),
        ("a size below the header", group(1, 7, EXT_GROUPS), 2),
        ("a size beyond the message", group(1, 24, EXT_GROUPS), 2),
        ("an unknown kind", group(1, 16, 77), 2),
        ("groups twice", [one.clone(), one.clone()].concat(), 4),
        ("more extensions than message", one.clone(), u16::MAX),
    ];
    for (what, extension, units) in broken {
        let answer = mkdir_raw(&mut session, "broken", (0, 0), &extension, units);
        assert_eq!(export.explain(answer)?, Some(libc::EINVAL), "{what}");
        assert_eq!(inside.changes()?, [""; 0], "{what}");
    }

    // Owners at the edge: u32::MAX means "leave unchanged" to the system call and must not pass as an id.
    let client = session.client();
    let witness = client.lookup(ROOT, "witness")?.nodeid;
    for valid in [fattr::UID, fattr::GID] {
        let args = SetattrIn { valid, uid: u32::MAX, gid: u32::MAX, ..Default::default() };
        assert_eq!(errno(client.setattr(witness, args)), Errno::INVAL);
    }
    for id in [65_534, u32::MAX - 1] {
        let args = SetattrIn { valid: fattr::UID, uid: id, ..Default::default() };
        client.setattr(witness, args)?;
        assert_eq!(std::fs::metadata(export.inside("witness"))?.uid(), id);
    }
    client.setattr(witness, SetattrIn { valid: fattr::UID, ..Default::default() })?;

    // The well-formed extension gives access through the group, and is gone with its request.
    let grouped = client.mkdir(ROOT, "grouped", 0o775)?.nodeid;
    client.setattr(grouped, SetattrIn { valid: fattr::GID, gid: 4321, ..Default::default() })?;
    client.chmod(grouped, 0o2770)?;
    client.set_caller(Caller { uid: 1000, gid: 1000, pid: 3 });
    let allowed = client.mkdir_with(grouped, "by-group", 0o700, &one);
    let denied = client.mkdir(grouped, "without", 0o700);
    client.set_caller(Caller::ROOT);
    let made = std::fs::metadata(export.inside("grouped/by-group"));
    assert!(allowed.is_ok(), "{allowed:?}");
    assert_eq!((made.as_ref().unwrap().uid(), made.unwrap().gid()), (1000, 4321));
    assert_eq!(errno(denied), Errno::ACCESS, "a supplementary group stayed");
    export.check(&mut session)
}

/// F19: the daemon itself refuses every change of a read-only export.
#[test]
fn a_read_only_export_refuses_every_change() -> anyhow::Result<()> {
    for sandbox in [Sandbox::None, Sandbox::Namespace] {
        let mut export = Export::start(sandbox, &["--readonly", "--xattr"])?;
        let mut session = export.mount()?;
        let client = session.client();
        let witness = client.lookup(ROOT, "witness")?.nodeid;
        let sub = client.lookup(ROOT, "sub")?.nodeid;
        let inside = Snapshot::of(&export.yard.share())?;
        let fh = client.open(witness, libc::O_RDONLY)?.fh;
        let set = |valid| SetattrIn { valid, mode: 0o777, uid: 7, gid: 7, mtime: 7, ..Default::default() };
        let copy = CopyFileRangeIn {
            fh_in: fh,
            nodeid_out: witness,
            fh_out: fh,
            off_out: 100,
            len: 5,
            ..Default::default()
        };
        let rdwr = libc::O_RDWR;
        let refusals: Vec<(&str, Errno)> = vec![
            ("CREATE", errno(client.create(ROOT, "new", rdwr, 0o644))),
            (
                "CREATE of an existing name",
                errno(client.create(ROOT, "witness", rdwr | libc::O_TRUNC, 0o644)),
            ),
            ("MKDIR", errno(client.mkdir(ROOT, "new", 0o755))),
            ("MKNOD", errno(client.mknod(ROOT, "new", libc::S_IFIFO | 0o644, 0))),
            ("SYMLINK", errno(client.symlink(ROOT, "new", "witness"))),
            ("LINK", errno(client.link(witness, ROOT, "new"))),
            ("UNLINK", errno(client.unlink(ROOT, "witness"))),
            ("RMDIR", errno(client.rmdir(ROOT, "sub"))),
            ("RENAME", errno(client.rename(ROOT, "witness", ROOT, "new"))),
            ("RENAME2", errno(client.rename2(ROOT, "witness", ROOT, "new", 1))),
            ("RENAME2 exchanging", errno(client.rename2(ROOT, "witness", ROOT, "sub", 2))),
            ("TMPFILE", errno(client.tmpfile(ROOT, rdwr, 0o600))),
            ("SETATTR mode", errno(client.setattr(witness, set(fattr::MODE)))),
            ("SETATTR owner", errno(client.setattr(witness, set(fattr::UID | fattr::GID)))),
            ("SETATTR size", errno(client.setattr(witness, set(fattr::SIZE)))),
            (
                "SETATTR size by handle",
                errno(client.setattr(witness, SetattrIn { fh, ..set(fattr::SIZE | fattr::FH) })),
            ),
            ("SETATTR times", errno(client.setattr(witness, set(fattr::MTIME)))),
            ("SETATTR times now", errno(client.setattr(witness, set(fattr::ATIME | fattr::ATIME_NOW)))),
            ("SETXATTR", errno(client.setxattr(witness, "user.x", b"v", 0))),
            ("REMOVEXATTR", errno(client.removexattr(witness, "user.x"))),
            ("OPEN for writing", errno(client.open(witness, libc::O_WRONLY))),
            ("OPEN for both", errno(client.open(witness, rdwr))),
            ("OPEN with O_TRUNC", errno(client.open(witness, libc::O_RDONLY | libc::O_TRUNC))),
            ("FALLOCATE", errno(client.fallocate(witness, fh, 0, 4096, 0))),
            ("COPY_FILE_RANGE", errno(client.copy_file_range(witness, copy))),
        ];
        for (what, refusal) in refusals {
            assert_eq!(refusal, Errno::ROFS, "{what}, sandbox {sandbox:?}");
        }
        // There is no handle that could be written through; either answer is right.
        let write = errno(client.write(witness, fh, 0, b"x"));
        assert!([Errno::ROFS, Errno::BADF].contains(&write), "WRITE: {write}");
        assert_eq!(errno(client.access(ROOT, libc::W_OK as u32)), Errno::ROFS);
        assert_eq!(inside.changes()?, [""; 0]);

        assert_eq!(client.read(witness, fh, 0, 64)?, conformance::export::WITNESS);
        let dir = client.opendir(sub)?.fh;
        assert!(!client.read_whole_dir(sub, dir, true)?.is_empty());
        client.releasedir(sub, dir)?;
        client.release(witness, fh)?;
        export.check(&mut session)?;
    }
    Ok(())
}

/// F18: there is no DAX window to map into.
#[test]
fn mapping_requests_are_refused() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let client = session.client();
    let witness = client.lookup(ROOT, "witness")?.nodeid;
    let fh = client.open(witness, libc::O_RDONLY)?.fh;
    for (moffset, len) in [(0, 4096), (u64::MAX, u64::MAX), (1 << 63, 1), (0, 0), (4095, 4096)] {
        let setup = SetupmappingIn { fh, foffset: 0, len, flags: 3, moffset };
        let setup = client.call(&Call::new(Opcode::Setupmapping, witness, &[setup.as_bytes()], 0));
        assert_eq!(errno(setup), Errno::NOSYS);
        for count in [1, 0, u32::MAX] {
            let parts = [
                RemovemappingIn { count }.as_bytes().to_vec(),
                RemovemappingOne { moffset, len }.as_bytes().to_vec(),
            ];
            let args = [parts[0].as_slice(), parts[1].as_slice()];
            let remove = client.call(&Call::new(Opcode::Removemapping, witness, &args, 0));
            assert_eq!(errno(remove), Errno::NOSYS);
        }
    }
    client.release(witness, fh)?;
    export.check(&mut session)
}
