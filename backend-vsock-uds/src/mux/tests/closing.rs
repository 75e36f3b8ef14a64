//! How connections end: either side first, one direction or both, with bytes under way, politely or not.

use std::io::Write;
use std::net::Shutdown;

use super::*;
use crate::packet::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// The connection must be gone without a trace, and nothing moves any more.
fn assert_gone(world: &mut World) {
    assert_eq!(world.mux.connections(), 0);
    assert!(!world.turn());
    assert_eq!(world.mux.next_deadline(), None, "a deadline is left behind");
    assert_eq!(world.mux.windows.promise(1 << 28), Some(1 << 28), "window memory is left behind");
}

#[test]
fn dpu_half_close_gives_the_host_its_end_of_file_and_the_answer_comes_back() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    socket.write(&mut world, b"question");
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_SEND);
    world.settle();
    assert_eq!(drain(&mut stream), (b"question".to_vec(), true));
    stream.write_all(b"answer").expect("the other direction lives");
    drop(stream);
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"answer");
    assert_eq!(socket.ops, [(Op::Shutdown, SHUTDOWN_BOTH)]);
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_gone(&mut world);
}

#[test]
fn host_half_close_gives_the_dpu_its_end_and_the_answer_comes_back() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    stream.write_all(b"question").expect("written");
    stream.shutdown(Shutdown::Write).expect("shut down");
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"question");
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_SEND)]);
    assert!(!world.turn(), "a half-closed connection makes no events");
    assert_eq!(socket.write(&mut world, b"answer"), 6);
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_BOTH);
    world.settle();
    assert_eq!(drain(&mut stream), (b"answer".to_vec(), true));
    assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)]);
    assert_gone(&mut world);
}

#[test]
fn both_half_closed_ends_the_connection() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_SEND);
    world.settle();
    stream.shutdown(Shutdown::Write).expect("shut down");
    world.settle();
    assert_eq!(drain(&mut stream), (Vec::new(), true));
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_BOTH)]);
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_gone(&mut world);
}

#[test]
fn a_host_that_writes_and_leaves_gets_its_last_byte_to_a_dpu_without_credit_or_buffers() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    socket.buf_alloc = 1000;
    socket.tell(&mut world, Op::CreditUpdate, 0);
    world.settle();
    world.refill = false;
    let bytes = pattern(150_000);
    stream.write_all(&bytes).expect("written");
    drop(stream);
    world.settle();
    socket.receive(&mut world);
    assert_eq!(socket.received.len(), 1000);
    assert!(!world.turn(), "a dead host program with bytes left makes no events");
    assert_eq!(socket.ops, [], "no end before the last byte");
    world.refill = true;
    world.offer_held();
    while socket.received.len() < bytes.len() {
        let before = socket.received.len();
        socket.read_all(&mut world);
        assert!(socket.received.len() > before, "stalled after {before}");
    }
    assert!(socket.received == bytes);
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_BOTH)]);
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_gone(&mut world);
}

#[test]
fn a_dpu_that_writes_and_closes_gets_its_last_byte_to_a_slow_host() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let bytes = pattern(1 << 20);
    let written = socket.write(&mut world, &bytes);
    assert!(world.mux.buffered() > 0, "more than the host's socket holds");
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_BOTH);
    world.settle();
    socket.receive(&mut world);
    assert!(!socket.ops.iter().any(|(op, _)| *op == Op::Rst), "not before the host has it");
    let mut got = Vec::new();
    loop {
        let (more, end) = drain(&mut stream);
        got.extend(more);
        if end {
            break;
        }
        world.settle();
    }
    assert_eq!(got.len(), written);
    assert!(got == bytes[..written]);
    assert_eq!(socket.take_ops(&mut world).last(), Some(&(Op::Rst, 0)));
    assert_gone(&mut world);
}

