//! Names: lookup, directories, renames, links, forgetting.

use std::collections::BTreeMap;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use rustix::io::Errno;

use super::{Bench, Problem, Step, ensure, refused, same, same_bytes};
use crate::fuse::FuseError;
use crate::fuse::abi::ROOT;
use crate::fuse::dirent::DirEntry;

/// `RENAME_NOREPLACE`.
const NOREPLACE: u32 = 1;
/// `RENAME_EXCHANGE`.
const EXCHANGE: u32 = 2;

pub(super) fn missing_names_are_enoent(b: &mut Bench<'_>) -> Step {
    match b.client().lookup(ROOT, "nothing-here") {
        Err(FuseError::Errno(Errno::NOENT)) => Ok(()),
        // A node id of 0 lets the DPU remember that the name is missing.
        Ok(entry) if entry.nodeid == 0 => Ok(()),
        other => Err(Problem(format!("got {other:?}"))),
    }?;
    refused("unlink", b.client().unlink(ROOT, "nothing-here"), Errno::NOENT)?;
    refused("rmdir", b.client().rmdir(ROOT, "nothing-here"), Errno::NOENT)?;
    refused("rename", b.client().rename(ROOT, "nothing-here", ROOT, "elsewhere"), Errno::NOENT)
}

pub(super) fn directories_list_every_entry_once(b: &mut Bench<'_>) -> Step {
    const FILES: usize = 300;
    let dir = b.client().mkdir(ROOT, "listed", 0o755)?.nodeid;
    for index in 0..FILES {
        // Long names, so that the listing takes many buffers.
        std::fs::write(b.host(&format!("listed/entry-{index:04}-{}", "x".repeat(40))), index.to_string())?;
    }
    for plus in [false, true] {
        let handle = b.client().opendir(dir)?.fh;
        let entries = b.client().read_whole_dir(dir, handle, plus)?;
        check_listing(b, &entries, FILES, plus)?;
        // Continuing from an offset in the middle gives exactly the rest.
        let middle = entries.len() / 2;
        let rest = b.client().readdir(dir, handle, entries[middle].offset, 1 << 16)?;
        same("name behind the middle", &rest[0].name, &entries[middle + 1].name)?;
        b.client().releasedir(dir, handle)?;
        for entry in entries.iter().filter_map(|entry| entry.entry).filter(|entry| entry.nodeid != 0) {
            b.client().forget(entry.nodeid, 1)?;
        }
    }
    std::fs::remove_dir_all(b.host("listed"))?;
    Ok(())
}

fn check_listing(b: &Bench<'_>, entries: &[DirEntry], files: usize, plus: bool) -> Step {
    let mut seen: BTreeMap<&[u8], &DirEntry> = BTreeMap::new();
    for entry in entries {
        ensure(
            &format!("{:?} is listed twice", String::from_utf8_lossy(&entry.name)),
            seen.insert(&entry.name, entry).is_none(),
        )?;
    }
    let named: Vec<_> = entries.iter().filter(|entry| entry.name != b"." && entry.name != b"..").collect();
    same("entries", named.len(), files)?;
    for entry in named {
        let name = String::from_utf8_lossy(&entry.name);
        let host = std::fs::metadata(b.host("listed").join(&*name))?;
        same("type", entry.kind, u32::from(libc::DT_REG))?;
        same("inode number", entry.ino, host.ino())?;
        if plus {
            let Some(full) = entry.entry else {
                return Err(Problem(format!("{name} has no attributes")));
            };
            ensure("READDIRPLUS gives a node", full.nodeid != 0)?;
            same("size", full.attr.size, host.len())?;
        }
    }
    Ok(())
}

pub(super) fn directories_nest(b: &mut Bench<'_>) -> Step {
    let outer = b.client().mkdir(ROOT, "outer", 0o755)?;
    ensure("a directory's mode says so", outer.attr.mode & libc::S_IFMT == libc::S_IFDIR)?;
    let inner = b.client().mkdir(outer.nodeid, "inner", 0o700)?;
    b.client().mkdir(inner.nodeid, "innermost", 0o700)?;
    same("walked node", b.client().walk("outer/inner")?.nodeid, inner.nodeid)?;
    refused("rmdir of a full directory", b.client().rmdir(ROOT, "outer"), Errno::NOTEMPTY)?;
    refused("mkdir over a name", b.client().mkdir(ROOT, "outer", 0o755), Errno::EXIST)?;
    refused("unlink of a directory", b.client().unlink(ROOT, "outer"), Errno::ISDIR)?;
    b.client().rmdir(inner.nodeid, "innermost")?;
    b.client().rmdir(outer.nodeid, "inner")?;
    b.client().rmdir(ROOT, "outer")?;
    ensure("the directory is gone on the host", !b.host("outer").exists())
}

