//! `FUSE_INIT`: what the DPU's kernel can do, what the export offers, what both then do. Pure.
//!
//! | asked | answered |
//! |---|---|
//! | major above 7 | our version alone; the kernel asks again with 7 |
//! | major below 7, or 7.22 and older | `EPROTO` |
//! | 7.23 and newer | the smaller minor, and the flags that both sides know |
//! | a wish marked "always" that the kernel lacks | `EPROTO`, with the reason in the log |
//!
//! Never agreed to: `EXPORT_SUPPORT` (lookups of `.` and `..` are refused), `NO_OPEN_SUPPORT` and
//! `NO_OPENDIR_SUPPORT` (facts of the kernel, nothing to agree to), `MAP_ALIGNMENT` and
//! `HAS_INODE_DAX` (no DAX window), `HAS_EXPIRE_ONLY` and `HAS_RESEND` (no notifications on
//! virtio-fs), `EXPLICIT_INVAL_DATA` (pages would go stale for good, for the same reason),
//! `PASSTHROUGH` and `OVER_IO_URING` (of `/dev/fuse`), `ALLOW_IDMAP` (ids would come as -1),
//! `HANDLE_KILLPRIV` (its second version says what is meant).
#![forbid(unsafe_code)]

use rustix::io::Errno;

use super::abi::{self, InitIn, InitOut};
use super::arguments::MAX_WRITE;
use super::init_flags::InitFlags;
use crate::filesystem::Negotiated;
use crate::host::options::{CachePolicy, HostOptions, Offer};

/// Pages in one request, if they are of the smallest size: [`MAX_WRITE`]. The kernel lowers this to
/// what its queue holds: QEMU's default of 128 descriptors leaves 124 pages, 1024 all of them.
const MAX_PAGES: u16 = (MAX_WRITE / 4096) as u16;
/// Bytes of a request of a kernel that cannot negotiate pages (`FUSE_DEFAULT_MAX_PAGES_PER_REQ`).
const DEFAULT_WRITE: u32 = 32 * 4096;
/// Bytes the kernel may read ahead; it never takes more than it asked for.
const MAX_READAHEAD: u32 = 1 << 20;
/// Requests the kernel may have under way in the background. The queue bounds them anyway; the
/// kernel's default of 12 would keep read-ahead and writeback from filling it.
const MAX_BACKGROUND: u16 = u16::MAX;
/// Background requests at which the kernel slows down read-ahead: three quarters.
const CONGESTION_THRESHOLD: u16 = MAX_BACKGROUND / 4 * 3;

/// What every export offers.
const ALWAYS: InitFlags = InitFlags::ASYNC_READ
    .union(InitFlags::ATOMIC_O_TRUNC)
    .union(InitFlags::BIG_WRITES)
    .union(InitFlags::AUTO_INVAL_DATA)
    .union(InitFlags::ASYNC_DIO)
    .union(InitFlags::PARALLEL_DIROPS)
    .union(InitFlags::MAX_PAGES)
    .union(InitFlags::SETXATTR_EXT)
    .union(InitFlags::INIT_EXT)
    .union(InitFlags::CREATE_SUPP_GROUP);

/// What POSIX ACLs need together: the umask must not be applied where a default ACL decides, and
/// the kernel must be able to tell when a new ACL drops the set-group-id bit.
const POSIX_ACL: InitFlags = InitFlags::POSIX_ACL.union(InitFlags::DONT_MASK).union(InitFlags::SETXATTR_EXT);

/// What one export offers to the kernel of a DPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    /// Agreed to where the kernel knows them.
    flags: InitFlags,
    /// POSIX ACLs.
    posix_acl: Offer,
    /// Security labels at creation.
    security_label: Offer,
}

impl From<&HostOptions> for Offered {
    fn from(options: &HostOptions) -> Self {
        let mut flags = ALWAYS;
        let mut offer = |wanted: bool, flag: InitFlags| flags.set(flag, wanted);
        offer(options.readdirplus, InitFlags::DO_READDIRPLUS | InitFlags::READDIRPLUS_AUTO);
        offer(options.writeback, InitFlags::WRITEBACK_CACHE);
        offer(options.host_locks, InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS);
        offer(options.announce_submounts, InitFlags::SUBMOUNTS);
        offer(options.killpriv_v2, InitFlags::HANDLE_KILLPRIV_V2);
        offer(options.allow_mmap, InitFlags::DIRECT_IO_ALLOW_MMAP);
        offer(options.cache == CachePolicy::Always, InitFlags::CACHE_SYMLINKS);
        Self { flags, posix_acl: options.posix_acl, security_label: options.security_label }
    }
}

/// The outcome of a negotiation that succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agreement {
    /// The kernel asks again with this major version; nothing is negotiated yet.
    AskAgain(InitOut),
    /// Both sides go on with this.
    Start(Terms),
}

