//! Host programs that ask for a port of the DPU.

use std::io::Write;
use std::net::Shutdown;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::*;
use crate::mux::ACCEPT_PAUSE;
use crate::packet::{SHUTDOWN_BOTH, SHUTDOWN_SEND};

impl World {
    /// The socket where host programs say which port they want.
    fn hybrid(&mut self) -> PathBuf {
        self.serve("hybrid", None)
    }

    fn serve(&mut self, name: &str, port: Option<u32>) -> PathBuf {
        let path = self.path(name);
        let listener = UnixListener::bind(&path).expect("a listener");
        listener.set_nonblocking(true).expect("non-blocking");
        self.mux.add_listener(listener.into(), port, Kind::Stream).expect("watched");
        path
    }

    /// The REQUEST that reached the DPU, as its socket.
    fn requested(&mut self) -> DpuSocket {
        self.settle();
        let header = self.next().expect("a packet").header;
        assert_eq!((header.op, header.flags, header.src_cid), (Op::Request, 0, HOST_CID));
        let mut socket = DpuSocket::new(header.dst_port, header.src_port, header.kind);
        (socket.peer_alloc, socket.peer_fwd) = (header.buf_alloc, header.fwd_cnt);
        socket
    }
}

fn program(path: &std::path::Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("connected");
    stream.set_nonblocking(true).expect("non-blocking");
    stream
}

#[test]
fn a_greeting_leads_to_the_port_and_is_answered_when_the_dpu_accepts() {
    let mut world = World::new();
    let path = world.hybrid();
    let mut stream = program(&path);
    stream.write_all(b"CONNECT 52\nfirst words").expect("written");
    let mut socket = world.requested();
    assert_eq!(socket.dpu_port, 52);
    assert!((1024..65_536).contains(&socket.host_port), "five digits, for systemd-ssh-proxy");
    assert_eq!(drain(&mut stream).0, b"", "no answer before the DPU's");
    socket.tell(&mut world, Op::Response, 0);
    world.settle();
    assert_eq!(drain(&mut stream).0, format!("OK {}\n", socket.host_port).as_bytes());
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"first words");
    socket.write(&mut world, b"hello");
    assert_eq!(drain(&mut stream).0, b"hello");
    assert_eq!(world.mux.counters().connections_by_host, 1);
}

#[test]
fn a_greeting_may_come_byte_by_byte() {
    let mut world = World::new();
    let path = world.hybrid();
    let mut stream = program(&path);
    for byte in b"CONNECT 4294967294" {
        stream.write_all(&[*byte]).expect("written");
        world.settle();
        assert_eq!(world.mux.connections(), 0);
    }
    stream.write_all(b"\n").expect("written");
    assert_eq!(world.requested().dpu_port, 4_294_967_294);
}

#[test]
fn a_refused_port_closes_the_host_program_without_a_word() {
    let mut world = World::new();
    let path = world.hybrid();
    let mut stream = program(&path);
    stream.write_all(b"CONNECT 52\n").expect("written");
    let mut socket = world.requested();
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_eq!(drain(&mut stream), (Vec::new(), true));
    assert_eq!(socket.take_ops(&mut world), []);
    assert_eq!(world.mux.connections(), 0);
}

#[test]
fn a_dpu_that_never_answers_is_given_up() {
    let mut world = World::new();
    let path = world.hybrid();
    let mut stream = program(&path);
    stream.write_all(b"CONNECT 52\n").expect("written");
    let mut socket = world.requested();
    world.pass(TIMEOUTS.connect);
    assert_eq!(drain(&mut stream), (Vec::new(), true));
    assert_eq!(socket.take_ops(&mut world), [(Op::Rst, 0)]);
    assert_eq!(world.mux.connections(), 0);
}

