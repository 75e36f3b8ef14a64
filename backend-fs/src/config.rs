//! From a parsed command line to what the daemon runs with.
//!
//! Everything that can be wrong is found here, by looking only: nothing is created, changed or
//! opened for good before a [`Config`] exists. Types carry what was checked, so that the rest of the
//! daemon need not ask again.
#![forbid(unsafe_code)]

mod device;
mod error;
mod listen;

use std::fs;
use std::io;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caps::Capability;
use nix::unistd::{Group, User};

pub use device::{
    DeviceOptions, MAX_POLL_WINDOW, MAX_POOL_SIZE, MAX_QUEUE_SIZE, MAX_REQUEST_QUEUES, Tag, TagError,
};
pub use error::Error;
pub use listen::{Endpoint, LONG_PATH_NAME_MAX, ListenOptions, SUN_PATH_MAX, SocketOptions, SocketPath};

use crate::args::Args;
use crate::args::values::MigrationMode;
use crate::host::idmap::{self, IdMap};
use crate::host::options::{CachePolicy, FileHandles, HostOptions, Offer};
use crate::limits;
use crate::logging::LogOptions;
use crate::sandbox::options::{NamespaceMap, SandboxMode, SandboxOptions};
use error::reason;

/// Everything the daemon runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// What is exported.
    pub shared_dir: SharedDir,
    /// Where the front end connects.
    pub listen: ListenOptions,
    /// The device.
    pub device: DeviceOptions,
    /// How the export behaves. Its `fd_budget` is `--fd-budget`, or `usize::MAX`; to be lowered to
    /// [`Config::fd_budget`] once the limit of open files is set.
    pub host: HostOptions,
    /// Isolation.
    pub sandbox: SandboxOptions,
    /// Logging.
    pub log: LogOptions,
    /// Lines to log as warnings once logging runs.
    pub warnings: Vec<String>,
}

impl Config {
    /// Checks a command line; `root`: the daemon runs as root, so that it can `chroot(2)`, and needs
    /// no user namespace.
    pub fn for_user(args: Args, root: bool) -> Result<Self, Error> {
        // The command line by itself first, so that its mistakes (exit 2) come before this host's (exit 1).
        let shared_dir = args.shared_dir.clone().ok_or(Error::NoSharedDir)?;
        if args.fd.is_none() && args.socket_path.is_none() && args.socket.is_none() {
            return Err(Error::NoEndpoint);
        }
        let mut warnings = warnings(&args);
        migration(&args, &mut warnings)?;
        let device = device(&args)?;
        let host = host(&args)?;
        let sandbox = sandbox(&args, root)?;
        check_rlimit(sandbox.rlimit_nofile, &device)?;
        let log = LogOptions { level: args.log_level, syslog: args.syslog };

        let shared_dir = SharedDir::new(shared_dir)?;
        let listen = listen(&args)?;
        Ok(Config { shared_dir, listen, device, host, sandbox, log, warnings })
    }

    /// The DPU's budget of descriptors under `limit`, the limit of open files that
    /// [`limits::apply`] set: what that leaves, or less with `--fd-budget`.
    pub fn fd_budget(&self, limit: u64) -> Result<usize, limits::Error> {
        let reserve = limits::reserve(self.device.request_queues, self.device.pool_size);
        Ok(self.host.fd_budget.min(limits::budget(limit, reserve)?))
    }

    /// The descriptor that the caller handed over with `--fd`; any other inherited one is a leak.
    pub fn inherited_fd(&self) -> Option<RawFd> {
        match self.listen.endpoint {
            Endpoint::Fd(fd) => Some(fd),
            Endpoint::Path(_) => None,
        }
    }
}

/// What is exported: an existing directory, or a single file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedDir(PathBuf);

impl SharedDir {
    /// Checks that the path leads to a directory or a regular file, through symbolic links.
    pub fn new(path: PathBuf) -> Result<Self, Error> {
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() || metadata.is_file() => Ok(Self(path)),
            Ok(_) => Err(Error::SharedDir(path, "neither a directory nor a regular file".into())),
            Err(error) => Err(Error::SharedDir(path, reason(&error))),
        }
    }

    /// The path as it was given.
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl TryFrom<Args> for Config {
    type Error = Error;

    /// For the user this process runs as.
    fn try_from(args: Args) -> Result<Self, Error> {
        Config::for_user(args, rustix::process::geteuid().is_root())
    }
}

