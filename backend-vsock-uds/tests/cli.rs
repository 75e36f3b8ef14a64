//! The program as its callers start it: what it prints where, and how it ends.

#![allow(clippy::expect_used)] // Helpers of tests fail by panicking, like tests.

use std::path::Path;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_backend-vsock-uds")).args(arguments).output().expect("it starts")
}

#[test]
fn mistakes_go_to_stderr_with_exit_code_two() {
    for arguments in [
        &[][..],
        &["--socket", "/nonexistent/s"],
        &["--nonsense"],
        &["--vm", ""],
        &["--vm", "guest-cid=3,socket=/a,uds-path=/b", "--vm", "guest-cid=3,socket=/c,uds-path=/d"],
        &["--socket", "/a", "--forward-cid", "1", "--forward-listen", "1+2"],
        &["positional"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        let message = String::from_utf8(output.stderr).expect("UTF-8");
        assert!(message.starts_with("backend-vsock-uds: ") && message.lines().count() == 1, "{message}");
    }
}

#[test]
fn what_does_not_fit_the_host_is_exit_code_one_and_leaves_no_trace() {
    let directory = tempfile::tempdir().expect("a directory");
    let at = |name: &str| directory.path().join(name).display().to_string();
    std::fs::write(at("file"), "precious").expect("written");
    for arguments in [
        ["--socket", &at("s"), "--uds-path", &at("missing/u")],
        ["--socket", &at("file"), "--uds-path", &at("u")],
        ["--fd", "99", "--uds-path", &at("u")],
        ["--config", &at("missing"), "--log-level", "info"],
    ] {
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(!output.stderr.is_empty() && output.stdout.is_empty());
    }
    let left: Vec<_> = std::fs::read_dir(directory.path()).expect("a directory").collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn a_configuration_file_that_says_nonsense_is_exit_code_two() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("config.yaml");
    for text in ["", "vms: 3", "vms: []", "vms:\n- socket: /s\n  unknown: 1\n", "vms:\n- uds_path: /u\n"] {
        std::fs::write(&file, text).expect("written");
        let output = run(&["--config", file.to_str().expect("UTF-8")]);
        assert_eq!(output.status.code(), Some(2), "{text:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn capabilities_help_and_version_go_to_stdout_with_exit_code_zero() {
    for option in ["--print-capabilities", "--help", "-h", "--version", "-V"] {
        let output = run(&[option]);
        assert_eq!(output.status.code(), Some(0), "{option}");
        assert!(output.stderr.is_empty() && !output.stdout.is_empty(), "{option}");
    }
    let capabilities = String::from_utf8(run(&["--print-capabilities"]).stdout).expect("UTF-8");
    assert!(capabilities.contains("\"type\": \"vsock\""), "{capabilities}");
}

#[test]
fn the_description_for_management_software_names_this_program() {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../share/qemu/vhost-user/60-backend-vsock-uds.json");
    let text = std::fs::read_to_string(file).expect("the description");
    assert!(text.contains("\"type\": \"vsock\"") && text.contains("/backend-vsock-uds\""), "{text}");
}
