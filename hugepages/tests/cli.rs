//! The command line on a machine made of files: two NUMA nodes, no root needed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Machine {
        let machine = Machine(tempfile::tempdir().unwrap());
        for page in ["hugepages-2048kB", "hugepages-1048576kB"] {
            for file in ["nr_hugepages", "free_hugepages", "surplus_hugepages"] {
                machine.put(&format!("sys/kernel/mm/hugepages/{page}/{file}"), "0\n");
                for node in 0..2 {
                    machine
                        .put(&format!("sys/devices/system/node/node{node}/hugepages/{page}/{file}"), "0\n");
                }
            }
            for file in ["resv_hugepages", "nr_overcommit_hugepages"] {
                machine.put(&format!("sys/kernel/mm/hugepages/{page}/{file}"), "0\n");
            }
        }
        machine.put("sys/devices/system/node/has_memory", "0-1\n");
        for node in 0..2 {
            let text = format!("Node {node} MemTotal: 8388608 kB\nNode {node} MemFree: 4194304 kB\n");
            machine.put(&format!("sys/devices/system/node/node{node}/meminfo"), &text);
        }
        machine
            .put("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 9437184 kB\nHugepagesize: 2048 kB\n");
        machine.put("proc/buddyinfo", "");
        machine.put("proc/sys/vm/compact_memory", "");
        machine.put("proc/self/mountinfo", "");
        machine
    }

    fn put(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn get(&self, path: &str) -> String {
        fs::read_to_string(self.0.path().join(path)).unwrap().trim().to_owned()
    }

    fn nodes(&self, page: &str) -> [String; 2] {
        [0, 1].map(|n| self.get(&format!("sys/devices/system/node/node{n}/hugepages/{page}/nr_hugepages")))
    }

    fn run(&self, args: &[&str]) -> Output {
        let root = self.0.path();
        let mut command = Command::new(env!("CARGO_BIN_EXE_dpu-hugepages"));
        command.arg("--sysroot").arg(root).arg("--state-dir").arg(root.join("run")).args(args);
        command.stdin(Stdio::null()).output().unwrap()
    }

    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, code: i32, args: &[&str]) -> String {
        let output = self.run(args);
        assert_eq!(output.status.code(), Some(code), "{args:?}");
        assert!(output.stdout.is_empty());
        String::from_utf8(output.stderr).unwrap()
    }
}

#[test]
fn pages_are_spread_over_the_nodes_and_come_back() {
    let m = Machine::new();
    assert!(m.ok(&["reserve", "--size", "2G", "--dry-run"]).contains("Node 1: 512 more hugepages of 2M"));
    assert_eq!(m.nodes("hugepages-2048kB"), ["0", "0"]);
    assert!(!m.0.path().join("run").exists(), "a dry run leaves no trace");
    assert_eq!(
        m.ok(&["reserve", "--size", "2G"]),
        "Reserved 1024 hugepages of 2M (2 GiB; node 0: 512, node 1: 512).\n"
    );
    assert_eq!(m.nodes("hugepages-2048kB"), ["512", "512"]);
    m.ok(&["reserve", "--pages", "3", "--page-size", "1G", "--node", "1"]);
    assert_eq!(m.nodes("hugepages-1048576kB"), ["0", "3"]);
    let status = m.ok(&["status"]);
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    assert!(status.lines().any(|l| words(l) == ["2M", "1", "512", "1", "GiB"]), "{status}");
    assert!(status.lines().any(|l| words(l)[..3.min(words(l).len())] == ["1G", "1", "3"]), "{status}");
}

#[test]
fn wrong_use_ends_with_two_and_one_clear_line() {
    let m = Machine::new();
    for (args, part) in [
        (&["reserve", "--pages", "0"][..], "above zero"),
        (&["reserve", "--size", "2G", "--node", "5"], "nodes with memory: 0, 1"),
        (&["reserve", "--size", "2G", "--page-size", "16M"], "it has 2M and 1G"),
        (&["release", "--pages", "4", "--page-size", "2M"], "has reserved only 0"),
        (&["qemu-args", "--size", "5M", "--page-size", "2M"], "use 4M or 6M"),
        (&["mount", "relative"], "absolute"),
        (&["mount", "/x", "--owner", "no-such-user-here"], "there is no user `no-such-user-here`"),
        (&["persist", "--pages", "0"], "above zero"),
        (&["persist", "--pages", "4", "--node", "9"], "node 9 does not exist"),
        (&["doctor", "--pid", "999999999"], "there is no process"),
    ] {
        let error = m.fails(2, args);
        assert!(error.contains(part), "{args:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
    }
    for args in [
        &["reserve"][..],
        &["reserve", "--size", "2"],
        &["reserve", "--size", "2G", "--pages", "1"],
        &["reserve", "--size", "2G", "--add", "--total"],
        &["mount", "--mode", "9"],
        &["persist"],
        &["frobnicate"],
    ] {
        assert!(m.fails(2, args).starts_with("error: "), "{args:?}");
    }
    assert_eq!(m.nodes("hugepages-2048kB"), ["0", "0"]);
}

#[test]
fn memory_that_a_node_does_not_have_is_refused() {
    let m = Machine::new();
    let error = m.fails(1, &["reserve", "--size", "5G", "--node", "0"]);
    assert!(error.contains("node 0: 3.75 GiB") && error.contains("allow more nodes"), "{error}");
    m.ok(&["reserve", "--size", "5G"]);
}

#[test]
fn a_kernel_without_hugepages_is_told_apart() {
    let m = Machine::new();
    fs::remove_dir_all(m.0.path().join("sys/kernel")).unwrap();
    assert!(m.fails(1, &["reserve", "--size", "2G"]).contains("CONFIG_HUGETLBFS"));
    assert!(m.ok(&["status"]).contains("no hugepages"));
    assert!(
        m.ok(&["qemu-args", "--size", "1G", "--page-size", "none"])
            .contains("memory-backend-memfd,id=mem,size=1G,share=on -machine")
    );
}

#[test]
fn without_root_nothing_is_tried() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: becoming another user needs root");
        return;
    }
    // Another user must be able to reach the program.
    let dir = tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o755)).tempdir().unwrap();
    let program = dir.path().join("dpu-hugepages");
    fs::copy(env!("CARGO_BIN_EXE_dpu-hugepages"), &program).unwrap();
    let state = dir.path().join("state");
    for args in [&["reserve", "--pages", "1"][..], &["release"]] {
        let mut command = Command::new(&program);
        command.arg("--state-dir").arg(&state).args(args).uid(65534).gid(65534).stdin(Stdio::null());
        let output = command.output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("needs root"), "{error}");
        assert!(!state.exists());
    }
}

