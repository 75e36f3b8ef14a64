//! Locks that hold on both sides: what the DPU locks is locked on the host, and the other way round.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::lab::{Profile, Stage};
use crate::side::Side;
use crate::verbs::lock::InTheWay;

/// The cases.
pub const CASES: &[Case] = &[
    Case::basic("flock", &Profile::AUTO, flock, "flock on one side keeps the other side out"),
    Case::basic("posix-locks", &Profile::AUTO, posix_locks, "record locks and F_GETLK across the sides"),
    Case::basic(
        "lock-wait",
        &Profile::AUTO,
        waiting_lock,
        "a waiting SETLKW is woken; the queue stays lively",
    ),
    Case::basic(
        "lock-flood",
        &Profile::AUTO,
        many_waiting_locks,
        "64 waiting locks and the file system still works",
    ),
    Case::basic(
        "lock-local",
        &Profile::AUTO,
        locks_between_dpu_processes,
        "locks between processes of the DPU",
    ),
];

/// How soon after a release the waiting side must have the lock.
const WAKE_LIMIT: Duration = Duration::from_secs(5);

fn flock(stage: &mut Stage<'_>) -> Result<String> {
    stage.host.write("file", "x")?;
    let (dpu, host): (&dyn Side, &dyn Side) = (&stage.dpu, &stage.host);
    for (holder, other) in [(dpu, host), (host, dpu)] {
        let (mine, theirs) = (holder.path("file"), other.path("file"));
        let mut hold = holder.hold(&["lock", "flock", "--file", &mine])?;
        hold.locked().with_context(|| format!("the {} takes a free lock", holder.name()))?;
        for kind in ["shared", "exclusive"] {
            other
                .refused("EAGAIN", &["lock", "flock", "--file", &theirs, "--kind", kind, "--release"])
                .with_context(|| format!("while the {} holds the lock", holder.name()))?;
        }
        hold.release()?;
        let mut hold = holder.hold(&["lock", "flock", "--file", &mine, "--kind", "shared"])?;
        hold.locked()?;
        let mut second = other.hold(&["lock", "flock", "--file", &theirs, "--kind", "shared"])?;
        second.locked().context("shared locks must go together")?;
        other.refused("EAGAIN", &["lock", "flock", "--file", &theirs, "--release"])?;
        second.release()?;
        hold.release()?;
        other
            .act(&["lock", "flock", "--file", &theirs, "--release"])
            .context("the lock must be free after its holder is gone")?;
    }
    Ok(String::new())
}

fn posix_locks(stage: &mut Stage<'_>) -> Result<String> {
    stage.host.write("file", vec![b'x'; 4096])?;
    let (dpu, host): (&dyn Side, &dyn Side) = (&stage.dpu, &stage.host);
    for (holder, other) in [(dpu, host), (host, dpu)] {
        let (mine, theirs) = (holder.path("file"), other.path("file"));
        let mut hold = holder.hold(&["lock", "posix", "--file", &mine, "--start", "100", "--len", "50"])?;
        hold.locked()?;
        let said = other.act(&["lock", "test", "--file", &theirs, "--kind", "shared"])?;
        let found: Option<InTheWay> = serde_json::from_str(&said).context("cannot understand")?;
        let expected = InTheWay { exclusive: true, start: 100, len: 50 };
        ensure!(found.as_ref() == Some(&expected), "the {} sees {found:?} in the way", other.name());
        other.refused(
            "EAGAIN",
            &["lock", "posix", "--file", &theirs, "--start", "149", "--len", "1", "--release"],
        )?;
        other.act(&["lock", "posix", "--file", &theirs, "--start", "150", "--len", "10", "--release"])?;
        other.act(&["lock", "posix", "--file", &theirs, "--start", "0", "--len", "100", "--release"])?;
        hold.release()?;
        let said = other.act(&["lock", "test", "--file", &theirs])?;
        ensure!(said.trim() == "null", "still in the way after the holder's end: {said}");
    }
    Ok(String::new())
}

fn waiting_lock(stage: &mut Stage<'_>) -> Result<String> {
    stage.host.write("file", "x")?;
    let (dpu, host) = (&stage.dpu, &stage.host);
    let mut latest = Duration::ZERO;
    for family in ["posix", "flock"] {
        let mut held = host.hold(&["lock", family, "--file", &host.path("file")])?;
        held.locked()?;
        let mut waiting = dpu.hold(&["lock", family, "--file", &dpu.path("file"), "--wait"])?;
        // Meanwhile everything else goes on, on the same queue.
        let busy = Instant::now();
        dpu.shell("for n in $(seq 200); do echo $n > busy; cat busy > /dev/null; rm busy; done")?;
        let busy = busy.elapsed();
        ensure!(busy < Duration::from_secs(20), "other work took {busy:?} beside a waiting lock");
        ensure!(!waiting.is_locked()?, "{family}: the DPU has the lock that the host holds");
        let released = Instant::now();
        held.release()?;
        waiting.locked().with_context(|| format!("{family}: the lock was released by the host"))?;
        latest = latest.max(released.elapsed());
        ensure!(latest < WAKE_LIMIT, "{family}: the lock came {latest:?} after its release");
        host.refused("EAGAIN", &["lock", family, "--file", &host.path("file"), "--release"])?;
        waiting.release()?;
        host.act(&["lock", family, "--file", &host.path("file"), "--release"])?;
    }
    Ok(format!("woken within {} ms", latest.as_millis()))
}

fn many_waiting_locks(stage: &mut Stage<'_>) -> Result<String> {
    const WAITING: usize = 64;
    stage.host.write("file", "x")?;
    let (dpu, host) = (&stage.dpu, &stage.host);
    let mut held = host.hold(&["lock", "posix", "--file", &host.path("file")])?;
    held.locked()?;
    // Each waits for a byte of its own, so that the release wakes all at once.
    let mut waiting = Vec::new();
    for byte in 0..WAITING {
        let byte = byte.to_string();
        let words = ["lock", "posix", "--file", &dpu.path("file"), "--start", &byte, "--len", "1", "--wait"];
        waiting.push(dpu.hold(&words)?);
    }
    dpu.shell("for n in $(seq 50); do echo $n > busy; cat busy > /dev/null; rm busy; done; ls > /dev/null")?;
    for hold in &mut waiting {
        ensure!(!hold.is_locked()?, "a lock was given while the host holds it");
    }
    held.release()?;
    for hold in &mut waiting {
        hold.locked()?;
    }
    host.refused(
        "EAGAIN",
        &["lock", "posix", "--file", &host.path("file"), "--start", "63", "--len", "1", "--release"],
    )?;
    for hold in waiting {
        hold.release()?;
    }
    host.act(&["lock", "posix", "--file", &host.path("file"), "--release"])?;
    Ok(format!("{WAITING} waiting"))
}

fn locks_between_dpu_processes(stage: &mut Stage<'_>) -> Result<String> {
    stage.host.write("file", "x")?;
    let dpu = &stage.dpu;
    let file = dpu.path("file");
    for family in ["flock", "posix", "open-file"] {
        let mut first = dpu.hold(&["lock", family, "--file", &file])?;
        first.locked()?;
        dpu.refused("EAGAIN", &["lock", family, "--file", &file, "--release"])?;
        let mut second = dpu.hold(&["lock", family, "--file", &file, "--wait"])?;
        ensure!(!second.is_locked()?);
        first.release()?;
        second.locked().with_context(|| family.to_owned())?;
        second.release()?;
    }
    Ok("flock, process, open file".to_owned())
}
