//! The mux's process: DPUs that come, go and come back, several in one process, limits, and its end.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use conformance::mux::{CID, LIMIT, Mux, accept, program};
use rustix::process::Signal;
use virtio_driver::device::{Device, DeviceOptions};
use virtio_driver::vsock::Vsock;
use virtio_driver::vsock::packet::{
    HOST_CID, Header, OP_REQUEST, OP_RST, SHUTDOWN_SEND, TYPE_SEQPACKET, TYPE_STREAM,
};
use virtio_driver::vsock::socket::Socket;
use virtio_driver::wait::wait_for;

fn end(mux: &mut Mux) -> Option<i32> {
    mux.daemon.terminate(Signal::TERM, Duration::from_secs(4)).unwrap().code()
}

/// A connection of the DPU with its host program, which has exchanged bytes.
fn working(mux: &Mux, dpu: &mut Vsock, listener: &UnixListener, port: u32) -> (Socket, UnixStream) {
    let mut socket = Socket::connect(dpu, port, 1000, TYPE_STREAM).unwrap().unwrap();
    let mut stream = accept(listener).unwrap();
    socket.write_all(dpu, b"ping").unwrap();
    let mut got = [0; 4];
    stream.read_exact(&mut got).unwrap();
    stream.write_all(&got).unwrap();
    assert_eq!(socket.read_exact(dpu, 4).unwrap(), b"ping", "{}", mux.daemon.stderr());
    (socket, stream)
}

#[test]
fn sigterm_ends_it_with_0_and_leaves_no_socket() {
    let mut mux = Mux::start(&["--listen", "22={run}/ssh"]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let (_socket, mut stream) = working(&mux, &mut dpu, &listener, 5000);
    for name in ["vhost", "vsock", "ssh"] {
        assert!(mux.path(name).metadata().unwrap().file_type().is_socket());
    }
    assert_eq!(end(&mut mux), Some(0), "{}", mux.daemon.stderr());
    for name in ["vhost", "vsock", "ssh"] {
        assert!(!mux.path(name).exists(), "{name} is left behind");
    }
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0, "the host program sees the end");
    let log = mux.daemon.stderr();
    assert!(log.contains("bytes_from_dpu 4"), "counters are logged: {log}");
}

#[test]
fn it_runs_without_privileges_and_behind_a_filter() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    working(&mux, &mut dpu, &listener, 5000);
    let status = std::fs::read_to_string(format!("/proc/{}/status", mux.daemon.pid())).unwrap();
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        u64::from_str_radix(line.trim_start_matches(':').trim(), 16).unwrap()
    };
    const DAC_OVERRIDE: u64 = 1 << 1;
    assert_eq!(field("CapEff") & !DAC_OVERRIDE, 0);
    assert_eq!((field("CapBnd"), field("CapAmb")), (0, 0));
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), (1, 2));
}

#[test]
fn the_next_front_end_is_served_and_the_same_dpu_is_told_what_it_lost() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let (lost, mut stream) = working(&mux, &mut dpu, &listener, 5000);
    let options = dpu.device().options();
    let memory = Arc::clone(dpu.device().memory());
    // The front end dies; the DPU's kernel goes on with its rings as they are.
    let (device, mut rings) = dpu.into_parts();
    device.frontend().socket().shutdown(Shutdown::Both).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    let socket = mux.daemon.connect().unwrap();
    let device = Device::negotiate(socket, options, memory).unwrap();
    device.share_memory().unwrap();
    for (index, ring) in rings.iter_mut().enumerate() {
        assert!(index == 2 || ring.base() > 0);
        ring.watch_connection(device.frontend().socket().try_clone().unwrap().into());
        device.frontend().start_ring(index as u32, ring).unwrap();
    }
    // The rx ring goes on where it was: an RST for the lost pair is the first thing in it.
    rings[0].wait_used(LIMIT).unwrap();
    let event = rings[2].wait_used(LIMIT).unwrap();
    assert_eq!(event.len, 4, "the transport reset event");
    device.frontend().socket().shutdown(Shutdown::Both).unwrap();
    drop((rings, lost));

    // A new DPU finds nothing of the old one.
    let mut dpu = mux.dpu().unwrap();
    working(&mux, &mut dpu, &listener, 5000);
}

