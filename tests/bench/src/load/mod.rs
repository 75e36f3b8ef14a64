//! What one round does with a daemon, and the figures it yields.

mod pipeline;
mod sequence;

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::Serialize;
use virtio_driver::daemon::Daemon;
use virtio_driver::ring::Completion;

use crate::contender::Rig;
use crate::measure::{Latencies, let_pass};

/// Kind of request, for loads that keep a number of them in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// GETATTR of one of 16 files.
    Getattr,
    /// LOOKUP of one of 16 known names.
    Lookup,
    /// READ at a random offset.
    Read(usize),
    /// WRITE at a random offset.
    Write(usize),
}

/// What to do for the length of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// Keep `depth` requests of one kind in flight.
    Pipeline {
        /// Kind.
        operation: Operation,
        /// Requests in flight.
        depth: usize,
    },
    /// OPEN and RELEASE of one file.
    OpenRelease,
    /// CREATE, RELEASE, UNLINK, FORGET of one file.
    CreateUnlink,
    /// READDIRPLUS of a whole directory in buffers of one page. One operation is one entry.
    Readdirplus,
    /// No request at all.
    Idle,
    /// One GETATTR per millisecond.
    Paced,
}

/// Figures of one round.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Round {
    /// Operations completed.
    pub operations: u64,
    /// Median latency of an operation, nanoseconds.
    pub p50_ns: f64,
    /// 99th percentile, nanoseconds. Reported, never judged: it shows the machine's noise.
    pub p99_ns: f64,
    /// Daemon CPU time per operation, nanoseconds.
    pub cpu_ns: f64,
    /// Daemon CPU time as share of one CPU.
    pub cpu_share: f64,
    /// Completion signals per operation.
    pub signals: f64,
}

impl Load {
    /// Runs a round.
    pub fn run(
        self,
        rig: &mut Rig,
        completion: Completion,
        length: Duration,
        seed: u64,
    ) -> anyhow::Result<Round> {
        rig.set_completion(completion);
        rig.session.client().ring_mut().drain_call();
        let signals = rig.session.client().ring().stats().signals;
        let (cpu, start) = (Daemon::cpu_time_of(&rig.processes), Instant::now());
        let mut latencies = match self {
            Load::Pipeline { operation, depth } => pipeline::run(rig, operation, depth, length, seed)?,
            Load::OpenRelease => sequence::open_release(rig, length)?,
            Load::CreateUnlink => sequence::create_unlink(rig, length)?,
            Load::Readdirplus => sequence::readdirplus(rig, length)?,
            Load::Idle => {
                let_pass(length);
                Latencies::default()
            }
            Load::Paced => sequence::paced(rig, length)?,
        };
        let elapsed = start.elapsed();
        let cpu = Daemon::cpu_time_of(&rig.processes).saturating_sub(cpu);
        rig.session.client().ring_mut().drain_call();
        let signals = rig.session.client().ring().stats().signals - signals;
        rig.expect_running()?;
        ensure!(self == Load::Idle || latencies.len() > 0, "no operation completed within {length:?}");
        let operations = latencies.len().max(1) as f64;
        Ok(Round {
            operations: latencies.len() as u64,
            p50_ns: latencies.percentile(0.5),
            p99_ns: latencies.percentile(0.99),
            cpu_ns: cpu.as_nanos() as f64 / operations,
            cpu_share: cpu.as_secs_f64() / elapsed.as_secs_f64(),
            signals: signals as f64 / operations,
        })
    }
}
