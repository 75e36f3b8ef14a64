//! Attacks by name (F01 to F05): whatever a DPU calls a file, nothing outside the export is seen or changed.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use conformance::answers::refusal;
use conformance::export::{CANARY, Export, Sandbox};
use conformance::race::race;
use conformance::snapshot::Snapshot;
use virtio_driver::fuse::abi::*;
use virtio_driver::fuse::{Client, FuseError, SessionOptions};
use virtio_driver::hostile::{Attacker, message};
use virtio_driver::ring::Descriptor;
use zerocopy::{FromBytes, IntoBytes};

/// How long a race is run.
const RACE: Duration = Duration::from_secs(3);

/// Room for the reply to any operation on names.
const REPLY: &[usize] = &[16, 144];

/// A name as it goes over the wire, its final NUL included or left out.
struct Form {
    what: &'static str,
    bytes: Vec<u8>,
    terminated: bool,
    too_long: bool,
}

fn forms(export: &Export) -> Vec<Form> {
    let form = |what, bytes: &[u8]| Form { what, bytes: bytes.to_vec(), terminated: true, too_long: false };
    let absolute = export.yard.outside().join("canary");
    vec![
        form("dot dot", b".."),
        form("dot", b"."),
        form("empty", b""),
        form("with a slash", b"../outside/canary"),
        form("with a slash inside the export", b"sub/inner"),
        form("with a trailing slash", b"sub/"),
        form("absolute", absolute.as_os_str().as_encoded_bytes()),
        form("inner NUL", b"witness\0x"),
        Form { terminated: false, ..form("no final NUL", b"witness") },
        Form { too_long: true, ..form("256 bytes", &[b'n'; 256]) },
        Form { too_long: true, ..form("4,000 bytes", &[b'n'; 4000]) },
    ]
}

