//! Queues: many of them, small ones, full ones.

use anyhow::{Context, Result, ensure};

use super::Case;
use super::mounting::end;
use crate::dpu::{RUN_LIMIT, program};
use crate::kernel::KernelLine;
use crate::lab::{Lab, MOUNT, Profile, Stage};
use crate::side::{DpuSide, Side};

/// Several request queues, which Linux uses since 6.11.
const MULTI: Profile = Profile {
    name: "multi-queue",
    kernel: Some(KernelLine::V6_12),
    request_queues: 4,
    processors: 4,
    daemon: &["--cache=auto", "--xattr", "--posix-acl"],
    ..Profile::AUTO
};

/// The newer kernel with what older ones lack, on one queue.
const NEWER: Profile = Profile {
    name: "newer-kernel",
    kernel: Some(KernelLine::V6_12),
    daemon: &["--cache=auto", "--xattr", "--posix-acl"],
    ..Profile::AUTO
};

/// The cases.
pub const CASES: &[Case] = &[
    Case::basic("newer-kernel", &NEWER, newer_kernel, "Linux 6.12 mounts and works"),
    Case::basic("extra-groups", &NEWER, extra_groups, "a supplementary group lets its member create"),
    Case::basic("multi-queue", &MULTI, every_queue_is_used, "four request queues, all of them used"),
    Case::basic(
        "multi-queue-load",
        &MULTI,
        load_on_all_queues,
        "eight writers on four queues, every byte checked",
    ),
    Case::own("small-queue", small_queue, "a queue of 16 entries is full most of the time"),
];

fn newer_kernel(stage: &mut Stage<'_>) -> Result<String> {
    stage.dpu.shell(
        "for n in $(seq 100); do echo $n > f$n; done; mkdir d; mv f* d; ls d | wc -l | grep -qx 100",
    )?;
    super::content::pattern(&stage.dpu, "write", "file", 16 << 20, &[])?;
    super::content::pattern(&stage.host, "check", "file", 16 << 20, &[])?;
    Ok(stage.dpu.dpu.kernel.clone())
}

fn extra_groups(stage: &mut Stage<'_>) -> Result<String> {
    let dpu = &stage.dpu;
    dpu.shell("mkdir team; chgrp 3003 team; chmod 770 team")?;
    super::attributes::shell_as(
        dpu,
        1001,
        1001,
        &[5, 3003],
        "echo x > team/file; mkdir team/dir; cat team/file",
    )?;
    use std::os::unix::fs::MetadataExt;
    let meta = std::fs::metadata(stage.host.entry("team/file")).context("team/file is missing")?;
    ensure!((meta.uid(), meta.gid()) == (1001, 1001), "{}:{}", meta.uid(), meta.gid());
    ensure!(super::attributes::shell_as(dpu, 1002, 1002, &[5], "echo x > team/file2").is_err());
    Ok(String::new())
}

/// The interrupt counts of the request queues, summed over processors.
fn interrupts(side: &DpuSide<'_>) -> Result<Vec<u64>> {
    let text = side.shell("grep -E 'virtio[0-9]+-requests' /proc/interrupts || true")?;
    Ok(text
        .lines()
        .map(|line| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum())
        .collect())
}

fn every_queue_is_used(stage: &mut Stage<'_>) -> Result<String> {
    let dpu = &stage.dpu;
    let before = interrupts(dpu)?;
    ensure!(before.len() == 4, "{} request queues have an interrupt", before.len());
    for processor in 0..4 {
        dpu.shell(&format!(
            "taskset -c {processor} sh -ec 'for n in $(seq 100); do echo $n > f{processor}; done; cat f{processor}'"
        ))?;
    }
    let used: Vec<u64> = interrupts(dpu)?.iter().zip(&before).map(|(now, before)| now - before).collect();
    ensure!(used.iter().all(|count| *count > 20), "completions by queue: {used:?}");
    Ok(format!("completions by queue: {used:?}"))
}

fn load_on_all_queues(stage: &mut Stage<'_>) -> Result<String> {
    let dpu = &stage.dpu;
    let tool = dpu.tool();
    let all = |verb: &str| {
        format!(
            "pids=; for n in 0 1 2 3 4 5 6 7; do taskset -c $((n % 4)) {tool} do pattern {verb} --file f$n \
             --size 4194304 --block 16384 --seed $n --random --direct > out$n & pids=\"$pids $!\"; done; \
             for pid in $pids; do wait $pid; done"
        )
    };
    dpu.shell(&all("write"))?;
    for seed in 0..8 {
        let seed = seed.to_string();
        super::content::pattern(&stage.host, "check", &format!("f{seed}"), 4 << 20, &["--seed", &seed])?;
    }
    dpu.shell(&all("check"))?;
    // Names too: eight processes in one directory.
    dpu.shell(
        "mkdir d; pids=; for n in 0 1 2 3 4 5 6 7; do (for m in $(seq 50); do echo $n > d/$n-$m; mv d/$n-$m d/$n.$m; done) & \
         pids=\"$pids $!\"; done; for pid in $pids; do wait $pid; done",
    )?;
    let names = std::fs::read_dir(stage.host.entry("d")).context("cannot list")?.count();
    ensure!(names == 400, "{names} names");
    Ok("8 x 4 MiB".to_owned())
}

fn small_queue(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    let mut daemon = lab.start_daemon(export.path(), &["--cache=auto"])?;
    let mut config = lab.dpu_config(None, daemon.socket())?;
    for device in &mut config.devices {
        device.queue_size = 16;
    }
    let dpu = lab.boot_and_mount(&config)?;
    let side = DpuSide::new(&dpu, MOUNT);
    let tool = side.tool();
    let script = format!(
        "cd {MOUNT}; pids=; for n in 1 2 3 4 5 6; do {tool} do pattern write --file f$n --size 2097152 --block 131072 --seed $n >o$n & \
         pids=\"$pids $!\"; done; for pid in $pids; do wait $pid; done"
    );
    dpu.run_program(program(&["sh", "-ec", &script]), RUN_LIMIT)?.success()?;
    let host = crate::side::HostSide::new(export.path())?;
    for seed in 1..=6 {
        let seed = seed.to_string();
        super::content::pattern(&host, "check", &format!("f{seed}"), 2 << 20, &["--seed", &seed])?;
    }
    end(&mut daemon, dpu)?;
    Ok("6 writers".to_owned())
}
