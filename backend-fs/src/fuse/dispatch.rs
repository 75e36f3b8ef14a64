//! One request from chain to file system to reply: the only place where the two meet.
//!
//! 1. The header and the arguments are copied out of DPU memory, once; everything is checked and
//!    used from that copy, because the DPU can change its memory at any time.
//! 2. [`request::parse`] checks every field.
//! 3. The room for the reply is compared with the least the answer needs, so that nothing happens
//!    whose outcome the DPU could not be told (a reference to a node, an open handle).
//! 4. One exhaustive match calls the file system. Data of `READ` and `WRITE` goes straight between
//!    file and DPU memory; everything else is built in a reused buffer.
//! 5. The reply is copied in, never beyond the room the DPU gave.
//!
//! **Blocking.** A queue worker calls with `may_block` false. `FSYNC`, `FSYNCDIR`, `SYNCFS`,
//! `FALLOCATE` and both `COPY_FILE_RANGE` wait for a disk or move unbounded amounts of data, so
//! they are handed back as [`Blocked::Io`] before anything happened. Any other operation is tried;
//! if the file system says `EAGAIN` it had no effect, and is handed back too. Truncation is among
//! those: only the file system knows how much there is to free. `SETLKW` on a taken lock is handed
//! back as [`Blocked::Lock`]: it may wait for ever and must not keep I/O from running. A `SETLK`
//! that meets a lock gets its `EAGAIN`: that is the answer.
//!
//! The caller serves a blocked chain again, with `may_block` true, on a thread of its own scratch.
//! `INIT` and `DESTROY` are served at once: a kernel sends nothing else until they are answered.

use rustix::io::Errno;
use vring::chain::{Chain, SliceBuf};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::{self, InHeader};
use super::counters::{Counters, Member};
use super::dirent::DirBuffer;
use super::extension::Groups;
use super::opcode::Opcode;
use super::reply::{self, ReplyBuffer};
use super::request::{self, MAX_ARGUMENTS, Message, Request};
use super::session::{Layout, Session};
use crate::filesystem::{Context, Entry, FileSystem, NodeId, Opened};

/// Bytes of the request header.
const HEADER: usize = size_of::<InHeader>();
/// Copied in the first go: a header with its arguments and a full name. More is copied only for
/// the few requests that have more.
const FIRST_COPY: usize = 320;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is done; so many bytes of the writable part were filled (the used length).
    Reply(usize),
    /// It would block. Nothing happened, the chain is as it was.
    Blocked(Blocked),
}

/// What a request would wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocked {
    /// A device or a file system; ends by itself.
    Io,
    /// A lock; ends when its holder lets go, or with the session.
    Lock,
}

/// What a serving thread reuses from request to request.
#[derive(Debug)]
pub struct Scratch {
    request: Vec<u8>,
    reply: ReplyBuffer,
    slices: SliceBuf,
    counters: Member,
}

impl Scratch {
    /// For one thread that serves `session`.
    pub fn new(session: &Session) -> Self {
        Self {
            request: vec![0; FIRST_COPY],
            reply: ReplyBuffer::default(),
            slices: SliceBuf::default(),
            counters: session.registry().join(),
        }
    }
}

/// How an operation that succeeded is answered.
enum Answer {
    /// With what is in the reply buffer.
    Buffered,
    /// With so many bytes that are in place already; 0 when success is all there is to say.
    InPlace(usize),
    /// Not at all.
    Nothing,
}

/// Why there is no [`Answer`].
enum Failure {
    /// The DPU is told.
    Errno(Errno),
    /// Another thread tries again.
    Blocked(Blocked),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Failure::Errno(errno)
    }
}

/// Serves the request in `chain`. Never fails: trouble becomes a reply, a counter, or both.
pub fn serve<F: FileSystem>(
    fs: &F,
    session: &Session,
    chain: &mut Chain,
    scratch: &mut Scratch,
    may_block: bool,
) -> Served {
    let counters = &scratch.counters;
    let Some(header) = copy_first(chain, &mut scratch.request) else {
        counters.malformed.add(1);
        counters.unanswered.add(1);
        return Served::Reply(0);
    };
    let unique = header.unique;
    let Some(opcode) = Opcode::from_wire(header.opcode) else {
        counters.unknown.add(1);
        return Served::Reply(fail(chain, unique, Errno::NOSYS, counters));
    };
    let room = match chain.writable_len().checked_sub(reply::HEADER) {
        Some(room) => room,
        None if opcode.is_unanswered() => 0,
        None => {
            counters.unanswered.add(1);
            return Served::Reply(0);
        }
    };
    let answer = run(fs, session, chain, Arrived { header, opcode, room }, scratch, may_block);
    let Scratch { reply, counters, .. } = scratch;
    let len = match answer {
        Err(Failure::Blocked(what)) => {
            counters.blocked.add(1);
            return Served::Blocked(what);
        }
        _ if opcode.is_unanswered() => 0,
        Ok(Answer::Nothing) => 0,
        Ok(Answer::Buffered) => match put(chain, reply.finish(unique)) {
            0 => fail(chain, unique, Errno::IO, counters),
            len => len,
        },
        Ok(Answer::InPlace(len)) => match put(chain, reply::header(unique, len).as_bytes()) {
            0 => 0,
            header => header + len,
        },
        Err(Failure::Errno(errno)) => fail(chain, unique, errno, counters),
    };
    counters.operation(opcode);
    Served::Reply(len)
}

