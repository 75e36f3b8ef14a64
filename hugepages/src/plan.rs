//! From a request and what the machine has to the number of pages each NUMA node shall get. Pure: no files, no clock.
//!
//! A request has a [`Goal`], because "reserve 2G" can be read three ways:
//!
//! * [`Goal::Available`] (the default): afterwards at least N pages are free and promised to nobody, so that a DPU
//!   of this size can start now. Pages that are free already count, so asking twice changes nothing.
//! * [`Goal::Total`]: the pool holds at least N pages, used or not. This suits a boot script (and is what SPDK's
//!   `setup.sh` does); asking twice changes nothing.
//! * [`Goal::Add`]: N more pages, whatever there is.
//!
//! The missing pages are spread so that the chosen nodes end as even as their memory allows: the emptiest node is
//! filled first ("water level"). The kernel counts promised pages (`resv_hugepages`) for the whole pool only, not by
//! node. Where the request names nodes, a promise is taken to be met by the other nodes' free pages first; a front
//! end that fills its memory at once (QEMU `prealloc=on`) leaves no promise behind and so no doubt.
//!
//! Invariants, held by the property tests: the shares add up to exactly what is missing; no node outside the
//! request gets any; no node gets more than its memory can give (unless the check is off); a plan carried out leaves
//! nothing missing.

#![forbid(unsafe_code)]

use std::fmt;

use serde::Serialize;

use crate::size::{Bytes, PageSize};

/// What "reserve N pages" shall mean. See the module's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Goal {
    /// At least N pages free and not promised.
    #[default]
    Available,
    /// At least N pages in the pool.
    Total,
    /// N pages on top of what there is.
    Add,
}

/// One NUMA node as the kernel shows it, for one page size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct NodeState {
    /// Node number.
    pub id: u32,
    /// Pages in the pool (`nr_hugepages`), surplus included.
    pub total: u64,
    /// Pages nobody has touched yet (`free_hugepages`).
    pub free: u64,
    /// Pages beyond the pool's size, gone once their user ends (`surplus_hugepages`).
    pub surplus: u64,
    /// Memory in bytes that could become hugepages without starving the host.
    pub available: u64,
}

/// All memory nodes for one page size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Topology {
    /// The page size that the counts are in.
    pub page: PageSize,
    /// Pages promised to mappings that have not touched them (`resv_hugepages`); the kernel counts them pool-wide.
    pub reserved: u64,
    /// Nodes with memory, by number.
    pub nodes: Vec<NodeState>,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// How many pages.
    pub pages: u64,
    /// What the number means.
    pub goal: Goal,
    /// Nodes to take them from; empty means every node with memory.
    pub nodes: Vec<u32>,
    /// Refuse what the memory figures say cannot succeed. Off: the kernel is asked in any case.
    pub check_memory: bool,
}

/// The share of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Share {
    /// Node number.
    pub node: u32,
    /// Pages in the node's pool before.
    pub before: u64,
    /// Pages to add.
    pub add: u64,
    /// Surplus pages of the node that the kernel turns into pool pages before it makes new ones. They grow the pool
    /// on top of `add`, and are what brings `add` really new pages. Zero unless `nr_overcommit_hugepages` is in use.
    pub converts: u64,
}

/// Pages per node. Nodes that get nothing are left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// The page size.
    pub page: PageSize,
    /// One entry for each node that gets pages, by number.
    pub shares: Vec<Share>,
}

impl Plan {
    /// Pages to add on all nodes together.
    pub fn pages(&self) -> u64 {
        self.shares.iter().map(|s| s.add).sum()
    }
}

/// Why no plan can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// Zero pages.
    #[error("0 pages asked for: give --size or --pages above zero")]
    NoPages,
    /// More bytes than can be addressed.
    #[error("{pages} pages of {page} are more memory than 64 bits can count")]
    Overflow {
        /// Pages asked for.
        pages: u64,
        /// Their size.
        page: PageSize,
    },
    /// A node that does not exist or has no memory.
    #[error("node {node} does not exist or has no memory; nodes with memory: {}", List(known))]
    UnknownNode {
        /// The node asked for.
        node: u32,
        /// The nodes that could be asked for.
        known: Vec<u32>,
    },
    /// The memory figures say that it cannot work.
    #[error(
        "not enough free memory: {missing} more pages of {page} are {}, but only {} can be taken without \
         starving the host ({}). Stop something that uses memory, ask for less{}, or pass --force to try it all the same",
        Bytes(missing * page.bytes()),
        Bytes(*available),
        Nodes(nodes),
        if *restricted { " or allow more nodes with --node" } else { "" }
    )]
    NotEnoughMemory {
        /// Pages that would have to be added.
        missing: u64,
        /// Their size.
        page: PageSize,
        /// Bytes that the chosen nodes could give.
        available: u64,
        /// Whether the request named only some of the nodes.
        restricted: bool,
        /// The chosen nodes.
        nodes: Vec<NodeState>,
    },
}

