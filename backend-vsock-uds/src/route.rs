//! Where a connection of the DPU leads: port numbers to Unix socket paths of the host.
//!
//! A port that no rule names is refused. Rules come from explicit maps (`port = /path`) and, when a
//! `--uds-path` is given, from the whole family `<uds-path>_<port>` as in Firecracker and
//! vhost-device-vsock. An explicit rule wins over the family.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Where a port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Route {
    /// To this host socket.
    Socket(PathBuf),
    /// Nowhere: the DPU gets an RST.
    Refused,
}

/// The rules of one DPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routes {
    ports: BTreeMap<u32, PathBuf>,
    family: Option<PathBuf>,
}

impl Routes {
    /// Rules that refuse every port.
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds the family `<path>_<port>` for all ports.
    #[must_use]
    pub fn with_family(mut self, path: &Path) -> Self {
        self.family = Some(path.to_owned());
        self
    }

    /// Adds or replaces the rule of one port; the earlier path comes back.
    pub fn insert(&mut self, port: u32, path: PathBuf) -> Option<PathBuf> {
        self.ports.insert(port, path)
    }

    /// Takes the explicit rule of a port away.
    pub fn remove(&mut self, port: u32) -> Option<PathBuf> {
        self.ports.remove(&port)
    }

    /// The explicit rules, by port.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Path)> {
        self.ports.iter().map(|(port, path)| (*port, path.as_path()))
    }

    /// Where `port` of the host leads.
    pub fn lookup(&self, port: u32) -> Route {
        if let Some(path) = self.ports.get(&port) {
            return Route::Socket(path.clone());
        }
        match &self.family {
            Some(family) => Route::Socket(member(family, port)),
            None => Route::Refused,
        }
    }
}

/// `<path>_<port>`.
fn member(path: &Path, port: u32) -> PathBuf {
    let mut bytes = path.as_os_str().as_bytes().to_vec();
    bytes.push(b'_');
    bytes.extend_from_slice(port.to_string().as_bytes());
    PathBuf::from(OsString::from_vec(bytes))
}

/// A rule `PORT=PATH` that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// No `=`.
    #[error("`{0}` is not PORT=PATH")]
    Form(String),
    /// Not a port.
    #[error("`{0}` is not a port (0 to 4294967294)")]
    Port(String),
    /// No absolute path.
    #[error("`{0}` is not an absolute path of a Unix socket")]
    Path(String),
}

/// Reads a rule `PORT=/path/to.sock`.
///
/// # Errors
/// [`RuleError`] says which part is wrong.
pub fn parse_rule(rule: &OsStr) -> Result<(u32, PathBuf), RuleError> {
    let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let bytes = rule.as_bytes();
    let equals = bytes.iter().position(|byte| *byte == b'=').ok_or_else(|| RuleError::Form(show(bytes)))?;
    let (port, path) = (&bytes[..equals], &bytes[equals + 1..]);
    let number = std::str::from_utf8(port).ok().and_then(|text| text.trim().parse::<u32>().ok());
    // `VMADDR_PORT_ANY` cannot be connected to.
    let number = number.filter(|port| *port != u32::MAX).ok_or_else(|| RuleError::Port(show(port)))?;
    let path = Path::new(OsStr::from_bytes(path));
    if !path.is_absolute() {
        return Err(RuleError::Path(show(path.as_os_str().as_bytes())));
    }
    Ok((number, path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_without_a_rule_is_refused() {
        assert_eq!(Routes::none().lookup(22), Route::Refused);
    }

    #[test]
    fn a_family_serves_every_port_and_a_rule_wins_over_it() {
        let mut routes = Routes::none().with_family(Path::new("/run/dpu0.vsock"));
        routes.insert(80, PathBuf::from("/run/http.sock"));
        assert_eq!(routes.lookup(22), Route::Socket("/run/dpu0.vsock_22".into()));
        assert_eq!(routes.lookup(80), Route::Socket("/run/http.sock".into()));
        assert_eq!(routes.remove(80), Some("/run/http.sock".into()));
        assert_eq!(routes.lookup(80), Route::Socket("/run/dpu0.vsock_80".into()));
    }

    #[test]
    fn rules_are_read_and_their_faults_named() {
        assert_eq!(parse_rule(OsStr::new("22=/run/ssh.sock")), Ok((22, "/run/ssh.sock".into())));
        assert_eq!(parse_rule(OsStr::new("22=/a=b")), Ok((22, "/a=b".into())));
        assert_eq!(parse_rule(OsStr::new("/run/ssh.sock")), Err(RuleError::Form("/run/ssh.sock".into())));
        assert_eq!(parse_rule(OsStr::new("4294967295=/a")), Err(RuleError::Port("4294967295".into())));
        assert_eq!(parse_rule(OsStr::new("22=ssh.sock")), Err(RuleError::Path("ssh.sock".into())));
    }
}
