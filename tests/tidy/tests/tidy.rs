//! The rules the tree keeps. Each test prints every place that breaks its rule.

#![allow(clippy::expect_used, reason = "a tree that cannot be read fails the test")]

use tidy::{Crate, Source, crates, root, sources};

/// Lines of one file without its tests; more than one subject beyond that.
const FILE_BUDGET: usize = 800;
/// Lines of a file that holds only tests.
const TEST_FILE_BUDGET: usize = 1500;

/// The only files with `unsafe` code, by path or by folder (ending in `/`).
const UNSAFE_FILES: &[&str] = &[
    "backend-fs/vring/src/memory.rs",
    "backend-fs/vring/src/ring.rs",
    "backend-fs/vring/src/chain.rs",
    "backend-fs/vring/src/sigbus.rs",
    "backend-fs/src/host/sys.rs",
    "backend-fs/src/sandbox/",
    "backend-fs/tests/daemon_sandbox/",
    "backend-vsock-uds/src/host/sys.rs",
    "backend-vsock-uds/src/sandbox/",
    "hugepages/src/sys.rs",
    "tests/e2e/src/sys.rs",
    "tests/virtio-driver/src/memory.rs",
    "tests/virtio-driver/src/ring.rs",
    "tests/virtio-driver/src/sys.rs",
];

/// Files that parse or decide and must stay free of system calls and `unsafe`.
const PURE_FILES: &[&str] = &[
    "backend-fs/src/fuse/init.rs",
    "backend-fs/src/fuse/request.rs",
    "backend-fs/src/host/idmap.rs",
    "backend-fs/src/host/xattrmap.rs",
    "backend-fs/vring/src/message.rs",
    "backend-fs/vring/src/poll.rs",
    "backend-vsock-uds/src/conn/credit.rs",
    "backend-vsock-uds/src/conn/machine.rs",
    "backend-vsock-uds/src/conn/txbuf.rs",
    "backend-vsock-uds/src/host/hello.rs",
    "backend-vsock-uds/src/mux/deadline.rs",
    "backend-vsock-uds/src/mux/quotas.rs",
    "backend-vsock-uds/src/mux/rxq.rs",
    "backend-vsock-uds/src/mux/table.rs",
    "backend-vsock-uds/src/packet.rs",
    "backend-vsock-uds/src/route.rs",
    "hugepages/src/plan.rs",
];

fn check(rule: &str, broken: Vec<String>) {
    assert!(broken.is_empty(), "{rule}\n  {}", broken.join("\n  "));
}

fn all_sources() -> Vec<Source> {
    let sources = sources().expect("the tree can be read");
    assert!(sources.len() > 20, "the walk found only {} files", sources.len());
    sources
}

#[test]
fn every_file_says_what_it_is_for() {
    let broken = all_sources()
        .into_iter()
        .filter(|source| !source.text.starts_with("//!"))
        .map(|source| source.path)
        .collect();
    check("every .rs file opens with a `//!` header", broken);
}

#[test]
fn files_keep_their_budget() {
    let broken = all_sources()
        .into_iter()
        .filter_map(|source| {
            let (lines, budget) = if source.is_test() {
                (source.text.lines().count(), TEST_FILE_BUDGET)
            } else {
                (source.product_lines(), FILE_BUDGET)
            };
            (lines > budget).then(|| format!("{}: {lines} lines, budget {budget}", source.path))
        })
        .collect();
    check("one subject per file", broken);
}

#[test]
fn unsafe_stays_in_the_named_files() {
    let allowed = |path: &str| {
        UNSAFE_FILES.iter().any(|place| path == *place || (place.ends_with('/') && path.starts_with(place)))
    };
    let broken = all_sources()
        .into_iter()
        .filter(|source| !allowed(&source.path))
        .flat_map(|source| {
            let places: Vec<_> = source
                .code_lines()
                .filter(|(_, line)| {
                    line.contains("unsafe {")
                        || line.contains("unsafe impl")
                        || line.contains("unsafe fn")
                        || line.contains("unsafe extern")
                })
                .filter(|_| source.path != "tests/tidy/tests/tidy.rs")
                .map(|(number, _)| format!("{}:{number}", source.path))
                .collect();
            places
        })
        .collect();
    check("`unsafe` only in the files that tests/tidy names", broken);
}

