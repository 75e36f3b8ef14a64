//! What kind of memory did the front end share? Asked once per memory region, before a daemon works in it.
//!
//! Theory of operation. A vhost-user front end hands over a file descriptor per region. If the DPU's memory is not
//! really shared, the daemon sees zeros or old bytes where the rings should be, and nobody gets an error. So the
//! descriptor is examined for everything that it alone can tell: is it a file with memory behind it at all, is it
//! large enough, may it be mapped shared and written, is it hugetlb (`fstatfs` says `HUGETLBFS_MAGIC`, and the block
//! size is the page size), on which NUMA nodes do its pages lie, is it sealed. It is mapped for that, never touched:
//! pages that do not exist yet are not made here, they would land on the daemon's node instead of the front end's.
//!
//! One thing the descriptor cannot tell: whether the *front end* maps the same file shared. QEMU with `share=off`
//! hands over a good file and keeps its changes private. With the front end's process id ([`Region::front_end`],
//! from `SO_PEERCRED`) its `/proc/PID/maps` tells; when that cannot be read (another PID namespace, no permission)
//! the question stays open and the region is accepted.
//!
//! A daemon under seccomp needs [`SYSCALLS`].

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::fs::{OFlags, SealFlags};

use crate::size::{Bytes, PageSize, compact};
use crate::smaps::{Vma, parse_smaps};
use crate::sys::{Mapping, nodes_of};

/// `linux/magic.h`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// `linux/magic.h`.
const TMPFS_MAGIC: u64 = 0x0102_1994;
/// Pages looked at to find the nodes: enough to see an interleaved region, few enough to cost nothing.
const SAMPLES: u64 = 64;

/// System calls that [`probe`] and [`probe_region`] make, for a seccomp allow list. Those on `/proc` (the last four)
/// only serve to show the memfd's name and to look at the front end; refused with an error they are done without.
pub const SYSCALLS: &[libc::c_long] = &[
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fcntl,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mincore,
    libc::SYS_madvise,
    libc::SYS_move_pages,
    libc::SYS_readlinkat,
    libc::SYS_openat,
    libc::SYS_read,
    libc::SYS_close,
];

/// Where the bytes of a region live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A memfd made with `MFD_HUGETLB`.
    HugetlbMemfd,
    /// A file in a hugetlbfs mount.
    HugetlbFile,
    /// A memfd of base pages.
    Memfd,
    /// A file in a tmpfs such as `/dev/shm`.
    ShmFile,
    /// A file on some other file system, whose magic number this is.
    DiskFile(u64),
    /// An anonymous mapping; only ever seen by [`probe_mapping`].
    Anonymous,
}

/// On which NUMA nodes the pages lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Placement {
    /// On these nodes, by number; seen on a sample of the pages that exist.
    Nodes(Vec<u32>),
    /// No page exists yet, or which ones do could not be told without making them.
    Unknown,
}

/// What was found out about a region that is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryKind {
    /// Bytes of the region.
    pub size: u64,
    /// Where its bytes live.
    pub source: Source,
    /// The memfd's name, where `/proc` could be read.
    pub name: Option<String>,
    /// Bytes per page.
    pub page_size: u64,
    /// Bytes of the file that have memory behind them so far.
    pub allocated: u64,
    /// NUMA nodes.
    pub placement: Placement,
    /// Sealed against shrinking: no access to the region can ever fault behind the file's end.
    pub sealed: bool,
    /// Bytes that the file may still lack when the DPU touches them, because the pool or the tmpfs is too small.
    /// Whoever touches them then dies of SIGBUS.
    pub lacking: u64,
}

impl MemoryKind {
    /// The hugepage size, None for base pages.
    pub fn huge(&self) -> Option<PageSize> {
        match self.source {
            Source::HugetlbFile | Source::HugetlbMemfd => PageSize::new(self.page_size),
            _ => None,
        }
    }

    /// Whether the line should be logged as a warning.
    pub fn is_risky(&self) -> bool {
        self.lacking > 0 || matches!(self.source, Source::DiskFile(_))
    }
}

