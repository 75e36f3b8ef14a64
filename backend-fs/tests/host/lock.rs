//! Locks that the DPU, other DPUs and host programs see.
//!
//! The host program is this test binary itself, started again for [`host_program`] alone.

use std::fs::File;
use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use backend_fs::filesystem::{FileSystem, HandleId, LockRequest, NodeId, Release};
use backend_fs::fuse::abi::FileLock;
use backend_fs::host::HostFs;
use backend_fs::host::options::HostOptions;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::io::Errno;

use crate::support::*;

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const UNLOCK: i32 = libc::F_UNLCK;
const LAST_BYTE: u64 = i64::MAX as u64;

/// A DPU with one file open.
struct Dpu<'a> {
    fs: &'a HostFs,
    node: NodeId,
    handle: HandleId,
}

impl Dpu<'_> {
    fn new<'a>(fs: &'a HostFs, name: &str) -> Dpu<'a> {
        let node = lookup(fs, name).unwrap().node;
        Dpu { fs, node, handle: fs.open(&AS_ROOT, node, RDWR, false).unwrap().handle }
    }

    fn request(&self, owner: u64, kind: i32, start: u64, end: u64) -> LockRequest {
        let lock = FileLock { start, end, kind: kind as u32, pid: 100 + (owner % 1000) as u32 };
        LockRequest { handle: self.handle, owner, lock, flock: false }
    }

    fn lock(&self, owner: u64, kind: i32, start: u64, end: u64) -> Result<(), Errno> {
        self.fs.setlk(&AS_ROOT, self.node, self.request(owner, kind, start, end), false)
    }

    fn wait(&self, owner: u64, kind: i32, start: u64, end: u64) -> Result<(), Errno> {
        self.fs.setlk(&AS_ROOT, self.node, self.request(owner, kind, start, end), true)
    }

    fn test(&self, owner: u64, kind: i32, start: u64, end: u64) -> FileLock {
        self.fs.getlk(&AS_ROOT, self.node, self.request(owner, kind, start, end)).unwrap()
    }

    fn flock(&self, kind: i32, wait: bool) -> Result<(), Errno> {
        let request = LockRequest { flock: true, ..self.request(1, kind, 0, LAST_BYTE) };
        self.fs.setlk(&AS_ROOT, self.node, request, wait)
    }

    fn free(&self, start: u64, end: u64) -> bool {
        self.test(u64::MAX, WRITE, start, end).kind == UNLOCK as u32
    }
}

fn export() -> Export {
    let export = Export::new();
    export.put("file", "content");
    export
}

/// Another process that locks the file in the way host programs do.
struct HostProgram {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl HostProgram {
    fn start(export: &Export) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "lock::host_program", "--nocapture"])
            .env("LOCK_FILE", export.path.join("file"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, orders, answers }
    }

    /// `posix KIND START LEN` or `flock sh|ex|un`; the errno, 0 for none.
    fn ask(&mut self, order: &str) -> i32 {
        writeln!(self.orders, "{order}").unwrap();
        for line in (&mut self.answers).lines() {
            // The test harness of that process prints lines of its own.
            if let Some(answer) = line.unwrap().strip_prefix("answer ") {
                return answer.parse().unwrap();
            }
        }
        panic!("the host program ended");
    }
}

