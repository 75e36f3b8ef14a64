//! Every option by itself: it exists under virtiofsd's name, takes its value in both spellings, has
//! an effect, and the last one given counts.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::collections::BTreeSet;
use std::ffi::OsString;

use backend_fs::args::Args;
use backend_fs::args::invocation::{Stop, parse};
use clap::CommandFactory;

/// The long options of virtiofsd 1.14.
const VIRTIOFSD: &[&str] = &[
    "shared-dir",
    "tag",
    "socket",
    "socket-path",
    "socket-group",
    "fd",
    "thread-pool-size",
    "xattr",
    "posix-acl",
    "xattrmap",
    "sandbox",
    "readonly",
    "seccomp",
    "announce-submounts",
    "no-announce-submounts",
    "inode-file-handles",
    "cache",
    "allow-mmap",
    "no-readdirplus",
    "writeback",
    "allow-direct-io",
    "print-capabilities",
    "modcaps",
    "log-level",
    "syslog",
    "rlimit-nofile",
    "no-killpriv-v2",
    "killpriv-v2",
    "security-label",
    "uid-map",
    "gid-map",
    "translate-uid",
    "translate-gid",
    "preserve-noatime",
    "migration-mode",
    "migration-on-error",
    "migration-verify-handles",
    "migration-confirm-paths",
    "help",
    "version",
];

/// A value for every option that takes one, different from its default.
const VALUES: &[(&str, &str)] = &[
    ("shared-dir", "/srv/share"),
    ("tag", "myfs"),
    ("socket", "fs.sock"),
    ("socket-path", "fs.sock"),
    ("socket-group", "kvm"),
    ("socket-owner", "1000"),
    ("socket-mode", "0660"),
    ("fd", "3"),
    ("thread-pool-size", "64"),
    ("xattrmap", ":map::user.virtiofs.:"),
    ("sandbox", "Chroot"),
    ("seccomp", "log"),
    ("inode-file-handles", "never"),
    ("cache", "NEVER"),
    ("modcaps", "-mknod:+sys_admin"),
    ("log-level", "TRACE"),
    ("rlimit-nofile", "0"),
    ("uid-map", ":0:100000:65536:"),
    ("gid-map", ":0:100000:65536:"),
    ("translate-uid", "squash-host:0:65534:1000"),
    ("translate-gid", "forbid-guest:1000:1000"),
    ("migration-mode", "file-handles"),
    ("migration-on-error", "abort"),
    ("num-request-queues", "1"),
    ("queue-size", "1024"),
    ("poll-us", "0"),
    ("fd-budget", "5000"),
    ("max-inodes", "1"),
    ("generate", "man"),
];

/// Options whose value is optional and therefore needs `=`.
const NEEDS_EQUALS: &[&str] = &["posix-acl", "security-label"];

fn args(words: &[&str]) -> Result<Args, Stop> {
    let mut argv: Vec<OsString> = vec!["backend-fs".into()];
    argv.extend(words.iter().map(OsString::from));
    parse(argv)
}

/// What a command line was understood as.
fn understood(words: &[&str]) -> String {
    format!("{:?}", args(words).unwrap_or_else(|stop| panic!("{words:?}: {stop:?}")))
}

fn refused(words: &[&str]) -> String {
    match args(words) {
        Err(Stop::Usage(message)) => message,
        other => panic!("{words:?} was not refused: {other:?}"),
    }
}

fn long_options() -> BTreeSet<String> {
    Args::command().get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)).collect()
}

#[test]
fn every_option_of_virtiofsd_exists() {
    let ours = long_options();
    let missing: Vec<_> = VIRTIOFSD.iter().filter(|name| !ours.contains(**name)).collect();
    assert!(missing.is_empty(), "missing: {missing:?}");
    for short in ['o', 'd', 'f', 'h', 'V'] {
        assert!(Args::command().get_arguments().any(|arg| arg.get_short() == Some(short)), "-{short}");
    }
}

#[test]
fn every_option_has_help_under_a_heading() {
    for arg in Args::command().get_arguments() {
        assert!(arg.get_help().is_some() && arg.get_help_heading().is_some() || arg.is_hide_set(), "{arg}");
    }
}