impl fmt::Display for MemoryKind {
    /// The one line for the log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = match &self.source {
            Source::HugetlbMemfd => "memfd on hugepages".to_owned(),
            Source::HugetlbFile => "hugetlbfs file on hugepages".to_owned(),
            Source::Memfd => "memfd".to_owned(),
            Source::ShmFile => "tmpfs file".to_owned(),
            Source::DiskFile(magic) => format!("file on a disk file system (magic {magic:#x})"),
            Source::Anonymous => "anonymous mapping".to_owned(),
        };
        write!(f, "DPU memory: {} shared, {source}", Bytes(self.size))?;
        match self.huge() {
            Some(page) => write!(f, " of {page}")?,
            None => write!(f, ", {} pages", compact(self.page_size))?,
        }
        if let Some(name) = &self.name {
            write!(f, ", named `{name}`")?;
        }
        match &self.placement {
            Placement::Unknown => write!(f, ", NUMA node not known yet")?,
            Placement::Nodes(nodes) => {
                let list: Vec<_> = nodes.iter().map(u32::to_string).collect();
                write!(f, ", NUMA node{} {}", if nodes.len() == 1 { "" } else { "s" }, list.join(" and "))?;
            }
        }
        f.write_str(if self.sealed { ", sealed" } else { ", not sealed" })?;
        if self.lacking > 0 {
            let (what, fix) = match self.huge() {
                Some(_) => {
                    ("free hugepages are missing", "reserve them with dpu-hugepages, or set prealloc=on")
                }
                None => ("space is missing in its tmpfs", "enlarge it, or use memory-backend-memfd"),
            };
            write!(
                f,
                "; {} of {what} and the front end will die of SIGBUS when it needs them: {fix}",
                Bytes(self.lacking)
            )?;
        } else if matches!(self.source, Source::DiskFile(_)) {
            f.write_str("; what the DPU writes to its memory goes to the disk: use memory-backend-memfd")?;
        }
        Ok(())
    }
}

/// The region cannot be worked in. The text says what the front end shared and what to change there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotShared {
    /// The descriptor is not a file.
    #[error("the front end sent {kind} instead of shared memory. {HOW_TO_SHARE}")]
    NotMemory {
        /// What it is.
        kind: &'static str,
    },
    /// The front end's mapping is private.
    #[error(
        "the front end (process {pid}) maps the DPU's memory privately, so that nothing it writes can be seen here \
         (`share=off`, or `share=on` forgotten). {HOW_TO_SHARE}"
    )]
    PrivateInFrontEnd {
        /// Its process id.
        pid: i32,
    },
    /// A mapping of this process is private.
    #[error("the memory at {start:#x} is mapped privately in this process. {HOW_TO_SHARE}")]
    PrivateMapping {
        /// First address.
        start: usize,
    },
    /// Nothing is mapped there, or not all of it.
    #[error("no memory is mapped from {start:#x} for {}", Bytes(*length as u64))]
    NotMapped {
        /// First address.
        start: usize,
        /// Bytes.
        length: usize,
    },
    /// The descriptor is open for reading only.
    #[error(
        "the front end shared the DPU's memory read-only: in QEMU leave out `readonly=on` and `rom=on`, and use share=on"
    )]
    ReadOnly,
    /// The file is sealed against writing.
    #[error(
        "the front end shared memory that is sealed against writing (F_SEAL_WRITE): it must not add that seal"
    )]
    SealedAgainstWriting,
    /// The region goes beyond the file.
    #[error(
        "the front end says that its memory region ends at {}, but the file has only {}: the backing file was cut \
         short or is too small; give it the DPU's full memory size",
        Bytes(*end), Bytes(*file)
    )]
    TooSmall {
        /// End of the region in the file.
        end: u64,
        /// Size of the file.
        file: u64,
    },
    /// The system refused.
    #[error("cannot {what} the memory that the front end shared: {source}. {HOW_TO_SHARE}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// What to change in the front end.
pub const HOW_TO_SHARE: &str = "Share it: QEMU `-object memory-backend-memfd,id=mem,size=<RAM>,share=on -machine \
    memory-backend=mem`; libvirt `<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>`; \
    Cloud Hypervisor `--memory size=<RAM>,shared=on`. `dpu-hugepages qemu-args` prints the lines for a given size";

/// A memory region as the front end described it.
#[derive(Debug, Clone, Copy)]
pub struct Region<'a> {
    /// The descriptor that came with it.
    pub fd: BorrowedFd<'a>,
    /// Where the region begins in the file (`mmap_offset`).
    pub offset: u64,
    /// Bytes (`memory_size`).
    pub size: u64,
    /// The front end's process, if known and in this PID namespace.
    pub front_end: Option<i32>,
}

/// Examines a file that is the region, from its first byte on.
pub fn probe(fd: BorrowedFd<'_>, size: u64) -> Result<MemoryKind, NotShared> {
    probe_region(Region { fd, offset: 0, size, front_end: None })
}

