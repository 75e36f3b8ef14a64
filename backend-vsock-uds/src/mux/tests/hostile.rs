//! Packets that no kernel sends, and ports that lead nowhere.

use std::os::unix::net::UnixDatagram;
use std::path::Path;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use super::*;
use crate::packet::{SHUTDOWN_BOTH, SHUTDOWN_SEND};

fn packet(op: Op) -> Header {
    DpuSocket::new(99, 77, Kind::Stream).header(op, 0, 0)
}

#[test]
fn an_unknown_pair_gets_exactly_one_rst_per_packet_and_an_rst_none() {
    let mut world = World::new();
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Rw,
        Op::CreditUpdate,
        Op::CreditRequest,
        Op::Unknown(0),
        Op::Unknown(8),
        Op::Unknown(255),
    ] {
        world.send(&packet(op), &[]);
        world.settle();
        let answer = world.next().expect("an answer");
        let header = answer.header;
        assert_eq!(header.op, Op::Rst, "to {op:?}");
        assert_eq!((header.src_port, header.dst_port, header.src_cid), (77, 99, HOST_CID));
        assert_eq!(world.next(), None, "more than one answer to {op:?}");
    }
    world.send(&packet(Op::Rst), &[]);
    world.settle();
    assert_eq!(world.next(), None, "an RST is never answered");
    assert_eq!(world.mux.connections(), 0);
}

#[test]
fn a_port_without_a_rule_is_refused() {
    let mut world = World::new();
    world.send(&packet(Op::Request), &[]);
    world.settle();
    assert_eq!(world.ops(), [Op::Rst]);
    assert_eq!(world.mux.counters().refused_by_rule, 1);
}

#[test]
fn socket_types_that_do_not_exist_are_reset_with_their_own_type() {
    let mut world = World::new();
    let _listener = world.listen();
    for kind in [0, 3, 9, u16::MAX] {
        let kind = Kind::Unknown(kind);
        world.send(&Header { kind, dst_port: PORT, ..packet(Op::Request) }, &[]);
        world.settle();
        let answer = world.next().expect("an answer").header;
        assert_eq!((answer.op, answer.kind), (Op::Rst, kind));
    }
    assert_eq!(world.mux.connections(), 0);
}

#[test]
fn packets_for_others_are_reset_and_forged_senders_are_dropped() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 99);
    for cid in [0, 1, 3, CID, u64::MAX] {
        world.send(&Header { dst_cid: cid, ..socket.header(Op::Rw, 0, 0) }, &[]);
        world.settle();
        let answer = world.next().expect("an answer").header;
        assert_eq!((answer.op, answer.src_cid), (Op::Rst, cid), "it comes from where the packet went");
    }
    for cid in [0, 1, HOST_CID, CID + 1, u64::MAX] {
        world.send(&Header { src_cid: cid, ..socket.header(Op::Rst, 0, 0) }, &[]);
    }
    world.settle();
    assert_eq!(world.next(), None);
    assert_eq!(world.mux.counters().bad_packets, 5);
    socket.write(&mut world, b"unharmed");
    assert_eq!(drain(&mut stream), (b"unharmed".to_vec(), false));
}

#[test]
fn lengths_that_do_not_fit_reset_the_connection_and_return_the_buffer() {
    for (len, op) in [(11, Op::Rw), (u32::MAX, Op::Rw), (10, Op::Shutdown), (10, Op::CreditUpdate)] {
        let mut world = World::new();
        let listener = world.listen();
        let (mut socket, mut stream) = world.pair(&listener, 5000);
        socket.write(&mut world, b"before");
        let header = Header { len, ..socket.header(op, 0, 0) };
        world.send(&header, b"0123456789");
        world.settle();
        assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)], "{len} {op:?}");
        assert_eq!(drain(&mut stream), (b"before".to_vec(), true));
        assert_eq!(world.tx_free.len(), usize::from(TX_SLOTS));
        assert_eq!(world.mux.connections(), 0);
    }
}

