//! Names and directory entries.

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::deadline::wait_for;
use crate::dpu::RUN_LIMIT;
use crate::lab::{Profile, Stage};
use crate::side::Side;
use crate::verbs::entry::Attributes;
use crate::verbs::tree::Seen;

/// The cases.
pub const CASES: &[Case] = &[
    Case::basic(
        "tree-10000",
        &Profile::AUTO,
        tree_of_ten_thousand,
        "made in the DPU, checked on both sides, removed",
    ),
    Case::basic("hard-links", &Profile::AUTO, hard_links, "one inode, many names, on both sides"),
    Case::basic(
        "names",
        &Profile::AUTO,
        names_survive,
        "255 bytes, any byte value, symbolic links of 4095 bytes",
    ),
    Case::basic(
        "special-files",
        &Profile::AUTO,
        special_files,
        "fifo, socket, device nodes: made, listed, used in the DPU",
    ),
    Case::basic("tmpfile", &Profile::AUTO, tmpfile, "O_TMPFILE, then a name"),
    Case::basic("rename-flags", &Profile::AUTO, rename_flags, "no-replace, exchange, whiteout"),
    Case::basic("orphan", &Profile::AUTO, orphan, "an open file without a name"),
    Case::basic(
        "big-directory",
        &Profile::AUTO,
        big_directory,
        "10,000 entries in one directory, made on the host",
    ),
];

fn tree_of_ten_thousand(stage: &mut Stage<'_>) -> Result<String> {
    let tree =
        |verb: &str, side: &dyn Side| side.act(&["tree", verb, "--root", &side.path(""), "--files", "10000"]);
    let seen = |text: String| serde_json::from_str::<Seen>(&text).context("cannot understand the result");
    let made = seen(tree("make", &stage.dpu)?)?;
    tree("check", &stage.host)?;
    stage.dpu.shell("echo 3 > /proc/sys/vm/drop_caches")?;
    let checked = seen(tree("check", &stage.dpu)?)?;
    ensure!(checked.files == 10_000 && checked.directories == 10, "{checked:?}");
    stage.dpu.shell("rm -r directory-*")?;
    let left = std::fs::read_dir(stage.host.entry("")).context("cannot list")?.count();
    ensure!(left == 0, "{left} entries are left on the host");
    Ok(format!("made in {} ms, read in {} ms", made.milliseconds, checked.milliseconds))
}

fn hard_links(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    dpu.shell(
        "echo one > first; for n in $(seq 2 50); do ln first name-$n; done; mkdir sub; ln first sub/deep",
    )?;
    host.write("name-7", "changed on the host\n")?;
    let stat = |side: &dyn Side, name: &str| -> Result<Attributes> {
        serde_json::from_str(&side.act(&["entry", "stat", &side.path(name)])?).context("cannot understand")
    };
    for side in [dpu as &dyn Side, host] {
        let (first, deep) = (stat(side, "first")?, stat(side, "sub/deep")?);
        ensure!(first.inode == deep.inode, "two inodes on the {}: {first:?} {deep:?}", side.name());
        ensure!(first.links == 51, "{} links on the {}", first.links, side.name());
    }
    // What the DPU knows of the file's size may be a second old.
    wait_for("the host's change to show under all names", RUN_LIMIT, || {
        Ok((dpu.shell("cat sub/deep name-50")? == "changed on the host\nchanged on the host\n").then_some(()))
    })?;
    dpu.shell("rm first; echo more >> sub/deep; test \"$(tail -1 name-50)\" = more")?;
    ensure!(stat(host, "name-2")?.links == 50);
    // A name made on the host joins the inode that the DPU already knows.
    std::fs::hard_link(host.entry("name-2"), host.entry("by-host")).context("cannot link on the host")?;
    let (by_host, known) = (stat(dpu, "by-host")?, stat(dpu, "name-2")?);
    ensure!(by_host.inode == known.inode && by_host.links == 51, "{by_host:?} {known:?}");
    Ok("51 names".to_owned())
}