#[test]
fn a_dpu_that_closed_is_released_in_time_and_the_host_still_gets_everything() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let bytes = pattern(1 << 20);
    let written = socket.write(&mut world, &bytes);
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_BOTH);
    world.settle();
    socket.take_ops(&mut world);
    world.pass(TIMEOUTS.linger);
    assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)], "the DPU need not wait");
    // The port pair is free for the next connection while the old bytes are still on their way.
    let (mut next, mut next_stream) = world.pair(&listener, 5000);
    next.write(&mut world, b"next");
    assert_eq!(drain(&mut next_stream).0, b"next");
    let mut got = Vec::new();
    loop {
        world.pass(3_600_000);
        let mut some = [0; 50_000];
        match stream.read(&mut some) {
            Ok(0) => break,
            Ok(count) => got.extend_from_slice(&some[..count]),
            Err(error) => panic!("reading: {error}"),
        }
    }
    assert!(got == bytes[..written]);
    assert_eq!(world.mux.connections(), 1);
}

#[test]
fn what_a_host_program_never_reads_makes_room_for_new_connections() {
    let mut world = World::with(Quotas { connections: 2, ..Quotas::default() });
    let listener = world.listen();
    let mut streams = Vec::new();
    for port in [1, 2] {
        let (mut socket, stream) = world.pair(&listener, port);
        socket.write(&mut world, &pattern(1 << 20));
        socket.tell(&mut world, Op::Rst, 0);
        streams.push(stream);
    }
    world.settle();
    world.pass(3_600_000);
    assert_eq!((world.mux.connections(), world.mux.counters().discarded_bytes), (2, 0));
    world.pair(&listener, 3);
    assert_eq!(world.mux.connections(), 2, "the one that waited longest is gone");
    assert!(world.mux.counters().discarded_bytes > 0);
    let (got, end) = drain(&mut streams[1]);
    assert!(!end && !got.is_empty(), "the other one is still served");
    drop(streams);
    world.settle();
    assert_eq!(world.mux.connections(), 1);
    assert!(world.mux.draining.is_empty());
}

#[test]
fn a_dpu_that_never_answers_a_close_is_reset() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, stream) = world.pair(&listener, 5000);
    drop(stream);
    world.settle();
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_BOTH)]);
    world.pass(TIMEOUTS.linger);
    assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)]);
    assert_gone(&mut world);
}

#[test]
fn a_host_program_that_leaves_bytes_unread_ends_the_dpu_direction() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    socket.write(&mut world, &pattern(1 << 20));
    stream.write_all(b"last words").expect("written");
    // Its receive queue is full: the kernel resets the connection.
    drop(stream);
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"last words");
    let ops = socket.take_ops(&mut world);
    assert_eq!(ops.last(), Some(&(Op::Shutdown, SHUTDOWN_BOTH)), "{ops:?}");
    assert_eq!(world.mux.buffered(), 0);
    // Bytes that were under way are swallowed; the DPU's RST ends it.
    socket.write_packet(&mut world, b"too late", 0);
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_gone(&mut world);
}

#[test]
fn a_host_program_that_stops_reading_only_ends_the_dpu_direction() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    stream.shutdown(Shutdown::Read).expect("shut down");
    socket.write(&mut world, b"nobody listens");
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_RECEIVE)]);
    assert!(!world.turn());
    stream.write_all(b"still talking").expect("written");
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"still talking");
}

#[test]
fn a_dpu_that_stops_reading_only_ends_the_host_direction() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    stream.write_all(b"unwanted").expect("written");
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_RECEIVE);
    world.settle();
    let error = stream.write_all(b"more").expect_err("the DPU takes no more");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    assert!(!world.turn());
    socket.write(&mut world, b"still talking");
    assert_eq!(drain(&mut stream), (b"still talking".to_vec(), false));
    drop(stream);
    world.settle();
    assert_eq!(socket.take_ops(&mut world).last(), Some(&(Op::Shutdown, SHUTDOWN_BOTH)));
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_gone(&mut world);
}

#[test]
fn an_rst_of_the_dpu_closes_the_host_socket_after_the_last_byte_and_is_not_answered() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    socket.write_packet(&mut world, b"last", 0);
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_eq!(drain(&mut stream), (b"last".to_vec(), true));
    assert_eq!(socket.take_ops(&mut world), []);
    assert_gone(&mut world);
}

