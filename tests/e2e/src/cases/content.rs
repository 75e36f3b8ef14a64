//! Content: large transfers with every byte checked, mappings, holes, copying.

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::lab::{Profile, Stage};
use crate::side::Side;
use crate::verbs::entry::Attributes;
use crate::verbs::pattern::Moved;

/// The cases.
pub const CASES: &[Case] = &[
    Case::basic(
        "sequential",
        &Profile::AUTO,
        sequential,
        "96 MiB each way in 1 MiB blocks, every byte checked",
    ),
    Case::basic(
        "random",
        &Profile::AUTO,
        random,
        "32 MiB in 4 KiB blocks in random order, buffered and direct",
    ),
    Case::basic("parallel", &Profile::AUTO, parallel, "four writers and four readers at once"),
    Case::basic(
        "mmap-shared",
        &Profile::AUTO,
        shared_mapping,
        "stores through a shared mapping reach the host",
    ),
    Case::basic("mmap-exec", &Profile::AUTO, programs_run_from_the_export, "programs run from the export"),
    Case::basic("holes", &Profile::AUTO, holes, "fallocate, punch, zero, SEEK_DATA and SEEK_HOLE"),
    Case::basic(
        "copy-file-range",
        &Profile::AUTO,
        copy_file_range,
        "copied by the host without passing the DPU",
    ),
    Case::basic("truncate", &Profile::AUTO, truncate, "shrink, grow, no old data comes back"),
];

/// Writes or checks a pattern on one side.
pub(super) fn pattern(side: &dyn Side, verb: &str, file: &str, size: u64, more: &[&str]) -> Result<Moved> {
    let (file, size) = (side.path(file), size.to_string());
    let text = side.act(&[&["pattern", verb, "--file", &file, "--size", &size], more].concat())?;
    serde_json::from_str(&text).with_context(|| format!("cannot understand {text:?}"))
}

fn sequential(stage: &mut Stage<'_>) -> Result<String> {
    const SIZE: u64 = 96 << 20;
    let (dpu, host) = (&stage.dpu, &stage.host);
    let written = pattern(dpu, "write", "up", SIZE, &["--seed", "1"])?;
    pattern(host, "check", "up", SIZE, &["--seed", "1"])?;
    pattern(host, "write", "down", SIZE, &["--seed", "2"])?;
    let read = pattern(dpu, "check", "down", SIZE, &["--seed", "2"])?;
    let direct = pattern(dpu, "check", "down", SIZE, &["--seed", "2", "--direct"])?;
    // A second pass over what is now in the DPU's page cache must see the same.
    pattern(dpu, "check", "down", SIZE, &["--seed", "2"])?;
    dpu.shell("rm up down")?;
    Ok(format!(
        "write {} MB/s, read {} MB/s, direct {} MB/s",
        written.megabytes_per_second(),
        read.megabytes_per_second(),
        direct.megabytes_per_second()
    ))
}

fn random(stage: &mut Stage<'_>) -> Result<String> {
    const SIZE: u64 = 32 << 20;
    let (dpu, host) = (&stage.dpu, &stage.host);
    for (seed, more) in [("3", &[][..]), ("4", &["--direct"][..])] {
        let options = [&["--block", "4096", "--seed", seed, "--random"], more].concat();
        pattern(dpu, "write", "file", SIZE, &options)?;
        pattern(host, "check", "file", SIZE, &["--seed", seed])?;
        dpu.shell("echo 3 > /proc/sys/vm/drop_caches")?;
        pattern(dpu, "check", "file", SIZE, &options)?;
    }
    dpu.shell("rm file")?;
    Ok("two passes".to_owned())
}

fn parallel(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    let tool = dpu.tool();
    let all = |verb: &str| {
        format!(
            "pids=; for n in 1 2 3 4; do {tool} do pattern {verb} --file f$n --size 8388608 --block 65536 \
             --seed $n --random >out & pids=\"$pids $!\"; done; for pid in $pids; do wait $pid; done"
        )
    };
    dpu.shell(&all("write"))?;
    for seed in ["1", "2", "3", "4"] {
        pattern(host, "check", &format!("f{seed}"), 8 << 20, &["--seed", seed])?;
    }
    dpu.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    dpu.shell(&all("check"))?;
    Ok("4 x 8 MiB".to_owned())
}

fn shared_mapping(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    host.write("file", vec![b'.'; 300_000])?;
    let map = |verb: &str, offset: &str, text: &str| {
        dpu.act(&["map", verb, "--file", &dpu.path("file"), "--offset", offset, "--text", text])
    };
    map("store", "123456", "stored in the DPU")?;
    map("store", "299983", "up to the end....")?;
    let content = host.read("file")?;
    ensure!(content.len() == 300_000, "{} bytes", content.len());
    ensure!(&content[123_456..123_473] == "stored in the DPU" && content.ends_with("up to the end...."));
    ensure!(
        content.bytes().filter(|byte| *byte == b'.').count() == 300_000 - 17 - 17 + 4,
        "bytes around have changed"
    );
    map("store-private", "1000", "stays in the process")?;
    ensure!(host.read("file")? == content, "a private store reached the file");
    host.write("other", "0123456789 written on the host")?;
    dpu.act(&[
        "map",
        "load",
        "--file",
        &dpu.path("other"),
        "--offset",
        "11",
        "--text",
        "written on the host",
    ])?;
    Ok(String::new())
}