fn names_survive(stage: &mut Stage<'_>) -> Result<String> {
    use std::os::unix::ffi::OsStrExt;
    let dpu = &stage.dpu;
    dpu.shell(
        r#"printf x > "$(printf 'a%.0s' $(seq 255))"
           ! printf x > "$(printf 'a%.0s' $(seq 256))"
           printf x > "$(printf '\001\377\200 \n"*?')"
           ln -s "$(printf 'd/%.0s' $(seq 2047))x" long-link
           ln -s /etc/passwd absolute; ln -s ../outside relative"#,
    )?;
    let mut names: Vec<Vec<u8>> = Vec::new();
    for entry in std::fs::read_dir(stage.host.entry("")).context("cannot list")? {
        names.push(entry.context("cannot list")?.file_name().as_bytes().to_vec());
    }
    ensure!(names.contains(&b"a".repeat(255)), "the long name is missing");
    ensure!(names.contains(&b"\x01\xff\x80 \n\"*?".to_vec()), "the odd name is missing: {names:?}");
    ensure!(names.len() == 5, "{} names", names.len());
    let target = std::fs::read_link(stage.host.entry("long-link")).context("cannot read the link")?;
    ensure!(target.as_os_str().len() == 4095, "the link has {} bytes", target.as_os_str().len());
    // A link is text for the DPU: it leads into the DPU's own tree, not into the host's.
    ensure!(dpu.shell("readlink relative; cat absolute")?.contains("pjdfstest"));
    Ok("255-byte name, 4095-byte link".to_owned())
}

fn special_files(stage: &mut Stage<'_>) -> Result<String> {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let dpu = &stage.dpu;
    dpu.shell(
        "mkfifo pipe; (echo through the pipe > pipe &) ; test \"$(cat pipe)\" = 'through the pipe'
         mknod null c 1 3; mknod disk b 7 200; echo gone > null; test -z \"$(cat null)\"",
    )?;
    dpu.act(&["entry", "socket", &dpu.path("socket")])?;
    let meta = |name: &str| {
        std::fs::symlink_metadata(stage.host.entry(name)).with_context(|| format!("{name} is missing"))
    };
    ensure!(meta("pipe")?.file_type().is_fifo() && meta("socket")?.file_type().is_socket());
    let (null, disk) = (meta("null")?, meta("disk")?);
    ensure!(null.file_type().is_char_device() && null.rdev() == rustix::fs::makedev(1, 3), "{null:?}");
    ensure!(disk.file_type().is_block_device() && disk.rdev() == rustix::fs::makedev(7, 200), "{disk:?}");
    Ok("fifo, socket, character and block node".to_owned())
}

fn tmpfile(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    let (directory, name) = (dpu.path(""), dpu.path("named"));
    dpu.act(&["entry", "tmpfile", "--directory", &directory, "--name", &name, "--text", "born nameless"])?;
    ensure!(host.read("named")? == "born nameless");
    let attributes: Attributes = host.ask(&["entry", "stat", &host.path("named")])?;
    ensure!(attributes.links == 1 && attributes.mode & 0o7777 == 0o640, "{attributes:?}");
    Ok(String::new())
}

fn rename_flags(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    let rename = |how: &'static str, from: &str, to: &str| {
        ["entry", "rename", "--how", how, &dpu.path(from), &dpu.path(to)].map(str::to_owned)
    };
    let act = |words: [String; 6]| dpu.act(&words.each_ref().map(String::as_str));
    dpu.shell("echo a > a; echo b > b; mkdir d; echo in > d/in")?;
    dpu.refused("EEXIST", &rename("no-replace", "a", "b").each_ref().map(String::as_str))?;
    act(rename("no-replace", "a", "c"))?;
    act(rename("exchange", "b", "d"))?;
    ensure!(host.read("b/in")? == "in\n" && host.read("d")? == "b\n", "the exchange did not happen");
    dpu.refused("ENOENT", &rename("exchange", "b", "none").each_ref().map(String::as_str))?;
    act(rename("whiteout", "c", "e"))?;
    let whiteout: Attributes = host.ask(&["entry", "stat", &host.path("c")])?;
    ensure!(whiteout.mode & 0o170_000 == 0o020_000 && whiteout.rdev == (0, 0), "{whiteout:?}");
    ensure!(host.read("e")? == "a\n");
    Ok(String::new())
}

fn orphan(stage: &mut Stage<'_>) -> Result<String> {
    stage.dpu.act(&["entry", "orphan", &stage.dpu.path("orphan")])?;
    ensure!(!stage.host.entry("orphan").exists());
    Ok(String::new())
}

fn big_directory(stage: &mut Stage<'_>) -> Result<String> {
    let tree = |side: &dyn Side, verb: &str| {
        side.act(&["tree", verb, "--root", &side.path(""), "--files", "10000", "--per-directory", "10000"])
    };
    tree(&stage.host, "make")?;
    let seen: Seen =
        serde_json::from_str(&tree(&stage.dpu, "walk")?).context("cannot understand the result")?;
    // Removing while listing must leave nothing behind either.
    stage.dpu.shell("rm -r directory-0000; test -z \"$(ls)\"")?;
    Ok(format!("walked in {} ms", seen.milliseconds))
}
