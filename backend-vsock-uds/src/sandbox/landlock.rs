//! Landlock: no file of the host can be opened, made or changed.
//!
//! Connecting to a Unix socket is not a file access in Landlock's sense, and neither is an `O_PATH`
//! descriptor, so what the daemon is for goes on. Two things are left: removing the daemon's own sockets
//! at the end (in their directories), and reading its own entry in `/proc` (how long a worker waited for a
//! processor).
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus,
};
use rustix::fs::{Mode, OFlags};

use super::Error;

/// Restricts this thread, and all that it starts. `directories` are those of the daemon's own sockets.
/// Returns whether the kernel enforces it.
///
/// # Errors
/// [`Error::Landlock`] when the kernel has Landlock and refuses the rules.
pub fn restrict<'a>(directories: impl IntoIterator<Item = &'a OwnedFd>) -> Result<bool, Error> {
    let failed = |error: &dyn std::fmt::Display| Error::Landlock(error.to_string());
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V5))
        .map_err(|error| failed(&error))?
        .create()
        .map_err(|error| failed(&error))?;
    for directory in directories {
        rules = rules
            .add_rule(PathBeneath::new(directory, AccessFs::RemoveFile))
            .map_err(|error| failed(&error))?;
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    if let Ok(own) = rustix::fs::open("/proc/self", flags, Mode::empty()) {
        rules = rules.add_rule(PathBeneath::new(own, AccessFs::ReadFile)).map_err(|error| failed(&error))?;
    }
    let status = rules.restrict_self().map_err(|error| failed(&error))?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
