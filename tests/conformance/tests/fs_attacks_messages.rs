//! Attacks by malformed messages and buffers (F14 to F17): each is answered or dropped, each chain comes back exactly
//! once, and the daemon goes on.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::time::{Duration, Instant};

use conformance::answers::refusal;
use conformance::export::{Export, Sandbox, WITNESS};
use conformance::race::race;
use conformance::snapshot::Snapshot;
use virtio_driver::fuse::abi::*;
use virtio_driver::fuse::{Client, DpuKernel, Session, SessionOptions};
use virtio_driver::hostile::{Attacker, RawReply, message};
use virtio_driver::ring::Descriptor;
use zerocopy::{FromBytes, IntoBytes};

/// Sends raw bytes; the chain must come back within the limit, exactly once.
fn exchange(
    export: &mut Export,
    session: &mut Session,
    case: &str,
    request: &[u8],
    replies: &[usize],
) -> anyhow::Result<RawReply> {
    let reply = Attacker::new(session.client()).exchange(request, &[40], replies);
    export.explain(reply).map_err(|error| error.context(case.to_owned()))
}

/// A dropped or refused message: no reply at all, or one with an error.
fn assert_refused(reply: &RawReply, case: &str) {
    if reply.used_len > 0 {
        let header = reply.header().unwrap_or_else(|| panic!("{case}: {} bytes of reply", reply.used_len));
        assert!(header.error < 0 && header.len == 16, "{case}: {header:?}");
        assert_eq!(reply.used_len, 16, "{case}");
    }
}

/// F14: the header lies about the length, or there is no whole header.
#[test]
fn headers_that_lie_are_answered_with_an_error() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let whole = message(Opcode::Lookup as u32, ROOT, b"witness\0", None);
    for len in 0..40 {
        let case = format!("a message of {len} bytes");
        let reply = exchange(&mut export, &mut session, &case, &whole[..len], &[16, 128])?;
        assert_refused(&reply, &case);
    }
    for claimed in [0, 1, 39, 40, 47, 49, 1 << 20, (1 << 20) + 4096, 1 << 31, u32::MAX] {
        let case = format!("a header that says {claimed} bytes");
        let request = message(Opcode::Lookup as u32, ROOT, b"witness\0", Some(claimed));
        let reply = exchange(&mut export, &mut session, &case, &request, &[16, 128])?;
        assert_refused(&reply, &case);
    }
    for opcode in [0, 7, 19, 53, 54, 99, 4096, 1 << 20, 26 << 24, u32::MAX] {
        let case = format!("operation {opcode}");
        let request = message(opcode, ROOT, &[0; 64], None);
        let reply = exchange(&mut export, &mut session, &case, &request, &[16, 128])?;
        if reply.used_len > 0 {
            // 53 and up may be operations of newer kernels.
            let errno = reply.errno().unwrap();
            assert!(errno == libc::ENOSYS || (53..60).contains(&opcode) && errno > 0, "{case}: {errno}");
        }
    }
    export.check(&mut session)
}

/// F14: every operation with its arguments cut short at every length.
#[test]
fn arguments_cut_short_are_refused_without_effect() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &["--xattr"])?;
    let mut session = export.mount()?;
    let inside = Snapshot::of(&export.yard.share())?;
    let operations = [
        (Opcode::Lookup, b"witness\0".to_vec()),
        (
            Opcode::Setattr,
            SetattrIn { valid: fattr::MODE, mode: 0o777, ..Default::default() }.as_bytes().to_vec(),
        ),
        (Opcode::Symlink, b"new\0target\0".to_vec()),
        (Opcode::Mknod, [MknodIn { mode: 0o100_644, ..Default::default() }.as_bytes(), b"new\0"].concat()),
        (Opcode::Mkdir, [MkdirIn { mode: 0o755, umask: 0 }.as_bytes(), b"new\0"].concat()),
        (Opcode::Unlink, b"witness\0".to_vec()),
        (Opcode::Rename, [RenameIn { newdir: ROOT }.as_bytes(), b"witness\0new\0"].concat()),
        (
            Opcode::Rename2,
            [Rename2In { newdir: ROOT, ..Default::default() }.as_bytes(), b"witness\0new\0"].concat(),
        ),
        (
            Opcode::Create,
            [CreateIn { flags: 0o102, mode: 0o644, ..Default::default() }.as_bytes(), b"new\0"].concat(),
        ),
        (
            Opcode::Setxattr,
            [SetxattrIn { size: 5, ..Default::default() }.as_bytes(), b"user.x\0value"].concat(),
        ),
        (Opcode::Removexattr, b"user.x\0".to_vec()),
        (Opcode::Open, OpenIn::default().as_bytes().to_vec()),
        (Opcode::Read, ReadIn::default().as_bytes().to_vec()),
        (Opcode::Write, WriteIn::default().as_bytes().to_vec()),
        (Opcode::Getlk, LkIn::default().as_bytes().to_vec()),
        (Opcode::Fallocate, FallocateIn::default().as_bytes().to_vec()),
        (Opcode::CopyFileRange, CopyFileRangeIn::default().as_bytes().to_vec()),
        (Opcode::Lseek, LseekIn::default().as_bytes().to_vec()),
        (
            Opcode::Tmpfile,
            [CreateIn { flags: 0o2, mode: 0o644, ..Default::default() }.as_bytes(), b"/\0"].concat(),
        ),
        (Opcode::Statx, StatxIn::default().as_bytes().to_vec()),
    ];
    for (opcode, body) in operations {
        for len in 0..body.len() {
            let case = format!("{opcode:?} with {len} of {} bytes", body.len());
            let request = message(opcode as u32, ROOT, &body[..len], None);
            let reply = exchange(&mut export, &mut session, &case, &request, &[16, 288])?;
            assert_refused(&reply, &case);
        }
        assert_eq!(inside.changes()?, [""; 0], "{opcode:?} cut short");
    }
    export.check(&mut session)
}