#[test]
fn a_driver_that_starts_anew_finds_nothing_of_the_old_one() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let (_socket, mut stream) = working(&mux, &mut dpu, &listener, 5000);
    stream.write_all(b"for the old DPU").unwrap();
    // What a reboot of the DPU looks like: rings stop, and new ones start at 0.
    let (device, rings) = dpu.into_parts();
    for index in 0..3 {
        device.frontend().get_vring_base(index).unwrap();
    }
    drop(rings);
    let rings: Vec<_> = (0..3).map(|_| device.new_ring().unwrap()).collect();
    for (index, ring) in rings.iter().enumerate() {
        device.frontend().start_ring(index as u32, ring).unwrap();
    }
    let mut dpu = Vsock::drive(device, rings).unwrap();
    let mut leftovers = Vec::new();
    assert!(stream.read_to_end(&mut leftovers).is_err() || leftovers.is_empty());
    let (mut socket, mut stream) = working(&mux, &mut dpu, &listener, 5000);
    stream.write_all(b"for the new one").unwrap();
    assert_eq!(socket.read_exact(&mut dpu, 15).unwrap(), b"for the new one");
}

#[test]
fn a_dpu_that_pauses_keeps_its_connections() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let (mut socket, mut stream) = working(&mux, &mut dpu, &listener, 5000);
    for round in 0..20 {
        // Stop in the middle of traffic, with buffers taken ahead, and go on with the same rings.
        stream.write_all(&[round; 5000]).unwrap();
        let frontend = dpu.device().frontend();
        let bases: Vec<u32> = (0..3).map(|index| frontend.get_vring_base(index).unwrap()).collect();
        for (index, base) in bases.into_iter().enumerate() {
            let (kick, call) = {
                let ring = &dpu.rings_mut()[index];
                (ring.kick_fd().try_clone_to_owned().unwrap(), ring.call_fd().try_clone_to_owned().unwrap())
            };
            let frontend = dpu.device().frontend();
            frontend.set_vring_base(index as u32, base).unwrap();
            frontend.set_vring_call(index as u32, std::os::fd::AsFd::as_fd(&call)).unwrap();
            frontend.set_vring_kick(index as u32, std::os::fd::AsFd::as_fd(&kick)).unwrap();
            frontend.set_vring_enable(index as u32, true).unwrap();
        }
        assert_eq!(socket.read_exact(&mut dpu, 5000).unwrap(), [round; 5000]);
        socket.write_all(&mut dpu, &[round; 3000]).unwrap();
        let mut got = [0; 3000];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(got, [round; 3000]);
    }
}

#[test]
fn a_reset_device_forgets_its_connections() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let (_socket, mut stream) = working(&mux, &mut dpu, &listener, 5000);
    dpu.device().frontend().reset_device().unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    mux.daemon.expect_running().unwrap();
}

#[test]
fn two_dpus_in_one_process_do_not_meet() {
    let mut mux = Mux::start_with(&[
        "--vm",
        "guest-cid=42,socket={run}/vhost,uds-path={run}/vsock,groups=a",
        "--vm",
        "guest-cid=43,socket={run}/other,uds-path={run}/vsock43,groups=b",
    ])
    .unwrap();
    let mut first = mux.dpu().unwrap();
    let mut second = Vsock::connect(mux.connect("other").unwrap(), DeviceOptions::default()).unwrap();
    assert_eq!((first.cid(), second.cid()), (42, 43));
    let listener = mux.listen(1000).unwrap();
    let (_socket, _stream) = working(&mux, &mut first, &listener, 5000);
    assert!(
        Socket::connect(&mut second, 5000, 1000, TYPE_STREAM).unwrap().is_none(),
        "the port of the other"
    );
    // Neither reaches the other by its context id.
    let header = Header {
        src_cid: 42,
        dst_cid: 43,
        src_port: 1,
        dst_port: 2,
        kind: TYPE_STREAM,
        op: OP_REQUEST,
        ..Header::default()
    };
    first.send(&header, &[]).unwrap();
    let answer = first.receive(LIMIT).unwrap().header;
    assert_eq!(({ answer.op }, { answer.src_cid }, { answer.dst_cid }), (OP_RST, 43, 42));
    assert!(second.take_if(|_| true).is_none());
}

