//! Clocks, CPUs and the figures made of them.

use std::time::Duration;

use anyhow::Context;
use rustix::thread::CpuSet;

/// CPU of the driver.
pub const DRIVER_CPU: usize = 0;
/// CPU of the daemon, and of the threads that measure the limits.
pub const DAEMON_CPU: usize = 1;

/// Binds the calling thread to one CPU.
pub fn pin_this_thread(cpu: usize) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    rustix::thread::sched_setaffinity(None, &set)
        .with_context(|| format!("cannot bind to CPU {cpu}; the benchmark needs CPUs 0 and 1"))
}

/// Lets time pass while something is measured.
pub fn let_pass(time: Duration) {
    let time =
        rustix::event::Timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos()) };
    // An early return (a signal) only makes the interval shorter; callers take the true time from the clock.
    let _ = rustix::event::poll(&mut [], Some(&time));
}

/// Middle value; the mean of the two middle ones if the number is even. 0 for nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// Smallest value.
pub fn best(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min)
}

/// Latencies of one round.
#[derive(Debug, Default)]
pub struct Latencies(Vec<u32>);

impl Latencies {
    /// Adds one.
    pub fn push(&mut self, time: Duration) {
        self.0.push(u32::try_from(time.as_nanos()).unwrap_or(u32::MAX));
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The value below which `share` of the samples lie, in nanoseconds.
    pub fn percentile(&mut self, share: f64) -> f64 {
        if self.0.is_empty() {
            return 0.0;
        }
        let at = ((self.0.len() - 1) as f64 * share) as usize;
        f64::from(*self.0.select_nth_unstable(at).1)
    }
}

/// Small deterministic random numbers (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Starts a sequence.
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((u128::from(self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)) * u128::from(limit)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_percentiles_are_those_of_the_sorted_values() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
        let mut latencies = Latencies::default();
        (1..=101).rev().for_each(|ns| latencies.push(Duration::from_nanos(ns)));
        assert_eq!(latencies.percentile(0.5), 51.0);
        assert_eq!(latencies.percentile(0.99), 100.0);
    }

    #[test]
    fn random_numbers_stay_below_their_limit_and_spread() {
        let mut random = Random::new(7);
        let mut seen = [0; 8];
        (0..8_000).for_each(|_| seen[random.below(8) as usize] += 1);
        assert!(seen.iter().all(|count| (800..1200).contains(count)), "{seen:?}");
    }
}
