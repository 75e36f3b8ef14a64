//! Third-party suites, and random operations against a model.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::dpu::program;
use crate::initramfs::AGENT;
use crate::lab::{Profile, SUITE_PROGRAMS, Stage};
use crate::side::Side;

/// The daemon's default cache rules.
const AUTO: Profile = Profile { name: "suites-auto", suites: true, ..Profile::AUTO };

/// No caching in the DPU.
const NEVER: Profile = Profile {
    name: "suites-never",
    suites: true,
    daemon: &["--cache=never", "--xattr", "--posix-acl"],
    ..Profile::AUTO
};

/// The DPU caches as if nobody else changed the export.
const ALWAYS: Profile = Profile {
    name: "suites-always",
    suites: true,
    daemon: &["--cache=always", "--xattr", "--posix-acl"],
    ..Profile::AUTO
};

/// The DPU collects writes before it sends them.
const WRITEBACK: Profile = Profile {
    name: "suites-writeback",
    suites: true,
    daemon: &["--cache=always", "--writeback", "--xattr", "--posix-acl"],
    ..Profile::AUTO
};

/// How long one suite may take; many times what an idle machine needs.
const SUITE_LIMIT: Duration = Duration::from_secs(400);

/// Cases of pjdfstest that can run on a virtio-fs mount; the other 16 of 398 need features that no FUSE file system
/// has (file flags) or that the suite cannot find out (remounting).
const PJDFSTEST_RUNNABLE: u32 = 382;

/// What pjdfstest may try, and as whom.
const PJDFSTEST_CONFIGURATION: &str = "[features]\nposix_fallocate = {}\nrename_ctime = {}\nutime_now = {}\nutimensat = {}\n\
    [settings]\nnaptime = 0.01\nallow_remount = false\n\
    [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"tests\", \"tests\"]]\n";

/// The operations of fsx; those of its defaults and those that matter for a remote file system.
const FSX_CONFIGURATION: &str = "flen = 524288\n[opsize]\nmax = 131072\n[weights]\nclose_open = 3\ninvalidate = 2\n\
    fsync = 2\nfdatasync = 2\nread = 10\nwrite = 10\nmapread = 10\nmapwrite = 10\ntruncate = 5\n\
    posix_fallocate = 3\npunch_hole = 5\nsendfile = 3\ncopy_file_range = 5\nposix_fadvise = 2\n";

/// The same without shared mappings, which files without a cache do not have.
const FSX_UNMAPPED: &str = "flen = 524288\n[opsize]\nmax = 131072\n[weights]\nclose_open = 3\nfsync = 2\nfdatasync = 2\n\
    read = 10\nwrite = 10\nmapread = 0\nmapwrite = 0\ntruncate = 5\nposix_fallocate = 3\npunch_hole = 5\n\
    copy_file_range = 5\n";

/// The cases.
pub const CASES: &[Case] = &[
    Case::conformance("pjdfstest-auto", &AUTO, pjdfstest, "382 of 382 runnable cases"),
    Case::conformance(
        "fsx-auto",
        &AUTO,
        fsx_mapped,
        "15,000 random operations on one file, mappings included",
    ),
    Case::conformance(
        "model-auto",
        &AUTO,
        model,
        "random trees against a model, four at once, checked on both sides",
    ),
    Case::conformance("chaos", &AUTO, chaos, "both sides work on the same few names; only possible errors"),
    Case::conformance(
        "fio",
        &AUTO,
        fio,
        "random reads and writes with checksums, buffered, direct, asynchronous",
    ),
    Case::conformance("git", &AUTO, git, "init, add, commit, branch, merge, clone, gc, fsck"),
    Case::conformance(
        "sqlite",
        &AUTO,
        sqlite,
        "rollback journal and WAL, two writers at once, integrity check",
    ),
    Case::conformance("dbench", &AUTO, dbench, "the load of four file-server clients"),
    Case::conformance("stress-ng", &AUTO, stress_ng, "its file-system stressors, verified"),
    Case::conformance("pjdfstest-never", &NEVER, pjdfstest, "382 of 382 runnable cases"),
    Case::conformance("fsx-never", &NEVER, fsx_unmapped, "15,000 random operations on one file"),
    Case::conformance("model-never", &NEVER, model, "random trees against a model"),
    Case::conformance("pjdfstest-always", &ALWAYS, pjdfstest, "382 of 382 runnable cases"),
    Case::conformance(
        "fsx-writeback",
        &WRITEBACK,
        fsx_mapped,
        "15,000 random operations with collected writes",
    ),
    Case::conformance("model-writeback", &WRITEBACK, model, "random trees with collected writes"),
];

