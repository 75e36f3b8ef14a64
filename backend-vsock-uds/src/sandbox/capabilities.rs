//! Capabilities: what the daemon keeps is what reaching host programs needs.
#![forbid(unsafe_code)]

use caps::{CapSet, Capability, CapsHashSet, errors::CapsError};

use super::Error;

/// Kept, as far as the daemon has it: a daemon of root reaches the sockets of host programs that run as
/// other users, as it would without a sandbox. What else it allows, opening files, the other
/// stages take away.
const KEPT: Capability = Capability::CAP_DAC_OVERRIDE;

/// Reduces this thread, and those that it starts, to [`KEPT`], and rules out that `exec` gives anything
/// back.
///
/// # Errors
/// [`Error::Capabilities`] when a step fails.
pub fn reduce() -> Result<(), Error> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed("reading the permitted set"))?;
    let left: CapsHashSet = permitted.intersection(&[KEPT].into()).copied().collect();
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
    rustix::thread::set_no_new_privs(true)
        .map_err(|errno| Error::Capabilities { step: "forbidding new privileges", reason: errno.to_string() })
}

fn failed(step: &'static str) -> impl FnOnce(CapsError) -> Error {
    move |error| Error::Capabilities { step, reason: error.to_string() }
}