impl Drop for HostProgram {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Not a test unless it is started by [`HostProgram`]: takes orders from standard input.
#[test]
fn host_program() {
    let Some(path) = std::env::var_os("LOCK_FILE") else { return };
    let file = File::options().read(true).write(true).open(path).unwrap();
    for order in std::io::stdin().lines() {
        let order = order.unwrap();
        let words: Vec<&str> = order.split(' ').collect();
        let result = match words[..] {
            ["posix", kind, start, len] => {
                let lock = libc::flock {
                    l_type: kind.parse().unwrap(),
                    l_whence: libc::SEEK_SET as i16,
                    l_start: start.parse().unwrap(),
                    l_len: len.parse().unwrap(),
                    l_pid: 0,
                };
                fcntl(&file, FcntlArg::F_SETLK(&lock)).map(drop).map_err(|errno| errno as i32)
            }
            ["flock", how] => {
                use rustix::fs::FlockOperation::{
                    NonBlockingLockExclusive, NonBlockingLockShared, NonBlockingUnlock,
                };
                let operation = match how {
                    "sh" => NonBlockingLockShared,
                    "ex" => NonBlockingLockExclusive,
                    _ => NonBlockingUnlock,
                };
                rustix::fs::flock(&file, operation).map_err(|errno| errno.raw_os_error())
            }
            _ => panic!("{order}"),
        };
        println!("answer {}", result.err().unwrap_or(0));
    }
}

#[test]
fn posix_locks_are_seen_by_host_programs_and_theirs_here() {
    let export = export();
    let dpu = Dpu::new(&export.fs, "file");
    let mut host = HostProgram::start(&export);
    dpu.lock(1, WRITE, 10, 19).unwrap();
    assert_eq!(host.ask("posix 1 15 1"), libc::EAGAIN);
    assert_eq!(host.ask("posix 0 0 0"), libc::EAGAIN);
    assert_eq!(host.ask("posix 1 20 10"), 0);
    assert_eq!(dpu.lock(1, WRITE, 25, 25), Err(Errno::AGAIN));
    let found = dpu.test(1, READ, 0, LAST_BYTE);
    assert_eq!((found.kind, found.start, found.end, found.pid), (WRITE as u32, 20, 29, host.child.id()));
    assert_eq!(host.ask("posix 2 0 0"), 0);
    assert_eq!(dpu.lock(1, WRITE, 25, 25), Ok(()));
}

#[test]
fn flocks_are_seen_by_host_programs_and_theirs_here() {
    let export = export();
    let dpu = Dpu::new(&export.fs, "file");
    let mut host = HostProgram::start(&export);
    dpu.flock(READ, false).unwrap();
    assert_eq!(host.ask("flock ex"), libc::EAGAIN);
    assert_eq!(host.ask("flock sh"), 0);
    assert_eq!(dpu.flock(WRITE, false), Err(Errno::AGAIN));
    assert_eq!(host.ask("flock un"), 0);
    dpu.flock(WRITE, false).unwrap();
    assert_eq!(host.ask("flock sh"), libc::EAGAIN);
    dpu.flock(UNLOCK, false).unwrap();
    assert_eq!(host.ask("flock ex"), 0);
}

#[test]
fn owners_stand_in_one_anothers_way_and_not_in_their_own() {
    let export = export();
    let second = export.second();
    let dpu = Dpu::new(&export.fs, "file");
    let again = Dpu::new(&export.fs, "file");
    let other = Dpu::new(&second, "file");
    dpu.lock(1, WRITE, 0, 9).unwrap();
    // The same process through another open file.
    again.lock(1, WRITE, 5, 14).unwrap();
    assert_eq!(again.lock(2, READ, 0, 0), Err(Errno::AGAIN));
    assert_eq!(other.lock(1, READ, 14, 14), Err(Errno::AGAIN));
    let found = dpu.test(2, READ, 0, LAST_BYTE);
    assert_eq!((found.kind, found.start, found.end, found.pid), (WRITE as u32, 0, 14, 101));
    assert_eq!(dpu.test(1, WRITE, 0, LAST_BYTE).kind, UNLOCK as u32);
    assert_eq!(other.test(1, WRITE, 0, LAST_BYTE).kind, WRITE as u32);
}

#[test]
fn locks_are_upgraded_downgraded_and_dropped_in_parts() {
    let export = export();
    let dpu = Dpu::new(&export.fs, "file");
    dpu.lock(1, READ, 0, 99).unwrap();
    dpu.lock(2, READ, 0, 9).unwrap();
    assert_eq!(dpu.lock(1, WRITE, 5, 5), Err(Errno::AGAIN));
    dpu.lock(1, WRITE, 50, 59).unwrap();
    assert_eq!(dpu.lock(2, READ, 55, 55), Err(Errno::AGAIN));
    dpu.lock(1, READ, 50, 54).unwrap();
    assert_eq!(dpu.lock(2, READ, 50, 54), Ok(()));
    assert_eq!(dpu.lock(2, READ, 55, 55), Err(Errno::AGAIN));
    dpu.lock(1, UNLOCK, 20, 59).unwrap();
    assert_eq!(dpu.lock(2, WRITE, 20, 59), Ok(()));
    assert_eq!(dpu.lock(2, WRITE, 60, 60), Err(Errno::AGAIN));
    dpu.lock(1, UNLOCK, 0, LAST_BYTE).unwrap();
    dpu.lock(2, UNLOCK, 0, LAST_BYTE).unwrap();
    assert!(dpu.free(0, LAST_BYTE));
    // Descriptions that hold nothing are closed.
    assert_eq!(export.fs.counts().fds, 2);
}

#[test]
fn odd_ranges_are_refused() {
    let export = export();
    let dpu = Dpu::new(&export.fs, "file");
    for (kind, start, end) in [
        (WRITE, 5, 4),
        (WRITE, 0, u64::MAX),
        (WRITE, 1 << 63, u64::MAX),
        (7, 0, 1),
        (-1, 0, 1),
        (READ, u64::MAX, 0),
    ] {
        assert_eq!(dpu.lock(1, kind, start, end), Err(Errno::INVAL));
    }
    assert_eq!(dpu.lock(1, WRITE, LAST_BYTE, LAST_BYTE), Ok(()));
    assert_eq!(dpu.lock(2, WRITE, LAST_BYTE - 1, LAST_BYTE), Err(Errno::AGAIN));
    assert_eq!(dpu.lock(2, WRITE, 0, LAST_BYTE - 1), Ok(()));
}

#[test]
fn flush_drops_what_its_owner_has_and_nobody_elses() {
    let export = export();
    let dpu = Dpu::new(&export.fs, "file");
    dpu.lock(1, WRITE, 0, 9).unwrap();
    dpu.lock(2, WRITE, 10, 19).unwrap();
    dpu.fs.flush(&AS_ROOT, dpu.node, dpu.handle, 3).unwrap();
    assert!(!dpu.free(0, 9));
    dpu.fs.flush(&AS_ROOT, dpu.node, dpu.handle, 1).unwrap();
    assert!(dpu.free(0, 9));
    assert!(!dpu.free(10, 19));
}

#[test]
fn the_last_release_drops_all() {
    let export = export();
    let second = export.second();
    let (dpu, other) = (Dpu::new(&export.fs, "file"), Dpu::new(&second, "file"));
    let again = Dpu::new(&export.fs, "file");
    dpu.lock(1, WRITE, 0, 9).unwrap();
    dpu.lock(2, WRITE, 10, 19).unwrap();
    let release = |dpu: &Dpu, flock_owner| {
        dpu.fs.release(&AS_ROOT, dpu.node, Release { handle: dpu.handle, flock_owner }).unwrap();
    };
    release(&again, None);
    assert!(!other.free(0, 19));
    release(&dpu, Some(1));
    assert!(other.free(0, 19));
    assert_eq!(export.fs.counts().fds, 1);
}

#[test]
fn release_drops_the_flock() {
    let export = export();
    let dpu = Dpu::new(&export.fs, "file");
    let again = Dpu::new(&export.fs, "file");
    dpu.flock(WRITE, false).unwrap();
    assert_eq!(again.flock(READ, false), Err(Errno::AGAIN));
    let release = Release { handle: dpu.handle, flock_owner: Some(1) };
    dpu.fs.release(&AS_ROOT, dpu.node, release).unwrap();
    assert_eq!(again.flock(READ, false), Ok(()));
}

#[test]
fn a_worker_does_not_wait() {
    let export = export();
    let (dpu, again) = (Dpu::new(&export.fs, "file"), Dpu::new(&export.fs, "file"));
    dpu.lock(1, WRITE, 0, 9).unwrap();
    dpu.flock(WRITE, false).unwrap();
    let request = again.request(2, WRITE, 0, 9);
    for flock in [false, true] {
        let request = LockRequest { flock, ..request };
        assert_eq!(again.fs.setlk(&ON_WORKER, again.node, request, true), Err(Errno::AGAIN));
    }
    let free = again.request(2, WRITE, 10, 19);
    assert_eq!(again.fs.setlk(&ON_WORKER, again.node, free, true), Ok(()));
}

#[test]
fn a_waiting_thread_gets_the_lock_when_it_is_free() {
    let export = export();
    let (dpu, again) = (Dpu::new(&export.fs, "file"), Dpu::new(&export.fs, "file"));
    let mut host = HostProgram::start(&export);
    for flock in [false, true] {
        let (hold, drop) = if flock { ("flock ex", "flock un") } else { ("posix 1 0 0", "posix 2 0 0") };
        assert_eq!(host.ask(hold), 0);
        let got = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                if flock { again.flock(WRITE, true) } else { again.wait(2, WRITE, 0, 9) }.unwrap();
                got.store(true, Ordering::SeqCst);
            });
            wait_for("the waiting thread", || export.fs.counts().lock_waiters == 1);
            assert!(!got.load(Ordering::SeqCst));
            // Others are served meanwhile.
            assert_eq!(dpu.test(3, READ, 100, 200).kind, if flock { UNLOCK } else { WRITE } as u32);
            assert_eq!(host.ask(drop), 0);
            wait_for("the lock", || got.load(Ordering::SeqCst));
        });
        assert_eq!(export.fs.counts().lock_waiters, 0);
        assert_eq!(host.ask(hold), libc::EAGAIN);
        again.lock(2, UNLOCK, 0, LAST_BYTE).unwrap();
        again.flock(UNLOCK, false).unwrap();
    }
}