/// An operation that takes a name, given what stands before and behind the name.
type Operation = (&'static str, Opcode, Vec<u8>, Vec<u8>);

fn operations(witness: u64) -> Vec<Operation> {
    let create =
        CreateIn { flags: (libc::O_RDWR | libc::O_CREAT) as u32, mode: 0o100_644, umask: 0, open_flags: 0 };
    let rename = RenameIn { newdir: ROOT };
    let rename2 = Rename2In { newdir: ROOT, ..Default::default() };
    let op = |what, opcode, before: &[u8], behind: &[u8]| (what, opcode, before.to_vec(), behind.to_vec());
    let with_name = |head: &[u8], name: &[u8]| [head, name].concat();
    vec![
        op("LOOKUP", Opcode::Lookup, b"", b""),
        op("CREATE", Opcode::Create, create.as_bytes(), b""),
        op(
            "TRUNCATING CREATE",
            Opcode::Create,
            CreateIn { flags: create.flags | libc::O_TRUNC as u32, ..create }.as_bytes(),
            b"",
        ),
        op("MKDIR", Opcode::Mkdir, MkdirIn { mode: 0o755, umask: 0 }.as_bytes(), b""),
        op("MKNOD", Opcode::Mknod, MknodIn { mode: 0o100_644, ..Default::default() }.as_bytes(), b""),
        op("SYMLINK", Opcode::Symlink, b"", b"target\0"),
        op("LINK", Opcode::Link, LinkIn { oldnodeid: witness }.as_bytes(), b""),
        op("UNLINK", Opcode::Unlink, b"", b""),
        op("RMDIR", Opcode::Rmdir, b"", b""),
        op("RENAME from", Opcode::Rename, rename.as_bytes(), b"new\0"),
        op("RENAME to", Opcode::Rename, &with_name(rename.as_bytes(), b"witness\0"), b""),
        op("RENAME2 from", Opcode::Rename2, rename2.as_bytes(), b"new\0"),
        op("RENAME2 to", Opcode::Rename2, &with_name(rename2.as_bytes(), b"witness\0"), b""),
        op(
            "RENAME2 exchanging",
            Opcode::Rename2,
            &with_name(Rename2In { flags: 2, ..rename2 }.as_bytes(), b"witness\0"),
            b"",
        ),
    ]
}

/// F01: every operation with every form, in every sandbox.
#[test]
fn names_that_are_no_component_are_refused_without_effect() -> anyhow::Result<()> {
    for sandbox in Sandbox::ALL {
        let mut export = Export::start(sandbox, &[])?;
        let mut session = export.mount()?;
        let witness = session.client().lookup(ROOT, "witness")?.nodeid;
        let inside = Snapshot::of(&export.yard.share())?;
        for form in forms(&export) {
            for (what, opcode, before, behind) in operations(witness) {
                let mut body = [&before, form.bytes.as_slice(), b"\0", &behind].concat();
                if !form.terminated {
                    body = [&before, form.bytes.as_slice()].concat();
                }
                let case = format!("{what} with a name {}, sandbox {sandbox:?}", form.what);
                let reply = {
                    let mut attacker = Attacker::new(session.client());
                    let request = message(opcode as u32, ROOT, &body, None);
                    let reply = attacker.exchange(&request, &[40], REPLY);
                    export.explain(reply).map_err(|error| error.context(case.clone()))?
                };
                let want = if form.too_long { libc::ENAMETOOLONG } else { libc::EINVAL };
                assert_eq!(reply.errno(), Some(want), "{case}");
                assert_eq!(inside.changes()?, [""; 0], "{case}");
            }
        }
        export.check(&mut session)?;
        export.check_usage()?;
    }
    Ok(())
}

/// F01: names of extended attributes may hold a slash, nothing else of the above.
#[test]
fn malformed_attribute_names_are_refused() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &["--xattr"])?;
    let mut session = export.mount()?;
    let witness = session.client().lookup(ROOT, "witness")?.nodeid;
    let inside = Snapshot::of(&export.yard.share())?;
    let names: [(&[u8], &str, i32); 4] = [
        (b"\0", "empty", libc::EINVAL),
        (b"user.x", "no final NUL", libc::EINVAL),
        (b"", "no name at all", libc::EINVAL),
        (&[&[b'u'; 256], b"\0".as_slice()].concat(), "256 bytes", libc::ENAMETOOLONG),
    ];
    let set = SetxattrIn { size: 0, ..Default::default() };
    let get = GetxattrIn { size: 64, padding: 0 };
    let operations: [(Opcode, &[u8]); 3] =
        [(Opcode::Setxattr, set.as_bytes()), (Opcode::Getxattr, get.as_bytes()), (Opcode::Removexattr, b"")];
    for (name, what, want) in names {
        for (opcode, head) in operations {
            let request = message(opcode as u32, witness, &[head, name].concat(), None);
            let reply = Attacker::new(session.client()).exchange(&request, &[40], REPLY);
            let reply = export.explain(reply)?;
            assert_eq!(reply.errno(), Some(want), "{opcode:?} with a name {what}");
        }
    }
    session.client().setxattr(witness, "user.a/b", b"fine", 0)?;
    session.client().removexattr(witness, "user.a/b")?;
    assert_eq!(inside.changes()?, [""; 0]);
    export.check(&mut session)
}

