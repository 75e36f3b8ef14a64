//! What one side writes, the other side reads: at once with `--cache=never`, by the rules of close-to-open and a
//! second of validity with `--cache=auto`.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::deadline::wait_for;
use crate::lab::{Profile, Stage};
use crate::side::Side;
use crate::verbs::entry::Attributes;

/// No caching in the DPU.
const NEVER: Profile =
    Profile { name: "never", daemon: &["--cache=never", "--xattr", "--posix-acl"], ..Profile::AUTO };

/// The DPU collects writes before it sends them.
const WRITEBACK: Profile =
    Profile { name: "writeback", daemon: &["--cache=auto", "--writeback", "--xattr"], ..Profile::AUTO };

/// How long the DPU may show old attributes and names with `--cache=auto`: a second, as the daemon tells it, and
/// some time for the emulation.
const VALIDITY: Duration = Duration::from_secs(3);

/// The cases.
pub const CASES: &[Case] = &[
    Case::basic(
        "coherence-auto",
        &Profile::AUTO,
        coherence_auto,
        "DPU to host at once, host to DPU on open or in 1 s",
    ),
    Case::basic("append-both", &Profile::AUTO, both_append, "both sides append to one file, no line is lost"),
    Case::basic("coherence-never", &NEVER, coherence_never, "both ways at once: content, size, names"),
    Case::basic("ping-pong", &NEVER, ping_pong, "a counter goes to and fro 100 times"),
    Case::basic("never-exec", &NEVER, never_runs_programs, "programs and private mappings without a cache"),
    Case::basic("writeback", &WRITEBACK, writeback, "collected writes are on the host after fsync and close"),
];

fn dpu_to_host_at_once(stage: &Stage<'_>) -> Result<()> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    dpu.shell("echo one > written; mkdir dir; echo in > dir/in")?;
    ensure!(host.read("written")? == "one\n" && host.read("dir/in")? == "in\n");
    dpu.shell("echo two >> written; mv dir/in dir/out; chmod 640 dir/out")?;
    ensure!(host.read("written")? == "one\ntwo\n" && host.read("dir/out")? == "in\n");
    let attributes: Attributes = host.ask(&["entry", "stat", &host.path("dir/out")])?;
    ensure!(attributes.mode & 0o777 == 0o640, "{attributes:?}");
    dpu.shell("rm -r dir; truncate -s 3 written")?;
    ensure!(!host.entry("dir").exists() && host.read("written")? == "one");
    Ok(())
}

fn coherence_auto(stage: &mut Stage<'_>) -> Result<String> {
    dpu_to_host_at_once(stage)?;
    let (dpu, host) = (&stage.dpu, &stage.host);
    // A name that was not there is looked up each time.
    ensure!(dpu.shell("test -e fresh || echo absent")? == "absent\n");
    host.write("fresh", "first")?;
    ensure!(dpu.shell("cat fresh")? == "first");
    // An open sees what was closed on the other side before, same size or not.
    for text in ["other", "a longer text than before", "s"] {
        host.write("fresh", text)?;
        let seen = wait_for("the new content in the DPU", VALIDITY, || {
            let seen = dpu.shell("cat fresh")?;
            Ok((seen == text).then_some(seen))
        })?;
        ensure!(seen == text);
    }
    // Attributes and names go out of date after their second.
    host.write("known", "12345")?;
    dpu.shell("stat known")?;
    let mut slowest = Duration::ZERO;
    let changed = Instant::now();
    host.write("known", "1234567890")?;
    wait_for("the new size in the DPU", VALIDITY, || {
        Ok((dpu.shell("stat -c %s known")?.trim() == "10").then_some(()))
    })?;
    slowest = slowest.max(changed.elapsed());
    let changed = Instant::now();
    fs::remove_file(host.entry("known")).context("cannot remove")?;
    wait_for("the name to go in the DPU", VALIDITY, || {
        Ok((dpu.shell("test -e known || echo gone")? == "gone\n").then_some(()))
    })?;
    slowest = slowest.max(changed.elapsed());
    Ok(format!("host to DPU within {} ms", slowest.as_millis()))
}

