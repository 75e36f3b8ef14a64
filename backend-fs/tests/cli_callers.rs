//! The exact command lines with which the known callers start a virtio-fs daemon, and what each of
//! them must come to. One test per caller; `DIR`, `N` and sockets stand for what the caller chooses.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, in its helpers too")]

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use backend_fs::args::invocation::parse;
use backend_fs::config::{
    Config, DeviceOptions, Endpoint, ListenOptions, SharedDir, SocketOptions, SocketPath,
};
use backend_fs::host::idmap::IdMap;
use backend_fs::host::options::{CachePolicy, FileHandles, HostOptions, Offer};
use backend_fs::logging::{LogLevel, LogOptions};
use backend_fs::sandbox::options::{CapChanges, NamespaceMap, SandboxMode, SandboxOptions};

/// A host for callers: a directory to export, one for sockets, and an inherited listening socket.
struct Host {
    directory: tempfile::TempDir,
    listener: UnixListener,
}

impl Host {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("export")).unwrap();
        let listener = UnixListener::bind(directory.path().join("inherited")).unwrap();
        Self { directory, listener }
    }

    fn export(&self) -> PathBuf {
        self.directory.path().join("export")
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("fs.sock")
    }

    /// The configuration of a command line in which `DIR`, `SOCKET` and `N` are this host's.
    fn config(&self, line: &str, root: bool) -> Config {
        let fill = |word: &str| {
            let word = word.replace("DIR", self.export().to_str().unwrap());
            let word = word.replace("SOCKET", self.socket().to_str().unwrap());
            OsString::from(word.replace("=N", &format!("={}", self.listener.as_raw_fd())))
        };
        let mut argv: Vec<OsString> = vec!["/usr/libexec/virtiofsd".into()];
        let number = OsString::from(self.listener.as_raw_fd().to_string());
        argv.extend(
            line.split_whitespace().map(|word| if word == "N" { number.clone() } else { fill(word) }),
        );
        let args = parse(argv).unwrap_or_else(|stop| panic!("{line}: {stop:?}"));
        Config::for_user(args, root).unwrap_or_else(|error| panic!("{line}: {error}"))
    }

    /// What no option at all comes to, but for the endpoint.
    fn defaults(&self, endpoint: Endpoint) -> Config {
        Config {
            shared_dir: SharedDir::new(self.export()).unwrap(),
            listen: ListenOptions { endpoint, keep_listening: false },
            device: DeviceOptions {
                tag: None,
                request_queues: 16,
                queue_size: 32768,
                poll_window: Duration::from_micros(50),
                pool_size: 0,
            },
            host: HostOptions { fd_budget: usize::MAX, ..HostOptions::default() },
            sandbox: SandboxOptions::default(),
            log: LogOptions { level: LogLevel::Info, syslog: false },
            warnings: Vec::new(),
        }
    }

    fn inherited(&self) -> Config {
        self.defaults(Endpoint::Fd(self.listener.as_raw_fd()))
    }

    fn at(&self, path: &Path) -> Config {
        self.defaults(Endpoint::Path(SocketOptions {
            path: SocketPath::new(path.to_owned()).unwrap(),
            owner: None,
            group: None,
            mode: 0o700,
        }))
    }
}

const MIGRATION: &str = "--migration-*: live migration is not offered; the options have no effect";
const LEGACY: &str = "-o is deprecated; use separate options, as in --cache=auto";

fn id_map(rules: &[&str]) -> IdMap {
    let rules: Vec<_> = rules.iter().map(|rule| rule.parse().unwrap()).collect();
    IdMap::new(&rules).unwrap()
}

