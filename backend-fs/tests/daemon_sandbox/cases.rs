//! The cases, by subject: paths, descriptors, identity, system calls, life and death.

use std::collections::BTreeMap;
use std::time::Duration;

use rustix::mount::{MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, unmount};
use rustix::process::Signal;

use crate::forbidden;
use crate::run::{NOBODY, PATIENCE, Place, Ran, wait_for};

type Case = (&'static str, fn());

macro_rules! cases {
    ($($name:ident),* $(,)?) => { &[$((stringify!($name), $name as fn())),*] };
}

pub const ALL: &[Case] = cases![
    nothing_outside_is_reachable_in_a_namespace,
    nothing_outside_is_reachable_by_landlock_where_the_root_stays,
    file_handles_leave_procfs_reachable_from_a_chroot,
    symbolic_links_end_inside,
    path_descriptors_can_be_reopened_in_every_mode,
    readonly_export_is_readonly_in_the_kernel,
    device_nodes_mean_nothing_in_a_namespace,
    root_and_proc_can_be_exported,
    later_mounts_of_the_host_appear,
    only_known_descriptors_are_open,
    capabilities_are_the_documented_ones,
    unprivileged_daemon_has_no_capabilities_outside_its_namespace,
    missing_capability_is_refused,
    supervisor_is_sealed_too,
    namespaces_are_the_documented_ones,
    server_is_pid_1_without_groups,
    id_maps_take_the_setuid_helper,
    forbidden_calls_kill,
    forbidden_calls_are_let_through_by_log,
    forbidden_calls_trap,
    needed_calls_pass,
    exit_codes_are_mirrored,
    death_by_signal_is_reported,
    signals_end_it_within_a_second,
    stuck_server_is_killed,
    second_signal_kills_at_once,
    server_dies_with_its_supervisor,
    nothing_stays_behind,
];

const MODES: [&str; 3] = ["namespace", "chroot", "none"];

/// Ways to something outside, for `reach`.
fn ways_out(place: &Place) -> Vec<String> {
    let secret = place.path("outside/secret");
    let secret = secret.to_str().unwrap();
    let up = "../".repeat(12);
    vec![
        secret.into(),
        "../outside/secret".into(),
        format!("{up}{secret}"),
        format!("../root{secret}"),
        format!("../cwd/{up}{secret}"),
        format!("{up}proc/1/root{secret}"),
        format!("/proc/self/root{secret}"),
        format!("/proc/1/root{secret}"),
        "out".into(),
        "up".into(),
        "../environ".into(),
        "../../sys/kernel/core_pattern".into(),
        "../../sysrq-trigger".into(),
        "/etc/passwd".into(),
        format!("{up}etc/passwd"),
    ]
}

/// What was reached, by `start path`.
fn reached(place: &Place, probe: crate::run::Probe) -> BTreeMap<String, String> {
    let ways = ways_out(place);
    let ways: Vec<&str> = ways.iter().map(String::as_str).collect();
    let out = probe.arg("reach").args(&ways).run().good();
    let lines: BTreeMap<_, _> = out
        .lines()
        .map(|line| {
            let (way, what) = line.split_at(line.rfind(" inode ").or_else(|| line.rfind(" errno ")).unwrap());
            (way.to_owned(), what.trim().to_owned())
        })
        .collect();
    assert_eq!(lines.len(), 3 * ways.len(), "{out}");
    lines
}

fn assert_nothing_reached(what: &str, reached: &BTreeMap<String, String>) {
    let beyond: Vec<_> = reached.iter().filter(|(_, got)| got.starts_with("inode ")).collect();
    assert!(beyond.is_empty(), "{what}: {beyond:#?}");
}

fn nothing_outside_is_reachable_in_a_namespace() {
    let place = Place::new();
    assert_nothing_reached("root", &reached(&place, place.probe("namespace", "none")));
    assert_nothing_reached(
        "file handles",
        &reached(&place, place.probe("namespace", "none").arg("--handles")),
    );
    assert_nothing_reached("nobody", &reached(&place, place.probe("namespace", "none").by_nobody()));
}

fn nothing_outside_is_reachable_by_landlock_where_the_root_stays() {
    let place = Place::new();
    assert_nothing_reached("chroot", &reached(&place, place.probe("chroot", "none")));
    assert_nothing_reached("none", &reached(&place, place.probe("none", "none")));
    assert_nothing_reached(
        "none, nobody",
        &reached(&place, place.probe("none", "none").by_nobody().arg("--handles")),
    );
}

/// The documented limit of mode `chroot`; if it goes away, so must the documentation.
fn file_handles_leave_procfs_reachable_from_a_chroot() {
    let place = Place::new();
    let secret = format!("inode {}", place.inode("outside/secret"));
    let reached = reached(&place, place.probe("chroot", "none").arg("--handles"));
    let (by_descriptors, by_paths): (Vec<_>, Vec<_>) =
        reached.iter().filter(|(_, got)| **got == secret).partition(|(way, _)| way.starts_with("fds "));
    assert!(!by_descriptors.is_empty());
    assert!(by_paths.is_empty(), "{by_paths:?}");
}

fn symbolic_links_end_inside() {
    let place = Place::new();
    // What the absolute link points to exists inside as well: that is the one to be found.
    let inner = place.path("export").join(place.path("outside/secret").strip_prefix("/").unwrap());
    std::fs::create_dir_all(inner.parent().unwrap()).unwrap();
    std::fs::write(&inner, "inner").unwrap();
    for mode in ["namespace", "chroot"] {
        let out = place.probe(mode, "none").args(&["reach", "out"]).run().good();
        let inner =
            format!("inode {}", std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&inner).unwrap()));
        assert!(out.contains(&format!("cwd out {inner}")), "{mode}: {out}");
        assert!(out.contains(&format!("root out {inner}")), "{mode}: {out}");
    }
}

