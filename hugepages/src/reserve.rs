//! Takes hugepages into the kernel's pools and gives them back, all or nothing.
//!
//! Theory of operation. The kernel takes a wished pool size and gives what it can, without an error. So a
//! [`Reservation`] asks in steps of at most [`STEP_BYTES`], reads back after each, and counts only what is there. A
//! step that brings nothing is tried once more after the node's memory was compacted; if that brings nothing either
//! the request cannot be met, the pages taken so far go back, and the error carries each node's figures and the
//! likely cause. Small steps also make an interruption cheap: the caller looks at its stop flag between steps and
//! calls [`Reservation::roll_back`]; dropping an unfinished reservation does the same.
//!
//! States: begun (record says pending) → stepping → finished (record says taken) or rolled back (record as before).
//!
//! Pages are counted without surplus pages throughout (`nr_hugepages - surplus_hugepages`): that is the number the
//! kernel steers to.

use crate::plan::{Plan, PlanError, Request, plan};
use crate::size::{Bytes, PageSize};
use crate::state::{Entry, Locked, StateError};
use crate::sysfs::{Host, SysfsError};

/// The most that one write asks of the kernel, in bytes: small enough to show progress and to stop within a moment.
pub const STEP_BYTES: u64 = 256 << 20;

/// What a reservation needs of the kernel. [`Host`] is the real one.
pub trait Kernel {
    /// Pages in the node's pool, without surplus.
    fn pool_pages(&self, node: u32, page: PageSize) -> Result<u64, SysfsError>;
    /// Wishes for a pool size.
    fn set_pool_pages(&self, node: u32, page: PageSize, pages: u64) -> Result<(), SysfsError>;
    /// Compacts the node's memory.
    fn compact(&self, node: u32) -> Result<(), SysfsError>;
    /// Pages of the node that nobody uses and nobody was promised.
    fn idle_pages(&self, node: u32, page: PageSize) -> Result<u64, SysfsError>;
    /// Bytes the node could still give, and its free blocks large enough for a page, where known.
    fn memory(&self, node: u32, page: PageSize) -> Result<(u64, Option<u64>), SysfsError>;
}

impl Kernel for Host {
    fn pool_pages(&self, node: u32, page: PageSize) -> Result<u64, SysfsError> {
        Host::pool_pages(self, node, page)
    }

    fn set_pool_pages(&self, node: u32, page: PageSize, pages: u64) -> Result<(), SysfsError> {
        Host::set_pool_pages(self, node, page, pages)
    }

    fn compact(&self, node: u32) -> Result<(), SysfsError> {
        Host::compact(self, node)
    }

    fn idle_pages(&self, node: u32, page: PageSize) -> Result<u64, SysfsError> {
        let pool = self.pool(page)?;
        Ok(self.node(node, page)?.free.min(pool.free.saturating_sub(pool.reserved)))
    }

    fn memory(&self, node: u32, page: PageSize) -> Result<(u64, Option<u64>), SysfsError> {
        Ok((self.node(node, page)?.available, self.free_blocks(node, page)?))
    }
}

/// Why a node gave fewer pages than asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// There is memory, but not in contiguous pieces of the page's size.
    Fragmentation,
    /// There is no memory left that could be taken.
    NotEnoughMemory,
}

/// What one node was asked for and gave, at the moment of the shortfall.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFigures {
    /// Node number.
    pub node: u32,
    /// Pages asked for.
    pub asked: u64,
    /// Pages given.
    pub got: u64,
    /// Bytes that could still be taken.
    pub available: u64,
    /// Free blocks large enough for a page, where known.
    pub free_blocks: Option<u64>,
}

/// The kernel gave fewer pages than asked for; they have been given back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", self.text())]
pub struct Shortfall {
    /// The page size.
    pub page: PageSize,
    /// Why.
    pub cause: Cause,
    /// The node that could not give more.
    pub node: u32,
    /// All nodes of the plan.
    pub nodes: Vec<NodeFigures>,
    /// Pages that were in use by the time they should go back; they stay recorded for `release`.
    pub kept: u64,
}

