//! Any packets in any order, with host programs that come, write, read and go as they like: the mux comes
//! to rest after every step, returns every buffer, and has nothing left when the DPU is gone.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Step {
    /// A packet on a pair; payload bytes, and how much more or less the header claims.
    Packet {
        port: u32,
        kind: u16,
        op: u16,
        flags: u32,
        len: usize,
        lie: i32,
        credit: (u32, u32),
    },
    /// A packet that is not the DPU's, or goes elsewhere.
    Stray {
        src_cid: u64,
        dst_cid: u64,
    },
    /// A host program calls a port of the DPU.
    Call(u32),
    /// One that called or was called does something.
    Write(usize, usize),
    Read(usize),
    Leave(usize),
    EndSending(usize),
    /// The driver keeps its buffers, or gives them back.
    Refill(bool),
    /// Time passes.
    Pass(u64),
    /// The DPU or its front end goes.
    Reset,
    Lose,
}

fn step() -> impl Strategy<Value = Step> {
    let lie = prop_oneof![20 => Just(0), 1 => -10i32..10, 1 => Just(i32::MAX)];
    let credit =
        (prop_oneof![Just(65_536u32), 0u32..200_000, any::<u32>()], prop_oneof![Just(0u32), 0u32..100_000]);
    let packet = (1u32..5, 0u16..4, 0u16..9, 0u32..4, prop_oneof![Just(0usize), 0usize..20_000], lie, credit)
        .prop_map(|(port, kind, op, flags, len, lie, credit)| Step::Packet {
            port,
            kind,
            op,
            flags,
            len,
            lie,
            credit,
        });
    prop_oneof![
        20 => packet,
        1 => (0u64..60, 0u64..5).prop_map(|(src_cid, dst_cid)| Step::Stray { src_cid, dst_cid }),
        3 => (1u32..5).prop_map(Step::Call),
        5 => (0usize..8, 0usize..50_000).prop_map(|(who, len)| Step::Write(who, len)),
        5 => (0usize..8).prop_map(Step::Read),
        1 => (0usize..8).prop_map(Step::Leave),
        1 => (0usize..8).prop_map(Step::EndSending),
        2 => any::<bool>().prop_map(Step::Refill),
        2 => (0u64..9_000).prop_map(Step::Pass),
        1 => Just(Step::Reset),
        1 => Just(Step::Lose),
    ]
}

struct Chaos {
    world: World,
    listener: UnixListener,
    programs: Vec<UnixStream>,
    hybrid: PathBuf,
}

impl Chaos {
    fn new() -> Self {
        let mut world = World::with(Quotas { connections: 6, greetings: 2, resets: 8, ..Quotas::default() });
        let listener = world.listen();
        listener.set_nonblocking(true).expect("non-blocking");
        let hybrid = world.path("hybrid");
        let callers = UnixListener::bind(&hybrid).expect("a listener");
        callers.set_nonblocking(true).expect("non-blocking");
        world.mux.add_listener(callers.into(), None, Kind::Stream).expect("watched");
        Self { world, listener, programs: Vec::new(), hybrid }
    }

    fn apply(&mut self, step: Step) {
        let world = &mut self.world;
        let count = self.programs.len().max(1);
        match step {
            Step::Packet { port, kind, op, flags, len, lie, credit } => {
                let mut bytes = DpuSocket::new(port, PORT, Kind::Stream).header(Op::Rw, flags, len).encode();
                bytes[24..28].copy_from_slice(&(len as u32).wrapping_add_signed(lie).to_le_bytes());
                bytes[28..30].copy_from_slice(&kind.to_le_bytes());
                bytes[30..32].copy_from_slice(&op.to_le_bytes());
                bytes[36..40].copy_from_slice(&credit.0.to_le_bytes());
                bytes[40..44].copy_from_slice(&credit.1.to_le_bytes());
                let payload = pattern(len);
                match len {
                    0 => world.send_pieces(&[&bytes]),
                    _ => world.send_pieces(&[&bytes, &payload]),
                }
            }
            Step::Stray { src_cid, dst_cid } => {
                let header = DpuSocket::new(1, PORT, Kind::Stream).header(Op::Request, 0, 0);
                world.send(&Header { src_cid, dst_cid, ..header }, &[]);
            }
            Step::Call(port) => {
                let mut program = UnixStream::connect(&self.hybrid).expect("the backlog is served");
                program.set_nonblocking(true).expect("non-blocking");
                program.write_all(format!("CONNECT {port}\n").as_bytes()).expect("written");
                self.programs.push(program);
            }
            Step::Write(who, len) => {
                if let Some(program) = self.programs.get_mut(who % count) {
                    let _ = program.write(&pattern(len));
                }
            }
            Step::Read(who) => {
                if let Some(program) = self.programs.get_mut(who % count) {
                    drain(program);
                }
            }
            Step::Leave(who) => {
                if who % count < self.programs.len() {
                    self.programs.swap_remove(who % count);
                }
            }
            Step::EndSending(who) => {
                if let Some(program) = self.programs.get(who % count) {
                    let _ = program.shutdown(std::net::Shutdown::Write);
                }
            }
            Step::Refill(refill) => {
                world.refill = refill;
                if refill {
                    world.offer_held();
                }
            }
            Step::Pass(milliseconds) => world.pass(milliseconds),
            Step::Reset => {
                world.mux.give_back(&mut world.rx);
                world.mux.reset();
            }
            Step::Lose => {
                world.mux.give_back(&mut world.rx);
                world.mux.lose_dpu();
            }
        }
        self.world.settle();
        while let Ok((program, _)) = self.listener.accept() {
            program.set_nonblocking(true).expect("non-blocking");
            self.programs.push(program);
        }
        self.world.inbox.clear();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn nothing_that_anybody_does_leaves_a_trace(steps in proptest::collection::vec(step(), 1..80)) {
        let mut chaos = Chaos::new();
        for step in steps {
            chaos.apply(step);
            prop_assert!(chaos.world.mux.connections() <= 6);
            prop_assert_eq!(chaos.world.tx_free.len(), usize::from(TX_SLOTS), "a packet was not returned");
        }
        // Everybody goes, and time passes.
        chaos.programs.clear();
        chaos.apply(Step::Refill(true));
        chaos.apply(Step::Pass(TIMEOUTS.greeting + TIMEOUTS.linger));
        chaos.programs.clear();
        chaos.apply(Step::Reset);
        let world = &mut chaos.world;
        world.pass(TIMEOUTS.connect);
        prop_assert_eq!(world.mux.connections(), 0);
        prop_assert_eq!(world.mux.buffered(), 0);
        prop_assert_eq!(world.mux.next_deadline(), None);
        let all = u32::try_from(Quotas::default().windows / 2).expect("32 bits");
        prop_assert_eq!(world.mux.windows.promise(all), Some(all), "window memory is left behind");
        world.mux.give_back(&mut world.rx);
        prop_assert_eq!(world.rx.in_flight(), 0, "a buffer is left behind");
    }
}
