//! How long a queue worker spins for the next request before it sleeps. Pure; time is passed in.
//!
//! Waking a sleeping thread costs far more than most requests do, in time and in processor time, so
//! after a request it pays to look at the available ring for a while. It must not cost more than it
//! saves, hence:
//!
//! - **Window.** After the last request the worker spins for at most [`PollWindow::window`]. Each
//!   request that comes within the largest window of the one before doubles the window: it would have
//!   been (or was) caught. Each request that comes later halves it, and below an eighth of the largest
//!   it becomes 0. A DPU that is quiet, or asks once a millisecond, is thus served by wake-ups alone
//!   after a few requests, and an idle worker costs nothing once its last window has passed.
//! - **Futility.** Where this worker and the DPU's processor share one processor of the host, nothing
//!   can come while it spins, and everything comes as soon as it sleeps. After eight windows in a row
//!   that passed without a catch spinning stops for a while: 10 ms at first, twice as long each time
//!   the next eight fail as well, 1 s at most. A catch ends that.
//! - **Contention.** Where the processor is shared with others, spinning takes time from them. The
//!   worker reports now and then how long it was ready to run but did not ([`PollWindow::sample`]: run
//!   delay of `/proc/thread-self/schedstat`, second field). More than an eighth of the time means
//!   contention: until a better sample the window is a quarter of the largest at most, which is less
//!   than sleeping and being woken costs.
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
/// Part of the largest window that is left under contention.
const CONTENDED_WINDOW: u32 = 4;
/// Windows without a catch after which spinning stops for a while.
const FUTILE: u32 = 8;
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// State of one worker. `now` is any clock that only goes forward.
#[derive(Clone, Debug)]
pub struct PollWindow {
    max: Duration,
    window: Duration,
    contended: bool,
    /// Windows that passed without a catch, in a row.
    missed: u32,
    /// Length of the latest pause, zero after a catch.
    pause: Duration,
    paused_until: Duration,
    last_sample: Option<Duration>,
}

impl PollWindow {
    /// `max` is the largest window; `cpus` the processors of the machine.
    pub fn new(max: Duration, cpus: usize) -> PollWindow {
        PollWindow {
            max: if cpus > 1 { max } else { Duration::ZERO },
            window: Duration::ZERO,
            contended: false,
            missed: 0,
            pause: Duration::ZERO,
            paused_until: Duration::ZERO,
            last_sample: None,
        }
    }

    /// How long to spin after the last request, at this moment.
    #[inline]
    pub fn window(&self, now: Duration) -> Duration {
        if now < self.paused_until {
            Duration::ZERO
        } else if self.contended {
            self.window.min(self.max / CONTENDED_WINDOW)
        } else {
            self.window
        }
    }

    /// Whether this worker will ever spin.
    pub fn is_enabled(&self) -> bool {
        !self.max.is_zero()
    }

