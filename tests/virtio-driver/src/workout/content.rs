//! File content: reading, writing, holes, copies, open flags.

use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use super::{Bench, Problem, Step, ensure, pattern, refused, same, same_bytes};
use crate::fuse::abi::{CopyFileRangeIn, Opcode, ROOT};
use crate::memory::PAGE;

pub(super) fn written_bytes_come_back(b: &mut Bench<'_>) -> Step {
    let largest = b.client().max_payload();
    let file = b.client().create(ROOT, "content", libc::O_RDWR, 0o644)?;
    let (node, handle) = (file.entry.nodeid, file.open.fh);
    let mut offset = 0u64;
    let mut expected = Vec::new();
    for (seed, len) in
        [1, 7, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 65_536 + 123, largest].into_iter().enumerate()
    {
        let data = pattern(len, seed as u64);
        same("bytes written", b.client().write(node, handle, offset, &data)?, len)?;
        same_bytes("read back", &b.client().read(node, handle, offset, len)?, &data)?;
        expected.extend_from_slice(&data);
        offset += len as u64;
    }
    same_bytes("file on the host", &std::fs::read(b.host("content"))?, &expected)?;

    // Overwrite across page borders in the middle.
    let patch = pattern(2 * PAGE + 17, 99);
    b.client().write(node, handle, 1_001, &patch)?;
    expected[1_001..1_001 + patch.len()].copy_from_slice(&patch);
    same_bytes("patched file on the host", &std::fs::read(b.host("content"))?, &expected)?;
    let window = b.client().read(node, handle, 900, 4 * PAGE)?;
    same_bytes("window over the patch", &window, &expected[900..900 + 4 * PAGE])?;
    b.client().flush(node, handle, 1)?;
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "content")?)
}

pub(super) fn host_changes_are_read(b: &mut Bench<'_>) -> Step {
    let path = b.host("from-host");
    std::fs::write(&path, pattern(10_000, 1))?;
    let entry = b.client().lookup(ROOT, "from-host")?;
    let open = b.client().open(entry.nodeid, libc::O_RDONLY)?;
    same_bytes("first", &b.client().read(entry.nodeid, open.fh, 0, 12_288)?, &pattern(10_000, 1))?;
    std::fs::OpenOptions::new().write(true).open(&path)?.write_all_at(b"changed", 5_000)?;
    same_bytes("changed", &b.client().read(entry.nodeid, open.fh, 5_000, 7)?, b"changed")?;
    b.client().release(entry.nodeid, open.fh)?;
    Ok(b.client().unlink(ROOT, "from-host")?)
}

pub(super) fn reads_at_the_end_are_short(b: &mut Bench<'_>) -> Step {
    std::fs::write(b.host("short"), b"0123456789")?;
    let node = b.client().lookup(ROOT, "short")?.nodeid;
    let handle = b.client().open(node, libc::O_RDONLY)?.fh;
    same_bytes("tail", &b.client().read(node, handle, 6, PAGE)?, b"6789")?;
    same("at the end", b.client().read(node, handle, 10, PAGE)?.len(), 0)?;
    same("beyond the end", b.client().read(node, handle, 1 << 40, PAGE)?.len(), 0)?;
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "short")?)
}

pub(super) fn holes_read_as_zeros(b: &mut Bench<'_>) -> Step {
    let file = b.client().create(ROOT, "sparse", libc::O_RDWR, 0o600)?;
    let (node, handle) = (file.entry.nodeid, file.open.fh);
    b.client().write(node, handle, 1 << 20, b"island")?;
    same_bytes("hole", &b.client().read(node, handle, 8_192, PAGE)?, &[0; PAGE])?;
    same("data found", b.client().lseek(node, handle, 0, libc::SEEK_DATA as u32)?, 1 << 20)?;
    same("hole found", b.client().lseek(node, handle, 0, libc::SEEK_HOLE as u32)?, 0)?;
    refused(
        "no data behind the end",
        b.client().lseek(node, handle, 2 << 20, libc::SEEK_DATA as u32),
        Errno::NXIO,
    )?;
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "sparse")?)
}

pub(super) fn space_can_be_allocated(b: &mut Bench<'_>) -> Step {
    let file = b.client().create(ROOT, "space", libc::O_RDWR, 0o600)?;
    let (node, handle) = (file.entry.nodeid, file.open.fh);
    b.client().fallocate(node, handle, 0, 65_536, 0)?;
    same("size", std::fs::metadata(b.host("space"))?.len(), 65_536)?;
    b.client().write(node, handle, 0, &pattern(65_536, 5))?;
    let punch = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as u32;
    b.client().fallocate(node, handle, 4_096, 8_192, punch)?;
    let mut expected = pattern(65_536, 5);
    expected[4_096..12_288].fill(0);
    same_bytes("punched file on the host", &std::fs::read(b.host("space"))?, &expected)?;
    b.client().release(node, handle)?;
    Ok(b.client().unlink(ROOT, "space")?)
}