struct List<'a>(&'a [u32]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.iter().map(u32::to_string).collect::<Vec<_>>().join(", "))
    }
}

struct Nodes<'a>(&'a [NodeState]);

impl fmt::Display for Nodes<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<_> = self.0.iter().map(|n| format!("node {}: {}", n.id, Bytes(n.available))).collect();
        f.write_str(&texts.join(", "))
    }
}

/// Works out how many pages each node shall get.
pub fn plan(request: &Request, topology: &Topology) -> Result<Plan, PlanError> {
    if request.pages == 0 {
        return Err(PlanError::NoPages);
    }
    let page = topology.page;
    let overflow = PlanError::Overflow { pages: request.pages, page };
    if request.pages.checked_mul(page.bytes()).is_none() {
        return Err(overflow);
    }
    let chosen = choose(request, topology)?;
    let missing = missing(request, topology, &chosen);

    let mut places: Vec<Place> = chosen
        .iter()
        .map(|n| Place {
            level: match request.goal {
                Goal::Available => n.free,
                Goal::Total => n.total.saturating_sub(n.surplus),
                Goal::Add => 0,
            },
            room: if request.check_memory { n.available / page.bytes() } else { request.pages },
            add: 0,
        })
        .collect();
    let room = places.iter().fold(0u64, |sum, p| sum.saturating_add(p.room));
    if room < missing {
        return Err(PlanError::NotEnoughMemory {
            missing,
            page,
            available: chosen.iter().fold(0u64, |sum, n| sum.saturating_add(n.available)),
            restricted: chosen.len() < topology.nodes.len(),
            nodes: chosen,
        });
    }
    spread(missing, &mut places);
    let shares = chosen
        .iter()
        .zip(&places)
        .filter(|(_, p)| p.add > 0)
        .map(|(n, p)| Share {
            node: n.id,
            before: n.total,
            add: p.add,
            converts: if request.goal == Goal::Total { 0 } else { n.surplus },
        })
        .collect();
    Ok(Plan { page, shares })
}

/// The nodes that the request names, by number and each once.
fn choose(request: &Request, topology: &Topology) -> Result<Vec<NodeState>, PlanError> {
    if let Some(&node) = request.nodes.iter().find(|id| !topology.nodes.iter().any(|n| n.id == **id)) {
        return Err(PlanError::UnknownNode { node, known: topology.nodes.iter().map(|n| n.id).collect() });
    }
    let wanted = |n: &&NodeState| request.nodes.is_empty() || request.nodes.contains(&n.id);
    Ok(topology.nodes.iter().filter(wanted).copied().collect())
}

/// How many pages the chosen nodes lack to meet the goal.
fn missing(request: &Request, topology: &Topology, chosen: &[NodeState]) -> u64 {
    let sum = |count: fn(&NodeState) -> u64| chosen.iter().fold(0u64, |sum, n| sum.saturating_add(count(n)));
    let have = match request.goal {
        Goal::Add => 0,
        Goal::Total => sum(|n| n.total.saturating_sub(n.surplus)),
        Goal::Available => {
            let all = topology.nodes.iter().fold(0u64, |sum, n| sum.saturating_add(n.free));
            let free = sum(|n| n.free);
            free.saturating_sub(topology.reserved.saturating_sub(all - free))
        }
    };
    request.pages.saturating_sub(have)
}

struct Place {
    level: u64,
    room: u64,
    add: u64,
}

impl Place {
    fn below(&self, level: u64) -> u64 {
        level.saturating_sub(self.level).min(self.room)
    }
}

