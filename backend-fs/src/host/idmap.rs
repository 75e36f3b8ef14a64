//! Translation of user and group ids between DPU and host (`--translate-uid`, `--translate-gid`).
//!
//! Each direction is a list of intervals of its own: a rule for DPU ids says nothing about how host
//! ids are shown, except `map`, which is one rule of each. Ids outside of every interval stay as
//! they are. Within a direction the intervals never overlap, so that the order of rules does not
//! matter and a look-up is one binary search.
//!
//! 4294967295 is no id but the kernel's "leave unchanged" (`setresuid(2)`, `chown(2)`). No rule can
//! produce it, and it is never translated into a host id: a DPU that sends it as its uid must not
//! end up acting with the daemon's own.
#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

/// `(uid_t)-1`, the kernel's "no id".
pub const NO_ID: u32 = u32::MAX;

/// Translates ids in both directions. The default is the identity.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdMap {
    to_host: Vec<Interval>,
    to_dpu: Vec<Interval>,
}

/// One rule as the command line gives it. `Display` prints what `FromStr` reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// `guest:DPU:HOST:COUNT`: a range of DPU ids, one to one.
    Dpu(Range),
    /// `host:HOST:DPU:COUNT`: a range of host ids, one to one.
    Host(Range),
    /// `squash-guest:DPU:HOST:COUNT`: a range of DPU ids, all to one host id.
    SquashDpu(Range),
    /// `squash-host:HOST:DPU:COUNT`: a range of host ids, all to one DPU id.
    SquashHost(Range),
    /// `map:DPU:HOST:COUNT`: one to one in both directions.
    Both(Range),
    /// `forbid-guest:DPU:COUNT`: a range of DPU ids that may not be used.
    ForbidDpu {
        /// First id.
        from: u32,
        /// Number of ids.
        count: u32,
    },
}

/// The numbers of a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// First id of the range that is translated.
    pub from: u32,
    /// Id that `from` becomes.
    pub to: u32,
    /// Number of ids; 0 makes a rule without effect.
    pub count: u32,
}

/// Why a rule was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// The first word.
    #[error("unknown kind '{0}' (guest, host, squash-guest, squash-host, forbid-guest, map)")]
    Kind(String),
    /// Too few or too many numbers.
    #[error("'{kind}' takes {expected} numbers, as in '{example}'; found {found}")]
    Fields {
        /// The first word.
        kind: &'static str,
        /// How many it takes.
        expected: usize,
        /// How many there are.
        found: usize,
        /// A correct rule.
        example: &'static str,
    },
    /// Not a 32-bit number.
    #[error("'{0}' is not a number from 0 to 4294967295")]
    Number(String),
    /// A range reaches into or beyond [`NO_ID`].
    #[error("{count} ids from {base} do not end before 4294967295, which is not a valid id")]
    Overflow {
        /// First id.
        base: u32,
        /// Number of ids.
        count: u32,
    },
}

/// Two rules translate the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{second}' overlaps '{first}'; {direction} may be named by one rule only")]
pub struct OverlapError {
    /// The rule given first.
    pub first: Rule,
    /// The rule that overlaps it.
    pub second: Rule,
    direction: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Interval {
    first: u32,
    last: u32,
    becomes: Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// `first` becomes this id, `first + 1` the next.
    From(u32),
    /// Every id becomes this one.
    One(u32),
    Refused,
}

impl IdMap {
    /// Builds the translation. Fails when two rules translate the same id in the same direction.
    pub fn new(rules: &[Rule]) -> Result<Self, OverlapError> {
        Ok(Self {
            to_host: direction(rules, Rule::on_dpu_ids, "a DPU id")?,
            to_dpu: direction(rules, Rule::on_host_ids, "a host id")?,
        })
    }

    /// Host id for a DPU id; `None`: the operation is refused (`forbid-guest`, or [`NO_ID`]).
    pub fn to_host(&self, dpu: u32) -> Option<u32> {
        if dpu == NO_ID { None } else { translate(&self.to_host, dpu) }
    }

    /// DPU id shown for a host id.
    pub fn to_dpu(&self, host: u32) -> u32 {
        translate(&self.to_dpu, host).unwrap_or(host)
    }

