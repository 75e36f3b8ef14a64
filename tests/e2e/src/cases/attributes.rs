//! Owners, permissions, extended attributes, ACLs, times.

use anyhow::{Context, Result, ensure};

use super::Case;
use crate::dpu::{RUN_LIMIT, program};
use crate::lab::{Profile, Stage};
use crate::side::{DpuSide, Side};
use crate::verbs::entry::Attributes;
use crate::wire::Credentials;

/// The cases.
pub const CASES: &[Case] = &[
    Case::basic(
        "owners",
        &Profile::AUTO,
        owners_of_created_files,
        "files belong to the caller; permissions hold",
    ),
    Case::basic(
        "set-id",
        &Profile::AUTO,
        set_id_bits,
        "set-group-id directories; bits fall when others write",
    ),
    Case::basic("xattr", &Profile::AUTO, extended_attributes, "set, get, list, remove, flags, both ways"),
    Case::basic(
        "acl",
        &Profile::AUTO,
        access_control_lists,
        "setfacl in the DPU, getfacl on the host, and they decide",
    ),
    Case::basic("times", &Profile::AUTO, times, "nanoseconds, years before 1970, now, kept by the host"),
];

/// Runs a script in the case's directory as somebody else.
pub(super) fn shell_as(
    side: &DpuSide<'_>,
    uid: u32,
    gid: u32,
    groups: &[u32],
    script: &str,
) -> Result<String> {
    let mut program = program(&["sh", "-ec", script]);
    program.cwd = Some(side.directory().to_owned());
    program.user = Some(Credentials { uid, gid, groups: groups.to_vec() });
    side.dpu.run_program(program, RUN_LIMIT)?.success()
}

fn refused_as(side: &DpuSide<'_>, uid: u32, gid: u32, script: &str) -> Result<()> {
    let mut program = program(&["sh", "-ec", script]);
    program.cwd = Some(side.directory().to_owned());
    program.user = Some(Credentials { uid, gid, groups: Vec::new() });
    let said = side.dpu.run_program(program, RUN_LIMIT)?.failure()?;
    ensure!(said.contains("ermission denied") || said.contains("not permitted"), "{script}: {said}");
    Ok(())
}

fn owners_of_created_files(stage: &mut Stage<'_>) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    let dpu = &stage.dpu;
    shell_as(dpu, 1001, 2002, &[], "umask 027; echo x > file; mkdir dir; ln -s x link; mkfifo pipe")?;
    for (name, mode) in [("file", 0o640), ("dir", 0o750), ("link", 0o777), ("pipe", 0o640)] {
        let meta = std::fs::symlink_metadata(stage.host.entry(name)).with_context(|| name.to_owned())?;
        ensure!((meta.uid(), meta.gid()) == (1001, 2002), "{name} belongs to {}:{}", meta.uid(), meta.gid());
        ensure!(meta.mode() & 0o7777 == mode, "{name} has mode {:o}", meta.mode() & 0o7777);
    }
    refused_as(dpu, 1003, 1003, "cat file")?;
    refused_as(dpu, 1003, 1003, "echo x > dir/new")?;
    refused_as(dpu, 1003, 1003, "chmod 777 file")?;
    shell_as(dpu, 1003, 2002, &[], "cat file; ls dir")?;
    refused_as(dpu, 1003, 2002, "echo x >> file")?;
    dpu.shell("chown 4000000000:65534 file")?;
    let meta = std::fs::metadata(stage.host.entry("file")).context("file")?;
    ensure!((meta.uid(), meta.gid()) == (4_000_000_000, 65534), "{}:{}", meta.uid(), meta.gid());
    Ok(String::new())
}

fn set_id_bits(stage: &mut Stage<'_>) -> Result<String> {
    use std::os::unix::fs::MetadataExt;
    let dpu = &stage.dpu;
    dpu.shell("mkdir shared; chgrp 3003 shared; chmod 2777 shared")?;
    shell_as(dpu, 1001, 2002, &[], "echo x > shared/file; mkdir shared/dir")?;
    let meta = |name: &str| std::fs::metadata(stage.host.entry(name)).with_context(|| name.to_owned());
    ensure!(
        meta("shared/file")?.gid() == 3003 && meta("shared/dir")?.gid() == 3003,
        "the group is not inherited"
    );
    ensure!(meta("shared/dir")?.mode() & 0o2000 != 0, "the bit is not inherited by a directory");
    let fallen = |script: &str| -> Result<()> {
        dpu.shell("rm -f tool; echo x > tool; chown 1001:1001 tool; chmod 6777 tool")?;
        ensure!(meta("tool")?.mode() & 0o7777 == 0o6777);
        shell_as(dpu, 1005, 1005, &[], script)?;
        let mode = meta("tool")?.mode() & 0o7777;
        ensure!(mode == 0o777, "the mode is {mode:o} after {script:?} by somebody else");
        Ok(())
    };
    fallen("echo more >> tool")?;
    fallen("truncate -s 0 tool")?;
    fallen("echo over > tool")?;
    Ok(String::new())
}