fn pjdfstest(stage: &mut Stage<'_>) -> Result<String> {
    stage.host.write("configuration", PJDFSTEST_CONFIGURATION)?;
    stage.dpu.shell("mkdir -m 755 work")?;
    let configuration = stage.dpu.path("configuration");
    let mut suite = program(&[
        &format!("{SUITE_PROGRAMS}/pjdfstest"),
        "-c",
        &configuration,
        "-p",
        &stage.dpu.path("work"),
    ]);
    // The suite copies `sleep`; busybox under another name would not sleep.
    let path = format!("{SUITE_PROGRAMS}:/bin");
    suite.env = vec![("NO_COLOR".to_owned(), "1".to_owned()), ("PATH".to_owned(), path)];
    let finished = stage.dpu.dpu.run_program(suite, SUITE_LIMIT)?;
    let failed: Vec<&str> = finished.stdout.lines().filter(|line| line.contains("FAILED")).collect();
    let summary =
        finished.stdout.lines().find(|line| line.starts_with("Summary")).unwrap_or_default().to_owned();
    ensure!(
        finished.code == Some(0) && failed.is_empty(),
        "{summary}: {} {}",
        failed.join(", "),
        finished.stderr.trim()
    );
    let count = |what: &str| {
        summary.split([':', ',']).find_map(|part| part.trim().strip_suffix(what)?.trim().parse().ok())
    };
    let passed: Option<u32> = count("passed");
    ensure!(
        passed == Some(PJDFSTEST_RUNNABLE),
        "{passed:?} in place of {PJDFSTEST_RUNNABLE} passed: {summary}"
    );
    Ok(summary)
}

fn fsx(stage: &mut Stage<'_>, configuration: &str) -> Result<String> {
    const OPERATIONS: &str = "5000";
    stage.host.write("fsx.toml", configuration)?;
    for seed in ["1", "2", "3"] {
        let file = stage.dpu.path("file");
        let suite = program(&[
            &format!("{SUITE_PROGRAMS}/fsx"),
            "-q",
            "-f",
            &stage.dpu.path("fsx.toml"),
            "-P",
            "/tmp",
            "-N",
            OPERATIONS,
            "-S",
            seed,
            &file,
        ]);
        stage.dpu.dpu.run_program(suite, SUITE_LIMIT)?.success().with_context(|| format!("seed {seed}"))?;
    }
    Ok(format!("3 seeds of {OPERATIONS} operations"))
}

fn fsx_mapped(stage: &mut Stage<'_>) -> Result<String> {
    fsx(stage, FSX_CONFIGURATION)
}

fn fsx_unmapped(stage: &mut Stage<'_>) -> Result<String> {
    fsx(stage, FSX_UNMAPPED)
}

/// Runs a command for each of four numbers at once in the DPU.
fn four_at_once(stage: &Stage<'_>, command: &str) -> Result<String> {
    let script = format!(
        "pids=; for n in 1 2 3 4; do ({command}) & pids=\"$pids $!\"; done; for pid in $pids; do wait $pid; done"
    );
    stage.dpu.shell_for(SUITE_LIMIT, &script)
}

fn model(stage: &mut Stage<'_>) -> Result<String> {
    let run = format!("mkdir t$n; {AGENT} do stress run --root t$n --seed $n --operations 2500 > out$n");
    four_at_once(stage, &run)?;
    let mut entries = Vec::new();
    for seed in ["1", "2", "3", "4"] {
        let root = stage.host.path(&format!("t{seed}"));
        let count: usize =
            stage.host.ask(&["stress", "check", "--root", &root, "--seed", seed, "--operations", "2500"])?;
        entries.push(count);
    }
    stage.dpu.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    four_at_once(stage, &format!("{AGENT} do stress check --root t$n --seed $n --operations 2500 > out$n"))?;
    Ok(format!("4 x 2,500 operations, {entries:?} entries left"))
}

fn chaos(stage: &mut Stage<'_>) -> Result<String> {
    stage.dpu.shell("mkdir c")?;
    let (dpu, host) = (&stage.dpu, &stage.host);
    let results = std::thread::scope(|scope| {
        let in_dpu = scope.spawn(|| {
            four_at_once(
                stage,
                &format!("{AGENT} do stress chaos --operations 1500 --root c --seed $n > out$n"),
            )
        });
        let mut on_host = 0_u64;
        // The host is much faster: it goes on until the DPU has finished.
        let mut seed = 100;
        while !in_dpu.is_finished() {
            seed += 1;
            let (root, seed) = (host.path("c"), seed.to_string());
            let text =
                host.act(&["stress", "chaos", "--operations", "3000", "--root", &root, "--seed", &seed]);
            match text.and_then(|text| text.trim().parse::<u64>().context("not a number")) {
                Ok(done) => on_host += done,
                Err(error) => return (Err(error), in_dpu.join()),
            }
        }
        (Ok(on_host), in_dpu.join())
    });
    let on_host = results.0?;
    results.1.unwrap_or_else(|_| Err(anyhow::anyhow!("the thread of the DPU panicked")))?;
    // Afterwards the tree must still be whole for both.
    dpu.shell("ls -lR c > /dev/null; rm -rf c")?;
    ensure!(!host.entry("c").exists(), "something is left on the host");
    Ok(format!("{on_host} operations of the host went through meanwhile"))
}

