//! Many connections at once: nobody starves, and nobody pays for a peer that does not read.

use std::io::Write;

use super::*;
use crate::mux::RX_BATCH;

const CHANNELS: u32 = 64;

#[test]
fn one_busy_host_program_delays_the_others_by_a_batch_at_most() {
    let mut world = World::new();
    let listener = world.listen();
    let mut pairs: Vec<_> = (0..CHANNELS).map(|port| world.pair(&listener, port)).collect();
    let bytes = pattern(1 << 20);
    stuff(&mut pairs[0].1, &bytes);
    for round in 0..20 {
        for (_, stream) in &mut pairs[1..] {
            stream.write_all(b"ping").expect("written");
        }
        // The busy one is never done, and everybody is heard in the meantime.
        stuff(&mut pairs[0].1, &bytes);
        let mut busy_packets = 0;
        let mut heard = 0;
        while heard < CHANNELS - 1 {
            assert!(world.turn(), "round {round}: {heard} heard, and nothing happens");
            for (socket, _) in &mut pairs {
                let before = socket.packets;
                socket.receive(&mut world);
                let came = socket.packets - before;
                if socket.dpu_port == 0 {
                    busy_packets += came;
                } else {
                    heard += came as u32;
                }
            }
            // The busy one is read as fast as it comes.
            let busy = &mut pairs[0].0;
            busy.fwd_cnt = busy.fwd_cnt.wrapping_add(std::mem::take(&mut busy.unread));
            busy.tell(&mut world, Op::CreditUpdate, 0);
        }
        assert!(busy_packets <= 12 * RX_BATCH, "{busy_packets} packets of the busy one came first");
    }
}

#[test]
fn hosts_that_do_not_read_cost_the_others_nothing() {
    let mut world = World::new();
    let listener = world.listen();
    let mut pairs: Vec<_> = (0..CHANNELS).map(|port| world.pair(&listener, port)).collect();
    let bytes = pattern(1 << 20);
    for (socket, _) in &mut pairs[1..] {
        socket.write(&mut world, &bytes);
    }
    let window = Quotas::default().bulk_window as usize;
    assert!(world.mux.buffered() <= window * CHANNELS as usize);
    assert!(!world.turn(), "full host sockets make no events");
    for _ in 0..50 {
        let (socket, stream) = &mut pairs[0];
        assert_eq!(socket.write(&mut world, &bytes[..100_000]), 100_000);
        assert!(drain(stream).0 == bytes[..100_000]);
    }
}

#[test]
fn dpu_sockets_that_are_not_read_cost_the_others_nothing() {
    let mut world = World::new();
    let listener = world.listen();
    let mut pairs: Vec<_> = (0..CHANNELS).map(|port| world.pair(&listener, port)).collect();
    let bytes = pattern(1 << 20);
    for _ in 0..10 {
        for (_, stream) in &mut pairs[1..] {
            stuff(stream, &bytes);
        }
        world.settle();
    }
    assert!(!world.turn(), "full DPU sockets make no events");
    for _ in 0..50 {
        let (socket, stream) = &mut pairs[0];
        assert_eq!(stuff(stream, &bytes[..100_000]), 100_000);
        world.settle();
        socket.received.clear();
        socket.read_all(&mut world);
        assert!(socket.received == bytes[..100_000]);
    }
    for (socket, _) in &mut pairs[1..] {
        socket.receive(&mut world);
        assert_eq!(socket.unread, socket.buf_alloc);
    }
}

#[test]
fn two_hundred_connections_move_their_own_bytes() {
    let mut world = World::new();
    let listener = world.listen();
    let mut pairs: Vec<_> = (0..200).map(|port| world.pair(&listener, port)).collect();
    for round in 0..5u8 {
        for (socket, stream) in &mut pairs {
            let mine = [socket.dpu_port as u8 ^ round; 3000];
            socket.write_packet(&mut world, &mine, 0);
            stream.write_all(&mine).expect("written");
            world.turn();
        }
        world.settle();
        // Packets are sorted out once for all sockets.
        let mut inbox = std::mem::take(&mut world.inbox);
        for (socket, stream) in &mut pairs {
            let mine = [socket.dpu_port as u8 ^ round; 3000];
            assert!(drain(stream).0 == mine);
            let (own, others) =
                inbox.drain(..).partition(|packet: &Packet| packet.header.dst_port == socket.dpu_port);
            (world.inbox, inbox) = (own, others);
            socket.received.clear();
            socket.receive(&mut world);
            assert!(socket.received == mine);
        }
    }
}
