//! The command line: names, values, defaults and help. What the values mean together is decided in
//! [`crate::config`].
//!
//! Names, aliases and value syntax are virtiofsd's (1.14), so that whatever starts it can start this.
//! Options of our own are marked by not existing there; none changes the meaning of one that does.
//! When an option is repeated, the last one counts; the maps and `-o` add up.
#![forbid(unsafe_code)]

mod generate;
pub mod invocation;
mod legacy;
pub mod values;

use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::Parser;

use crate::config::{MAX_REQUEST_QUEUES, Tag};
use crate::host::idmap;
use crate::host::options::{CachePolicy, FileHandles, Offer};
use crate::host::xattrmap::XattrMap;
use crate::logging::LogLevel;
use crate::sandbox::options::{CapChanges, NamespaceMap, SandboxMode, SeccompMode};
use values::{Generate, MigrationMode, MigrationOnError};

const EXPORT: &str = "Export";
const ENDPOINT: &str = "Endpoint";
const CACHING: &str = "Caching and I/O";
const ATTRIBUTES: &str = "Extended attributes";
const IDS: &str = "User and group ids";
const ISOLATION: &str = "Isolation";
const RESOURCES: &str = "Queues, threads and limits";
const LOGGING: &str = "Logging and information";
const MIGRATION: &str = "Migration (accepted, without effect: live migration is not offered)";
const LEGACY: &str = "Compatibility (deprecated)";

const ABOUT: &str = "Export a host directory to a DPU as a virtio-fs device (vhost-user)";

const LONG_ABOUT: &str = "\
Export a host directory to a DPU as a virtio-fs device (vhost-user).

The DPU (or a virtual machine, which is an emulated DPU) mounts the export with the virtio-fs driver \
of its stock kernel. What owns the device on the host side connects to the socket given here: the \
DPU's PCIe device model, QEMU, libvirt, Cloud Hypervisor or Kata Containers. The command line is \
virtiofsd's, so this program can take its place.";

const AFTER_HELP: &str = "\
Example: backend-fs --shared-dir /srv/share --socket-path /run/share.sock
'--help' explains every option and shows complete examples.";

const AFTER_LONG_HELP: &str = "\
Examples:
  Export /srv/share, and mount it in an emulated DPU:

    backend-fs --shared-dir /srv/share --socket-path /run/share.sock &
    qemu-system-x86_64 -m 4G \\
      -object memory-backend-memfd,id=mem,size=4G,share=on -numa node,memdev=mem \\
      -chardev socket,id=share,path=/run/share.sock \\
      -device vhost-user-fs-pci,chardev=share,tag=share,queue-size=1024 ...
    mount -t virtiofs share /mnt          # on the DPU

  The device needs shared memory (share=on). Hugepages are faster: hugetlb=on.

  Read-only, for a front end that runs in group kvm, serving one front end after another:

    backend-fs --shared-dir /srv/images --readonly --keep-listening \\
      --socket-path /run/images.sock --socket-group kvm

  Unprivileged: whoever writes on the DPU, files belong to user 1001 here:

    backend-fs --shared-dir ~/share --socket-path share.sock --sandbox none \\
      --translate-uid squash-guest:0:1001:4294967295 --translate-uid host:1001:1000:1 \\
      --translate-gid squash-guest:0:100:4294967295 --translate-gid host:100:1000:1

  SELinux on host and DPU side by side:

    backend-fs --shared-dir /srv/share --socket-path /run/share.sock --security-label=auto \\
      --xattrmap :map:security.selinux:trusted.virtiofs.: --modcaps=+sys_admin

Environment:
  RUST_LOG   Log filter; wins over --log-level. Example: warn,backend_fs::host=debug

Files:
  SOCKET.pid   The daemon's pid, locked while it runs: a second daemon on SOCKET is refused.

Exit status:
  0  The front end disconnected, or SIGTERM.
  1  The daemon could not start, or failed.
  2  The command line is wrong.";