#[test]
fn dpus_that_share_a_group_connect_to_each_other() {
    let mut mux = Mux::start_with(&[
        "--vm",
        "guest-cid=42,socket={run}/vhost,uds-path={run}/vsock,groups=a+b",
        "--vm",
        "guest-cid=43,socket={run}/other,uds-path={run}/vsock43,groups=b",
    ])
    .unwrap();
    let mut first = mux.dpu().unwrap();
    let mut second = Vsock::connect(mux.connect("other").unwrap(), DeviceOptions::default()).unwrap();
    for (number, kind) in [(0u32, TYPE_STREAM), (1, TYPE_SEQPACKET)] {
        let mut caller = Socket::request(&mut first, 5000 + number, 43, 77, kind).unwrap();
        let mut callee = Socket::accept(&mut second, 77, LIMIT).unwrap();
        assert_eq!((callee.peer_cid, callee.peer_port, callee.kind), (42, 5000 + number, kind));
        assert!(caller.answered(&mut first).unwrap());
        for size in [1, 4052, 100_000] {
            let bytes = vec![size as u8; size];
            caller.write_all(&mut first, &bytes).unwrap();
            assert!(callee.read_exact(&mut second, size).unwrap() == bytes);
            callee.write_all(&mut second, &bytes).unwrap();
            assert!(caller.read_exact(&mut first, size).unwrap() == bytes);
        }
        // The end of one direction arrives alone, and the other goes on.
        caller.shutdown(&mut first, SHUTDOWN_SEND).unwrap();
        assert_eq!(callee.read_to_end(&mut second).unwrap(), b"");
        callee.write_all(&mut second, b"last").unwrap();
        assert_eq!(caller.read_exact(&mut first, 4).unwrap(), b"last");
        callee.close(&mut second).unwrap();
        caller.read_to_end(&mut first).unwrap();
    }
    // A port where nobody listens.
    let mut refused = Socket::request(&mut first, 6000, 43, 78, TYPE_STREAM).unwrap();
    let request = second.receive_if(LIMIT, |header| { header.dst_port } == 78).unwrap().header;
    let rst = Header {
        src_cid: 43,
        dst_cid: 42,
        src_port: 78,
        dst_port: request.src_port,
        kind: TYPE_STREAM,
        op: OP_RST,
        ..Header::default()
    };
    second.send(&rst, &[]).unwrap();
    assert!(!refused.answered(&mut first).unwrap());
    // A sibling that answers nothing is given up after the connect timeout.
    let mut unanswered = Socket::request(&mut first, 6001, 43, 79, TYPE_STREAM).unwrap();
    assert!(!unanswered.answered(&mut first).unwrap());
    // Both go on with the host.
    let listener = mux.listen(1000).unwrap();
    working(&mux, &mut first, &listener, 5000);
}

#[test]
fn a_connected_descriptor_is_served_until_the_front_end_goes() {
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::os::unix::process::CommandExt;
    let run = tempfile::tempdir().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    // The child gets it under number 3, which is free there: all others close on exec.
    let theirs = OwnedFd::from(theirs);
    let number = theirs.as_raw_fd();
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(format!("exec \"$0\" \"$@\" 3<&{number}"))
        .arg(program().unwrap())
        .args(["--fd", "3", "--guest-cid", "42"])
        .arg("--uds-path")
        .arg(run.path().join("vsock"))
        .process_group(0);
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
    let mut child = command.spawn().unwrap();
    drop(theirs);
    let listener = UnixListener::bind(run.path().join("vsock_1000")).unwrap();
    let mut dpu = Vsock::connect(ours, DeviceOptions::default()).unwrap();
    let mut socket = Socket::connect(&mut dpu, 1, 1000, TYPE_STREAM).unwrap().unwrap();
    let mut stream = accept(&listener).unwrap();
    socket.write_all(&mut dpu, b"x").unwrap();
    stream.read_exact(&mut [0; 1]).unwrap();
    drop(dpu);
    let status = wait_for("the daemon to end with its front end", LIMIT, || child.try_wait().unwrap());
    assert!(status.unwrap().success());
    assert!(!run.path().join("vsock").exists());
}

#[test]
fn modes_of_sockets_are_as_asked() {
    let mut mux = Mux::start(&["--socket-mode=660", "--uds-mode=666", "--listen=22={run}/ssh"]).unwrap();
    let _dpu = mux.dpu().unwrap();
    let mode = |name: &str| mux.path(name).metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("vhost"), mode("vsock"), mode("ssh")), (0o660, 0o666, 0o666));
}

#[test]
fn a_second_daemon_does_not_take_the_sockets_of_the_first() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let (vhost, vsock) = (mux.path("vhost"), mux.path("vsock"));
    for (socket, uds) in [(vhost, mux.path("fresh")), (mux.path("fresh"), vsock)] {
        let output = Command::new(program().unwrap())
            .arg("--socket")
            .arg(&socket)
            .arg("--uds-path")
            .arg(&uds)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1));
        let message = String::from_utf8(output.stderr).unwrap();
        assert!(message.contains("another program listens"), "{message}");
        assert!(!mux.path("fresh").exists(), "a failure leaves no trace");
    }
    working(&mux, &mut dpu, &listener, 5000);
}

