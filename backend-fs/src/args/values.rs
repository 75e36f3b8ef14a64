//! The words that options with a fixed set of values take, and small number formats.
#![forbid(unsafe_code)]

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::host::options::{CachePolicy, FileHandles, Offer};
use crate::logging::LogLevel;
use crate::sandbox::options::{SandboxMode, SeccompMode};

/// How live migration would hand inodes over (`--migration-mode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MigrationMode {
    /// By path.
    FindPaths,
    /// By file handle.
    FileHandles,
}

/// What live migration would do about inodes it cannot hand over (`--migration-on-error`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum MigrationOnError {
    /// Stop the migration.
    Abort,
    /// Go on; such inodes give errors.
    GuestError,
}

/// What `--generate` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Generate {
    /// The man page, section 1, in roff.
    Man,
    /// Completions for bash.
    Bash,
    /// Completions for zsh.
    Zsh,
    /// Completions for fish.
    Fish,
}

impl ValueEnum for CachePolicy {
    fn value_variants<'a>() -> &'a [Self] {
        &[CachePolicy::Auto, CachePolicy::Always, CachePolicy::Metadata, CachePolicy::Never]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self {
            CachePolicy::Auto => ("auto", "Names and attributes for a second, data while it is unchanged"),
            CachePolicy::Always => ("always", "Everything for a day: only when nothing else writes there"),
            CachePolicy::Metadata => ("metadata", "Names and attributes for a day, no data"),
            CachePolicy::Never => ("never", "Nothing"),
        };
        Some(PossibleValue::new(name).help(help))
    }
}

impl ValueEnum for FileHandles {
    fn value_variants<'a>() -> &'a [Self] {
        &[FileHandles::Never, FileHandles::Prefer, FileHandles::Mandatory]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            FileHandles::Never => PossibleValue::new("never").help("One open descriptor per known inode"),
            FileHandles::Prefer => PossibleValue::new("prefer")
                .help("Handles where the file system and the capabilities allow them")
                .alias("fallback"),
            FileHandles::Mandatory => PossibleValue::new("mandatory").help("Do not start without handles"),
        })
    }
}

impl ValueEnum for Offer {
    fn value_variants<'a>() -> &'a [Self] {
        &[Offer::Never, Offer::Auto, Offer::Always]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self {
            Offer::Never => ("never", "Not offered"),
            Offer::Auto => ("auto", "Used when the DPU supports it"),
            Offer::Always => ("always", "A DPU that does not support it is refused"),
        };
        Some(PossibleValue::new(name).help(help))
    }
}

impl ValueEnum for SandboxMode {
    fn value_variants<'a>() -> &'a [Self] {
        &[SandboxMode::Namespace, SandboxMode::Chroot, SandboxMode::None]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self {
            SandboxMode::Namespace => {
                ("namespace", "Own mount, pid and network namespaces, root in the export")
            }
            SandboxMode::Chroot => ("chroot", "Root in the export; for containers. Needs root"),
            SandboxMode::None => ("none", "The whole host stays visible to the daemon; not recommended"),
        };
        Some(PossibleValue::new(name).help(help))
    }
}

impl ValueEnum for SeccompMode {
    fn value_variants<'a>() -> &'a [Self] {
        &[SeccompMode::None, SeccompMode::Kill, SeccompMode::Log, SeccompMode::Trap]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self {
            SeccompMode::None => ("none", "No filter"),
            SeccompMode::Kill => ("kill", "The daemon ends"),
            SeccompMode::Log => ("log", "The call is made, the kernel logs it"),
            SeccompMode::Trap => ("trap", "The daemon gets SIGSYS"),
        };
        Some(PossibleValue::new(name).help(help))
    }
}

impl ValueEnum for LogLevel {
    fn value_variants<'a>() -> &'a [Self] {
        use LogLevel::{Debug, Error, Info, Off, Trace, Warn};
        &[Off, Error, Warn, Info, Debug, Trace]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// Permission bits, in octal.
pub fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 && !text.starts_with('+') => Ok(mode),
        _ => Err("expected permission bits in octal, such as 0660".into()),
    }
}

/// A budget: at least one of whatever it counts.
pub fn budget(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("a budget of 0 would refuse everything; give at least 1".into()),
        Ok(budget) => Ok(budget),
        Err(_) => Err("expected a whole number".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_permission_bits() {
        assert_eq!((mode("0660"), mode("700"), mode("0")), (Ok(0o660), Ok(0o700), Ok(0)));
        for wrong in ["", "888", "1777", "-1", "+77", "rw", "0x1ff"] {
            assert!(mode(wrong).is_err(), "{wrong}");
        }
    }
}
