//! What the command line decides about isolation: plain data and the parsers of its two small
//! languages, `--modcaps=+a:-b` and `--uid-map=:inside:outside:count:`.
#![forbid(unsafe_code)]

use std::str::FromStr;

use caps::{Capability, CapsHashSet};

/// How the process is cut off from the rest of the host's file system (`--sandbox`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SandboxMode {
    /// New mount, pid and network namespaces with the export as root (`pivot_root`); a user
    /// namespace besides when the daemon does not run as root.
    #[default]
    Namespace,
    /// `chroot` into the export; for containers that already made the namespaces. Needs root.
    Chroot,
    /// No change of root.
    None,
}

/// What happens on a system call that is not on the allow list (`--seccomp`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SeccompMode {
    /// No filter.
    None,
    /// The process ends (`SECCOMP_RET_KILL_PROCESS`).
    #[default]
    Kill,
    /// The call is made and the kernel logs it (`SECCOMP_RET_LOG`).
    Log,
    /// `SIGSYS` (`SECCOMP_RET_TRAP`).
    Trap,
}

/// Changes to the default set of kept capabilities (`--modcaps`). The two sets never overlap: the
/// last word about a capability counts.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct CapChanges {
    /// Kept in addition.
    pub add: CapsHashSet,
    /// Dropped although kept by default.
    pub drop: CapsHashSet,
}

/// Why a `--modcaps` value was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CapChangesError {
    /// An empty item, as in `+chown::-mknod`.
    #[error("empty item; write +NAME or -NAME, separated by ':'")]
    Empty,
    /// Neither `+` nor `-` in front.
    #[error("'{0}' starts with neither '+' (keep) nor '-' (drop)")]
    NoSign(String),
    /// Not a capability.
    #[error("'{0}' is not a capability; see capabilities(7) for the names")]
    Unknown(String),
}

impl FromStr for CapChanges {
    type Err = CapChangesError;

    /// Names are those of `capabilities(7)` in any case, with or without `CAP_`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut changes = CapChanges::default();
        for item in text.split(':') {
            let mut chars = item.chars();
            let sign = chars.next().ok_or(CapChangesError::Empty)?;
            if !matches!(sign, '+' | '-') {
                return Err(CapChangesError::NoSign(item.to_owned()));
            }
            let name = chars.as_str();
            let capability = capability(name).ok_or_else(|| CapChangesError::Unknown(name.to_owned()))?;
            let (to, from) = match sign {
                '+' => (&mut changes.add, &mut changes.drop),
                _ => (&mut changes.drop, &mut changes.add),
            };
            to.insert(capability);
            from.remove(&capability);
        }
        Ok(changes)
    }
}

fn capability(name: &str) -> Option<Capability> {
    let name = name.to_ascii_uppercase();
    let name = if name.starts_with("CAP_") { name } else { format!("CAP_{name}") };
    name.parse().ok()
}

/// One line of a user namespace's id map (`--uid-map`, `--gid-map`; `user_namespaces(7)`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NamespaceMap {
    /// First id inside the namespace.
    pub inside: u32,
    /// First id outside of it.
    pub outside: u32,
    /// Number of ids; never 0.
    pub count: u32,
}

/// Why a `--uid-map` or `--gid-map` value was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NamespaceMapError {
    /// Not of the form at all.
    #[error("expected ':inside:outside:count:' with one separator character throughout")]
    Form,
    /// A field is not a 32-bit number.
    #[error("'{0}' is not a number from 0 to 4294967295")]
    Number(String),
    /// The kernel refuses empty ranges.
    #[error("the count is 0; a range needs at least one id")]
    Empty,
    /// One of the ranges does not fit into 32 bits.
    #[error("a range of {count} ids from {base} does not end before 4294967295")]
    Overflow {
        /// First id.
        base: u32,
        /// Number of ids.
        count: u32,
    },
}

