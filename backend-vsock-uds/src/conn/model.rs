//! Random schedules of a whole connection against a reference: whatever the order of events, what one
//! side wrote before it ended its direction is what the other side reads, and everything comes to rest.

use proptest::prelude::*;

use super::Timeouts;
use super::machine::{Connection, Effects, Input, State};
use crate::packet::{Kind, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

const WINDOW: u32 = 64;
const DPU_BUFFER: u32 = 48;
const HOST_SOCKET: u32 = 40;

/// One step of a schedule.
#[derive(Clone, Debug)]
enum Step {
    DpuWrites(u32),
    DpuReads(u32),
    DpuEndsSending,
    DpuCloses,
    HostWrites(u32),
    HostReads(u32),
    HostEndsSending,
    HostCloses,
    Pump,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u32..40).prop_map(Step::DpuWrites),
        4 => (1u32..40).prop_map(Step::DpuReads),
        1 => Just(Step::DpuEndsSending),
        1 => Just(Step::DpuCloses),
        4 => (1u32..40).prop_map(Step::HostWrites),
        4 => (1u32..40).prop_map(Step::HostReads),
        1 => Just(Step::HostEndsSending),
        1 => Just(Step::HostCloses),
        8 => Just(Step::Pump),
    ]
}

/// A connection with a well-behaved DPU and a host socket, both reduced to byte counts: order is kept
/// by construction (every queue is first in, first out), so counts are enough to see loss and doubling.
struct World {
    connection: Connection,
    now: u64,
    // DPU side, as Linux does it.
    dpu_open: bool,
    dpu_sending: bool,
    dpu_peer_sends: bool,
    dpu_receive_queue: u32,
    dpu_forwarded: u32,
    dpu_sent: u32,
    dpu_known: (u32, u32),
    dpu_written: u64,
    dpu_read: u64,
    // Host side.
    host_open: bool,
    host_sending: bool,
    host_saw_end: bool,
    host_to_device: u32,
    device_to_host: u32,
    buffered: u32,
    host_written: u64,
    host_read: u64,
    host_gone_told: bool,
    eof_told: bool,
}

impl World {
    fn new() -> Self {
        let mut connection = Connection::from_dpu(Kind::Stream, WINDOW, Timeouts::default(), 0);
        connection.on(Input::HostConnected, 0);
        let response = connection.next_control().expect("a response is due");
        assert_eq!(response.op, Op::Response);
        let dpu_known = (response.buf_alloc, response.fwd_cnt);
        connection.update_credit(DPU_BUFFER, 0).expect("credit");
        Self {
            connection,
            now: 0,
            dpu_open: true,
            dpu_sending: true,
            dpu_peer_sends: true,
            dpu_receive_queue: 0,
            dpu_forwarded: 0,
            dpu_sent: 0,
            dpu_known,
            dpu_written: 0,
            dpu_read: 0,
            host_open: true,
            host_sending: true,
            host_saw_end: false,
            host_to_device: 0,
            device_to_host: 0,
            buffered: 0,
            host_written: 0,
            host_read: 0,
            host_gone_told: false,
            eof_told: false,
        }
    }

    fn input(&mut self, input: Input) -> Effects {
        let effects = self.connection.on(input, self.now);
        if effects.discard {
            self.buffered = 0;
        }
        if effects.shut_host_write || effects.close_host {
            self.host_saw_end = true;
        }
        effects
    }

    fn tell_credit(&mut self) {
        self.connection.update_credit(DPU_BUFFER, self.dpu_forwarded).expect("an honest DPU");
    }