pub(super) fn renames_move(b: &mut Bench<'_>) -> Step {
    let dir = b.client().mkdir(ROOT, "there", 0o755)?.nodeid;
    std::fs::write(b.host("a"), "content a")?;
    std::fs::write(b.host("b"), "content b")?;
    let node = b.client().lookup(ROOT, "a")?.nodeid;

    b.client().rename(ROOT, "a", dir, "moved")?;
    same("node after the move", b.client().lookup(dir, "moved")?.nodeid, node)?;
    refused("NOREPLACE", b.client().rename2(dir, "moved", ROOT, "b", NOREPLACE), Errno::EXIST)?;
    b.client().rename2(dir, "moved", ROOT, "b", EXCHANGE)?;
    same_bytes("exchanged here", &std::fs::read(b.host("b"))?, b"content a")?;
    same_bytes("exchanged there", &std::fs::read(b.host("there/moved"))?, b"content b")?;
    b.client().rename(dir, "moved", ROOT, "b")?;
    same_bytes("replaced", &std::fs::read(b.host("b"))?, b"content b")?;
    ensure("the old name is gone", !b.host("there/moved").exists())?;
    b.client().unlink(ROOT, "b")?;
    Ok(b.client().rmdir(ROOT, "there")?)
}

pub(super) fn links_share_their_target(b: &mut Bench<'_>) -> Step {
    std::fs::write(b.host("target"), "shared bytes")?;
    let target = b.client().lookup(ROOT, "target")?;
    let second = b.client().link(target.nodeid, ROOT, "second")?;
    same("node of the hard link", second.nodeid, target.nodeid)?;
    same("link count", second.attr.nlink, 2)?;
    same("inode on the host", std::fs::metadata(b.host("second"))?.ino(), second.attr.ino)?;

    let soft = b.client().symlink(ROOT, "soft", "target")?;
    ensure("a symlink's mode says so", soft.attr.mode & libc::S_IFMT == libc::S_IFLNK)?;
    same_bytes("symlink", &b.client().readlink(soft.nodeid)?, b"target")?;
    same("symlink on the host", std::fs::read_link(b.host("soft"))?.as_os_str(), "target".as_ref())?;
    let long = "t/".repeat(1_000);
    let long_link = b.client().symlink(ROOT, "long", &long)?;
    same_bytes("long symlink", &b.client().readlink(long_link.nodeid)?, long.as_bytes())?;

    b.client().unlink(ROOT, "target")?;
    same("link count after unlink", b.client().getattr(target.nodeid, None)?.attr.nlink, 1)?;
    for name in ["second", "soft", "long"] {
        b.client().unlink(ROOT, name)?;
    }
    Ok(())
}

pub(super) fn special_files_are_made(b: &mut Bench<'_>) -> Step {
    let fifo = b.client().mknod(ROOT, "fifo", libc::S_IFIFO | 0o600, 0)?;
    ensure("fifo on the host", std::fs::symlink_metadata(b.host("fifo"))?.file_type().is_fifo())?;
    let opened = b.client().open(fifo.nodeid, libc::O_RDONLY);
    ensure("a fifo is not opened on the host", opened.is_err())?;
    let socket = b.client().mknod(ROOT, "socket", libc::S_IFSOCK | 0o600, 0)?;
    ensure("a socket is not opened on the host", b.client().open(socket.nodeid, libc::O_RDWR).is_err())?;
    let plain = b.client().mknod(ROOT, "plain", libc::S_IFREG | 0o640, 0)?;
    same("mode of a plain file", plain.attr.mode, libc::S_IFREG | 0o640)?;
    for name in ["fifo", "socket", "plain"] {
        b.client().unlink(ROOT, name)?;
    }
    Ok(())
}

pub(super) fn forgotten_nodes_come_back(b: &mut Bench<'_>) -> Step {
    for round in 0..3 {
        let mut nodes = Vec::new();
        for index in 0..50 {
            let name = format!("forget-{index}");
            if round == 0 {
                std::fs::write(b.host(&name), &name)?;
            }
            let entry = b.client().lookup(ROOT, &name)?;
            same("second lookup", b.client().lookup(ROOT, &name)?.nodeid, entry.nodeid)?;
            same("size", b.client().getattr(entry.nodeid, None)?.attr.size, name.len() as u64)?;
            nodes.push((entry.nodeid, 2));
        }
        if round == 1 {
            b.client().batch_forget(&nodes)?;
        } else {
            for (node, count) in nodes {
                b.client().forget(node, count)?;
            }
        }
        b.client().drain_forgets()?;
    }
    for index in 0..50 {
        b.client().unlink(ROOT, format!("forget-{index}"))?;
    }
    Ok(())
}
