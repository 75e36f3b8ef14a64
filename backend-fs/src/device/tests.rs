//! The device as a DPU sees it: real session, workers and threads over real rings; a file system that
//! the test holds back.

mod dpu;
mod gate;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::time::Instant;

use dpu::{Completed, Dpu, FORGET, GETATTR, SIZE, event, take_count};
use gate::{GATED, PANICS, PANICS_LATER, READY};
use rustix::io::Errno;
use vring::message::number;

use super::*;

const ATTR_REPLY: u32 = 16 + 104;

fn served(slot: u16) -> Completed {
    Completed { slot, errno: 0, written: ATTR_REPLY }
}

fn failed(slot: u16, errno: Errno) -> Completed {
    Completed { slot, errno: errno.raw_os_error(), written: 16 }
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::yield_now();
    }
}

fn mounted() -> (Dpu, dpu::Queue) {
    let dpu = Dpu::connect(|_, _| {});
    let queue = dpu.mount();
    (dpu, queue)
}

#[test]
fn requests_are_served_on_every_queue() {
    let (dpu, mut first) = mounted();
    let mut second = dpu.start(2);
    let mut high_priority = dpu.start(0);
    for round in 0..200 {
        dpu.getattr(&mut first, round % SIZE / 2, READY);
        dpu.getattr(&mut second, round % SIZE / 2, READY);
        assert_eq!(dpu.next(&mut first), served(round % SIZE / 2));
        assert_eq!(dpu.next(&mut second), served(round % SIZE / 2));
    }
    dpu.submit(&mut high_priority, &[(5, FORGET, READY, &3u64.to_ne_bytes())]);
    assert_eq!(dpu.next(&mut high_priority), Completed { slot: 5, errno: 0, written: 0 });
    assert_eq!(dpu.fs.look(|state| state.forgotten), 3);
    assert_eq!(dpu.disconnect().0.unwrap(), End::Disconnected);
}

#[test]
fn rings_without_event_index_are_served() {
    let dpu = Dpu::connect_with(0, |options, _| options.poll_window = Duration::ZERO);
    let mut queue = dpu.mount();
    for round in 0..200 {
        dpu.getattr(&mut queue, round % 20, READY);
        assert_eq!(dpu.next(&mut queue), served(round % 20));
    }
}

#[test]
fn queue_without_kick_descriptor_is_polled() {
    let (dpu, _first) = mounted();
    let mut polled = dpu.start_with(2, false);
    for slot in 0..20 {
        dpu.getattr(&mut polled, slot, READY);
        assert_eq!(dpu.next(&mut polled), served(slot));
    }
}

#[test]
fn blocked_request_lets_others_pass() {
    let (dpu, mut queue) = mounted();
    dpu.getattr(&mut queue, 1, GATED);
    dpu.fs.wait_until("the request is on another thread", |state| state.at_gate == 1);
    for slot in 2..20 {
        dpu.getattr(&mut queue, slot, READY);
        assert_eq!(dpu.next(&mut queue), served(slot));
    }
    dpu.fs.open_gate();
    assert_eq!(dpu.next(&mut queue), served(1));
}

#[test]
fn more_blocked_requests_than_threads_are_all_served() {
    let (dpu, mut queue) = mounted();
    for slot in 0..20 {
        dpu.getattr(&mut queue, slot, GATED);
    }
    dpu.fs.wait_until("the pool is at its limit", |state| state.at_gate == 2);
    dpu.getattr(&mut queue, 20, READY);
    assert_eq!(dpu.next(&mut queue), served(20));
    assert_eq!(dpu.fs.look(|state| state.at_gate), 2, "never more than the pool has");
    dpu.fs.open_gate();
    let slots: BTreeSet<u16> = (0..20).map(|_| dpu.next(&mut queue).slot).collect();
    assert_eq!(slots, (0..20).collect());
}

