//! The real thing: pools of the running kernel, real processes that hold pages, real mounts, a real QEMU.
//!
//! These tests need root and change the machine's hugepage pools, so one lock file serialises them, across test
//! binaries as well. Each puts back what it took, also when it fails. Without root they say that they were skipped.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use hugepages::backing::{Backing, BackingError, Wish};
use hugepages::plan::{Goal, Request, plan};
use hugepages::probe::{Placement, Region, Source, probe_file, probe_region};
use hugepages::reserve::{Reservation, reserve};
use hugepages::size::PageSize;
use hugepages::state::StateDir;
use hugepages::status::{self, Hold};
use hugepages::sysfs::Host;
use rustix::fs::FlockOperation;
use serde_json::Value;

const PAGE: PageSize = PageSize::M2;

/// Sole use of the pools, and a record of its own. Dropping it releases whatever is still recorded.
struct Pools {
    host: Host,
    dir: tempfile::TempDir,
    before: u64,
    _lock: File,
}

impl Pools {
    fn take() -> Option<Pools> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: changing hugepage pools needs root");
            return None;
        }
        let path = std::env::temp_dir().join("dpu-hugepages-test.lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap();
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
        let host = Host::default();
        let before = total(&host);
        Some(Pools { host, dir: tempfile::tempdir().unwrap(), before, _lock: lock })
    }

    fn state(&self) -> StateDir {
        StateDir::at(self.dir.path())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dpu-hugepages"));
        command.args(["--state-dir".as_ref(), self.dir.path().as_os_str()]).args(args);
        command.stdin(Stdio::null());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs a command that must succeed; its standard output.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that must fail with 1; its one-line error.
    fn fails(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {error}");
        assert_eq!(error.lines().count(), 1, "{error}");
        error
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    fn grown(&self) -> i64 {
        total(&self.host) as i64 - self.before as i64
    }
}

impl Drop for Pools {
    fn drop(&mut self) {
        let _ = self.run(&["release", "--lazy"]);
    }
}

fn total(host: &Host) -> u64 {
    let pool = host.pool(PAGE).unwrap();
    pool.total - pool.surplus
}

fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        // wait-loop: `condition`, until the deadline.
        std::thread::sleep(Duration::from_millis(1));
    }
}

struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU that is stopped before its first instruction.
fn qemu(args: &[String]) -> Running {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-display", "none", "-accel", "tcg", "-S"]).args(args);
    Running(
        command.stdin(Stdio::null()).spawn().expect("these tests need QEMU: apt-get install qemu-system-x86"),
    )
}

fn request(pages: u64, goal: Goal) -> Request {
    Request { pages, goal, nodes: vec![], check_memory: true }
}

#[test]
fn what_was_reserved_is_there_and_release_restores_the_number() {
    let Some(pools) = Pools::take() else { return };
    let text = pools.ok(&["reserve", "--pages", "16", "--page-size", "2M", "--add"]);
    assert!(text.contains("Reserved 16 hugepages of 2M (32 MiB"), "{text}");
    assert_eq!(pools.grown(), 16);
    let status = pools.json(&["status", "--json"]);
    let recorded: u64 =
        status["recorded"].as_array().unwrap().iter().map(|r| r["pages"].as_u64().unwrap()).sum();
    assert_eq!(recorded, 16);
    assert!(pools.ok(&["status"]).contains("Reserved by dpu-hugepages"));
    // A part, then the rest.
    pools.ok(&["release", "--page-size", "2M", "--size", "10M"]);
    assert_eq!(pools.grown(), 11);
    pools.ok(&["release"]);
    assert_eq!(pools.grown(), 0);
    assert!(pools.ok(&["release"]).contains("Nothing to release"));
}

