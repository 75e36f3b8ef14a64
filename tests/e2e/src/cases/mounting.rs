//! Mounting: the file system appears, tells the host's figures, and can be left and entered again.

use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::dpu::Memory;
use crate::lab::{Lab, MOUNT, Profile, Session, Stage, TAG, mount, unmount};
use crate::registry::{HostMount, hugepages_of};
use crate::side::{DpuSide, HostSide, Side};
use crate::verbs::entry::Attributes;

/// The cases.
pub const CASES: &[Case] = &[
    Case::basic(
        "mount",
        &Profile::AUTO,
        mount_shows_the_export,
        "type, tag, size and free space are the host's",
    ),
    Case::basic("remount", &Profile::AUTO, remount_keeps_everything, "five times out and in again"),
    Case::own("submount", submount_is_announced, "a host mount below the export is a mount in the DPU"),
    Case::own(
        "read-only",
        read_only_export_refuses_changes,
        "EROFS from the daemon, not only from the mount",
    ),
    Case::own("hugepages", hugepage_memory_works, "the same work over hugepage memory"),
];

fn mount_shows_the_export(stage: &mut Stage<'_>) -> Result<String> {
    let line = stage.dpu.shell(&format!("grep ' {MOUNT} ' /proc/mounts"))?;
    ensure!(line.starts_with(&format!("{TAG} {MOUNT} virtiofs rw")), "unexpected mount line: {line}");
    // busybox prints the same fields on both sides: block size, blocks, free blocks of all, inodes.
    let here = rustix::fs::statvfs(stage.host.entry("").as_path()).context("statvfs on the host")?;
    let there = stage.dpu.shell(&format!("stat -f -c '%S %b %c' {MOUNT}"))?;
    let there: Vec<u64> = there.split_whitespace().map_while(|word| word.parse().ok()).collect();
    let here = [here.f_frsize, here.f_blocks, here.f_files];
    ensure!(there[..] == here, "the DPU sees {there:?} (block size, blocks, inodes), the host {here:?}");
    stage.dpu.shell("echo from the DPU > note")?;
    ensure!(stage.host.read("note")? == "from the DPU\n");
    Ok(line.trim().to_owned())
}

fn remount_keeps_everything(stage: &mut Stage<'_>) -> Result<String> {
    let dpu = stage.dpu.dpu;
    for round in 0..5 {
        stage.dpu.shell(&format!("echo {round} >> rounds"))?;
        unmount(dpu)?;
        ensure!(dpu.run(&["ls", MOUNT])?.success()?.is_empty(), "the mount point still shows the export");
        stage.host.write(&format!("while-away-{round}"), "x")?;
        mount(dpu)?;
        let rounds = stage.dpu.shell("wc -l < rounds; ls -d while-away-* | wc -l")?;
        ensure!(rounds.split_whitespace().eq([(round + 1).to_string(), (round + 1).to_string()]), "{rounds}");
    }
    stage.daemon.check_alive()?;
    Ok("5 rounds".to_owned())
}

fn submount_is_announced(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    std::fs::create_dir(export.join("inner")).context("cannot create the mount point")?;
    let inner = HostMount::tmpfs(&export.join("inner"))?;
    std::fs::write(export.join("inner/there"), "in the inner file system").context("cannot write")?;
    let mut daemon = lab.start_daemon(export.path(), &["--announce-submounts"])?;
    let dpu = lab.boot_and_mount(&lab.dpu_config(None, daemon.socket())?)?;
    let side = DpuSide::new(&dpu, MOUNT);
    ensure!(side.shell("cat inner/there")? == "in the inner file system");
    let outer: Attributes = side.ask(&["entry", "stat", &side.path("")])?;
    let inner_root: Attributes = side.ask(&["entry", "stat", &side.path("inner/.")])?;
    ensure!(outer.device != inner_root.device, "both file systems have the device number {:?}", outer.device);
    let mounts = side.shell(&format!("grep ' {MOUNT}/inner ' /proc/mounts"))?;
    ensure!(mounts.contains("virtiofs"), "no mount of its own: {mounts}");
    side.shell("echo back > inner/from-dpu; sync")?;
    ensure!(HostSide::new(export.path())?.read("inner/from-dpu")? == "back\n");
    dpu.run(&["sh", "-c", &format!("umount {MOUNT}/inner; umount {MOUNT}")])?.success()?;
    dpu.power_off()?;
    daemon.expect_end()?;
    drop(inner);
    Ok(mounts.trim().to_owned())
}

fn read_only_export_refuses_changes(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    std::fs::write(export.join("kept"), "kept").context("cannot write")?;
    std::fs::create_dir(export.join("directory")).context("cannot create a directory")?;
    let mut daemon = lab.start_daemon(export.path(), &["--readonly", "--xattr"])?;
    let dpu = lab.boot_and_mount(&lab.dpu_config(None, daemon.socket())?)?;
    let side = DpuSide::new(&dpu, MOUNT);
    ensure!(side.shell("cat kept")? == "kept");
    let changes = [
        "echo x > new",
        "echo x >> kept",
        ": > kept",
        "rm kept",
        "mkdir new",
        "rmdir directory",
        "ln kept new",
        "ln -s kept new",
        "mv kept new",
        "chmod 600 kept",
        "chown 1:1 kept",
        "touch -d @1 kept",
        "truncate -s 0 kept",
        "mknod new p",
    ];
    for change in changes {
        let said = side.run(&["sh", "-c", change])?.failure()?;
        ensure!(said.contains("Read-only file system"), "{change}: {}", said.trim());
    }
    side.refused("EROFS", &["entry", "set-xattr", &side.path("kept"), "user.x", "y"])?;
    ensure!(HostSide::new(export.path())?.read("kept")? == "kept");
    end(&mut daemon, dpu)?;
    Ok(format!("{} changes refused", changes.len() + 1))
}

fn hugepage_memory_works(lab: &Lab) -> Result<String> {
    let profile = Profile { name: "hugepages", memory: Memory::Hugepages, ..Profile::AUTO };
    let mut session = Session::start(lab, &profile)?;
    let used = hugepages_of(session.dpu.pid())?;
    ensure!(used > 16, "only {used} hugepages are in use");
    let stage = session.stage("hugepages")?;
    let (size, block) = ((32 << 20).to_string(), (1 << 20).to_string());
    let file = |side: &dyn Side| side.path("data");
    for (from, to) in [(&stage.dpu as &dyn Side, &stage.host as &dyn Side), (&stage.host, &stage.dpu)] {
        let common = ["--size", &size, "--block", &block];
        from.act(&[&["pattern", "write", "--file", &file(from)], &common[..]].concat())?;
        to.act(&[&["pattern", "check", "--file", &file(to)], &common[..]].concat())?;
    }
    ensure!(Path::new(&stage.host.path("data")).is_file());
    session.end()?;
    Ok(format!("{used} hugepages of 2 MiB in use"))
}

/// Ends a daemon and a DPU in order.
pub(super) fn end(daemon: &mut crate::daemon::Daemon, dpu: crate::dpu::Dpu) -> Result<()> {
    daemon.check_alive()?;
    unmount(&dpu)?;
    crate::lab::check_kernel_log(&dpu)?;
    dpu.power_off()?;
    daemon.expect_end()
}