#[test]
fn destroying_wakes_every_waiting_thread() {
    let export = export();
    let mut host = HostProgram::start(&export);
    assert_eq!(host.ask("posix 1 0 0"), 0);
    assert_eq!(host.ask("flock ex"), 0);
    for round in 0..30 {
        let handles: Vec<Dpu> = (0..4).map(|_| Dpu::new(&export.fs, "file")).collect();
        std::thread::scope(|scope| {
            let threads: Vec<_> = handles
                .iter()
                .enumerate()
                .map(|(number, dpu)| {
                    scope.spawn(move || {
                        if number % 2 == 0 {
                            dpu.flock(WRITE, true)
                        } else {
                            dpu.wait(number as u64, WRITE, 0, 9)
                        }
                    })
                })
                .collect();
            if round % 3 != 0 {
                wait_for("the waiting threads", || export.fs.counts().lock_waiters == 4);
            }
            // Else while they are on their way.
            export.fs.destroy();
            for thread in threads {
                let result = thread.join().unwrap();
                assert!(matches!(result, Err(Errno::INTR | Errno::BADF)), "{result:?}");
            }
        });
        let counts = export.fs.counts();
        assert_eq!((counts.lock_waiters, counts.handles, counts.fds), (0, 0, 0));
    }
    assert_eq!(host.ask("posix 2 0 0"), 0);
    // Nobody was left behind with a lock.
    assert_eq!(host.ask("posix 1 0 0"), 0);
}