#[test]
fn asking_twice_changes_nothing() {
    let Some(pools) = Pools::take() else { return };
    pools.ok(&["reserve", "--pages", "16", "--page-size", "2M"]);
    let grown = pools.grown();
    assert!(pools.ok(&["reserve", "--size", "32M", "--page-size", "2M"]).contains("Nothing to do"));
    let total = (pools.before as i64 + grown).to_string();
    assert!(
        pools.ok(&["reserve", "--pages", &total, "--page-size", "2M", "--total"]).contains("Nothing to do")
    );
    assert_eq!(pools.grown(), grown);
    let taken = pools.json(&["reserve", "--pages", "3", "--page-size", "2M", "--add", "--json"]);
    assert_eq!((taken["taken"].as_u64(), pools.grown()), (Some(3), grown + 3));
}

#[test]
fn more_than_the_machine_has_is_refused_untouched() {
    let Some(pools) = Pools::take() else { return };
    let error = pools.fails(&["reserve", "--size", "100T", "--page-size", "2M"]);
    for part in ["not enough free memory", "100 TiB", "node 0:", "ask for less"] {
        assert!(error.contains(part), "{part} in {error}");
    }
    assert_eq!(pools.grown(), 0);
    assert!(!pools.dir.path().join("state.json").exists());
}

#[test]
fn a_reservation_given_up_half_way_leaves_the_pool_as_it_was() {
    let Some(pools) = Pools::take() else { return };
    for drop_it in [false, true] {
        let plan = plan(&request(300, Goal::Add), &pools.host.topology(PAGE).unwrap()).unwrap();
        let record = pools.state().lock(&pools.host).unwrap();
        let mut reservation = Reservation::begin(&pools.host, record, &plan).unwrap();
        assert!(!reservation.step().unwrap());
        let done = reservation.progress().done as i64;
        assert!(done > 0 && pools.grown() == done);
        if drop_it {
            drop(reservation);
        } else {
            assert_eq!(reservation.roll_back().unwrap(), 0);
        }
        assert_eq!(pools.grown(), 0);
        assert_eq!(pools.state().read(&pools.host).unwrap(), []);
    }
}

#[test]
fn control_c_gives_everything_back() {
    let Some(pools) = Pools::take() else { return };
    // The signal may come when all is done already; then there is another try.
    for _ in 0..20 {
        let args = ["reserve", "--size", "2G", "--page-size", "2M", "--add"];
        let mut child = pools.command(&args).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("the first pages", || pools.grown() > 0);
        rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT)
            .unwrap();
        if child.wait().unwrap().code() == Some(1) {
            let mut error = String::new();
            std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut error).unwrap();
            assert!(error.contains("interrupted: all pages were given back"), "{error}");
            assert_eq!(pools.grown(), 0);
            return;
        }
        pools.ok(&["release"]);
        assert_eq!(pools.grown(), 0);
    }
    panic!("20 reservations ended before a signal could reach them");
}

#[test]
fn after_a_kill_release_still_knows_what_was_taken() {
    let Some(pools) = Pools::take() else { return };
    let args = ["reserve", "--size", "2G", "--page-size", "2M", "--add"];
    let mut child = pools.command(&args).stdout(Stdio::null()).spawn().unwrap();
    wait_for("the first pages", || pools.grown() > 0);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(pools.grown() > 0);
    pools.ok(&["release"]);
    assert_eq!(pools.grown(), 0);
}

#[test]
fn pages_in_use_are_not_released_and_their_user_is_named() {
    let Some(pools) = Pools::take() else { return };
    pools.ok(&["reserve", "--pages", "8", "--page-size", "2M"]);
    let own = std::process::id();
    // Every idle page, so that none is left to give back.
    let pool = pools.host.pool(PAGE).unwrap();
    let size = (pool.free - pool.reserved) * PAGE.bytes();
    let backing =
        Backing::create(&Wish { name: "pool-test", size, huge: Some(PAGE), ..Wish::default() }).unwrap();

    let (holders, _) = status::holders(&pools.host, false);
    let holder =
        holders.iter().find(|h| h.pid == own && h.path.contains("pool-test")).expect("the open memfd");
    assert_eq!((holder.hold, holder.bytes, holder.page_size), (Hold::Open, size, PAGE));

    let error = pools.fails(&["release"]);
    assert!(
        error.contains("in use") && error.contains(&format!("pid {own}")) && error.contains("--lazy"),
        "{error}"
    );
    let grown = pools.grown();
    assert!(pools.ok(&["release", "--lazy"]).contains("go when their user ends"));
    assert!(pools.grown() < grown, "surplus pages are not the pool's");
    drop(backing);
    wait_for("the last page", || pools.host.pool(PAGE).unwrap().total <= pools.before);
    assert_eq!(pools.grown(), 0);
}