/// F14: order of INIT, other requests and DESTROY.
#[test]
fn requests_outside_a_session_are_refused() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let stream = export.daemon.connect()?;
    let mut session = Session::connect(stream, SessionOptions::default())?;
    for opcode in [Opcode::Lookup, Opcode::Getattr, Opcode::Statfs, Opcode::Destroy, Opcode::Opendir] {
        let case = format!("{opcode:?} before INIT");
        let body = if opcode == Opcode::Lookup { b"witness\0".to_vec() } else { vec![0; 16] };
        let request = message(opcode as u32, ROOT, &body, None);
        let reply = exchange(&mut export, &mut session, &case, &request, &[16, 128])?;
        if opcode != Opcode::Destroy {
            assert_ne!(reply.errno(), Some(0), "{case}");
        }
    }
    let strange = [(6, 41), (0, 0), (7, 0), (7, 5), (7, 22), (8, 0), (u32::MAX, u32::MAX), (7, u32::MAX)];
    for (major, minor) in strange {
        let case = format!("INIT {major}.{minor}");
        let init = InitIn { major, minor, flags: u32::MAX, flags2: u32::MAX, ..DpuKernel::V6_12.init() };
        let request = message(Opcode::Init as u32, 0, init.as_bytes(), None);
        let reply = exchange(&mut export, &mut session, &case, &request, &[16, 64])?;
        if major != 7 && reply.errno() == Some(0) {
            // A newer kernel is told which major version is spoken here, and asks again.
            let out = InitOut::read_from_bytes(&reply.bytes[16..]).unwrap();
            assert_eq!(out.major, 7, "{case}");
        }
    }
    for len in [0, 4, 7, 8, 16, 20, 63] {
        let init = DpuKernel::V6_12.init();
        let request = message(Opcode::Init as u32, 0, &init.as_bytes()[..len], None);
        exchange(&mut export, &mut session, &format!("INIT of {len} bytes"), &request, &[16, 64])?;
    }
    for _ in 0..3 {
        session.initialise(DpuKernel::V6_12.init())?;
        export.check(&mut session)?;
    }
    session.client().destroy()?;
    let request = message(Opcode::Getattr as u32, ROOT, &[0; 16], None);
    let reply = exchange(&mut export, &mut session, "GETATTR after DESTROY", &request, &[16, 104])?;
    assert_ne!(reply.errno(), Some(0), "a destroyed session answers");
    session.initialise(DpuKernel::V6_1.init())?;
    export.check(&mut session)?;
    export.check_usage()
}

/// A session with an open file.
fn with_open_file(export: &mut Export) -> anyhow::Result<(Session, u64, u64)> {
    let mut session = export.mount()?;
    let node = session.client().lookup(ROOT, "witness")?.nodeid;
    let fh = session.client().open(node, libc::O_RDWR)?.fh;
    Ok((session, node, fh))
}

