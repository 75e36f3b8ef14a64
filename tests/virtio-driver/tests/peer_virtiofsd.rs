//! The driver against the reference daemon: virtiofsd 1.14.

use std::path::PathBuf;

use virtio_driver::daemon::{Daemon, DaemonCommand};
use virtio_driver::fuse::{Session, SessionOptions};

fn virtiofsd() -> PathBuf {
    std::env::var_os("VIRTIOFSD").map_or_else(
        || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../.cache/peers/bin/virtiofsd")),
        PathBuf::from,
    )
}

fn start(shared: &std::path::Path, dir: &std::path::Path) -> Daemon {
    let socket = dir.join("fs.sock");
    DaemonCommand::new(virtiofsd(), &socket)
        .args(["--shared-dir".as_ref(), shared.as_os_str(), "--socket-path".as_ref(), socket.as_os_str()])
        .args(["--sandbox", "none"])
        .hint("run `make peers`, or set VIRTIOFSD")
        .spawn()
        .unwrap()
}

#[test]
fn a_file_is_looked_up_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let shared = dir.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("hello"), b"hello from the host").unwrap();
    let mut daemon = start(&shared, dir.path());
    let mut session = Session::mount(daemon.connect().unwrap(), SessionOptions::default()).unwrap();
    let client = session.client();
    let entry = client.lookup(1, "hello").unwrap();
    let open = client.open(entry.nodeid, 0).unwrap();
    assert_eq!(client.read(entry.nodeid, open.fh, 0, 4096).unwrap(), b"hello from the host");
}