impl FromStr for NamespaceMap {
    type Err = NamespaceMapError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let separator =
            text.chars().next().filter(|c| !c.is_alphanumeric()).ok_or(NamespaceMapError::Form)?;
        let fields: Vec<&str> = text
            .strip_prefix(separator)
            .and_then(|rest| rest.strip_suffix(separator))
            .ok_or(NamespaceMapError::Form)?
            .split(separator)
            .collect();
        let [inside, outside, count] = fields[..] else { return Err(NamespaceMapError::Form) };
        let number = |field: &str| field.parse().map_err(|_| NamespaceMapError::Number(field.to_owned()));
        let map = NamespaceMap { inside: number(inside)?, outside: number(outside)?, count: number(count)? };
        if map.count == 0 {
            return Err(NamespaceMapError::Empty);
        }
        match [map.inside, map.outside].into_iter().find(|base| base.checked_add(map.count).is_none()) {
            Some(base) => Err(NamespaceMapError::Overflow { base, count: map.count }),
            None => Ok(map),
        }
    }
}

/// Options of the isolation.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct SandboxOptions {
    /// Change of root.
    pub mode: SandboxMode,
    /// System call filter.
    pub seccomp: SeccompMode,
    /// Capabilities, relative to the default set.
    pub modcaps: CapChanges,
    /// User ids of the namespace; empty: the daemon's own id, 1:1. Only ever filled for an
    /// unprivileged daemon with [`SandboxMode::Namespace`].
    pub uid_map: Vec<NamespaceMap>,
    /// Group ids, as `uid_map`.
    pub gid_map: Vec<NamespaceMap>,
    /// `RLIMIT_NOFILE`, soft and hard: `None` for the default, `Some(0)` to leave it as it is. See
    /// [`crate::limits`].
    pub rlimit_nofile: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modcaps_keep_the_last_word_about_a_capability() {
        let changes: CapChanges = "+sys_admin:-chown:+CAP_CHOWN:-Mknod".parse().unwrap();
        assert_eq!(changes.add, [Capability::CAP_SYS_ADMIN, Capability::CAP_CHOWN].into());
        assert_eq!(changes.drop, [Capability::CAP_MKNOD].into());
    }

    #[test]
    fn malformed_modcaps_name_the_item() {
        let error = |text: &str| text.parse::<CapChanges>().unwrap_err();
        assert_eq!(error(""), CapChangesError::Empty);
        assert_eq!(error("+chown:"), CapChangesError::Empty);
        assert_eq!(error("chown"), CapChangesError::NoSign("chown".into()));
        assert_eq!(error("-chown:+fly"), CapChangesError::Unknown("fly".into()));
        assert_eq!(error("+"), CapChangesError::Unknown("".into()));
    }

    #[test]
    fn namespace_maps_take_any_separator() {
        let expected = NamespaceMap { inside: 0, outside: 100_000, count: 65536 };
        assert_eq!(":0:100000:65536:".parse(), Ok(expected));
        assert_eq!("/0/100000/65536/".parse(), Ok(expected));
    }

    #[test]
    fn malformed_namespace_maps_say_what_is_wrong() {
        let error = |text: &str| text.parse::<NamespaceMap>().unwrap_err();
        for form in ["", ":", "0:1:2", ":0:1:2", "0:1:2:", ":0:1:", ":0:1:2:3:", ":0/1:2:", "101101"] {
            assert_eq!(error(form), NamespaceMapError::Form, "{form}");
        }
        assert_eq!(error(":0:x:2:"), NamespaceMapError::Number("x".into()));
        assert_eq!(error(":0::2:"), NamespaceMapError::Number("".into()));
        assert_eq!(error(":0:4294967296:2:"), NamespaceMapError::Number("4294967296".into()));
        assert_eq!(error(":0:1:0:"), NamespaceMapError::Empty);
        let overflow = NamespaceMapError::Overflow { base: 4_294_967_295, count: 1 };
        assert_eq!(error(":0:4294967295:1:"), overflow);
    }
}