/// F15: sizes far beyond any buffer are capped or refused, and nothing that large is allocated.
#[test]
fn huge_sizes_are_capped_or_refused() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &["--xattr"])?;
    let (mut session, node, fh) = with_open_file(&mut export)?;
    let inside = Snapshot::of(&export.yard.share())?;
    let dir = session.client().opendir(ROOT)?.fh;
    for size in [1 << 20, (1 << 20) + 1, 1 << 30, 1 << 31, u32::MAX] {
        let read = ReadIn { fh, size, ..Default::default() };
        let case = format!("READ of {size} bytes into 100");
        let request = message(Opcode::Read as u32, node, read.as_bytes(), None);
        let reply = exchange(&mut export, &mut session, &case, &request, &[16, 100])?;
        match reply.errno() {
            Some(0) => assert_eq!(&reply.bytes[16..reply.used_len as usize], WITNESS, "{case}"),
            errno => assert_eq!(errno, Some(libc::EINVAL), "{case}"),
        }
        for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
            let case = format!("{opcode:?} of {size} bytes into 600");
            let args = ReadIn { fh: dir, size, ..Default::default() };
            let request = message(opcode as u32, ROOT, args.as_bytes(), None);
            let reply = exchange(&mut export, &mut session, &case, &request, &[16, 600])?;
            assert!([Some(0), Some(libc::EINVAL)].contains(&reply.errno()), "{case}: {:?}", reply.errno());
        }
        for (opcode, name) in [(Opcode::Getxattr, &b"user.none\0"[..]), (Opcode::Listxattr, b"")] {
            let case = format!("{opcode:?} of {size} bytes into 64");
            let body = [GetxattrIn { size, padding: 0 }.as_bytes(), name].concat();
            let request = message(opcode as u32, node, &body, None);
            exchange(&mut export, &mut session, &case, &request, &[16, 64])?;
        }
        for payload in [0, 1, 4096] {
            let case = format!("WRITE that says {size} bytes and brings {payload}");
            let write = WriteIn { fh, size, ..Default::default() };
            let body = [write.as_bytes(), &vec![b'!'; payload]].concat();
            let request = message(Opcode::Write as u32, node, &body, None);
            let reply = exchange(&mut export, &mut session, &case, &request, &[16, 8])?;
            assert_ne!(reply.errno(), Some(0), "{case}");
            let case = format!("SETXATTR that says {size} bytes and brings {payload}");
            let set = SetxattrIn { size, ..Default::default() };
            let body = [set.as_bytes(), b"user.big\0", &vec![b'!'; payload]].concat();
            let request = message(Opcode::Setxattr as u32, node, &body, None);
            let reply = exchange(&mut export, &mut session, &case, &request, &[16])?;
            assert_ne!(reply.errno(), Some(0), "{case}");
        }
    }
    // Fewer bytes than the payload has: refused, or exactly those.
    let write = WriteIn { fh, size: 3, offset: 100, ..Default::default() };
    let body = [write.as_bytes(), &[b'!'; 200]].concat();
    let request = message(Opcode::Write as u32, node, &body, None);
    let reply = exchange(&mut export, &mut session, "WRITE of less than its payload", &request, &[16, 8])?;
    if reply.errno() == Some(0) {
        assert_eq!(std::fs::metadata(export.inside("witness"))?.len(), 103);
        std::fs::write(export.inside("witness"), WITNESS)?;
    } else {
        assert_eq!(inside.changes()?, [""; 0]);
    }
    export.check_memory()?;
    export.check(&mut session)
}

/// F15: sums that overflow.
#[test]
fn overflowing_ranges_are_refused() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let (mut session, node, fh) = with_open_file(&mut export)?;
    let client = session.client();
    const MAX: u64 = i64::MAX as u64;
    for (offset, len) in
        [(MAX, 1), (1, MAX), (u64::MAX, 1), (0, u64::MAX), (1 << 63, 1 << 63), (u64::MAX, u64::MAX)]
    {
        refusal(&format!("FALLOCATE {offset:#x}+{len:#x}"), client.fallocate(node, fh, offset, len, 0));
        let copy = CopyFileRangeIn {
            fh_in: fh,
            off_in: offset,
            nodeid_out: node,
            fh_out: fh,
            off_out: offset,
            len,
            flags: 0,
        };
        match client.copy_file_range(node, copy) {
            Ok(0) => {} // Beyond the end there is nothing to copy.
            other => drop(refusal(&format!("COPY_FILE_RANGE {offset:#x}+{len:#x}"), other)),
        }
    }
    for offset in [MAX + 1, u64::MAX, 1 << 63] {
        refusal(&format!("READ at {offset:#x}"), client.read(node, fh, offset, 16));
        refusal(&format!("WRITE at {offset:#x}"), client.write(node, fh, offset, b"x"));
        for whence in [libc::SEEK_DATA, libc::SEEK_HOLE] {
            refusal(&format!("LSEEK to {offset:#x}"), client.lseek(node, fh, offset, whence as u32));
        }
        refusal(&format!("SETATTR to {offset:#x} bytes"), client.truncate(node, offset));
    }
    refusal("WRITE over the end of all offsets", client.write(node, fh, MAX, b"xx"));
    refusal("LSEEK with an unknown whence", client.lseek(node, fh, 0, 77));
    refusal("FALLOCATE with all modes", client.fallocate(node, fh, 0, 1, u32::MAX));
    assert_eq!(std::fs::read(export.inside("witness"))?, WITNESS);
    export.check(&mut session)
}