    /// A request came at `now`, after the one before was done at `since`.
    #[inline]
    pub fn work(&mut self, since: Duration, now: Duration) {
        let (idle, spun) = (now.saturating_sub(since), self.window(since));
        if idle <= spun {
            self.missed = 0;
            self.pause = Duration::ZERO;
        } else if !spun.is_zero() {
            self.missed += 1;
            if self.missed == FUTILE {
                self.missed = 0;
                self.pause = (self.pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                self.paused_until = now + self.pause;
            }
        }
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
        !self.window.is_zero()
            && self.last_sample.is_none_or(|last| now.saturating_sub(last) >= SAMPLE_INTERVAL)
    }

    /// Takes a sample: the worker waited `delay` for a processor since the sample before.
    pub fn sample(&mut self, now: Duration, delay: Duration) {
        if let Some(last) = self.last_sample.replace(now) {
            self.contended = delay * CONTENDED_SHARE > now.saturating_sub(last);
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

    /// A clock and a state machine that is told of requests at intervals.
    struct Worker {
        poll: PollWindow,
        now: Duration,
        spun: Duration,
    }

    impl Worker {
        fn new(max: Duration, cpus: usize) -> Worker {
            Worker { poll: PollWindow::new(max, cpus), now: MS, spun: Duration::ZERO }
        }

        /// Caught while spinning if the window allows.
        fn request_after(&mut self, idle: Duration) {
            self.spun += self.poll.window(self.now).min(idle);
            self.poll.work(self.now, self.now + idle);
            self.now += idle;
        }

        fn dense() -> Worker {
            let mut worker = Worker::new(DEFAULT_MAX, 2);
            (0..8).for_each(|_| worker.request_after(2 * US));
            worker
        }

        fn window(&self) -> Duration {
            self.poll.window(self.now)
        }
    }

    #[test]
    fn window_grows_to_the_largest_under_dense_requests() {
        let mut worker = Worker::new(DEFAULT_MAX, 2);
        assert_eq!(worker.window(), Duration::ZERO, "nothing is known at first");
        worker.request_after(40 * US);
        assert!(worker.window() > Duration::ZERO);
        assert_eq!(Worker::dense().window(), DEFAULT_MAX);
    }

    #[test]
    fn a_thousand_requests_a_second_end_the_spinning() {
        let mut worker = Worker::dense();
        worker.spun = Duration::ZERO;
        (0..1000).for_each(|_| worker.request_after(MS));
        assert!(worker.spun <= 100 * US, "spun {:?} in one second", worker.spun);
    }

    #[test]
    fn one_gap_does_not_stop_the_spinning() {
        let mut worker = Worker::dense();
        worker.request_after(10 * MS);
        assert_eq!(worker.window(), DEFAULT_MAX / 2);
        worker.request_after(2 * US);
        assert_eq!(worker.window(), DEFAULT_MAX);
    }

    #[test]
    fn never_spins_on_one_processor_or_when_switched_off() {
        for mut worker in [Worker::new(DEFAULT_MAX, 1), Worker::new(Duration::ZERO, 8)] {
            worker.request_after(Duration::ZERO);
            worker.request_after(US);
            assert!(!worker.poll.is_enabled());
            assert_eq!(worker.window(), Duration::ZERO);
            assert!(!worker.poll.wants_sample(MS));
        }
    }

    #[test]
    fn spinning_that_never_catches_anything_stops_for_longer_each_time() {
        let mut worker = Worker::dense();
        let mut pauses = Vec::new();
        while pauses.len() < 10 {
            // The DPU runs as soon as this worker sleeps, and is quick then.
            let spun = worker.window();
            if spun.is_zero() {
                let begun = worker.now;
                while worker.window().is_zero() {
                    worker.request_after(20 * US);
                }
                pauses.push((worker.now - begun).as_millis() as u64);
            } else {
                worker.request_after((spun + 5 * US).min(DEFAULT_MAX + US));
            }
        }
        assert_eq!(pauses[..3], [10, 20, 40]);
        assert_eq!(pauses[9], 1000);
    }

    #[test]
    fn a_catch_makes_the_next_pause_short_again() {
        let mut worker = Worker::dense();
        let futile = |worker: &mut Worker| {
            while !worker.window().is_zero() {
                let spun = worker.window();
                worker.request_after((spun + 5 * US).min(DEFAULT_MAX + US));
            }
            worker.poll.pause
        };
        assert_eq!(futile(&mut worker), FIRST_PAUSE);
        worker.now += FIRST_PAUSE;
        worker.request_after(US);
        assert_eq!(futile(&mut worker), FIRST_PAUSE);
    }

    #[test]
    fn contention_shrinks_the_window_until_it_is_over() {
        let mut worker = Worker::dense();
        assert!(worker.poll.wants_sample(worker.now));
        worker.poll.sample(worker.now, Duration::from_secs(9));
        assert_eq!(worker.window(), DEFAULT_MAX, "the first sample only sets the mark");
        worker.now += 20 * MS;
        worker.poll.sample(worker.now, 10 * MS);
        assert_eq!(worker.window(), DEFAULT_MAX / 4);
        worker.request_after(2 * US);
        assert_eq!(worker.window(), DEFAULT_MAX / 4);
        worker.now += 20 * MS;
        worker.poll.sample(worker.now, MS);
        assert_eq!(worker.window(), DEFAULT_MAX, "nobody else wants the processor any more");
    }

    #[test]
    fn samples_are_rare_and_only_taken_while_spinning() {
        let mut poll = Worker::dense().poll;
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
            let mut worker = Worker::new(DEFAULT_MAX, 4);
            for idle in idles {
                worker.request_after(Duration::from_nanos(idle));
                prop_assert!(worker.window() <= DEFAULT_MAX);
                prop_assert!(worker.window().is_zero() || worker.window() >= DEFAULT_MAX / 8);
            }
        }

        #[test]
        fn quiet_load_spins_below_two_windows_in_total(dense in 0u64..8, gap in 51u32..100_000) {
            let mut worker = Worker::new(DEFAULT_MAX, 4);
            (0..dense).for_each(|_| worker.request_after(US));
            worker.spun = Duration::ZERO;
            (0..100).for_each(|_| worker.request_after(gap * US));
            prop_assert!(worker.spun <= 2 * DEFAULT_MAX);
        }
    }
}
