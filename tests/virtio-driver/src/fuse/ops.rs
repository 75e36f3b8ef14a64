//! One method per FUSE operation, with arguments and chain as Linux 6.12 sends them.

use zerocopy::{FromBytes, IntoBytes};

use super::abi::*;
use super::client::Client;
use super::dirent::{self, DirEntry};
use super::request::{Call, Payload, joined, name_bytes};
use super::{FuseError, FuseResult};
use crate::Error;
use crate::memory::PAGE;

/// A file or directory that was created and opened.
#[derive(Clone, Copy, Debug)]
pub struct Created {
    /// Node and attributes.
    pub entry: EntryOut,
    /// Handle.
    pub open: OpenOut,
}

/// Pads extensions (security contexts, supplementary groups) to whole units of 8 bytes.
fn padded(extension: &[u8]) -> (Vec<u8>, u16) {
    let mut bytes = extension.to_vec();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    let units = (bytes.len() / 8) as u16;
    (bytes, units)
}

/// A `FUSE_EXT_GROUPS` extension naming `groups`.
pub fn group_extension(groups: &[u32]) -> Vec<u8> {
    let body = 4 + 4 * groups.len();
    let size = (size_of::<ExtHeader>() + body).next_multiple_of(8);
    let mut bytes = ExtHeader { size: size as u32, kind: EXT_GROUPS }.as_bytes().to_vec();
    bytes.extend_from_slice(&(groups.len() as u32).to_ne_bytes());
    groups.iter().for_each(|group| bytes.extend_from_slice(&group.to_ne_bytes()));
    bytes.resize(size, 0);
    bytes
}

impl Client {
    /// LOOKUP.
    pub fn lookup(&mut self, dir: u64, name: impl AsRef<[u8]>) -> FuseResult<EntryOut> {
        let name = name_bytes(name);
        self.call_for(&Call::new(Opcode::Lookup, dir, &[&name], size_of::<EntryOut>()))
    }

    /// LOOKUP of a path, component by component from the root.
    pub fn walk(&mut self, path: &str) -> FuseResult<EntryOut> {
        let mut entry = EntryOut { nodeid: ROOT, ..Default::default() };
        for name in path.split('/').filter(|name| !name.is_empty()) {
            entry = self.lookup(entry.nodeid, name)?;
        }
        Ok(entry)
    }

    /// GETATTR, through a handle if there is one.
    pub fn getattr(&mut self, node: u64, handle: Option<u64>) -> FuseResult<AttrOut> {
        let args =
            GetattrIn { getattr_flags: handle.map_or(0, |_| GETATTR_FH), dummy: 0, fh: handle.unwrap_or(0) };
        self.call_for(&Call::new(Opcode::Getattr, node, &[args.as_bytes()], size_of::<AttrOut>()))
    }

    /// STATX.
    pub fn statx(&mut self, node: u64, sx_mask: u32) -> FuseResult<StatxOut> {
        let args = StatxIn { sx_mask, ..Default::default() };
        self.call_for(&Call::new(Opcode::Statx, node, &[args.as_bytes()], size_of::<StatxOut>()))
    }

    /// SETATTR.
    pub fn setattr(&mut self, node: u64, args: SetattrIn) -> FuseResult<AttrOut> {
        self.call_for(&Call::new(Opcode::Setattr, node, &[args.as_bytes()], size_of::<AttrOut>()))
    }

    /// SETATTR of the size alone.
    pub fn truncate(&mut self, node: u64, size: u64) -> FuseResult<AttrOut> {
        self.setattr(node, SetattrIn { valid: fattr::SIZE, size, ..Default::default() })
    }

    /// SETATTR of the mode alone.
    pub fn chmod(&mut self, node: u64, mode: u32) -> FuseResult<AttrOut> {
        self.setattr(node, SetattrIn { valid: fattr::MODE, mode, ..Default::default() })
    }