#[test]
fn the_printed_lines_start_a_qemu_on_hugepages() {
    let Some(pools) = Pools::take() else { return };
    pools.ok(&["reserve", "--size", "64M", "--page-size", "2M"]);
    let node = pools.host.nodes().unwrap()[0].to_string();
    for extra in [&["--attach", "machine"][..], &["--attach", "numa", "--node", &node]] {
        let base = ["qemu-args", "--json", "--size", "64M", "--page-size", "2M"];
        let args = pools.json(&[&base[..], extra].concat());
        let args: Vec<String> = serde_json::from_value(args).unwrap();
        let qemu = qemu(&args);
        let pid = qemu.0.id();
        let held = || {
            let (holders, _) = status::holders(&pools.host, false);
            holders.into_iter().find(|h| h.pid == pid && h.hold == Hold::Mapped && h.bytes == 64 << 20)
        };
        wait_for("QEMU with 64M of hugepages", || held().is_some());
        let holder = held().unwrap();
        assert!(holder.shared && holder.path.starts_with("/memfd:"), "{holder:?}");
        assert_eq!(holder.nodes.values().sum::<u64>(), 64 << 20, "{holder:?}");
        let table = pools.ok(&["status"]);
        assert!(
            table
                .lines()
                .any(|l| l.contains(&pid.to_string()) && l.contains("64 MiB") && l.contains("shared")),
            "{table}"
        );

        // What a daemon would be handed.
        let fd = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .flatten()
            .find(|e| {
                std::fs::read_link(e.path()).is_ok_and(|l| {
                    l.starts_with("/memfd:memory-backend-memfd (deleted)")
                        || l.to_string_lossy().starts_with("/memfd:memory-backend-memfd")
                })
            })
            .expect("QEMU holds its memfd");
        let file = OpenOptions::new().read(true).write(true).open(fd.path()).unwrap();
        let region = Region { fd: file.as_fd(), offset: 0, size: 64 << 20, front_end: Some(pid as i32) };
        let kind = probe_region(region).unwrap();
        assert_eq!((&kind.source, kind.huge(), kind.sealed), (&Source::HugetlbMemfd, Some(PAGE), true));
        assert!(matches!(kind.placement, Placement::Nodes(_)), "{kind}");
        assert!(
            kind.to_string().starts_with("DPU memory: 64 MiB shared, memfd on hugepages of 2M"),
            "{kind}"
        );
        drop(file);
        drop(qemu);
        wait_for("QEMU's pages back", || pools.host.pool(PAGE).unwrap().free >= 32);
    }
}

