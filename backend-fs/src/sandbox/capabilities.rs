//! Stage 5: capabilities. What the server keeps is what serving a file system as many users needs.
#![forbid(unsafe_code)]

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};

use super::Error;
use super::options::CapChanges;

/// Kept by default, each with its reason.
pub const DEFAULT: [(Capability, &str); 8] = [
    (Capability::CAP_CHOWN, "SETATTR of owner and group; new inodes for other users"),
    (Capability::CAP_DAC_OVERRIDE, "requests of the DPU's root; reopening what the caller had opened"),
    (Capability::CAP_FOWNER, "chmod, utimens and sticky directories for the DPU's root"),
    (Capability::CAP_FSETID, "set-id bits survive a chmod by the DPU's root"),
    (Capability::CAP_SETGID, "requests run with the caller's group"),
    (Capability::CAP_SETUID, "requests run as the caller"),
    (Capability::CAP_MKNOD, "MKNOD of device nodes and overlayfs whiteouts"),
    (Capability::CAP_SETFCAP, "file capabilities (security.capability)"),
];

/// The set the server keeps: [`DEFAULT`], `DAC_READ_SEARCH` when inodes may be kept as file handles
/// (`open_by_handle_at` asks for it), changed by `--modcaps`.
pub fn kept(changes: &CapChanges, file_handles: bool) -> CapsHashSet {
    let mut set: CapsHashSet = DEFAULT.iter().map(|(capability, _)| *capability).collect();
    if file_handles {
        set.insert(Capability::CAP_DAC_READ_SEARCH);
    }
    set.extend(&changes.add);
    set.retain(|capability| !changes.drop.contains(capability));
    set
}

/// Reduces this process to `keep`, as far as it has them: permitted and effective sets become the
/// intersection, the inheritable, ambient and bounding sets become empty, and new privileges cannot be
/// gained by `exec`. Returns what is left.
///
/// `insist` are the capabilities that must be there.
///
/// # Errors
/// [`Error::CapabilityMissing`] for one of `insist`, [`Error::Capabilities`] when a step fails.
pub fn reduce(keep: &CapsHashSet, insist: &CapsHashSet) -> Result<CapsHashSet, Error> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed("reading the permitted set"))?;
    if let Some(missing) = insist.iter().find(|capability| !permitted.contains(capability)) {
        return Err(Error::CapabilityMissing(missing.to_string()));
    }
    let left: CapsHashSet = permitted.intersection(keep).copied().collect();
    // The bounding set first: dropping from it needs SETPCAP. Without it the set cannot be changed,
    // and nothing can be gained from it either: no_new_privs is set and exec is not on the allow list.
    if permitted.contains(&Capability::CAP_SETPCAP) {
        // Only what this kernel knows: asking for a newer one is an error.
        for capability in caps::runtime::thread_all_supported() {
            caps::drop(None, CapSet::Bounding, capability).map_err(failed("emptying the bounding set"))?;
        }
    }
    caps::clear(None, CapSet::Ambient).map_err(failed("emptying the ambient set"))?;
    caps::clear(None, CapSet::Inheritable).map_err(failed("emptying the inheritable set"))?;
    // Effective before permitted: it may never exceed it.
    caps::set(None, CapSet::Effective, &left).map_err(failed("setting the effective set"))?;
    caps::set(None, CapSet::Permitted, &left).map_err(failed("setting the permitted set"))?;
    rustix::thread::set_no_new_privs(true).map_err(|errno| Error::Capabilities {
        step: "forbidding new privileges",
        reason: errno.to_string(),
    })?;
    Ok(left)
}

/// Whether this process may use `open_by_handle_at`.
pub fn can_use_file_handles() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_DAC_READ_SEARCH).unwrap_or(false)
}

fn failed(step: &'static str) -> impl FnOnce(CapsError) -> Error {
    move |error| Error::Capabilities { step, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(set: &CapsHashSet) -> Vec<String> {
        let mut names: Vec<_> = set.iter().map(ToString::to_string).collect();
        names.sort();
        names
    }

    #[test]
    fn file_handles_add_dac_read_search() {
        let none = CapChanges::default();
        assert_eq!(
            names(&kept(&none, false)),
            [
                "CAP_CHOWN",
                "CAP_DAC_OVERRIDE",
                "CAP_FOWNER",
                "CAP_FSETID",
                "CAP_MKNOD",
                "CAP_SETFCAP",
                "CAP_SETGID",
                "CAP_SETUID"
            ]
        );
        assert!(kept(&none, true).contains(&Capability::CAP_DAC_READ_SEARCH));
    }

    #[test]
    fn modcaps_have_the_last_word() {
        let changes = CapChanges {
            add: [Capability::CAP_SYS_ADMIN].into(),
            drop: [Capability::CAP_MKNOD, Capability::CAP_DAC_READ_SEARCH].into(),
        };
        let kept = kept(&changes, true);
        assert!(kept.contains(&Capability::CAP_SYS_ADMIN));
        assert!(!kept.contains(&Capability::CAP_MKNOD));
        assert!(!kept.contains(&Capability::CAP_DAC_READ_SEARCH));
    }
}
