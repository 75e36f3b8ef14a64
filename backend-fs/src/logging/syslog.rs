//! A writer to the local syslog daemon.
//!
//! One log event is one datagram to `/dev/log`, framed as syslog(3) does: `<priority>name[pid]: text`.
//! The time stamp that RFC 3164 allows there is left out. It would have to be local time, which a
//! sandboxed process cannot know, and the receiver stamps messages without one itself (RFC 3164, 4.3.2).
//!
//! The socket is opened before the sandbox and never blocks: a log must not hold up a request. What
//! does not fit into the socket's buffer is counted, and the count is sent ahead of the next message
//! that gets through. A daemon that went away (it cannot be reached again from the sandbox) makes
//! messages go to stderr.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use tracing::{Level, Metadata};
use tracing_subscriber::fmt::MakeWriter;

/// Where syslog daemons listen (`syslog(3)`).
pub const SOCKET: &str = "/dev/log";

/// `LOG_USER` (`<sys/syslog.h>`, 1 << 3), the facility virtiofsd uses.
const FACILITY: u8 = 1 << 3;

/// Bytes of text in one message. Syslog daemons take 8 KiB (rsyslog) or more.
const MAX_TEXT: usize = 4096;

/// A connection to the syslog daemon.
pub struct Syslog {
    socket: UnixDatagram,
    name: &'static str,
    lost: AtomicU64,
}

impl Syslog {
    /// Connects to the local daemon. `name` is the program's in each message.
    pub fn connect(name: &'static str) -> io::Result<Self> {
        Self::connect_to(Path::new(SOCKET), name)
    }

    fn connect_to(path: &Path, name: &'static str) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, name, lost: AtomicU64::new(0) })
    }

    fn send(&self, severity: u8, text: &[u8]) -> io::Result<()> {
        // The pid is asked for each time: the sandbox may serve from a child process.
        let mut message =
            format!("<{}>{}[{}]: ", FACILITY | severity, self.name, std::process::id()).into_bytes();
        let text = text.trim_ascii_end();
        let text = text.get(..MAX_TEXT).unwrap_or(text);
        // Control characters could start a second message for daemons that forward lines.
        message.extend(text.iter().map(|&byte| if byte.is_ascii_control() { b' ' } else { byte }));
        self.socket.send(&message).map(drop)
    }

    fn log(&self, severity: u8, text: &[u8]) {
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0 && self.send(4, format!("{lost} messages lost: syslog was busy").as_bytes()).is_err() {
            self.lost.fetch_add(lost, Ordering::Relaxed);
        }
        match self.send(severity, text) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.lost.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) => {
                // Nowhere left to report that stderr fails.
                let _ = io::stderr().write_all(text);
            }
        }
    }
}

/// Writes the events of one severity.
pub struct SeverityWriter<'a> {
    syslog: &'a Syslog,
    severity: u8,
}

impl Write for SeverityWriter<'_> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.syslog.log(self.severity, text);
        Ok(text.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Syslog {
    type Writer = SeverityWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        SeverityWriter { syslog: self, severity: 6 }
    }

    fn make_writer_for(&'a self, event: &Metadata<'_>) -> Self::Writer {
        SeverityWriter { syslog: self, severity: severity(event.level()) }
    }
}

/// `LOG_ERR`, `LOG_WARNING`, `LOG_INFO`, `LOG_DEBUG` of `<sys/syslog.h>`.
fn severity(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (tempfile::TempDir, UnixDatagram, Syslog) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let daemon = UnixDatagram::bind(&path).unwrap();
        daemon.set_nonblocking(true).unwrap();
        let syslog = Syslog::connect_to(&path, "backend-fs").unwrap();
        (directory, daemon, syslog)
    }

    fn received(daemon: &UnixDatagram) -> String {
        let mut buffer = [0; 2 * MAX_TEXT];
        let len = daemon.recv(&mut buffer).unwrap();
        String::from_utf8(buffer[..len].to_vec()).unwrap()
    }

    #[test]
    fn an_event_becomes_one_framed_datagram() {
        let (_directory, daemon, syslog) = pair();
        let subscriber = tracing_subscriber::fmt()
            .compact()
            .without_time()
            .with_level(false)
            .with_target(false)
            .with_ansi(false)
            .with_writer(syslog)
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(queue = 1, "ring broken");
            tracing::info!("two\nlines");
        });
        let pid = std::process::id();
        assert_eq!(received(&daemon), format!("<12>backend-fs[{pid}]: ring broken queue=1"));
        assert_eq!(received(&daemon), format!("<14>backend-fs[{pid}]: two lines"));
        assert_eq!(daemon.recv(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn long_messages_are_cut() {
        let (_directory, daemon, syslog) = pair();
        syslog.log(6, &[b'x'; 3 * MAX_TEXT]);
        assert!(received(&daemon).ends_with(&format!(": {}", "x".repeat(MAX_TEXT))));
    }

    #[test]
    fn a_busy_daemon_loses_messages_and_is_told_how_many() {
        let (_directory, daemon, syslog) = pair();
        while syslog.lost.load(Ordering::Relaxed) < 3 {
            syslog.log(6, b"filling");
        }
        while daemon.recv(&mut [0; 256]).is_ok() {}
        syslog.log(6, b"after");
        assert!(received(&daemon).ends_with(": 3 messages lost: syslog was busy"));
        assert!(received(&daemon).ends_with(": after"));
    }

    #[test]
    fn connecting_fails_without_a_daemon() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Syslog::connect_to(&directory.path().join("log"), "backend-fs").is_err());
    }
}