#[test]
fn lock_waiters_have_threads_of_their_own_up_to_a_limit() {
    let (dpu, mut queue) = mounted();
    for slot in 0..4 {
        dpu.setlkw(&mut queue, slot);
    }
    dpu.fs.wait_until("four wait", |state| state.at_lock == 4);
    dpu.setlkw(&mut queue, 4);
    assert_eq!(dpu.next(&mut queue), failed(4, Errno::NOLCK));
    // Locks leave the pool and the queue alone.
    dpu.getattr(&mut queue, 5, GATED);
    dpu.getattr(&mut queue, 6, READY);
    assert_eq!(dpu.next(&mut queue), served(6));
    dpu.fs.open_gate();
    assert_eq!(dpu.next(&mut queue), served(5));
    dpu.fs.free_lock();
    let slots: BTreeSet<u16> = (0..4)
        .map(|_| {
            let completed = dpu.next(&mut queue);
            assert_eq!((completed.errno, completed.written), (0, 16));
            completed.slot
        })
        .collect();
    assert_eq!(slots, (0..4).collect());
    dpu.setlkw(&mut queue, 7);
    assert_eq!(dpu.next(&mut queue).errno, 0, "waiters that are done make room");
}

#[test]
fn stopping_a_queue_ends_waits_for_locks_and_finishes_everything_else() {
    let (dpu, mut queue) = mounted();
    dpu.setlkw(&mut queue, 1);
    dpu.getattr(&mut queue, 2, GATED);
    dpu.fs.wait_until("both wait", |state| state.at_lock == 1 && state.at_gate == 1);
    let fs = Arc::clone(&dpu.fs);
    // The other request ends by itself, while the front end waits for the queue to stop.
    let opener = std::thread::spawn(move || {
        fs.wait_until("the lock is given up", |state| state.at_lock == 0);
        fs.open_gate();
    });
    assert_eq!(dpu.base(&queue), 3);
    opener.join().unwrap();
    let mut completions = [dpu.take(&mut queue).unwrap(), dpu.take(&mut queue).unwrap()];
    completions.sort_by_key(|completed| completed.slot);
    assert_eq!(completions, [failed(1, Errno::INTR), served(2)]);
    assert_eq!(dpu.take(&mut queue), None);
    assert_eq!(dpu.fs.look(|state| state.destroys), 0, "the DPU goes on later with what it has open");
    let number = 1u64.to_ne_bytes();
    dpu.ack(number::SET_VRING_KICK, &number, &[queue.kick.as_fd()]);
    dpu.getattr(&mut queue, 3, READY);
    assert_eq!(dpu.next(&mut queue), served(3));
}

#[test]
fn blocked_request_survives_changes_of_its_queue() {
    let (dpu, mut queue) = mounted();
    dpu.getattr(&mut queue, 1, GATED);
    dpu.fs.wait_until("it waits", |state| state.at_gate == 1);
    dpu.share();
    queue.call = event();
    dpu.ack(number::SET_VRING_CALL, &1u64.to_ne_bytes(), &[queue.call.as_fd()]);
    queue.kick = event();
    dpu.ack(number::SET_VRING_KICK, &1u64.to_ne_bytes(), &[queue.kick.as_fd()]);
    dpu.getattr(&mut queue, 2, READY);
    assert_eq!(dpu.next(&mut queue), served(2));
    dpu.fs.open_gate();
    assert_eq!(dpu.next(&mut queue), served(1));
}

#[test]
fn panic_is_an_error_for_one_request() {
    let (dpu, mut queue) = mounted();
    for round in 0..3 {
        dpu.getattr(&mut queue, 1, PANICS);
        assert_eq!(dpu.next(&mut queue), failed(1, Errno::IO));
        dpu.getattr(&mut queue, 2, PANICS_LATER);
        assert_eq!(dpu.next(&mut queue), failed(2, Errno::IO), "round {round}");
        dpu.getattr(&mut queue, 3, READY);
        assert_eq!(dpu.next(&mut queue), served(3));
    }
}

#[test]
fn disconnect_ends_everything_that_waits() {
    let (dpu, mut queue) = mounted();
    for slot in 0..4 {
        dpu.setlkw(&mut queue, slot);
    }
    dpu.fs.wait_until("four wait", |state| state.at_lock == 4);
    let begun = Instant::now();
    let fs = Arc::clone(&dpu.fs);
    assert_eq!(dpu.disconnect().0.unwrap(), End::Disconnected);
    assert!(begun.elapsed() < END_LIMIT, "nothing was stuck");
    assert_eq!(fs.look(|state| (state.at_lock, state.destroys)), (0, 1));
    // Threads that are done may still be on their last instructions.
    wait_for("no thread is left", || Arc::strong_count(&fs) == 1);
}

