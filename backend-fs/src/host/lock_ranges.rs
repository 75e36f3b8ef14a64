//! The byte ranges that one lock owner holds in one file. Pure: the kernel holds the real locks, this
//! tells which ones without asking it.
#![forbid(unsafe_code)]

/// A locked range; both ends belong to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) write: bool,
}

impl Range {
    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start <= end && start <= self.end
    }

    /// Whether both cannot be held by different owners.
    pub(super) fn conflicts(&self, other: &Range) -> bool {
        self.overlaps(other.start, other.end) && (self.write || other.write)
    }
}

/// Ranges in ascending order, none overlapping; neighbours of the same kind are one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct RangeSet(Vec<Range>);

impl RangeSet {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// The owner takes `range`, in place of whatever it held there.
    pub(super) fn lock(&mut self, range: Range) {
        self.unlock(range.start, range.end);
        let Range { mut start, mut end, write } = range;
        // Swallow the neighbours of the same kind.
        self.0.retain(|held| {
            let before = held.end.checked_add(1) == Some(start);
            let after = end.checked_add(1) == Some(held.start);
            let merged = held.write == write && (before || after);
            if merged && before {
                start = held.start;
            } else if merged {
                end = held.end;
            }
            !merged
        });
        let at = self.0.partition_point(|held| held.start < start);
        self.0.insert(at, Range { start, end, write });
    }

    /// The owner gives up what it holds in `start..=end`.
    pub(super) fn unlock(&mut self, start: u64, end: u64) {
        let first = self.0.partition_point(|held| held.end < start);
        let last = self.0.partition_point(|held| held.start <= end);
        if first >= last {
            return;
        }
        let head =
            self.0.get(first).filter(|held| held.start < start).map(|held| Range { end: start - 1, ..*held });
        let tail =
            self.0.get(last - 1).filter(|held| held.end > end).map(|held| Range { start: end + 1, ..*held });
        self.0.splice(first..last, head.into_iter().chain(tail));
    }

    /// A held range that another owner's `range` cannot go with.
    pub(super) fn conflict(&self, range: &Range) -> Option<&Range> {
        self.0.iter().find(|held| held.conflicts(range))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const READ: Option<bool> = Some(false);
    const WRITE: Option<bool> = Some(true);

    fn set(steps: &[(u64, u64, Option<bool>)]) -> RangeSet {
        let mut set = RangeSet::default();
        for (start, end, kind) in steps {
            match kind {
                Some(write) => set.lock(Range { start: *start, end: *end, write: *write }),
                None => set.unlock(*start, *end),
            }
        }
        set
    }

    #[test]
    fn neighbours_of_one_kind_are_one_range() {
        assert_eq!(set(&[(0, 4, READ), (10, 14, READ), (5, 9, READ)]), set(&[(0, 14, READ)]));
        assert_eq!(set(&[(0, 4, READ), (5, 9, WRITE)]).len(), 2);
    }

    #[test]
    fn unlocking_the_middle_leaves_both_ends() {
        assert_eq!(set(&[(0, 9, WRITE), (3, 5, None)]), set(&[(0, 2, WRITE), (6, 9, WRITE)]));
    }

    #[test]
    fn upgrade_and_downgrade_replace_the_part_they_name() {
        let upgraded = set(&[(0, 9, READ), (2, 3, WRITE)]);
        assert_eq!(upgraded.len(), 3);
        assert_eq!(set(&[(0, 9, READ), (2, 3, WRITE), (2, 3, READ)]), set(&[(0, 9, READ)]));
    }

    #[test]
    fn the_last_byte_of_all_can_be_locked() {
        assert_eq!(set(&[(0, u64::MAX, WRITE), (0, u64::MAX, None)]), RangeSet::default());
        assert_eq!(set(&[(u64::MAX, u64::MAX, READ), (0, u64::MAX - 1, READ)]).len(), 1);
    }

    #[test]
    fn readers_do_not_stand_in_each_others_way() {
        let held = set(&[(0, 9, READ)]);
        assert!(held.conflict(&Range { start: 5, end: 5, write: false }).is_none());
        assert!(held.conflict(&Range { start: 5, end: 5, write: true }).is_some());
        assert!(held.conflict(&Range { start: 10, end: 20, write: true }).is_none());
    }

    proptest! {
        #[test]
        fn behaves_like_a_byte_map(
            steps in prop::collection::vec((0u64..32, 0u64..32, prop::option::of(any::<bool>())), 0..40)
        ) {
            let steps: Vec<_> = steps.into_iter().map(|(a, b, kind)| (a.min(b), a.max(b), kind)).collect();
            let mut bytes = [None; 32];
            for (start, end, kind) in &steps {
                bytes[*start as usize..=*end as usize].fill(*kind);
            }
            let set = set(&steps);
            let mut seen = [None; 32];
            for range in &set.0 {
                prop_assert!(range.start <= range.end);
                seen[range.start as usize..=range.end as usize].fill(Some(range.write));
            }
            prop_assert_eq!(seen, bytes);
            for pair in set.0.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
                prop_assert!(pair[0].end + 1 < pair[1].start || pair[0].write != pair[1].write, "not merged");
            }
        }
    }
}