#[test]
fn persist_writes_what_a_boot_reads_and_removes_it() {
    let m = Machine::new();
    let file = "etc/sysctl.d/60-dpu-hugepages.conf";
    assert!(m.ok(&["persist", "--size", "4G"]).contains("takes effect at the next boot"));
    assert!(m.get(file).ends_with("vm.nr_hugepages = 2048"));
    assert!(m.ok(&["persist", "--size", "4G"]).contains("says so already"));
    m.ok(&["persist", "--size", "4G", "--node", "0,1"]);
    assert!(
        m.get("etc/tmpfiles.d/dpu-hugepages.conf")
            .contains("node1/hugepages/hugepages-2048kB/nr_hugepages - - - - 1024")
    );
    assert!(!m.0.path().join(file).exists());
    assert!(
        m.ok(&["persist", "--pages", "4", "--page-size", "1G"]).starts_with("hugepagesz=1G hugepages=4\n")
    );
    assert!(m.ok(&["persist", "--remove"]).contains("Removed"));
    assert_eq!(m.ok(&["persist", "--remove"]), "Nothing to remove.\n");
    m.put("etc/sysctl.d/99-dpdk.conf", "vm.nr_hugepages=7\n");
    assert!(m.ok(&["persist", "--size", "1G"]).contains("99-dpdk.conf sets vm.nr_hugepages as well"));
}

#[test]
fn a_real_sysctl_takes_the_written_file() {
    let m = Machine::new();
    m.ok(&["persist", "--size", "4G"]);
    let Ok(output) = Command::new("sysctl")
        .arg("--dry-run")
        .arg("-p")
        .arg(m.0.path().join("etc/sysctl.d/60-dpu-hugepages.conf"))
        .output()
    else {
        eprintln!("SKIPPED: there is no sysctl");
        return;
    };
    assert_eq!(String::from_utf8_lossy(&output.stdout), "vm.nr_hugepages = 2048\n");
}

#[test]
fn libvirt_elements_are_well_formed() {
    let m = Machine::new();
    let xml = m.ok(&["libvirt-xml", "--size", "4G", "--page-size", "1G", "--node", "0,1"]);
    assert!(
        xml.contains("<page size='1' unit='G'/>")
            && xml.contains("<memory mode='interleave' nodeset='0,1'/>"),
        "{xml}"
    );
    // Every element that is opened is closed, in order.
    let mut open = vec![];
    for tag in xml.split('<').skip(1).map(|t| t.split('>').next().unwrap()) {
        match tag.strip_prefix('/') {
            Some(name) => assert_eq!(open.pop(), Some(name)),
            None if tag.ends_with('/') => {}
            None => open.push(tag.split(' ').next().unwrap()),
        }
    }
    assert!(open.is_empty());
    assert_eq!(m.fails(2, &["libvirt-xml", "--size", "3G", "--page-size", "2G"]).lines().count(), 1);
}

#[test]
fn every_command_explains_itself() {
    let m = Machine::new();
    let help = m.ok(&["--help"]);
    for command in
        ["reserve", "release", "status", "mount", "umount", "qemu-args", "libvirt-xml", "persist", "doctor"]
    {
        assert!(help.contains(command), "{command}");
        assert!(m.ok(&[command, "--help"]).contains("Usage: dpu-hugepages"), "{command}");
    }
    assert!(help.contains("Examples:") && help.contains("Exit status"), "{help}");
    assert!(m.ok(&["completions", "bash"]).contains("complete -F _dpu__hugepages"));
    assert!(m.ok(&["completions", "zsh"]).starts_with("#compdef dpu-hugepages"));
    assert!(m.ok(&["man"]).contains(".TH dpu-hugepages"));
    let dir = m.0.path().join("man");
    m.ok(&["man", "--out-dir", dir.to_str().unwrap()]);
    assert!(Path::new(&dir).join("dpu-hugepages-reserve.1").exists());
}

#[test]
fn a_reader_that_leaves_early_is_no_error() {
    let m = Machine::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dpu-hugepages"));
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = command.arg("--sysroot").arg(m.0.path()).args(["man"]).stdout(writer).output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