fn coherence_never(stage: &mut Stage<'_>) -> Result<String> {
    dpu_to_host_at_once(stage)?;
    let (dpu, host) = (&stage.dpu, &stage.host);
    host.write("file", "before")?;
    ensure!(dpu.shell("cat file; stat -c ' %s' file")? == "before 6\n");
    host.write("file", "after it all")?;
    ensure!(dpu.shell("cat file; stat -c ' %s' file")? == "after it all 12\n");
    fs::rename(host.entry("file"), host.entry("moved")).context("cannot rename")?;
    ensure!(dpu.shell("ls")?.split_whitespace().eq(["moved", "written"]), "{}", dpu.shell("ls")?);
    ensure!(dpu.shell("test -e file || cat moved")? == "after it all");
    fs::remove_file(host.entry("moved")).context("cannot remove")?;
    fs::create_dir(host.entry("moved")).context("cannot create")?;
    ensure!(dpu.shell("stat -c %F moved; rmdir moved")? == "directory\n");
    ensure!(!host.entry("moved").exists());
    // A file that stays open in the DPU sees each change of the host.
    host.write("open", "aaaa")?;
    let script = "exec 3< open; cat <&3; echo; echo changed > turn; while test -e turn; do usleep 20000; done; cat <&3";
    let follower = std::thread::scope(|scope| {
        let follower = scope.spawn(|| dpu.shell(script));
        wait_for("the DPU's turn to end", Duration::from_secs(20), || {
            Ok(host.entry("turn").exists().then_some(()))
        })?;
        let mut file = fs::OpenOptions::new().append(true).open(host.entry("open")).context("cannot open")?;
        std::io::Write::write_all(&mut file, b"bbbb").context("cannot append")?;
        fs::remove_file(host.entry("turn")).context("cannot remove")?;
        follower.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the follower panicked")))
    })?;
    ensure!(follower == "aaaa\nbbbb", "the open file showed {follower:?}");
    Ok(String::new())
}

fn ping_pong(stage: &mut Stage<'_>) -> Result<String> {
    const ROUNDS: u32 = 100;
    let (dpu, host) = (&stage.dpu, &stage.host);
    host.write("ball", "0")?;
    let script = format!(
        "n=1; while test $n -lt {}; do while test \"$(cat ball)\" != $n; do :; done; echo -n $((n+1)) > new; mv new ball; n=$((n+2)); done",
        2 * ROUNDS
    );
    let start = Instant::now();
    std::thread::scope(|scope| {
        let player = scope.spawn(|| dpu.shell_for(Duration::from_secs(90), &script));
        for round in 0..ROUNDS {
            wait_for("the ball from the DPU", Duration::from_secs(30), || {
                Ok((host.read("ball")? == (2 * round).to_string()).then_some(()))
            })?;
            host.write("thrown", (2 * round + 1).to_string())?;
            fs::rename(host.entry("thrown"), host.entry("ball")).context("cannot rename")?;
        }
        player.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the player panicked")))
    })?;
    ensure!(host.read("ball")? == (2 * ROUNDS).to_string());
    Ok(format!("{ROUNDS} rounds in {} ms", start.elapsed().as_millis()))
}

fn never_runs_programs(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    dpu.shell("cp /bin/dpu-e2e program; ./program --version; cmp program /bin/dpu-e2e")?;
    host.write("file", vec![b'.'; 5000])?;
    dpu.act(&["map", "store-private", "--file", &dpu.path("file"), "--offset", "10", "--text", "private"])?;
    ensure!(host.read("file")?.bytes().all(|byte| byte == b'.'));
    Ok(String::new())
}

fn both_append(stage: &mut Stage<'_>) -> Result<String> {
    const LINES: usize = 300;
    let (dpu, host) = (&stage.dpu, &stage.host);
    host.write("log", "")?;
    let lines = LINES.to_string();
    std::thread::scope(|scope| {
        let other = scope
            .spawn(|| dpu.act(&["entry", "append", &dpu.path("log"), "--label", "dpu", "--lines", &lines]));
        host.act(&["entry", "append", &host.path("log"), "--label", "host", "--lines", &lines])?;
        other.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the other writer panicked")))
    })?;
    let content = host.read("log")?;
    for label in ["dpu", "host"] {
        let found: Vec<&str> = content.lines().filter(|line| line.starts_with(label)).collect();
        let expected: Vec<String> = (0..LINES).map(|number| format!("{label} {number:05}")).collect();
        ensure!(found == expected, "{} of {LINES} lines of the {label} are in the file", found.len());
    }
    ensure!(content.lines().count() == 2 * LINES);
    Ok(format!("2 x {LINES} lines"))
}

fn writeback(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    let block = ["--block", "512", "--random", "--seed", "9"];
    super::content::pattern(dpu, "write", "file", 1 << 20, &block)?;
    super::content::pattern(host, "check", "file", 1 << 20, &["--seed", "9"])?;
    dpu.shell("for n in $(seq 100); do echo line $n; done > closed")?;
    ensure!(host.read("closed")?.lines().count() == 100, "a closed file is not on the host");
    dpu.shell("echo -n short > fits; echo -n ' and more' >> fits")?;
    ensure!(host.read("fits")? == "short and more");
    Ok(String::new())
}