/// Answers a request with an error without looking at what it asks for, when there is no room to
/// serve it now. Gives the used length: 0 where no answer is due or fits.
pub fn refuse(chain: &mut Chain, errno: Errno) -> usize {
    let mut bytes = [0; HEADER];
    let header = chain.copy_out(0, &mut bytes).ok().and_then(|()| InHeader::read_from_bytes(&bytes).ok());
    match header {
        Some(header) if !Opcode::from_wire(header.opcode).is_some_and(Opcode::is_unanswered) => {
            put(chain, reply::error(header.unique, errno).as_bytes())
        }
        _ => 0,
    }
}

/// A request that can be answered.
struct Arrived {
    header: InHeader,
    opcode: Opcode,
    /// Bytes of room for the body of the reply.
    room: usize,
}

/// Copies what fits into the first go; `None` when there is no whole header.
#[inline]
fn copy_first(chain: &Chain, request: &mut [u8]) -> Option<InHeader> {
    let first = request.get_mut(..chain.readable_len().min(FIRST_COPY))?;
    if first.len() < HEADER {
        return None;
    }
    chain.copy_out(0, first).ok()?;
    InHeader::read_from_prefix(first).ok().map(|(header, _)| header)
}

/// Copies the rest, if there is more to a request than the first go and it is no payload. Gives
/// the end of what was copied and the end of the request.
#[inline]
fn copy_rest(
    chain: &Chain,
    header: &InHeader,
    opcode: Opcode,
    request: &mut Vec<u8>,
) -> Result<(usize, usize), Errno> {
    let end = header.len as usize;
    if end < HEADER || end > chain.readable_len() {
        return Err(Errno::INVAL);
    }
    if end <= FIRST_COPY || opcode == Opcode::Write {
        return Ok((end.min(FIRST_COPY), end));
    }
    if end > HEADER + MAX_ARGUMENTS {
        return Err(Errno::INVAL);
    }
    if request.len() < end {
        request.resize(end, 0);
    }
    chain.copy_out(FIRST_COPY, &mut request[FIRST_COPY..end]).map_err(|_| Errno::INVAL)?;
    Ok((end, end))
}

/// Copies the reply in; 0 when it does not fit.
fn put(chain: &mut Chain, reply: &[u8]) -> usize {
    chain.copy_in(0, reply).map_or(0, |()| reply.len())
}

/// Answers with an error.
#[cold]
fn fail(chain: &mut Chain, unique: u64, errno: Errno, counters: &Counters) -> usize {
    counters.errors.add(1);
    put(chain, reply::error(unique, errno).as_bytes())
}

/// Steps 1 to 4 of the module's list.
#[inline]
fn run<F: FileSystem>(
    fs: &F,
    session: &Session,
    chain: &Chain,
    arrived: Arrived,
    scratch: &mut Scratch,
    may_block: bool,
) -> Result<Answer, Failure> {
    let Arrived { header, opcode, room } = arrived;
    let Scratch { request, reply, slices, counters } = scratch;
    let layout = match session.layout() {
        Some(layout) => layout,
        None if opcode == Opcode::Init => Layout::default(),
        None => return Err(Failure::Errno(Errno::IO)),
    };
    let malformed = |errno| {
        counters.malformed.add(1);
        Failure::Errno(errno)
    };
    let (copied, end) = copy_rest(chain, &header, opcode, request).map_err(malformed)?;
    let message = Message { header, body: &request[HEADER..copied], body_len: end - HEADER, room };
    let (request, extensions) = request::parse(opcode, &message, layout).map_err(malformed)?;
    if request.least_reply() > room {
        return Err(malformed(Errno::INVAL));
    }
    if !may_block && waits(&request) {
        return Err(Failure::Blocked(Blocked::Io));
    }
    let waits_for_lock = match request {
        Request::Setlk { wait, .. } => Some(wait),
        _ => None,
    };
    // Linux leaves the extension out when none of the caller's groups matters (fs/fuse/dir.c,
    // get_create_supp_group): where it could have come, its absence says "none", not "unknown".
    let known = layout.extensions.groups && opcode.makes_inode();
    let groups = known.then(|| extensions.groups.map(Groups::ids).unwrap_or_default());
    let cx = Context {
        uid: header.uid,
        gid: header.gid,
        pid: header.pid,
        groups: groups.as_deref(),
        label: extensions.label,
        may_block,
    };
    let to = Outlet { chain, room, reply, slices, counters };
    call(fs, session, &cx, NodeId(header.nodeid), request, to).map_err(|errno| match waits_for_lock {
        None if errno == Errno::AGAIN && !may_block => Failure::Blocked(Blocked::Io),
        Some(true) if errno == Errno::AGAIN && !may_block => Failure::Blocked(Blocked::Lock),
        _ => Failure::Errno(errno),
    })
}