/// Runs a script in the Debian root and returns the last line of what it printed.
fn debian(stage: &Stage<'_>, script: &str) -> Result<String> {
    let output = stage.dpu.debian_for(SUITE_LIMIT, script)?.success()?;
    Ok(output.trim().lines().last().unwrap_or_default().trim().to_owned())
}

fn fio(stage: &mut Stage<'_>) -> Result<String> {
    let common = "--directory=. --size=12m --rw=randrw --verify=crc32c --verify_fatal=1 --do_verify=1 \
                  --randseed=7 --group_reporting --minimal --numjobs=2";
    for (name, more) in [
        ("buffered", "--ioengine=psync --bsrange=512-64k --bs_unaligned"),
        ("direct", "--ioengine=psync --bs=16k --direct=1"),
        ("async", "--ioengine=libaio --iodepth=16 --bs=8k --direct=1"),
        ("mapped", "--ioengine=mmap --bs=4k"),
    ] {
        debian(stage, &format!("fio --name={name} {common} {more}; rm -f {name}.*"))
            .with_context(|| name.to_owned())?;
    }
    Ok("buffered, direct, asynchronous, mapped".to_owned())
}

fn git(stage: &mut Stage<'_>) -> Result<String> {
    let count = debian(
        stage,
        "export HOME=/root GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
         git init -q -b main r; cd r
         for d in 1 2 3 4 5 6; do mkdir d$d; for f in $(seq 40); do echo \"$d $f\" > d$d/f$f; done; done
         git add .; git commit -qm first
         git checkout -qb side; for f in $(seq 20); do echo more >> d1/f$f; done; git rm -qr d6; git commit -qam side
         git checkout -q main; echo own > own; git add own; git commit -qm own; git merge -q -m merged side
         git gc -q; git fsck --full --strict; test -z \"$(git status --porcelain)\"
         cd ..; git clone -q --no-hardlinks r c; cd c; git fsck --full; git log --oneline | wc -l; git ls-files | wc -l",
    )?;
    ensure!(count == "201", "{count} files in the clone");
    Ok(format!("{count} files"))
}

fn sqlite(stage: &mut Stage<'_>) -> Result<String> {
    let script = "
        for mode in delete wal; do
          sqlite3 $mode.db \"pragma journal_mode=$mode; create table t(id integer primary key, who text, v text);\" >/dev/null
          pids=
          for who in a b; do
            (for n in $(seq 15); do
               echo \"pragma busy_timeout=60000; begin immediate; \
                 with recursive c(x) as (select 1 union all select x+1 from c where x<200) \
                 insert into t(who, v) select '$who', hex(randomblob(50)) from c; commit;\"
             done | sqlite3 -bail $mode.db >/dev/null) & pids=\"$pids $!\"
          done
          for pid in $pids; do wait $pid; done
          sqlite3 $mode.db 'update t set v = v || id where id % 3 = 0; create index i on t(v); vacuum;'
          test \"$(sqlite3 $mode.db 'pragma integrity_check')\" = ok
          sqlite3 $mode.db 'select count(*) from t'
        done";
    let rows = debian(stage, script)?;
    ensure!(rows == "6000", "{rows} rows");
    Ok("2 journals, 2 writers, 6000 rows".to_owned())
}

fn dbench(stage: &mut Stage<'_>) -> Result<String> {
    let line = debian(stage, "dbench -t 12 -D . 4 | grep Throughput")?;
    ensure!(line.starts_with("Throughput"), "{line}");
    Ok(line)
}

fn stress_ng(stage: &mut Stage<'_>) -> Result<String> {
    let stressors = [
        "access",
        "chattr",
        "chdir",
        "chmod",
        "chown",
        "copy-file",
        "dentry",
        "dir",
        "dirdeep",
        "dirmany",
        "fallocate",
        "fcntl",
        "fiemap",
        "filename",
        "flock",
        "fpunch",
        "fstat",
        "getdent",
        "handle",
        "hdd",
        "inode-flags",
        "link",
        "locka",
        "lockf",
        "lockofd",
        "mknod",
        "mmap",
        "open",
        "rename",
        "seek",
        "symlink",
        "touch",
        "utime",
        "xattr",
    ];
    // One after the other, a moment each; stressors of things that the file system lacks say so and are skipped.
    let all: Vec<String> = stressors.iter().map(|name| format!("--{name} 2")).collect();
    let script = format!(
        "stress-ng --temp-path . --verify --timeout 30s --metrics-brief --dirdeep-bytes 4m --hdd-bytes 8m --mmap-bytes 4m \
         --mmap-file --filename-opts posix {} 2>&1",
        all.join(" ")
    );
    let finished = stage.dpu.debian_for(SUITE_LIMIT, &script)?;
    let said = finished.stdout.trim();
    let (trouble, rest): (Vec<&str>, Vec<&str>) =
        said.lines().partition(|line| line.contains("fail") || line.contains("error"));
    let last = rest.len().saturating_sub(5);
    ensure!(
        finished.code == Some(0),
        "exit code {:?}: {}; {}",
        finished.code,
        trouble.join("; "),
        rest[last..].join("; ")
    );
    Ok(format!("{} stressors", stressors.len()))
}
