//! Id maps of the user namespace that an unprivileged daemon makes for itself (`user_namespaces(7)`).
//!
//! The supervisor writes them from outside, after the new process said that it has left. One id that
//! is the daemon's own can be mapped by anybody, through `/proc/<pid>/{uid,gid}_map`; everything else
//! takes the set-id helpers `newuidmap` and `newgidmap`, which check `/etc/subuid` and `/etc/subgid`.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::Command;

use rustix::process::{Pid, getegid, geteuid};

use super::Error;
use super::options::NamespaceMap;

/// Writes both maps of process `pid`; an empty map stands for the daemon's own id, 1:1.
///
/// # Errors
/// [`Error::IdMap`].
pub(super) fn write_maps(pid: Pid, uids: &[NamespaceMap], gids: &[NamespaceMap]) -> Result<(), Error> {
    let proc = format!("/proc/{}", pid.as_raw_nonzero());
    let proc = Path::new(&proc);
    match way(uids, geteuid().as_raw()) {
        Way::Direct(line) => write("uid map", &proc.join("uid_map"), &line)?,
        Way::Helper => run_helper("uid map", "newuidmap", pid, uids)?,
    }
    match way(gids, getegid().as_raw()) {
        Way::Direct(line) => {
            // Without this the kernel refuses an unprivileged gid map: dropping a group could
            // otherwise get around a permission that denies that group.
            write("gid map", &proc.join("setgroups"), "deny")?;
            write("gid map", &proc.join("gid_map"), &line)
        }
        Way::Helper => run_helper("gid map", "newgidmap", pid, gids),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Way {
    Direct(String),
    Helper,
}

fn way(map: &[NamespaceMap], own: u32) -> Way {
    match map {
        [] => Way::Direct(format!("{own} {own} 1")),
        [one] if one.outside == own && one.count == 1 => Way::Direct(format!("{} {own} 1", one.inside)),
        _ => Way::Helper,
    }
}

fn write(what: &'static str, path: &Path, line: &str) -> Result<(), Error> {
    std::fs::write(path, line).map_err(|error| Error::IdMap {
        what,
        reason: format!("writing {line:?} to {}: {error}", path.display()),
    })
}

fn run_helper(what: &'static str, program: &str, pid: Pid, map: &[NamespaceMap]) -> Result<(), Error> {
    let ids = map.iter().flat_map(|m| [m.inside, m.outside, m.count]).map(|id| id.to_string());
    let output =
        Command::new(program).arg(pid.as_raw_nonzero().to_string()).args(ids).output().map_err(|error| {
            Error::IdMap {
                what,
                reason: format!("running {program}: {error}; it comes with the package uidmap"),
            }
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Error::IdMap { what, reason: format!("{program}: {}; see /etc/subuid and /etc/subgid", said.trim()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_own_single_id_is_mapped_without_the_helper() {
        let map = |inside, outside, count| NamespaceMap { inside, outside, count };
        assert_eq!(way(&[], 1000), Way::Direct("1000 1000 1".into()));
        assert_eq!(way(&[map(0, 1000, 1)], 1000), Way::Direct("0 1000 1".into()));
        assert_eq!(way(&[map(0, 1000, 2)], 1000), Way::Helper);
        assert_eq!(way(&[map(0, 100_000, 1)], 1000), Way::Helper);
        assert_eq!(way(&[map(0, 1000, 1), map(1, 100_000, 65536)], 1000), Way::Helper);
    }
}