#[test]
fn promised_pages_are_not_available_and_their_owner_is_seen() {
    let Some(pools) = Pools::take() else { return };
    pools.ok(&["reserve", "--size", "64M", "--page-size", "2M"]);
    let args = pools.json(&["qemu-args", "--json", "--size", "64M", "--page-size", "2M", "--no-prealloc"]);
    let args: Vec<String> = serde_json::from_value(args).unwrap();
    let before = pools.host.pool(PAGE).unwrap().reserved;
    let qemu = qemu(&args);
    wait_for("the promise", || pools.host.pool(PAGE).unwrap().reserved > before);
    let found = || {
        pools.json(&["status", "--json"])["holders"]
            .as_array()
            .unwrap()
            .iter()
            .any(|h| h["pid"] == qemu.0.id())
    };
    wait_for("QEMU among the holders", found);
    let output = pools.run(&["doctor", "--size", "64M", "--page-size", "2M", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let free =
        report["findings"].as_array().unwrap().iter().find(|f| f["check"] == "hugepages-free").unwrap();
    assert_eq!(free["level"], "fail");
    assert!(free["fix"].as_str().unwrap().starts_with("dpu-hugepages reserve --size 64M"), "{free}");
}

#[test]
fn the_doctor_finds_enough_pages_once_they_are_reserved() {
    let Some(pools) = Pools::take() else { return };
    let check = || {
        let output = pools.run(&["doctor", "--size", "32M", "--page-size", "2M", "--json"]);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let level = |name: &str| {
            report["findings"]
                .as_array()
                .unwrap()
                .iter()
                .find(|f| f["check"] == name)
                .map(|f| f["level"].clone())
        };
        (level("hugepages-free").unwrap(), level("memfd").unwrap())
    };
    pools.ok(&["reserve", "--size", "32M", "--page-size", "2M"]);
    assert_eq!(check(), (Value::from("ok"), Value::from("ok")));
}

#[test]
fn a_doctor_sees_a_running_qemu_without_shared_memory() {
    let Some(pools) = Pools::take() else { return };
    let socket = pools.dir.path().join("s");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let chardev = format!("socket,id=c,path={}", socket.display());
    let args = ["-m", "16M", "-chardev", &chardev, "-device", "vhost-user-fs-pci,chardev=c,tag=t"];
    let qemu = qemu(&args.map(str::to_owned));
    let pid = format!("QEMU process {}", qemu.0.id());
    let named = || String::from_utf8(pools.run(&["doctor"]).stdout).unwrap();
    wait_for("the finding", || named().lines().any(|l| l.starts_with("FAIL") && l.contains(&pid)));
}

#[test]
fn a_hugetlbfs_is_mounted_once_with_its_options_and_goes_away() {
    let Some(pools) = Pools::take() else { return };
    let path = pools.dir.path().join("huge pages");
    let path = path.to_str().unwrap();
    struct Mounted<'a>(&'a str);
    impl Drop for Mounted<'_> {
        fn drop(&mut self) {
            let _ = rustix::mount::unmount(self.0, rustix::mount::UnmountFlags::DETACH);
        }
    }
    let _mounted = Mounted(path);
    pools.ok(&["reserve", "--pages", "4", "--page-size", "2M"]);
    let args = [
        "mount",
        path,
        "--page-size",
        "2M",
        "--size",
        "8M",
        "--owner",
        "nobody",
        "--group",
        "7",
        "--mode",
        "1770",
    ];
    assert!(pools.ok(&args).starts_with("Mounted hugetlbfs"));
    assert!(pools.ok(&args).contains("mounted so already"));
    let error = pools.fails(&["mount", path, "--page-size", "2M"]);
    assert!(error.contains("different hugetlbfs") && error.contains("size=8M"), "{error}");
    let meta = std::fs::metadata(path).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!((meta.uid(), meta.gid(), meta.mode() & 0o7777), (65534, 7, 0o1770));

    // A file that somebody left: listed, called abandoned, and its pages come back with it.
    let file = Path::new(path).join("rtemap_0");
    let free = pools.host.pool(PAGE).unwrap().free;
    rustix::fs::fallocate(File::create(&file).unwrap(), rustix::fs::FallocateFlags::empty(), 0, 4 << 20)
        .unwrap();
    assert_eq!(pools.host.pool(PAGE).unwrap().free, free - 2);
    let opened = OpenOptions::new().read(true).write(true).open(&file).unwrap();
    let kind = probe_file(&opened).unwrap();
    assert_eq!((kind.source, kind.page_size, kind.allocated), (Source::HugetlbFile, PAGE.bytes(), 4 << 20));
    let entry = |status: &Value| {
        status["files"].as_array().unwrap().iter().find(|f| f["path"] == file.to_str().unwrap()).cloned()
    };
    assert_eq!(entry(&pools.json(&["status", "--json"])).unwrap()["used"], true);
    assert!(pools.fails(&["umount", path]).contains("in use"));
    drop(opened);
    assert_eq!(entry(&pools.json(&["status", "--json"])).unwrap()["used"], false);
    let doctor = String::from_utf8(pools.run(&["doctor"]).stdout).unwrap();
    assert!(doctor.contains("rtemap_0 holds 4 MiB of hugepages and no process has it open"), "{doctor}");
    std::fs::remove_file(&file).unwrap();
    assert_eq!(pools.host.pool(PAGE).unwrap().free, free);
    assert!(pools.ok(&["umount", path]).contains("Unmounted"));
    assert!(pools.fails(&["umount", path]).contains("no hugetlbfs is mounted"));
}

