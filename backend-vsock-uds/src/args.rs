//! The command line: names, values, defaults and help. What the values mean together is decided in
//! [`crate::config`].
//!
//! Names and value syntax are those of vhost-device-vsock (0.3), so that whatever starts it can start
//! this; so are the keys of `--vm` and of the file of `--config`. Options of our own are marked by not
//! existing there.
#![forbid(unsafe_code)]

pub mod invocation;
pub mod vm;

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, ValueEnum};

use crate::logging::LogLevel;
use crate::sandbox::seccomp::SeccompMode;
use vm::VmParams;

const DPU: &str = "One DPU";
const DPUS: &str = "Several DPUs in one process (instead of the options above)";
const LIMITS: &str = "Limits and speed, for each DPU";
const SOCKETS: &str = "Owners and modes of sockets";
const INFORMATION: &str = "Isolation, logging and information";

const ABOUT: &str =
    "Connect sockets of a DPU with Unix sockets of this host: a virtio-vsock device (vhost-user)";

const LONG_ABOUT: &str = "\
Connect sockets of a DPU with Unix sockets of this host: a virtio-vsock device (vhost-user).

Programs on the DPU (or in a virtual machine, which is an emulated DPU) use AF_VSOCK of their stock kernel. \
A connection to port N of the host (context id 2) leads to the Unix socket that --port or --uds-path \
names for N; programs of this host reach ports of the DPU through --listen or --uds-path. The command line \
is vhost-device-vsock's, so this program can take its place.";

const AFTER_HELP: &str = "\
Example: backend-vsock-uds --guest-cid 3 --socket-path /run/dpu0.vhost --uds-path /run/dpu0.vsock
'--help' explains every option and shows complete examples.";

const AFTER_LONG_HELP: &str = "\
Examples:
  An emulated DPU with context id 3:

    backend-vsock-uds --guest-cid 3 --socket-path /run/dpu0.vhost --uds-path /run/dpu0.vsock &
    qemu-system-x86_64 -m 4G \\
      -object memory-backend-memfd,id=mem,size=4G,share=on -numa node,memdev=mem \\
      -chardev socket,id=vsock,path=/run/dpu0.vhost -device vhost-user-vsock-pci,chardev=vsock ...

  DPU to host: what listens at <uds-path>_<port> is reached through that port.

    socat UNIX-LISTEN:/run/dpu0.vsock_1234 -          # here
    socat - VSOCK-CONNECT:2:1234                      # on the DPU

  Host to DPU: connect to <uds-path>, say CONNECT and the port, read OK.

    socat VSOCK-LISTEN:22,fork TCP:localhost:22       # on the DPU
    ssh -o ProxyCommand='socat - UNIX-CONNECT:/run/dpu0.ssh' dpu0     # with --listen 22=/run/dpu0.ssh
    ssh vsock-mux/run/dpu0.vsock                      # with systemd 257 or newer

  Only what is named, nothing else:

    backend-vsock-uds --guest-cid 3 --socket-path /run/dpu0.vhost --socket-group kvm \\
      --port 514=/dev/log --port 6000=/run/containerd/containerd.sock --listen 22=/run/dpu0.ssh

  Two DPUs in one process that may talk to nobody but this host:

    backend-vsock-uds \\
      --vm guest-cid=3,socket=/run/dpu0.vhost,uds-path=/run/dpu0.vsock,groups=a \\
      --vm guest-cid=4,socket=/run/dpu1.vhost,uds-path=/run/dpu1.vsock,groups=b

  The same from a file (--config FILE):

    vms:
      - guest_cid: 3
        socket: /run/dpu0.vhost
        uds_path: /run/dpu0.vsock
        groups: a
      - guest_cid: 4
        socket: /run/dpu1.vhost
        ports: { 514: /dev/log }
        listen: { 22: /run/dpu1.ssh }
        groups: b

Environment:
  RUST_LOG   Log filter; wins over --log-level. Example: warn,backend_vsock_uds::mux=debug

Exit status:
  0  SIGTERM, or the front end of a connected --fd is gone.
  1  The daemon could not start, or failed.
  2  The command line or the configuration file is wrong.";

/// A parsed command line.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "backend-vsock-uds",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = AFTER_HELP,
    after_long_help = AFTER_LONG_HELP,
    override_usage = "backend-vsock-uds --guest-cid <CID> --socket-path <PATH> --uds-path <PATH> [OPTIONS]\n       \
                      backend-vsock-uds --vm <KEY=VALUE,...> [--vm ...] [OPTIONS]\n       \
                      backend-vsock-uds --config <FILE> [OPTIONS]",
    max_term_width = 100
)]
pub struct Args {
    /// Context id of the DPU, 3 to 4294967294 [default: 3]
    #[arg(long, value_name = "CID", conflicts_with_all = ["vm", "config"], help_heading = DPU)]
    pub guest_cid: Option<u64>,

