//! From a parsed command line to what the daemon runs with.
//!
//! Everything that can be wrong is found here, by looking only: nothing is created, changed or
//! opened for good before a [`Config`] exists. Types carry what was checked, so that the rest of the
//! daemon need not ask again.
#![forbid(unsafe_code)]

mod error;
mod file;
mod sockets;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashSet};
use std::ffi::OsStr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::Error;
pub use sockets::{Access, SocketPath};

use crate::args::Args;
use crate::args::vm::VmParams;
use crate::device::{FIRST_CID, LAST_CID};
use crate::logging::LogLevel;
use crate::mux::Quotas;
use crate::packet::Kind;
use crate::route::{self, Routes};
use crate::sandbox::seccomp::SeccompMode;

/// Context id without `--guest-cid`, as in vhost-device-vsock.
const DEFAULT_CID: u64 = FIRST_CID;
const DEFAULT_QUEUE_SIZE: u32 = 1024;
const DEFAULT_GROUP: &str = "default";
/// Smallest window: one page, so that a DPU is not told of room byte by byte.
const SMALLEST_WINDOW: u32 = 4096;
/// Largest window; the budget of all windows allows eight of them.
const LARGEST_WINDOW: u32 = 64 << 20;
/// Prefix of a path of `--listen` that makes a socket for records.
const SEQPACKET: &[u8] = b"seqpacket:";

/// Everything the daemon runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The DPUs; at least one, context ids and sockets all different.
    pub dpus: Vec<DpuConfig>,
    /// Owner, group and mode of vhost-user sockets.
    pub socket_access: Access,
    /// Owner, group and mode of the sockets for host programs.
    pub uds_access: Access,
    /// Longest time to spin.
    pub poll_window: Duration,
    /// Filter of system calls.
    pub seccomp: SeccompMode,
    /// Logging.
    pub log_level: LogLevel,
}

/// One DPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DpuConfig {
    /// Context id.
    pub cid: u64,
    /// What its front end connects to.
    pub endpoint: Endpoint,
    /// Where its connections lead.
    pub routes: Routes,
    /// Where host programs connect.
    pub listeners: Vec<ListenerConfig>,
    /// Largest size of a queue.
    pub queue_size: u16,
    /// What it may take.
    pub quotas: Quotas,
    /// DPUs that share one may connect to each other.
    pub groups: BTreeSet<String>,
}

/// What a front end connects to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A socket to be made by the daemon.
    Path(SocketPath),
    /// An inherited socket, listening or connected.
    Fd(RawFd),
}

/// A socket for host programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerConfig {
    /// Where.
    pub path: SocketPath,
    /// Port that it leads to; `None`: the one that the program asks for.
    pub port: Option<u32>,
    /// Type of the socket, and of the connection to the DPU.
    pub kind: Kind,
}

impl TryFrom<Args> for Config {
    type Error = Error;

    fn try_from(args: Args) -> Result<Self, Error> {
        if args.forward_cid.is_some() || args.forward_listen.is_some() {
            return Err(Error::Forwarding);
        }
        let mut quotas = Quotas { connections: args.max_connections, ..Quotas::default() };
        if quotas.connections == 0 || quotas.connections > 1 << 20 {
            return Err(Error::MaxConnections(quotas.connections));
        }
        quotas.greetings = quotas.greetings.min(quotas.connections);
        let dpus = if let Some(path) = &args.config {
            let vms = file::read(path)?;
            vms.iter().map(|vm| dpu(vm, None, quotas)).collect::<Result<Vec<_>, _>>()?
        } else if args.vm.is_empty() {
            vec![dpu(&single(&args)?, args.fd, quotas)?]
        } else {
            args.vm.iter().map(|vm| dpu(vm, None, quotas)).collect::<Result<Vec<_>, _>>()?
        };
        check_distinct(&dpus)?;
        // The command line by itself first, so that its mistakes (exit 2) come before this host's (exit 1).
        let socket_access = Access::new(
            "socket",
            args.socket_owner.as_deref(),
            args.socket_group.as_deref(),
            args.socket_mode,
        )?;
        let uds_access =
            Access::new("uds", args.uds_owner.as_deref(), args.uds_group.as_deref(), args.uds_mode)?;
        for dpu in &dpus {
            if let Endpoint::Path(path) = &dpu.endpoint {
                path.check()?;
            }
            dpu.listeners.iter().try_for_each(|listener| listener.path.check())?;
        }
        Ok(Self {
            dpus,
            socket_access,
            uds_access,
            poll_window: Duration::from_micros(args.poll_us),
            seccomp: args.seccomp,
            log_level: args.log_level,
        })
    }
}

