//! Misuse of the real program: one clear line on stderr, the right exit code, nothing on stdout and
//! nothing changed on the host.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// A host: `export/` is a directory, `file` a regular file; the program runs with this as its
/// current directory.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        // Others must be able to come here for the tests without root.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir(directory.path().join("export")).unwrap();
        fs::write(directory.path().join("file"), "content").unwrap();
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn names(&self) -> Vec<PathBuf> {
        let mut names: Vec<_> =
            fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        names.sort();
        names
    }

    fn command(&self, program: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(words).current_dir(self.path()).stdin(Stdio::null()).env_remove("RUST_LOG");
        command
    }

    /// Runs a command line that must be refused and returns its line.
    fn refused(&self, words: &[&str], code: i32) -> String {
        let before = self.names();
        let output = self.command(Path::new(env!("CARGO_BIN_EXE_backend-fs")), words).output().unwrap();
        let line = one_line(words, &output, code);
        assert_eq!(self.names(), before, "{words:?} changed the directory");
        line
    }
}

fn one_line(words: &[&str], output: &Output, code: i32) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{words:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{words:?} wrote to stdout");
    let line = stderr.strip_prefix("backend-fs: ").and_then(|line| line.strip_suffix('\n'));
    let line = line.unwrap_or_else(|| panic!("{words:?}: not one line of ours: {stderr:?}"));
    assert!(!line.contains('\n'), "{words:?}: more than one line: {stderr:?}");
    line.to_owned()
}

/// A line that would serve, for one mistake to be added.
const GOOD: [&str; 2] = ["--shared-dir=export", "--socket-path=fs.sock"];