fn path_descriptors_can_be_reopened_in_every_mode() {
    let place = Place::new();
    for mode in MODES {
        for handles in [&["--handles"][..], &[]] {
            let reopen = |name| place.probe(mode, "none").args(handles).args(&["reopen", name]).run().good();
            assert_eq!(reopen("inside"), "inside", "{mode} {handles:?}");
            assert_eq!(reopen("out"), format!("errno {}", libc::ELOOP), "{mode} {handles:?}");
        }
    }
    for mode in ["namespace", "none"] {
        let out = place.probe(mode, "none").by_nobody().args(&["reopen", "inside"]).run().good();
        assert_eq!(out, "inside", "{mode} as nobody");
    }
}

fn readonly_export_is_readonly_in_the_kernel() {
    let place = Place::new();
    let write = |arguments: &[&str]| {
        place.probe("namespace", "none").args(arguments).args(&["write", "new"]).run().good()
    };
    assert_eq!(write(&["--readonly"]), format!("errno {}", libc::EROFS));
    assert!(!place.path("export/new").exists());
    assert_eq!(write(&[]), "wrote 1");
    assert_eq!(std::fs::read(place.path("export/new")).unwrap(), b"x");
    let nobody = place.probe("namespace", "none").by_nobody().args(&["--readonly", "write", "other"]);
    assert_eq!(nobody.run().good(), format!("errno {}", libc::EROFS));
}

/// Not even `/dev/null`; in the other modes a server that opened nodes would reach the device.
fn device_nodes_mean_nothing_in_a_namespace() {
    let place = Place::new();
    let null = rustix::fs::makedev(1, 3);
    let kind = rustix::fs::FileType::CharacterDevice;
    let mode = rustix::fs::Mode::from_raw_mode(0o666);
    rustix::fs::mknodat(rustix::fs::CWD, place.path("export/null"), kind, mode, null).unwrap();
    let reach = |mode| place.probe(mode, "none").args(&["reach", "null"]).run().good();
    assert!(
        reach("namespace").contains(&format!("root null errno {}", libc::EACCES)),
        "{}",
        reach("namespace")
    );
    assert!(reach("chroot").contains("root null inode "), "{}", reach("chroot"));
}