/// Operations that are not even tried where nothing may block.
#[inline]
fn waits(request: &Request) -> bool {
    matches!(
        request,
        Request::Fsync { .. }
            | Request::Fsyncdir { .. }
            | Request::Syncfs
            | Request::Fallocate { .. }
            | Request::CopyFileRange { .. }
    )
}

/// Where data and answers go.
struct Outlet<'a> {
    chain: &'a Chain,
    room: usize,
    reply: &'a mut ReplyBuffer,
    slices: &'a mut SliceBuf,
    counters: &'a Counters,
}

impl Outlet<'_> {
    /// Answers with one structure.
    #[inline]
    fn one<T: IntoBytes + Immutable>(self, value: &T) -> Result<Answer, Errno> {
        self.reply.start();
        self.reply.push(value);
        Ok(Answer::Buffered)
    }

    /// Answers with a new inode and an open file.
    fn created(self, (entry, opened): (Entry, Opened)) -> Result<Answer, Errno> {
        self.reply.start();
        self.reply.push(&reply::entry_out(&entry));
        self.reply.push(&reply::open_out(opened));
        Ok(Answer::Buffered)
    }

    /// Answers with directory entries that `fill` appends.
    fn listing(
        self,
        size: usize,
        fill: impl FnOnce(&mut DirBuffer) -> Result<(), Errno>,
    ) -> Result<Answer, Errno> {
        self.reply.start();
        fill(&mut DirBuffer::new(self.reply.body(), size))?;
        Ok(Answer::Buffered)
    }

    /// Answers with a value that `fill` appends, or with its size if `size` is 0.
    fn value(
        self,
        size: u32,
        fill: impl FnOnce(&mut Vec<u8>) -> Result<usize, Errno>,
    ) -> Result<Answer, Errno> {
        self.reply.start();
        let len = fill(self.reply.body())?;
        if size == 0 {
            let size = u32::try_from(len).map_err(|_| Errno::TOOBIG)?;
            return self.one(&abi::GetxattrOut { size, padding: 0 });
        }
        if self.reply.body_len() > size as usize { Err(Errno::RANGE) } else { Ok(Answer::Buffered) }
    }
}

/// The whole of an answer that says "done".
const DONE: Result<Answer, Errno> = Ok(Answer::InPlace(0));

/// Linux takes `ENOSYS` from `FSYNC` for success, now and for the life of the mount.
fn durable(synced: Result<(), Errno>) -> Result<Answer, Errno> {
    match synced {
        Err(Errno::NOSYS) => Err(Errno::IO),
        synced => synced.and(DONE),
    }
}

