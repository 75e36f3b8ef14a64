//! What each daemon is known not to do. Such a case runs nevertheless: the run fails when the difference is gone, so
//! that this table stays true.

#![forbid(unsafe_code)]

use crate::daemon::Flavor;

/// What virtiofsd 1.14 does not do: case and reason.
const VIRTIOFSD: &[(&str, &str)] = &[
    ("flock", "locks stay in the DPU"),
    ("posix-locks", "locks stay in the DPU"),
    ("lock-wait", "locks stay in the DPU"),
    ("lock-flood", "locks stay in the DPU"),
    ("two-dpus-locks", "locks stay in the DPU"),
    ("tmpfile", "TMPFILE is not implemented"),
    ("multi-queue", "one request queue only"),
    ("multi-queue-load", "one request queue only"),
    ("writeback", "a file created for writing only cannot be filled in parts of a page"),
    ("power-cut", "--keep-listening does not exist"),
];

/// Why a daemon is known to fail a case; `None` if it must pass.
#[must_use]
pub fn known_difference(flavor: Flavor, case: &str) -> Option<&'static str> {
    let table = match flavor {
        Flavor::Virtiofsd => VIRTIOFSD,
        Flavor::BackendFs => &[],
    };
    table.iter().find(|(name, _)| *name == case).map(|(_, reason)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_difference_names_a_case() {
        let cases = crate::cases::all();
        for (name, _) in VIRTIOFSD {
            assert!(cases.iter().any(|case| case.name == *name), "{name} is no case");
        }
    }

    #[test]
    fn our_own_daemon_has_no_excuse() {
        assert!(
            crate::cases::all().iter().all(|case| known_difference(Flavor::BackendFs, case.name).is_none())
        );
    }
}