fn root_and_proc_can_be_exported() {
    let place = Place::new();
    let secret = place.path("outside/secret");
    let by_root = secret.strip_prefix("/").unwrap().to_str().unwrap();
    for mode in MODES {
        let out = place.probe(mode, "none").args(&["--export=/", "reopen", by_root]).run().good();
        assert_eq!(out, "secret", "{mode}");
    }
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let out = place
        .probe("namespace", "none")
        .args(&["--export=/proc/sys", "reopen", "kernel/osrelease"])
        .run()
        .good();
    assert_eq!(out, release.trim_end());
}

/// A shared mount that goes away with the case.
struct SharedMount(std::path::PathBuf);

impl Drop for SharedMount {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn later_mounts_of_the_host_appear() {
    let place = Place::new();
    let export = place.path("export");
    std::fs::create_dir(export.join("later")).unwrap();
    mount_bind(&export, &export).unwrap();
    let shared = SharedMount(export.clone());
    mount_change(&export, MountPropagationFlags::SHARED).unwrap();
    let mut running = place.probe("namespace", "none").args(&["appears", "later/file"]).start();
    assert_eq!(running.line(), "waiting");
    mount("later", export.join("later"), "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let later = SharedMount(export.join("later"));
    std::fs::write(export.join("later/file"), "it did").unwrap();
    assert_eq!(running.line(), "it did");
    running.finish().good();
    drop((later, shared));
}

fn only_known_descriptors_are_open() {
    let place = Place::new();
    let out = place.probe("namespace", "none").arg("descriptors").run().good();
    let mut targets: Vec<&str> = out
        .lines()
        .map(|line| line.split_once(" -> ").unwrap())
        .filter(|(number, _)| number.parse::<u32>().unwrap() > 2)
        .map(|(_, target)| target)
        .collect();
    targets.sort();
    // The export's root, the list of descriptors (open, and open for reading it), and the signals.
    assert_eq!(targets, ["/", "/", "/", "anon_inode:[signalfd]"], "{out}");
}

const KEPT: &str =
    "CAP_CHOWN CAP_DAC_OVERRIDE CAP_FOWNER CAP_FSETID CAP_MKNOD CAP_SETFCAP CAP_SETGID CAP_SETUID";
const KEPT_FOR_HANDLES: &str = "CAP_CHOWN CAP_DAC_OVERRIDE CAP_DAC_READ_SEARCH CAP_FOWNER CAP_FSETID CAP_MKNOD \
                                CAP_SETFCAP CAP_SETGID CAP_SETUID";

fn capabilities_listing(kept: &str, handles: bool) -> String {
    format!(
        "effective: {kept}\npermitted: {kept}\ninheritable: \nbounding: \nambient: \nno_new_privs: true\n\
         file handles: {handles}"
    )
}

fn capabilities_are_the_documented_ones() {
    let place = Place::new();
    for mode in MODES {
        let now =
            |arguments: &[&str]| place.probe(mode, "none").args(arguments).arg("capabilities").run().good();
        assert_eq!(now(&[]), capabilities_listing(KEPT, false), "{mode}");
        assert_eq!(now(&["--handles"]), capabilities_listing(KEPT_FOR_HANDLES, true), "{mode}");
        let fewer = KEPT.replace(" CAP_MKNOD", "").replace("CAP_CHOWN ", "");
        assert_eq!(now(&["--modcaps=-mknod:-chown"]), capabilities_listing(&fewer, false), "{mode}");
        let more = format!("{KEPT} CAP_SYS_ADMIN");
        assert_eq!(now(&["--modcaps=+sys_admin"]), capabilities_listing(&more, false), "{mode}");
    }
}

fn unprivileged_daemon_has_no_capabilities_outside_its_namespace() {
    let place = Place::new();
    let out = place.probe("none", "none").by_nobody().args(&["--handles", "capabilities"]).run().good();
    assert!(out.starts_with("effective: \npermitted: \ninheritable: \n"), "{out}");
    assert!(out.ends_with("ambient: \nno_new_privs: true\nfile handles: false"), "{out}");
    let out = place.probe("namespace", "none").by_nobody().arg("capabilities").run().good();
    assert_eq!(out, capabilities_listing(KEPT, false));
}

fn missing_capability_is_refused() {
    let place = Place::new();
    let mut probe = place.probe("none", "none").args(&["--modcaps=+sys_boot", "capabilities"]);
    // Without SYS_BOOT in the bounding set, the new program does not get it.
    let drop_it = || caps::drop(None, caps::CapSet::Bounding, caps::Capability::CAP_SYS_BOOT);
    // SAFETY: one prctl; nothing that other threads could hold.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut probe.command, move || {
            drop_it().map_err(std::io::Error::other)
        });
    }
    let ran = probe.run();
    assert_eq!(ran.code, Some(1));
    assert_eq!(ran.err, "probe: --modcaps: cannot keep CAP_SYS_BOOT: the daemon was started without it");
}

