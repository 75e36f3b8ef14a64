//! Start-up notification for systemd units of `Type=notify` (`sd_notify(3)`).
#![forbid(unsafe_code)]

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// What the service manager is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Front ends can connect.
    Ready,
    /// The daemon is ending.
    Stopping,
}

impl State {
    fn text(self) -> &'static [u8] {
        match self {
            State::Ready => b"READY=1\nSTATUS=Waiting for front ends\n",
            State::Stopping => b"STOPPING=1\n",
        }
    }
}

/// A way to the service manager, if there is one.
#[derive(Debug, Default)]
pub struct Notifier(Option<UnixDatagram>);

impl Notifier {
    /// Connects to the socket that the variable `NOTIFY_SOCKET` names. Nothing is wrong without one; one
    /// that cannot be reached is logged, since the service manager will wait in vain.
    pub fn from_environment() -> Self {
        match std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) {
            None => Self(None),
            Some(name) => match connect(&name) {
                Ok(socket) => Self(Some(socket)),
                Err(error) => {
                    tracing::warn!("NOTIFY_SOCKET {}: {error}", name.display());
                    Self(None)
                }
            },
        }
    }

    /// Tells the service manager.
    pub fn tell(&self, state: State) {
        if let Some(socket) = &self.0
            && let Err(error) = socket.send(state.text())
        {
            tracing::warn!("telling the service manager: {error}");
        }
    }
}

/// A path, or an abstract name written with `@` for its NUL.
fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> Vec<u8> {
        let mut buffer = [0; 256];
        let len = socket.recv(&mut buffer).unwrap();
        buffer[..len].to_vec()
    }

    #[test]
    fn states_arrive_at_paths_and_abstract_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        Notifier(Some(connect(path.as_os_str()).unwrap())).tell(State::Ready);
        assert!(received(&by_path).starts_with(b"READY=1\n"));

        let name = format!("backend-vsock-notify-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        let by_name = UnixDatagram::bind_addr(&abstract_address).unwrap();
        Notifier(Some(connect(OsStr::new(&format!("@{name}"))).unwrap())).tell(State::Stopping);
        assert_eq!(received(&by_name), b"STOPPING=1\n");
    }
}
