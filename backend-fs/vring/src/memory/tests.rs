//! Tables, translation, refusals, dirty log, and memory that is taken away.

use std::os::fd::AsFd;

use proptest::prelude::*;

use super::*;

const PAGE: u64 = 4096;

fn memfd(size: u64) -> OwnedFd {
    let fd = rustix::fs::memfd_create(c"memory-test", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&fd, size).unwrap();
    fd
}

fn region(dpu_addr: u64, size: u64, mmap_offset: u64) -> MemoryRegion {
    MemoryRegion { dpu_addr, size, user_addr: 0x7000_0000_0000 + (dpu_addr & 0xffff_ffff), mmap_offset }
}

fn table(fd: &OwnedFd, regions: &[MemoryRegion]) -> Result<DpuMemory, MemoryError> {
    DpuMemory::empty().unwrap().with_regions(regions.iter().map(|region| (*region, fd.as_fd())))
}

fn pieces(memory: &DpuMemory, addr: u64, len: u64) -> Option<Vec<(u64, usize)>> {
    let mut found = Vec::new();
    memory.translate(addr, len, &mut 0, |piece| found.push((piece.dpu_addr, piece.len))).ok()?;
    Some(found)
}

#[test]
fn bytes_go_through_the_mapping_to_the_file() {
    let fd = memfd(4 * PAGE);
    let memory = table(&fd, &[region(0x10_0000, 2 * PAGE, PAGE)]).unwrap();
    memory.write(0x10_0000 + 5, b"hello").unwrap();
    let mut bytes = [0; 5];
    rustix::io::pread(&fd, &mut bytes, PAGE + 5).unwrap();
    assert_eq!(&bytes, b"hello");
    let piece = memory.user_range(0x7000_0010_0005, 5).unwrap();
    assert_eq!((piece.dpu_addr, piece.len), (0x10_0005, 5));
}

#[test]
fn region_may_start_in_the_middle_of_a_page_of_its_file() {
    let fd = memfd(4 * PAGE);
    let memory = table(&fd, &[region(0, PAGE, 100)]).unwrap();
    memory.write(0, b"x").unwrap();
    let mut byte = [0];
    rustix::io::pread(&fd, &mut byte, 100).unwrap();
    assert_eq!(&byte, b"x");
    memory.write(PAGE - 1, b"y").unwrap();
    assert!(memory.write(PAGE, b"z").is_err());
}

#[test]
fn adjoining_regions_may_be_spanned_and_holes_may_not() {
    let fd = memfd(16 * PAGE);
    let memory = table(
        &fd,
        &[region(4 * PAGE, PAGE, 0), region(5 * PAGE, PAGE, 8 * PAGE), region(8 * PAGE, PAGE, 2 * PAGE)],
    )
    .unwrap();
    assert_eq!(
        pieces(&memory, 5 * PAGE - 8, 16).unwrap(),
        [(5 * PAGE - 8, 8), (5 * PAGE, 8)],
        "in the file the two are far apart"
    );
    assert_eq!(pieces(&memory, 4 * PAGE, 2 * PAGE).unwrap().len(), 2);
    assert!(pieces(&memory, 5 * PAGE, PAGE + 1).is_none(), "runs into a hole");
    assert!(pieces(&memory, 6 * PAGE, 1).is_none());
    assert!(pieces(&memory, 4 * PAGE - 1, 2).is_none(), "starts before");
    assert!(pieces(&memory, 9 * PAGE - 1, 2).is_none(), "ends behind the last");
    assert!(pieces(&memory, u64::MAX, 1).is_none());
    assert!(pieces(&memory, u64::MAX - 8, 16).is_none());
    assert!(memory.user_range(0x7000_0000_0000 + 5 * PAGE - 8, 16).is_none(), "rings lie in one region");
    assert!(memory.user_range(0x7000_0000_0000 + 5 * PAGE, u64::MAX).is_none());
    assert!(memory.user_range(0, 1).is_none());
}

#[test]
fn impossible_regions_are_refused() {
    let fd = memfd(4 * PAGE);
    let error = |region: MemoryRegion| table(&fd, &[region]).unwrap_err();
    assert!(matches!(error(region(0, 0, 0)), MemoryError::BadRange(_)));
    assert!(matches!(error(region(u64::MAX - PAGE + 1, PAGE + 1, 0)), MemoryError::BadRange(_)));
    assert!(matches!(error(region(0, PAGE, u64::MAX - 100)), MemoryError::BadRange(_)));
    assert!(matches!(error(region(0, PAGE, i64::MAX as u64)), MemoryError::BadRange(_)));
    let far_user = MemoryRegion { user_addr: u64::MAX - 4, ..region(0, PAGE, 0) };
    assert!(matches!(error(far_user), MemoryError::BadRange(_)));
    assert!(matches!(error(region(0, 5 * PAGE, 0)), MemoryError::FileTooSmall { .. }));
    assert!(matches!(error(region(0, PAGE, 3 * PAGE + 1)), MemoryError::FileTooSmall { .. }));
}