fn status_field(pid: i32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(&format!("{field}:"))).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

fn supervisor_is_sealed_too() {
    let place = Place::new();
    for mode in MODES {
        let mut running = place.probe(mode, "kill").arg("stay").start();
        assert_eq!(running.line(), "waiting");
        let supervisor = running.pid().as_raw_nonzero().get();
        let dac_override = format!("{:016x}", 1u64 << (caps::Capability::CAP_DAC_OVERRIDE as u8));
        assert_eq!(status_field(supervisor, "CapEff"), dac_override, "{mode}");
        assert_eq!(status_field(supervisor, "CapPrm"), dac_override, "{mode}");
        assert_eq!(status_field(supervisor, "CapBnd"), format!("{:016x}", 0), "{mode}");
        assert_eq!(status_field(supervisor, "NoNewPrivs"), "1", "{mode}");
        assert_eq!(status_field(supervisor, "Seccomp"), "2", "{mode}");
        assert_eq!(status_field(running.server(), "Seccomp"), "2", "{mode}");
        assert_eq!(status_field(running.server(), "NoNewPrivs"), "1", "{mode}");
    }
}

/// Which namespaces of the server are not this process's.
fn own_namespaces(server: i32) -> Vec<&'static str> {
    let link = |pid: &str, name: &str| std::fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    let server = server.to_string();
    let names = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];
    names.into_iter().filter(|name| link("self", name) != link(&server, name)).collect()
}

fn namespaces_are_the_documented_ones() {
    let place = Place::new();
    let check = |probe: crate::run::Probe, expected: &[&str]| {
        let mut running = probe.arg("stay").start();
        assert_eq!(running.line(), "waiting");
        assert_eq!(own_namespaces(running.server()), expected);
        let supervisor = running.pid().as_raw_nonzero().get();
        assert_eq!(own_namespaces(supervisor), [""; 0], "the supervisor stays outside");
    };
    check(place.probe("namespace", "none"), &["mnt", "net", "pid"]);
    check(place.probe("namespace", "none").by_nobody(), &["mnt", "net", "pid", "user"]);
    check(place.probe("chroot", "none"), &[]);
    check(place.probe("none", "none"), &[]);
}

fn server_is_pid_1_without_groups() {
    let place = Place::new();
    let identity = |probe: crate::run::Probe| probe.arg("identity").run().good();
    let mut with_groups = place.probe("namespace", "none");
    let groups = [1, 2, 3].map(rustix::process::Gid::from_raw);
    // SAFETY: one system call; nothing that other threads could hold.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut with_groups.command, move || {
            Ok(rustix::thread::set_thread_groups(&groups)?)
        });
    }
    assert_eq!(identity(with_groups), "pid 1 uid 0 gid 0 groups 0 root's owner 0");
    let plain = identity(place.probe("namespace", "none").by_nobody());
    assert_eq!(plain, format!("pid 1 uid {NOBODY} gid {NOBODY} groups 0 root's owner {NOBODY}"));
    // The one own id as root of the namespace; other users of the host are nobody there.
    let as_root = place.probe("namespace", "none").by_nobody();
    let as_root = as_root.args(&[&format!("--uid-map=:0:{NOBODY}:1:"), &format!("--gid-map=:0:{NOBODY}:1:")]);
    assert_eq!(identity(as_root), "pid 1 uid 0 gid 0 groups 0 root's owner 65534");
    assert!(identity(place.probe("none", "none")).ends_with("uid 0 gid 0 groups 0 root's owner 0"));
}