#[test]
fn a_promise_to_a_mount_that_the_pool_cannot_keep_is_explained() {
    let Some(pools) = Pools::take() else { return };
    let path = pools.dir.path().join("promise");
    let error = pools.fails(&["mount", path.to_str().unwrap(), "--page-size", "2M", "--min-size", "64T"]);
    assert!(error.contains("dpu-hugepages reserve --size 65536G"), "{error}");
    assert!(!path.exists());
}

#[test]
fn hugepage_memory_is_bound_to_its_node_and_recognised() {
    let Some(pools) = Pools::take() else { return };
    reserve(&pools.host, pools.state().lock(&pools.host).unwrap(), PAGE, &request(8, Goal::Available))
        .unwrap();
    let node = pools.host.nodes().unwrap()[0];
    let wish = Wish { name: "bound", size: 16 << 20, huge: Some(PAGE), node: Some(node), ..Wish::default() };
    let backing = Backing::create(&wish).unwrap();
    let kind = probe_file(&backing).unwrap();
    assert_eq!(kind.placement, Placement::Nodes(vec![node]));
    assert_eq!(
        kind.to_string(),
        format!(
            "DPU memory: 16 MiB shared, memfd on hugepages of 2M, named `bound`, NUMA node {node}, sealed"
        )
    );
    // A front end's region need not begin or end on a hugepage.
    let region = Region { fd: backing.as_fd(), offset: 0xc0000, size: 0x54321, front_end: None };
    assert_eq!(probe_region(region).unwrap().size, 0x54321);
}

#[test]
fn the_probe_takes_no_page_from_the_pool() {
    let Some(pools) = Pools::take() else { return };
    reserve(&pools.host, pools.state().lock(&pools.host).unwrap(), PAGE, &request(8, Goal::Available))
        .unwrap();
    let wish = Wish { name: "lazy", size: 16 << 20, huge: Some(PAGE), prefault: false, ..Wish::default() };
    let backing = Backing::create(&wish).unwrap();
    let before = pools.host.pool(PAGE).unwrap();
    let kind = probe_file(&backing).unwrap();
    assert_eq!((kind.placement, kind.allocated), (Placement::Unknown, 0));
    assert_eq!(pools.host.pool(PAGE).unwrap(), before);
}

#[test]
fn a_pool_that_runs_dry_is_an_error_not_a_signal() {
    let Some(pools) = Pools::take() else { return };
    let pool = pools.host.pool(PAGE).unwrap();
    let size = (pool.free + 1) * PAGE.bytes();
    let error = Backing::create(&Wish { size, huge: Some(PAGE), ..Wish::default() }).unwrap_err();
    assert!(matches!(error, BackingError::PoolTooSmall { .. }), "{error}");
    assert_eq!(pools.host.pool(PAGE).unwrap().free, pool.free);
}

#[test]
fn a_gigantic_page_comes_whole_or_not_at_all() {
    let Some(pools) = Pools::take() else { return };
    if !pools.host.page_sizes().unwrap().contains(&PageSize::G1) {
        eprintln!("SKIPPED: this CPU or kernel has no 1G pages");
        return;
    }
    let before = pools.host.pool(PageSize::G1).unwrap().total;
    let output = pools.run(&["reserve", "--pages", "1", "--page-size", "1G", "--add"]);
    let error = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => {
            assert_eq!(pools.host.pool(PageSize::G1).unwrap().total, before + 1);
            pools.ok(&["release"]);
        }
        // Memory too full or too fragmented for a whole GiB: that must be said, with what helps.
        code => assert!(
            code == Some(1) && (error.contains("persist") || error.contains("ask for less")),
            "{error}"
        ),
    }
    assert_eq!(pools.host.pool(PageSize::G1).unwrap().total, before);
}
