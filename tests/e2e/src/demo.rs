//! The demonstration: boots a DPU over hugepage memory, mounts an export, works in it, and shows what came out.

use std::fmt::Write as _;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use comfy_table::Table;
use comfy_table::presets::UTF8_BORDERS_ONLY;

use crate::dpu::{Dpu, Memory};
use crate::lab::{Lab, MOUNT, Profile, Session, TAG, check_kernel_log};
use crate::registry::{HUGEPAGE_BYTES, Hugepages, hugepages_of};
use crate::side::{DpuSide, HostSide, Side};
use crate::verbs::lock::LOCKED;
use crate::verbs::pattern::Moved;
use crate::verbs::tree::Seen;

/// Memory of the DPU.
const MEMORY_MIB: u64 = 512;

/// Small files that the DPU makes.
const FILES: u32 = 1000;

/// Bytes of the large file.
const LARGE: u64 = 128 << 20;

/// How the DPU is set up; memory is decided at run time.
const PROFILE: Profile = Profile { name: "demo", memory: Memory::Hugepages, ..Profile::AUTO };

/// The same without hugepages.
const PLAIN: Profile = Profile { name: "demo", memory: Memory::Plain, ..Profile::AUTO };

/// What the table shows, in order.
#[derive(Debug, Default)]
struct Findings(Vec<(&'static str, String)>);

impl Findings {
    fn add(&mut self, what: &'static str, found: impl Into<String>) {
        self.0.push((what, found.into()));
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(UTF8_BORDERS_ONLY);
        for (what, found) in &self.0 {
            table.add_row([*what, found]);
        }
        table
    }
}

/// Runs the demonstration and prints as it goes; true if all went well.
///
/// # Errors
/// Only for what the table cannot show; trouble on the way is a row and `FAIL`.
pub fn run(lab: &Lab) -> Result<bool> {
    let start = Instant::now();
    let mut findings = Findings::default();
    let result = show(lab, &mut findings);
    findings.add("time", format!("{:.0} s", start.elapsed().as_secs_f64()));
    match &result {
        Ok(()) => findings.add("result", "PASS"),
        Err(error) => findings.add("result", format!("FAIL: {error:#}")),
    }
    println!("\n{}", findings.table());
    Ok(result.is_ok())
}

fn show(lab: &Lab, findings: &mut Findings) -> Result<()> {
    findings.add("daemon", lab.daemon.version.clone());
    say("getting a stock Debian kernel (fetched once, then kept in .cache/e2e)");
    let kernel = lab.kernel(None)?;
    // Held until the end; the DPU finds its pages free.
    let (profile, _pages) = match Hugepages::reserve(MEMORY_MIB << 20) {
        Ok(pages) => (&PROFILE, Some(pages)),
        Err(error) => {
            println!("hugepages cannot be had, the DPU gets plain memory: {error:#}");
            (&PLAIN, None)
        }
    };
    say(&format!("starting {} and QEMU with Linux {}", lab.daemon.version, kernel.release));
    let mut session = Session::start(lab, profile)?;
    findings.add(
        "kernel",
        format!("{}, up after {:.1} s", session.dpu.kernel, session.dpu.boot_time.as_secs_f64()),
    );
    let stage = session.stage("work")?;
    let (dpu, host) = (stage.dpu, stage.host);
    let line = typed(&dpu, &format!("grep ' {MOUNT} ' /proc/mounts"))?;
    ensure!(line.starts_with(&format!("{TAG} {MOUNT} virtiofs")), "no virtiofs mount: {line}");
    findings.add("mount", line.trim());
    work_with_files(&dpu, &host, findings)?;
    work_with_content(&dpu, &host, findings)?;
    work_with_locks(&dpu, &host, findings)?;
    findings.add("memory", describe_memory(&session.dpu, profile.memory)?);
    say("unmounting and switching the DPU off; the daemon ends with it");
    check_kernel_log(&session.dpu)?;
    session.end()
}

fn say(text: &str) {
    println!("# {text}");
}

/// Runs a command in the DPU and shows both, as if typed there.
fn typed(dpu: &DpuSide<'_>, script: &str) -> Result<String> {
    println!("dpu$ {script}");
    let output = dpu.shell(script)?;
    if !output.trim().is_empty() {
        println!("{}", output.trim_end());
    }
    Ok(output)
}

fn work_with_files(dpu: &DpuSide<'_>, host: &HostSide, findings: &mut Findings) -> Result<()> {
    typed(dpu, "echo 'written in the DPU' > letter; ls -l letter")?;
    let letter = host.read("letter")?;
    println!("host$ cat letter\n{}", letter.trim_end());
    ensure!(letter == "written in the DPU\n", "the host reads {letter:?}");
    host.write("answer", "written on the host\n")?;
    ensure!(
        typed(dpu, "cat answer; rm answer letter")? == "written on the host\n",
        "the DPU reads something else"
    );
    say(&format!("{FILES} small files: made in the DPU, each one checked on the host"));
    let tree = |side: &dyn Side, verb: &str| -> Result<Seen> {
        let root = side.path("tree");
        let text = side.act(&[
            "tree",
            verb,
            "--root",
            &root,
            "--files",
            &FILES.to_string(),
            "--per-directory",
            "100",
        ])?;
        serde_json::from_str(&text).context("cannot understand the result")
    };
    typed(dpu, "mkdir tree")?;
    let (made, seen) = (tree(dpu, "make")?, tree(host, "check")?);
    let mut text = format!("{} in {} directories", seen.files, seen.directories);
    let _ = write!(text, ", made by the DPU in {:.1} s", made.milliseconds as f64 / 1000.0);
    findings.add("files", format!("{text}, all correct on the host"));
    typed(dpu, "find tree -type f | wc -l; rm -r tree").map(drop)
}

fn work_with_content(dpu: &DpuSide<'_>, host: &HostSide, findings: &mut Findings) -> Result<()> {
    say(&format!("{} MiB each way, every byte checked on the other side", LARGE >> 20));
    let pattern = |side: &dyn Side, verb: &str, file: &str, seed: &str| -> Result<Moved> {
        let (path, size) = (side.path(file), LARGE.to_string());
        let text =
            side.act(&["pattern", verb, "--file", &path, "--size", &size, "--seed", seed, "--direct"])?;
        serde_json::from_str(&text).context("cannot understand the result")
    };
    let up = pattern(dpu, "write", "up", "1")?;
    pattern(host, "check", "up", "1")?;
    pattern(host, "write", "down", "2")?;
    let down = pattern(dpu, "check", "down", "2")?;
    let (up, down) = (up.megabytes_per_second(), down.megabytes_per_second());
    findings
        .add("throughput", format!("write {up} MB/s, read {down} MB/s (emulated processor, check included)"));
    let here = host.shell(&format!("sha256sum < {}", host.path("up")))?;
    let there = typed(dpu, "sha256sum < up")?;
    ensure!(here == there, "the host computes {here}, the DPU {there}");
    findings.add("checksum", format!("sha256 {}… on both sides", &here[..16.min(here.len())]));
    typed(dpu, "rm up down").map(drop)
}

fn work_with_locks(dpu: &DpuSide<'_>, host: &HostSide, findings: &mut Findings) -> Result<()> {
    host.write("file", "x")?;
    let mut hold = host.hold(&["lock", "flock", "--file", &host.path("file")])?;
    hold.locked()?;
    let attempt = ["lock", "flock", "--file", &dpu.path("file"), "--release"];
    let free = dpu.verb(&attempt)?.stdout.trim() == LOCKED;
    hold.release()?;
    findings.add("locks", if free { "local to the DPU" } else { "a lock of the host keeps the DPU out" });
    Ok(())
}

fn describe_memory(dpu: &Dpu, memory: Memory) -> Result<String> {
    Ok(match memory {
        Memory::Plain => format!("{MEMORY_MIB} MiB of normal pages"),
        Memory::Hugepages => {
            let used = hugepages_of(dpu.pid())?;
            ensure!(used > 0, "the DPU uses no hugepage");
            let all = (MEMORY_MIB << 20) / HUGEPAGE_BYTES;
            format!("{MEMORY_MIB} MiB of hugepages: {used} of {all} pages of 2 MiB in use")
        }
    })
}