    /// READLINK.
    pub fn readlink(&mut self, node: u64) -> FuseResult<Vec<u8>> {
        let call = Call::new(Opcode::Readlink, node, &[], 0);
        self.call(&call.payload(Payload::FromDevice(PAGE - 1)).variable())
    }

    /// SYMLINK.
    pub fn symlink(
        &mut self,
        dir: u64,
        name: impl AsRef<[u8]>,
        target: impl AsRef<[u8]>,
    ) -> FuseResult<EntryOut> {
        self.make(Opcode::Symlink, dir, &[name_bytes(name), name_bytes(target)].concat(), &[])
    }

    /// MKNOD.
    pub fn mknod(&mut self, dir: u64, name: impl AsRef<[u8]>, mode: u32, rdev: u32) -> FuseResult<EntryOut> {
        let args = MknodIn { mode, rdev, umask: 0o022, padding: 0 };
        self.make(Opcode::Mknod, dir, &joined(&args, &[name.as_ref()]), &[])
    }

    /// MKDIR.
    pub fn mkdir(&mut self, dir: u64, name: impl AsRef<[u8]>, mode: u32) -> FuseResult<EntryOut> {
        self.mkdir_with(dir, name, mode, &[])
    }

    /// MKDIR with extensions.
    pub fn mkdir_with(
        &mut self,
        dir: u64,
        name: impl AsRef<[u8]>,
        mode: u32,
        extension: &[u8],
    ) -> FuseResult<EntryOut> {
        let args = MkdirIn { mode, umask: 0o022 };
        self.make(Opcode::Mkdir, dir, &joined(&args, &[name.as_ref()]), extension)
    }

    /// LINK: another name for `node`.
    pub fn link(&mut self, node: u64, dir: u64, name: impl AsRef<[u8]>) -> FuseResult<EntryOut> {
        self.make(Opcode::Link, dir, &joined(&LinkIn { oldnodeid: node }, &[name.as_ref()]), &[])
    }

    /// An operation that makes a name and answers with an entry; `args` as they go over the wire.
    pub fn make(&mut self, opcode: Opcode, dir: u64, args: &[u8], extension: &[u8]) -> FuseResult<EntryOut> {
        let (extension, extension_units) = padded(extension);
        let parts = [args, extension.as_slice()];
        let call = Call::new(opcode, dir, &parts, size_of::<EntryOut>());
        self.call_for(&Call { extension_units, ..call })
    }

    /// UNLINK.
    pub fn unlink(&mut self, dir: u64, name: impl AsRef<[u8]>) -> FuseResult<()> {
        self.call(&Call::new(Opcode::Unlink, dir, &[&name_bytes(name)], 0)).map(drop)
    }

    /// RMDIR.
    pub fn rmdir(&mut self, dir: u64, name: impl AsRef<[u8]>) -> FuseResult<()> {
        self.call(&Call::new(Opcode::Rmdir, dir, &[&name_bytes(name)], 0)).map(drop)
    }

    /// RENAME.
    pub fn rename(
        &mut self,
        dir: u64,
        name: impl AsRef<[u8]>,
        newdir: u64,
        newname: impl AsRef<[u8]>,
    ) -> FuseResult<()> {
        let args = joined(&RenameIn { newdir }, &[name.as_ref(), newname.as_ref()]);
        self.call(&Call::new(Opcode::Rename, dir, &[&args], 0)).map(drop)
    }

    /// RENAME2 with `RENAME_*` flags.
    pub fn rename2(
        &mut self,
        dir: u64,
        name: impl AsRef<[u8]>,
        newdir: u64,
        newname: impl AsRef<[u8]>,
        flags: u32,
    ) -> FuseResult<()> {
        let args = joined(&Rename2In { newdir, flags, padding: 0 }, &[name.as_ref(), newname.as_ref()]);
        self.call(&Call::new(Opcode::Rename2, dir, &[&args], 0)).map(drop)
    }

    /// OPEN.
    pub fn open(&mut self, node: u64, flags: i32) -> FuseResult<OpenOut> {
        self.open_with(Opcode::Open, node, flags, 0)
    }

