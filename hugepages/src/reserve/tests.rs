//! Reservation against a model of the kernel's pools, for what a healthy machine does not do on demand: nodes that
//! run dry, fragmentation that compaction heals, writes that fail, pages that come into use meanwhile.
//! The real kernel is exercised in `tests/pool.rs`.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use super::*;
use crate::plan::Share;
use crate::state::StateDir;
use crate::sysfs::tests::two_node_tree;
use proptest::prelude::*;

const PAGE: PageSize = PageSize::M2;

#[derive(Default, Clone)]
struct Node {
    pool: u64,
    /// Pages the node can still make.
    room: u64,
    /// Pages it can make only after compaction.
    healed_by_compaction: u64,
    used: u64,
    available: u64,
    blocks: Option<u64>,
}

#[derive(Default)]
struct Model {
    nodes: RefCell<BTreeMap<u32, Node>>,
    compactions: Cell<u32>,
    writes: Cell<u32>,
    fail_write: Option<u32>,
}

impl Model {
    fn with(nodes: &[(u32, Node)]) -> Model {
        Model { nodes: RefCell::new(nodes.iter().cloned().collect()), ..Model::default() }
    }

    fn pools(&self) -> Vec<u64> {
        self.nodes.borrow().values().map(|n| n.pool).collect()
    }
}

impl Kernel for Model {
    fn pool_pages(&self, node: u32, _: PageSize) -> Result<u64, SysfsError> {
        Ok(self.nodes.borrow()[&node].pool)
    }

    fn set_pool_pages(&self, node: u32, _: PageSize, pages: u64) -> Result<(), SysfsError> {
        self.writes.set(self.writes.get() + 1);
        if self.fail_write == Some(self.writes.get()) {
            // A real error of the type: a file that is not there.
            return Host::at("/nonexistent").set_pool_pages(node, PAGE, pages);
        }
        let mut nodes = self.nodes.borrow_mut();
        let n = nodes.get_mut(&node).unwrap();
        let next = if pages > n.pool { n.pool + (pages - n.pool).min(n.room) } else { pages };
        n.room = (n.room + n.pool) - next;
        n.pool = next;
        Ok(())
    }

    fn compact(&self, node: u32) -> Result<(), SysfsError> {
        self.compactions.set(self.compactions.get() + 1);
        let mut nodes = self.nodes.borrow_mut();
        let n = nodes.get_mut(&node).unwrap();
        n.room += std::mem::take(&mut n.healed_by_compaction);
        Ok(())
    }

    fn idle_pages(&self, node: u32, _: PageSize) -> Result<u64, SysfsError> {
        let n = &self.nodes.borrow()[&node];
        Ok(n.pool.saturating_sub(n.used))
    }

    fn memory(&self, node: u32, _: PageSize) -> Result<(u64, Option<u64>), SysfsError> {
        let n = &self.nodes.borrow()[&node];
        Ok((n.available, n.blocks))
    }
}

/// A record in a directory of its own.
struct Record {
    _tree: tempfile::TempDir,
    host: Host,
    state: StateDir,
}

impl Record {
    fn new() -> Record {
        let (tree, host) = two_node_tree();
        let state = StateDir::at(tree.path().join("run"));
        Record { _tree: tree, host, state }
    }

    fn lock(&self) -> Locked {
        self.state.try_lock(&self.host).unwrap()
    }

    fn pages(&self) -> Vec<(u32, u64)> {
        self.state.read(&self.host).unwrap().iter().map(|e| (e.node, e.pages)).collect()
    }
}

fn shares(adds: &[(u32, u64)]) -> Plan {
    Plan {
        page: PAGE,
        shares: adds.iter().map(|&(node, add)| Share { node, before: 0, add, converts: 0 }).collect(),
    }
}

fn run(model: &Model, record: &Record, plan: &Plan) -> Result<Vec<Entry>, ReserveError> {
    let mut r = Reservation::begin(model, record.lock(), plan)?;
    while !r.step()? {}
    r.finish()
}

fn shortfall(error: ReserveError) -> Shortfall {
    match error {
        ReserveError::Shortfall(s) => *s,
        other => panic!("{other}"),
    }
}