impl Shortfall {
    fn text(&self) -> String {
        let asked: u64 = self.nodes.iter().map(|n| n.asked).sum();
        let got: u64 = self.nodes.iter().map(|n| n.got).sum();
        let figures: Vec<_> = self
            .nodes
            .iter()
            .map(|n| {
                let blocks =
                    n.free_blocks.map_or(String::new(), |b| format!(", {b} free blocks of that size"));
                format!(
                    "node {}: {} of {} pages, {} still available{blocks}",
                    n.node,
                    n.got,
                    n.asked,
                    Bytes(n.available)
                )
            })
            .collect();
        let reason = match self.cause {
            Cause::Fragmentation => "memory is fragmented",
            Cause::NotEnoughMemory => "there is not enough free memory",
        };
        let after = match self.kept {
            0 => "nothing was kept".to_owned(),
            n => format!(
                "{n} pages came into use meanwhile and were kept; `dpu-hugepages release` gives them back"
            ),
        };
        let fix = match self.cause {
            Cause::Fragmentation if self.page.is_gigantic() => format!(
                "Reserve {} pages at boot: `dpu-hugepages persist --page-size {} --pages {asked}` prints the kernel command line",
                self.page, self.page
            ),
            Cause::Fragmentation => "Free the page cache with `sync; echo 3 > /proc/sys/vm/drop_caches` and try again, or reserve at \
                 boot with `dpu-hugepages persist`"
                .to_owned(),
            Cause::NotEnoughMemory => {
                "Stop something that uses memory, ask for less, or allow more nodes".to_owned()
            }
        };
        format!(
            "the kernel gave {got} of {asked} hugepages of {}: {reason} on node {} ({}); {after}. {fix}",
            self.page,
            self.node,
            figures.join("; ")
        )
    }
}

/// Why pages could not be reserved or released.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// The request does not fit the machine; nothing was changed.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The kernel gave too few.
    #[error(transparent)]
    Shortfall(#[from] Box<Shortfall>),
    /// A kernel file failed.
    #[error(transparent)]
    Sysfs(#[from] SysfsError),
    /// The record failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// Pages to be released are in use or promised.
    #[error(
        "{wanted} pages of {page} were reserved on node {node}, but only {idle} are idle: the rest is in use or \
         promised. Stop what uses them (`dpu-hugepages status` lists it), or pass --lazy to let each page go when \
         its user ends"
    )]
    InUse {
        /// The page size.
        page: PageSize,
        /// Node number.
        node: u32,
        /// Pages to be released there.
        wanted: u64,
        /// Pages that could be.
        idle: u64,
    },
    /// More is to be released than was reserved.
    #[error("{wanted} pages of {page} are to be released, but dpu-hugepages has reserved only {recorded}{}", on(*node))]
    NotReserved {
        /// The page size.
        page: PageSize,
        /// The node, if one was named.
        node: Option<u32>,
        /// Pages to be released.
        wanted: u64,
        /// Pages on record.
        recorded: u64,
    },
}

fn on(node: Option<u32>) -> String {
    node.map_or(String::new(), |n| format!(" on node {n}"))
}

/// How far a reservation has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Pages taken so far.
    pub done: u64,
    /// Pages to take.
    pub total: u64,
}

/// A reservation under way. Dropped unfinished, it gives back what it took.
#[derive(Debug)]
pub struct Reservation<'k, K: Kernel> {
    kernel: &'k K,
    record: Locked,
    page: PageSize,
    places: Vec<Place>,
    open: bool,
}

#[derive(Debug)]
struct Place {
    node: u32,
    /// Pool size without surplus before anything was asked.
    before: u64,
    want: u64,
    got: u64,
    compacted: bool,
}

impl<'k, K: Kernel> Reservation<'k, K> {
    /// Notes the plan in the record. Nothing is asked of the kernel yet.
    pub fn begin(kernel: &'k K, mut record: Locked, plan: &Plan) -> Result<Self, ReserveError> {
        let mut places = vec![];
        for share in &plan.shares {
            let before = kernel.pool_pages(share.node, plan.page)?;
            let want = share.add + share.converts;
            places.push(Place { node: share.node, before, want, got: 0, compacted: false });
        }
        let pending: Vec<_> = places.iter().map(|p| p.entry(plan.page, p.want, Some(p.before))).collect();
        if !pending.is_empty() {
            record.begin(&pending)?;
        }
        Ok(Reservation { kernel, record, page: plan.page, places, open: true })
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        Progress {
            done: self.places.iter().map(|p| p.got).sum(),
            total: self.places.iter().map(|p| p.want).sum(),
        }
    }

    /// Takes some more pages. True when all are there. An error has rolled everything back.
    pub fn step(&mut self) -> Result<bool, ReserveError> {
        match self.advance() {
            Ok(Advance::Done) => Ok(true),
            Ok(Advance::More) => Ok(false),
            Ok(Advance::Short(mut shortfall)) => {
                shortfall.kept = self.undo()?;
                Err(ReserveError::Shortfall(shortfall))
            }
            Err(error) => {
                // The first error is the one to tell; undo is tried in any case.
                let _ = self.undo();
                Err(error)
            }
        }
    }