/// What deserves a word although it works.
fn warnings(args: &Args) -> Vec<String> {
    let mut warnings = Vec::new();
    if args.socket_path.is_none() && args.socket.is_some() {
        warnings.push("--socket is deprecated; use --socket-path".into());
    }
    if args.legacy_debug {
        warnings.push("-d is deprecated; use --log-level=debug".into());
    }
    if args.legacy_foreground {
        warnings.push("-f is deprecated and has no effect; remove it".into());
    }
    if !args.legacy_options.is_empty() {
        warnings.push("-o is deprecated; use separate options, as in --cache=auto".into());
    }
    if args.xattrmap.as_ref().is_some_and(|map| !map.is_terminated()) {
        warnings.push(
            "--xattrmap: names that no rule matches are refused; end the rules with ':ok:all:::' or \
             ':bad:all:::'"
                .into(),
        );
    }
    if args.thread_pool_size > MAX_POOL_SIZE {
        warnings
            .push(format!("--thread-pool-size: {MAX_POOL_SIZE} threads are used, the most that make sense"));
    }
    warnings
}

/// Options of live migration are checked as if they had an effect.
fn migration(args: &Args, warnings: &mut Vec<String>) -> Result<(), Error> {
    if args.migration_mode == Some(MigrationMode::FileHandles) {
        for (given, option) in [
            (args.migration_confirm_paths, "--migration-confirm-paths"),
            (args.migration_verify_handles, "--migration-verify-handles"),
        ] {
            if given {
                return Err(Error::MigrationWithFileHandles(option));
            }
        }
    }
    if args.migration_mode.is_some()
        || args.migration_on_error.is_some()
        || args.migration_confirm_paths
        || args.migration_verify_handles
    {
        warnings.push("--migration-*: live migration is not offered; the options have no effect".into());
    }
    Ok(())
}

fn device(args: &Args) -> Result<DeviceOptions, Error> {
    if !args.queue_size.is_power_of_two() || args.queue_size < 2 {
        return Err(Error::QueueSize(args.queue_size));
    }
    Ok(DeviceOptions {
        tag: args.tag.clone(),
        request_queues: args.num_request_queues,
        queue_size: args.queue_size,
        poll_window: Duration::from_micros(u64::from(args.poll_us)),
        pool_size: args.thread_pool_size.min(MAX_POOL_SIZE),
    })
}

fn host(args: &Args) -> Result<HostOptions, Error> {
    if args.posix_acl != Offer::Never {
        for (rules, option) in
            [(&args.translate_uid, "translate-uid"), (&args.translate_gid, "translate-gid")]
        {
            if !rules.is_empty() {
                return Err(Error::TranslateWithPosixAcl(option));
            }
        }
    }
    if args.inode_file_handles == FileHandles::Mandatory && drops(args, Capability::CAP_DAC_READ_SEARCH) {
        return Err(Error::HandlesWithoutCapability);
    }
    let defaults = HostOptions::default();
    Ok(HostOptions {
        cache: args.cache,
        writeback: args.writeback,
        allow_mmap: args.allow_mmap,
        allow_direct_io: args.allow_direct_io,
        // With nothing cached, the attributes that READDIRPLUS brings along would be thrown away.
        readdirplus: !args.no_readdirplus && args.cache != CachePolicy::Never,
        xattr: args.xattr
            || args.xattrmap.is_some()
            || args.posix_acl != Offer::Never
            || args.security_label != Offer::Never,
        xattrmap: args.xattrmap.clone(),
        posix_acl: args.posix_acl,
        security_label: args.security_label,
        announce_submounts: !args.no_announce_submounts,
        file_handles: args.inode_file_handles,
        killpriv_v2: args.killpriv_v2,
        preserve_noatime: args.preserve_noatime,
        readonly: args.readonly,
        host_locks: !args.no_host_locks,
        uid_map: id_map("translate-uid", &args.translate_uid)?,
        gid_map: id_map("translate-gid", &args.translate_gid)?,
        fd_budget: args.fd_budget.unwrap_or(usize::MAX),
        max_inodes: args.max_inodes,
        ..defaults
    })
}

