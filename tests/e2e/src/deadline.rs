//! Waiting for a condition with a deadline: the one place of this crate that sleeps.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Looks at `condition` until it yields a value; fails with `what` when `limit` has passed.
///
/// # Errors
/// When the time is over, or with the error that `condition` itself returns.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            bail!("waited {:.1} s in vain: {what}", limit.as_secs_f64());
        }
        // wait-loop: the caller's condition, until `limit`.
        std::thread::sleep(POLL_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn returns_the_value_as_soon_as_the_condition_has_one() {
        let mut left = 3;
        let value = wait_for("a countdown", Duration::from_secs(5), || {
            left -= 1;
            Ok((left == 0).then_some("done"))
        });
        assert_eq!(value.unwrap(), "done");
    }

    #[test]
    fn names_what_did_not_happen() {
        let result = wait_for::<()>("the sea to part", Duration::from_millis(15), || Ok(None));
        assert!(result.unwrap_err().to_string().contains("the sea to part"));
    }
}