    fn advance(&mut self) -> Result<Advance, ReserveError> {
        let Some(at) = self.places.iter().position(|p| p.got < p.want) else {
            return Ok(Advance::Done);
        };
        let page = self.page;
        let place = &mut self.places[at];
        let now = place.before + place.got;
        let ask = (place.want - place.got).min((STEP_BYTES / page.bytes()).max(1));
        // A hint before the first try, where the kernel's own table says that there are too few large blocks.
        if !place.compacted && self.kernel.memory(place.node, page)?.1.is_some_and(|blocks| blocks < ask) {
            place.compacted = true;
            // Compaction helps but is not needed for success: kernels without it have no such file.
            let _ = self.kernel.compact(place.node);
        }
        let reached = steer(self.kernel, place.node, page, now + ask)?;
        place.got = reached.saturating_sub(place.before).min(place.want);
        if reached > now {
            return Ok(if self.places.iter().all(|p| p.got == p.want) {
                Advance::Done
            } else {
                Advance::More
            });
        }
        if !place.compacted {
            place.compacted = true;
            let _ = self.kernel.compact(place.node);
            return Ok(Advance::More);
        }
        Ok(Advance::Short(Box::new(self.shortfall(at)?)))
    }

    fn shortfall(&self, at: usize) -> Result<Shortfall, SysfsError> {
        let mut nodes = vec![];
        for place in &self.places {
            let (available, free_blocks) = self.kernel.memory(place.node, self.page)?;
            nodes.push(NodeFigures {
                node: place.node,
                asked: place.want,
                got: place.got,
                available,
                free_blocks,
            });
        }
        let short = &nodes[at];
        let missing = (short.asked - short.got).saturating_mul(self.page.bytes());
        let cause = if short.available >= missing { Cause::Fragmentation } else { Cause::NotEnoughMemory };
        Ok(Shortfall { page: self.page, cause, node: short.node, nodes, kept: 0 })
    }

    /// Ends with everything taken, and says what that is.
    pub fn finish(mut self) -> Result<Vec<Entry>, ReserveError> {
        let taken: Vec<_> = self.places.iter().map(|p| p.entry(self.page, p.got, None)).collect();
        if !taken.is_empty() {
            self.record.commit(&taken)?;
        }
        self.open = false;
        Ok(taken)
    }

    /// Gives back what was taken. Returns the pages that came into use meanwhile; those stay, and stay recorded.
    pub fn roll_back(mut self) -> Result<u64, ReserveError> {
        self.undo()
    }

    fn undo(&mut self) -> Result<u64, ReserveError> {
        if !self.open {
            return Ok(0);
        }
        self.open = false;
        let mut kept = vec![];
        let mut first_error = None;
        for place in &mut self.places {
            // The pool is asked again: a failed step may have taken pages that were never counted.
            match give_back_place(self.kernel, self.page, place) {
                Ok(0) => {}
                Ok(pages) => kept.push(place.entry(self.page, pages, None)),
                Err(error) => {
                    kept.push(place.entry(self.page, place.got, None));
                    first_error.get_or_insert(error);
                }
            }
        }
        self.record.commit(&kept)?;
        match first_error {
            Some(error) => Err(error.into()),
            None => Ok(kept.iter().map(|e| e.pages).sum()),
        }
    }
}

/// Returns one node's pages, as far as nobody uses them. What remains is returned.
fn give_back_place<K: Kernel>(kernel: &K, page: PageSize, place: &mut Place) -> Result<u64, SysfsError> {
    let now = kernel.pool_pages(place.node, page)?;
    let taken = now.saturating_sub(place.before).min(place.want);
    let give = taken.min(kernel.idle_pages(place.node, page)?);
    let gone = shrink(kernel, place.node, page, now, give)?;
    Ok(taken.saturating_sub(gone))
}

impl<K: Kernel> Drop for Reservation<'_, K> {
    fn drop(&mut self) {
        // Nobody is left to tell; the record keeps what could not be given back.
        let _ = self.undo();
    }
}

impl Place {
    fn entry(&self, page: PageSize, pages: u64, pending_from: Option<u64>) -> Entry {
        Entry { page_kib: page.kib(), node: self.node, pages, pending_from }
    }
}

enum Advance {
    Done,
    More,
    Short(Box<Shortfall>),
}

/// Wishes for a pool size and reads what became of it.
fn steer<K: Kernel>(kernel: &K, node: u32, page: PageSize, target: u64) -> Result<u64, SysfsError> {
    kernel.set_pool_pages(node, page, target)?;
    kernel.pool_pages(node, page)
}

/// Plans and carries out a whole request under the lock. For callers that show no progress.
pub fn reserve(
    host: &Host,
    record: Locked,
    page: PageSize,
    request: &Request,
) -> Result<Vec<Entry>, ReserveError> {
    let plan = plan(request, &host.topology(page)?)?;
    let mut reservation = Reservation::begin(host, record, &plan)?;
    while !reservation.step()? {}
    reservation.finish()
}

