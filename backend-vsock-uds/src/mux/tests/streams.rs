//! Bytes both ways, in order, whatever the sizes and whoever is slow.

use std::io::Write;
use std::os::fd::AsFd;

use super::*;
use crate::mux::BULK;

#[test]
fn bytes_of_the_dpu_reach_the_host_program() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let bytes = pattern(100_000);
    assert_eq!(socket.write(&mut world, &bytes), bytes.len());
    assert!(drain(&mut stream) == (bytes, false));
    assert_eq!(world.mux.counters().connections_by_dpu, 1);
}

#[test]
fn bytes_of_the_host_program_reach_the_dpu() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let bytes = pattern(100_000);
    stream.write_all(&bytes).expect("written");
    world.settle();
    socket.read_all(&mut world);
    assert!(socket.received == bytes);
    assert_eq!(socket.packets, bytes.len().div_ceil(4096 - HEADER_LEN), "buffers are filled");
    assert_eq!(socket.ops, []);
}

#[test]
fn an_echo_of_many_sizes_comes_back_whole() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let mut all = Vec::new();
    for size in [1, 43, 44, 45, 4051, 4052, 4053, 8192, 65_535, 65_536, 65_537, 200_000] {
        let bytes = pattern(size);
        assert_eq!(socket.write(&mut world, &bytes), size);
        let (got, _) = drain(&mut stream);
        assert!(got == bytes);
        assert_eq!(stuff(&mut stream, &got), size);
        world.settle();
        socket.read_all(&mut world);
        all.extend(bytes);
        assert!(socket.received == all);
    }
}

#[test]
fn a_header_may_lie_in_any_number_of_pieces() {
    let mut world = World::new();
    let listener = world.listen();
    let (socket, mut stream) = world.pair(&listener, 5000);
    let header = socket.header(Op::Rw, 0, 10).encode();
    world.send_pieces(&[&header[..1], &header[1..43], &header[43..], b"0", b"123456", b"789"]);
    let whole = [&header[..], b"abcdefghij"].concat();
    world.send_pieces(&[&whole]);
    world.send_pieces(&[&whole[..50], &whole[50..]]);
    world.settle();
    assert_eq!(drain(&mut stream).0, b"0123456789abcdefghijabcdefghij");
}

#[test]
fn a_host_that_does_not_read_stops_the_dpu_at_its_window_and_loses_nothing() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let bytes = pattern(4 << 20);
    let written = socket.write(&mut world, &bytes);
    let window = Quotas::default().bulk_window as usize;
    assert!(written < window + (1 << 20), "{written} bytes went nowhere");
    assert!(world.mux.buffered() <= window);
    assert_eq!(socket.credit(), 0);
    // The state is quiet: nothing happens until somebody moves.
    assert!(!world.turn());
    let (mut got, mut sent) = (Vec::new(), written);
    while got.len() < bytes.len() {
        let (more, end) = drain(&mut stream);
        assert!(!end && !more.is_empty(), "stalled after {}", got.len());
        got.extend(more);
        world.settle();
        socket.receive(&mut world);
        sent += socket.write(&mut world, &bytes[sent..]);
    }
    assert!(got == bytes);
    assert_eq!(world.mux.buffered(), 0);
}

#[test]
fn a_dpu_that_does_not_read_stops_the_host_program() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let bytes = pattern(4 << 20);
    let mut written = 0;
    loop {
        let more = stuff(&mut stream, &bytes[written..]);
        if more == 0 {
            break;
        }
        written += more;
        world.settle();
    }
    socket.receive(&mut world);
    assert_eq!(socket.unread, socket.buf_alloc, "all of the credit and no more");
    assert!(written < 2 << 20, "the host program was not stopped");
    assert!(!world.turn(), "a full DPU makes no events");
    while socket.received.len() < bytes.len() {
        let before = socket.received.len();
        socket.read_all(&mut world);
        written += stuff(&mut stream, &bytes[written..]);
        world.settle();
        socket.receive(&mut world);
        assert!(socket.received.len() > before, "stalled after {before}");
    }
    assert!(socket.received == bytes);
}