#[test]
fn a_dpu_without_driver_is_given_up_in_silence() {
    let mut world = World::new();
    world.refill = false;
    let path = world.hybrid();
    // All buffers are used up by others.
    for port in 0..u32::from(RX_SIZE) {
        DpuSocket::new(port, 1, Kind::Stream).tell(&mut world, Op::Rw, 0);
        world.turn();
    }
    world.inbox.clear();
    let mut stream = program(&path);
    stream.write_all(b"CONNECT 52\n").expect("written");
    world.settle();
    world.pass(TIMEOUTS.connect);
    assert_eq!(drain(&mut stream), (Vec::new(), true));
    world.refill = true;
    world.offer_held();
    world.settle();
    assert_eq!(world.ops(), [], "what was never asked is not taken back");
    assert_eq!(world.mux.connections(), 0);
}

#[test]
fn nonsense_ends_the_program_at_once_and_nobody_else() {
    let mut world = World::new();
    let path = world.hybrid();
    let patient = program(&path);
    world.settle();
    let junk = vec![0xAA; 100_000];
    for nonsense in [
        &b"\n"[..],
        b"GET / HTTP/1.1\r\n",
        b"CONNECT \n",
        b"CONNECT 99999999999\n",
        b"CONNECT 99999999999999999999999999999999999999",
        &junk,
    ] {
        let mut stream = program(&path);
        stuff(&mut stream, nonsense);
        world.settle();
        assert!(drain(&mut stream).1, "{}", nonsense[..20.min(nonsense.len())].escape_ascii());
    }
    // Connecting and leaving, and leaving in the middle of the greeting.
    drop(program(&path));
    let mut stream = program(&path);
    stream.write_all(b"CONNECT 5").expect("written");
    world.settle();
    stream.shutdown(Shutdown::Write).expect("shut down");
    world.settle();
    assert!(drain(&mut stream).1);
    assert_eq!(world.mux.counters().bad_greetings, 8);
    (&patient).write_all(b"CONNECT 7\n").expect("written");
    assert_eq!(world.requested().dpu_port, 7);
}

#[test]
fn a_slow_greeting_ends_at_its_deadline() {
    let mut world = World::new();
    let path = world.hybrid();
    let mut stream = program(&path);
    world.settle();
    for byte in b"CONNECT 5" {
        world.pass(1000);
        stream.write_all(&[*byte]).expect("written");
    }
    world.settle();
    assert!(!drain(&mut stream).1);
    world.pass(TIMEOUTS.greeting - 9000);
    assert!(drain(&mut stream).1, "bytes do not extend the deadline");
    assert_eq!(world.mux.next_deadline(), None);
}

#[test]
fn idle_callers_do_not_keep_the_others_out() {
    let mut world = World::with(Quotas { greetings: 4, ..Quotas::default() });
    let path = world.hybrid();
    let mut idle = Vec::new();
    for _ in 0..50 {
        idle.push(program(&path));
        world.now += 1;
        world.settle();
    }
    let mut honest = program(&path);
    honest.write_all(b"CONNECT 9\n").expect("written");
    assert_eq!(world.requested().dpu_port, 9);
    let open = idle.iter_mut().filter_map(|stream| (!drain(stream).1).then_some(())).count();
    assert_eq!(open, 3, "the latest ones may still greet");
}

#[test]
fn a_program_that_sends_and_leaves_before_the_answer_is_still_heard() {
    let mut world = World::new();
    let path = world.hybrid();
    let mut stream = program(&path);
    stream.write_all(b"CONNECT 52\nREADY=1").expect("written");
    drop(stream);
    let mut socket = world.requested();
    socket.tell(&mut world, Op::Response, 0);
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"READY=1");
    assert_eq!(socket.take_ops(&mut world).last(), Some(&(Op::Shutdown, SHUTDOWN_BOTH)));
    socket.tell(&mut world, Op::Rst, 0);
    world.settle();
    assert_eq!(world.mux.connections(), 0);
}