    /// Whether this is the identity, so that translation can be skipped. [`NO_ID`] still has to be
    /// refused by who skips it.
    pub fn is_identity(&self) -> bool {
        self.to_host.is_empty() && self.to_dpu.is_empty()
    }
}

fn translate(intervals: &[Interval], id: u32) -> Option<u32> {
    let candidate = intervals.partition_point(|interval| interval.first <= id).checked_sub(1);
    match candidate.and_then(|index| intervals.get(index)).filter(|interval| id <= interval.last) {
        None => Some(id),
        Some(interval) => match interval.becomes {
            // Cannot wrap: the parser refuses targets that do not end below `NO_ID`.
            Target::From(base) => Some(base.wrapping_add(id - interval.first)),
            Target::One(only) => Some(only),
            Target::Refused => None,
        },
    }
}

/// The sorted intervals of one direction.
fn direction(
    rules: &[Rule],
    interval: fn(&Rule) -> Option<Interval>,
    name: &'static str,
) -> Result<Vec<Interval>, OverlapError> {
    let mut found: Vec<(Interval, usize)> =
        rules.iter().enumerate().filter_map(|(index, rule)| Some((interval(rule)?, index))).collect();
    found.sort_by_key(|(interval, _)| interval.first);
    for pair in found.windows(2) {
        if let [(low, a), (high, b)] = pair
            && high.first <= low.last
        {
            let (first, second) = (rules[*a.min(b)], rules[*a.max(b)]);
            return Err(OverlapError { first, second, direction: name });
        }
    }
    Ok(found.into_iter().map(|(interval, _)| interval).collect())
}

impl Rule {
    fn on_dpu_ids(&self) -> Option<Interval> {
        match *self {
            Rule::Dpu(range) | Rule::Both(range) => range.interval(Target::From(range.to)),
            Rule::SquashDpu(range) => range.interval(Target::One(range.to)),
            Rule::ForbidDpu { from, count } => Range { from, to: 0, count }.interval(Target::Refused),
            Rule::Host(_) | Rule::SquashHost(_) => None,
        }
    }

    fn on_host_ids(&self) -> Option<Interval> {
        match *self {
            Rule::Host(range) => range.interval(Target::From(range.to)),
            Rule::Both(Range { from, to, count }) => {
                Range { from: to, to: from, count }.interval(Target::From(from))
            }
            Rule::SquashHost(range) => range.interval(Target::One(range.to)),
            Rule::Dpu(_) | Rule::SquashDpu(_) | Rule::ForbidDpu { .. } => None,
        }
    }
}

impl Range {
    fn interval(self, becomes: Target) -> Option<Interval> {
        let last = self.from.checked_add(self.count.checked_sub(1)?)?;
        Some(Interval { first: self.from, last, becomes })
    }
}

/// Refuses a range that does not end before [`NO_ID`].
fn bounded(base: u32, count: u32) -> Result<(), RuleError> {
    match base.checked_add(count) {
        Some(_) => Ok(()),
        None => Err(RuleError::Overflow { base, count }),
    }
}

impl FromStr for Rule {
    type Err = RuleError;

    /// `kind:number:number:number`; any character that cannot be in a kind's name separates.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let end = text.find(|c: char| !(c.is_alphanumeric() || c == '-' || c == '_')).unwrap_or(text.len());
        let (kind, rest) = text.split_at(end);
        let kind = kind.to_lowercase();
        let (kind, example): (&'static str, &'static str) = match kind.as_str() {
            "guest" => ("guest", "guest:0:1000:1"),
            "host" => ("host", "host:1000:0:1"),
            "squash-guest" => ("squash-guest", "squash-guest:0:1000:65536"),
            "squash-host" => ("squash-host", "squash-host:0:1000:65536"),
            "map" => ("map", "map:0:100000:65536"),
            "forbid-guest" => ("forbid-guest", "forbid-guest:65536:1000"),
            _ => return Err(RuleError::Kind(kind)),
        };
        let mut chars = rest.chars();
        let numbers = match chars.next() {
            None => Vec::new(),
            Some(separator) => chars
                .as_str()
                .split(separator)
                .map(|field| field.parse().map_err(|_| RuleError::Number(field.to_owned())))
                .collect::<Result<Vec<u32>, _>>()?,
        };
        let fields = |expected| RuleError::Fields { kind, expected, found: numbers.len(), example };
        if kind == "forbid-guest" {
            let [from, count] = numbers[..] else { return Err(fields(2)) };
            bounded(from, count)?;
            return Ok(Rule::ForbidDpu { from, count });
        }
        let [from, to, count] = numbers[..] else { return Err(fields(3)) };
        let range = Range { from, to, count };
        bounded(from, count)?;
        if kind.starts_with("squash") {
            bounded(to, 1)?;
        } else {
            bounded(to, count)?;
        }
        Ok(match kind {
            "guest" => Rule::Dpu(range),
            "host" => Rule::Host(range),
            "squash-guest" => Rule::SquashDpu(range),
            "squash-host" => Rule::SquashHost(range),
            _ => Rule::Both(range),
        })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, Range { from, to, count }) = match self {
            Rule::Dpu(range) => ("guest", range),
            Rule::Host(range) => ("host", range),
            Rule::SquashDpu(range) => ("squash-guest", range),
            Rule::SquashHost(range) => ("squash-host", range),
            Rule::Both(range) => ("map", range),
            Rule::ForbidDpu { from, count } => return write!(f, "forbid-guest:{from}:{count}"),
        };
        write!(f, "{kind}:{from}:{to}:{count}")
    }
}

#[cfg(test)]
mod tests;