pub(super) fn ranges_are_copied(b: &mut Bench<'_>) -> Step {
    std::fs::write(b.host("copy-from"), pattern(50_000, 3))?;
    let from = b.client().lookup(ROOT, "copy-from")?.nodeid;
    let from_handle = b.client().open(from, libc::O_RDONLY)?.fh;
    let to = b.client().create(ROOT, "copy-to", libc::O_RDWR, 0o600)?;
    let args = CopyFileRangeIn {
        fh_in: from_handle,
        off_in: 1_000,
        nodeid_out: to.entry.nodeid,
        fh_out: to.open.fh,
        off_out: 10,
        len: 40_000,
        flags: 0,
    };
    same("bytes copied", b.client().copy_file_range(from, args)?, 40_000)?;
    let copied = std::fs::read(b.host("copy-to"))?;
    same_bytes("copy", &copied[10..], &pattern(50_000, 3)[1_000..41_000])?;
    b.client().release(from, from_handle)?;
    b.client().release(to.entry.nodeid, to.open.fh)?;
    b.client().unlink(ROOT, "copy-from")?;
    Ok(b.client().unlink(ROOT, "copy-to")?)
}

pub(super) fn open_flags_are_obeyed(b: &mut Bench<'_>) -> Step {
    let exclusive = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
    let file = b.client().create(ROOT, "flags", exclusive, 0o640)?;
    let (node, handle) = (file.entry.nodeid, file.open.fh);
    refused("O_EXCL on an existing name", b.client().create(ROOT, "flags", exclusive, 0o640), Errno::EXIST)?;
    b.client().write(node, handle, 0, b"content")?;
    b.client().release(node, handle)?;

    let read_only = b.client().open(node, libc::O_RDONLY)?.fh;
    refused("write through a read-only handle", b.client().write(node, read_only, 0, b"x"), Errno::BADF)?;
    b.client().release(node, read_only)?;
    let write_only = b.client().open(node, libc::O_WRONLY)?.fh;
    refused("read through a write-only handle", b.client().read(node, write_only, 0, 1), Errno::BADF)?;
    b.client().release(node, write_only)?;
    refused("released handle", b.client().read(node, write_only, 0, 1), Errno::BADF)?;

    let truncating = b.client().open(node, libc::O_RDWR | libc::O_TRUNC)?.fh;
    same("size after O_TRUNC", std::fs::metadata(b.host("flags"))?.len(), 0)?;
    b.client().release(node, truncating)?;
    Ok(b.client().unlink(ROOT, "flags")?)
}

pub(super) fn an_unlinked_open_file_lives_on(b: &mut Bench<'_>) -> Step {
    let file = b.client().create(ROOT, "doomed", libc::O_RDWR, 0o600)?;
    let (node, handle) = (file.entry.nodeid, file.open.fh);
    b.client().write(node, handle, 0, b"still here")?;
    b.client().unlink(ROOT, "doomed")?;
    ensure("the name is gone on the host", !b.host("doomed").exists())?;
    same_bytes("content", &b.client().read(node, handle, 0, 64)?, b"still here")?;
    same("links", b.client().getattr(node, Some(handle))?.attr.nlink, 0)?;
    b.client().write(node, handle, 5, b"more bytes")?;
    same("size", b.client().getattr(node, Some(handle))?.attr.size, 15)?;
    Ok(b.client().release(node, handle)?)
}

pub(super) fn sync_operations_succeed(b: &mut Bench<'_>) -> Step {
    let file = b.client().create(ROOT, "synced", libc::O_RDWR, 0o600)?;
    let (node, handle) = (file.entry.nodeid, file.open.fh);
    b.client().write(node, handle, 0, b"to disk")?;
    b.client().fsync(Opcode::Fsync, node, handle, false)?;
    b.client().fsync(Opcode::Fsync, node, handle, true)?;
    b.client().release(node, handle)?;
    let dir = b.client().opendir(ROOT)?.fh;
    b.client().fsync(Opcode::Fsyncdir, ROOT, dir, false)?;
    b.client().releasedir(ROOT, dir)?;
    match b.client().syncfs(ROOT) {
        Ok(()) => {}
        Err(error) if error.errno() == Some(Errno::NOSYS) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(b.client().unlink(ROOT, "synced")?)
}

pub(super) fn unnamed_files_work(b: &mut Bench<'_>) -> Step {
    let made = b.client().tmpfile(ROOT, libc::O_RDWR, 0o600);
    if !b.expect.tmpfile {
        return refused("TMPFILE where it is not supported", made, Errno::NOSYS);
    }
    let file = made?;
    let (node, handle) = (file.entry.nodeid, file.open.fh);
    b.client().write(node, handle, 0, b"unnamed")?;
    same("names in the export", std::fs::read_dir(b.shared)?.count(), 0)?;
    let linked = b.client().link(node, ROOT, "named-at-last")?;
    same("node of the link", linked.nodeid, node)?;
    same_bytes("content by name", &std::fs::read(b.host("named-at-last"))?, b"unnamed")?;
    let attr = b.client().getattr(node, Some(handle))?.attr;
    same("mode", attr.mode & 0o7777, 0o600)?;
    b.client().release(node, handle)?;
    b.client().unlink(ROOT, "named-at-last").map_err(Problem::from)
}
