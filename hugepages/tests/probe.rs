//! What the probe says about real descriptors: memfds, tmpfs and disk files, pipes, sockets, and a real QEMU.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hugepages::backing::{Backing, Wish};
use hugepages::probe::{
    MemoryKind, NotShared, Placement, Region, SYSCALLS, Source, probe, probe_file, probe_mapping,
    probe_region,
};
use rustix::fs::{MemfdFlags, SealFlags};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

fn memfd(size: u64) -> rustix::fd::OwnedFd {
    let fd = rustix::fs::memfd_create("probe-test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

/// A file in /dev/shm that goes with the value.
struct ShmFile(PathBuf);

impl ShmFile {
    fn new(name: &str, size: u64) -> ShmFile {
        let path = Path::new("/dev/shm").join(format!("probe-test-{name}-{}", std::process::id()));
        File::create(&path).unwrap().set_len(size).unwrap();
        ShmFile(path)
    }

    fn open(&self) -> File {
        OpenOptions::new().read(true).write(true).open(&self.0).unwrap()
    }
}

impl Drop for ShmFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn a_sealed_and_filled_memfd_is_shared_memory_on_a_node() {
    let backing = Backing::create(&Wish { name: "ram", size: 4 << 20, ..Wish::default() }).unwrap();
    let kind = probe(backing.as_fd(), 4 << 20).unwrap();
    let Placement::Nodes(nodes) = &kind.placement else { panic!("{kind:?}") };
    assert_eq!(nodes.len(), 1);
    assert_eq!(
        (&kind.source, kind.huge(), kind.sealed, kind.allocated),
        (&Source::Memfd, None, true, 4 << 20)
    );
    assert_eq!(
        kind.to_string(),
        format!("DPU memory: 4 MiB shared, memfd, 4K pages, named `ram`, NUMA node {}, sealed", nodes[0])
    );
    assert!(!kind.is_risky());
}

#[test]
fn untouched_memory_has_no_node_yet_and_stays_untouched() {
    let fd = memfd(8 << 20);
    let kind = probe(fd.as_fd(), 8 << 20).unwrap();
    assert_eq!((kind.placement, kind.allocated, kind.sealed), (Placement::Unknown, 0, false));
    assert_eq!(rustix::fs::fstat(&fd).unwrap().st_blocks, 0);
}

#[test]
fn a_region_may_begin_and_end_anywhere_in_the_file() {
    let fd = memfd(8 << 20);
    let region = |offset, size| Region { fd: fd.as_fd(), offset, size, front_end: None };
    assert_eq!(probe_region(region(0, 0xa0000)).unwrap().size, 0xa0000);
    probe_region(region(0xc1234, 0x11111)).unwrap();
    for (offset, size) in [(0, (8 << 20) + 1), (8 << 20, 1), (u64::MAX, 2), (0, 0)] {
        let error = probe_region(region(offset, size)).unwrap_err();
        assert!(matches!(error, NotShared::TooSmall { .. }), "{error}");
    }
}

#[test]
fn what_is_not_memory_is_named_and_the_remedy_told() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let zero = OpenOptions::new().read(true).write(true).open("/dev/zero").unwrap();
    let directory = File::open("/").unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    for (fd, what) in [
        (reader.as_fd(), "a pipe"),
        (socket.as_fd(), "a socket"),
        (zero.as_fd(), "a character device"),
        (directory.as_fd(), "a directory"),
        (event.as_fd(), "anonymous inode"),
    ] {
        let text = probe(fd, 4096).unwrap_err().to_string();
        assert!(text.contains(what), "{text}");
        assert!(text.contains("share=on") && text.contains("<access mode='shared'/>"), "{text}");
        assert!(!text.contains('\n'), "{text}");
    }
}

#[test]
fn memory_that_cannot_be_written_is_refused() {
    let file = ShmFile::new("readonly", 1 << 20);
    assert!(matches!(probe(File::open(&file.0).unwrap().as_fd(), 1 << 20), Err(NotShared::ReadOnly)));
    for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
        let fd = memfd(1 << 20);
        rustix::fs::fcntl_add_seals(&fd, seal).unwrap();
        assert!(matches!(probe(fd.as_fd(), 1 << 20), Err(NotShared::SealedAgainstWriting)));
    }
}

