//! How long a queue worker spins for the next request before it sleeps. Pure; time is passed in.
//!
//! Waking a sleeping thread costs far more than most requests do, so after a request it pays to look
//! at the available ring for a while. It must not cost more than it saves, hence:
//!
//! - **Window.** After the last request the worker spins for at most [`PollWindow::window`]. Each
//!   request that comes within the largest window of the one before doubles the window: it would have
//!   been (or was) caught. Each request that comes later halves it, and below an eighth of the largest
//!   it becomes 0. A DPU that is quiet, or asks once a millisecond, is thus served by wake-ups alone
//!   after a few requests, and an idle worker costs nothing once its last window has passed.
//! - **Contention.** Where the processor is shared, spinning takes time from others, perhaps from the
//!   very DPU that is waited for. The worker reports now and then how long it was ready to run but did
//!   not ([`PollWindow::sample`]: run delay of `/proc/thread-self/schedstat`, second field). More than
//!   an eighth of the time means contention: spinning pauses, for 10 ms at first, twice as long each
//!   time the next sample is as bad, 1 s at most.
//! - **One processor.** With a single processor, or a largest window of 0, it never spins.
#![forbid(unsafe_code)]

use std::time::Duration;

/// Default for the largest window. Longer than a wake-up takes on a virtual machine, so that
/// a DPU that sleeps between requests of depth 1 is still caught.
pub const DEFAULT_MAX: Duration = Duration::from_micros(50);

/// Time between two samples of the run delay.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(20);
/// Run delay above 1/8 of the time is contention.
const CONTENDED_SHARE: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// State of one worker. `now` is any clock that only goes forward.
#[derive(Clone, Debug)]
pub struct PollWindow {
    max: Duration,
    window: Duration,
    /// Length of the latest pause, zero without contention.
    pause: Duration,
    paused_until: Duration,
    last_sample: Option<Duration>,
}

impl PollWindow {
    /// `max` is the largest window; `cpus` the processors this process may use.
    pub fn new(max: Duration, cpus: usize) -> PollWindow {
        PollWindow {
            max: if cpus > 1 { max } else { Duration::ZERO },
            window: Duration::ZERO,
            pause: Duration::ZERO,
            paused_until: Duration::ZERO,
            last_sample: None,
        }
    }

    /// How long to spin after the last request, at this moment.
    #[inline]
    pub fn window(&self, now: Duration) -> Duration {
        if now < self.paused_until { Duration::ZERO } else { self.window }
    }

    /// Whether this worker will ever spin.
    pub fn is_enabled(&self) -> bool {
        !self.max.is_zero()
    }

    /// A request came `idle` after the one before was done.
    #[inline]
    pub fn work(&mut self, idle: Duration) {
        if idle <= self.max {
            self.window = (self.window * 2).clamp(self.max / 8, self.max);
        } else {
            self.window /= 2;
            if self.window < self.max / 8 {
                self.window = Duration::ZERO;
            }
        }
    }

    /// Whether a sample of the run delay is due. Only a worker that spins needs one.
    #[inline]
    pub fn wants_sample(&self, now: Duration) -> bool {
        self.is_enabled()
            && !self.window.is_zero()
            && self.last_sample.is_none_or(|last| now.saturating_sub(last) >= SAMPLE_INTERVAL)
    }

    /// Takes a sample: the worker waited `delay` for a processor since the sample before.
    pub fn sample(&mut self, now: Duration, delay: Duration) {
        let Some(last) = self.last_sample.replace(now) else { return };
        let elapsed = now.saturating_sub(last);
        if delay * CONTENDED_SHARE > elapsed {
            self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            self.paused_until = now + self.pause;
        } else {
            self.pause /= 2;
        }
    }
}