/// A parsed command line.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "backend-fs",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = AFTER_HELP,
    after_long_help = AFTER_LONG_HELP,
    override_usage = "backend-fs --shared-dir <DIR> --socket-path <PATH> [OPTIONS]\n       \
                      backend-fs --shared-dir <DIR> --fd <N> [OPTIONS]",
    args_override_self = true,
    max_term_width = 100,
    disable_help_flag = true,
    disable_version_flag = true
)]
pub struct Args {
    /// Directory to export; a single file is accepted too
    #[arg(long, value_name = "DIR", help_heading = EXPORT)]
    pub shared_dir: Option<PathBuf>,

    /// Tag in the device's configuration space
    ///
    /// Offers VHOST_USER_PROTOCOL_F_CONFIG. Front ends that read it (Cloud Hypervisor's
    /// generic-vhost-user, crosvm) need it; QEMU takes the tag from its own command line and ignores
    /// this one, but QEMU 7.1 to 8.0 crash on it.
    #[arg(long, value_name = "TAG", help_heading = EXPORT)]
    pub tag: Option<Tag>,

    /// Refuse every change from the DPU
    ///
    /// Access times of the host's files may still change, as with a plain read on the host.
    #[arg(long, help_heading = EXPORT)]
    pub readonly: bool,

    /// Tell the DPU which directories are mount points [default]
    ///
    /// Each mount below the export becomes a mount in the DPU with a device number of its own.
    /// Without it two files on different file systems can have the same inode number, and a sync in
    /// the DPU covers the export's top file system only.
    #[arg(long, overrides_with = "no_announce_submounts", help_heading = EXPORT)]
    pub announce_submounts: bool,

    /// Do not tell the DPU which directories are mount points
    #[arg(long, overrides_with = "announce_submounts", help_heading = EXPORT)]
    pub no_announce_submounts: bool,

    /// Keep flock(2) and fcntl(2) locks inside the DPU
    ///
    /// By default locks are taken on the host's files, so that programs on both sides see each
    /// other's locks.
    #[arg(long, overrides_with = "host_locks", help_heading = EXPORT)]
    pub no_host_locks: bool,

    /// Undoes `--no-host-locks`; what `-o` is rewritten to.
    #[arg(long, overrides_with = "no_host_locks", hide = true)]
    pub host_locks: bool,

    /// Path of the vhost-user socket to make
    ///
    /// May be relative, and longer than the 107 bytes a socket address holds.
    #[arg(long, value_name = "PATH", conflicts_with = "fd", help_heading = ENDPOINT)]
    pub socket_path: Option<PathBuf>,

