//! The real mux under a real driver: bytes both ways, at once, in every ring mode.

#![allow(clippy::unwrap_used)] // Helpers of tests fail by panicking, like tests.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use conformance::mux::{CID, LIMIT, Mux, accept};
use virtio_driver::device::DeviceOptions;
use virtio_driver::ring::Completion;
use virtio_driver::vsock::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use virtio_driver::vsock::socket::Socket;

/// Bytes that differ everywhere.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

fn every_mode() -> Vec<DeviceOptions> {
    let mut modes = Vec::new();
    for event_idx in [false, true] {
        for completion in [Completion::Eventfd, Completion::Polling] {
            modes.push(DeviceOptions { event_idx, completion, ..DeviceOptions::default() });
        }
    }
    modes
}

#[test]
fn the_context_id_is_in_the_configuration_space() {
    let mut mux = Mux::start(&[]).unwrap();
    assert_eq!(mux.dpu().unwrap().cid(), CID);
}

#[test]
fn an_echo_on_the_host_comes_back_in_every_ring_mode() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let echo = thread::spawn(move || {
        for _ in 0..4 {
            let stream = accept(&listener).unwrap();
            std::io::copy(&mut &stream, &mut &stream).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        }
    });
    for (number, mode) in every_mode().into_iter().enumerate() {
        let mut dpu = mux.dpu_with(mode).unwrap();
        let port = 5000 + number as u32;
        let mut socket = Socket::connect(&mut dpu, port, 1000, TYPE_STREAM).unwrap().unwrap();
        for size in [1, 44, 4051, 4052, 4053, 65_536, 200_000] {
            let bytes = pattern(size);
            socket.write_all(&mut dpu, &bytes).unwrap();
            assert!(socket.read_exact(&mut dpu, size).unwrap() == bytes, "{size} bytes in {mode:?}");
        }
        socket.shutdown(&mut dpu, SHUTDOWN_SEND).unwrap();
        assert_eq!(socket.read_to_end(&mut dpu).unwrap(), b"");
        socket.close(&mut dpu).unwrap();
    }
    echo.join().unwrap();
}

#[test]
fn a_host_program_reaches_a_port_of_the_dpu() {
    let mut mux = Mux::start(&["--listen", "22={run}/ssh"]).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let mut greeted = mux.connect("vsock").unwrap();
    greeted.write_all(b"CONNECT 77\nhello").unwrap();
    let mut socket = Socket::accept(&mut dpu, 77, LIMIT).unwrap();
    assert_eq!(socket.read_exact(&mut dpu, 5).unwrap(), b"hello");
    let mut answer = [0; 64];
    let len = greeted.read(&mut answer).unwrap();
    assert_eq!(&answer[..len], format!("OK {}\n", socket.peer_port).as_bytes());
    socket.write_all(&mut dpu, b"good day").unwrap();
    greeted.read_exact(&mut answer[..8]).unwrap();
    assert_eq!(&answer[..8], b"good day");

    let mut fixed = mux.connect("ssh").unwrap();
    let mut socket = Socket::accept(&mut dpu, 22, LIMIT).unwrap();
    socket.write_all(&mut dpu, b"SSH-2.0-test\r\n").unwrap();
    fixed.read_exact(&mut answer[..14]).unwrap();
    assert_eq!(&answer[..14], b"SSH-2.0-test\r\n");
}

#[test]
fn a_quarter_gigabyte_goes_each_way_at_the_same_time() {
    const TOTAL: usize = 256 << 20;
    const CHUNK: usize = 1 << 20;
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let host = thread::spawn(move || {
        let stream = accept(&listener).unwrap();
        let mut writing = stream.try_clone().unwrap();
        let writer = thread::spawn(move || {
            let bytes = pattern(CHUNK);
            (0..TOTAL / CHUNK).for_each(|_| writing.write_all(&bytes).unwrap());
            writing.shutdown(Shutdown::Write).unwrap();
        });
        let (expected, mut got, mut total) = (pattern(CHUNK), vec![0; CHUNK], 0);
        let mut stream = stream;
        while total < TOTAL {
            stream.read_exact(&mut got).unwrap();
            assert!(got == expected, "corrupted at {total}");
            total += CHUNK;
        }
        assert_eq!(stream.read(&mut got).unwrap(), 0);
        writer.join().unwrap();
    });
    let mut dpu = mux.dpu().unwrap();
    let mut socket = Socket::connect(&mut dpu, 5000, 1000, TYPE_STREAM).unwrap().unwrap();
    let expected = pattern(CHUNK);
    let (mut sent, mut got, mut pending) = (0, 0, Vec::new());
    let started = Instant::now();
    while sent < TOTAL || got < TOTAL {
        let before = (sent, got);
        if sent < TOTAL && socket.credit() >= 65_536 {
            let at = sent % CHUNK;
            socket.write_all(&mut dpu, &expected[at..at + 65_536]).unwrap();
            sent += 65_536;
            if sent == TOTAL {
                socket.shutdown(&mut dpu, SHUTDOWN_SEND).unwrap();
            }
        }
        socket.pump(&mut dpu).unwrap();
        pending.extend(socket.read(&mut dpu, usize::MAX).unwrap());
        while pending.len() >= CHUNK {
            assert!(pending[..CHUNK] == expected, "corrupted at {got}");
            pending.drain(..CHUNK);
            got += CHUNK;
        }
        if (sent, got) == before {
            socket.wait(&mut dpu, LIMIT).unwrap();
        }
    }
    host.join().unwrap();
    println!("2 x {} MiB in {:?}", TOTAL >> 20, started.elapsed());
    assert_eq!(socket.peer_shutdown() & SHUTDOWN_SEND, SHUTDOWN_SEND);
}