#[test]
fn overlapping_regions_are_refused() {
    let fd = memfd(16 * PAGE);
    let base = region(4 * PAGE, 4 * PAGE, 0);
    for (addr, size) in [(4, 4), (5, 1), (7, 2), (3, 2), (0, 16)] {
        let other = region(addr * PAGE, size * PAGE, 0);
        assert!(matches!(table(&fd, &[base, other]), Err(MemoryError::Overlap(_))), "{addr} {size}");
    }
    assert!(table(&fd, &[base, region(8 * PAGE, PAGE, 0), region(3 * PAGE, PAGE, 0)]).is_ok());
}

#[test]
fn no_more_regions_than_slots() {
    let fd = memfd(PAGE);
    let regions: Vec<_> = (0..MAX_MEM_SLOTS as u64).map(|i| region(i * PAGE, PAGE, 0)).collect();
    let full = table(&fd, &regions).unwrap();
    assert_eq!(full.regions().count(), MAX_MEM_SLOTS);
    let next = region(MAX_MEM_SLOTS as u64 * PAGE, PAGE, 0);
    assert!(matches!(full.with_region(next, fd.as_fd()), Err(MemoryError::TooMany)));
}

#[test]
fn descriptors_that_are_not_memory_are_refused_with_advice() {
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    let null = std::fs::File::open("/dev/null").unwrap();
    let directory = std::fs::File::open("/").unwrap();
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    for fd in [socket.as_fd(), pipe.as_fd(), null.as_fd(), directory.as_fd(), event.as_fd()] {
        let error = DpuMemory::empty().unwrap().with_region(region(0, PAGE, 0), fd).unwrap_err();
        assert!(matches!(error, MemoryError::NotMemory { .. }), "{error}");
        assert!(error.to_string().contains("share=on"), "{error}");
    }
}

#[test]
fn memory_that_cannot_be_written_is_refused_with_advice() {
    let fd = memfd(PAGE);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let read_only = std::fs::File::open(path).unwrap();
    let error = DpuMemory::empty().unwrap().with_region(region(0, PAGE, 0), read_only.as_fd()).unwrap_err();
    assert!(matches!(error, MemoryError::Map { .. }), "{error}");
    assert!(error.to_string().contains("share=on"), "{error}");
}

#[test]
fn regions_are_added_and_removed_without_touching_the_others() {
    let fd = memfd(4 * PAGE);
    let one = table(&fd, &[region(0, PAGE, 0)]).unwrap();
    let two = one.with_region(region(8 * PAGE, PAGE, PAGE), fd.as_fd()).unwrap();
    assert_eq!(one.regions().count(), 1);
    let at = |memory: &DpuMemory, index: usize| memory.regions().nth(index).unwrap().host_addr;
    assert_eq!(at(&one, 0), at(&two, 0), "the first region is not mapped a second time");
    let last = two.without_region(region(0, PAGE, 0)).unwrap();
    assert_eq!(at(&last, 0), at(&two, 1));
    let wrong = MemoryRegion { user_addr: 1, ..region(8 * PAGE, PAGE, 0) };
    assert!(matches!(last.without_region(wrong), Err(MemoryError::NoSuchRegion(_))));
    // The offset does not count: the specification says so.
    let offset = region(8 * PAGE, PAGE, 77);
    assert_eq!(last.without_region(offset).unwrap().regions().count(), 0);
    drop((one, two));
    last.write(8 * PAGE, b"still mapped").unwrap();
}

#[test]
fn region_facts_name_the_backing() {
    let fd = memfd(PAGE);
    let memory = table(&fd, &[region(0, PAGE, 0)]).unwrap();
    let info = memory.regions().next().unwrap();
    assert_eq!((info.backing, info.page_size), (Backing::Shmem, 4096));
    let file = tempfile_on_disk();
    file.set_len(PAGE).unwrap();
    let memory = DpuMemory::empty().unwrap().with_region(region(0, PAGE, 0), file.as_fd()).unwrap();
    let info = memory.regions().next().unwrap();
    assert!(matches!(info.backing, Backing::File | Backing::Shmem), "by what the build directory is on");
}