#[test]
fn libvirt_with_separate_options() {
    let host = Host::new();
    let mut expected = host.inherited();
    expected.host.cache = CachePolicy::Always;
    expected.host.xattr = true;
    expected.sandbox.mode = SandboxMode::Chroot;
    expected.sandbox.rlimit_nofile = Some(65536);
    expected.device.pool_size = 16;
    expected.log.level = LogLevel::Debug;
    let line = "--fd=N --shared-dir DIR --cache always --sandbox chroot --xattr --thread-pool-size=16 \
                --rlimit-nofile 65536 --log-level debug";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn libvirt_without_privileges() {
    let host = Host::new();
    let mut expected = host.inherited();
    expected.host.cache = CachePolicy::Never;
    expected.host.readdirplus = false;
    expected.sandbox.uid_map = vec![
        NamespaceMap { inside: 0, outside: 1000, count: 1 },
        NamespaceMap { inside: 1, outside: 100_000, count: 65536 },
    ];
    expected.sandbox.gid_map = vec![NamespaceMap { inside: 0, outside: 1000, count: 1 }];
    let line = "--fd=N --shared-dir DIR --cache never --uid-map=:0:1000:1: --uid-map=:1:100000:65536: \
                --gid-map=:0:1000:1:";
    assert_eq!(host.config(line, false), expected);
}

#[test]
fn libvirt_before_separate_options() {
    let host = Host::new();
    let mut expected = host.inherited();
    expected.host.cache = CachePolicy::Always;
    expected.host.host_locks = false;
    expected.log.level = LogLevel::Debug;
    expected.warnings = vec!["-d is deprecated; use --log-level=debug".into(), LEGACY.into()];
    let line = "--fd=N -o source=DIR,cache=always,sandbox=namespace,no_xattr,no_flock,no_posix_lock -d";
    assert_eq!(host.config(line, true), expected);

    expected.host.host_locks = true;
    expected.host.xattr = true;
    expected.log.level = LogLevel::Info;
    expected.warnings = vec![LEGACY.into()];
    let line = "--fd=N -o source=DIR,cache=always,sandbox=namespace,xattr,flock,posix_lock";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn kata_go() {
    let host = Host::new();
    let mut expected = host.inherited();
    expected.log.syslog = true;
    expected.device.pool_size = 1;
    let line = "--syslog --cache=auto --shared-dir=DIR --fd=N --thread-pool-size=1 --announce-submounts";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn kata_runtime_rs() {
    let host = Host::new();
    let mut expected = host.at(&host.socket());
    expected.device.pool_size = 1;
    expected.host.xattr = true;
    expected.warnings = vec![LEGACY.into()];
    let line = "--socket-path SOCKET --shared-dir DIR --cache auto --thread-pool-size=1 \
                -o announce_submounts --xattr";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn kata_runtime_rs_rootless_with_a_relative_socket() {
    let host = Host::new();
    let expected = host.at(Path::new("kata-virtiofsd.sock"));
    let line = "--socket-path kata-virtiofsd.sock --shared-dir DIR --cache auto";
    assert_eq!(host.config(line, false), expected);
}

#[test]
fn cloud_hypervisor() {
    let host = Host::new();
    let mut expected = host.at(&host.socket());
    expected.host.cache = CachePolicy::Never;
    expected.host.readdirplus = false;
    expected.device.tag = Some("myfs".parse().unwrap());
    expected.device.pool_size = 4;
    expected.log.level = LogLevel::Debug;
    let line = "--socket-path SOCKET --shared-dir DIR --cache never --tag myfs --thread-pool-size 4 \
                --log-level debug";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn proxmox() {
    let host = Host::new();
    let mut expected = host.inherited();
    expected.host.xattr = true;
    expected.host.posix_acl = Offer::Always;
    expected.host.allow_direct_io = true;
    expected.host.cache = CachePolicy::Metadata;
    expected.log.syslog = true;
    let line = "--fd=N --shared-dir=DIR --xattr --posix-acl --announce-submounts --allow-direct-io \
                --cache=metadata --syslog";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn incus_with_id_maps() {
    let host = Host::new();
    let mut expected = host.inherited();
    expected.host.cache = CachePolicy::Never;
    expected.host.readdirplus = false;
    let rules = ["map:0:1000000:1000000000", "forbid-guest:1000000000:3294967295"];
    expected.host.uid_map = id_map(&rules);
    expected.host.gid_map = id_map(&rules);
    let line = "--fd=N --cache=never --shared-dir=DIR \
                --translate-uid=map:0:1000000:1000000000 --translate-uid=forbid-guest:1000000000:3294967295 \
                --translate-gid=map:0:1000000:1000000000 --translate-gid=forbid-guest:1000000000:3294967295";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn incus_with_acls() {
    let host = Host::new();
    let mut expected = host.inherited();
    expected.host.cache = CachePolicy::Metadata;
    expected.host.posix_acl = Offer::Auto;
    expected.host.xattr = true;
    assert_eq!(host.config("--fd=N --cache=metadata --shared-dir=DIR --posix-acl=auto", true), expected);
    expected.host.posix_acl = Offer::Always;
    assert_eq!(host.config("--fd=N --cache=metadata --shared-dir=DIR --posix-acl", true), expected);
}

#[test]
fn systemd_vmspawn() {
    let host = Host::new();
    let mut expected = host.inherited();
    expected.host.xattr = true;
    expected.host.announce_submounts = false;
    expected.host.uid_map = id_map(&["map:0:524288:65536"]);
    expected.host.gid_map = id_map(&["map:0:524288:65536"]);
    expected.log.level = LogLevel::Error;
    expected.sandbox.modcaps =
        CapChanges { add: Default::default(), drop: [caps::Capability::CAP_MKNOD].into() };
    let line = "--shared-dir DIR --xattr --fd N --no-announce-submounts --log-level=error --modcaps=-mknod \
                --translate-uid map:0:524288:65536 --translate-gid map:0:524288:65536";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn kubevirt_placeholder() {
    let host = Host::new();
    let mut expected = host.at(&host.socket());
    expected.sandbox.mode = SandboxMode::None;
    expected.warnings = vec![MIGRATION.into()];
    let line = "--socket-path=SOCKET --shared-dir=DIR --sandbox=none --cache=auto \
                --migration-on-error=guest-error --migration-mode=find-paths";
    assert_eq!(host.config(line, false), expected);
}

#[test]
fn kubevirt_dispatcher() {
    let host = Host::new();
    let mut expected = host.at(&host.socket());
    expected.sandbox.mode = SandboxMode::Chroot;
    expected.sandbox.modcaps = CapChanges {
        add: [caps::Capability::CAP_DAC_READ_SEARCH].into(),
        drop: [caps::Capability::CAP_MKNOD].into(),
    };
    expected.host.file_handles = FileHandles::Prefer;
    expected.host.uid_map = id_map(&["squash-guest:0:107:4294967295"]);
    expected.host.gid_map = id_map(&["squash-guest:0:107:4294967295"]);
    expected.host.xattr = true;
    expected.warnings = vec![MIGRATION.into()];
    let line = "--socket-path SOCKET --shared-dir DIR --sandbox chroot --cache auto \
                --modcaps=+dac_read_search:-mknod --inode-file-handles=prefer \
                --migration-on-error=guest-error --migration-mode=file-handles \
                --translate-uid=squash-guest:0:107:4294967295 --translate-gid=squash-guest:0:107:4294967295 \
                --xattr";
    assert_eq!(host.config(line, true), expected);
}

#[test]
fn microvm_nix() {
    let host = Host::new();
    let mut expected = host.at(&host.socket());
    let Endpoint::Path(socket) = &mut expected.listen.endpoint else { unreachable!("made above") };
    socket.group = Some(0);
    socket.mode = 0o770;
    expected.sandbox.rlimit_nofile = Some(65536);
    expected.device.pool_size = 8;
    expected.device.tag = Some("ro-store".parse().unwrap());
    expected.host.posix_acl = Offer::Always;
    expected.host.xattr = true;
    expected.host.file_handles = FileHandles::Mandatory;
    expected.host.readonly = true;
    let line = "--socket-path=SOCKET --socket-group=root --shared-dir=DIR --rlimit-nofile 65536 \
                --thread-pool-size 8 --posix-acl --xattr --cache=auto --inode-file-handles=mandatory \
                --tag=ro-store --readonly";
    assert_eq!(host.config(line, true), expected);
}