/// Examines a region of a file.
pub fn probe_region(region: Region<'_>) -> Result<MemoryKind, NotShared> {
    let Region { fd, offset, size, .. } = region;
    let io = |what| move |source: rustix::io::Errno| NotShared::Io { what, source: source.into() };
    let stat = rustix::fs::fstat(fd).map_err(io("examine"))?;
    if let Some(kind) = not_memory(fd, stat.st_mode) {
        return Err(NotShared::NotMemory { kind });
    }
    let end = offset.saturating_add(size);
    let file = u64::try_from(stat.st_size).unwrap_or(0);
    if size == 0 || end > file {
        return Err(NotShared::TooSmall { end, file });
    }
    let access = rustix::fs::fcntl_getfl(fd).map_err(io("examine"))?;
    if access & OFlags::ACCMODE != OFlags::RDWR {
        return Err(NotShared::ReadOnly);
    }
    // EINVAL: not a memfd or tmpfs file, and so not sealed.
    let seals = rustix::fs::fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
    if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(NotShared::SealedAgainstWriting);
    }
    let fs = rustix::fs::fstatfs(fd).map_err(io("examine"))?;
    let magic = fs.f_type as u64 & 0xffff_ffff;
    let link = link_of(fd);
    let name = link.as_deref().and_then(|l| l.strip_prefix("/memfd:"));
    let name = name.map(|n| n.trim_end_matches(" (deleted)").to_owned());
    let hugetlb = magic == HUGETLBFS_MAGIC;
    // Where /proc cannot be read: memfds have no name and lie on a mount inside the kernel, which has no size limit.
    let memfd = name.is_some() || (link.is_none() && stat.st_nlink == 0 && fs.f_blocks == 0);
    let (source, page_size) = match (hugetlb, memfd, magic) {
        (true, true, _) => (Source::HugetlbMemfd, fs.f_bsize as u64),
        (true, false, _) => (Source::HugetlbFile, fs.f_bsize as u64),
        (false, true, TMPFS_MAGIC) => (Source::Memfd, base_page()),
        (false, false, TMPFS_MAGIC) => (Source::ShmFile, base_page()),
        _ => (Source::DiskFile(magic), base_page()),
    };
    // Regions need not begin or end on a page: QEMU cuts them at guest addresses such as 640 KiB. A mapping must.
    let start = offset / page_size * page_size;
    let length = end.div_ceil(page_size).saturating_mul(page_size).saturating_sub(start);
    let length = usize::try_from(length).map_err(|_| io("map")(rustix::io::Errno::OVERFLOW))?;
    let mapping =
        Mapping::shared(fd, start, length, false).map_err(|source| NotShared::Io { what: "map", source })?;
    check_front_end(&region, stat.st_dev, stat.st_ino)?;

    // st_blocks counts 512 bytes whatever the block size.
    let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
    let lacking = match source {
        Source::ShmFile if fs.f_blocks > 0 => {
            let room = fs.f_bavail.saturating_mul(fs.f_bsize as u64);
            file.saturating_sub(allocated).saturating_sub(room)
        }
        _ => 0,
    };
    let placement = placement(&mapping, &source, page_size, allocated >= file);
    let sealed = seals.contains(SealFlags::SHRINK);
    Ok(MemoryKind { size, source, name, page_size, allocated, placement, sealed, lacking })
}

/// Examines memory that this process has mapped already, by address. Reads `/proc/self/smaps`, which takes time in
/// proportion to the process's memory: for start-up and diagnosis, not for a hot path.
pub fn probe_mapping(start: usize, length: usize) -> Result<MemoryKind, NotShared> {
    let text = std::fs::read_to_string("/proc/self/smaps")
        .map_err(|source| NotShared::Io { what: "look up", source })?;
    let not_mapped = NotShared::NotMapped { start, length };
    let Some(end) = start.checked_add(length).filter(|_| length > 0) else {
        return Err(not_mapped);
    };
    let list = parse_smaps(&text);
    let covering: Vec<&Vma> = list.iter().filter(|v| v.start < end as u64 && v.end > start as u64).collect();
    let bytes: u64 = covering.iter().map(|v| v.end.min(end as u64) - v.start.max(start as u64)).sum();
    let Some(first) = covering.first().filter(|_| bytes == length as u64) else {
        return Err(not_mapped);
    };
    if let Some(private) = covering.iter().find(|v| !v.shared) {
        return Err(NotShared::PrivateMapping { start: private.start as usize });
    }
    let huge = first.hugetlb_page(base_page());
    let name = first.path.strip_prefix("/memfd:").map(|n| n.trim_end_matches(" (deleted)").to_owned());
    let source = match (huge.is_some(), &name, first.path.as_str()) {
        (_, None, "/dev/zero (deleted)" | "/anon_hugepage (deleted)") => Source::Anonymous,
        (true, Some(_), _) => Source::HugetlbMemfd,
        (true, None, _) => Source::HugetlbFile,
        (false, Some(_), _) => Source::Memfd,
        (false, None, path) if path.starts_with("/dev/shm/") => Source::ShmFile,
        _ => Source::DiskFile(0),
    };
    let page_size = first.page_size.max(base_page());
    let addresses: Vec<_> = sample(length as u64, page_size).map(|offset| start + offset as usize).collect();
    let placement = Placement::of(nodes_of(&addresses).unwrap_or_default());
    let allocated = covering.iter().map(|v| v.hugetlb).sum();
    Ok(MemoryKind {
        size: length as u64,
        source,
        name,
        page_size,
        allocated,
        placement,
        sealed: false,
        lacking: 0,
    })
}

