//! Attacks by quantity and by stale references (F11 to F13): limits answer with an error, and all is well afterwards.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::collections::HashSet;

use conformance::answers::refusal;
use conformance::export::{Export, Sandbox, Yard};
use conformance::race::race;
use rustix::io::Errno;
use virtio_driver::fuse::abi::*;
use virtio_driver::fuse::{Call, Client, FuseError, FuseResult, Payload};
use virtio_driver::hostile::{Attacker, message};
use zerocopy::IntoBytes;

/// Limit of open files for daemons that are driven to it.
const FILE_LIMIT: usize = 1_500;

fn yard_with_files(count: usize) -> anyhow::Result<Yard> {
    let yard = Yard::new()?;
    for index in 0..count {
        std::fs::write(yard.share().join(format!("f{index:06}")), b"")?;
    }
    Ok(yard)
}

fn at_the_limit(errno: Option<Errno>) -> bool {
    matches!(errno, Some(Errno::NFILE | Errno::MFILE))
}

/// Repeats an operation that takes a resource until it is refused. Returns what was got.
fn until_refused<T>(most: usize, mut take: impl FnMut() -> FuseResult<T>) -> anyhow::Result<Vec<T>> {
    let mut taken = Vec::new();
    while taken.len() < most {
        match take() {
            Ok(value) => taken.push(value),
            Err(error) if at_the_limit(error.errno()) => return Ok(taken),
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!("{most} were granted with a limit of {FILE_LIMIT} open files")
}

/// F11: open files, then directories, up to the limit; the control plane and other requests go on.
#[test]
fn open_files_end_at_a_limit_and_come_back() -> anyhow::Result<()> {
    let limit = FILE_LIMIT.to_string();
    let mut export = Export::start(Sandbox::None, &["--rlimit-nofile", &limit])?;
    let mut session = export.mount()?;
    for round in 0..2 {
        let client = session.client();
        let witness = client.lookup(ROOT, "witness")?.nodeid;
        let files = until_refused(2 * FILE_LIMIT, || client.open(witness, libc::O_RDONLY))?;
        assert!(files.len() > FILE_LIMIT / 4, "only {} files in round {round}", files.len());
        let dirs = until_refused(2 * FILE_LIMIT, || client.opendir(ROOT))?;
        let created = client.create(ROOT, "one-more", libc::O_RDWR | libc::O_CREAT, 0o644);
        assert!(created.is_err_and(|error| at_the_limit(error.errno())), "CREATE at the limit");

        // What needs no descriptor for long still works.
        assert_eq!(client.read(witness, files[0].fh, 0, 64)?, conformance::export::WITNESS);
        client.getattr(witness, None)?;
        client.statfs(ROOT)?;
        client.mkdir(ROOT, "dir-at-the-limit", 0o755)?;
        client.rmdir(ROOT, "dir-at-the-limit")?;
        session.restart_queue(0)?;
        let region = session.device().plug_memory(1 << 20)?;
        session.device().unplug_memory(&region)?;

        let client = session.client();
        for open in files {
            client.release(witness, open.fh)?;
        }
        for open in dirs {
            client.releasedir(ROOT, open.fh)?;
        }
        client.forget(witness, 1)?;
        let _ = std::fs::remove_file(export.inside("one-more"));
        export.check(&mut session)?;
        export.check_usage()?;
    }
    Ok(())
}

/// F11: looking up far more files than there may be descriptors, without ever forgetting one.
#[test]
fn lookups_without_forget_do_not_exhaust_the_daemon() -> anyhow::Result<()> {
    const FILES: usize = 20_000;
    let limit = FILE_LIMIT.to_string();
    for handles in ["prefer", "never"] {
        let handles = format!("--inode-file-handles={handles}");
        let mut export =
            Export::start_on(yard_with_files(FILES)?, Sandbox::None, &["--rlimit-nofile", &limit, &handles])?;
        let mut session = export.mount()?;
        let client = session.client();
        let mut known = Vec::new();
        let mut refused = 0;
        for index in 0..FILES {
            match client.lookup(ROOT, format!("f{index:06}")) {
                Ok(entry) => known.push((entry.nodeid, entry.attr.ino)),
                Err(error) if at_the_limit(error.errno()) => refused += 1,
                Err(error) => return Err(error.into()),
            }
        }
        assert!(known.len() > FILE_LIMIT / 4, "{handles}: only {} lookups", known.len());
        let nodes: HashSet<u64> = known.iter().map(|(node, _)| *node).collect();
        assert_eq!(nodes.len(), known.len(), "{handles}: two files share a node");
        // Early and late ones are still the files they were.
        for (node, ino) in known.iter().step_by(97) {
            assert_eq!(client.getattr(*node, None)?.attr.ino, *ino, "{handles}");
        }
        assert!(
            export.daemon.open_fds() <= FILE_LIMIT + 100,
            "{handles}: {} descriptors",
            export.daemon.open_fds()
        );
        let client = session.client();
        for (node, _) in &known {
            client.forget(*node, 1)?;
        }
        client.drain_forgets()?;
        assert!(refused == 0 || handles.contains("never"), "{refused} lookups refused with {handles}");
        client.lookup(ROOT, format!("f{:06}", FILES - 1))?;
        client.lookup(ROOT, "f000000")?;
        export.check(&mut session)?;
        export.check_usage()?;
    }
    Ok(())
}

/// F12: a listing at the limit of descriptors leaves no entry out.
#[test]
fn listing_at_the_limit_drops_no_entry() -> anyhow::Result<()> {
    const FILES: usize = 4_000;
    let limit = FILE_LIMIT.to_string();
    let mut export = Export::start_on(yard_with_files(FILES)?, Sandbox::None, &["--rlimit-nofile", &limit])?;
    let mut session = export.mount()?;
    let client = session.client();
    let witness = client.lookup(ROOT, "witness")?.nodeid;
    let dir = client.opendir(ROOT)?.fh;
    let files = until_refused(2 * FILE_LIMIT, || client.open(witness, libc::O_RDONLY))?;
    for plus in [true, false] {
        let entries = client.read_whole_dir(ROOT, dir, plus)?;
        check_complete(&entries.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>(), FILES);
        for node in entries.iter().filter_map(|entry| entry.entry).filter(|entry| entry.nodeid != 0) {
            client.forget(node.nodeid, 1)?;
        }
    }
    for open in files {
        client.release(witness, open.fh)?;
    }
    client.releasedir(ROOT, dir)?;
    client.forget(witness, 1)?;
    export.check(&mut session)?;
    export.check_usage()
}

fn check_complete(names: &[Vec<u8>], files: usize) {
    let unique: HashSet<&Vec<u8>> = names.iter().collect();
    assert_eq!(unique.len(), names.len(), "an entry is listed twice");
    for index in 0..files {
        let name = format!("f{index:06}").into_bytes();
        assert!(unique.contains(&name), "f{index:06} is missing from {} entries", names.len());
    }
}

/// F12: a large directory while the host removes other entries: what stays is listed exactly once.
#[test]
fn a_large_directory_that_shrinks_is_listed_completely() -> anyhow::Result<()> {
    const FILES: usize = 50_000;
    let yard = yard_with_files(FILES)?;
    for index in 0..5_000 {
        std::fs::write(yard.share().join(format!("passing-{index:06}")), b"")?;
    }
    let share = yard.share();
    let mut export = Export::start_on(yard, Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let client = session.client();
    let dir = client.opendir(ROOT)?.fh;
    let mut next = 0;
    let remove = || {
        let _ = std::fs::remove_file(share.join(format!("passing-{next:06}")));
        next = (next + 1) % 5_000;
    };
    let entries = race(vec![Box::new(remove)], || -> FuseResult<Vec<Vec<u8>>> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut offset = 0;
        loop {
            let page = client.readdirplus(ROOT, dir, offset, 64 << 10)?;
            let Some(last) = page.last() else { return Ok(names) };
            offset = last.offset;
            for entry in page {
                if let Some(node) = entry.entry.filter(|entry| entry.nodeid != 0) {
                    client.forget(node.nodeid, 1)?;
                }
                names.push(entry.name);
            }
        }
    });
    let names = export.explain(entries)?;
    check_complete(&names, FILES);
    session.client().releasedir(ROOT, dir)?;
    export.check(&mut session)?;
    export.check_usage()
}

/// F12: offsets that no listing gave out, and many requests on one handle at once.
#[test]
fn wild_offsets_and_parallel_listings_do_no_harm() -> anyhow::Result<()> {
    let mut export = Export::start_on(yard_with_files(500)?, Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let client = session.client();
    let dir = client.opendir(ROOT)?.fh;
    for offset in [1 << 63, u64::MAX, (-1i64) as u64, i64::MAX as u64, 1 << 62, 3, 0xDEAD_BEEF] {
        for plus in [false, true] {
            let answer = if plus {
                client.readdirplus(ROOT, dir, offset, 4096)
            } else {
                client.readdir(ROOT, dir, offset, 4096)
            };
            match answer {
                Ok(_) | Err(FuseError::Errno(_)) => {}
                Err(error) => return export.explain(Err(error)),
            }
        }
    }
    // Eight readers share a handle; each must see a consistent sequence from where it asks.
    let whole = client.read_whole_dir(ROOT, dir, false)?;
    check_complete(&whole.iter().map(|entry| entry.name.clone()).collect::<Vec<_>>(), 500);
    for round in 0..50 {
        let starts: Vec<usize> =
            (0..8).map(|reader| (round * 31 + reader * 59) % (whole.len() - 40)).collect();
        let mut tickets = Vec::new();
        for start in &starts {
            let args = ReadIn { fh: dir, offset: whole[*start].offset, size: 1024, ..Default::default() };
            let parts = [args.as_bytes()];
            let call = Call::new(Opcode::Readdir, ROOT, &parts, 0);
            tickets.push(client.submit(&call.payload(Payload::FromDevice(1024)).variable())?);
        }
        for (ticket, start) in tickets.into_iter().zip(starts) {
            let page = virtio_driver::fuse::dirent::parse(&client.wait(ticket)?.ok()?, false)?;
            let want: Vec<_> = whole[start + 1..].iter().take(page.len()).map(|entry| &entry.name).collect();
            assert_eq!(page.iter().map(|entry| &entry.name).collect::<Vec<_>>(), want, "from entry {start}");
        }
    }
    client.releasedir(ROOT, dir)?;
    export.check(&mut session)
}

/// F13: references that the DPU does not have.
#[test]
fn forgetting_too_much_hurts_nobody_else() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let client = session.client();
    let witness = client.lookup(ROOT, "witness")?.nodeid;
    client.forget(witness, 5)?;
    client.forget(witness, u64::MAX)?;
    client.drain_forgets()?;
    refusal("a forgotten node answers", client.getattr(witness, None));
    refusal("a forgotten node is opened", client.open(witness, libc::O_RDONLY));
    for (node, count) in
        [(ROOT, u64::MAX), (ROOT, 1), (0, 1), (u64::MAX, u64::MAX), (1 << 40, 0), (witness, 0)]
    {
        client.forget(node, count)?;
    }
    client.batch_forget(&[(ROOT, u64::MAX), (u64::MAX, 1), (witness, u64::MAX)])?;
    client.drain_forgets()?;
    export.check(&mut session)?;

    // A batch that counts more than it holds, sent where replies are expected and where they are not.
    let sub = session.client().lookup(ROOT, "sub")?.nodeid;
    for count in [2, 1_000_000, u32::MAX] {
        let body =
            [BatchForgetIn { count, dummy: 0 }.as_bytes(), ForgetOne { nodeid: sub, nlookup: 1 }.as_bytes()]
                .concat();
        let request = message(Opcode::BatchForget as u32, 0, &body, None);
        for room in [&[][..], &[16]] {
            let reply = Attacker::new(session.client()).exchange(&request, &[], room);
            export.explain(reply)?;
        }
    }
    export.check(&mut session)?;
    export.check_usage()
}

/// F13: handles that are closed, belong to another file, or never existed.
#[test]
fn foreign_and_stale_handles_are_refused() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let client = session.client();
    let witness = client.lookup(ROOT, "witness")?.nodeid;
    let inner = client.walk("sub/inner")?.nodeid;
    let sub = client.lookup(ROOT, "sub")?.nodeid;
    let file = client.open(witness, libc::O_RDWR)?.fh;
    let dir = client.opendir(sub)?.fh;

    let refuse = |client: &mut Client, node: u64, fh: u64, what: &str| {
        let badf = Some(Errno::BADF);
        let errnos = [
            ("READ", client.read(node, fh, 0, 16).err().and_then(|error| error.errno())),
            ("WRITE", client.write(node, fh, 0, b"x").err().and_then(|error| error.errno())),
            ("FSYNC", client.fsync(Opcode::Fsync, node, fh, false).err().and_then(|error| error.errno())),
            ("LSEEK", client.lseek(node, fh, 0, 3).err().and_then(|error| error.errno())),
            ("FALLOCATE", client.fallocate(node, fh, 0, 1, 0).err().and_then(|error| error.errno())),
            ("READDIR", client.readdir(node, fh, 0, 512).err().and_then(|error| error.errno())),
        ];
        for (operation, errno) in errnos {
            assert_eq!(errno, badf, "{operation} with {what}");
        }
    };
    for fh in [u64::MAX, 0xDEAD, 1 << 32, file ^ (1 << 63)] {
        refuse(client, witness, fh, &format!("handle {fh:#x}"));
    }
    // Files through the handle of a directory and the other way round.
    let kinds = [Some(Errno::BADF), Some(Errno::ISDIR), Some(Errno::NOTDIR)];
    let read = client.read(sub, dir, 0, 16).unwrap_err().errno();
    assert!(kinds.contains(&read), "READ of a directory handle: {read:?}");
    let listed = client.readdir(witness, file, 0, 512).unwrap_err().errno();
    assert!(kinds.contains(&listed), "READDIR of a file handle: {listed:?}");
    // Refused, or the file is closed: the DPU's own loss.
    let other = client.open(witness, libc::O_RDWR)?.fh;
    if client.releasedir(witness, other).is_ok() {
        refuse(client, witness, other, "a file released as a directory");
    } else {
        client.release(witness, other)?;
    }
    // A handle of another file: refused, or served from the file it belongs to; never a mixture.
    if let Ok(bytes) = client.read(inner, file, 0, 64) {
        assert_eq!(bytes, conformance::export::WITNESS);
    }

    client.release(witness, file)?;
    refuse(client, witness, file, "a released handle");
    for _ in 0..3 {
        assert_eq!(client.release(witness, file).unwrap_err().errno(), Some(Errno::BADF), "second RELEASE");
    }
    client.releasedir(sub, dir)?;
    assert_eq!(client.releasedir(sub, dir).unwrap_err().errno(), Some(Errno::BADF), "second RELEASEDIR");

    // The next open must not be reachable through the old handle.
    let next = client.open(witness, libc::O_RDWR)?.fh;
    if next != file {
        refuse(client, witness, file, "an old handle after a new open");
    }
    client.release(witness, next)?;
    for node in [0, 2, u64::MAX, 1 << 50] {
        if [witness, inner, sub].contains(&node) {
            continue;
        }
        refusal(&format!("node {node:#x} answers"), client.getattr(node, None));
        refusal(&format!("node {node:#x} has children"), client.lookup(node, "witness"));
        refusal(&format!("node {node:#x} grows children"), client.mkdir(node, "child", 0o755));
    }
    export.check(&mut session)?;
    export.check_usage()
}