fn programs_run_from_the_export(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    let copy = |from: &str, to: &str| {
        std::fs::copy(from, host.entry(to)).with_context(|| format!("cannot copy {from}")).map(drop)
    };
    copy("/usr/bin/busybox", "busybox")?;
    ensure!(dpu.shell("./busybox expr 6 '*' 7")?.trim() == "42");
    // A dynamic program: its loader maps it privately, with pages shared from the page cache.
    dpu.shell("cp /bin/dpu-e2e dynamic; ./dynamic --version")?;
    std::fs::write(host.entry("script"), "#!/bin/sh\necho \"script $1\"\n").context("cannot write")?;
    dpu.shell("chmod 755 script; test \"$(./script runs)\" = 'script runs'")?;
    dpu.shell("chmod 644 script; ! ./script 2>/dev/null; cmp dynamic /bin/dpu-e2e")?;
    Ok("static, dynamic, script".to_owned())
}

fn holes(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    pattern(dpu, "write", "file", 1 << 20, &["--block", "65536"])?;
    let allocate = |how: &str, offset: u64, len: u64| {
        let (offset, len) = (offset.to_string(), len.to_string());
        dpu.act(&["space", "allocate", "--how", how, "--offset", &offset, "--len", &len, &dpu.path("file")])
    };
    let stat = || -> Result<Attributes> { host.ask(&["entry", "stat", &host.path("file")]) };
    let data = |side: &dyn Side| -> Result<Vec<(u64, u64)>> {
        serde_json::from_str(&side.act(&["space", "data", &side.path("file")])?).context("cannot understand")
    };
    let full = stat()?.blocks;
    allocate("punch", 256 << 10, 256 << 10)?;
    ensure!(stat()?.blocks <= full - 512, "punching freed nothing: {} of {full} blocks", stat()?.blocks);
    let expected = [(0, 256 << 10), (512 << 10, 1 << 20)];
    ensure!(data(host)? == expected, "host: {:?}", data(host)?);
    ensure!(data(dpu)? == expected, "DPU: {:?}", data(dpu)?);
    let zeros = "dd if=file bs=65536 skip=4 count=4 2>/dev/null | tr -d '\\000' | wc -c";
    ensure!(dpu.shell(zeros)?.trim() == "0", "the hole does not read as zeros in the DPU");
    allocate("keep-size", 4 << 20, 1 << 20)?;
    ensure!(stat()?.size == 1 << 20 && stat()?.blocks >= full + 1024, "{:?}", stat()?);
    allocate("extend", 1 << 20, 1 << 20)?;
    ensure!(stat()?.size == 2 << 20, "{:?}", stat()?);
    allocate("zero", 0, 65536)?;
    ensure!(dpu.shell("head -c 65536 file | tr -d '\\000' | wc -c")?.trim() == "0");
    ensure!(
        host.shell(&format!("head -c 65536 {} | tr -d '\\000' | wc -c", host.path("file")))?.trim() == "0"
    );
    Ok(String::new())
}

fn copy_file_range(stage: &mut Stage<'_>) -> Result<String> {
    const SIZE: u64 = 16 << 20;
    let (dpu, host) = (&stage.dpu, &stage.host);
    pattern(host, "write", "from", SIZE, &["--seed", "5"])?;
    let copied: u64 = dpu.ask(&[
        "space",
        "copy",
        "--from-offset",
        "0",
        "--to-offset",
        "0",
        "--len",
        &SIZE.to_string(),
        &dpu.path("from"),
        &dpu.path("to"),
    ])?;
    ensure!(copied == SIZE);
    pattern(host, "check", "to", SIZE, &["--seed", "5"])?;
    pattern(dpu, "check", "to", SIZE, &["--seed", "5"])?;
    dpu.ask::<u64>(&[
        "space",
        "copy",
        "--from-offset",
        "1000",
        "--to-offset",
        "77",
        "--len",
        "5000",
        &dpu.path("from"),
        &dpu.path("part"),
    ])?;
    let tail = |name: &str, skip: usize| -> Result<Vec<u8>> {
        let bytes = std::fs::read(host.entry(name)).with_context(|| format!("cannot read {name}"))?;
        Ok(bytes[skip..skip + 5000].to_vec())
    };
    ensure!(tail("part", 77)? == tail("from", 1000)?, "the copied part differs");
    Ok(format!("{} MiB", SIZE >> 20))
}

fn truncate(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    host.write("file", vec![b'x'; 200_000])?;
    dpu.shell("cat file > /dev/null; truncate -s 5000 file; truncate -s 200000 file")?;
    ensure!(dpu.shell("tr -d '\\000' < file | wc -c")?.trim() == "5000", "old data came back in the DPU");
    let content = std::fs::read(host.entry("file")).context("cannot read")?;
    ensure!(content.len() == 200_000 && content[..5000].iter().all(|byte| *byte == b'x'));
    ensure!(content[5000..].iter().all(|byte| *byte == 0), "old data came back on the host");
    dpu.shell(": > file")?;
    ensure!(host.read("file")?.is_empty());
    Ok(String::new())
}
