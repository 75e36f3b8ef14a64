//! What the limit of open files leaves for the DPU.
//!
//! A part of the limit (`--rlimit-nofile`) is kept back for the daemon itself; the rest is the DPU's
//! budget, so that a DPU that opens files without end gets `ENFILE` and the daemon never does. The
//! numbers are virtiofsd's, so that a limit that was right for it is right here.
#![forbid(unsafe_code)]

/// Descriptors kept back for memory regions: one per slot that the vhost-user protocol lets a front
/// end add (`VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS`; QEMU uses up to 509).
const MEMORY_SLOTS: u64 = 509;

/// Descriptors kept back for everything else: rings, sockets, the sandbox's own.
const INTERNAL: u64 = 100;

/// Descriptors below which a budget is of little practical use; virtiofsd warns below it, too.
pub const SMALL_BUDGET: usize = 128;

/// Nothing is left for the DPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the limit of open files is {limit}, and the daemon itself needs {reserve}; allow at least {least} \
     with --rlimit-nofile or in the service that starts the daemon",
    least = reserve + SMALL_BUDGET as u64
)]
pub struct TooSmall {
    /// The limit in force.
    pub limit: u64,
    /// What the daemon keeps for itself.
    pub reserve: u64,
}

/// Descriptors that are not the DPU's: the daemon's own, and one for each thread that opens a file
/// before it is counted.
pub fn reserve(request_queues: u16, pool_size: usize) -> u64 {
    MEMORY_SLOTS + INTERNAL + u64::from(request_queues) + pool_size as u64
}

/// The DPU's share of a limit: what it may hold open for inodes and files together.
pub fn budget(limit: u64, reserve: u64) -> Result<usize, TooSmall> {
    match limit.checked_sub(reserve) {
        Some(rest) if rest > 0 => Ok(usize::try_from(rest).unwrap_or(usize::MAX)),
        _ => Err(TooSmall { limit, reserve }),
    }
}

/// The largest limit of open files that the kernel sets at all (`fs.nr_open`), if it can be read.
pub fn nr_open() -> Option<u64> {
    std::fs::read_to_string("/proc/sys/fs/nr_open").ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_what_the_reserve_leaves() {
        let reserve = reserve(16, 0);
        assert_eq!(reserve, 625);
        assert_eq!(budget(1024, reserve), Ok(399));
        assert_eq!(budget(626, reserve), Ok(1));
        assert_eq!(budget(625, reserve), Err(TooSmall { limit: 625, reserve }));
        assert_eq!(budget(0, reserve), Err(TooSmall { limit: 0, reserve }));
    }

    #[test]
    fn the_refusal_says_how_much_to_allow() {
        assert_eq!(
            TooSmall { limit: 256, reserve: 625 }.to_string(),
            "the limit of open files is 256, and the daemon itself needs 625; allow at least 753 \
             with --rlimit-nofile or in the service that starts the daemon"
        );
    }
}
