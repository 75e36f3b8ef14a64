//! The rows of the comparison: what is measured, the limit beside it, and the goals.
//!
//! A goal against a peer says how many times faster ours must be; a goal against the limit how many times slower it
//! may be at most. Latency rows compare the medians of each round's p50, CPU rows the daemon's CPU time per
//! operation, "best" rows the best round.

use virtio_driver::ring::Completion;
use virtio_driver::ring::Completion::{Eventfd, Polling};

use crate::limit::{Calls, Limit};
use crate::load::Operation::{Getattr, Lookup, Read, Write};
use crate::load::{Load, Operation, Round};

/// The figure of a round that a row compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Metric {
    /// Median latency.
    Latency,
    /// Median latency of the best round.
    BestLatency,
    /// Daemon CPU time per operation.
    Cpu,
    /// Daemon CPU time as share of a CPU.
    CpuShare,
    /// Completion signals per operation.
    Signals,
}

impl Metric {
    /// The figure.
    pub fn of(self, round: &Round) -> f64 {
        match self {
            Metric::Latency | Metric::BestLatency => round.p50_ns,
            Metric::Cpu => round.cpu_ns,
            Metric::CpuShare => round.cpu_share,
            Metric::Signals => round.signals,
        }
    }

    /// What the table calls it.
    pub fn unit(self) -> &'static str {
        match self {
            Metric::Latency => "us p50",
            Metric::BestLatency => "us best",
            Metric::Cpu => "us CPU/op",
            Metric::CpuShare => "% CPU",
            Metric::Signals => "signals/op",
        }
    }

    /// A figure in the table's unit.
    pub fn scaled(self, value: f64) -> f64 {
        match self {
            Metric::Latency | Metric::BestLatency | Metric::Cpu => value / 1_000.0,
            Metric::CpuShare => value * 100.0,
            Metric::Signals => value,
        }
    }
}

/// What ours must reach.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Goals {
    /// Times faster than virtiofsd 1.14 (the faster of its two configurations).
    pub virtiofsd: Option<f64>,
    /// Times faster than the C virtiofsd.
    pub c_virtiofsd: Option<f64>,
    /// Times slower than the limit at most.
    pub limit: Option<f64>,
    /// Largest value of the figure itself, in the table's unit.
    pub at_most: Option<f64>,
    /// Times faster than over memory of small pages at least.
    pub small_pages: Option<f64>,
}

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Number.
    pub id: &'static str,
    /// What is measured.
    pub name: &'static str,
    /// How the driver waits.
    pub completion: Completion,
    /// What is done.
    pub load: Load,
    /// What is compared.
    pub metric: Metric,
    /// The limit beside it.
    pub limit: Limit,
    /// What ours must reach.
    pub goals: Goals,
}

impl Row {
    /// Name with the driver's mode.
    pub fn title(&self) -> String {
        let mode = if self.completion == Polling { "P" } else { "E" };
        format!("{}, {mode}", self.name)
    }

    /// Whether the row is about hugepages and compares ours with ours.
    pub fn about_hugepages(&self) -> bool {
        self.goals.small_pages.is_some()
    }

    /// Whether a selection (`F1`, `getattr`) names this row.
    pub fn is_named_by(&self, selection: &str) -> bool {
        self.id.eq_ignore_ascii_case(selection)
            || (!selection.starts_with(['F', 'f']) || selection.len() > 4)
                && self.title().to_lowercase().contains(&selection.to_lowercase())
    }
}

const fn pipeline(operation: Operation, depth: usize) -> Load {
    Load::Pipeline { operation, depth }
}

const fn looped(calls: Calls) -> Limit {
    Limit::Loop { calls, times: 1 }
}

const fn goals(virtiofsd: f64, c_virtiofsd: f64, limit: f64) -> Goals {
    Goals {
        virtiofsd: Some(virtiofsd),
        c_virtiofsd: Some(c_virtiofsd),
        limit: Some(limit),
        at_most: None,
        small_pages: None,
    }
}

const fn peer_goals(virtiofsd: f64, c_virtiofsd: f64) -> Goals {
    Goals { limit: None, ..goals(virtiofsd, c_virtiofsd, 0.0) }
}

const fn at_most(value: f64) -> Goals {
    Goals { virtiofsd: None, c_virtiofsd: None, limit: None, at_most: Some(value), small_pages: None }
}

const KIB4: usize = 4 << 10;
const KIB128: usize = 128 << 10;
const MIB: usize = 1 << 20;

macro_rules! row {
    ($id:literal, $name:literal, $mode:expr, $load:expr, $metric:expr, $limit:expr, $goals:expr) => {
        Row {
            id: $id,
            name: $name,
            completion: $mode,
            load: $load,
            metric: $metric,
            limit: $limit,
            goals: $goals,
        }
    };
}