#[test]
fn files_are_told_from_memfds() {
    let shm = ShmFile::new("kind", 1 << 20);
    let kind = probe_file(&shm.open()).unwrap();
    assert_eq!((kind.source, kind.name), (Source::ShmFile, None));
    let deleted = shm.open();
    std::fs::remove_file(&shm.0).unwrap();
    assert_eq!(probe_file(&deleted).unwrap().source, Source::ShmFile);

    // The source tree lies on a disk wherever this is built.
    let disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    disk.set_len(1 << 20).unwrap();
    let kind = probe_file(&disk).unwrap();
    assert!(matches!(kind.source, Source::DiskFile(_)), "{kind}");
    assert!(kind.is_risky() && kind.to_string().contains("use memory-backend-memfd"), "{kind}");
}

#[test]
fn a_tmpfs_that_is_too_small_is_a_risk() {
    // Far larger than any /dev/shm; nothing of it is allocated.
    let file = ShmFile::new("huge", 1 << 45);
    let kind = probe(file.open().as_fd(), 1 << 20).unwrap();
    assert!(kind.lacking > 1 << 44 && kind.is_risky(), "{kind:?}");
    assert!(kind.to_string().contains("SIGBUS"), "{kind}");
}

#[test]
fn private_memory_of_this_process_is_refused() {
    let heap = vec![1u8; 8192];
    let error = probe_mapping(heap.as_ptr() as usize, heap.len()).unwrap_err();
    assert!(matches!(error, NotShared::PrivateMapping { .. }), "{error}");
    assert!(matches!(probe_mapping(4096, 4096), Err(NotShared::NotMapped { .. })));
    assert!(matches!(probe_mapping(usize::MAX, 4096), Err(NotShared::NotMapped { .. })));
}

#[test]
fn a_shared_mapping_of_this_process_is_recognised() {
    let fd = memfd(1 << 20);
    rustix::io::pwrite(&fd, &[1; 4096], 0).unwrap();
    let mapping = hugepages::sys::Mapping::shared(fd.as_fd(), 0, 1 << 20, true).unwrap();
    mapping.populate(0, 4096, false).unwrap();
    let kind = probe_mapping(mapping.address(0), 1 << 20).unwrap();
    assert_eq!((kind.source, kind.name.as_deref()), (Source::Memfd, Some("probe-test")));
    assert!(matches!(kind.placement, Placement::Nodes(_)));
}

/// The probe's own calls and what a thread needs to run and end at all.
fn run_restricted(calls: Vec<i64>, probe: impl FnOnce() -> MemoryKind + Send + 'static) -> MemoryKind {
    let of_any_thread = [
        libc::SYS_brk,
        libc::SYS_mmap,
        libc::SYS_munmap,
        libc::SYS_mprotect,
        libc::SYS_futex,
        libc::SYS_exit,
        libc::SYS_write,
        libc::SYS_rt_sigprocmask,
        libc::SYS_sigaltstack,
    ];
    let rules = calls.into_iter().chain(of_any_thread).map(|call| (call, vec![])).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter =
        SeccompFilter::new(rules, refuse, SeccompAction::Allow, std::env::consts::ARCH.try_into().unwrap());
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    std::thread::spawn(move || {
        seccompiler::apply_filter(&program).unwrap();
        probe()
    })
    .join()
    .unwrap()
}

#[test]
fn the_listed_system_calls_suffice() {
    let make = || Backing::create(&Wish { name: "boxed", size: 1 << 20, ..Wish::default() }).unwrap();
    let free = probe_file(&make()).unwrap();
    let boxed = make();
    let own = std::process::id() as i32;
    let probe_it = move || {
        probe_region(Region { fd: boxed.as_fd(), offset: 0, size: 1 << 20, front_end: Some(own) }).unwrap()
    };
    assert_eq!(run_restricted(SYSCALLS.to_vec(), probe_it), free);
}