#[test]
fn a_packet_shorter_than_a_header_is_returned_and_counted() {
    let mut world = World::new();
    for len in [1, 10, 43] {
        world.send_pieces(&[&packet(Op::Rw).encode()[..len]]);
    }
    world.settle();
    assert_eq!(world.next(), None);
    assert_eq!(world.mux.counters().bad_packets, 3);
    assert_eq!(world.tx_free.len(), usize::from(TX_SLOTS));
}

#[test]
fn bytes_behind_the_stated_length_are_not_payload() {
    let mut world = World::new();
    let listener = world.listen();
    let (socket, mut stream) = world.pair(&listener, 5000);
    world.send(&socket.header(Op::Rw, 0, 3), b"abcdef");
    world.settle();
    assert_eq!(drain(&mut stream).0, b"abc");
}

#[test]
fn a_second_request_a_response_out_of_the_blue_and_an_unknown_operation_reset_the_connection() {
    for op in [Op::Request, Op::Response, Op::Unknown(8)] {
        let mut world = World::new();
        let listener = world.listen();
        let (mut socket, mut stream) = world.pair(&listener, 5000);
        socket.tell(&mut world, op, 0);
        world.settle();
        assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)], "{op:?}");
        assert!(drain(&mut stream).1);
        assert_eq!(world.mux.connections(), 0);
    }
}

#[test]
fn sending_beyond_the_window_resets_the_connection() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, _stream) = world.pair(&listener, 5000);
    let bytes = pattern(65_536);
    for _ in 0..40 {
        socket.write_packet(&mut world, &bytes, 0);
        world.turn();
    }
    world.settle();
    assert!(socket.take_ops(&mut world).contains(&(Op::Rst, 0)));
    assert_eq!((world.mux.connections(), world.mux.buffered()), (0, 0));
}

#[test]
fn lies_about_credit_never_make_the_mux_send_more_than_was_offered() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    socket.buf_alloc = 1000;
    socket.tell(&mut world, Op::CreditUpdate, 0);
    stuff(&mut stream, &pattern(100_000));
    world.settle();
    socket.receive(&mut world);
    assert_eq!(socket.unread, 1000);
    // Shrinks with bytes in flight, acknowledges the unsent, goes backwards.
    for (buf_alloc, fwd_cnt) in [(10, 0), (0, 0), (1000, 1001), (1000, u32::MAX), (u32::MAX, 5000)] {
        (socket.buf_alloc, socket.fwd_cnt) = (buf_alloc, fwd_cnt);
        socket.tell(&mut world, Op::CreditUpdate, 0);
        world.settle();
        assert_eq!(world.next(), None, "after {buf_alloc} {fwd_cnt}");
    }
    assert_eq!(world.mux.counters().bad_credit, 3);
    (socket.buf_alloc, socket.fwd_cnt, socket.unread) = (1500, 1000, 0);
    socket.tell(&mut world, Op::CreditUpdate, 0);
    world.settle();
    socket.receive(&mut world);
    assert_eq!(socket.unread, 1500);
}

#[test]
fn a_credit_request_is_answered() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, _stream) = world.pair(&listener, 5000);
    socket.tell(&mut world, Op::CreditRequest, 0);
    world.settle();
    assert_eq!(socket.take_ops(&mut world), [(Op::CreditUpdate, 0)]);
}

#[test]
fn a_shutdown_without_flags_or_with_reserved_ones_changes_nothing() {
    let mut world = World::new();
    let listener = world.listen();
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    for flags in [0, 4, 0xFFFF_FFF0] {
        socket.tell(&mut world, Op::Shutdown, flags);
    }
    world.settle();
    socket.write(&mut world, b"alive");
    assert_eq!(drain(&mut stream), (b"alive".to_vec(), false));
    assert_eq!(socket.take_ops(&mut world), []);
}

