//! The limit of open files (`--rlimit-nofile`) and what of it the DPU may use.
//!
//! The numbers are virtiofsd's, so that a limit that was right for it is right here: by default the
//! limit becomes min(1000000, `/proc/sys/fs/nr_open`), or the hard limit when that is not permitted.
//! A part is kept back for the daemon itself; the rest is the DPU's budget, so that a DPU that opens
//! files without end gets `ENFILE` and the daemon never does.
#![forbid(unsafe_code)]

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Limit aimed at when none is given.
pub const DEFAULT_NOFILE: u64 = 1_000_000;

/// Descriptors kept back for memory regions: one per slot that the vhost-user protocol lets a front
/// end add (`VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`; QEMU uses up to 509).
const MEMORY_SLOTS: u64 = 509;

/// Descriptors kept back for everything else: rings, sockets, the sandbox's own.
const INTERNAL: u64 = 100;

/// Descriptors below which a budget is of little practical use; virtiofsd warns below it, too.
pub const SMALL_BUDGET: u64 = 128;

/// Why the limit could not be set.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Above what the kernel allows at all.
    #[error("--rlimit-nofile {wanted}: the kernel allows at most {nr_open}; raise fs.nr_open or give less")]
    AboveNrOpen {
        /// The limit asked for.
        wanted: u64,
        /// `/proc/sys/fs/nr_open`.
        nr_open: u64,
    },
    /// `setrlimit(2)` refused it.
    #[error(
        "--rlimit-nofile {wanted}: {errno} (the hard limit is {hard}); give less, or raise the hard \
         limit of the service that starts the daemon"
    )]
    Refused {
        /// The limit asked for.
        wanted: u64,
        /// The hard limit.
        hard: u64,
        /// The kernel's answer.
        errno: Errno,
    },
    /// Nothing is left for the DPU.
    #[error(
        "the limit of open files is {limit}, and the daemon itself needs {reserve}; allow at least {least} \
         with --rlimit-nofile or in the service that starts the daemon",
        least = reserve + SMALL_BUDGET
    )]
    TooSmall {
        /// The limit in force.
        limit: u64,
        /// What the daemon keeps for itself.
        reserve: u64,
    },
}

/// The limit as it is now. "Unlimited" is `u64::MAX`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Current {
    /// Soft limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
    /// `/proc/sys/fs/nr_open`.
    pub nr_open: u64,
}

/// What to do about the limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Leave it at this soft limit.
    Keep(u64),
    /// Exactly this, or fail.
    Exactly(u64),
    /// This, or else the hard limit.
    AtBest(u64),
}

/// Decides what to do. `request` is the option's value; 0 leaves the limit alone.
pub fn plan(request: Option<u64>, current: Current) -> Result<Plan, Error> {
    match request {
        Some(0) => Ok(Plan::Keep(current.soft)),
        Some(wanted) if wanted > current.nr_open => {
            Err(Error::AboveNrOpen { wanted, nr_open: current.nr_open })
        }
        Some(wanted) => Ok(Plan::Exactly(wanted)),
        None if current.soft >= DEFAULT_NOFILE => Ok(Plan::Keep(current.soft)),
        None => Ok(Plan::AtBest(DEFAULT_NOFILE.min(current.nr_open))),
    }
}

/// Descriptors that are not the DPU's: the daemon's own, and one for each thread that opens a file
/// before it is counted.
pub fn reserve(request_queues: u16, pool_size: usize) -> u64 {
    MEMORY_SLOTS + INTERNAL + u64::from(request_queues) + pool_size as u64
}

/// The DPU's share of a limit: what it may hold open for inodes and files together.
pub fn budget(limit: u64, reserve: u64) -> Result<usize, Error> {
    match limit.checked_sub(reserve) {
        Some(rest) if rest > 0 => Ok(usize::try_from(rest).unwrap_or(usize::MAX)),
        _ => Err(Error::TooSmall { limit, reserve }),
    }
}

/// Reads the limit in force.
pub fn current() -> Current {
    let limit = getrlimit(Resource::Nofile);
    Current {
        soft: limit.current.unwrap_or(u64::MAX),
        hard: limit.maximum.unwrap_or(u64::MAX),
        // Without /proc the kernel's own check decides.
        nr_open: std::fs::read_to_string("/proc/sys/fs/nr_open")
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(u64::MAX),
    }
}

/// Sets the limit and returns the one in force. Must run before the sandbox takes `/proc` and the
/// capabilities away.
pub fn apply(request: Option<u64>) -> Result<u64, Error> {
    let current = current();
    match plan(request, current)? {
        Plan::Keep(soft) => Ok(soft),
        Plan::Exactly(wanted) => match set(wanted, wanted) {
            Ok(()) => Ok(wanted),
            Err(errno) => Err(Error::Refused { wanted, hard: current.hard, errno }),
        },
        Plan::AtBest(wanted) => {
            if set(wanted, wanted).is_ok() {
                return Ok(wanted);
            }
            match set(current.hard, current.hard) {
                Ok(()) => {
                    tracing::debug!(
                        "limit of open files: {} (the hard limit; {wanted} is not permitted)",
                        current.hard
                    );
                    Ok(current.hard)
                }
                Err(_) => Ok(current.soft),
            }
        }
    }
}

fn set(soft: u64, hard: u64) -> Result<(), Errno> {
    setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum: Some(hard) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CURRENT: Current = Current { soft: 1024, hard: 20_000, nr_open: 1_048_576 };

    #[test]
    fn the_default_aims_at_a_million_or_what_the_kernel_allows() {
        assert_eq!(plan(None, CURRENT), Ok(Plan::AtBest(1_000_000)));
        assert_eq!(plan(None, Current { nr_open: 5000, ..CURRENT }), Ok(Plan::AtBest(5000)));
    }

    #[test]
    fn a_soft_limit_that_is_already_higher_stays() {
        assert_eq!(plan(None, Current { soft: 1_000_001, ..CURRENT }), Ok(Plan::Keep(1_000_001)));
    }

    #[test]
    fn zero_leaves_the_limit_and_a_number_is_meant_exactly() {
        assert_eq!(plan(Some(0), CURRENT), Ok(Plan::Keep(1024)));
        assert_eq!(plan(Some(1_048_576), CURRENT), Ok(Plan::Exactly(1_048_576)));
        let above = Error::AboveNrOpen { wanted: 1_048_577, nr_open: 1_048_576 };
        assert_eq!(plan(Some(1_048_577), CURRENT), Err(above));
    }

    #[test]
    fn the_budget_is_what_the_reserve_leaves() {
        let reserve = reserve(16, 0);
        assert_eq!(reserve, 625);
        assert_eq!(budget(1024, reserve), Ok(399));
        assert_eq!(budget(625, reserve), Err(Error::TooSmall { limit: 625, reserve }));
        assert_eq!(budget(0, reserve), Err(Error::TooSmall { limit: 0, reserve }));
        assert_eq!(
            Error::TooSmall { limit: 256, reserve }.to_string(),
            "the limit of open files is 256, and the daemon itself needs 625; allow at least 753 \
             with --rlimit-nofile or in the service that starts the daemon"
        );
    }
}
