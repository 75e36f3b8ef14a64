//! The limit of open files (`--rlimit-nofile`), raised while the daemon may still do so.
#![forbid(unsafe_code)]

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::Error;
use crate::limits::nr_open;

/// Limit that is tried for without `--rlimit-nofile`, as virtiofsd does.
const DEFAULT: u64 = 1_000_000;

/// Raises `RLIMIT_NOFILE` (soft and hard) and returns the soft limit in force.
///
/// `None`: [`DEFAULT`] or `fs.nr_open`, whichever is less; where the hard limit is lower and may not
/// be raised, the hard limit. `Some(0)`: as it is. A limit that is asked for is an error if it cannot be had.
///
/// # Errors
/// [`Error::OpenFiles`].
pub fn raise(wanted: Option<u64>) -> Result<u64, Error> {
    let now = getrlimit(Resource::Nofile);
    let soft = now.current.unwrap_or(u64::MAX);
    let hard = now.maximum.unwrap_or(u64::MAX);
    // Without /proc the kernel's own check decides.
    match plan(wanted, soft, nr_open().unwrap_or(u64::MAX)) {
        Plan::Keep => Ok(soft),
        Plan::Exactly(limit) => match set(limit) {
            Ok(()) => Ok(limit),
            Err(error) => Err(Error::OpenFiles { wanted: limit, error, hard }),
        },
        Plan::UpTo(limit) if set(limit).is_ok() => Ok(limit),
        Plan::UpTo(limit) => {
            tracing::debug!("open files are limited to {hard} by the hard limit; {limit} were wanted");
            Ok(if set(hard).is_ok() { hard } else { soft })
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Keep,
    Exactly(u64),
    UpTo(u64),
}

fn plan(wanted: Option<u64>, soft: u64, nr_open: u64) -> Plan {
    match wanted {
        Some(0) => Plan::Keep,
        Some(limit) => Plan::Exactly(limit),
        None if soft >= DEFAULT => Plan::Keep,
        None => Plan::UpTo(DEFAULT.min(nr_open)),
    }
}

fn set(limit: u64) -> std::io::Result<()> {
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(limit) })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_aims_at_a_million_or_what_the_kernel_allows() {
        assert_eq!(plan(None, 1024, 1 << 20), Plan::UpTo(1_000_000));
        assert_eq!(plan(None, 1024, 65536), Plan::UpTo(65536));
    }

    #[test]
    fn a_soft_limit_that_is_already_higher_stays() {
        assert_eq!(plan(None, 1_000_000, 1 << 20), Plan::Keep);
    }

    #[test]
    fn zero_leaves_the_limit_and_a_number_is_meant_exactly() {
        assert_eq!(plan(Some(0), 1024, 1 << 20), Plan::Keep);
        assert_eq!(plan(Some(77), 1024, 1 << 20), Plan::Exactly(77));
    }
}