/// F16: too little or no room for the reply, or nothing but room. Nothing may happen that could not be told.
#[test]
fn buffers_too_small_for_the_reply_lose_the_reply_only() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount()?;
    let inside = Snapshot::of(&export.yard.share())?;
    let mkdir = [MkdirIn { mode: 0o755, umask: 0 }.as_bytes(), b"untold\0"].concat();
    let create =
        [CreateIn { flags: 0o102, mode: 0o100_644, ..Default::default() }.as_bytes(), b"untold\0"].concat();
    let requests = [
        ("GETATTR", message(Opcode::Getattr as u32, ROOT, &[0; 16], None)),
        ("LOOKUP", message(Opcode::Lookup as u32, ROOT, b"witness\0", None)),
        ("MKDIR", message(Opcode::Mkdir as u32, ROOT, &mkdir, None)),
        ("CREATE", message(Opcode::Create as u32, ROOT, &create, None)),
        ("STATFS", message(Opcode::Statfs as u32, ROOT, &[], None)),
        ("OPENDIR", message(Opcode::Opendir as u32, ROOT, &[0; 8], None)),
    ];
    let rooms: [&[usize]; 9] = [&[], &[1], &[15], &[16], &[17], &[16, 1], &[8, 8], &[1, 1, 1], &[16, 15]];
    for (what, request) in &requests {
        for room in rooms {
            let case = format!("{what} with room {room:?}");
            let reply = exchange(&mut export, &mut session, &case, request, room)?;
            let total: usize = room.iter().sum();
            assert!(reply.used_len as usize <= total, "{case}: {} bytes used", reply.used_len);
            assert_refused(&reply, &case);
        }
        assert_eq!(inside.changes()?, [""; 0], "{what} had an effect that nobody was told");
    }
    // Nothing to read, only room; nothing at all but one byte of room.
    for room in [&[16, 128][..], &[1], &[4096]] {
        let case = format!("no message and room {room:?}");
        let reply = exchange(&mut export, &mut session, &case, &[], room)?;
        assert_eq!(reply.used_len, 0, "{case}");
    }
    export.check(&mut session)?;
    export.check_usage()
}

/// F17: payload and message cut into a thousand pieces.
#[test]
fn a_message_in_a_thousand_pieces_is_one_message() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let (mut session, node, fh) = with_open_file(&mut export)?;

    let data: Vec<u8> = (0..900u32).map(|index| (index % 251) as u8).collect();
    let write = WriteIn { fh, size: data.len() as u32, ..Default::default() };
    let body = [write.as_bytes(), &data].concat();
    let request = message(Opcode::Write as u32, node, &body, None);
    let cuts: Vec<usize> = (1..request.len()).collect();
    let reply = Attacker::new(session.client()).exchange(&request, &cuts, &[1; 24]);
    let reply = export.explain(reply)?;
    assert_eq!((reply.errno(), reply.used_len), (Some(0), 24), "WRITE of single bytes");
    assert_eq!(std::fs::read(export.inside("witness"))?, data);

    let read = ReadIn { fh, size: 900, ..Default::default() };
    let request = message(Opcode::Read as u32, node, read.as_bytes(), None);
    let room = vec![1; 916];
    let reply = Attacker::new(session.client()).exchange(&request, &[1, 2, 39, 41, 50], &room);
    let reply = export.explain(reply)?;
    assert_eq!((reply.errno(), reply.used_len), (Some(0), 916), "READ into single bytes");
    assert_eq!(&reply.bytes[16..], data);

    let lookup = message(Opcode::Lookup as u32, ROOT, b"sub\0", None);
    let cuts: Vec<usize> = (1..lookup.len()).collect();
    let reply = Attacker::new(session.client()).exchange(&lookup, &cuts, &[1; 144]);
    assert_eq!(export.explain(reply)?.errno(), Some(0), "LOOKUP of single bytes");
    std::fs::write(export.inside("witness"), WITNESS)?;
    export.check(&mut session)
}

