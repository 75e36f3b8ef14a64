//! What the program prints and then ends: capabilities, help, version, man page, completions.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::process::{Command, Output, Stdio};

use backend_fs::args::Args;
use clap::CommandFactory;

fn run(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_backend-fs")).args(words).stdin(Stdio::null()).output().unwrap()
}

fn printed(words: &[&str]) -> String {
    let output = run(words);
    assert_eq!(output.status.code(), Some(0), "{words:?}");
    assert!(output.stderr.is_empty(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn capabilities_are_only_json() {
    let text = printed(&["--print-capabilities"]);
    assert!(text.ends_with("}\n"), "{text}");
    let expected = r#"{
        "type": "fs",
        "features": ["posix-acl-negotiation-mode", "security-label-negotiation-mode", "separate-options"]
    }"#;
    assert_eq!(json(&text), json(expected));
}

#[test]
fn capabilities_ignore_everything_else() {
    let expected = printed(&["--print-capabilities"]);
    for words in [
        &["--print-capabilities", "--shared-dir=/missing", "--socket-path=/missing/s"][..],
        &["--nonsense", "--print-capabilities"],
        &["--fd=99", "--socket-group=kvm", "--print-capabilities", "-o", "nonsense"],
    ] {
        assert_eq!(printed(words), expected, "{words:?}");
    }
}

/// QEMU's `docs/interop/vhost-user.json`; libvirt drops every description when one has an unknown type.
#[test]
fn the_installed_description_says_what_the_program_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../share/qemu/vhost-user/60-backend-fs.json");
    let mut description = json(&std::fs::read_to_string(path).unwrap());
    let description = description.as_object_mut().unwrap();
    assert!(description.remove("description").unwrap().is_string());
    let binary = description.remove("binary").unwrap();
    assert_eq!(binary.as_str(), Some("/usr/libexec/backend-fs"));
    assert_eq!(serde_json::Value::Object(description.clone()), json(&printed(&["--print-capabilities"])));
}

/// Names of the options that help must list.
fn visible() -> Vec<String> {
    let command = Args::command();
    let name = |arg: &clap::Arg| match (arg.get_long(), arg.get_short()) {
        (Some(long), _) => format!("--{long}"),
        (None, Some(short)) => format!("-{short}"),
        (None, None) => panic!("{arg} is positional"),
    };
    command.get_arguments().filter(|arg| !arg.is_hide_set()).map(name).collect()
}

#[test]
fn help_explains_every_option_and_keeps_its_width() {
    let help = printed(&["--help"]);
    let listed: Vec<&str> = help
        .lines()
        .flat_map(|line| line.split_whitespace().take_while(|word| word.starts_with('-')))
        .map(|word| word.split(['[', '=', ',']).next().unwrap())
        .collect();
    for name in visible() {
        assert!(listed.contains(&name.as_str()), "{name}");
    }
    for part in ["Usage:", "Export:", "Endpoint:", "Isolation:", "Examples:", "Environment:", "Exit status:"]
    {
        assert!(help.contains(part), "{part}");
    }
    for line in help.lines().chain(printed(&["-h"]).lines()) {
        assert!(line.chars().count() <= 100, "{line}");
    }
}

#[test]
fn the_summary_fits_beside_the_long_help() {
    let (short, long) = (printed(&["-h"]), printed(&["--help"]));
    assert!(short.lines().count() * 2 < long.lines().count());
    assert!(short.contains("--shared-dir <DIR>") && short.contains("'--help' explains every option"));
}

/// The thing on the other side of the socket is a DPU. "guest" is only left in virtiofsd's own words.
#[test]
fn help_calls_the_dpu_by_its_name() {
    let help = printed(&["--help"]);
    let legacy = ["squash-guest", "forbid-guest", "guest-error", "'guest:DPU"];
    let rest = legacy.iter().fold(help, |text, word| text.replace(word, ""));
    assert!(!rest.contains("guest"));
}

#[test]
fn examples_in_help_are_command_lines_that_parse() {
    let help = printed(&["--help"]).replace("\\\n", " ");
    let examples: Vec<&str> = help.lines().filter(|line| line.starts_with("    backend-fs ")).collect();
    assert!(examples.len() >= 4, "{examples:?}");
    for example in examples {
        let argv = example.trim_end_matches('&').split_whitespace().map(Into::into).collect();
        assert!(backend_fs::args::invocation::parse(argv).is_ok(), "{example}");
    }
}

#[test]
fn version_names_the_program() {
    let expected = format!("backend-fs {}\n", env!("CARGO_PKG_VERSION"));
    assert_eq!((printed(&["-V"]), printed(&["--version"])), (expected.clone(), expected));
}

#[test]
fn man_page_has_every_visible_option() {
    let man = printed(&["--generate", "man"]).replace("\\-", "-");
    assert!(man.contains(".TH backend-fs 1"));
    for name in visible() {
        assert!(man.contains(&name), "{name}");
    }
    for section in ["EXAMPLES", "ENVIRONMENT", "FILES", "EXIT STATUS"] {
        let headings = [format!(".SH {section}\n"), format!(".SH \"{section}\"\n")];
        assert!(headings.iter().any(|heading| man.contains(heading)), "{section}");
    }
}

#[test]
fn completions_offer_options_and_values() {
    for (shell, marks) in [
        ("bash", [" backend-fs\n", "--inode-file-handles", "metadata"]),
        ("zsh", ["#compdef backend-fs", "--inode-file-handles", "metadata"]),
        ("fish", ["complete -c backend-fs", "-l inode-file-handles", "metadata"]),
    ] {
        let script = printed(&["--generate", shell]);
        for mark in marks {
            assert!(script.contains(mark), "{shell}: {mark}");
        }
    }
}

#[test]
fn a_closed_pipe_is_no_failure() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = Command::new(env!("CARGO_BIN_EXE_backend-fs"))
        .arg("--help")
        .stdout(writer)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert_eq!((output.status.code(), output.stderr), (Some(0), Vec::new()));
}

#[test]
fn a_full_disk_is_a_failure() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_backend-fs"))
        .arg("--print-capabilities")
        .stdout(full)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
        .wait_with_output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let expected = "backend-fs: cannot write to stdout: No space left on device (os error 28)\n";
    assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
}