/// Run delay in the text of `/proc/thread-self/schedstat`: "time on the processor, time waiting for
/// one, time slices", nanoseconds (kernel `Documentation/scheduler/sched-stats.rst`).
pub fn parse_run_delay(schedstat: &[u8]) -> Option<Duration> {
    let text = std::str::from_utf8(schedstat).ok()?;
    let nanos = text.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(Duration::from_nanos(nanos))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const US: Duration = Duration::from_micros(1);
    const MS: Duration = Duration::from_millis(1);

    fn dense() -> PollWindow {
        let mut poll = PollWindow::new(DEFAULT_MAX, 2);
        for _ in 0..8 {
            poll.work(2 * US);
        }
        poll
    }

    #[test]
    fn window_grows_to_the_largest_under_dense_requests() {
        let mut poll = PollWindow::new(DEFAULT_MAX, 2);
        assert_eq!(poll.window(MS), Duration::ZERO, "nothing is known at first");
        poll.work(40 * US);
        assert!(poll.window(MS) > Duration::ZERO);
        assert_eq!(dense().window(MS), DEFAULT_MAX);
    }

    #[test]
    fn a_thousand_requests_a_second_end_the_spinning() {
        let mut poll = dense();
        let mut spun = Duration::ZERO;
        for request in 1..=1000u32 {
            spun += poll.window(request * MS);
            poll.work(MS);
        }
        assert!(spun <= 100 * US, "spun {spun:?} in one second");
    }

    #[test]
    fn one_gap_does_not_stop_the_spinning() {
        let mut poll = dense();
        poll.work(10 * MS);
        assert_eq!(poll.window(MS), DEFAULT_MAX / 2);
        poll.work(2 * US);
        assert_eq!(poll.window(MS), DEFAULT_MAX);
    }

    #[test]
    fn never_spins_on_one_processor_or_when_switched_off() {
        for mut poll in [PollWindow::new(DEFAULT_MAX, 1), PollWindow::new(Duration::ZERO, 8)] {
            poll.work(Duration::ZERO);
            poll.work(US);
            assert!(!poll.is_enabled());
            assert_eq!(poll.window(MS), Duration::ZERO);
            assert!(!poll.wants_sample(MS));
        }
    }

    #[test]
    fn contention_pauses_the_spinning_longer_each_time() {
        let mut poll = dense();
        let mut now = MS;
        assert!(poll.wants_sample(now));
        poll.sample(now, Duration::from_secs(9));
        assert_eq!(poll.window(now), DEFAULT_MAX, "the first sample only sets the mark");
        let mut pauses = Vec::new();
        let mut last = now;
        for _ in 0..9 {
            now += 20 * MS;
            poll.sample(now, (now - last) / 2);
            last = now;
            assert_eq!(poll.window(now), Duration::ZERO);
            let pause = (1..2000).map(|ms| ms * MS).find(|ms| !poll.window(now + *ms).is_zero()).unwrap();
            pauses.push(pause);
            now += pause;
        }
        assert_eq!(pauses[..3], [10 * MS, 20 * MS, 40 * MS]);
        assert_eq!(pauses[8], LONGEST_PAUSE);
        now += 20 * MS;
        poll.sample(now, Duration::ZERO);
        assert_eq!(poll.window(now), DEFAULT_MAX, "spins again when nobody else wants the processor");
    }

    #[test]
    fn samples_are_rare_and_only_taken_while_spinning() {
        let mut poll = dense();
        poll.sample(MS, Duration::ZERO);
        assert!(!poll.wants_sample(20 * MS));
        assert!(poll.wants_sample(21 * MS));
        assert!(!PollWindow::new(DEFAULT_MAX, 2).wants_sample(MS));
    }

    #[test]
    fn run_delay_is_the_second_field() {
        assert_eq!(parse_run_delay(b"123 4567 8\n"), Some(Duration::from_nanos(4567)));
        assert_eq!(parse_run_delay(b""), None);
        assert_eq!(parse_run_delay(b"12"), None);
        assert_eq!(parse_run_delay(b"a b c"), None);
        assert_eq!(parse_run_delay(b"\xff 1"), None);
    }

    proptest! {
        #[test]
        fn window_never_exceeds_the_largest(idles in proptest::collection::vec(0u64..200_000, 0..200)) {
            let mut poll = PollWindow::new(DEFAULT_MAX, 4);
            for idle in idles {
                poll.work(Duration::from_nanos(idle));
                prop_assert!(poll.window(MS) <= DEFAULT_MAX);
                prop_assert!(poll.window(MS).is_zero() || poll.window(MS) >= DEFAULT_MAX / 8);
            }
        }

        #[test]
        fn quiet_load_spins_below_one_window_in_total(window in 0u64..8, gap in 51u32..100_000) {
            let mut poll = PollWindow::new(DEFAULT_MAX, 4);
            for _ in 0..window {
                poll.work(US);
            }
            let mut spun = Duration::ZERO;
            for _ in 0..100 {
                spun += poll.window(MS);
                poll.work(gap * US);
            }
            prop_assert!(spun <= 2 * DEFAULT_MAX);
        }
    }
}