fn base_page() -> u64 {
    rustix::param::page_size() as u64
}

/// What a descriptor is that cannot be memory; None for a regular file.
fn not_memory(fd: BorrowedFd<'_>, mode: u32) -> Option<&'static str> {
    Some(match mode & libc::S_IFMT {
        libc::S_IFREG => {
            // Memory of a confidential guest: a regular file to stat, but nobody outside may map it.
            return link_of(fd)
                .filter(|l| l.contains("[guest-memfd]"))
                .map(|_| "private guest memory (guest_memfd)");
        }
        libc::S_IFSOCK => "a socket",
        libc::S_IFIFO => "a pipe",
        libc::S_IFDIR => "a directory",
        libc::S_IFCHR => "a character device",
        libc::S_IFBLK => "a block device",
        _ => match link_of(fd) {
            Some(l) if l.contains("guest-memfd") => "private guest memory (guest_memfd)",
            _ => "a descriptor without memory (anonymous inode)",
        },
    })
}

fn link_of(fd: BorrowedFd<'_>) -> Option<String> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::readlinkat(rustix::fs::CWD, path, Vec::new()).ok()?.into_string().ok()
}

/// Refuses a region that the front end maps privately. What cannot be found out is accepted.
fn check_front_end(region: &Region<'_>, device: u64, inode: u64) -> Result<(), NotShared> {
    let Some(pid) = region.front_end else { return Ok(()) };
    let Ok(text) = std::fs::read_to_string(format!("/proc/{pid}/maps")) else { return Ok(()) };
    let device = (rustix::fs::major(device), rustix::fs::minor(device));
    let list = parse_smaps(&text);
    let mut same = list.iter().filter(|v| v.inode == inode && v.device == device).peekable();
    if same.peek().is_some() && same.all(|v| !v.shared) {
        return Err(NotShared::PrivateInFrontEnd { pid });
    }
    Ok(())
}

/// Offsets of up to [`SAMPLES`] pages, evenly over the region.
fn sample(size: u64, page: u64) -> impl Iterator<Item = u64> {
    let pages = (size / page).max(1);
    let count = pages.min(SAMPLES);
    (0..count).map(move |i| (u128::from(i) * u128::from(pages) / u128::from(count)) as u64 * page)
}

/// The nodes of pages that exist. Pages are looked at only where that cannot make new ones.
fn placement(mapping: &Mapping, source: &Source, page: u64, complete: bool) -> Placement {
    let offsets: Vec<u64> = sample(mapping.length() as u64, page).collect();
    let exists = |offset: &u64| match source {
        // Which pages of a hugetlb file exist cannot be asked; all of them do when it is full.
        Source::HugetlbMemfd | Source::HugetlbFile => complete,
        Source::Memfd | Source::ShmFile => mapping.is_resident(*offset as usize).unwrap_or(false),
        Source::DiskFile(_) | Source::Anonymous => false,
    };
    let present: Vec<u64> = offsets.iter().filter(|o| exists(o)).copied().collect();
    // mincore answers "resident" for everything to those who do not own the file (mm/mincore.c).
    if !complete && present.len() == offsets.len() && offsets.len() > 1 {
        return Placement::Unknown;
    }
    let ready: Vec<usize> = present
        .into_iter()
        .filter(|o| mapping.populate(*o as usize, 1, false).is_ok())
        .map(|o| mapping.address(o as usize))
        .collect();
    Placement::of(nodes_of(&ready).unwrap_or_default())
}

impl Placement {
    fn of(nodes: Vec<Option<u32>>) -> Placement {
        let mut nodes: Vec<u32> = nodes.into_iter().flatten().collect();
        nodes.sort_unstable();
        nodes.dedup();
        if nodes.is_empty() { Placement::Unknown } else { Placement::Nodes(nodes) }
    }
}

/// Examines a [`crate::backing::Backing`] or anything else with a descriptor.
pub fn probe_file(file: &impl AsFd) -> Result<MemoryKind, NotShared> {
    let stat =
        rustix::fs::fstat(file).map_err(|source| NotShared::Io { what: "examine", source: source.into() })?;
    probe(file.as_fd(), u64::try_from(stat.st_size).unwrap_or(0))
}
