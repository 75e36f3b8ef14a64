//! Stage 6: Landlock, for the modes that leave paths outside the export reachable. See the table in
//! [`super`] for when it is used and why it is not used otherwise.
#![forbid(unsafe_code)]

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus,
};

use super::Error;
use super::mounts::View;
use super::options::SandboxMode;

/// What a server may do beneath the export. Executing is not among it, and neither is the ioctl of
/// device nodes: both are refused everywhere.
const FROM_KERNEL: ABI = ABI::V5;

/// Whether the stage applies.
pub fn applies(mode: SandboxMode, file_handles: bool) -> bool {
    mode != SandboxMode::Namespace && !file_handles
}

/// Restricts this thread, and all that it starts, to the export and the list of its own descriptors.
/// Returns whether the kernel enforces it.
///
/// Renaming and linking across directories needs Landlock ABI 2 (Linux 5.19): older ones forbid it
/// altogether, which would break the export, so there nothing is restricted.
///
/// # Errors
/// [`Error::Landlock`] when the kernel has it and refuses the rules.
pub fn restrict(view: &View, export: &Path) -> Result<bool, Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Landlock {
        export: export.to_owned(),
        reason: error.to_string(),
    };
    let all = AccessFs::from_all(FROM_KERNEL);
    let beneath = all & !AccessFs::Execute & !AccessFs::IoctlDev;
    // `Refer` is a hard requirement: on ABI 1 the builder reports an error instead of going without.
    let ruleset = match Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)
        .map(|ruleset| ruleset.set_compatibility(CompatLevel::BestEffort))
    {
        Ok(ruleset) => ruleset.handle_access(all).map_err(|error| failed(&error))?,
        Err(error) => {
            tracing::debug!("Landlock is not used: {error}");
            return Ok(false);
        }
    };
    let status = ruleset
        .create()
        .map_err(|error| failed(&error))?
        .add_rule(PathBeneath::new(&view.root, beneath))
        .map_err(|error| failed(&error))?
        // Reading the list of descriptors; opening through one is checked where it leads to.
        .add_rule(PathBeneath::new(&view.proc_self_fd, AccessFs::ReadDir))
        .map_err(|error| failed(&error))?
        .restrict_self()
        .map_err(|error| failed(&error))?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