    fn apply(&mut self, step: &Step) {
        match *step {
            Step::DpuWrites(bytes) if self.dpu_open && self.dpu_sending => {
                let (buf_alloc, fwd_cnt) = self.dpu_known;
                let bytes = bytes.min(buf_alloc - self.dpu_sent.wrapping_sub(fwd_cnt));
                if bytes > 0 {
                    self.dpu_sent = self.dpu_sent.wrapping_add(bytes);
                    self.dpu_written += u64::from(bytes);
                    self.tell_credit();
                    if self.input(Input::DpuData(bytes)).keep_data {
                        self.buffered += bytes;
                    }
                }
            }
            Step::DpuReads(bytes) => {
                let bytes = bytes.min(self.dpu_receive_queue);
                self.dpu_receive_queue -= bytes;
                self.dpu_forwarded = self.dpu_forwarded.wrapping_add(bytes);
                self.dpu_read += u64::from(bytes);
                if self.dpu_open {
                    self.tell_credit();
                }
            }
            Step::DpuEndsSending if self.dpu_open && self.dpu_sending => {
                self.dpu_sending = false;
                self.input(Input::DpuShutdown(SHUTDOWN_SEND));
            }
            Step::DpuCloses if self.dpu_open => {
                self.dpu_open = false;
                self.dpu_sending = false;
                self.input(Input::DpuShutdown(SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
            }
            Step::HostWrites(bytes) if self.host_open && self.host_sending => {
                let bytes = bytes.min(HOST_SOCKET - self.host_to_device);
                self.host_to_device += bytes;
                self.host_written += u64::from(bytes);
            }
            Step::HostReads(bytes) if self.host_open => {
                let bytes = bytes.min(self.device_to_host);
                self.device_to_host -= bytes;
                self.host_read += u64::from(bytes);
            }
            Step::HostEndsSending => self.host_sending = false,
            Step::HostCloses => {
                self.host_open = false;
                self.host_sending = false;
            }
            Step::Pump => self.pump(),
            _ => {}
        }
    }

    /// One turn of the device: write what is buffered, read what is there, send what is due.
    fn pump(&mut self) {
        self.now += 1;
        if !self.host_open && !self.host_gone_told && self.buffered > 0 {
            self.host_gone_told = true;
            self.input(Input::HostGone);
        }
        if self.connection.wants_host_writable() {
            let bytes = self.buffered.min(HOST_SOCKET - self.device_to_host);
            if bytes > 0 {
                self.buffered -= bytes;
                self.device_to_host += bytes;
                self.input(Input::HostTook(bytes));
            }
        }
        let bytes = self.host_to_device.min(self.connection.may_send());
        if bytes > 0 {
            self.host_to_device -= bytes;
            self.dpu_known = self.connection.sent(bytes);
            self.dpu_receive_queue += bytes;
            assert!(self.dpu_receive_queue <= DPU_BUFFER, "the DPU's buffer is overrun");
        } else if self.host_to_device == 0 && !self.host_sending && !self.eof_told {
            self.eof_told = true;
            self.input(Input::HostEof);
            if !self.host_open && !self.host_gone_told {
                self.host_gone_told = true;
                self.input(Input::HostGone);
            }
        }
        while let Some(control) = self.connection.next_control() {
            self.dpu_known = (control.buf_alloc, control.fwd_cnt);
            match control.op {
                Op::Shutdown => {
                    if control.flags & SHUTDOWN_SEND != 0 {
                        self.dpu_peer_sends = false;
                    }
                    if control.flags & SHUTDOWN_RECEIVE != 0 {
                        self.dpu_sending = false;
                    }
                    if control.flags == SHUTDOWN_SEND | SHUTDOWN_RECEIVE {
                        self.dpu_open = false;
                        self.input(Input::DpuRst);
                    }
                }
                Op::Rst => {
                    self.dpu_open = false;
                    self.dpu_peer_sends = false;
                }
                _ => {}
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]
    #[test]
    fn what_was_written_before_a_close_arrives(steps in proptest::collection::vec(step(), 1..120)) {
        let mut world = World::new();
        let (mut dpu_closed, mut host_closed) = (false, false);
        for step in &steps {
            dpu_closed |= matches!(step, Step::DpuCloses);
            host_closed |= matches!(step, Step::HostCloses);
            world.apply(step);
            prop_assert_eq!(world.buffered, world.connection.buffered() * u32::from(world.connection.state() != State::Ended));
        }
        // Both programs go on reading until nothing moves any more, then both leave.
        for closing in [&[][..], &[Step::DpuEndsSending, Step::HostEndsSending]] {
            for step in closing {
                world.apply(step);
            }
            for _ in 0..200 {
                world.apply(&Step::Pump);
                world.apply(&Step::HostReads(HOST_SOCKET));
                world.apply(&Step::DpuReads(DPU_BUFFER));
            }
        }
        if !host_closed {
            prop_assert_eq!(world.host_read, world.dpu_written, "the host misses bytes of the DPU");
            prop_assert!(world.host_saw_end, "the host never sees the end");
        }
        if !dpu_closed {
            prop_assert_eq!(world.dpu_read, world.host_written, "the DPU misses bytes of the host");
            prop_assert!(!world.dpu_peer_sends, "the DPU never sees the end");
        }
        world.apply(&Step::DpuCloses);
        world.apply(&Step::HostCloses);
        for _ in 0..10 {
            world.apply(&Step::Pump);
        }
        prop_assert!(world.connection.is_over(), "stuck in {:?}", world.connection.state());
    }
}