#[test]
fn a_connection_and_all_its_bytes_in_one_batch() {
    let mut world = World::new();
    let listener = world.listen();
    let mut socket = DpuSocket::new(7, PORT, Kind::Stream);
    // A DPU that is faster than its device: everything is in the queue before the first packet is served.
    socket.tell(&mut world, Op::Request, 0);
    socket.write_packet(&mut world, b"abc", 0);
    socket.write_packet(&mut world, b"def", 0);
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_BOTH);
    world.settle();
    let (mut stream, _) = listener.accept().expect("connected");
    stream.set_nonblocking(true).expect("non-blocking");
    assert_eq!(drain(&mut stream), (b"abcdef".to_vec(), true));
    assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)]);
    assert_gone(&mut world);
}

#[test]
fn a_driver_that_starts_anew_drops_everything_in_silence() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    world.refill = false;
    stream.write_all(b"for the old DPU").expect("written");
    socket.write_packet(&mut world, b"delivered", 0);
    world.turn();
    world.inbox.clear();
    world.mux.reset();
    world.refill = true;
    world.offer_held();
    world.settle();
    assert!(world.inbox.is_empty(), "nothing of the old DPU reaches the new one");
    assert_eq!(drain(&mut stream), (b"delivered".to_vec(), true));
    assert_eq!(world.mux.counters().lost_connections, 1);
    assert_gone(&mut world);
    // The listener of the host is still served.
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    socket.write(&mut world, b"new");
    assert_eq!(drain(&mut stream).0, b"new");
}

#[test]
fn a_dpu_that_comes_back_with_another_front_end_is_told_which_connections_are_gone() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut first, one) = world.pair(&listener, 5000);
    let (mut second, two) = world.pair(&listener, 5001);
    assert!(world.mux.lose_dpu());
    for mut stream in [one, two] {
        assert_eq!(drain(&mut stream), (Vec::new(), true));
    }
    world.settle();
    assert_eq!(first.take_ops(&mut world), [(Op::Rst, 0)]);
    assert_eq!(second.take_ops(&mut world), [(Op::Rst, 0)]);
    assert!(!world.mux.lose_dpu(), "nothing is left to tell");
    assert_gone(&mut world);
}

#[test]
fn buffers_that_were_taken_ahead_go_back_when_the_queue_stops() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    stream.write_all(b"one packet").expect("written");
    world.settle();
    socket.read_all(&mut world);
    assert!(world.mux.has_spare(), "a read asks for more than came");
    let used = world.rx.base() - world.rx.in_flight() as u16;
    world.mux.give_back(&mut world.rx);
    assert!(!world.mux.has_spare());
    assert_eq!((world.rx.in_flight(), world.rx.base()), (0, used));
    stream.write_all(b"another").expect("written");
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"one packetanother");
}

#[test]
fn ten_thousand_connections_leave_nothing_behind() {
    let mut world = World::new();
    let listener = world.listen();
    let descriptors = || std::fs::read_dir("/proc/self/fd").expect("procfs").count();
    let before = descriptors();
    for round in 0..10_000u32 {
        let (mut socket, mut stream) = world.pair(&listener, 1024 + round % 7);
        socket.write(&mut world, b"ping");
        if round % 2 == 0 {
            socket.tell(&mut world, Op::Shutdown, SHUTDOWN_BOTH);
            world.settle();
            assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)]);
            assert_eq!(drain(&mut stream), (b"ping".to_vec(), true));
        } else {
            assert_eq!(drain(&mut stream).0, b"ping");
            drop(stream);
            world.settle();
            assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_BOTH)]);
            socket.tell(&mut world, Op::Rst, 0);
            world.settle();
        }
    }
    assert_gone(&mut world);
    // Other tests run at the same time and have descriptors of their own, but not thousands.
    assert!(descriptors() < before + 1000);
}