/// All rows, in the order of the table.
#[rustfmt::skip]
pub const ROWS: &[Row] = &[
    row!("F1", "getattr QD1", Polling, pipeline(Getattr, 1), Metric::Latency, Limit::HandOver(Calls::Statx), goals(12.0, 12.0, 3.0)),
    row!("F1", "lookup QD1", Polling, pipeline(Lookup, 1), Metric::Latency, Limit::HandOver(Calls::StatxAt), goals(12.0, 12.0, 3.0)),
    row!("F2", "getattr QD1", Eventfd, pipeline(Getattr, 1), Metric::Latency, Limit::HandOver(Calls::Statx), goals(1.9, 1.8, 1.2)),
    row!("F2", "lookup QD1", Eventfd, pipeline(Lookup, 1), Metric::Latency, Limit::HandOver(Calls::StatxAt), goals(1.9, 1.8, 1.2)),
    row!("F3", "getattr QD16", Polling, pipeline(Getattr, 16), Metric::Cpu, looped(Calls::Statx), goals(5.0, 2.0, 2.0)),
    row!("F4", "lookup QD16", Polling, pipeline(Lookup, 16), Metric::Cpu, looped(Calls::StatxAt), goals(4.0, 2.2, 2.0)),
    row!("F5", "randread 4K QD1", Polling, pipeline(Read(KIB4), 1), Metric::Latency, Limit::HandOver(Calls::Pread(KIB4)), goals(10.0, 10.0, 2.0)),
    row!("F6", "randread 4K QD16", Polling, pipeline(Read(KIB4), 16), Metric::Cpu, looped(Calls::Pread(KIB4)), goals(2.5, 1.6, 1.25)),
    row!("F7", "randread 4K QD16", Eventfd, pipeline(Read(KIB4), 16), Metric::Latency, Limit::None, peer_goals(2.5, 1.8)),
    row!("F8", "randwrite 4K QD1", Polling, pipeline(Write(KIB4), 1), Metric::Latency, Limit::HandOver(Calls::Pwrite(KIB4)), goals(9.0, 9.0, 2.2)),
    row!("F8", "randwrite 4K QD16", Polling, pipeline(Write(KIB4), 16), Metric::Cpu, looped(Calls::Pwrite(KIB4)), goals(2.2, 1.5, 2.2)),
    row!("F9", "read 128K QD8", Eventfd, pipeline(Read(KIB128), 8), Metric::Latency, Limit::Loop { calls: Calls::Pread(KIB128), times: 8 }, goals(1.7, 1.7, 1.15)),
    row!("F10", "read 1M QD4", Polling, pipeline(Read(MIB), 4), Metric::Latency, Limit::Loop { calls: Calls::Pread(MIB), times: 4 }, goals(1.05, 1.0, 1.2)),
    row!("F10", "read 1M QD4", Eventfd, pipeline(Read(MIB), 4), Metric::Latency, Limit::Loop { calls: Calls::Pread(MIB), times: 4 }, goals(1.05, 1.0, 1.2)),
    row!("F10", "write 1M QD4", Polling, pipeline(Write(MIB), 4), Metric::Latency, Limit::Loop { calls: Calls::Pwrite(MIB), times: 4 }, goals(1.05, 1.0, 1.35)),
    row!("F10", "write 1M QD4", Eventfd, pipeline(Write(MIB), 4), Metric::Latency, Limit::Loop { calls: Calls::Pwrite(MIB), times: 4 }, goals(1.05, 1.0, 1.35)),
    row!("F11", "open+release", Polling, Load::OpenRelease, Metric::Latency, Limit::HandOver(Calls::OpenClose), peer_goals(6.0, 6.0)),
    row!("F11", "open+release", Eventfd, Load::OpenRelease, Metric::Latency, Limit::HandOver(Calls::OpenClose), peer_goals(1.6, 1.6)),
    row!("F12", "create+release+unlink+forget", Polling, Load::CreateUnlink, Metric::Latency, Limit::HandOver(Calls::CreateUnlink), peer_goals(6.0, 5.0)),
    row!("F12", "create+release+unlink+forget", Eventfd, Load::CreateUnlink, Metric::Latency, Limit::HandOver(Calls::CreateUnlink), peer_goals(2.3, 2.3)),
    row!("F13", "readdirplus, per entry", Polling, Load::Readdirplus, Metric::BestLatency, looped(Calls::Getdents), goals(2.2, 1.6, 2.8)),
    row!("F13", "readdirplus, per entry", Eventfd, Load::Readdirplus, Metric::BestLatency, looped(Calls::Getdents), goals(2.2, 1.6, 2.8)),
    row!("F15", "randread 4K QD16", Eventfd, pipeline(Read(KIB4), 16), Metric::Signals, Limit::None, at_most(0.25)),
    row!("F16", "hugepages: read 1M QD4", Polling, pipeline(Read(MIB), 4), Metric::Latency, Limit::None, Goals { small_pages: Some(1.05), ..at_most(f64::INFINITY) }),
    row!("F16", "hugepages: randread 4K QD1", Polling, pipeline(Read(KIB4), 1), Metric::Latency, Limit::None, Goals { small_pages: Some(1.0), ..at_most(f64::INFINITY) }),
    row!("F17", "idle", Eventfd, Load::Idle, Metric::CpuShare, Limit::None, at_most(0.5)),
    row!("F17", "getattr at 1 kHz", Eventfd, Load::Paced, Metric::CpuShare, Limit::None, at_most(6.0)),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_selects_its_rows_only() {
        let named = |selection: &str| -> Vec<&str> {
            ROWS.iter().filter(|row| row.is_named_by(selection)).map(|row| row.id).collect()
        };
        assert_eq!(named("F1"), ["F1", "F1"]);
        assert_eq!(named("f10"), ["F10"; 4]);
        assert_eq!(named("readdirplus"), ["F13", "F13"]);
        assert!(named("F99").is_empty());
    }
}