    /// OPENDIR.
    pub fn opendir(&mut self, node: u64) -> FuseResult<OpenOut> {
        self.open_with(Opcode::Opendir, node, libc::O_DIRECTORY, 0)
    }

    /// OPEN or OPENDIR with `FUSE_OPEN_*` flags.
    pub fn open_with(
        &mut self,
        opcode: Opcode,
        node: u64,
        flags: i32,
        open_flags: u32,
    ) -> FuseResult<OpenOut> {
        let args = OpenIn { flags: flags as u32, open_flags };
        self.call_for(&Call::new(opcode, node, &[args.as_bytes()], size_of::<OpenOut>()))
    }

    /// CREATE.
    pub fn create(&mut self, dir: u64, name: impl AsRef<[u8]>, flags: i32, mode: u32) -> FuseResult<Created> {
        self.create_with(Opcode::Create, dir, name, flags, mode, &[])
    }

    /// TMPFILE. Linux sends the name "/", which means nothing.
    pub fn tmpfile(&mut self, dir: u64, flags: i32, mode: u32) -> FuseResult<Created> {
        self.create_with(Opcode::Tmpfile, dir, "/", flags, mode, &[])
    }

    /// CREATE or TMPFILE with extensions.
    pub fn create_with(
        &mut self,
        opcode: Opcode,
        dir: u64,
        name: impl AsRef<[u8]>,
        flags: i32,
        mode: u32,
        extension: &[u8],
    ) -> FuseResult<Created> {
        let args = CreateIn { flags: flags as u32, mode: mode | libc::S_IFREG, umask: 0o022, open_flags: 0 };
        let args = joined(&args, &[name.as_ref()]);
        let (extension, extension_units) = padded(extension);
        let parts = [args.as_slice(), extension.as_slice()];
        let call = Call::new(opcode, dir, &parts, size_of::<EntryOut>() + size_of::<OpenOut>());
        let body = self.call(&Call { extension_units, ..call })?;
        let parsed = EntryOut::read_from_prefix(&body)
            .ok()
            .and_then(|(entry, rest)| Some(Created { entry, open: OpenOut::read_from_bytes(rest).ok()? }));
        parsed.ok_or_else(|| short_reply(opcode, body.len()))
    }

    /// RELEASE.
    pub fn release(&mut self, node: u64, handle: u64) -> FuseResult<()> {
        self.release_with(Opcode::Release, node, ReleaseIn { fh: handle, ..Default::default() })
    }

    /// RELEASEDIR.
    pub fn releasedir(&mut self, node: u64, handle: u64) -> FuseResult<()> {
        self.release_with(Opcode::Releasedir, node, ReleaseIn { fh: handle, ..Default::default() })
    }

    /// RELEASE or RELEASEDIR with all arguments.
    pub fn release_with(&mut self, opcode: Opcode, node: u64, args: ReleaseIn) -> FuseResult<()> {
        self.call(&Call::new(opcode, node, &[args.as_bytes()], 0)).map(drop)
    }

    /// READ of up to `size` bytes into pages.
    pub fn read(&mut self, node: u64, handle: u64, offset: u64, size: usize) -> FuseResult<Vec<u8>> {
        let args = ReadIn { fh: handle, offset, size: size as u32, ..Default::default() };
        let parts = [args.as_bytes()];
        let call = Call::new(Opcode::Read, node, &parts, 0);
        self.call(&call.payload(Payload::FromDevice(size)).variable())
    }

    /// WRITE of all of `data` from pages; returns the bytes written.
    pub fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> FuseResult<usize> {
        self.write_with(
            node,
            WriteIn { fh: handle, offset, size: data.len() as u32, ..Default::default() },
            data,
        )
    }

    /// WRITE with all arguments.
    pub fn write_with(&mut self, node: u64, args: WriteIn, data: &[u8]) -> FuseResult<usize> {
        let parts = [args.as_bytes()];
        let call = Call::new(Opcode::Write, node, &parts, size_of::<WriteOut>());
        let out: WriteOut = self.call_for(&call.payload(Payload::ToDevice(data)))?;
        Ok(out.size as usize)
    }

