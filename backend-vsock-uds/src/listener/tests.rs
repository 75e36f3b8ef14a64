//! Sockets as a caller sees them: files, modes, refusals.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;

use rustix::process::getuid;

use super::*;

const PRIVATE: Access = Access { owner: None, group: None, mode: 0o700 };

fn open(path: &Path, access: Access) -> Result<(OwnedFd, Leftovers), Error> {
    let mut leftovers = Leftovers::default();
    let path = SocketPath::new(path.to_owned()).expect("a path of a socket");
    Ok((make(&path, Kind::Stream, access, 8, &mut leftovers)?, leftovers))
}

fn names(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).expect("a directory");
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

#[test]
fn a_socket_lives_as_long_as_the_leftovers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let (_socket, leftovers) = open(&path, PRIVATE).unwrap();
    UnixStream::connect(&path).unwrap();
    assert_eq!(leftovers.directories().count(), 1);
    drop(leftovers);
    assert!(names(directory.path()).is_empty());
}

#[test]
fn a_failure_leaves_no_trace() {
    let directory = tempfile::tempdir().unwrap();
    let busy = directory.path().join("busy");
    let _other = UnixListener::bind(&busy).unwrap();
    let mut leftovers = Leftovers::default();
    let mut attempt = |name: &str| {
        let path = SocketPath::new(directory.path().join(name)).unwrap();
        make(&path, Kind::SeqPacket, PRIVATE, 8, &mut leftovers)
    };
    assert!(attempt("first").is_ok() && attempt("busy").is_err());
    drop(leftovers);
    assert_eq!(names(directory.path()), ["busy"]);
}

#[test]
fn mode_and_owner_are_exact_whatever_the_umask() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let access = Access { owner: Some(getuid().as_raw()), group: None, mode: 0o666 };
    let (_socket, _leftovers) = open(&path, access).unwrap();
    let metadata = std::fs::symlink_metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o666);
    assert_eq!(metadata.uid(), getuid().as_raw());
}

#[test]
fn a_stale_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let keep_the_inode_busy = openat(CWD, &path, OFlags::PATH, Mode::empty()).unwrap();
    let stale = std::fs::symlink_metadata(&path).unwrap().ino();
    let (_socket, _leftovers) = open(&path, PRIVATE).unwrap();
    assert_ne!(std::fs::symlink_metadata(&path).unwrap().ino(), stale);
    drop(keep_the_inode_busy);
}

#[test]
fn a_listening_socket_is_refused_and_not_disturbed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let other = UnixListener::bind(&path).unwrap();
    other.set_nonblocking(true).unwrap();
    assert!(matches!(open(&path, PRIVATE), Err(Error::Busy(_))));
    assert_eq!(other.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "it was connected to");
}

#[test]
fn what_else_has_the_name_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let datagram = directory.path().join("datagram");
    let _other = UnixDatagram::bind(&datagram).unwrap();
    assert!(matches!(open(&datagram, PRIVATE), Err(Error::Busy(_))));
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(open(&file, PRIVATE), Err(Error::Occupied(_))));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn a_replaced_socket_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let (_socket, leftovers) = open(&path, PRIVATE).unwrap();
    let keep_the_inode_busy = openat(CWD, &path, OFlags::PATH, Mode::empty()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(leftovers);
    assert_eq!(names(directory.path()), ["s"]);
    drop(keep_the_inode_busy);
}

#[test]
fn an_over_long_path_is_bound_through_its_directory() {
    let directory = tempfile::tempdir().unwrap();
    let deep = directory.path().join("d".repeat(120));
    std::fs::create_dir(&deep).unwrap();
    let (_socket, leftovers) = open(&deep.join("s"), PRIVATE).unwrap();
    let handle = openat(CWD, &deep, OFlags::PATH, Mode::empty()).unwrap();
    UnixStream::connect(format!("/proc/self/fd/{}/s", handle.as_raw_fd())).unwrap();
    drop(leftovers);
    assert!(names(&deep).is_empty());
}

#[test]
fn an_inherited_socket_listens_or_is_connected() {
    use std::os::fd::IntoRawFd;
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("s")).unwrap();
    assert!(matches!(inherited(listener.into_raw_fd()), Ok(Socket::Listening(_))));
    let (here, _there) = UnixStream::pair().unwrap();
    assert!(matches!(inherited(here.into_raw_fd()), Ok(Socket::Connected(_))));
    let datagram = UnixDatagram::unbound().unwrap();
    assert!(matches!(inherited(datagram.into_raw_fd()), Err(Error::Inherited { .. })));
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(inherited(file.into_raw_fd()), Err(Error::Inherited { .. })));
}