#[test]
fn a_program_that_ends_its_direction_at_once_gets_its_answer() {
    let mut world = World::new();
    let path = world.hybrid();
    let mut stream = program(&path);
    stream.write_all(b"CONNECT 52\nquestion").expect("written");
    stream.shutdown(Shutdown::Write).expect("shut down");
    let mut socket = world.requested();
    socket.tell(&mut world, Op::Response, 0);
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"question");
    assert_eq!(socket.take_ops(&mut world), [(Op::Shutdown, SHUTDOWN_SEND)]);
    socket.write(&mut world, b"answer");
    socket.tell(&mut world, Op::Shutdown, SHUTDOWN_BOTH);
    world.settle();
    let expected = format!("OK {}\nanswer", socket.host_port).into_bytes();
    assert_eq!(drain(&mut stream), (expected, true));
}

#[test]
fn a_fixed_socket_leads_to_its_port_without_a_greeting() {
    let mut world = World::new();
    let path = world.serve("fixed", Some(77));
    let mut stream = program(&path);
    let mut socket = world.requested();
    assert_eq!(socket.dpu_port, 77);
    socket.tell(&mut world, Op::Response, 0);
    world.settle();
    assert_eq!(drain(&mut stream).0, b"", "no OK where nobody said CONNECT");
    stream.write_all(b"CONNECT 5\n").expect("written");
    world.settle();
    socket.read_all(&mut world);
    assert_eq!(socket.received, b"CONNECT 5\n", "here it is data");
}

#[test]
fn a_record_listener_asks_for_a_record_connection() {
    let mut world = World::new();
    let path = world.path("records");
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None)
            .expect("a socket");
    let address = rustix::net::SocketAddrUnix::new(&path).expect("an address");
    rustix::net::bind(&listener, &address).expect("bound");
    rustix::net::listen(&listener, 5).expect("listening");
    world.mux.add_listener(listener, Some(8), Kind::SeqPacket).expect("watched");
    let client = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).expect("a socket");
    rustix::net::connect(&client, &address).expect("connected");
    let mut socket = world.requested();
    assert_eq!((socket.dpu_port, socket.kind), (8, Kind::SeqPacket));
    socket.tell(&mut world, Op::Response, 0);
    for record in [&b"one"[..], b"", b"three"] {
        rustix::net::send(&client, record, rustix::net::SendFlags::empty()).expect("sent");
    }
    world.settle();
    socket.receive(&mut world);
    assert_eq!(socket.records, [&b"one"[..], b"", b"three"]);
}

#[test]
fn who_connects_is_known() {
    let mut world = World::new();
    let path = world.serve("fixed", Some(77));
    let _stream = program(&path);
    world.settle();
    let token = world.mux.table.tokens().next().expect("one connection");
    let (_, channel) = world.mux.table.get_mut(token).expect("it lives");
    let peer = channel.peer.expect("credentials");
    assert_eq!(peer.pid, std::process::id() as i32);
    assert_eq!(peer.uid, rustix::process::getuid().as_raw());
}

#[test]
fn assigned_ports_are_not_reused_at_once() {
    let mut world = World::new();
    let path = world.serve("fixed", Some(77));
    let mut seen = std::collections::HashSet::new();
    for _ in 0..100 {
        let stream = program(&path);
        let socket = world.requested();
        assert!(seen.insert(socket.host_port));
        socket.tell(&mut world, Op::Rst, 0);
        drop(stream);
        world.settle();
    }
}

#[test]
fn a_listener_rests_when_no_descriptor_is_left_and_goes_on_after() {
    let mut world = World::new();
    let path = world.serve("fixed", Some(77));
    let mut stream = program(&path);
    // What the kernel says when the limit of descriptors is reached; the limit itself is shared with
    // all other tests of this process.
    world.mux.pause_listener_for_test(0, world.now);
    assert!(!world.turn(), "a caller in the backlog makes no events now");
    assert_eq!(world.mux.next_deadline(), Some(world.now + ACCEPT_PAUSE));
    world.pass(ACCEPT_PAUSE);
    let socket = world.requested();
    socket.tell(&mut world, Op::Response, 0);
    world.settle();
    stream.write_all(b"x").expect("written");
    assert_eq!(world.mux.counters().accept_pauses, 1);
    assert_eq!(world.mux.next_deadline(), None);
}