fn id_map(option: &'static str, rules: &[idmap::Rule]) -> Result<IdMap, Error> {
    IdMap::new(rules).map_err(|error| Error::IdMap { option, error })
}

fn drops(args: &Args, capability: Capability) -> bool {
    args.modcaps.as_ref().is_some_and(|changes| changes.drop.contains(&capability))
}

fn sandbox(args: &Args, root: bool) -> Result<SandboxOptions, Error> {
    if args.sandbox == SandboxMode::Chroot && !root {
        return Err(Error::ChrootNeedsRoot);
    }
    let maps: [(&[NamespaceMap], _, _); 2] =
        [(&args.uid_map, "uid-map", "uid"), (&args.gid_map, "gid-map", "gid")];
    for (map, option, instead) in maps {
        if !map.is_empty() && (root || args.sandbox != SandboxMode::Namespace) {
            return Err(Error::NamespaceMap(option, instead));
        }
    }
    Ok(SandboxOptions {
        mode: args.sandbox,
        seccomp: args.seccomp,
        modcaps: args.modcaps.clone().unwrap_or_default(),
        uid_map: args.uid_map.clone(),
        gid_map: args.gid_map.clone(),
        rlimit_nofile: args.rlimit_nofile,
    })
}

/// A limit that was named must be possible, and leave something for the DPU.
fn check_rlimit(request: Option<u64>, device: &DeviceOptions) -> Result<(), Error> {
    let Some(limit) = request.filter(|&limit| limit > 0) else { return Ok(()) };
    limits::budget(limit, limits::reserve(device.request_queues, device.pool_size))
        .map_err(Error::RlimitTooSmall)?;
    limits::plan(request, limits::current()).map(drop).map_err(Error::RlimitTooLarge)
}

fn listen(args: &Args) -> Result<ListenOptions, Error> {
    let socket = args.socket_path.as_ref().or(args.socket.as_ref());
    let endpoint = match (args.fd, socket) {
        (Some(fd), _) => Endpoint::Fd(check_fd(fd)?),
        (None, Some(path)) => Endpoint::Path(SocketOptions {
            path: SocketPath::new(path.clone())?,
            owner: args.socket_owner.as_deref().map(user_id).transpose()?,
            group: args.socket_group.as_deref().map(group_id).transpose()?,
            mode: args.socket_mode.unwrap_or(if args.socket_group.is_some() { 0o770 } else { 0o700 }),
        }),
        (None, None) => return Err(Error::NoEndpoint),
    };
    Ok(ListenOptions { endpoint, keep_listening: args.keep_listening })
}

/// Looks at an inherited descriptor without touching it: nothing has been opened yet that could
/// have taken its number.
fn check_fd(fd: RawFd) -> Result<RawFd, Error> {
    match fs::read_link(format!("/proc/self/fd/{fd}")) {
        Ok(target) => match target.to_string_lossy() {
            target if target.starts_with("socket:") => Ok(fd),
            target => Err(Error::FdNotSocket(fd, target.into_owned())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound && Path::new("/proc/self/fd").exists() => {
            Err(Error::FdClosed(fd))
        }
        // No /proc to look into; accept(2) will tell.
        Err(_) => Ok(fd),
    }
}

/// A user by name or number.
fn user_id(name: &str) -> Result<u32, Error> {
    lookup("--socket-owner", name, User::from_name(name).map(|user| user.map(|user| user.uid.as_raw())))?
        .ok_or_else(|| Error::NoSuchUser(name.to_owned()))
}

/// A group by name or number.
fn group_id(name: &str) -> Result<u32, Error> {
    lookup("--socket-group", name, Group::from_name(name).map(|group| group.map(|group| group.gid.as_raw())))?
        .ok_or_else(|| Error::NoSuchGroup(name.to_owned()))
}

/// A name wins over a number, as in `chown(1)`.
fn lookup(option: &'static str, name: &str, found: nix::Result<Option<u32>>) -> Result<Option<u32>, Error> {
    match (found, name.parse().ok().filter(|&id| id != idmap::NO_ID)) {
        (Ok(Some(id)), _) | (_, Some(id)) => Ok(Some(id)),
        (Ok(None), None) => Ok(None),
        (Err(errno), None) => {
            Err(Error::Lookup { option, name: name.to_owned(), error: errno.desc().to_owned() })
        }
    }
}

#[cfg(test)]
mod tests;