#[test]
fn a_request_flood_stays_within_the_quota_and_leaks_nothing() {
    let mut mux = Mux::start(&["--max-connections", "100"]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    working(&mux, &mut dpu, &listener, 5000);
    let descriptors = mux.daemon.open_fds();
    for round in 0..3 {
        let mut flood = Vec::new();
        for port in 0..2000u32 {
            let header = Header {
                src_cid: CID,
                dst_cid: HOST_CID,
                src_port: 10_000 + port,
                dst_port: 1000,
                kind: TYPE_STREAM,
                op: OP_REQUEST,
                buf_alloc: 65_536,
                ..Header::default()
            };
            dpu.queue(&header, &[]).unwrap();
            // The listener's backlog is served, as a busy host program would.
            if port % 50 == 49 {
                dpu.flush().unwrap();
                dpu.poll().unwrap();
                listener.set_nonblocking(true).unwrap();
                while let Ok((stream, _)) = listener.accept() {
                    flood.push(stream);
                }
                listener.set_nonblocking(false).unwrap();
            }
        }
        dpu.drain().unwrap();
        assert!(mux.daemon.open_fds() <= descriptors + 100, "round {round}");
        drop(flood);
        // Every connection is reset: the host programs are gone and the DPU never answers.
        for port in 0..2000u32 {
            let header = Header {
                src_cid: CID,
                dst_cid: HOST_CID,
                src_port: 10_000 + port,
                dst_port: 1000,
                kind: TYPE_STREAM,
                op: OP_RST,
                ..Header::default()
            };
            dpu.queue(&header, &[]).unwrap();
        }
        dpu.drain().unwrap();
        listener.set_nonblocking(true).unwrap();
        while listener.accept().is_ok() {}
        listener.set_nonblocking(false).unwrap();
        wait_for("all descriptors to be closed", LIMIT, || {
            dpu.poll().unwrap();
            while dpu.take_if(|_| true).is_some() {}
            (mux.daemon.open_fds() <= descriptors).then_some(())
        })
        .unwrap();
    }
    working(&mux, &mut dpu, &listener, 5001);
}

#[test]
fn hostile_packets_are_answered_or_dropped_and_the_others_served() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let (mut socket, mut stream) = working(&mux, &mut dpu, &listener, 5000);
    let mut bytes = [0u8; 300];
    let mut random = 0x2545_F491_4F6C_DD1Du64;
    for round in 0..20_000usize {
        for byte in &mut bytes {
            // xorshift64*: the same packets in every run.
            random ^= random >> 12;
            random ^= random << 25;
            random ^= random >> 27;
            *byte = (random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 56) as u8;
        }
        // Mostly plausible: this DPU's address, few ports, all operations.
        if round % 4 != 0 {
            let [port, len, kind, op] = [bytes[16] % 8, bytes[24], bytes[28] % 4, bytes[30] % 9];
            bytes[..8].copy_from_slice(&CID.to_le_bytes());
            bytes[8..16].copy_from_slice(&HOST_CID.to_le_bytes());
            bytes[16..20].copy_from_slice(&u32::from(port).to_le_bytes());
            bytes[20..24].copy_from_slice(&1000u32.to_le_bytes());
            bytes[24..28].copy_from_slice(&(u32::from(len) * 2).to_le_bytes());
            bytes[28..30].copy_from_slice(&u16::from(kind).to_le_bytes());
            bytes[30..32].copy_from_slice(&u16::from(op).to_le_bytes());
        }
        let len = 1 + round % bytes.len();
        let cut = usize::from(bytes[299]) % len;
        let pieces = if cut == 0 { vec![&bytes[..len]] } else { vec![&bytes[..cut], &bytes[cut..len]] };
        dpu.send_raw(&pieces).unwrap();
        if round % 64 == 0 {
            dpu.drain().unwrap();
            dpu.poll().unwrap();
            while dpu.take_if(|header| { header.dst_port } != 5000).is_some() {}
            listener.set_nonblocking(true).unwrap();
            while listener.accept().is_ok() {}
            listener.set_nonblocking(false).unwrap();
        }
    }
    dpu.drain().unwrap();
    mux.daemon.expect_running().unwrap();
    socket.write_all(&mut dpu, b"unharmed").unwrap();
    let mut got = [0; 8];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"unharmed");
    assert!(mux.daemon.private_memory() < 64 << 20);
}

#[test]
fn records_cross_with_their_bounds() {
    use rustix::net::{
        AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, accept, bind, listen,
    };
    let mut mux = Mux::start(&[]).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(mux.path("vsock_1000")).unwrap()).unwrap();
    listen(&listener, 5).unwrap();
    let mut socket = Socket::connect(&mut dpu, 1, 1000, TYPE_SEQPACKET).unwrap().unwrap();
    let host = accept(&listener).unwrap();
    for size in [1, 0, 100, 65_536, 65_537, 200_000] {
        let record = vec![size as u8; size];
        socket.write_all(&mut dpu, &record).unwrap();
        let mut got = vec![0; 1 << 20];
        let (len, _) = rustix::net::recv(&host, &mut got[..], RecvFlags::empty()).unwrap();
        assert!(got[..len] == record, "{size} bytes to the host");
        if size > 0 {
            rustix::net::send(&host, &record, SendFlags::empty()).unwrap();
            assert!(socket.read_exact(&mut dpu, size).unwrap() == record, "{size} bytes to the DPU");
        }
    }
    socket.close(&mut dpu).unwrap();
}