    /// FLUSH.
    pub fn flush(&mut self, node: u64, handle: u64, lock_owner: u64) -> FuseResult<()> {
        let args = FlushIn { fh: handle, lock_owner, ..Default::default() };
        self.call(&Call::new(Opcode::Flush, node, &[args.as_bytes()], 0)).map(drop)
    }

    /// FSYNC or FSYNCDIR.
    pub fn fsync(&mut self, opcode: Opcode, node: u64, handle: u64, data_only: bool) -> FuseResult<()> {
        let args =
            FsyncIn { fh: handle, fsync_flags: if data_only { FSYNC_FDATASYNC } else { 0 }, padding: 0 };
        self.call(&Call::new(opcode, node, &[args.as_bytes()], 0)).map(drop)
    }

    /// SYNCFS.
    pub fn syncfs(&mut self, node: u64) -> FuseResult<()> {
        self.call(&Call::new(Opcode::Syncfs, node, &[SyncfsIn::default().as_bytes()], 0)).map(drop)
    }

    /// STATFS.
    pub fn statfs(&mut self, node: u64) -> FuseResult<Kstatfs> {
        self.call_for(&Call::new(Opcode::Statfs, node, &[], size_of::<Kstatfs>()))
    }

    /// ACCESS.
    pub fn access(&mut self, node: u64, mask: u32) -> FuseResult<()> {
        self.call(&Call::new(Opcode::Access, node, &[AccessIn { mask, padding: 0 }.as_bytes()], 0)).map(drop)
    }

    /// SETXATTR, in the form that INIT agreed on.
    pub fn setxattr(
        &mut self,
        node: u64,
        name: impl AsRef<[u8]>,
        value: &[u8],
        flags: u32,
    ) -> FuseResult<()> {
        let size = value.len() as u32;
        let head = if self.init_flags() & init::SETXATTR_EXT != 0 {
            SetxattrIn { size, flags, ..Default::default() }.as_bytes().to_vec()
        } else {
            SetxattrInCompat { size, flags }.as_bytes().to_vec()
        };
        self.call(&Call::new(Opcode::Setxattr, node, &[&head, &name_bytes(name), value], 0)).map(drop)
    }

    /// GETXATTR into a buffer of `size` bytes.
    pub fn getxattr(&mut self, node: u64, name: impl AsRef<[u8]>, size: usize) -> FuseResult<Vec<u8>> {
        let head = GetxattrIn { size: size as u32, padding: 0 };
        let name = name_bytes(name);
        self.call(&Call::new(Opcode::Getxattr, node, &[head.as_bytes(), &name], size).variable())
    }

    /// GETXATTR for the size alone.
    pub fn getxattr_size(&mut self, node: u64, name: impl AsRef<[u8]>) -> FuseResult<u32> {
        let name = name_bytes(name);
        let parts = [GetxattrIn::default(), GetxattrIn::default()];
        let call_parts = [parts[0].as_bytes(), name.as_slice()];
        let call = Call::new(Opcode::Getxattr, node, &call_parts, size_of::<GetxattrOut>());
        Ok(self.call_for::<GetxattrOut>(&call)?.size)
    }

    /// LISTXATTR into a buffer of `size` bytes, split into names.
    pub fn listxattr(&mut self, node: u64, size: usize) -> FuseResult<Vec<Vec<u8>>> {
        let head = GetxattrIn { size: size as u32, padding: 0 };
        let list = self.call(&Call::new(Opcode::Listxattr, node, &[head.as_bytes()], size).variable())?;
        Ok(list.split(|byte| *byte == 0).filter(|name| !name.is_empty()).map(<[u8]>::to_vec).collect())
    }

    /// REMOVEXATTR.
    pub fn removexattr(&mut self, node: u64, name: impl AsRef<[u8]>) -> FuseResult<()> {
        self.call(&Call::new(Opcode::Removexattr, node, &[&name_bytes(name)], 0)).map(drop)
    }