/// Larger maps: by `newuidmap` as `/etc/subuid` allows, or, where that is not installed, an error that
/// names the package.
fn id_maps_take_the_setuid_helper() {
    let place = Place::new();
    let subid = place.path("subid");
    std::fs::write(&subid, format!("{NOBODY}:100000:65536\n")).unwrap();
    // In a mount namespace of its own, so that the host's files stay as they are.
    let with_subids = |mut probe: crate::run::Probe| {
        let subid = subid.clone();
        // SAFETY: system calls only; nothing that other threads could hold.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut probe.command, move || {
                rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS)?;
                mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
                mount_bind(&subid, "/etc/subuid")?;
                mount_bind(&subid, "/etc/subgid")?;
                rustix::thread::set_thread_groups(&[])?;
                let nobody = rustix::process::Gid::from_raw(NOBODY);
                rustix::thread::set_thread_res_gid(nobody, nobody, nobody)?;
                let nobody = rustix::process::Uid::from_raw(NOBODY);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody)?;
                Ok(())
            });
        }
        probe
    };
    let installed = std::process::Command::new("newuidmap").output().is_ok();
    let maps = ["--uid-map=:0:100000:1000:", "--gid-map=:0:100000:1000:", "identity"];
    let ran = with_subids(place.probe("namespace", "none").args(&maps)).run();
    if installed {
        assert_eq!(ran.good(), "pid 1 uid 0 gid 0 groups 0 root's owner 65534");
        let beyond = ["--uid-map=:0:200000:1000:", "--gid-map=:0:100000:1000:", "identity"];
        let ran = with_subids(place.probe("namespace", "none").args(&beyond)).run();
        assert_eq!(ran.code, Some(1));
        assert!(ran.err.contains("newuidmap: ") && ran.err.contains("/etc/subuid"), "{}", ran.err);
    } else {
        assert_eq!(ran.code, Some(1));
        assert!(ran.err.contains("newuidmap") && ran.err.contains("package uidmap"), "{}", ran.err);
    }
}

fn forbidden_calls_kill() {
    let place = Place::new();
    assert!(forbidden::names().count() >= 20);
    for name in forbidden::names() {
        let ran = place.probe("none", "kill").args(&["forbidden", name]).run();
        assert_eq!((ran.code, ran.out.as_str()), (Some(128 + libc::SIGSYS), ""), "{name}: {ran:?}");
        assert!(
            ran.err.contains("(SIGSYS): it made a system call that is not on the allow list"),
            "{}",
            ran.err
        );
    }
    for mode in ["namespace", "chroot"] {
        let ran = place.probe(mode, "kill").args(&["forbidden", "execve"]).run();
        assert_eq!(ran.code, Some(128 + libc::SIGSYS), "{mode}: {ran:?}");
    }
}

fn forbidden_calls_are_let_through_by_log() {
    let place = Place::new();
    for name in forbidden::names() {
        let ran = place.probe("none", "log").args(&["forbidden", name]).run();
        assert!(ran.out.starts_with("survived "), "{name}: {ran:?}");
        ran.good();
    }
}

fn forbidden_calls_trap() {
    let place = Place::new();
    for mode in MODES {
        let ran = place.probe(mode, "trap").args(&["forbidden", "execve"]).run();
        assert_eq!((ran.code, ran.out.as_str()), (Some(128 + libc::SIGSYS), ""), "{mode}: {ran:?}");
    }
}

fn needed_calls_pass() {
    let place = Place::new();
    for mode in MODES {
        let out = place.probe(mode, "kill").arg("needed").run().good();
        assert!(out.ends_with(" calls and a thread: 7"), "{mode}: {out}");
    }
}