#[test]
fn request_that_is_stuck_in_the_host_does_not_hold_the_next_front_end_up() {
    let (dpu, mut queue) = mounted();
    dpu.getattr(&mut queue, 1, GATED);
    dpu.fs.wait_until("it waits", |state| state.at_gate == 1);
    let begun = Instant::now();
    let (end, fs) = dpu.disconnect();
    assert_eq!(end.unwrap(), End::Disconnected);
    assert!(begun.elapsed() >= END_LIMIT && begun.elapsed() < END_LIMIT * 4);
    fs.open_gate();
    fs.wait_until("the request ends when the host lets it", |state| state.at_gate == 0);
}

#[test]
fn stop_ends_the_session() {
    let (dpu, _queue) = mounted();
    dpu.stop.trigger();
    let (end, fs) = dpu.ended();
    assert_eq!(end.unwrap(), End::Stopped);
    assert_eq!(fs.look(|state| state.destroys), 1);
}

#[test]
fn device_reset_drops_what_the_dpu_had() {
    let (dpu, mut queue) = mounted();
    dpu.setlkw(&mut queue, 1);
    dpu.fs.wait_until("it waits", |state| state.at_lock == 1);
    dpu.ack(number::RESET_DEVICE, &[], &[]);
    assert_eq!(dpu.fs.look(|state| (state.at_lock, state.destroys)), (0, 1));
    dpu.ack(number::SET_FEATURES, &dpu.features().to_ne_bytes(), &[]);
}

#[test]
fn completions_are_signalled_in_batches() {
    let dpu = Dpu::connect_with(0, |_, _| {});
    let mut queue = dpu.mount();
    take_count(&queue.call);
    let requests: Vec<(u16, u32, u64, &[u8])> =
        (0..16).map(|slot| (slot, GETATTR, READY, &[0; 16][..])).collect();
    dpu.submit(&mut queue, &requests);
    let mut signals = 0;
    let mut completed = 0;
    while completed < 16 {
        if dpu.take(&mut queue).is_some() {
            completed += 1;
        } else {
            signals += take_count(&queue.call);
        }
    }
    dpu.getattr(&mut queue, 0, READY);
    dpu.next(&mut queue);
    signals += take_count(&queue.call);
    assert!(signals <= 4, "{signals} signals for 17 requests");
}

#[test]
fn broken_ring_stops_its_queue_and_no_other() {
    let (dpu, mut first) = mounted();
    let mut second = dpu.start(2);
    let mut high_priority = dpu.start(0);
    dpu.break_ring(&first);
    wait_for("the front end is told", || take_count(&first.err) > 0);
    dpu.getattr(&mut second, 1, READY);
    assert_eq!(dpu.next(&mut second), served(1));
    dpu.submit(&mut high_priority, &[(5, FORGET, READY, &1u64.to_ne_bytes())]);
    assert_eq!(dpu.next(&mut high_priority).slot, 5);
    assert_eq!(dpu.take(&mut first), None);
    dpu.base(&first);
    let mut first = dpu.start_anew(1);
    dpu.getattr(&mut first, 1, READY);
    assert_eq!(dpu.next(&mut first), served(1));
}

#[test]
fn kicks_without_requests_are_harmless() {
    let (dpu, mut queue) = mounted();
    for _ in 0..100_000 {
        dpu.kick(&queue);
    }
    dpu.getattr(&mut queue, 1, READY);
    assert_eq!(dpu.next(&mut queue), served(1));
}

#[test]
fn configuration_space_names_the_export() {
    let tag: Tag = "export".parse().unwrap();
    let space = config_space(&tag, 3);
    assert_eq!(&space[..7], b"export\0");
    assert_eq!(space[36..44], [3, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn processor_lists_are_counted() {
    assert_eq!(count_processors("0\n"), Some(1));
    assert_eq!(count_processors("0-1\n"), Some(2));
    assert_eq!(count_processors("0-3,8,10-11"), Some(7));
    for nonsense in ["", "x", "3-1", "1-", "1,,2"] {
        assert_eq!(count_processors(nonsense), None, "{nonsense:?}");
    }
}