#[test]
fn interrupting_ends_waits_and_keeps_what_is_held() {
    let export = export();
    let mut host = HostProgram::start(&export);
    assert_eq!(host.ask("posix 1 0 10"), 0);
    let (dpu, again) = (Dpu::new(&export.fs, "file"), Dpu::new(&export.fs, "file"));
    dpu.lock(1, WRITE, 50, 59).unwrap();
    again.flock(WRITE, false).unwrap();
    for _ in 0..30 {
        std::thread::scope(|scope| {
            let posix = scope.spawn(|| dpu.wait(1, WRITE, 0, 9));
            let flock = scope.spawn(|| dpu.flock(WRITE, true));
            wait_for("both threads", || export.fs.counts().lock_waiters == 2);
            export.fs.interrupt_locks();
            assert_eq!(posix.join().unwrap(), Err(Errno::INTR));
            assert_eq!(flock.join().unwrap(), Err(Errno::INTR));
        });
        assert!(!again.free(50, 59), "the owner that waited keeps its other range");
    }
    export.fs.interrupt_locks();
    std::thread::scope(|scope| {
        let later = scope.spawn(|| dpu.wait(1, WRITE, 0, 9));
        wait_for("the thread", || export.fs.counts().lock_waiters == 1);
        assert_eq!(host.ask("posix 2 0 10"), 0);
        assert_eq!(later.join().unwrap(), Ok(()), "waits that begin later are not interrupted");
    });
    assert!(!again.free(0, 9));
}

#[test]
fn waking_works_in_threads_that_block_all_signals() {
    let export = export();
    let dpu = Dpu::new(&export.fs, "file");
    let again = Dpu::new(&export.fs, "file");
    dpu.flock(WRITE, false).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sys::signal::SigSet::all().thread_block().unwrap();
            again.flock(WRITE, true)
        });
        wait_for("the waiting thread", || export.fs.counts().lock_waiters == 1);
        export.fs.destroy();
        assert_eq!(thread.join().unwrap(), Err(Errno::INTR));
    });
}

