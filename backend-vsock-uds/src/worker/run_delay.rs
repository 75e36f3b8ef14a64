//! How long this thread was ready to run and did not, so that its spinning takes no time from others.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use vring::poll::parse_run_delay;

/// The kernel says it in `/proc/thread-self/schedstat`; where there is no `/proc`, gaps that were seen
/// while spinning are counted instead. To be made on the thread that is meant.
#[derive(Debug)]
pub struct RunDelay {
    schedstat: Option<File>,
    last: Duration,
    gaps: Duration,
}

impl RunDelay {
    /// Opens the kernel's account if it is wanted.
    pub fn new(wanted: bool) -> RunDelay {
        let schedstat = if wanted { File::open("/proc/thread-self/schedstat").ok() } else { None };
        RunDelay { schedstat, last: Duration::ZERO, gaps: Duration::ZERO }
    }

    /// Somebody else ran here for that long.
    pub fn count_gap(&mut self, gap: Duration) {
        self.gaps += gap;
    }

    /// Delay since the last call.
    pub fn since_last(&mut self) -> Duration {
        let gaps = std::mem::take(&mut self.gaps);
        let mut text = [0; 96];
        let total = self
            .schedstat
            .as_ref()
            .and_then(|file| file.read_at(&mut text, 0).ok())
            .and_then(|len| parse_run_delay(&text[..len]));
        match total {
            Some(total) => total.saturating_sub(std::mem::replace(&mut self.last, total)),
            None => gaps,
        }
    }
}