#[test]
fn every_value_is_taken_in_both_spellings() {
    for (name, value) in VALUES {
        let (option, joined) = (format!("--{name}"), format!("--{name}={value}"));
        let apart = understood(&[&option, value]);
        assert_eq!(apart, understood(&[&joined]), "{joined}");
        assert_ne!(apart, understood(&[]), "{joined} has no effect");
    }
    let covered: BTreeSet<&str> =
        VALUES.iter().map(|(name, _)| *name).chain(NEEDS_EQUALS.iter().copied()).collect();
    for arg in Args::command().get_arguments().filter(|arg| arg.get_action().takes_values()) {
        let name = arg.get_long().unwrap_or("o");
        assert!(name == "o" || covered.contains(name), "no value for --{name} in this test");
    }
}

#[test]
fn every_flag_has_an_effect() {
    for arg in Args::command().get_arguments() {
        let (Some(name), clap::ArgAction::SetTrue) = (arg.get_long(), arg.get_action()) else { continue };
        assert_ne!(understood(&[&format!("--{name}")]), understood(&[]), "--{name}");
    }
}

#[test]
fn the_old_name_of_a_file_handle_mode_is_the_new_one() {
    assert_eq!(understood(&["--inode-file-handles=fallback"]), understood(&["--inode-file-handles=prefer"]));
}

#[test]
fn optional_values_need_an_equals_sign() {
    for name in NEEDS_EQUALS {
        let option = format!("--{name}");
        assert_eq!(understood(&[&option]), understood(&[&format!("{option}=always")]));
        assert_ne!(understood(&[&format!("{option}=auto")]), understood(&[&option]));
        assert_eq!(understood(&[&format!("{option}=never")]), understood(&[]));
        assert_eq!(refused(&[&option, "auto"]), "unexpected argument 'auto' found (try --help)");
    }
}

#[test]
fn the_last_of_a_repeated_option_counts() {
    for pair in [
        ["--cache=auto", "--cache=always"],
        ["--shared-dir=/a", "--shared-dir=/b"],
        ["--posix-acl", "--posix-acl=never"],
        ["--modcaps=+chown", "--modcaps=-chown"],
        ["--log-level=off", "--log-level=debug"],
    ] {
        assert_eq!(understood(&pair), understood(&pair[1..]), "{pair:?}");
    }
    for pair in [
        ["--no-announce-submounts", "--announce-submounts"],
        ["--killpriv-v2", "--no-killpriv-v2"],
        ["--xattr", "--no-xattr"],
        ["--no-host-locks", "--host-locks"],
    ] {
        assert_eq!(understood(&pair), understood(&pair[1..]), "{pair:?}");
        let reversed = [pair[1], pair[0]];
        assert_eq!(understood(&reversed), understood(&pair[..1]), "{reversed:?}");
    }
}

#[test]
fn maps_add_up() {
    let args =
        args(&["--translate-uid=map:0:1:1", "--translate-uid", "map:5:6:1", "--uid-map=:0:1:1:"]).unwrap();
    assert_eq!((args.translate_uid.len(), args.uid_map.len()), (2, 1));
}

#[test]
fn legacy_options_count_wherever_they_stand() {
    let expected = args(&["--cache=never", "--sandbox=chroot"]).unwrap();
    for words in [
        &["-o", "cache=none,sandbox=chroot", "--cache=auto"][..],
        &["--cache=auto", "-ocache=none", "-o", "sandbox=chroot"],
        &["-o", "cache=auto", "-f", "-o=cache=none,sandbox=chroot", "--"],
    ] {
        let args = args(words).unwrap();
        assert_eq!((args.cache, args.sandbox), (expected.cache, expected.sandbox), "{words:?}");
    }
}

#[test]
fn debug_wins_over_every_log_level() {
    let debug = args(&["--log-level=debug"]).unwrap().log_level;
    assert_eq!(args(&["-d", "-o", "loglevel=err", "--log-level=off"]).unwrap().log_level, debug);
}

#[test]
fn paths_need_not_be_utf8() {
    use std::os::unix::ffi::OsStringExt;
    let path = OsString::from_vec(b"/srv/\xff".to_vec());
    let args = parse(vec!["backend-fs".into(), "--shared-dir".into(), path.clone()]).unwrap();
    assert_eq!(args.shared_dir.unwrap().into_os_string(), path);
}
