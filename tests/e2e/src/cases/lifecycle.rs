//! Life of daemon and DPU: restarts, lost power, several DPUs, limits.

use anyhow::{Context, Result, ensure};

use super::Case;
use super::mounting::end;
use crate::deadline::wait_for;
use crate::dpu::RUN_LIMIT;
use crate::lab::{Lab, MOUNT, mount};
use crate::side::{DpuSide, HostSide, Side};
use crate::verbs::tree::Seen;

/// The cases.
pub const CASES: &[Case] = &[
    Case::own("reboot", reboot, "the DPU restarts, daemon and QEMU stay"),
    Case::own("power-cut", power_cut, "QEMU is killed three times, the daemon serves the next one"),
    Case::own(
        "exit-with-dpu",
        daemon_ends_with_its_dpu,
        "without --keep-listening the daemon ends with code 0",
    ),
    Case::own("two-dpus", two_dpus, "two DPUs, a daemon each, one export: both see each other's work"),
    Case::own("two-dpus-locks", two_dpus_lock, "a lock of one DPU keeps the other out"),
    Case::own("walk-100000", walk, "100,000 files with 1,024 file descriptors"),
    Case::own("overlay", overlay, "an overlay with its lower and its upper layer on the export"),
];

fn reboot(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    let mut daemon = lab.start_daemon(export.path(), &["--cache=auto", "--xattr"])?;
    let mut config = lab.dpu_config(None, daemon.socket())?;
    config.may_reboot = true;
    let mut dpu = lab.boot_and_mount(&config)?;
    for round in 0..3 {
        let side = DpuSide::new(&dpu, MOUNT);
        side.shell(&format!(
            "echo {round} >> boots; mkdir -p d; echo {round} > d/f{round}; exec 3< boots; sync"
        ))?;
        // The mount is in use while the DPU goes down.
        dpu.reboot()?;
        daemon.check_alive()?;
        mount(&dpu)?;
    }
    let side = DpuSide::new(&dpu, MOUNT);
    ensure!(side.shell("cat boots")? == "0\n1\n2\n");
    ensure!(side.shell("ls d")?.split_whitespace().eq(["f0", "f1", "f2"]));
    // A clean unmount before the end: QEMU was told that restarts are fine, not that it may stay.
    end(&mut daemon, dpu)?;
    Ok("3 restarts".to_owned())
}

fn power_cut(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    let mut daemon = lab.start_daemon(export.path(), &["--cache=auto", "--xattr", "--keep-listening"])?;
    let config = lab.dpu_config(None, daemon.socket())?;
    let mut open_files = Vec::new();
    for round in 0..3 {
        let dpu = lab.boot_and_mount(&config)?;
        let side = DpuSide::new(&dpu, MOUNT);
        let before = side.shell("cat done 2>/dev/null || true")?;
        let expected: String = (0..round).map(|round| format!("{round}\n")).collect();
        ensure!(before == expected, "the DPU finds {before:?}");
        side.shell(&format!("echo {round} >> done; sync; for n in $(seq 50); do echo $n > f$n; done"))?;
        let held = side.hold(&["lock", "flock", "--file", &side.path("done")])?;
        drop(held);
        // In the middle of work: nothing is unmounted, files are open.
        dpu.cut_power();
        daemon.check_alive()?;
        open_files.push(daemon.open_files()?);
    }
    let dpu = lab.boot_and_mount(&config)?;
    ensure!(DpuSide::new(&dpu, MOUNT).shell("cat done; ls | wc -l")? == "0\n1\n2\n51\n");
    dpu.power_off()?;
    daemon.check_alive()?;
    let status = daemon.terminate()?;
    ensure!(status.success(), "after SIGTERM: {}", crate::registry::describe_exit(status));
    let (first, last) = (open_files.first().copied(), open_files.last().copied());
    ensure!(last <= first.map(|count| count + 4), "open files of the daemon grow: {open_files:?}");
    Ok(format!("open files of the daemon: {open_files:?}"))
}