/// F02 and F04: a directory that the host moves out of the export takes no DPU along.
#[test]
fn a_directory_moved_out_of_the_export_leads_nowhere() -> anyhow::Result<()> {
    for sandbox in Sandbox::ALL {
        let mut export = Export::start(sandbox, &[])?;
        let mut session = export.mount()?;
        let client = session.client();
        let dir = client.mkdir(ROOT, "leaving", 0o755)?.nodeid;
        let child = client.mkdir(dir, "child", 0o755)?.nodeid;
        let handle = client.opendir(dir)?.fh;
        let away = export.yard.outside().with_file_name("away");
        std::fs::rename(export.inside("leaving"), &away)?;
        std::fs::write(away.with_file_name("beside"), b"beside")?;
        for node in [ROOT, dir, child] {
            let up = session.client().lookup(node, "..");
            assert!(matches!(up, Err(FuseError::Errno(rustix::io::Errno::INVAL))), "LOOKUP ..: {up:?}");
        }
        // What is asked of the moved directory itself is answered or refused, but never reaches its new neighbours.
        let client = session.client();
        let listed = client.read_whole_dir(dir, handle, true).unwrap_or_default();
        let names: Vec<_> = listed.iter().map(|entry| String::from_utf8_lossy(&entry.name)).collect();
        assert!(!names.iter().any(|name| name == "beside" || name == "outside"), "{names:?}");
        for entry in listed.iter().filter(|entry| entry.name == b"..") {
            let foreign = entry.entry.filter(|entry| entry.nodeid != 0);
            assert!(foreign.is_none_or(|entry| [ROOT, dir].contains(&entry.nodeid)), "{foreign:?}");
        }
        for name in ["beside", "outside", "canary"] {
            refusal(&format!("{name} is seen"), session.client().lookup(dir, name));
        }
        export.check(&mut session)?;
    }
    Ok(())
}

/// Reads whatever `sub/flip/canary` is, step by step as a DPU's kernel walks.
fn walk_to_the_canary(client: &mut Client) -> Option<Vec<u8>> {
    let flip = client.lookup(ROOT, "flip").ok()?;
    let file = client.lookup(flip.nodeid, "canary").ok()?;
    let open = client.open(file.nodeid, libc::O_RDONLY).ok()?;
    let content = client.read(file.nodeid, open.fh, 0, 64).ok();
    let _ = client.release(file.nodeid, open.fh);
    let _ = client.forget(file.nodeid, 1);
    let _ = client.forget(flip.nodeid, 1);
    content
}

/// F03: the host and another queue of the DPU exchange a directory with a symlink during the walk.
#[test]
fn a_symlink_swapped_in_during_a_walk_is_not_followed() -> anyhow::Result<()> {
    for sandbox in [Sandbox::None, Sandbox::Namespace] {
        let mut export = Export::start(sandbox, &[])?;
        let (share, outside) = (export.yard.share(), export.yard.outside());
        std::fs::create_dir(share.join("flip"))?;
        std::fs::write(share.join("flip/canary"), b"a tame bird")?;
        symlink(&outside, share.join("flop"))?;
        let options = SessionOptions { request_queues: 2, ..Default::default() };
        let mut session = export.mount_with(options)?;
        let mut walks = 0u64;
        let (walker, racer) = session.clients().split_at_mut(1);
        let exchange_on_the_host = || {
            let (flip, flop) = (share.join("flip"), share.join("flop"));
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            let _ = rustix::fs::renameat_with(rustix::fs::CWD, &flip, rustix::fs::CWD, &flop, exchange);
        };
        let exchange_on_the_dpu = || drop(racer[0].rename2(ROOT, "flip", ROOT, "flop", 2));
        let escaped = race(vec![Box::new(exchange_on_the_host), Box::new(exchange_on_the_dpu)], || {
            let start = Instant::now();
            while start.elapsed() < RACE / 2 {
                walks += 1;
                if walk_to_the_canary(&mut walker[0]).is_some_and(|content| content == CANARY) {
                    return Some(walks);
                }
            }
            None
        });
        assert_eq!(escaped, None, "the walk left the export, sandbox {sandbox:?}");
        assert!(walks > 100, "only {walks} walks");
        export.check(&mut session)?;
    }
    Ok(())
}