#[test]
fn a_request_flood_ends_at_the_quota_and_every_request_is_answered() {
    let quotas = Quotas { connections: 50, ..Quotas::default() };
    let mut world = World::with(quotas);
    let path = world.path("service");
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).expect("an address")).expect("bound");
    rustix::net::listen(&listener, 4096).expect("listening");
    let mut answers = 0;
    for port in 0..3000u32 {
        let socket = DpuSocket::new(port, PORT, Kind::Stream);
        socket.tell(&mut world, Op::Request, 0);
        if port % 20 == 0 {
            world.settle();
            answers += world.ops().len();
        }
    }
    world.settle();
    answers += world.ops().len();
    assert_eq!(answers, 3000);
    assert_eq!(world.mux.connections(), 50);
    assert_eq!(world.mux.counters().refused_by_quota, 2950);
}

#[test]
fn resets_wait_in_a_bounded_queue() {
    let quotas = Quotas { resets: 10, ..Quotas::default() };
    let mut world = World::with(quotas);
    world.refill = false;
    for _ in 0..1000 {
        world.send(&packet(Op::Rw), &[]);
        world.turn();
    }
    assert_eq!(world.ops().len(), usize::from(RX_SIZE));
    world.refill = true;
    world.offer_held();
    world.settle();
    assert_eq!(world.ops().len(), 10);
    assert_eq!(world.mux.counters().resets_dropped, 1000 - u64::from(RX_SIZE) - 10);
}

#[test]
fn windows_are_a_budget_of_the_whole_dpu() {
    let quotas = Quotas { windows: 1 << 20, ..Quotas::default() };
    let mut world = World::with(quotas);
    let listener = world.listen();
    let mut pairs = Vec::new();
    for port in 0..10 {
        pairs.push(world.pair(&listener, port));
    }
    let mut refused = DpuSocket::new(10, PORT, Kind::Stream);
    refused.tell(&mut world, Op::Request, 0);
    world.settle();
    assert_eq!(refused.take_ops(&mut world), [(Op::Rst, 0)]);
    let bytes = pattern(1 << 20);
    for (socket, _) in &mut pairs {
        socket.write(&mut world, &bytes);
    }
    assert!(world.mux.buffered() <= 1 << 20);
    // One that ends makes room for the next.
    let (socket, _) = pairs.pop().expect("one");
    socket.tell(&mut world, Op::Rst, 0);
    drop(pairs.pop());
    world.settle();
    world.pass(TIMEOUTS.linger);
    world.inbox.clear();
    world.pair(&listener, 11);
}

#[test]
fn paths_that_are_no_listening_socket_refuse_at_once() {
    let root = tempfile::tempdir().expect("a directory");
    let mut routes = Routes::none().with_family(&root.path().join("dpu"));
    std::fs::create_dir(root.path().join("dpu_1")).expect("a directory");
    std::fs::write(root.path().join("dpu_2"), b"").expect("a file");
    std::os::unix::fs::symlink("nowhere", root.path().join("dpu_3")).expect("a link");
    drop(UnixListener::bind(root.path().join("dpu_4")).expect("a dead socket"));
    let _real = UnixListener::bind(root.path().join("real")).expect("a listener");
    std::os::unix::fs::symlink("real", root.path().join("dpu_5")).expect("a link");
    let _datagram = UnixDatagram::bind(root.path().join("dpu_6")).expect("a datagram socket");
    routes.insert(7, Path::new("/").join("x".repeat(300)));
    let mut world = World::build(root, routes, Quotas::default());
    for (port, expected) in [
        (1, Op::Rst),
        (2, Op::Rst),
        (3, Op::Rst),
        (4, Op::Rst),
        (5, Op::Response),
        (6, Op::Response),
        (7, Op::Rst),
        (8, Op::Rst),
        (u32::MAX, Op::Rst),
    ] {
        DpuSocket::new(9000, port, Kind::Stream).tell(&mut world, Op::Request, 0);
        world.settle();
        assert_eq!(world.ops(), [expected], "port {port}");
    }
    assert_eq!(world.mux.counters().refused_by_host, 7);
}