#[test]
fn rx_resumes_when_the_driver_offers_buffers() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    world.refill = false;
    let bytes = pattern(1 << 20);
    let mut written = 0;
    for _ in 0..20 {
        written += stuff(&mut stream, &bytes[written..]);
        world.settle();
    }
    socket.receive(&mut world);
    let before = socket.received.len();
    assert!(before <= 128 * (4096 - HEADER_LEN), "more than the buffers hold");
    assert!(!world.turn(), "without buffers nothing happens");
    world.refill = true;
    world.offer_held();
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received.len(), written);
    assert!(socket.received == bytes[..written]);
}

#[test]
fn credit_wraps_after_four_gigabytes() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    // Four gigabytes are behind both counters before the first byte of this test.
    let chunk = pattern(60_000);
    let token = world.mux.table.tokens().next().expect("one connection");
    let (_, channel) = world.mux.table.get_mut(token).expect("it lives");
    channel.connection.start_counters_at(u32::MAX - 100_000);
    (socket.fwd_cnt, socket.sent) = (u32::MAX - 100_000, u32::MAX - 100_000);
    socket.peer_fwd = u32::MAX - 100_000;
    for _ in 0..10 {
        assert_eq!(socket.write(&mut world, &chunk), chunk.len());
        assert!(drain(&mut stream).0 == chunk);
        stream.write_all(&chunk).expect("written");
        world.settle();
        socket.received.clear();
        socket.read_all(&mut world);
        assert!(socket.received == chunk);
    }
    assert!(socket.fwd_cnt < 1 << 20 && socket.sent < 1 << 20, "the counters have wrapped");
    assert_eq!(world.mux.counters().bad_credit, 0);
}

#[test]
fn a_bulk_connection_gets_a_larger_window_and_costs_few_updates() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let bytes = pattern(BULK as usize);
    let (mut sent, mut got) = (0, 0);
    while sent < 64 * bytes.len() {
        sent += socket.write(&mut world, &bytes);
        got += drain(&mut stream).0.len();
        world.settle();
        socket.receive(&mut world);
    }
    while got < sent {
        let more = drain(&mut stream).0.len();
        assert!(more > 0, "stalled after {got}");
        got += more;
        world.settle();
    }
    socket.receive(&mut world);
    assert_eq!(socket.peer_alloc, Quotas::default().bulk_window);
    assert!(socket.ops.len() <= 4 * 64, "{} control packets for 64 MiB", socket.ops.len());
}

#[test]
fn a_dpu_that_sends_no_more_ahead_than_it_would_receive_does_not_stall() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    socket.limits_itself = true;
    let bytes = pattern(100_000);
    // Well beyond the size at which the window grows over the DPU's own buffer.
    for round in 0..100 {
        assert_eq!(socket.write(&mut world, &bytes), bytes.len(), "round {round}");
        assert!(drain(&mut stream).0 == bytes);
        world.settle();
        socket.receive(&mut world);
    }
    assert!(socket.peer_alloc > socket.buf_alloc);
}

#[test]
fn descriptors_sent_along_are_dropped_and_bytes_behind_them_arrive() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, stream) = world.pair(&listener, 5000);
    for text in [b"one", b"two"] {
        let fds = [stream.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = rustix::net::SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(rustix::net::SendAncillaryMessage::ScmRights(&fds)));
        let iov = [std::io::IoSlice::new(text)];
        let flags = rustix::net::SendFlags::empty();
        rustix::net::sendmsg(&stream, &iov, &mut ancillary, flags).expect("sent");
    }
    (&stream).write_all(b"three").expect("written");
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"onetwothree");
}

#[test]
fn bytes_behind_an_urgent_byte_arrive() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, stream) = world.pair(&listener, 5000);
    (&stream).write_all(b"before").expect("written");
    rustix::net::send(&stream, b"!", rustix::net::SendFlags::OOB).expect("sent");
    (&stream).write_all(b"after").expect("written");
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"beforeafter");
}