/// F17: the reply lands on the request that is being served.
#[test]
fn replies_over_their_own_request_do_no_harm() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let (mut session, node, fh) = with_open_file(&mut export)?;
    let read = ReadIn { fh, size: 4096, ..Default::default() };
    let requests = [
        message(Opcode::Read as u32, node, read.as_bytes(), None),
        message(Opcode::Getattr as u32, ROOT, &[0; 16], None),
        message(Opcode::Lookup as u32, ROOT, b"witness\0", None),
    ];
    for request in requests {
        for offset in [0, 8, 16, 40] {
            let mut attacker = Attacker::new(session.client());
            let buffer = attacker.buffer(&[request.as_slice(), &[0; 4200]].concat())?;
            attacker.submit(&[
                Descriptor::readable(buffer.gpa(), request.len()),
                Descriptor::writable(buffer.gpa() + offset, 16),
                Descriptor::writable(buffer.gpa() + offset + 4, 4096),
            ])?;
            let used = attacker.wait();
            export.explain(used)?;
        }
    }
    export.check(&mut session)
}

/// F17: header and arguments change while the request is served.
#[test]
fn a_request_that_changes_under_way_is_served_as_one_of_its_versions() -> anyhow::Result<()> {
    let mut export = Export::start(Sandbox::None, &[])?;
    let mut session = export.mount_polling()?;
    let client: &mut Client = session.client();
    let node = client.lookup(ROOT, "witness")?.nodeid;
    let fh = client.open(node, libc::O_RDWR)?.fh;
    let harmless = {
        let read = ReadIn { fh, size: 8, ..Default::default() };
        message(Opcode::Read as u32, node, read.as_bytes(), None)
    };
    let huge = {
        let read = ReadIn { fh: u64::MAX, offset: u64::MAX, size: u32::MAX, ..Default::default() };
        message(Opcode::Read as u32, u64::MAX, read.as_bytes(), Some(u32::MAX))
    };
    let mut rounds = 0u32;
    {
        let mut attacker = Attacker::new(client);
        let request = attacker.buffer(&harmless)?;
        let reply = attacker.reply_buffer(64)?;
        let swap = || {
            request.write(0, &huge);
            request.write(0, &harmless);
        };
        let outcome = race(vec![Box::new(swap)], || -> anyhow::Result<()> {
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(1500) {
                attacker.submit(&[
                    Descriptor::readable(request.gpa(), harmless.len()),
                    Descriptor::writable(reply.gpa(), 16),
                    Descriptor::writable(reply.gpa() + 16, 8),
                ])?;
                let used = attacker.wait()?;
                assert!(used.len <= 24, "{used:?}");
                rounds += 1;
            }
            Ok(())
        });
        export.explain(outcome)?;
    }
    assert!(rounds > 100, "only {rounds} rounds");
    export.check(&mut session)?;
    export.check_memory()
}

/// Random bytes as messages: none ends the daemon, each comes back once.
#[test]
fn random_messages_are_answered_or_dropped() -> anyhow::Result<()> {
    const MESSAGES: u64 = 20_000;
    let mut export = Export::start(Sandbox::Namespace, &["--xattr"])?;
    let mut session = export.mount_polling()?;
    let mut state = 0x0123_4567_89AB_CDEFu64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for number in 0..MESSAGES {
        let len = (random() % 200) as usize;
        let mut request: Vec<u8> = (0..len).map(|_| random() as u8).collect();
        if len >= 40 && number % 4 != 0 {
            // A header that gets past the first checks.
            let opcode = (random() % 54) as u32;
            if opcode == Opcode::Destroy as u32 || opcode == Opcode::Init as u32 {
                continue;
            }
            let node = random() % 4;
            request[..4].copy_from_slice(&(len as u32).to_ne_bytes());
            request[4..8].copy_from_slice(&opcode.to_ne_bytes());
            request[16..24].copy_from_slice(&node.to_ne_bytes());
            request[24..40].fill(0);
        }
        let room = [16, (random() % 300) as usize + 1];
        let case = format!("message {number}: {request:02x?}");
        let rooms = (random() % 3) as usize;
        if request.is_empty() && rooms == 0 {
            continue; // A chain has at least one descriptor.
        }
        exchange(&mut export, &mut session, &case, &request, &room[..rooms])?;
    }
    export.check_alive()?;
    let share = export.yard.share();
    std::fs::write(share.join("witness"), WITNESS)?;
    export.check(&mut session)?;
    export.check_memory()
}
