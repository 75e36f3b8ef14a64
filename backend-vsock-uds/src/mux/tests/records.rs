//! Records: `SOCK_SEQPACKET` of the DPU, and host sockets that keep the bounds of what they are sent.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::*;
use crate::packet::{SEQ_EOM, SEQ_EOR, SHUTDOWN_BOTH, SHUTDOWN_SEND};

impl World {
    fn record_listener(&self) -> OwnedFd {
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None)
                .expect("a socket");
        let address = SocketAddrUnix::new(self.path("service")).expect("an address");
        rustix::net::bind(&listener, &address).expect("bound");
        rustix::net::listen(&listener, 5).expect("listening");
        listener
    }

    fn record_pair(&mut self, listener: &OwnedFd, port: u32, kind: Kind) -> (DpuSocket, OwnedFd) {
        let socket = self.connect_kind(port, kind);
        let host = rustix::net::accept_with(listener, SocketFlags::NONBLOCK).expect("the mux has connected");
        (socket, host)
    }
}

fn receive(socket: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut buffer = vec![0; 1 << 20];
    let (len, _) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty())?;
    buffer.truncate(len);
    Ok(buffer)
}

#[test]
fn records_of_the_dpu_keep_their_bounds() {
    let mut world = World::new();
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::SeqPacket);
    let big = pattern(150_000);
    socket.write_packet(&mut world, b"one", SEQ_EOM);
    socket.write_packet(&mut world, b"", SEQ_EOM);
    // A record in several packets, and then one that is marked.
    socket.write_packet(&mut world, &big[..65_536], 0);
    socket.write_packet(&mut world, &big[65_536..131_072], 0);
    socket.write_packet(&mut world, &big[131_072..], SEQ_EOM);
    socket.write_packet(&mut world, b"marked", SEQ_EOM | SEQ_EOR);
    world.settle();
    assert_eq!(receive(&host), Ok(b"one".to_vec()));
    assert_eq!(receive(&host), Ok(Vec::new()));
    assert!(receive(&host) == Ok(big));
    assert_eq!(receive(&host), Ok(b"marked".to_vec()));
    assert_eq!(receive(&host), Err(Errno::AGAIN));
}

#[test]
fn records_of_the_host_keep_their_bounds() {
    let mut world = World::new();
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::SeqPacket);
    let records =
        [b"one".to_vec(), Vec::new(), pattern(100_000), pattern(4052), pattern(4053), b"x".to_vec()];
    for record in &records {
        rustix::net::send(&host, record, SendFlags::empty()).expect("sent");
        world.settle();
        socket.read_all(&mut world);
    }
    assert!(socket.records == records);
    // Many at once.
    for number in 0..100u8 {
        rustix::net::send(&host, &[number; 10], SendFlags::empty()).expect("sent");
    }
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.records.len(), records.len() + 100);
    assert_eq!(socket.records.last(), Some(&vec![99; 10]));
}

#[test]
fn a_record_larger_than_the_credit_goes_in_parts() {
    let mut world = World::new();
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::SeqPacket);
    socket.buf_alloc = 60_000;
    socket.tell(&mut world, Op::CreditUpdate, 0);
    world.settle();
    let (first, second) = (pattern(50_000), pattern(60_000));
    rustix::net::send(&host, &first, SendFlags::empty()).expect("sent");
    rustix::net::send(&host, &second, SendFlags::empty()).expect("sent");
    world.settle();
    socket.receive(&mut world);
    assert_eq!((socket.records.len(), socket.received.len()), (1, 60_000), "as far as the credit goes");
    assert!(!world.turn());
    socket.read_all(&mut world);
    assert!(socket.records == [first, second]);
}

#[test]
fn a_record_that_can_never_fit_ends_the_connection() {
    let mut world = World::new();
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::SeqPacket);
    socket.buf_alloc = 1000;
    socket.tell(&mut world, Op::CreditUpdate, 0);
    world.settle();
    rustix::net::send(&host, &[0; 1001], SendFlags::empty()).expect("sent");
    world.settle();
    assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)]);
    assert_eq!(socket.received, b"", "no part of it is passed on");
    assert_eq!(receive(&host), Err(Errno::CONNRESET), "the host program is told");
    assert_eq!((world.mux.counters().oversized_records, world.mux.connections()), (1, 0));
}

#[test]
fn the_window_for_records_is_what_the_host_socket_takes_at_once() {
    let mut world = World::with(Quotas { window: 16 << 20, windows: 1 << 30, ..Quotas::default() });
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::SeqPacket);
    let largest = pattern(socket.credit() as usize);
    assert!(largest.len() < 16 << 20);
    for part in largest.chunks(65_536) {
        let last = part.as_ptr_range().end == largest.as_ptr_range().end;
        socket.write_packet(&mut world, part, if last { SEQ_EOM } else { 0 });
    }
    world.settle();
    assert_eq!(socket.take_ops(&mut world).iter().filter(|(op, _)| *op == Op::Rst).count(), 0);
    let mut buffer = vec![0; 16 << 20];
    let (len, _) = rustix::net::recv(&host, &mut buffer[..], RecvFlags::empty()).expect("a record");
    assert!(buffer[..len] == largest);
}

