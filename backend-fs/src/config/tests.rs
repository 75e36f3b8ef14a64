//! Tests of what options mean together; callers' whole command lines are in `tests/cli_callers.rs`,
//! refusals in `tests/cli_misuse.rs`.

use std::os::unix::net::UnixListener;

use super::*;
use crate::args::invocation::parse;

/// A configuration for an export and a socket in a directory of their own, as root.
fn config(words: &[&str]) -> (tempfile::TempDir, Config) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("s");
    let mut argv = vec!["backend-fs".into(), "--shared-dir".into(), directory.path().into()];
    argv.extend(["--socket-path".into(), socket.into()]);
    argv.extend(words.iter().map(|word| word.into()));
    let config = Config::for_user(parse(argv).unwrap(), true).unwrap();
    (directory, config)
}

fn socket(words: &[&str]) -> SocketOptions {
    match config(words).1.listen.endpoint {
        Endpoint::Path(socket) => socket,
        Endpoint::Fd(fd) => panic!("{words:?} became descriptor {fd}"),
    }
}

#[test]
fn a_socket_belongs_to_the_daemon_unless_told_otherwise() {
    let given = socket(&[]);
    assert_eq!((given.owner, given.group, given.mode), (None, None, 0o700));
    let given = socket(&["--socket-group=root"]);
    assert_eq!((given.owner, given.group, given.mode), (None, Some(0), 0o770));
    let given = socket(&["--socket-owner=root", "--socket-group=4242", "--socket-mode=0660"]);
    assert_eq!((given.owner, given.group, given.mode), (Some(0), Some(4242), 0o660));
}

#[test]
fn the_pid_file_is_beside_the_socket() {
    let path = socket(&[]).path;
    assert_eq!(path.pid_file(), path.directory().join("s.pid"));
    let bare = SocketPath::new("relative.sock".into()).unwrap();
    assert_eq!(
        (bare.directory(), bare.pid_file().as_path()),
        (Path::new("."), Path::new("relative.sock.pid"))
    );
}

#[test]
fn over_long_paths_are_fine_as_long_as_the_name_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let deep = directory.path().join("d".repeat(120));
    fs::create_dir(&deep).unwrap();
    let path = SocketPath::new(deep.join("s".repeat(LONG_PATH_NAME_MAX))).unwrap();
    assert!(!path.fits_address());
    assert!(SocketPath::new(deep.join("s".repeat(LONG_PATH_NAME_MAX + 1))).is_err());
    // A long name alone fits, in a short directory.
    let short = SocketPath::new("s".repeat(SUN_PATH_MAX).into()).unwrap();
    assert!(short.fits_address());
    assert!(SocketPath::new("s".repeat(SUN_PATH_MAX + 1).into()).is_err());
}

#[test]
fn a_socket_that_was_left_behind_is_not_in_the_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stale");
    drop(UnixListener::bind(&path).unwrap());
    assert!(SocketPath::new(path).is_ok());
}

#[test]
fn a_dangling_link_in_the_sockets_place_is_in_the_way() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("link");
    std::os::unix::fs::symlink("nowhere", &path).unwrap();
    assert_eq!(SocketPath::new(path.clone()), Err(Error::SocketPathOccupied(path)));
}

#[test]
fn a_single_file_can_be_exported() {
    let file = tempfile::NamedTempFile::new().unwrap();
    assert_eq!(SharedDir::new(file.path().into()).unwrap().as_path(), file.path());
}

#[test]
fn the_fd_budget_is_what_the_limit_leaves_or_less_on_request() {
    let (_directory, given) = config(&["--num-request-queues=1"]);
    assert_eq!(given.fd_budget(10_610), Ok(10_000));
    assert!(given.fd_budget(610).is_err());
    let (_directory, given) = config(&["--num-request-queues=1", "--fd-budget=500"]);
    assert_eq!((given.fd_budget(10_610), given.fd_budget(710)), (Ok(500), Ok(100)));
}

#[test]
fn only_the_descriptor_of_fd_is_inherited() {
    let listener = UnixListener::bind_addr(
        &<std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(format!(
            "backend-fs-config-{}",
            std::process::id()
        ))
        .unwrap(),
    )
    .unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
    let argv = ["backend-fs".into(), "--shared-dir=/".into(), format!("--fd={fd}").into()];
    let given = Config::for_user(parse(argv.into()).unwrap(), true).unwrap();
    assert_eq!(given.inherited_fd(), Some(fd));
    assert_eq!(config(&[]).1.inherited_fd(), None);
}

#[test]
fn attributes_are_turned_on_by_what_needs_them() {
    for option in ["--xattr", "--posix-acl", "--security-label=auto", "--xattrmap=:ok:all:::"] {
        assert!(config(&[option]).1.host.xattr, "{option}");
    }
    assert!(!config(&["--posix-acl=never"]).1.host.xattr);
}

#[test]
fn what_works_but_should_be_changed_is_warned_about() {
    for (words, start) in [
        (&["--xattrmap=:bad:all:user.:user.:"][..], "--xattrmap: names that no rule matches"),
        (&["--thread-pool-size=100000"], "--thread-pool-size: 1024 threads"),
        (&["-f"], "-f is deprecated"),
        (&["-o", "xattr"], "-o is deprecated"),
        (&["--migration-confirm-paths"], "--migration-*: live migration is not offered"),
    ] {
        let warnings = config(words).1.warnings;
        assert!(matches!(&warnings[..], [only] if only.starts_with(start)), "{words:?}: {warnings:?}");
    }
    assert_eq!(config(&["--thread-pool-size=100000"]).1.device.pool_size, MAX_POOL_SIZE);
}

#[test]
fn the_socket_path_wins_over_its_old_name() {
    let (directory, given) = config(&["--socket=/nonexistent/s"]);
    assert!(given.warnings.is_empty());
    assert!(matches!(
        given.listen.endpoint,
        Endpoint::Path(socket) if socket.path.as_path() == directory.path().join("s")
    ));
}