/// Calls the file system. One arm per request, none of them a catch-all.
#[inline]
fn call<F: FileSystem>(
    fs: &F,
    session: &Session,
    cx: &Context,
    node: NodeId,
    request: Request,
    to: Outlet,
) -> Result<Answer, Errno> {
    match request {
        Request::Lookup { name } => to.one(&reply::entry_out(&fs.lookup(cx, node, name)?)),
        Request::Forget { count } => {
            fs.forget(node, count);
            Ok(Answer::Nothing)
        }
        Request::BatchForget(forgets) => {
            forgets.iter().for_each(|(node, count)| fs.forget(node, count));
            Ok(Answer::Nothing)
        }
        Request::Getattr { handle } => to.one(&reply::attr_out(fs.getattr(cx, node, handle)?)),
        Request::Statx { handle, flags, mask } => {
            to.one(&reply::statx_out(fs.statx(cx, node, handle, flags, mask)?))
        }
        Request::Setattr(change) => to.one(&reply::attr_out(fs.setattr(cx, node, change)?)),
        Request::Access { mask } => fs.access(cx, node, mask).and(DONE),
        Request::Readlink => {
            to.reply.start();
            fs.readlink(cx, node, to.reply.body())?;
            if to.reply.body_len() > to.room { Err(Errno::NAMETOOLONG) } else { Ok(Answer::Buffered) }
        }
        Request::Symlink { name, target } => to.one(&reply::entry_out(&fs.symlink(cx, node, name, target)?)),
        Request::Mknod { name, new } => to.one(&reply::entry_out(&fs.mknod(cx, node, name, new)?)),
        Request::Mkdir { name, new } => to.one(&reply::entry_out(&fs.mkdir(cx, node, name, new)?)),
        Request::Unlink { name } => fs.unlink(cx, node, name).and(DONE),
        Request::Rmdir { name } => fs.rmdir(cx, node, name).and(DONE),
        Request::Rename { from, to, flags } => fs.rename(cx, (node, from), to, flags).and(DONE),
        Request::Link { node: target, name } => to.one(&reply::entry_out(&fs.link(cx, target, node, name)?)),
        Request::Open { flags, kill_suidgid } => {
            to.one(&reply::open_out(fs.open(cx, node, flags, kill_suidgid)?))
        }
        Request::Create { name, new, flags, kill_suidgid } => {
            to.created(fs.create(cx, node, name, new, flags, kill_suidgid)?)
        }
        Request::Tmpfile { new, flags } => to.created(fs.tmpfile(cx, node, new, flags)?),
        Request::Read { handle, offset, size } => {
            let into = to.chain.writable_slices(reply::HEADER, size, to.slices);
            let read = fs.read(cx, node, handle, offset, into.map_err(|_| Errno::INVAL)?)?.min(size);
            to.counters.read_bytes.add(read as u64);
            Ok(Answer::InPlace(read))
        }
        Request::Write { handle, offset, size, kill_suidgid, cached, append } => {
            let from = to.chain.readable_slices(HEADER + size_of::<abi::WriteIn>(), size, to.slices);
            let from = from.map_err(|_| Errno::INVAL)?;
            let written = if append {
                fs.append(cx, node, handle, offset, from, kill_suidgid)?
            } else {
                fs.write(cx, node, handle, offset, from, kill_suidgid, cached)?
            };
            let written = written.min(size);
            to.counters.written_bytes.add(written as u64);
            to.one(&abi::WriteOut { size: written as u32, padding: 0 })
        }
        Request::Statfs => to.one(&fs.statfs(cx, node)?),
        Request::Flush { handle, lock_owner } => fs.flush(cx, node, handle, lock_owner).and(DONE),
        Request::Release(release) => fs.release(cx, node, release).and(DONE),
        Request::Releasedir(release) => fs.releasedir(cx, node, release).and(DONE),
        Request::Fsync { handle, data_only } => durable(fs.fsync(cx, node, handle, data_only)),
        Request::Fsyncdir { handle, data_only } => durable(fs.fsyncdir(cx, node, handle, data_only)),
        Request::Fallocate { handle, mode, offset, len } => {
            fs.fallocate(cx, node, handle, mode, offset, len).and(DONE)
        }
        Request::Lseek { handle, offset, whence } => {
            to.one(&abi::LseekOut { offset: fs.lseek(cx, node, handle, offset, whence)? })
        }
        Request::CopyFileRange { range, wide } => {
            let copied = fs.copy_file_range(cx, range)?;
            if wide {
                to.one(&abi::CopyFileRangeOut { bytes_copied: copied as u64 })
            } else {
                let size = u32::try_from(copied).unwrap_or(u32::MAX);
                to.one(&abi::WriteOut { size, padding: 0 })
            }
        }
        Request::Opendir { flags } => to.one(&reply::open_out(fs.opendir(cx, node, flags)?)),
        Request::Readdir { handle, offset, size } => {
            to.listing(size, |into| fs.readdir(cx, node, handle, offset, into))
        }
        Request::Readdirplus { handle, offset, size } => {
            to.listing(size, |into| fs.readdirplus(cx, node, handle, offset, into))
        }
        Request::Syncfs => fs.syncfs(cx, node).and(DONE),
        Request::Setxattr { name, value, flags, kill_sgid } => {
            fs.setxattr(cx, node, name, value, flags, kill_sgid).and(DONE)
        }
        Request::Getxattr { name, size } => to.value(size, |value| fs.getxattr(cx, node, name, size, value)),
        Request::Listxattr { size } => to.value(size, |names| fs.listxattr(cx, node, size, names)),
        Request::Removexattr { name } => fs.removexattr(cx, node, name).and(DONE),
        Request::Getlk(lock) => to.one(&fs.getlk(cx, node, lock)?),
        Request::Setlk { lock, wait } => fs.setlk(cx, node, lock, wait).and(DONE),
        Request::Init(asked) => {
            let room = to.room;
            let reply = session.open(fs, &asked)?;
            to.reply.start();
            to.reply.push(&reply);
            to.reply.body().truncate(reply::HEADER + room);
            Ok(Answer::Buffered)
        }
        Request::Destroy => {
            session.close(fs);
            DONE
        }
        Request::Interrupt => Ok(Answer::Nothing),
        Request::Unsupported => Err(Errno::NOSYS),
    }
}

#[cfg(test)]
mod tests;
