//! From rounds to a verdict: ratios, goals, table, JSON.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{Cell, CellAlignment, Table};
use serde::Serialize;

use crate::contender::Contender;
use crate::load::Round;
use crate::measure::{best, median};
use crate::rows::{Metric, Row};

/// All rounds of one row. Index n of every list is round n.
#[derive(Clone, Debug, Default)]
pub struct Rounds {
    /// Per daemon.
    pub daemons: BTreeMap<&'static str, Vec<Round>>,
    /// The limit.
    pub limit: Vec<Round>,
}

impl Rounds {
    /// Rounds of one contender.
    pub fn of(&self, contender: Contender) -> &[Round] {
        self.daemons.get(key(contender)).map_or(&[], Vec::as_slice)
    }

    /// Adds a round.
    pub fn push(&mut self, contender: Contender, round: Round) {
        self.daemons.entry(key(contender)).or_default().push(round);
    }
}

/// Name of a contender in the JSON.
pub fn key(contender: Contender) -> &'static str {
    match contender {
        Contender::Virtiofsd => "virtiofsd",
        Contender::VirtiofsdNoHandles => "virtiofsd-no-handles",
        Contender::CVirtiofsd => "c-virtiofsd",
        Contender::Ours => "ours",
        Contender::OursHugepages => "ours-hugepages",
    }
}

/// What came of one row.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// Number.
    pub id: &'static str,
    /// What was measured.
    pub name: String,
    /// Unit of the figures.
    pub unit: &'static str,
    /// Figure per daemon and of the limit.
    pub figures: BTreeMap<&'static str, f64>,
    /// Times faster than the faster configuration of virtiofsd 1.14.
    pub vs_virtiofsd: Option<f64>,
    /// Times faster than the C virtiofsd.
    pub vs_c_virtiofsd: Option<f64>,
    /// Times slower than the limit.
    pub vs_limit: Option<f64>,
    /// Times faster than over small pages.
    pub vs_small_pages: Option<f64>,
    /// Goals that were missed; empty if all were met.
    pub missed: Vec<String>,
    /// Whether ours is at least as fast as every peer; none where peers are not compared.
    pub not_slower: Option<bool>,
    /// Every round.
    pub rounds: BTreeMap<&'static str, Vec<Round>>,
}

/// One figure of all rounds.
fn figure(metric: Metric, rounds: &[Round]) -> Option<f64> {
    let values: Vec<f64> = rounds.iter().map(|round| metric.of(round)).collect();
    match metric {
        _ if values.is_empty() => None,
        Metric::BestLatency => Some(best(&values)),
        _ => Some(median(&values)),
    }
}

/// How many times larger `a` is than `b`: the median of the per-round ratios, or the ratio of the best rounds.
fn ratio(metric: Metric, a: &[Round], b: &[Round]) -> Option<f64> {
    if a.is_empty() || b.is_empty() {
        return None;
    }
    if metric == Metric::BestLatency {
        return Some(figure(metric, a)? / figure(metric, b)?);
    }
    let ratios: Vec<f64> = a.iter().zip(b).map(|(a, b)| metric.of(a) / metric.of(b)).collect();
    Some(median(&ratios)).filter(|ratio| ratio.is_finite())
}