/// What was agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Reply to the kernel.
    pub reply: InitOut,
    /// All flags in force.
    pub flags: InitFlags,
    /// Minor version both speak.
    pub minor: u32,
    /// What the file system must know.
    pub negotiated: Negotiated,
}

/// Why a kernel is refused. The DPU is told `EPROTO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Too old.
    #[error("the DPU kernel speaks FUSE {major}.{minor}; 7.{} or newer is needed", abi::MINOR_OLDEST)]
    Version {
        /// Major version asked for.
        major: u32,
        /// Minor version asked for.
        minor: u32,
    },
    /// `--posix-acl=always` cannot be kept.
    #[error("the DPU kernel cannot do POSIX ACLs, but they are required (--posix-acl=always)")]
    PosixAcl,
    /// `--security-label=always` cannot be kept.
    #[error("the DPU kernel cannot send security labels, but they are required (--security-label=always)")]
    SecurityLabel,
}

impl Refusal {
    /// What the DPU is told.
    pub fn errno(self) -> Errno {
        Errno::PROTO
    }
}

/// Decides on one `FUSE_INIT`.
///
/// # Errors
/// [`Refusal`]: the mount in the DPU fails, the export stays ready for another try.
pub fn negotiate(asked: &InitIn, offered: &Offered) -> Result<Agreement, Refusal> {
    if asked.major > abi::MAJOR {
        let reply = InitOut { major: abi::MAJOR, minor: abi::MINOR, ..Default::default() };
        return Ok(Agreement::AskAgain(reply));
    }
    if asked.major < abi::MAJOR || asked.minor < abi::MINOR_OLDEST {
        return Err(Refusal::Version { major: asked.major, minor: asked.minor });
    }
    let able = able(asked);
    let mut flags = offered.flags & able;
    if wished(offered.posix_acl, able.contains(POSIX_ACL)).ok_or(Refusal::PosixAcl)? {
        flags |= POSIX_ACL;
    }
    let labels = able.contains(InitFlags::SECURITY_CTX);
    if wished(offered.security_label, labels).ok_or(Refusal::SecurityLabel)? {
        flags |= InitFlags::SECURITY_CTX;
    }
    if !flags.contains(InitFlags::DO_READDIRPLUS) {
        flags.remove(InitFlags::READDIRPLUS_AUTO);
    }
    let minor = asked.minor.min(abi::MINOR);
    let many_pages = flags.contains(InitFlags::MAX_PAGES);
    let reply = InitOut {
        major: abi::MAJOR,
        minor,
        max_readahead: asked.max_readahead.min(MAX_READAHEAD),
        flags: flags.bits() as u32,
        max_background: MAX_BACKGROUND,
        congestion_threshold: CONGESTION_THRESHOLD,
        max_write: if many_pages { MAX_WRITE } else { DEFAULT_WRITE },
        time_gran: 1,
        max_pages: if many_pages { MAX_PAGES } else { 0 },
        flags2: (flags.bits() >> 32) as u32,
        ..Default::default()
    };
    Ok(Agreement::Start(Terms { reply, flags, minor, negotiated: negotiated(flags) }))
}

/// What the kernel says it can do. The upper half counts only when it says that there is one.
fn able(asked: &InitIn) -> InitFlags {
    let low = InitFlags::from_bits_retain(u64::from(asked.flags));
    if low.contains(InitFlags::INIT_EXT) {
        low | InitFlags::from_bits_retain(u64::from(asked.flags2) << 32)
    } else {
        low
    }
}

/// Whether a feature is used; `None` when it must be and cannot.
fn wished(offer: Offer, possible: bool) -> Option<bool> {
    match (offer, possible) {
        (Offer::Never, _) | (Offer::Auto, false) => Some(false),
        (Offer::Always, false) => None,
        (Offer::Auto | Offer::Always, true) => Some(true),
    }
}

fn negotiated(flags: InitFlags) -> Negotiated {
    Negotiated {
        writeback: flags.contains(InitFlags::WRITEBACK_CACHE),
        killpriv_v2: flags.contains(InitFlags::HANDLE_KILLPRIV_V2),
        posix_acl: flags.contains(InitFlags::POSIX_ACL),
        dont_mask: flags.contains(InitFlags::DONT_MASK),
        submounts: flags.contains(InitFlags::SUBMOUNTS),
        supplementary_groups: flags.contains(InitFlags::CREATE_SUPP_GROUP),
        security_label: flags.contains(InitFlags::SECURITY_CTX),
        readdirplus: flags.contains(InitFlags::DO_READDIRPLUS),
        allow_mmap: flags.contains(InitFlags::DIRECT_IO_ALLOW_MMAP),
    }
}

#[cfg(test)]
mod tests;