fn extended_attributes(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    host.write("file", "x")?;
    let set = |side: &dyn Side, name: &str, value: &str, more: &[&str]| {
        side.act(&[&["entry", "set-xattr", &side.path("file"), name, value], more].concat())
    };
    let get = |side: &dyn Side, name: &str| -> Result<String> {
        serde_json::from_str(&side.act(&["entry", "get-xattr", &side.path("file"), name])?)
            .context("cannot understand")
    };
    set(dpu, "user.colour", "green", &["--create"])?;
    ensure!(get(host, "user.colour")? == "green");
    set(host, "user.shape", "round", &[])?;
    ensure!(get(dpu, "user.shape")? == "round");
    let file = dpu.path("file");
    dpu.refused("EEXIST", &["entry", "set-xattr", &file, "user.colour", "red", "--create"])?;
    dpu.refused("ENODATA", &["entry", "set-xattr", &file, "user.none", "red", "--replace"])?;
    dpu.refused("ENODATA", &["entry", "get-xattr", &file, "user.none"])?;
    let large = "v".repeat(3000);
    set(dpu, "user.large", &large, &[])?;
    ensure!(get(host, "user.large")? == large);
    set(dpu, "user.empty", "", &[])?;
    ensure!(get(dpu, "user.empty")?.is_empty());
    let names: Vec<String> = dpu.ask(&["entry", "list-xattr", &file])?;
    ensure!(names == ["user.colour", "user.empty", "user.large", "user.shape"], "{names:?}");
    dpu.act(&["entry", "remove-xattr", &file, "user.colour"])?;
    host.refused("ENODATA", &["entry", "get-xattr", &host.path("file"), "user.colour"])?;
    dpu.refused("ENODATA", &["entry", "remove-xattr", &file, "user.colour"])?;
    Ok(String::new())
}

fn access_control_lists(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    dpu.shell("echo secret > file; chmod 600 file; mkdir dir; chmod 700 dir")?;
    refused_as(dpu, 1001, 1001, "cat file")?;
    dpu.shell("setfacl -m u:1001:r,g:2002:rw file; setfacl -d -m u:1001:rwx dir; setfacl -m u:1001:rwx dir")?;
    let listing = |side: &dyn Side| side.shell(&format!("getfacl -n -c -p {}", side.path("file")));
    let (there, here) = (listing(dpu)?, listing(host)?);
    ensure!(there == here && here.contains("user:1001:r--"), "DPU: {there} host: {here}");
    shell_as(dpu, 1001, 1001, &[], "cat file; echo mine > dir/mine")?;
    refused_as(dpu, 1001, 1001, "echo x >> file")?;
    shell_as(dpu, 1009, 2002, &[], "echo x >> file")?;
    refused_as(dpu, 1009, 1009, "ls dir")?;
    dpu.shell("umask 077; echo x > dir/by-root; mkdir dir/sub")?;
    let inherited =
        host.shell(&format!("getfacl -n -c -p {} {}", host.path("dir/by-root"), host.path("dir/sub")))?;
    ensure!(
        inherited.contains("user:1001:rwx") && inherited.contains("default:user:1001:rwx"),
        "{inherited}"
    );
    shell_as(dpu, 1001, 1001, &[], "echo x >> dir/by-root")?;
    host.shell(&format!("setfacl -b {}", host.path("file")))?;
    // The DPU may keep attributes for a second.
    crate::deadline::wait_for("the removed ACL to show in the DPU", RUN_LIMIT, || {
        Ok(refused_as(dpu, 1001, 1001, "cat file").is_ok().then_some(()))
    })?;
    Ok(String::new())
}

fn times(stage: &mut Stage<'_>) -> Result<String> {
    let (dpu, host) = (&stage.dpu, &stage.host);
    host.write("file", "x")?;
    for (stamp, expected) in
        [("@1000000000", (1_000_000_000, 0)), ("@-86400", (-86_400, 0)), ("@4102444800", (4_102_444_800, 0))]
    {
        dpu.shell(&format!("touch -d {stamp} file"))?;
        let attributes: Attributes = host.ask(&["entry", "stat", &host.path("file")])?;
        ensure!(attributes.modified == expected, "{stamp}: {:?}", attributes.modified);
    }
    host.shell(&format!("touch -d '2020-02-02 02:02:02.123456789 UTC' {}", host.path("fine")))?;
    let attributes: Attributes = dpu.ask(&["entry", "stat", &dpu.path("fine")])?;
    ensure!(attributes.modified == (1_580_608_922, 123_456_789), "{:?}", attributes.modified);
    // "Now" is the host's now: without the writeback cache the host stamps what the DPU writes.
    dpu.shell("echo y >> file; sync")?;
    let now =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).context("the clock")?.as_secs();
    let attributes: Attributes = host.ask(&["entry", "stat", &host.path("file")])?;
    let written = u64::try_from(attributes.modified.0).unwrap_or(0);
    ensure!(now.abs_diff(written) <= 5, "written at {written}, now {now}");
    Ok(String::new())
}