#[test]
fn without_proc_only_the_name_is_lost() {
    let boxed = Backing::create(&Wish { name: "boxed", size: 1 << 20, ..Wish::default() }).unwrap();
    let free = probe_file(&boxed).unwrap();
    let on_proc = [libc::SYS_readlinkat, libc::SYS_openat, libc::SYS_read, libc::SYS_close];
    let calls = SYSCALLS.iter().copied().filter(|c| !on_proc.contains(c)).collect();
    let kind = run_restricted(calls, move || probe(boxed.as_fd(), 1 << 20).unwrap());
    assert_eq!(kind, MemoryKind { name: None, ..free });
}

/// A QEMU that is stopped before its first instruction.
struct Qemu(Child);

impl Qemu {
    fn start(arguments: &[&str]) -> Qemu {
        let mut command = Command::new("qemu-system-x86_64");
        command.args(["-nodefaults", "-display", "none", "-accel", "tcg", "-S", "-m", "16M"]).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Qemu(command.spawn().expect("these tests need QEMU: apt-get install qemu-system-x86"))
    }

    fn pid(&self) -> i32 {
        self.0.id() as i32
    }

    /// Waits until the process maps a file whose path contains `part`.
    fn wait_for_mapping(&mut self, part: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            assert!(self.0.try_wait().unwrap().is_none(), "QEMU ended early");
            assert!(Instant::now() < deadline, "QEMU never mapped {part}");
            if std::fs::read_to_string(format!("/proc/{}/maps", self.pid())).unwrap().contains(part) {
                return;
            }
            // wait-loop: the mapping, until the deadline.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_qemu_that_forgot_share_on_is_found_out() {
    for (share, good) in [("share=on", true), ("share=off", false)] {
        let file = ShmFile::new(share, 16 << 20);
        let object = format!("memory-backend-file,id=mem,size=16M,mem-path={},{share}", file.0.display());
        let mut qemu = Qemu::start(&["-object", &object, "-machine", "pc,memory-backend=mem"]);
        qemu.wait_for_mapping(&file.0.display().to_string());
        let fd = file.open();
        let result =
            probe_region(Region { fd: fd.as_fd(), offset: 0, size: 16 << 20, front_end: Some(qemu.pid()) });
        match result {
            Ok(kind) => assert!(good && kind.source == Source::ShmFile, "{kind}"),
            Err(error) => {
                assert!(
                    !good && matches!(error, NotShared::PrivateInFrontEnd { pid } if pid == qemu.pid()),
                    "{error}"
                );
                assert!(error.to_string().contains("share=on"), "{error}");
            }
        }
    }
}

#[test]
fn the_memfd_of_a_real_qemu_is_accepted() {
    let mut qemu = Qemu::start(&[
        "-object",
        "memory-backend-memfd,id=mem,size=16M,share=on",
        "-machine",
        "pc,memory-backend=mem",
    ]);
    qemu.wait_for_mapping("/memfd:memory-backend-memfd");
    let fd = std::fs::read_dir(format!("/proc/{}/fd", qemu.pid()))
        .unwrap()
        .flatten()
        .map(|e| e.path())
        .find(|p| {
            std::fs::read_link(p)
                .is_ok_and(|l| l.to_string_lossy().starts_with("/memfd:memory-backend-memfd"))
        })
        .expect("QEMU holds its memfd");
    let file = OpenOptions::new().read(true).write(true).open(fd).unwrap();
    assert!(file.as_raw_fd() > 0);
    let kind =
        probe_region(Region { fd: file.as_fd(), offset: 0, size: 16 << 20, front_end: Some(qemu.pid()) })
            .unwrap();
    assert_eq!((kind.source, kind.sealed), (Source::Memfd, true));
    assert_eq!(kind.name.as_deref(), Some("memory-backend-memfd"));
}
