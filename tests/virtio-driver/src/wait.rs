//! Waiting for a condition with a deadline: the only place that sleeps.

use std::time::{Duration, Instant};

use crate::{Error, Result};

/// How long one look at a condition and the next are apart.
const PAUSE: Duration = Duration::from_millis(2);

/// Calls `look` until it yields a value, at most for `limit`. `what` names the condition in the error.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    try_wait_for(what, limit, || Ok(look()))
}

/// Like [`wait_for`] for a look that can fail, which ends the wait.
pub fn try_wait_for<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = look()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            return Err(Error::Timeout { what: what.to_owned(), waited: limit });
        }
        // wait-loop: `look` yields a value.
        std::thread::sleep(PAUSE);
    }
}