#[test]
fn pure_files_forbid_unsafe() {
    let sources = all_sources();
    let broken = PURE_FILES
        .iter()
        .filter(|path| {
            !sources
                .iter()
                .any(|source| source.path == **path && source.text.contains("#![forbid(unsafe_code)]"))
        })
        .map(|path| (*path).to_owned())
        .collect();
    check("parsers and deciders say `#![forbid(unsafe_code)]`", broken);
}

#[test]
fn nothing_sleeps_for_luck() {
    let broken = all_sources()
        .into_iter()
        .filter(|source| source.path != "tests/tidy/tests/tidy.rs")
        .flat_map(|source| {
            let lines: Vec<&str> = source.text.lines().collect();
            let places: Vec<_> = source
                .code_lines()
                .filter(|(_, line)| {
                    line.contains("thread::sleep(") || line.trim_start().starts_with("sleep(")
                })
                // A sleep is legal only inside a loop that watches a deadline, and says so.
                .filter(|(number, _)| {
                    !lines[number.saturating_sub(4)..*number].iter().any(|line| line.contains("wait-loop:"))
                })
                .map(|(number, _)| format!("{}:{number}", source.path))
                .collect();
            places
        })
        .collect();
    check(
        "wait for a condition with a deadline (mark the loop `// wait-loop: <condition>`), never sleep for luck",
        broken,
    );
}

#[test]
fn no_test_is_switched_off_and_nothing_is_left_open() {
    let forbidden = ["#[ignore", "#[should_panic", "todo!(", "unimplemented!(", "TODO", "FIXME", "XXX"];
    let broken = all_sources()
        .into_iter()
        .filter(|source| source.path != "tests/tidy/tests/tidy.rs")
        .flat_map(|source| {
            let places: Vec<_> = source
                .text
                .lines()
                .enumerate()
                .filter(|(_, line)| forbidden.iter().any(|word| line.contains(word)))
                .map(|(index, line)| format!("{}:{}: {}", source.path, index + 1, line.trim()))
                .collect();
            places
        })
        .collect();
    check("no switched-off test, nothing left open", broken);
}

#[test]
fn no_grab_bag_modules() {
    let grab_bags = ["common", "utils", "util", "helpers", "helper", "manager", "misc"];
    let broken = all_sources()
        .into_iter()
        .filter(|source| source.path.split(['/', '.']).any(|part| grab_bags.contains(&part)))
        .map(|source| source.path)
        .collect();
    check("a module is named for its one job", broken);
}

/// `docs/architecture.md`: who may depend on whom among the workspace's own crates.
const ARROWS: &[(&str, &[&str])] = &[
    ("vring", &[]),
    ("hugepages", &[]),
    ("backend-fs", &["vring", "hugepages"]),
    ("backend-vsock-uds", &["vring"]),
];

#[test]
fn dependencies_follow_the_arrows() {
    let crates = crates().expect("the manifests can be read");
    let mut broken = Vec::new();
    for Crate { name, folder, dependencies, shipped } in crates.values() {
        let is_test = folder.starts_with("tests/");
        if !is_test {
            let allowed = ARROWS.iter().find(|(from, _)| from == name).map(|(_, to)| *to);
            match allowed {
                None => broken.push(format!("{name}: not in the table of arrows")),
                Some(allowed) => {
                    for dependency in shipped.iter().filter(|dependency| crates.contains_key(*dependency)) {
                        if !allowed.contains(&dependency.as_str()) {
                            broken.push(format!("{name} -> {dependency}"));
                        }
                    }
                }
            }
        }
        for dependency in dependencies {
            let into_tests = crates.get(dependency).is_some_and(|target| target.folder.starts_with("tests/"));
            if into_tests && !is_test {
                broken.push(format!("{name} -> {dependency}: only tests depend on tests"));
            }
        }
    }
    check("dependencies follow docs/architecture.md", broken);
}

#[test]
fn readme_commands_exist() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md");
    let makefile = std::fs::read_to_string(root().join("Makefile")).expect("Makefile");
    let broken = readme
        .lines()
        .filter_map(|line| line.trim().trim_start_matches("$ ").strip_prefix("make "))
        .filter_map(|rest| rest.split_whitespace().find(|word| !word.contains('=')))
        .filter(|target| !makefile.lines().any(|line| line.starts_with(&format!("{target}:"))))
        .map(|target| format!("README.md: make {target}"))
        .collect();
    check("every `make` line of the README is a target", broken);
}