    /// Path of the vhost-user socket to make
    #[arg(long, visible_alias = "socket", value_name = "PATH", conflicts_with_all = ["fd", "vm", "config"],
          help_heading = DPU)]
    pub socket_path: Option<PathBuf>,

    /// Inherited vhost-user socket, listening or connected
    ///
    /// With a connected one the daemon ends when the front end does.
    #[arg(long, value_name = "N", conflicts_with_all = ["vm", "config"], help_heading = DPU)]
    pub fd: Option<RawFd>,

    /// Unix socket for host programs, and the stem of those that the DPU reaches
    ///
    /// Host programs connect to PATH, send `CONNECT <port>` and a newline, and read `OK <number>`; from
    /// then on the socket is a connection to that port of the DPU. A connection of the DPU to a port
    /// that no --port names leads to the socket PATH_<port>, whatever the port. This is the protocol of
    /// Firecracker, Cloud Hypervisor and vhost-device-vsock.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["vm", "config"], help_heading = DPU)]
    pub uds_path: Option<PathBuf>,

    /// Lead connections of the DPU to PORT of the host to the Unix socket PATH (repeatable)
    ///
    /// The socket may be a stream, sequenced-packet or datagram socket. Ports that neither --port nor
    /// --uds-path covers are refused.
    #[arg(long, value_name = "PORT=PATH", conflicts_with_all = ["vm", "config"], help_heading = DPU)]
    pub port: Vec<OsString>,

    /// Make a Unix socket PATH that leads to PORT of the DPU, without a greeting (repeatable)
    ///
    /// PORT=seqpacket:PATH makes a socket that keeps records, for a SOCK_SEQPACKET listener on the DPU.
    #[arg(long, value_name = "PORT=PATH", conflicts_with_all = ["vm", "config"], help_heading = DPU)]
    pub listen: Vec<OsString>,

    /// Bytes that the DPU may send ahead of a host program, per connection
    ///
    /// Without it a connection gets 256 KiB, and 1 MiB once it moves bulk data. With it the size is fixed.
    #[arg(long, value_name = "BYTES", conflicts_with_all = ["vm", "config"], help_heading = DPU)]
    pub tx_buffer_size: Option<u32>,

    /// Largest size of a queue, a power of two [default: 1024]
    #[arg(long, value_name = "ENTRIES", conflicts_with_all = ["vm", "config"], help_heading = DPU)]
    pub queue_size: Option<u32>,

    /// Groups of the DPU, joined by + [default: default]
    ///
    /// DPUs of this process that share a group may connect to each other.
    #[arg(long, value_name = "A+B", conflicts_with_all = ["vm", "config"], help_heading = DPU)]
    pub groups: Option<String>,

    /// Not supported; see --port and --uds-path
    #[arg(long, value_name = "CID", hide = true)]
    pub forward_cid: Option<String>,

    /// Not supported; see --listen
    #[arg(long, value_name = "PORTS", hide = true)]
    pub forward_listen: Option<String>,

    /// A DPU as a list of keys (repeatable)
    ///
    /// Keys: guest-cid, socket, uds-path, port (PORT=PATH, repeatable), listen (PORT=PATH, repeatable),
    /// tx-buffer-size, queue-size, groups. They mean what the options of the same names mean; socket
    /// is --socket-path. An underscore may stand for a hyphen.
    #[arg(long, value_name = "KEY=VALUE,...", conflicts_with = "config", value_parser = vm::parse,
          help_heading = DPUS)]
    pub vm: Vec<VmParams>,

    /// A YAML file with a list `vms` of DPUs
    ///
    /// The keys are those of --vm with underscores, `ports` and `listen` as maps from port to path.
    #[arg(long, value_name = "FILE", help_heading = DPUS)]
    pub config: Option<PathBuf>,

    /// Connections that a DPU may have at a time
    #[arg(long, value_name = "N", default_value_t = 4096, help_heading = LIMITS)]
    pub max_connections: usize,

    /// Longest time to spin for the next packet before sleeping, microseconds; 0 never spins
    #[arg(long, value_name = "US", default_value_t = 50, value_parser = clap::value_parser!(u64).range(..=10_000),
          help_heading = LIMITS)]
    pub poll_us: u64,

    /// Owner of vhost-user sockets: name or number
    #[arg(long, value_name = "USER", help_heading = SOCKETS)]
    pub socket_owner: Option<String>,

    /// Group of vhost-user sockets: name or number
    #[arg(long, value_name = "GROUP", help_heading = SOCKETS)]
    pub socket_group: Option<String>,

    /// Mode of vhost-user sockets, octal [default: 700, with --socket-group 770]
    #[arg(long, value_name = "MODE", value_parser = mode, help_heading = SOCKETS)]
    pub socket_mode: Option<u32>,

    /// Owner of the sockets for host programs (--uds-path, --listen): name or number
    #[arg(long, value_name = "USER", help_heading = SOCKETS)]
    pub uds_owner: Option<String>,

    /// Group of the sockets for host programs: name or number
    #[arg(long, value_name = "GROUP", help_heading = SOCKETS)]
    pub uds_group: Option<String>,

    /// Mode of the sockets for host programs, octal [default: 700, with --uds-group 770]
    #[arg(long, value_name = "MODE", value_parser = mode, help_heading = SOCKETS)]
    pub uds_mode: Option<u32>,

    /// What a system call outside the allow list does
    #[arg(long, value_name = "ACTION", default_value = "kill", value_parser = seccomp_mode(),
          help_heading = INFORMATION)]
    pub seccomp: SeccompMode,

    /// Least severe level that is logged
    #[arg(long, value_name = "LEVEL", default_value = "info", help_heading = INFORMATION)]
    pub log_level: LogLevel,

    /// Print what this program can do, as JSON, and end
    #[arg(long, help_heading = INFORMATION)]
    pub print_capabilities: bool,
}

fn seccomp_mode() -> impl TypedValueParser<Value = SeccompMode> {
    PossibleValuesParser::new(SeccompMode::ALL.map(SeccompMode::name))
        .map(|name| SeccompMode::ALL.into_iter().find(|mode| mode.name() == name).unwrap_or_default())
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("not an octal mode from 0 to 777".into()),
    }
}

impl ValueEnum for LogLevel {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn modes_are_octal() {
        assert_eq!(mode("660"), Ok(0o660));
        assert!(mode("888").is_err() && mode("1777").is_err() && mode("").is_err());
    }
}