#[test]
fn a_full_backlog_is_waited_out() {
    let mut world = World::new();
    let path = world.path("service");
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).expect("an address")).expect("bound");
    rustix::net::listen(&listener, 0).expect("listening");
    let mut first = world.connect(1);
    let mut second = DpuSocket::new(2, PORT, Kind::Stream);
    second.tell(&mut world, Op::Request, 0);
    world.settle();
    assert_eq!(second.take_ops(&mut world), [], "the backlog of one is full");
    // It is tried again on a timer, not in a loop.
    assert!(!world.turn());
    let accepted = rustix::net::accept(&listener).expect("the first one");
    world.pass(100);
    assert_eq!(second.take_ops(&mut world), [(Op::Response, 0)]);
    assert_eq!(first.take_ops(&mut world), []);
    drop(accepted);
}

#[test]
fn a_backlog_that_stays_full_refuses_at_the_deadline() {
    let mut world = World::new();
    let path = world.path("service");
    let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).expect("a socket");
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).expect("an address")).expect("bound");
    rustix::net::listen(&listener, 0).expect("listening");
    let _first = world.connect(1);
    let mut second = DpuSocket::new(2, PORT, Kind::Stream);
    second.tell(&mut world, Op::Request, 0);
    world.settle();
    world.pass(TIMEOUTS.connect - 1);
    assert_eq!(second.take_ops(&mut world), []);
    world.pass(1);
    assert_eq!(second.take_ops(&mut world), [(Op::Rst, 0)]);
    assert_eq!(world.mux.connections(), 1);
}

#[test]
fn a_listener_that_returns_is_found_again() {
    let mut world = World::new();
    let listener = world.listen();
    world.pair(&listener, 1);
    drop(listener);
    std::fs::remove_file(world.path("service")).expect("removed");
    let mut socket = DpuSocket::new(2, PORT, Kind::Stream);
    socket.tell(&mut world, Op::Request, 0);
    world.settle();
    assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)]);
    let listener = world.listen();
    world.pair(&listener, 2);
}

#[test]
fn useless_buffers_go_back_and_do_not_stop_the_others() {
    let mut world = World::new();
    let listener = world.listen();
    // The driver's first buffers hold no payload, or not even a header.
    for (head, len) in [(0, 20), (1, HEADER_LEN as u32), (2, 43)] {
        let addr = RX_AREA + u64::from(head) * RX_BUFFER;
        world.rx_queue.describe(&world.memory, head, addr, len, 2, 0);
    }
    let (mut socket, mut stream) = world.pair(&listener, 5000);
    let bytes = pattern(150_000);
    assert_eq!(stuff(&mut stream, &bytes), bytes.len());
    world.settle();
    socket.read_all(&mut world);
    assert!(socket.received == bytes);
    assert!(world.mux.counters().bad_packets > 0);
}

#[test]
fn closing_packets_in_any_order_are_survived() {
    let mut world = World::new();
    let listener = world.listen();
    let ops = [
        (Op::Shutdown, SHUTDOWN_SEND),
        (Op::Rst, 0),
        (Op::Shutdown, SHUTDOWN_BOTH),
        (Op::Request, 0),
        (Op::CreditRequest, 0),
        (Op::Response, 0),
    ];
    for first in ops {
        for second in ops {
            for third in ops {
                let (socket, stream) = world.pair(&listener, 5000);
                for (op, flags) in [first, second, third] {
                    socket.tell(&mut world, op, flags);
                }
                world.settle();
                drop(stream);
                while let Ok(Some(_)) = accept_now(&listener) {}
                world.settle();
                world.pass(TIMEOUTS.linger * 2);
                world.inbox.clear();
                assert_eq!(world.mux.connections(), 0, "after {first:?} {second:?} {third:?}");
            }
        }
    }
}

/// A connection that waits, taken and closed.
fn accept_now(listener: &UnixListener) -> std::io::Result<Option<UnixStream>> {
    listener.set_nonblocking(true)?;
    let accepted = listener.accept();
    listener.set_nonblocking(false)?;
    match accepted {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}