    /// Inherited socket, listening or connected, by descriptor number
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(0..), help_heading = ENDPOINT)]
    pub fd: Option<RawFd>,

    /// Group of the socket, by name or number; its members may connect
    #[arg(long, value_name = "GROUP", conflicts_with = "fd", help_heading = ENDPOINT)]
    pub socket_group: Option<String>,

    /// Owner of the socket, by name or number
    #[arg(long, value_name = "USER", conflicts_with = "fd", help_heading = ENDPOINT)]
    pub socket_owner: Option<String>,

    /// Permission bits of the socket [default: 0700, or 0770 with --socket-group]
    #[arg(
        long, value_name = "MODE", value_parser = values::mode, conflicts_with = "fd", help_heading = ENDPOINT
    )]
    pub socket_mode: Option<u32>,

    /// When the front end disconnects, wait for the next one instead of ending
    #[arg(long, help_heading = ENDPOINT)]
    pub keep_listening: bool,

    /// What the DPU may cache
    #[arg(long, value_name = "POLICY", value_enum, default_value_t, ignore_case = true, help_heading = CACHING)]
    pub cache: CachePolicy,

    /// Let the DPU collect small writes and write them back later
    ///
    /// Faster. Only when nothing on the host changes the same files.
    #[arg(long, overrides_with = "no_writeback", help_heading = CACHING)]
    pub writeback: bool,

    /// Undoes `--writeback`; what `-o` is rewritten to.
    #[arg(long, overrides_with = "writeback", hide = true)]
    pub no_writeback: bool,

    /// Allow shared mmap although the cache policy keeps no data
    ///
    /// With --cache=metadata or --cache=never. Only when nothing on the host changes the same files.
    #[arg(long, help_heading = CACHING)]
    pub allow_mmap: bool,

    /// Use O_DIRECT on the host when a program on the DPU does
    #[arg(long, overrides_with = "no_allow_direct_io", help_heading = CACHING)]
    pub allow_direct_io: bool,

    /// Undoes `--allow-direct-io`; what `-o` is rewritten to.
    #[arg(long, overrides_with = "allow_direct_io", hide = true)]
    pub no_allow_direct_io: bool,

    /// Do not send attributes along with directory entries
    #[arg(long, overrides_with = "readdirplus", help_heading = CACHING)]
    pub no_readdirplus: bool,

    /// Undoes `--no-readdirplus`; what `-o` is rewritten to.
    #[arg(long, overrides_with = "no_readdirplus", hide = true)]
    pub readdirplus: bool,

    /// Keep O_NOATIME when a program on the DPU asks for it
    ///
    /// By default it is dropped: only the owner of a file may use it, so that opening would fail for
    /// an unprivileged daemon.
    #[arg(long, help_heading = CACHING)]
    pub preserve_noatime: bool,

    /// Have the host drop set-id bits and file capabilities on writes, instead of the DPU
    #[arg(long, overrides_with = "no_killpriv_v2", help_heading = CACHING)]
    pub killpriv_v2: bool,

    /// Have the DPU drop set-id bits and file capabilities on writes [default]
    #[arg(long, overrides_with = "killpriv_v2", help_heading = CACHING)]
    pub no_killpriv_v2: bool,

    /// Serve extended attributes
    #[arg(long, overrides_with = "no_xattr", help_heading = ATTRIBUTES)]
    pub xattr: bool,

    /// Undoes `--xattr`; what `-o` is rewritten to.
    #[arg(long, overrides_with = "xattr", hide = true)]
    pub no_xattr: bool,

    /// Rules that rename or refuse extended attributes (turns on --xattr)
    ///
    /// A rule is ':type:scope:key:prepend:'; its first character separates the fields, and white
    /// space may stand between rules. The first rule that matches decides. Types: 'prefix' puts
    /// PREPEND in front of names from the DPU that start with KEY and takes it off again in listings;
    /// 'ok' leaves a name as it is; 'bad' refuses it with EPERM, 'unsupported' with EOPNOTSUPP, and both
    /// hide it in listings. Scopes: 'client' for names from the DPU, 'server' for listings, 'all'.
    /// ':map:key:prepend:' stands for the usual set of rules and comes last.
    #[arg(long, value_name = "RULES", help_heading = ATTRIBUTES)]
    pub xattrmap: Option<XattrMap>,

    /// POSIX ACLs (turns on --xattr); without a value: always
    #[arg(
        long, value_name = "never|auto|always", value_enum, default_value_t, default_missing_value = "always",
        num_args = 0..=1, require_equals = true, hide_possible_values = true, help_heading = ATTRIBUTES
    )]
    pub posix_acl: Offer,

    /// Security labels for new files (turns on --xattr); without a value: always
    ///
    /// The DPU sends the label with the request that makes the file, so that no file is ever without.
    #[arg(
        long, value_name = "never|auto|always", value_enum, default_value_t, default_missing_value = "always",
        num_args = 0..=1, require_equals = true, hide_possible_values = true, help_heading = ATTRIBUTES
    )]
    pub security_label: Offer,

    /// Translate user ids between DPU and host; repeat for more ranges
    ///
    /// 'map:DPU:HOST:COUNT' translates COUNT ids from DPU on to those from HOST on, and back.
    /// 'guest:DPU:HOST:COUNT' and 'host:HOST:DPU:COUNT' translate in one direction only.
    /// 'squash-guest:DPU:HOST:COUNT' and 'squash-host:HOST:DPU:COUNT' make one id of a whole range.
    /// 'forbid-guest:DPU:COUNT' refuses requests that use such an id. Other ids stay as they are.
    /// No user namespace is involved. Cannot be used with --posix-acl.
    #[arg(long, value_name = "RULE", help_heading = IDS)]
    pub translate_uid: Vec<idmap::Rule>,

    /// Translate group ids between DPU and host, as --translate-uid
    #[arg(long, value_name = "RULE", help_heading = IDS)]
    pub translate_gid: Vec<idmap::Rule>,

    /// Map user ids into the sandbox's user namespace: ':inside:host:count:'; repeat for more ranges
    ///
    /// For an unprivileged daemon with --sandbox=namespace. The host ids must be its own in
    /// subuid(5); newuidmap(1) does the mapping. Without it only the daemon's own id exists.
    #[arg(long, value_name = "MAP", help_heading = IDS)]
    pub uid_map: Vec<NamespaceMap>,

    /// Map group ids into the sandbox's user namespace, as --uid-map
    #[arg(long, value_name = "MAP", help_heading = IDS)]
    pub gid_map: Vec<NamespaceMap>,

    /// How the daemon is cut off from the rest of the host
    #[arg(
        long, value_name = "MODE", value_enum, default_value_t, ignore_case = true, help_heading = ISOLATION
    )]
    pub sandbox: SandboxMode,

    /// What a system call that the daemon never makes leads to
    #[arg(long, value_name = "ACTION", value_enum, default_value_t, help_heading = ISOLATION)]
    pub seccomp: SeccompMode,

    /// Keep (+) or drop (-) capabilities, as in --modcaps=+sys_admin:-mknod
    ///
    /// Kept by default: chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap; and
    /// dac_read_search unless --inode-file-handles=never.
    #[arg(long, value_name = "LIST", allow_hyphen_values = true, help_heading = ISOLATION)]
    pub modcaps: Option<CapChanges>,

    /// Remember inodes by file handle instead of an open descriptor each
    ///
    /// Handles need no descriptors however many files the DPU knows, and leave nothing open behind
    /// its back (no "silly renames" on NFS). They need CAP_DAC_READ_SEARCH.
    #[arg(long, value_name = "WHEN", value_enum, default_value_t, help_heading = RESOURCES)]
    pub inode_file_handles: FileHandles,

    /// Request queues offered to the front end, 1 to 16
    ///
    /// An offer: the front end decides how many it sets up (QEMU: num-request-queues=N), and each of
    /// those gets a worker thread. DPU kernels from 6.11 on use more than one.
    #[arg(
        long, value_name = "N", default_value_t = MAX_REQUEST_QUEUES,
        value_parser = clap::value_parser!(u16).range(1..=16), help_heading = RESOURCES
    )]
    pub num_request_queues: u16,

    /// Largest ring the front end may set up; a power of two
    #[arg(
        long, value_name = "N", default_value_t = 32768,
        value_parser = clap::value_parser!(u16).range(2..=32768), help_heading = RESOURCES
    )]
    pub queue_size: u16,

    /// Microseconds a worker polls for more requests before it sleeps; 0 to 10000, 0: never
    ///
    /// The window adapts: a ring that stays idle is not polled.
    #[arg(
        long, value_name = "US", default_value_t = 50,
        value_parser = clap::value_parser!(u32).range(0..=10_000), help_heading = RESOURCES
    )]
    pub poll_us: u32,

    /// Threads for requests that wait for the host's disks; 0: four
    ///
    /// They are started when a request would hold up its queue, and end when there is no more work for
    /// them. Locks that are waited for have threads of their own.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = RESOURCES)]
    pub thread_pool_size: usize,

    /// Limit of open files; 0 leaves it unchanged [default: min(1000000, fs.nr_open)]
    #[arg(long, value_name = "N", help_heading = RESOURCES)]
    pub rlimit_nofile: Option<u64>,

    /// Descriptors the DPU may hold open at a time [default: what the limit of open files leaves]
    ///
    /// Beyond it, opening fails on the DPU with ENFILE.
    #[arg(long, value_name = "N", value_parser = values::budget, help_heading = RESOURCES)]
    pub fd_budget: Option<usize>,

    /// Inodes the DPU may hold references to at a time
    ///
    /// Bounds the daemon's memory. Beyond it, a look-up fails on the DPU with ENOMEM.
    #[arg(
        long, value_name = "N", default_value_t = 16 << 20, value_parser = values::budget,
        help_heading = RESOURCES
    )]
    pub max_inodes: usize,

    /// Least severe level that is logged; RUST_LOG wins
    #[arg(
        long, value_name = "LEVEL", value_enum, default_value_t, ignore_case = true, help_heading = LOGGING
    )]
    pub log_level: LogLevel,

    /// Log to syslog instead of stderr
    #[arg(long, help_heading = LOGGING)]
    pub syslog: bool,

    /// Print what management software may ask of this program, as JSON, and exit
    ///
    /// All other options are ignored. The format is that of QEMU's vhost-user.json.
    #[arg(long, help_heading = LOGGING)]
    pub print_capabilities: bool,

    /// Print the man page or shell completions, and exit
    #[arg(long, value_name = "WHAT", value_enum, help_heading = LOGGING)]
    pub generate: Option<Generate>,

    /// Print help (a summary with -h), and exit
    #[arg(short = 'h', long, action = clap::ArgAction::Help, help_heading = LOGGING)]
    help: Option<bool>,

    /// Print the version, and exit
    #[arg(short = 'V', long, action = clap::ArgAction::Version, help_heading = LOGGING)]
    version: Option<bool>,

    /// How inodes would be handed over
    #[arg(long, value_name = "MODE", value_enum, help_heading = MIGRATION)]
    pub migration_mode: Option<MigrationMode>,

    /// What would be done about inodes that cannot be handed over
    #[arg(long, value_name = "ACTION", value_enum, help_heading = MIGRATION)]
    pub migration_on_error: Option<MigrationOnError>,

    /// Compare file handles on both sides
    #[arg(long, help_heading = MIGRATION)]
    pub migration_verify_handles: bool,

    /// Check paths again at the switch-over
    #[arg(long, help_heading = MIGRATION)]
    pub migration_confirm_paths: bool,

    /// Same as --socket-path
    #[arg(long, value_name = "PATH", conflicts_with = "fd", help_heading = LEGACY)]
    pub socket: Option<PathBuf>,

    /// Options in the format of the first virtiofsd, as in -o source=DIR,cache=auto,xattr
    ///
    /// Keys: source, cache (auto, always, metadata, none), loglevel (debug, info, warn, err), sandbox,
    /// modcaps, xattrmap; [no_]xattr, [no_]readdirplus, [no_]writeback, [no_]allow_direct_io,
    /// [no_]killpriv_v2, [no_]posix_acl, [no_]security_label, [no_]posix_lock, [no_]flock,
    /// announce_submounts. They count after all other options.
    #[arg(short = 'o', value_name = "KEY[=VALUE],...", help_heading = LEGACY)]
    pub legacy_options: Vec<String>,

    /// Same as --log-level=debug
    #[arg(short = 'd', help_heading = LEGACY)]
    pub legacy_debug: bool,

    /// No effect: the daemon always stays in the foreground
    #[arg(short = 'f', help_heading = LEGACY)]
    pub legacy_foreground: bool,
}