/// Fills the places to one common level, as far as each has room. The rooms must add up to at least `pages`.
fn spread(pages: u64, places: &mut [Place]) {
    let filled =
        |places: &[Place], level: u64| places.iter().map(|p| u128::from(p.below(level))).sum::<u128>();
    // The largest level that needs no more than `pages`.
    let (mut low, mut high) = (0u64, u64::MAX);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if filled(places, middle) <= u128::from(pages) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    let mut left = pages;
    for place in places.iter_mut() {
        place.add = place.below(low);
        left -= place.add;
    }
    // What is left is less than one page for each place that could still rise.
    for place in places.iter_mut() {
        if left > 0 && place.level <= low && place.add < place.room {
            place.add += 1;
            left -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGE: PageSize = PageSize::M2;

    fn node(id: u32, total: u64, free: u64, room: u64) -> NodeState {
        NodeState { id, total, free, surplus: 0, available: room * PAGE.bytes() }
    }

    fn topology(nodes: Vec<NodeState>) -> Topology {
        Topology { page: PAGE, reserved: 0, nodes }
    }

    fn request(pages: u64, goal: Goal) -> Request {
        Request { pages, goal, nodes: vec![], check_memory: true }
    }

    fn adds(plan: &Plan) -> Vec<(u32, u64)> {
        plan.shares.iter().map(|s| (s.node, s.add)).collect()
    }

    #[test]
    fn an_even_machine_gets_an_even_spread() {
        let t = topology(vec![node(0, 0, 0, 1000), node(1, 0, 0, 1000)]);
        assert_eq!(adds(&plan(&request(5, Goal::Add), &t).unwrap()), [(0, 3), (1, 2)]);
    }

    #[test]
    fn the_emptier_node_is_filled_first() {
        let t = topology(vec![node(0, 300, 300, 1000), node(1, 0, 0, 1000)]);
        assert_eq!(adds(&plan(&request(1024, Goal::Available), &t).unwrap()), [(0, 212), (1, 512)]);
        assert_eq!(adds(&plan(&request(400, Goal::Available), &t).unwrap()), [(1, 100)]);
    }

    #[test]
    fn a_node_short_of_memory_leaves_its_share_to_the_other() {
        let t = topology(vec![node(0, 0, 0, 10), node(1, 0, 0, 1000)]);
        assert_eq!(adds(&plan(&request(100, Goal::Add), &t).unwrap()), [(0, 10), (1, 90)]);
    }

    #[test]
    fn only_named_nodes_are_used() {
        let t = topology(vec![node(0, 0, 0, 1000), node(2, 0, 0, 1000)]);
        let r = Request { nodes: vec![2, 2], ..request(8, Goal::Add) };
        assert_eq!(adds(&plan(&r, &t).unwrap()), [(2, 8)]);
        let r = Request { nodes: vec![1], ..request(8, Goal::Add) };
        assert_eq!(plan(&r, &t), Err(PlanError::UnknownNode { node: 1, known: vec![0, 2] }));
    }

    #[test]
    fn promised_pages_are_not_available() {
        let t = Topology { reserved: 6, ..topology(vec![node(0, 10, 10, 1000)]) };
        assert_eq!(plan(&request(10, Goal::Available), &t).unwrap().pages(), 6);
        assert_eq!(plan(&request(10, Goal::Total), &t).unwrap().pages(), 0);
        assert_eq!(plan(&request(10, Goal::Add), &t).unwrap().pages(), 10);
    }

    #[test]
    fn a_promise_is_met_by_the_other_nodes_first() {
        let t = Topology { reserved: 6, ..topology(vec![node(0, 4, 4, 1000), node(1, 10, 10, 1000)]) };
        let on_node_1 = |pages| Request { nodes: vec![1], ..request(pages, Goal::Available) };
        assert_eq!(plan(&on_node_1(8), &t).unwrap().pages(), 0);
        assert_eq!(plan(&on_node_1(9), &t).unwrap().pages(), 1);
    }

    #[test]
    fn surplus_pages_do_not_count_as_the_pool() {
        let mut n = node(0, 10, 0, 1000);
        n.surplus = 4;
        let converts = |goal| plan(&request(10, goal), &topology(vec![n])).unwrap().shares[0].converts;
        assert_eq!(plan(&request(10, Goal::Total), &topology(vec![n])).unwrap().pages(), 4);
        assert_eq!((converts(Goal::Total), converts(Goal::Add), converts(Goal::Available)), (0, 4, 4));
    }

    #[test]
    fn a_request_beyond_memory_is_refused_with_figures() {
        let t = topology(vec![node(0, 0, 0, 10), node(1, 0, 0, 20)]);
        let error = plan(&request(31, Goal::Add), &t).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("31 more pages of 2M are 62 MiB"), "{text}");
        assert!(text.contains("node 0: 20 MiB, node 1: 40 MiB"), "{text}");
        assert!(!text.contains("--node"), "{text}");
        let r = Request { nodes: vec![0], ..request(11, Goal::Add) };
        assert!(plan(&r, &t).unwrap_err().to_string().contains("allow more nodes with --node"));
        let r = Request { check_memory: false, ..request(31, Goal::Add) };
        assert_eq!(plan(&r, &t).unwrap().pages(), 31);
    }

    #[test]
    fn nonsense_is_refused() {
        let t = topology(vec![node(0, 0, 0, 10)]);
        assert_eq!(plan(&request(0, Goal::Add), &t), Err(PlanError::NoPages));
        assert!(matches!(plan(&request(u64::MAX, Goal::Add), &t), Err(PlanError::Overflow { .. })));
    }

    fn any_topology() -> impl Strategy<Value = Topology> {
        let node = (0u64..2000, 0u64..2000, 0u64..100, 0u64..3000);
        (proptest::collection::vec(node, 1..6), 0u64..500).prop_map(|(nodes, reserved)| Topology {
            page: PAGE,
            // The kernel never promises more than is free.
            reserved: reserved.min(nodes.iter().map(|(total, free, ..)| free.min(total)).sum()),
            nodes: nodes
                .into_iter()
                .enumerate()
                .map(|(i, (total, free, surplus, room))| NodeState {
                    id: i as u32 * 2,
                    total,
                    free: free.min(total),
                    surplus: surplus.min(total),
                    available: room * PAGE.bytes(),
                })
                .collect(),
        })
    }

    fn any_request() -> impl Strategy<Value = Request> {
        let goal = prop_oneof![Just(Goal::Available), Just(Goal::Total), Just(Goal::Add)];
        (1u64..5000, goal, proptest::collection::vec((0u32..3).prop_map(|n| n * 2), 0..3), any::<bool>())
            .prop_map(|(pages, goal, nodes, check_memory)| Request { pages, goal, nodes, check_memory })
    }

    proptest! {
        #[test]
        fn shares_meet_the_request_exactly(t in any_topology(), r in any_request()) {
            let chosen = match choose(&r, &t) { Ok(c) => c, Err(_) => { prop_assert!(plan(&r, &t).is_err()); return Ok(()) } };
            let lacking = missing(&r, &t, &chosen);
            match plan(&r, &t) {
                Ok(p) => {
                    prop_assert_eq!(p.pages(), lacking);
                    for s in &p.shares {
                        let n = chosen.iter().find(|n| n.id == s.node).expect("only chosen nodes get pages");
                        prop_assert_eq!(s.before, n.total);
                        prop_assert!(s.add > 0);
                        if r.check_memory { prop_assert!(s.add * PAGE.bytes() <= n.available); }
                    }
                }
                Err(PlanError::NotEnoughMemory { missing, .. }) => {
                    prop_assert!(r.check_memory);
                    prop_assert_eq!(missing, lacking);
                    let room: u64 = chosen.iter().map(|n| n.available / PAGE.bytes()).sum();
                    prop_assert!(room < lacking);
                }
                Err(other) => prop_assert!(false, "{}", other),
            }
        }

        #[test]
        fn a_plan_carried_out_leaves_nothing_to_do(t in any_topology(), r in any_request()) {
            prop_assume!(r.goal != Goal::Add);
            let Ok(p) = plan(&r, &t) else { return Ok(()) };
            let mut after = t;
            for s in &p.shares {
                let n = after.nodes.iter_mut().find(|n| n.id == s.node).unwrap();
                n.total += s.add;
                n.free += s.add;
                n.available = n.available.saturating_sub(s.add * PAGE.bytes());
            }
            prop_assert_eq!(plan(&r, &after).unwrap().pages(), 0);
        }

        #[test]
        fn nodes_with_room_end_level(t in any_topology(), pages in 1u64..3000) {
            let Ok(p) = plan(&request(pages, Goal::Add), &t) else { return Ok(()) };
            let add = |id| p.shares.iter().find(|s| s.node == id).map_or(0, |s| s.add);
            let open: Vec<u64> =
                t.nodes.iter().filter(|n| add(n.id) < n.available / PAGE.bytes()).map(|n| add(n.id)).collect();
            if let (Some(low), Some(high)) = (open.iter().min(), open.iter().max()) {
                prop_assert!(high - low <= 1);
                for n in &t.nodes { prop_assert!(add(n.id) <= low + 1); }
            }
        }
    }
}