#[test]
fn pages_are_taken_in_steps_and_recorded() {
    let record = Record::new();
    let model = Model::with(&[
        (0, Node { pool: 3, room: 1000, ..Node::default() }),
        (1, Node { room: 1000, ..Node::default() }),
    ]);
    let mut r = Reservation::begin(&model, record.lock(), &shares(&[(0, 300), (1, 100)])).unwrap();
    assert!(!r.step().unwrap());
    assert_eq!(r.progress(), Progress { done: 128, total: 400 });
    while !r.step().unwrap() {}
    r.finish().unwrap();
    assert_eq!(model.pools(), [303, 100]);
    assert_eq!(record.pages(), [(0, 300), (1, 100)]);
}

#[test]
fn a_shortfall_gives_everything_back_and_says_why() {
    let record = Record::new();
    let model = Model::with(&[
        (0, Node { pool: 3, room: 1000, ..Node::default() }),
        (1, Node { room: 40, available: 1 << 20, blocks: Some(0), ..Node::default() }),
    ]);
    let error = shortfall(run(&model, &record, &shares(&[(0, 100), (1, 100)])).unwrap_err());
    assert_eq!((error.cause, error.node, error.kept), (Cause::NotEnoughMemory, 1, 0));
    assert_eq!(model.pools(), [3, 0]);
    assert_eq!(record.pages(), []);
    assert!(model.compactions.get() >= 1);
    let text = error.to_string();
    for part in [
        "gave 140 of 200 hugepages of 2M",
        "node 1: 40 of 100 pages",
        "1 MiB still available",
        "nothing was kept",
        "ask for less",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn enough_memory_in_small_pieces_is_called_fragmentation() {
    let record = Record::new();
    let model = Model::with(&[(0, Node { room: 1, available: 1 << 40, ..Node::default() })]);
    let error = shortfall(run(&model, &record, &shares(&[(0, 10)])).unwrap_err());
    assert_eq!(error.cause, Cause::Fragmentation);
    assert!(error.to_string().contains("drop_caches"), "{error}");
    let gigantic = Shortfall { page: PageSize::G1, ..error };
    assert!(gigantic.to_string().contains("persist --page-size 1G --pages 10"), "{gigantic}");
}

#[test]
fn compaction_is_tried_before_giving_up() {
    let record = Record::new();
    let model = Model::with(&[(0, Node { room: 10, healed_by_compaction: 90, ..Node::default() })]);
    run(&model, &record, &shares(&[(0, 100)])).unwrap();
    assert_eq!(model.pools(), [100]);
    assert_eq!(model.compactions.get(), 1);
}

#[test]
fn compaction_comes_first_when_large_blocks_are_few() {
    let record = Record::new();
    let model = Model::with(&[(0, Node { room: 100, blocks: Some(5), ..Node::default() })]);
    run(&model, &record, &shares(&[(0, 100)])).unwrap();
    assert_eq!(model.compactions.get(), 1);
    let model = Model::with(&[(0, Node { room: 100, blocks: Some(500), ..Node::default() })]);
    run(&model, &record, &shares(&[(0, 50)])).unwrap();
    assert_eq!(model.compactions.get(), 0);
}

#[test]
fn dropping_or_rolling_back_restores_the_pool() {
    for drop_it in [true, false] {
        let record = Record::new();
        let model = Model::with(&[(0, Node { pool: 1, room: 1000, ..Node::default() })]);
        let mut r = Reservation::begin(&model, record.lock(), &shares(&[(0, 500)])).unwrap();
        r.step().unwrap();
        assert_eq!(model.pools(), [129]);
        if drop_it {
            drop(r);
        } else {
            assert_eq!(r.roll_back().unwrap(), 0);
        }
        assert_eq!(model.pools(), [1]);
        assert_eq!(record.pages(), []);
    }
}

#[test]
fn pages_that_came_into_use_stay_recorded_after_a_roll_back() {
    let record = Record::new();
    let model = Model::with(&[(0, Node { room: 1000, ..Node::default() })]);
    let mut r = Reservation::begin(&model, record.lock(), &shares(&[(0, 500)])).unwrap();
    r.step().unwrap();
    model.nodes.borrow_mut().get_mut(&0).unwrap().used = 10;
    assert_eq!(r.roll_back().unwrap(), 10);
    assert_eq!(model.pools(), [10]);
    assert_eq!(record.pages(), [(0, 10)]);
}

#[test]
fn a_write_that_fails_half_way_gives_back_the_rest() {
    let record = Record::new();
    let model = Model { fail_write: Some(2), ..Model::with(&[(0, Node { room: 1000, ..Node::default() })]) };
    let error = run(&model, &record, &shares(&[(0, 500)])).unwrap_err();
    assert!(matches!(error, ReserveError::Sysfs(_)), "{error}");
    assert_eq!(model.pools(), [0]);
    assert_eq!(record.pages(), []);
}

#[test]
fn release_refuses_pages_in_use_before_it_touches_anything() {
    let record = Record::new();
    let model = Model::with(&[
        (0, Node { room: 100, ..Node::default() }),
        (1, Node { room: 100, ..Node::default() }),
    ]);
    run(&model, &record, &shares(&[(0, 10), (1, 10)])).unwrap();
    model.nodes.borrow_mut().get_mut(&1).unwrap().used = 4;
    let error = release(&model, &mut record.lock(), &Selection::default()).unwrap_err();
    assert!(matches!(error, ReserveError::InUse { node: 1, wanted: 10, idle: 6, .. }), "{error}");
    assert_eq!(model.pools(), [10, 10]);
    assert_eq!(record.pages(), [(0, 10), (1, 10)]);
    let lazy = Selection { lazy: true, ..Selection::default() };
    let released = release(&model, &mut record.lock(), &lazy).unwrap();
    assert_eq!(released[1], Released { page: PAGE, node: 1, pages: 10, still_used: 4, kept: 0 });
    assert_eq!(record.pages(), []);
}

#[test]
fn release_of_a_part_keeps_the_rest_even() {
    let record = Record::new();
    let model = Model::with(&[
        (0, Node { room: 100, ..Node::default() }),
        (1, Node { room: 100, ..Node::default() }),
    ]);
    run(&model, &record, &shares(&[(0, 30), (1, 10)])).unwrap();
    let part = |pages| Selection { page: Some(PAGE), pages: Some(pages), ..Selection::default() };
    release(&model, &mut record.lock(), &part(24)).unwrap();
    assert_eq!(record.pages(), [(0, 8), (1, 8)]);
    assert_eq!(model.pools(), [8, 8]);
    let error = release(&model, &mut record.lock(), &part(17)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("17 pages of 2M are to be released, but dpu-hugepages has reserved only 16"),
        "{error}"
    );
    let of_node = Selection { nodes: vec![1], ..Selection::default() };
    release(&model, &mut record.lock(), &of_node).unwrap();
    assert_eq!(record.pages(), [(0, 8)]);
}

#[test]
fn a_pool_that_somebody_shrank_is_not_an_error() {
    let record = Record::new();
    let model = Model::with(&[(0, Node { room: 100, ..Node::default() })]);
    run(&model, &record, &shares(&[(0, 30)])).unwrap();
    model.set_pool_pages(0, PAGE, 12).unwrap();
    let released = release(&model, &mut record.lock(), &Selection::default()).unwrap();
    assert_eq!(released[0].pages, 12);
    assert_eq!(record.pages(), []);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever the nodes can give: either all of it is there and recorded, or the pools are as before.
    #[test]
    fn all_or_nothing(
        nodes in proptest::collection::vec((0u64..50, 0u64..600, 0u64..100, any::<Option<u8>>()), 1..4),
        wants in proptest::collection::vec(1u64..400, 3),
    ) {
        let record = Record::new();
        let nodes: Vec<_> = nodes.into_iter().enumerate().map(|(i, (pool, room, heal, blocks))| {
            (i as u32, Node { pool, room, healed_by_compaction: heal, blocks: blocks.map(u64::from), ..Node::default() })
        }).collect();
        let model = Model::with(&nodes);
        let before = model.pools();
        let adds: Vec<_> = nodes.iter().zip(&wants).map(|((id, _), want)| (*id, *want)).collect();
        match run(&model, &record, &shares(&adds)) {
            Ok(_) => {
                let after: Vec<_> = before.iter().zip(&wants).map(|(b, w)| b + w).collect();
                prop_assert_eq!(model.pools(), after);
                prop_assert_eq!(record.pages(), adds);
                release(&model, &mut record.lock(), &Selection::default()).unwrap();
            }
            Err(ReserveError::Shortfall(s)) => prop_assert_eq!(s.kept, 0),
            Err(other) => prop_assert!(false, "{}", other),
        }
        prop_assert_eq!(model.pools(), before);
        prop_assert_eq!(record.pages(), []);
    }
}