/// Which recorded pages to give back.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Only pages of this size.
    pub page: Option<PageSize>,
    /// Only pages on these nodes; empty means all.
    pub nodes: Vec<u32>,
    /// Only that many, taken evenly from the highest node down. Needs `page`.
    pub pages: Option<u64>,
    /// Pages in use do not stop it: the kernel lets go of each when its user ends.
    pub lazy: bool,
}

/// Pages given back on one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Released {
    /// The page size.
    pub page: PageSize,
    /// Node number.
    pub node: u32,
    /// Pages taken out of the pool.
    pub pages: u64,
    /// Of these, pages still in use; each goes when its user ends (only after a lazy release).
    pub still_used: u64,
    /// Pages on top of these that the kernel did not let go of. They stay on record for another `release`.
    pub kept: u64,
}

/// Gives back recorded pages. Either all of them are idle, or nothing is changed (unless the selection is lazy).
pub fn release<K: Kernel>(
    kernel: &K,
    record: &mut Locked,
    select: &Selection,
) -> Result<Vec<Released>, ReserveError> {
    let wanted = select_entries(record.entries(), select)?;
    for (page, node, pages) in &wanted {
        // A pool that somebody shrank meanwhile has nothing of ours left beyond its size.
        let there = (*pages).min(kernel.pool_pages(*node, *page)?);
        let idle = kernel.idle_pages(*node, *page)?;
        if idle < there && !select.lazy {
            return Err(ReserveError::InUse { page: *page, node: *node, wanted: *pages, idle });
        }
    }
    // Idle pages first, on all nodes: what is left is in use, and becomes surplus.
    let mut released = vec![];
    for (page, node, pages) in &wanted {
        let there = kernel.pool_pages(*node, *page)?;
        let idle = kernel.idle_pages(*node, *page)?.min(*pages);
        let gone = shrink(kernel, *node, *page, there, idle)?;
        // What somebody else took out of the pool meanwhile is off the record as well.
        record.give_back(*page, *node, gone + pages.saturating_sub(there))?;
        released.push(Released { page: *page, node: *node, pages: gone, still_used: 0, kept: 0 });
    }
    for (place, (page, node, pages)) in released.iter_mut().zip(&wanted) {
        let there = kernel.pool_pages(*node, *page)?;
        let rest = (*pages - place.pages).min(there);
        place.still_used = shrink(kernel, *node, *page, there, rest)?;
        place.pages += place.still_used;
        place.kept = rest - place.still_used;
        record.give_back(*page, *node, place.still_used)?;
    }
    Ok(released)
}

/// Takes pages out of a node's pool of `there` pages. Returns how many are gone.
fn shrink<K: Kernel>(
    kernel: &K,
    node: u32,
    page: PageSize,
    there: u64,
    pages: u64,
) -> Result<u64, SysfsError> {
    let pages = pages.min(there);
    if pages == 0 {
        return Ok(0);
    }
    Ok(there.saturating_sub(steer(kernel, node, page, there - pages)?))
}

fn select_entries(entries: &[Entry], select: &Selection) -> Result<Vec<(PageSize, u32, u64)>, ReserveError> {
    let mut chosen: Vec<_> = entries
        .iter()
        .filter_map(|e| Some((e.page()?, e.node, e.pages)))
        .filter(|(page, node, _)| {
            select.page.is_none_or(|p| p == *page) && (select.nodes.is_empty() || select.nodes.contains(node))
        })
        .collect();
    let (Some(pages), Some(page)) = (select.pages, select.page) else {
        return Ok(chosen);
    };
    let recorded = chosen.iter().map(|(_, _, n)| n).sum();
    if pages > recorded {
        let node = if let [node] = select.nodes[..] { Some(node) } else { None };
        return Err(ReserveError::NotReserved { page, node, wanted: pages, recorded });
    }
    // Shrink the fullest until the sum fits, one level at a time, so that what remains is as even as it was taken.
    let mut keep = recorded - pages;
    let mut left = chosen.len() as u64;
    chosen.sort_by_key(|(_, node, n)| (*n, *node));
    for (_, _, n) in &mut chosen {
        let stays = (*n).min(keep.div_ceil(left));
        keep -= stays;
        left -= 1;
        *n -= stays;
    }
    chosen.retain(|(_, _, n)| *n > 0);
    chosen.sort_by_key(|(page, node, _)| (*page, *node));
    Ok(chosen)
}

#[cfg(test)]
#[path = "reserve/tests.rs"]
mod tests;