    /// READDIR of one buffer of `size` bytes from `offset`.
    pub fn readdir(&mut self, node: u64, handle: u64, offset: u64, size: usize) -> FuseResult<Vec<DirEntry>> {
        self.read_entries(Opcode::Readdir, node, handle, offset, size)
    }

    /// READDIRPLUS of one buffer of `size` bytes from `offset`.
    pub fn readdirplus(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        size: usize,
    ) -> FuseResult<Vec<DirEntry>> {
        self.read_entries(Opcode::Readdirplus, node, handle, offset, size)
    }

    fn read_entries(
        &mut self,
        opcode: Opcode,
        node: u64,
        handle: u64,
        offset: u64,
        size: usize,
    ) -> FuseResult<Vec<DirEntry>> {
        let args = ReadIn { fh: handle, offset, size: size as u32, ..Default::default() };
        let parts = [args.as_bytes()];
        let call = Call::new(opcode, node, &parts, 0);
        let payload = self.call(&call.payload(Payload::FromDevice(size)).variable())?;
        Ok(dirent::parse(&payload, opcode == Opcode::Readdirplus)?)
    }

    /// Every entry of a directory, page by page.
    pub fn read_whole_dir(&mut self, node: u64, handle: u64, plus: bool) -> FuseResult<Vec<DirEntry>> {
        let opcode = if plus { Opcode::Readdirplus } else { Opcode::Readdir };
        let mut all: Vec<DirEntry> = Vec::new();
        loop {
            let offset = all.last().map_or(0, |last| last.offset);
            let entries = self.read_entries(opcode, node, handle, offset, PAGE)?;
            if entries.is_empty() {
                return Ok(all);
            }
            all.extend(entries);
        }
    }

    /// FALLOCATE.
    pub fn fallocate(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> FuseResult<()> {
        let args = FallocateIn { fh: handle, offset, length, mode, padding: 0 };
        self.call(&Call::new(Opcode::Fallocate, node, &[args.as_bytes()], 0)).map(drop)
    }

    /// LSEEK (`SEEK_DATA`, `SEEK_HOLE`).
    pub fn lseek(&mut self, node: u64, handle: u64, offset: u64, whence: u32) -> FuseResult<u64> {
        let args = LseekIn { fh: handle, offset, whence, padding: 0 };
        let parts = [args.as_bytes()];
        let call = Call::new(Opcode::Lseek, node, &parts, size_of::<LseekOut>());
        Ok(self.call_for::<LseekOut>(&call)?.offset)
    }

    /// COPY_FILE_RANGE; `node` is the source.
    pub fn copy_file_range(&mut self, node: u64, args: CopyFileRangeIn) -> FuseResult<usize> {
        let parts = [args.as_bytes()];
        let call = Call::new(Opcode::CopyFileRange, node, &parts, size_of::<WriteOut>());
        Ok(self.call_for::<WriteOut>(&call)?.size as usize)
    }

    /// GETLK: the lock that would conflict.
    pub fn getlk(&mut self, node: u64, args: LkIn) -> FuseResult<FileLock> {
        self.call_for(&Call::new(Opcode::Getlk, node, &[args.as_bytes()], size_of::<FileLock>()))
    }

    /// SETLK, without waiting.
    pub fn setlk(&mut self, node: u64, args: LkIn) -> FuseResult<()> {
        self.call(&Call::new(Opcode::Setlk, node, &[args.as_bytes()], 0)).map(drop)
    }

    /// DESTROY.
    pub fn destroy(&mut self) -> FuseResult<()> {
        self.call(&Call::new(Opcode::Destroy, 0, &[], 0)).map(drop)
    }
}

fn short_reply(opcode: Opcode, len: usize) -> FuseError {
    FuseError::Driver(Error::FuseProtocol {
        operation: format!("{opcode:?}"),
        problem: format!("{len} bytes of results"),
    })
}