fn exit_codes_are_mirrored() {
    let place = Place::new();
    for mode in MODES {
        for code in [0, 1, 42] {
            let ran = place.probe(mode, "kill").args(&["exit", &code.to_string()]).run();
            assert_eq!((ran.code, ran.err.as_str()), (Some(code), ""), "{mode}");
        }
        let ran = place.probe(mode, "kill").arg("panic").run();
        assert_eq!(ran.code, Some(101), "{mode}: {ran:?}");
    }
}

fn death_by_signal_is_reported() {
    let place = Place::new();
    for mode in MODES {
        let ran = place.probe(mode, "kill").arg("abort").run();
        // Pid 1 of a namespace cannot be ended by SIGABRT; the C library then makes a fault.
        let signal = if mode == "namespace" { libc::SIGSEGV } else { libc::SIGABRT };
        assert_eq!(ran.code, Some(128 + signal), "{mode}: {ran:?}");
        assert!(ran.err.contains(&format!("was killed by signal {signal}")), "{mode}: {ran:?}");

        let mut running = place.probe(mode, "kill").arg("stay").start();
        assert_eq!(running.line(), "waiting");
        let server = rustix::process::Pid::from_raw(running.server()).unwrap();
        rustix::process::kill_process(server, Signal::KILL).unwrap();
        let ran = running.finish();
        assert_eq!(ran.code, Some(128 + libc::SIGKILL), "{mode}: {ran:?}");
    }
}

fn signals_end_it_within_a_second() {
    let place = Place::new();
    for mode in MODES {
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let mut running = place.probe(mode, "kill").arg("wait").start();
            assert_eq!(running.line(), "waiting");
            running.signal(signal);
            let Ran { code, out, took, .. } = running.finish();
            assert_eq!((code, out.as_str()), (Some(0), "signal 15"), "{mode} {signal:?}");
            assert!(took < Duration::from_secs(1), "{mode} {signal:?}: {took:?}");
        }
    }
}

fn stuck_server_is_killed() {
    let place = Place::new();
    let mut running = place.probe("namespace", "kill").arg("stay").start();
    assert_eq!(running.line(), "waiting");
    running.signal(Signal::TERM);
    let ran = running.finish();
    assert_eq!(ran.code, Some(1));
    assert_eq!(ran.err, "probe: the serving process did not end within 3 seconds and was killed");
    assert!(ran.took > Duration::from_millis(2900), "{:?}", ran.took);
}

fn second_signal_kills_at_once() {
    let place = Place::new();
    let mut running = place.probe("none", "kill").arg("stay").start();
    assert_eq!(running.line(), "waiting");
    running.signal(Signal::TERM);
    let server = running.server();
    // The first must have been taken before the second is sent, or both are one.
    wait_for("the first signal to be forwarded", PATIENCE, || {
        u64::from_str_radix(&status_field(server, "ShdPnd"), 16).unwrap() & (1 << (libc::SIGTERM - 1)) != 0
    });
    running.signal(Signal::TERM);
    let ran = running.finish();
    assert_eq!(ran.code, Some(1));
    assert!(ran.took < Duration::from_secs(2), "{:?}", ran.took);
}

fn is_gone(pid: i32) -> bool {
    !std::path::Path::new(&format!("/proc/{pid}")).exists() || status_field(pid, "State").starts_with('Z')
}

fn server_dies_with_its_supervisor() {
    let place = Place::new();
    for mode in MODES {
        let mut running = place.probe(mode, "kill").arg("stay").start();
        assert_eq!(running.line(), "waiting");
        let server = running.server();
        running.signal(Signal::KILL);
        wait_for("the server's end", PATIENCE, || is_gone(server));
    }
}

fn nothing_stays_behind() {
    let mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let place = Place::new();
    for mode in MODES {
        let mut running = place.probe(mode, "kill").arg("wait").start();
        assert_eq!(running.line(), "waiting");
        let server = running.server();
        assert_eq!(mounts(), before, "{mode}: mounts of the sandbox show outside");
        running.signal(Signal::TERM);
        running.finish();
        assert!(is_gone(server), "{mode}");
    }
    assert_eq!(mounts(), before);
    assert_eq!(std::fs::read_dir(place.path("")).unwrap().count(), 3);
}
