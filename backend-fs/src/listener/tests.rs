//! The endpoint as a caller sees it: files, modes, refusals.

use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixDatagram;

use rustix::process::getuid;

use super::*;
use crate::config::SocketPath;

fn options(path: &Path) -> SocketOptions {
    SocketOptions { path: SocketPath::new(path.to_owned()).unwrap(), owner: None, group: None, mode: 0o700 }
}

fn open_path(path: &Path) -> Result<(Socket, Leftovers), Error> {
    open(&Endpoint::Path(options(path)))
}

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> = std::fs::read_dir(directory)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn socket_and_pid_file_live_as_long_as_the_leftovers() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fs.sock");
    let (socket, leftovers) = open_path(&path).unwrap();
    assert!(matches!(socket, Socket::Listening(_)));
    assert_eq!(names(directory.path()), ["fs.sock", "fs.sock.pid"]);
    let pid = std::fs::read_to_string(directory.path().join("fs.sock.pid")).unwrap();
    assert_eq!(pid, format!("{}\n", std::process::id()));
    UnixStream::connect(&path).unwrap();
    drop(leftovers);
    assert!(names(directory.path()).is_empty());
}

#[test]
fn forgotten_leftovers_stay() {
    let directory = tempfile::tempdir().unwrap();
    let (_, leftovers) = open_path(&directory.path().join("s")).unwrap();
    leftovers.forget();
    assert_eq!(names(directory.path()), ["s", "s.pid"]);
}

#[test]
fn mode_is_exact_whatever_the_umask() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut options = options(&path);
    options.mode = 0o666;
    options.owner = Some(getuid().as_raw());
    let (_socket, _leftovers) = open(&Endpoint::Path(options)).unwrap();
    let metadata = std::fs::symlink_metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.permissions().mode() & 0o7777, 0o666);
    assert_eq!(metadata.uid(), getuid().as_raw());
}

#[test]
fn stale_socket_is_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let stale = std::fs::symlink_metadata(&path).unwrap().ino();
    let keep_the_inode_busy = openat(CWD, &path, OFlags::PATH, Mode::empty()).unwrap();
    let (_socket, _leftovers) = open_path(&path).unwrap();
    assert_ne!(std::fs::symlink_metadata(&path).unwrap().ino(), stale);
    drop(keep_the_inode_busy);
}

#[test]
fn listening_socket_is_refused_and_not_disturbed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let other = UnixListener::bind(&path).unwrap();
    other.set_nonblocking(true).unwrap();
    assert!(matches!(open_path(&path), Err(Error::Busy(_))));
    assert_eq!(other.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "it was connected to");
    assert_eq!(names(directory.path()), ["s"]);
}

#[test]
fn listener_bound_by_another_path_is_refused_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let detour = directory.path().join(".").join("s");
    let odd = PathBuf::from(format!("{}/./s", directory.path().display()));
    let _other = UnixListener::bind(&odd).unwrap();
    assert!(matches!(open_path(&path), Err(Error::Busy(_))), "{}", detour.display());
}

#[test]
fn datagram_socket_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let _other = UnixDatagram::bind(&path).unwrap();
    assert!(matches!(open_path(&path), Err(Error::Busy(_))));
}

#[test]
fn two_daemons_exclude_each_other_by_the_pid_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let (_socket, _leftovers) = open_path(&path).unwrap();
    let error = open_path(&path).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }));
    assert!(error.to_string().contains(&format!("(pid {})", std::process::id())), "{error}");
    assert_eq!(names(directory.path()), ["s", "s.pid"]);
}

#[test]
fn file_that_is_not_a_socket_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let options = options(&path);
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(open(&Endpoint::Path(options)), Err(Error::Occupied(_))));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[test]
fn replaced_socket_is_not_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let (_socket, leftovers) = open_path(&path).unwrap();
    let keep_the_inode_busy = openat(CWD, &path, OFlags::PATH, Mode::empty()).unwrap();
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(leftovers);
    assert_eq!(names(directory.path()), ["s"]);
    drop(keep_the_inode_busy);
}

#[test]
fn over_long_path_is_bound_through_its_directory() {
    let directory = tempfile::tempdir().unwrap();
    let deep = directory.path().join("d".repeat(120));
    std::fs::create_dir(&deep).unwrap();
    let path = deep.join("fs.sock");
    let (_socket, leftovers) = open_path(&path).unwrap();
    assert_eq!(names(&deep), ["fs.sock", "fs.sock.pid"]);
    let handle = openat(CWD, &deep, OFlags::PATH, Mode::empty()).unwrap();
    UnixStream::connect(format!("/proc/self/fd/{}/fs.sock", handle.as_raw_fd())).unwrap();
    assert!(matches!(open_path(&path), Err(Error::Locked { .. })));
    drop(leftovers);
    assert!(names(&deep).is_empty());
}

#[test]
fn inherited_socket_listens_or_is_connected() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("s")).unwrap();
    let (here, _there) = UnixStream::pair().unwrap();
    let adopt =
        |fd: OwnedFd| open(&Endpoint::Fd(std::os::fd::IntoRawFd::into_raw_fd(fd))).map(|(socket, _)| socket);
    assert!(matches!(adopt(listener.into()), Ok(Socket::Listening(_))));
    assert!(matches!(adopt(here.into()), Ok(Socket::Connected(_))));

    let idle = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None).unwrap();
    assert!(adopt(idle).unwrap_err().to_string().contains("neither listens nor is connected"));
    let datagram: OwnedFd = UnixDatagram::unbound().unwrap().into();
    assert!(adopt(datagram).unwrap_err().to_string().contains("not a Unix stream socket"));
    let file: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
    assert!(adopt(file).unwrap_err().to_string().contains("not a socket"));
}

#[test]
fn kernel_table_is_matched_by_whole_path_and_listening_flag() {
    let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
        0000000000000000: 00000002 00000000 00010000 0001 01 11 /run/a b\n\
        0000000000000000: 00000002 00000000 00000000 0001 03 12 /run/c\n\
        0000000000000000: 00000002 00000000 00010000 0001 01 13 /x/run/d\n";
    assert!(lists_listener(table, b"/run/a b"));
    assert!(!lists_listener(table, b"/run/c"));
    assert!(!lists_listener(table, b"/run/d"));
    assert!(!lists_listener(table, b"/run/a"));
}