fn daemon_ends_with_its_dpu(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    let mut daemon = lab.start_daemon(export.path(), &[])?;
    let dpu = lab.boot_and_mount(&lab.dpu_config(None, daemon.socket())?)?;
    dpu.cut_power();
    daemon.expect_end()?;
    Ok(String::new())
}

fn two_dpus(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    let mut first_daemon = lab.start_daemon(export.path(), &["--cache=never"])?;
    let mut second_daemon = lab.start_daemon(export.path(), &["--cache=never"])?;
    let first = lab.boot_and_mount(&lab.dpu_config(None, first_daemon.socket())?)?;
    let second = lab.boot_and_mount(&lab.dpu_config(None, second_daemon.socket())?)?;
    let (one, two) = (DpuSide::new(&first, MOUNT), DpuSide::new(&second, MOUNT));
    for round in 0..10 {
        one.shell(&format!("echo {round} > baton; mkdir d{round}"))?;
        ensure!(two.shell("cat baton")? == format!("{round}\n"));
        two.shell(&format!("echo back {round} > baton; mv d{round} e{round}"))?;
        ensure!(one.shell("cat baton")? == format!("back {round}\n"));
    }
    ensure!(one.shell("ls -d e* | wc -l; ls -d d* 2>/dev/null | wc -l")? == "10\n0\n");
    // Only one of both may make a name. They come from opposite ends, so that they meet.
    let race = |side: &DpuSide<'_>, order: &str| {
        side.shell(&format!(
            "touch \"ready-{order}\"; while ! test -e go; do usleep 1000; done; won=0; \
             for n in $(seq {order}); do if mkdir race-$n 2>/dev/null; then won=$((won+1)); fi; done; echo $won"
        ))
    };
    let (a, b) = std::thread::scope(|scope| {
        let first = scope.spawn(|| race(&one, "1 1 40"));
        let second = scope.spawn(|| race(&two, "40 -1 1"));
        let ready = wait_for("both DPUs to be ready", RUN_LIMIT, || {
            let names = std::fs::read_dir(export.path()).context("cannot list")?.flatten();
            let ready =
                names.filter(|entry| entry.file_name().to_string_lossy().starts_with("ready-")).count();
            Ok((ready == 2).then_some(()))
        });
        // Without the word neither would ever end.
        let go = std::fs::write(export.join("go"), "").context("cannot write");
        let lost = |_| Err(anyhow::anyhow!("the thread of a DPU panicked"));
        let (first, second) = (first.join().unwrap_or_else(lost), second.join().unwrap_or_else(lost));
        (ready.and(go).and(first), second)
    });
    let won = |text: Result<String>| text?.trim().parse::<u32>().context("not a number");
    let (a, b) = (won(a)?, won(b)?);
    ensure!(a + b == 40, "{a} and {b} of 40 names were made");
    end(&mut first_daemon, first)?;
    end(&mut second_daemon, second)?;
    Ok(format!("of 40 names, one DPU made {a}, the other {b}"))
}