fn with(mistake: &[&'static str]) -> Vec<&'static str> {
    GOOD.iter().chain(mistake).copied().collect()
}

#[test]
fn wrong_command_lines_are_refused_with_2() {
    let host = Host::new();
    let cases: &[(&[&str], &str)] = &[
        (&[], "no directory to export: give --shared-dir DIR (try --help)"),
        (&["--socket-path=s"], "no directory to export: give --shared-dir DIR (try --help)"),
        (
            &["--shared-dir=export"],
            "no endpoint: give --socket-path PATH, or --fd N for an inherited socket (try --help)",
        ),
        (
            &["--shared-dir=export", "--fd=3", "--socket-path=s"],
            "the argument '--fd <N>' cannot be used with '--socket-path <PATH>' (try --help)",
        ),
        (
            &["--shared-dir=export", "--fd=3", "--socket=s"],
            "the argument '--fd <N>' cannot be used with '--socket <PATH>' (try --help)",
        ),
        (
            &["--shared-dir=export", "--fd=3", "--socket-group=root"],
            "the argument '--fd <N>' cannot be used with '--socket-group <GROUP>' (try --help)",
        ),
        (&["--shared-dir=export", "--socket-path=export/"], "not the name of a socket"),
        (&["--shared-dir=export", "--socket-path=.."], "not the name of a socket"),
    ];
    for (words, expected) in cases {
        let line = host.refused(words, 2);
        assert!(line.contains(expected), "{words:?}: {line}");
    }
}

#[test]
fn wrong_options_are_refused_with_2_and_named() {
    let host = Host::new();
    let cases: &[(&[&str], &str)] = &[
        (
            &["--sharde-dir=/x"],
            "unexpected argument '--sharde-dir' found; tip: a similar argument exists: '--shared-dir'",
        ),
        (&["extra"], "unexpected argument 'extra' found"),
        (&["-x"], "unexpected argument '-x' found"),
        (&["--readonly=yes"], "unexpected value 'yes' for '--readonly' found; no more were expected"),
        (&["--tag"], "a value is required for '--tag <TAG>' but none was supplied"),
        (&["--tag="], "a tag needs at least one byte"),
        (
            &["--tag=0123456789012345678901234567890123456"],
            "the tag has 37 bytes, the device has room for 36",
        ),
        (
            &["--cache=some"],
            "invalid value 'some' for '--cache <POLICY>'; [possible values: auto, always, metadata, never]",
        ),
        (&["--posix-acl=maybe"], "invalid value 'maybe' for '--posix-acl"),
        (&["--posix-acl", "--translate-gid=map:0:1:1"], "--translate-gid cannot be used with --posix-acl"),
        (&["--translate-uid=map:0:1"], "'map' takes 3 numbers, as in 'map:0:100000:65536'; found 2"),
        (
            &["--translate-uid=map:0:1:5", "--translate-uid=guest:4:9:1"],
            "--translate-uid: 'guest:4:9:1' overlaps 'map:0:1:5'; a DPU id may be named by one rule only",
        ),
        (&["--uid-map=0:1:2"], "expected ':inside:outside:count:' with one separator character throughout"),
        (&["--uid-map=:0:1:1:", "--sandbox=none"], "--uid-map needs --sandbox=namespace"),
        (&["--xattrmap=:bad:both:::"], "rule 1, column 6: unknown scope 'both' (all, client, server)"),
        (
            &["--xattrmap=\n\n:ok:all\n"],
            "rule 1, column 7: the scope is not ended by the rule's separator ':'",
        ),
        (&["--modcaps=+chown:mknod"], "'mknod' starts with neither '+' (keep) nor '-' (drop)"),
        (&["--modcaps=+flying"], "'flying' is not a capability"),
        (
            &["--modcaps=-dac_read_search", "--inode-file-handles=mandatory"],
            "--modcaps drops dac_read_search, which --inode-file-handles=mandatory needs",
        ),
        (&["--sandbox=jail"], "invalid value 'jail' for '--sandbox <MODE>'"),
        (&["--seccomp=allow"], "invalid value 'allow' for '--seccomp <ACTION>'"),
        (&["--log-level=loud"], "invalid value 'loud' for '--log-level <LEVEL>'"),
        (&["--socket-mode=1777"], "expected permission bits in octal, such as 0660"),
        (&["--num-request-queues=0"], "0 is not in 1..=16"),
        (&["--num-request-queues=17"], "17 is not in 1..=16"),
        (&["--queue-size=1000"], "--queue-size 1000: a ring has a power of two of entries, 2 to 32768"),
        (&["--queue-size=65536"], "65536 is not in 2..=32768"),
        (&["--poll-us=10001"], "10001 is not in 0..=10000"),
        (&["--thread-pool-size=-1"], "invalid value '-1' for '--thread-pool-size <N>'"),
        (&["--fd-budget=0"], "a budget of 0 would refuse everything"),
        (&["--max-inodes=many"], "expected a whole number"),
        (
            &["--rlimit-nofile=100"],
            "--rlimit-nofile: the limit of open files is 100, and the daemon itself needs 625",
        ),
        (&["--migration-mode=teleport"], "invalid value 'teleport' for '--migration-mode <MODE>'"),
        (
            &["--migration-mode=file-handles", "--migration-verify-handles"],
            "--migration-verify-handles cannot be used with --migration-mode=file-handles",
        ),
        (
            &["--migration-mode=file-handles", "--migration-confirm-paths"],
            "--migration-confirm-paths cannot be used with --migration-mode=file-handles",
        ),
        (&["-o", "nonsense"], "-o nonsense: unknown option; see -o in --help"),
        (&["-o", "xattr=1"], "-o xattr=1: unknown option; see -o in --help"),
        (&["-o", "cache=never"], "-o cache=never: invalid value (auto, always, metadata, none)"),
        (&["-o", "xattrmap=:bad:all::"], "rule 1, column 11: the prepend field is not ended"),
        (&["-o"], "a value is required for '-o <KEY[=VALUE],...>' but none was supplied"),
    ];
    for (mistake, expected) in cases {
        let line = host.refused(&with(mistake), 2);
        assert!(line.contains(expected), "{mistake:?}: {line}");
    }
}

#[test]
fn what_does_not_fit_the_host_is_refused_with_1() {
    let host = Host::new();
    let cases: &[(&[&str], &str)] = &[
        (
            &["--shared-dir=missing", "--socket-path=s"],
            "--shared-dir missing: no such file or directory; name an existing directory or file",
        ),
        (&["-o", "source=missing", "--socket-path=s"], "--shared-dir missing: no such file or directory"),
        (&["--shared-dir=/dev/null", "--socket-path=s"], "neither a directory nor a regular file"),
        (
            &["--shared-dir=export", "--socket-path=missing/s"],
            "--socket-path: directory missing: no such file or directory; create it or choose another path",
        ),
        (
            &["--shared-dir=export", "--socket-path=file/s"],
            "--socket-path: directory file: is not a directory; create it or choose another path",
        ),
        (
            &["--shared-dir=export", "--socket-path=file"],
            "--socket-path file: exists and is not a socket; remove it or choose another path",
        ),
        (&["--shared-dir=export", "--socket-path=export"], "exists and is not a socket"),
        (&["--shared-dir=export", "--fd=0"], "--fd 0: not a socket but /dev/null"),
        (&["--shared-dir=export", "--fd=99"], "--fd 99: no such open descriptor"),
        (
            &["--shared-dir=export", "--socket-path=s", "--socket-group=no such group"],
            "--socket-group no such group: no such group",
        ),
        (
            &["--shared-dir=export", "--socket-path=s", "--socket-owner=4294967295"],
            "--socket-owner 4294967295: no such user",
        ),
        (
            &["--shared-dir=export", "--socket-path=s", "--rlimit-nofile=99999999999"],
            "the kernel allows at most",
        ),
    ];
    for (words, expected) in cases {
        let line = host.refused(words, 1);
        assert!(line.contains(expected), "{words:?}: {line}");
    }
}

#[test]
fn a_wrong_command_line_is_reported_before_a_missing_directory() {
    let host = Host::new();
    let line = host.refused(&["--shared-dir=missing", "--socket-path=missing/s", "--queue-size=3"], 2);
    assert!(line.contains("--queue-size 3"), "{line}");
}

#[test]
fn over_long_socket_names_are_refused() {
    let host = Host::new();
    let deep = host.path().join("d".repeat(100));
    fs::create_dir(&deep).unwrap();
    let socket = format!("--socket-path={}/{}", deep.display(), "s".repeat(89));
    let line = host.refused(&["--shared-dir=export", &socket], 2);
    assert!(line.ends_with("its file name over 88 bytes; use a shorter file name (try --help)"), "{line}");
}

#[test]
fn chroot_is_for_root() {
    let host = Host::new();
    // A copy, because the build directory may not be open to others.
    let program = host.path().join("backend-fs");
    // By another process: a child that some other test forks meanwhile would inherit the descriptor this
    // process writes to, and a file that is open for writing cannot be executed.
    let copied = Command::new("cp").arg(env!("CARGO_BIN_EXE_backend-fs")).arg(&program).status();
    assert!(copied.unwrap().success());
    let words = with(&["--sandbox=chroot"]);
    let mut command = host.command(&program, &words);
    if rustix::process::geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    let line = one_line(&words, &command.output().unwrap(), 1);
    assert_eq!(line, "--sandbox=chroot needs root; use --sandbox=namespace");
}