#[test]
fn half_close_of_a_record_connection() {
    let mut world = World::new();
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::SeqPacket);
    socket.write_packet(&mut world, b"last", SEQ_EOM);
    socket.write_packet(&mut world, b"", SEQ_EOM);
    socket.write_packet(&mut world, b"never finished", 0);
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_SEND);
    world.settle();
    assert_eq!(receive(&host), Ok(b"last".to_vec()));
    assert_eq!(receive(&host), Ok(Vec::new()), "the empty record");
    assert_eq!(receive(&host), Ok(Vec::new()), "the end");
    assert_eq!(world.mux.counters().discarded_bytes, 14);
    rustix::net::send(&host, b"answer", SendFlags::empty()).expect("sent");
    rustix::net::send(&host, b"", SendFlags::empty()).expect("sent");
    drop(host);
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.records, [&b"answer"[..], b""]);
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_BOTH)]);
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_eq!(world.mux.connections(), 0);
}

#[test]
fn a_host_that_reads_no_records_holds_no_more_than_a_window() {
    let mut world = World::new();
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::SeqPacket);
    let mut sent = 0u32;
    loop {
        let record = [sent as u8; 1000];
        if (socket.credit() as usize) < record.len() {
            world.settle();
            socket.receive(&mut world);
            if (socket.credit() as usize) < record.len() {
                break;
            }
        }
        socket.write_packet(&mut world, &record, SEQ_EOM);
        sent += 1;
    }
    assert!(world.mux.buffered() <= Quotas::default().window as usize);
    assert!(!world.turn());
    // The same with empty records, which credit does not bound.
    for _ in 0..300_000 {
        socket.write_packet(&mut world, b"", SEQ_EOM);
        if world.mux.connections() == 0 {
            break;
        }
    }
    world.settle();
    assert!(socket.take_ops(&mut world).contains(&(Op::Rst, 0)));
    assert_eq!(world.mux.counters().oversized_records, 1);
    assert_eq!(receive(&host).map(|record| record.len()), Ok(1000), "what was delivered stays");
}

#[test]
fn records_arrive_in_order_at_a_slow_host() {
    let mut world = World::new();
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::SeqPacket);
    let (mut sent, mut got) = (0u32, 0u32);
    while got < 5000 {
        while sent < 5000 && socket.credit() > 4000 {
            let record = vec![sent as u8; 1 + (sent as usize * 37) % 4000];
            socket.write_packet(&mut world, &record, SEQ_EOM);
            sent += 1;
        }
        world.settle();
        socket.receive(&mut world);
        let before = got;
        while let Ok(record) = receive(&host) {
            assert!(record == vec![got as u8; 1 + (got as usize * 37) % 4000], "record {got}");
            got += 1;
        }
        world.settle();
        socket.receive(&mut world);
        assert!(got > before, "stalled at {got}");
    }
}

#[test]
fn records_never_end_at_a_stream_socket() {
    let mut world = World::new();
    let _listener = world.listen();
    let mut socket = DpuSocket::new(1, PORT, Kind::SeqPacket);
    socket.tell(&mut world, Op::Request, 0);
    world.settle();
    assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)]);
}

#[test]
fn a_stream_may_end_at_a_record_socket() {
    let mut world = World::new();
    let listener = world.record_listener();
    let (mut socket, host) = world.record_pair(&listener, 5000, Kind::Stream);
    socket.write_packet(&mut world, b"<14>message", 0);
    socket.write_packet(&mut world, b"", 0);
    socket.write_packet(&mut world, b"<14>another", 0);
    world.settle();
    assert_eq!(receive(&host), Ok(b"<14>message".to_vec()));
    assert_eq!(receive(&host), Ok(b"<14>another".to_vec()));
    for record in [&b"ab"[..], b"", b"cd"] {
        rustix::net::send(&host, record, SendFlags::empty()).expect("sent");
    }
    drop(host);
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"abcd");
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_BOTH)]);
}

#[test]
fn a_datagram_socket_takes_packets_and_can_answer() {
    let mut world = World::new();
    let service = UnixDatagram::bind(world.path("service")).expect("a datagram socket");
    service.set_nonblocking(true).expect("non-blocking");
    let mut socket = world.connect(5000);
    socket.write_packet(&mut world, b"<14>message", 0);
    world.settle();
    let mut buffer = [0; 100];
    let (len, from) = service.recv_from(&mut buffer).expect("a datagram");
    assert_eq!(&buffer[..len], b"<14>message");
    service.send_to_addr(b"answer", &from).expect("the sender has an address");
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"answer");
    // The service goes away: the DPU learns it with its next packet.
    drop(service);
    assert!(!world.turn());
    socket.write_packet(&mut world, b"nobody", 0);
    world.settle();
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_BOTH)]);
}

#[test]
fn a_full_datagram_socket_is_waited_for() {
    let mut world = World::new();
    let service = UnixDatagram::bind(world.path("service")).expect("a datagram socket");
    service.set_nonblocking(true).expect("non-blocking");
    let mut socket = world.connect(5000);
    for number in 0..2000u32 {
        socket.write_packet(&mut world, &number.to_le_bytes(), 0);
    }
    world.settle();
    assert!(world.mux.buffered() > 0, "the queue of a datagram socket is short");
    assert!(!world.turn());
    let mut buffer = [0; 100];
    for number in 0..2000u32 {
        if number % 5 == 0 {
            world.settle();
        }
        assert_eq!(service.recv(&mut buffer).ok(), Some(4), "datagram {number}");
        assert_eq!(buffer[..4], number.to_le_bytes());
    }
    assert_eq!(world.mux.buffered(), 0);
}