#[test]
fn waiting_in_a_circle_is_refused() {
    let export = export();
    export.put("other", "");
    let (a, b) = (Dpu::new(&export.fs, "file"), Dpu::new(&export.fs, "other"));
    a.lock(1, WRITE, 0, 0).unwrap();
    b.lock(2, WRITE, 0, 0).unwrap();
    a.lock(3, READ, 5, 5).unwrap();
    std::thread::scope(|scope| {
        let one = scope.spawn(|| b.wait(1, WRITE, 0, 0));
        wait_for("owner 1", || export.fs.counts().lock_waiters == 1);
        assert_eq!(a.wait(2, READ, 0, 9), Err(Errno::DEADLK));
        // Nothing wrong with a line.
        let three = scope.spawn(|| b.wait(3, READ, 0, 0));
        wait_for("owner 3", || export.fs.counts().lock_waiters == 2);
        b.lock(2, UNLOCK, 0, 0).unwrap();
        assert_eq!(one.join().unwrap(), Ok(()));
        b.lock(1, UNLOCK, 0, 0).unwrap();
        assert_eq!(three.join().unwrap(), Ok(()));
    });
}

#[test]
fn waiting_threads_and_ranges_have_a_budget() {
    let export = Export::with(On::Disk, HostOptions { max_lock_waiters: 1, ..Default::default() });
    export.put("file", "");
    let dpu = Dpu::new(&export.fs, "file");
    dpu.lock(1, WRITE, 0, 0).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| dpu.wait(2, WRITE, 0, 0));
        wait_for("the waiting thread", || export.fs.counts().lock_waiters == 1);
        assert_eq!(dpu.wait(3, WRITE, 0, 0), Err(Errno::NOLCK));
        dpu.lock(1, UNLOCK, 0, 0).unwrap();
        assert_eq!(waiting.join().unwrap(), Ok(()));
    });
    let taken =
        (0..50_000u64).map(|byte| dpu.lock(5, READ, 10 + 2 * byte, 10 + 2 * byte)).position(|r| r.is_err());
    let taken = taken.unwrap() as u64;
    assert!(taken > 10_000);
    assert_eq!(dpu.lock(5, READ, 1 << 40, 1 << 40), Err(Errno::NOLCK));
    dpu.lock(5, UNLOCK, 0, LAST_BYTE).unwrap();
    assert_eq!(dpu.lock(5, READ, 1 << 40, 1 << 40), Ok(()));
}

#[test]
fn descriptions_count_in_the_descriptor_budget() {
    let export = Export::with(On::Disk, HostOptions { fd_budget: 8, ..Default::default() });
    export.put("file", "");
    let dpu = Dpu::new(&export.fs, "file");
    let taken = (0..20).take_while(|owner| dpu.lock(*owner, READ, 0, 0).is_ok()).count();
    assert!((6..=7).contains(&taken), "{taken}");
    assert_eq!(dpu.lock(99, READ, 0, 0), Err(Errno::NOLCK));
    assert!(export.fs.counts().fds <= 8);
    dpu.fs.flush(&AS_ROOT, dpu.node, dpu.handle, 0).unwrap();
    assert_eq!(dpu.lock(99, READ, 0, 0), Ok(()));
}

#[test]
fn read_locks_work_on_a_read_only_export() {
    let export = Export::with(On::Disk, HostOptions { readonly: true, ..Default::default() });
    export.put("file", "");
    let (node, handle) = export.open("file", RDONLY);
    let dpu = Dpu { fs: &export.fs, node, handle };
    assert_eq!(dpu.lock(1, READ, 0, 9), Ok(()));
    assert_eq!(dpu.flock(READ, false), Ok(()));
}

#[test]
fn locks_can_be_left_to_the_dpu() {
    let export = Export::with(On::Disk, HostOptions { host_locks: false, ..Default::default() });
    export.put("file", "");
    let dpu = Dpu::new(&export.fs, "file");
    assert_eq!(dpu.lock(1, WRITE, 0, 9), Err(Errno::NOSYS));
    assert_eq!(dpu.flock(WRITE, false), Err(Errno::NOSYS));
}

#[test]
fn many_owners_take_turns() {
    let export = export();
    let dpu = Dpu::new(&export.fs, "file");
    let inside = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for owner in 0..6 {
            let (dpu, inside) = (&dpu, &inside);
            scope.spawn(move || {
                for round in 0..100 {
                    dpu.wait(owner, WRITE, 0, 9).unwrap();
                    assert!(!inside.swap(true, Ordering::SeqCst), "two owners at a time");
                    std::thread::yield_now();
                    inside.store(false, Ordering::SeqCst);
                    if round % 2 == 0 {
                        dpu.lock(owner, UNLOCK, 0, 9).unwrap();
                    } else {
                        dpu.fs.flush(&AS_ROOT, dpu.node, dpu.handle, owner).unwrap();
                    }
                }
            });
        }
    });
    assert!(dpu.free(0, LAST_BYTE));
    assert_eq!(export.fs.counts().fds, 2);
}