/// The smaller of two ratios that may be missing.
fn smaller(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// Judges a row.
pub fn judge(row: &Row, rounds: &Rounds) -> Outcome {
    let metric = row.metric;
    let of = |contender| rounds.of(contender);
    let (main, base) = if row.about_hugepages() {
        (of(Contender::OursHugepages), of(Contender::Ours))
    } else {
        (of(Contender::Ours), &[][..])
    };
    let compared = !row.about_hugepages() && row.goals.at_most.is_none();
    let against = |contender| compared.then(|| ratio(metric, of(contender), main)).flatten();
    let vs_virtiofsd = smaller(against(Contender::Virtiofsd), against(Contender::VirtiofsdNoHandles));
    let vs_c_virtiofsd = against(Contender::CVirtiofsd);
    let vs_limit = ratio(metric, main, &rounds.limit);
    let vs_small_pages = ratio(metric, base, main);
    let ours = figure(metric, main);

    let mut missed = Vec::new();
    let mut at_least = |what: &str, got: Option<f64>, goal: Option<f64>| {
        if let (Some(got), Some(goal)) = (got, goal)
            && got < goal
        {
            missed.push(format!("{what} {got:.2}x, goal {goal}x"));
        }
    };
    at_least("virtiofsd", vs_virtiofsd, row.goals.virtiofsd);
    at_least("C", vs_c_virtiofsd, row.goals.c_virtiofsd);
    at_least("small pages", vs_small_pages, row.goals.small_pages);
    if let (Some(got), Some(goal)) = (vs_limit, row.goals.limit)
        && got > goal
    {
        missed.push(format!("limit {got:.2}x, goal {goal}x"));
    }
    if let (Some(got), Some(goal)) = (ours.map(|ours| metric.scaled(ours)), row.goals.at_most)
        && got > goal
    {
        missed.push(format!("figure {got:.2}, goal {goal}"));
    }

    let mut figures = BTreeMap::new();
    for (name, rounds) in &rounds.daemons {
        figures.extend(figure(metric, rounds).map(|value| (*name, metric.scaled(value))));
    }
    figures.extend(figure(metric, &rounds.limit).map(|value| ("limit", metric.scaled(value))));
    let mut all = rounds.daemons.clone();
    all.insert("limit", rounds.limit.clone());
    Outcome {
        id: row.id,
        name: row.title(),
        unit: metric.unit(),
        figures,
        vs_virtiofsd,
        vs_c_virtiofsd,
        vs_limit,
        vs_small_pages,
        not_slower: smaller(vs_virtiofsd, vs_c_virtiofsd).map(|ratio| ratio >= 1.0),
        missed,
        rounds: all,
    }
}

/// The goals of a row in the order of the ratio columns.
pub fn goal_text(row: &Row) -> String {
    let goals = row.goals;
    let at_most = goals.at_most.filter(|value| value.is_finite());
    [
        goals.virtiofsd.map(|value| format!("≥{value}x")),
        goals.c_virtiofsd.map(|value| format!("≥{value}x")),
        goals.limit.map(|value| format!("≤{value}x")),
        at_most.map(|value| format!("≤{value} {}", row.metric.unit())),
        goals.small_pages.map(|value| format!("≥{value}x small pages")),
    ]
    .into_iter()
    .flatten()
    .collect::<Vec<_>>()
    .join(" ")
}

fn number(value: Option<f64>) -> String {
    match value {
        None => "–".to_owned(),
        Some(value) if value >= 100.0 => format!("{value:.0}"),
        Some(value) if value >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

fn times(value: Option<f64>) -> String {
    value.map_or("–".to_owned(), |value| format!("{}x", number(Some(value))))
}

/// The table for people.
pub fn table(rows: &[&Row], outcomes: &[Outcome]) -> Table {
    let shown = [Contender::Virtiofsd, Contender::VirtiofsdNoHandles, Contender::CVirtiofsd, Contender::Ours];
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY);
    let mut header = vec!["".to_owned(), "workload".to_owned(), "unit".to_owned()];
    header.extend(shown.map(|contender| contender.title().to_owned()));
    header.extend(["limit", "vs\nvirtiofsd", "vs C", "vs\nlimit", "goals", "result"].map(str::to_owned));
    table.set_header(header);
    for (row, outcome) in rows.iter().zip(outcomes) {
        let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
        let mut cells = vec![Cell::new(outcome.id), Cell::new(&outcome.name), Cell::new(outcome.unit)];
        for contender in shown {
            let name = if row.about_hugepages() && contender == Contender::Ours {
                key(Contender::OursHugepages)
            } else {
                key(contender)
            };
            cells.push(right(number(outcome.figures.get(name).copied())));
        }
        cells.push(right(number(outcome.figures.get("limit").copied())));
        cells.push(right(times(outcome.vs_virtiofsd)));
        cells.push(right(times(outcome.vs_c_virtiofsd)));
        cells.push(right(times(outcome.vs_limit)));
        cells.push(Cell::new(goal_text(row)));
        let what: Vec<&str> =
            outcome.missed.iter().filter_map(|text| text.split_whitespace().next()).collect();
        let verdict = match (outcome.missed.is_empty(), outcome.not_slower) {
            (true, _) => "ok".to_owned(),
            (false, _) if row.about_hugepages() => "miss".to_owned(),
            (false, Some(false)) => format!("SLOWER ({})", what.join(", ")),
            (false, _) => format!("miss ({})", what.join(", ")),
        };
        let small_pages = outcome.vs_small_pages.map(|ratio| format!(", {} small pages", times(Some(ratio))));
        cells.push(Cell::new(verdict + &small_pages.unwrap_or_default()));
        table.add_row(cells);
    }
    table
}

/// What a reader of the figures must know about the machine.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Kernel release.
    pub kernel: String,
    /// CPU model.
    pub cpu: String,
    /// CPUs.
    pub cpus: usize,
    /// Load average over a minute when the measurement began.
    pub load: f64,
}

impl Machine {
    /// Looks at this machine.
    pub fn here() -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        Machine {
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            cpu: model.map_or_else(|| "unknown".to_owned(), |(_, name)| name.to_owned()),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            load: load.split_whitespace().next().and_then(|load| load.parse().ok()).unwrap_or(0.0),
        }
    }
}

/// Everything, for machines.
#[derive(Debug, Serialize)]
pub struct Report<'a> {
    /// Where it was measured.
    pub machine: &'a Machine,
    /// Rounds per row.
    pub rounds: u32,
    /// Length of a round in seconds.
    pub round_seconds: f64,
    /// The rows.
    pub rows: &'a [Outcome],
}

/// Writes the report.
pub fn write_json(path: &Path, report: &Report<'_>) -> anyhow::Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rows::ROWS;

    fn rounds(values: &[(Contender, f64)], limit: f64) -> Rounds {
        let round = |us: f64| Round { p50_ns: us * 1_000.0, cpu_ns: us * 1_000.0, ..Default::default() };
        let mut rounds = Rounds { limit: vec![round(limit); 3], ..Default::default() };
        for (contender, us) in values {
            (0..3).for_each(|_| rounds.push(*contender, round(*us)));
        }
        rounds
    }

    #[test]
    fn the_faster_configuration_of_a_peer_counts() {
        let row = &ROWS[0];
        let peers = [(Contender::Virtiofsd, 24.0), (Contender::VirtiofsdNoHandles, 13.0)];
        let all = [peers[0], peers[1], (Contender::CVirtiofsd, 12.5), (Contender::Ours, 1.0)];
        let outcome = judge(row, &rounds(&all, 0.5));
        assert_eq!(outcome.vs_virtiofsd, Some(13.0));
        assert_eq!(outcome.vs_limit, Some(2.0));
        assert!(outcome.missed.is_empty(), "{:?}", outcome.missed);
    }

    #[test]
    fn every_missed_goal_is_named_and_slower_than_a_peer_is_said() {
        let all = [(Contender::Virtiofsd, 24.0), (Contender::CVirtiofsd, 1.5), (Contender::Ours, 2.0)];
        let outcome = judge(&ROWS[0], &rounds(&all, 0.5));
        assert_eq!(outcome.missed.len(), 2, "{:?}", outcome.missed);
        assert_eq!(outcome.not_slower, Some(false));
    }
}