fn tempfile_on_disk() -> std::fs::File {
    let path = std::env::current_exe().unwrap().with_extension(format!("{}.memory", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file
}

#[test]
fn hugepages_are_mapped_by_whole_pages() {
    let fd = match rustix::fs::memfd_create(c"huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB) {
        Ok(fd) => fd,
        Err(error) => return eprintln!("no hugetlb memfd here: {error}"),
    };
    let huge = rustix::fs::fstatfs(&fd).unwrap().f_bsize as u64;
    rustix::fs::ftruncate(&fd, 2 * huge).unwrap();
    // Offsets and sizes as QEMU makes them around the hole below 4 GiB: pages of 4 KiB, not huge ones.
    let split = 0xc0 * PAGE;
    let regions = [region(0, split, 0), region(huge * 16, 2 * huge - split, split)];
    match table(&fd, &regions) {
        Ok(memory) => {
            let info = memory.regions().next().unwrap();
            assert_eq!((info.backing, info.page_size), (Backing::Hugetlb, huge));
        }
        // Mapping reserves pages; without any there is nothing to map.
        Err(MemoryError::Map { source, .. }) => assert_eq!(source.kind(), io::ErrorKind::OutOfMemory),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn truncated_memory_reads_as_zero_and_is_reported() {
    let fd = memfd(4 * PAGE);
    let memory = table(&fd, &[region(0, 2 * PAGE, 0), region(8 * PAGE, 2 * PAGE, 2 * PAGE)]).unwrap();
    let other = table(&memfd(PAGE), &[region(0, PAGE, 0)]).unwrap();
    memory.write(9 * PAGE, b"data").unwrap();
    assert!(!memory.is_lost());
    rustix::fs::ftruncate(&fd, PAGE).unwrap();
    let mut bytes = [1; 4];
    memory.read(9 * PAGE, &mut bytes).unwrap();
    assert_eq!(bytes, [0; 4]);
    assert!(memory.is_lost() && !other.is_lost());
    let mut count = [0; 8];
    rustix::io::read(memory.lost_event(), &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    // The page behaves like memory from now on, and the rest is as it was.
    memory.write(9 * PAGE, b"more").unwrap();
    memory.read(9 * PAGE, &mut bytes).unwrap();
    assert_eq!(&bytes, b"more");
    memory.write(0, b"kept").unwrap();
    let remaining = memory.without_region(region(8 * PAGE, 2 * PAGE, 0)).unwrap();
    assert!(!remaining.is_lost(), "what is not in the table any more does not count");
}

#[test]
fn mappings_that_are_gone_are_not_guarded_any_more() {
    // Far more than there are places, one after the other.
    let fd = memfd(PAGE);
    for _ in 0..2 * sigbus::MAX_MAPPINGS {
        table(&fd, &[region(0, PAGE, 0)]).unwrap();
    }
}

#[test]
fn log_marks_every_touched_page_and_stays_inside() {
    let memory = DpuMemory::anonymous(PAGE as usize).unwrap();
    let fd = memfd(PAGE);
    let log = DirtyLog::map(LogArea { size: 2, offset: 10 }, fd.as_fd(), &memory).unwrap();
    log.mark(0, 1);
    log.mark(3 * PAGE - 1, 2);
    log.mark(15 * PAGE, 100 * PAGE);
    log.mark(16 * PAGE, PAGE);
    log.mark(u64::MAX - 1, u64::MAX);
    log.mark(5 * PAGE, 0);
    let mut bytes = [0; 16];
    rustix::io::pread(&fd, &mut bytes, 8).unwrap();
    assert_eq!(bytes[..6], [0, 0, 0b0000_1101, 0b1000_0000, 0, 0]);
}

#[test]
fn impossible_logs_are_refused() {
    let memory = DpuMemory::anonymous(PAGE as usize).unwrap();
    let fd = memfd(PAGE);
    let attempt = |size, offset| DirtyLog::map(LogArea { size, offset }, fd.as_fd(), &memory);
    assert!(matches!(attempt(0, 0), Err(MemoryError::BadRange(_))));
    assert!(matches!(attempt(1, u64::MAX), Err(MemoryError::BadRange(_))));
    assert!(matches!(attempt(u64::MAX, 1), Err(MemoryError::BadRange(_))));
    assert!(matches!(attempt(PAGE, 1), Err(MemoryError::FileTooSmall { .. })));
    let (pipe, _writer) = rustix::pipe::pipe().unwrap();
    assert!(DirtyLog::map(LogArea { size: 1, offset: 0 }, pipe.as_fd(), &memory).is_err());
}

proptest! {
    /// Translation agrees with a byte-by-byte model, whatever the hint.
    #[test]
    fn translation_covers_exactly_the_range(
        layout in proptest::collection::vec((0u64..3, 1u64..4), 1..8),
        addr in 0u64..40 * PAGE, len in 1u64..6 * PAGE, hint in 0usize..10,
    ) {
        let fd = memfd(64 * PAGE);
        let mut start = 0;
        let regions: Vec<_> = layout.iter().map(|(gap, pages)| {
            let at = start + gap * PAGE;
            start = at + pages * PAGE;
            region(at, pages * PAGE, at)
        }).collect();
        let memory = table(&fd, &regions).unwrap();
        let shared = |byte: u64| regions.iter().any(|r| byte >= r.dpu_addr && byte < r.dpu_addr + r.size);
        let edges = (addr..addr + len).filter(|byte| byte % PAGE == 0 || *byte == addr || *byte == addr + len - 1);
        let whole = edges.into_iter().all(shared);
        let mut covered = Vec::new();
        let mut hint = hint;
        let result = memory.translate(addr, len, &mut hint, |piece| covered.push((piece.dpu_addr, piece.len)));
        prop_assert_eq!(result.is_ok(), whole);
        if whole {
            let mut at = addr;
            for (dpu_addr, len) in covered {
                prop_assert_eq!(dpu_addr, at);
                at += len as u64;
            }
            prop_assert_eq!(at, addr + len);
        }
    }
}
