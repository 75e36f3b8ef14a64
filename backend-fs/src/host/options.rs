//! How an export behaves: everything the command line decides about the host file system.
#![forbid(unsafe_code)]

use std::time::Duration;

use super::idmap::IdMap;
use super::xattrmap::XattrMap;

/// How long and what the DPU may cache (`--cache`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CachePolicy {
    /// Metadata for one second, data while it is unchanged.
    #[default]
    Auto,
    /// Metadata and data for a day.
    Always,
    /// Metadata for a day, no data.
    Metadata,
    /// Nothing.
    Never,
}

impl CachePolicy {
    /// Validity of attributes and names.
    pub fn timeout(self) -> Duration {
        match self {
            CachePolicy::Never => Duration::ZERO,
            CachePolicy::Auto => Duration::from_secs(1),
            CachePolicy::Metadata | CachePolicy::Always => Duration::from_secs(86400),
        }
    }
}

/// Whether inodes may be kept as file handles instead of open descriptors (`--inode-file-handles`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum FileHandles {
    /// Never: one descriptor per inode the DPU knows.
    Never,
    /// Where the file system and the capabilities allow it.
    #[default]
    Prefer,
    /// Required: start-up fails without.
    Mandatory,
}

/// POSIX ACL and security label negotiation (`--posix-acl`, `--security-label`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Offer {
    /// Not offered.
    #[default]
    Never,
    /// Offered; fine when the DPU declines.
    Auto,
    /// Offered; a DPU that declines is refused.
    Always,
}

/// Options of one export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOptions {
    /// Caching.
    pub cache: CachePolicy,
    /// Writeback cache in the DPU.
    pub writeback: bool,
    /// `mmap` with `--cache=never` (`FUSE_DIRECT_IO_ALLOW_MMAP`).
    pub allow_mmap: bool,
    /// Pass `O_DIRECT` to the host.
    pub allow_direct_io: bool,
    /// Offer READDIRPLUS.
    pub readdirplus: bool,
    /// Extended attributes.
    pub xattr: bool,
    /// Renaming of extended attributes.
    pub xattrmap: Option<XattrMap>,
    /// POSIX ACLs.
    pub posix_acl: Offer,
    /// Security labels at creation.
    pub security_label: Offer,
    /// Mount points below the export become mounts in the DPU.
    pub announce_submounts: bool,
    /// File handles for inodes.
    pub file_handles: FileHandles,
    /// `FUSE_HANDLE_KILLPRIV_V2`.
    pub killpriv_v2: bool,
    /// Keep `O_NOATIME` that the DPU asked for even when it cannot be had (`--preserve-noatime`).
    pub preserve_noatime: bool,
    /// Refuse every change with `EROFS`.
    pub readonly: bool,
    /// Forward `flock(2)` and `fcntl(2)` locks to the host.
    pub host_locks: bool,
    /// User ids.
    pub uid_map: IdMap,
    /// Group ids.
    pub gid_map: IdMap,
    /// Descriptors the export may hold for inodes and open files together.
    pub fd_budget: usize,
    /// Inodes the DPU may hold references to.
    pub max_inodes: usize,
    /// Threads that may wait for locks at a time.
    pub max_lock_waiters: usize,
}

impl Default for HostOptions {
    fn default() -> Self {
        Self {
            cache: CachePolicy::Auto,
            writeback: false,
            allow_mmap: false,
            allow_direct_io: false,
            readdirplus: true,
            xattr: false,
            xattrmap: None,
            posix_acl: Offer::Never,
            security_label: Offer::Never,
            announce_submounts: true,
            file_handles: FileHandles::Prefer,
            killpriv_v2: false,
            preserve_noatime: false,
            readonly: false,
            host_locks: true,
            uid_map: IdMap::default(),
            gid_map: IdMap::default(),
            fd_budget: 8192,
            max_inodes: 16 << 20,
            max_lock_waiters: 256,
        }
    }
}