fn two_dpus_lock(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    std::fs::write(export.join("file"), "x").context("cannot write")?;
    let mut first_daemon = lab.start_daemon(export.path(), &["--cache=auto"])?;
    let mut second_daemon = lab.start_daemon(export.path(), &["--cache=auto"])?;
    let first = lab.boot_and_mount(&lab.dpu_config(None, first_daemon.socket())?)?;
    let second = lab.boot_and_mount(&lab.dpu_config(None, second_daemon.socket())?)?;
    let (one, two) = (DpuSide::new(&first, MOUNT), DpuSide::new(&second, MOUNT));
    for family in ["flock", "posix", "open-file"] {
        let file = one.path("file");
        let mut held = one.hold(&["lock", family, "--file", &file])?;
        held.locked()?;
        two.refused("EAGAIN", &["lock", family, "--file", &file, "--release"])?;
        let mut waiting = two.hold(&["lock", family, "--file", &file, "--wait"])?;
        ensure!(!waiting.is_locked()?);
        held.release()?;
        waiting.locked().with_context(|| family.to_owned())?;
        one.refused("EAGAIN", &["lock", family, "--file", &file, "--release"])?;
        waiting.release()?;
    }
    // A DPU that loses its power holds no lock any more.
    let mut held = one.hold(&["lock", "flock", "--file", &one.path("file")])?;
    held.locked()?;
    drop(held);
    first.cut_power();
    first_daemon.expect_end()?;
    let mut last = two.hold(&["lock", "flock", "--file", &two.path("file"), "--wait"])?;
    last.locked().context("the other DPU has lost its power")?;
    last.release()?;
    end(&mut second_daemon, second)?;
    Ok("flock, process, open file".to_owned())
}

fn walk(lab: &Lab) -> Result<String> {
    const LIMIT: usize = 1024;
    let export = lab.export()?;
    let host = HostSide::new(export.path())?;
    let tree = |side: &dyn Side, verb: &str| {
        side.act(&["tree", verb, "--root", &side.path(""), "--files", "100000"])
    };
    tree(&host, "make")?;
    let limit = format!("--rlimit-nofile={LIMIT}");
    let mut daemon = lab.start_daemon(export.path(), &["--cache=always", &limit])?;
    let dpu = lab.boot_and_mount(&lab.dpu_config(None, daemon.socket())?)?;
    let side = DpuSide::new(&dpu, MOUNT);
    let seen: Seen = serde_json::from_str(&tree(&side, "walk")?).context("cannot understand the result")?;
    ensure!(seen.files == 100_000, "{seen:?}");
    let open = daemon.open_files()?;
    ensure!(open <= LIMIT, "{open} descriptors are open");
    // All are still known to the DPU; any of them can be read and written.
    side.shell(
        "cat directory-0000/file-000000 directory-0099/file-099999; echo x >> directory-0050/file-050500",
    )?;
    end(&mut daemon, dpu)?;
    Ok(format!("{} ms, {open} descriptors open", seen.milliseconds))
}

fn overlay(lab: &Lab) -> Result<String> {
    let export = lab.export()?;
    let mut daemon = lab.start_daemon(export.path(), &["--cache=auto", "--xattr"])?;
    let dpu = lab.boot_and_mount(&lab.dpu_config(None, daemon.socket())?)?;
    let side = DpuSide::new(&dpu, MOUNT);
    side.shell(
        "mkdir -p lower/d upper work /tmp/upper /tmp/work /tmp/merged
         echo low > lower/file; echo deep > lower/d/deep
         # Container images: the export below, memory above. /tmp is a file system of its own.
         mount -t overlay overlay -o lowerdir=lower,upperdir=/tmp/upper,workdir=/tmp/work /tmp/merged
         test \"$(cat /tmp/merged/d/deep)\" = deep
         echo changed > /tmp/merged/file; rm /tmp/merged/d/deep; echo new > /tmp/merged/d/new
         test \"$(cat lower/file)\" = low; test \"$(ls /tmp/merged/d)\" = new
         umount /tmp/merged",
    )?;
    side.shell(
        "mount -t overlay overlay -o userxattr,lowerdir=lower,upperdir=upper,workdir=work /tmp/merged
         echo changed > /tmp/merged/file; rm -r /tmp/merged/d; mkdir /tmp/merged/d; echo again > /tmp/merged/d/x
         test \"$(ls /tmp/merged/d)\" = x; umount /tmp/merged",
    )?;
    let host = HostSide::new(export.path())?;
    ensure!(host.read("upper/file")? == "changed\n" && host.read("lower/file")? == "low\n");
    ensure!(host.read("upper/d/x")? == "again\n");
    end(&mut daemon, dpu)?;
    Ok("lower with memory above, upper on the export".to_owned())
}