impl Config {
    /// The inherited descriptor, which must stay open.
    pub fn inherited_fd(&self) -> Option<RawFd> {
        self.dpus.iter().find_map(|dpu| match dpu.endpoint {
            Endpoint::Fd(fd) => Some(fd),
            Endpoint::Path(_) => None,
        })
    }
}

/// The options of a single DPU in the form of `--vm`.
fn single(args: &Args) -> Result<VmParams, Error> {
    let text = |path: &PathBuf| path.to_str().map(str::to_owned).ok_or(Error::NotText(path.clone()));
    let rules = |rules: &[std::ffi::OsString]| -> Result<Vec<String>, Error> {
        rules.iter().map(|rule| text(&PathBuf::from(rule))).collect()
    };
    Ok(VmParams {
        guest_cid: args.guest_cid,
        socket: args.socket_path.as_ref().map(text).transpose()?,
        uds_path: args.uds_path.as_ref().map(text).transpose()?,
        ports: rules(&args.port)?,
        listen: rules(&args.listen)?,
        tx_buffer_size: args.tx_buffer_size,
        queue_size: args.queue_size,
        groups: args.groups.clone(),
    })
}

fn dpu(vm: &VmParams, fd: Option<RawFd>, mut quotas: Quotas) -> Result<DpuConfig, Error> {
    let cid = vm.guest_cid.unwrap_or(DEFAULT_CID);
    if !(FIRST_CID..=LAST_CID).contains(&cid) {
        return Err(Error::Cid(cid));
    }
    let endpoint = match (&vm.socket, fd) {
        (Some(path), None) => Endpoint::Path(SocketPath::new(path.trim().into())?),
        (None, Some(fd)) => Endpoint::Fd(fd),
        _ => return Err(Error::NoEndpoint(cid)),
    };
    let queue_size = vm.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE);
    let queue_size = u16::try_from(queue_size)
        .ok()
        .filter(|size| size.is_power_of_two() && (2..=32768).contains(size))
        .ok_or(Error::QueueSize(queue_size))?;
    if let Some(window) = vm.tx_buffer_size {
        if !(SMALLEST_WINDOW..=LARGEST_WINDOW).contains(&window) {
            return Err(Error::Window(window));
        }
        (quotas.window, quotas.bulk_window) = (window, window);
    }
    let mut routes = Routes::none();
    for rule in &vm.ports {
        let (port, path) = route::parse_rule(OsStr::new(rule)).map_err(Error::Rule)?;
        if routes.insert(port, path).is_some() {
            return Err(Error::PortTwice(port));
        }
    }
    let mut listeners = Vec::new();
    if let Some(path) = &vm.uds_path {
        let path = SocketPath::new(path.trim().into())?;
        routes = routes.with_family(path.as_path());
        listeners.push(ListenerConfig { path, port: None, kind: Kind::Stream });
    }
    for rule in &vm.listen {
        listeners.push(listener(rule)?);
    }
    if listeners.is_empty() && vm.ports.is_empty() {
        return Err(Error::NothingReachable(cid));
    }
    let groups = vm.groups.as_deref().unwrap_or(DEFAULT_GROUP);
    let groups = groups.trim().split('+').map(str::to_owned).collect();
    Ok(DpuConfig { cid, endpoint, routes, listeners, queue_size, quotas, groups })
}

/// A rule `PORT=PATH` or `PORT=seqpacket:PATH` of `--listen`.
fn listener(rule: &str) -> Result<ListenerConfig, Error> {
    let (port, path) = rule.split_once('=').unwrap_or((rule, ""));
    let (kind, path) = match path.as_bytes().strip_prefix(SEQPACKET) {
        Some(_) => (Kind::SeqPacket, &path[SEQPACKET.len()..]),
        None => (Kind::Stream, path),
    };
    let plain = if rule.contains('=') { format!("{port}={path}") } else { rule.to_owned() };
    let (port, path) = route::parse_rule(OsStr::new(&plain)).map_err(Error::Rule)?;
    Ok(ListenerConfig { path: SocketPath::new(path)?, port: Some(port), kind })
}

fn check_distinct(dpus: &[DpuConfig]) -> Result<(), Error> {
    let (mut cids, mut paths) = (HashSet::new(), HashSet::<&Path>::new());
    for dpu in dpus {
        if !cids.insert(dpu.cid) {
            return Err(Error::CidTwice(dpu.cid));
        }
        let endpoint = match &dpu.endpoint {
            Endpoint::Path(path) => Some(path),
            Endpoint::Fd(_) => None,
        };
        for path in endpoint.into_iter().chain(dpu.listeners.iter().map(|listener| &listener.path)) {
            if !paths.insert(path.as_path()) {
                return Err(Error::PathTwice(path.as_path().to_owned()));
            }
        }
    }
    Ok(())
}