#[test]
fn two_hundred_connections_at_once() {
    const COUNT: u32 = 200;
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let echo = thread::spawn(move || {
        let streams: Vec<_> = (0..COUNT).map(|_| accept(&listener).unwrap()).collect();
        let echoes: Vec<_> = streams
            .into_iter()
            .map(|stream| thread::spawn(move || std::io::copy(&mut &stream, &mut &stream).unwrap()))
            .collect();
        echoes.into_iter().map(|echo| echo.join().unwrap()).sum::<u64>()
    });
    let mut dpu = mux.dpu().unwrap();
    let mut sockets: Vec<Socket> = (0..COUNT)
        .map(|port| Socket::connect(&mut dpu, 1024 + port, 1000, TYPE_STREAM).unwrap().unwrap())
        .collect();
    for round in 0..3usize {
        for socket in &mut sockets {
            let mine = vec![(socket.port as usize + round) as u8; 10_000];
            socket.write_all(&mut dpu, &mine).unwrap();
        }
        for socket in &mut sockets {
            let mine = vec![(socket.port as usize + round) as u8; 10_000];
            assert!(socket.read_exact(&mut dpu, 10_000).unwrap() == mine, "port {}", socket.port);
        }
    }
    for socket in sockets {
        socket.close(&mut dpu).unwrap();
    }
    assert_eq!(echo.join().unwrap(), u64::from(COUNT) * 30_000);
}

#[test]
fn a_host_that_leaves_ends_the_connection_after_the_last_byte() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let mut socket = Socket::connect(&mut dpu, 5000, 1000, TYPE_STREAM).unwrap().unwrap();
    let mut stream = accept(&listener).unwrap();
    let bytes = pattern(150_000);
    stream.write_all(&bytes).unwrap();
    drop(stream);
    assert!(socket.read_to_end(&mut dpu).unwrap() == bytes);
    while !socket.is_reset() && socket.peer_shutdown() != SHUTDOWN_RECEIVE | SHUTDOWN_SEND {
        socket.wait(&mut dpu, LIMIT).unwrap();
    }
}

#[test]
fn no_state_keeps_the_processor_busy() {
    let mut mux = Mux::start(&[]).unwrap();
    let listener = mux.listen(1000).unwrap();
    let mut dpu = mux.dpu().unwrap();
    let mut connect = |port| {
        let socket = Socket::connect(&mut dpu, port, 1000, TYPE_STREAM).unwrap().unwrap();
        (socket, accept(&listener).unwrap())
    };
    let (idle, idle_stream) = connect(1);
    let (mut half_closed_by_dpu, half_stream) = connect(2);
    let (half_closed_by_host, other_half_stream) = connect(3);
    let (mut unread_by_host, full_stream) = connect(4);
    let (unread_by_dpu, busy_stream) = connect(5);
    let (dead_with_bytes, dead_stream) = connect(6);
    half_closed_by_dpu.shutdown(&mut dpu, SHUTDOWN_SEND).unwrap();
    other_half_stream.shutdown(Shutdown::Write).unwrap();
    // As much as the host's socket and the mux hold together.
    let bytes = pattern(65_536);
    loop {
        while unread_by_host.credit() >= 65_536 {
            unread_by_host.write_all(&mut dpu, &bytes).unwrap();
            dpu.drain().unwrap();
            unread_by_host.pump(&mut dpu).unwrap();
        }
        if unread_by_host.wait(&mut dpu, Duration::from_millis(200)).is_err() {
            break;
        }
    }
    // As much as the DPU's socket and the host's take together; the DPU never reads.
    busy_stream.set_nonblocking(true).unwrap();
    dead_stream.set_nonblocking(true).unwrap();
    let full = Instant::now();
    let (mut busy, mut dead) = (&busy_stream, &dead_stream);
    while full.elapsed() < Duration::from_millis(500) {
        if busy.write(&bytes).is_err() && dead.write(&bytes).is_err() {
            let _ = dpu.wait(Duration::from_millis(20));
        }
    }
    drop(dead_stream);
    // A greeting that never ends.
    let mut slow = mux.connect("vsock").unwrap();
    slow.write_all(b"CONN").unwrap();

    let (before, start) = (mux.daemon.cpu_time(), Instant::now());
    while start.elapsed() < Duration::from_secs(1) {
        // wait-loop: the measuring interval is over.
        thread::sleep(Duration::from_millis(50));
    }
    let used = mux.daemon.cpu_time() - before;
    assert!(used < Duration::from_millis(20), "{used:?} of a second for doing nothing");
    drop((idle, idle_stream, half_stream, half_closed_by_host, full_stream, unread_by_dpu, dead_with_bytes));
}