/// F05: what a symlink points to is the DPU's business; the daemon works on the link.
#[test]
fn symlinks_are_never_followed_on_the_host() -> anyhow::Result<()> {
    for sandbox in [Sandbox::None, Sandbox::Namespace] {
        let mut export = Export::start(sandbox, &["--xattr"])?;
        let canary = export.yard.outside().join("canary");
        let targets = [
            canary.to_str().unwrap().to_owned(),
            "../outside/canary".to_owned(),
            "/etc/passwd".to_owned(),
            "/proc/self/fd/0".to_owned(),
            "/proc/self/fd/3".to_owned(),
            "/proc/self/root".to_owned(),
            "/proc/self/cwd".to_owned(),
            "witness".to_owned(),
        ];
        let mut session = export.mount()?;
        for target in &targets {
            let client = session.client();
            let link = client.symlink(ROOT, "link", target)?.nodeid;
            let case = format!("through a symlink to {target}, sandbox {sandbox:?}");
            for flags in [
                libc::O_RDONLY,
                libc::O_RDWR,
                libc::O_WRONLY | libc::O_TRUNC,
                libc::O_RDWR | libc::O_CREAT,
                libc::O_PATH,
                libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_PATH,
                libc::O_DIRECTORY,
            ] {
                let opened = client.open(link, flags);
                refusal(&format!("OPEN {flags:#x} {case}: {opened:?}"), opened);
            }
            refusal(&format!("OPENDIR {case}"), client.opendir(link));
            refusal(&format!("TRUNCATE {case}"), client.truncate(link, 0));
            refusal(&format!("LOOKUP {case}"), client.lookup(link, "canary"));
            refusal(&format!("CREATE {case}"), client.create(link, "born", libc::O_RDWR, 0o644));
            refusal(&format!("SETXATTR {case}"), client.setxattr(link, "user.mark", b"x", 0));
            // These may act on the link itself, never on what it points to.
            let _ = client.chmod(link, 0o777);
            let _ = client.setattr(link, SetattrIn { valid: fattr::UID, uid: 4321, ..Default::default() });
            let _ = client.setattr(link, SetattrIn { valid: fattr::MTIME, mtime: 1, ..Default::default() });
            assert_eq!(client.readlink(link)?, target.as_bytes());
            client.unlink(ROOT, "link")?;
            let passwd = std::fs::metadata("/etc/passwd")?;
            assert_eq!(std::os::unix::fs::MetadataExt::uid(&passwd), 0);
            assert_eq!(std::fs::read(export.inside("witness"))?, conformance::export::WITNESS);
            export.check(&mut session)?;
        }
    }
    Ok(())
}

/// F17: the name changes in memory after the daemon has looked at it. One copy decides.
#[test]
fn a_name_that_changes_while_it_is_checked_is_one_name() -> anyhow::Result<()> {
    const GOOD: &[u8; 18] = b"nothing-here-abcd\0";
    const EVIL: &[u8; 18] = b"../outside/canary\0";
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount_polling()?;
    let mut rounds = 0u32;
    {
        let mut attacker = Attacker::new(session.client());
        let header = attacker.buffer(&message(Opcode::Unlink as u32, ROOT, GOOD, None)[..40])?;
        let name = attacker.buffer(GOOD)?;
        let reply = attacker.reply_buffer(16)?;
        let swap = || {
            name.write(0, EVIL);
            name.write(0, GOOD);
        };
        let outcome = race(vec![Box::new(swap)], || -> anyhow::Result<()> {
            let start = Instant::now();
            while start.elapsed() < RACE / 2 {
                attacker.submit(&[
                    Descriptor::readable(header.gpa(), 40),
                    Descriptor::readable(name.gpa(), GOOD.len()),
                    Descriptor::writable(reply.gpa(), 16),
                ])?;
                let used = attacker.wait()?;
                assert_eq!(used.len, 16);
                let out = OutHeader::read_from_bytes(&reply.to_vec(0, 16)).unwrap();
                assert!([-libc::ENOENT, -libc::EINVAL].contains(&out.error), "{out:?}");
                rounds += 1;
            }
            Ok(())
        });
        export.explain(outcome)?;
    }
    assert!(rounds > 100, "only {rounds} rounds");
    export.check(&mut session)
}
