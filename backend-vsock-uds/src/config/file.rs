//! The YAML file of `--config`: a list `vms` of DPUs, as vhost-device-vsock reads it, and maps `ports` and
//! `listen` besides.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::Error;
use super::error::reason;
use crate::args::vm::{FORWARDING, VmParams};

/// Largest file that is read. A DPU takes some hundred bytes.
const MAX_FILE: u64 = 1 << 20;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    vms: Vec<Vm>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    guest_cid: Option<u64>,
    socket: Option<String>,
    uds_path: Option<String>,
    #[serde(default)]
    ports: BTreeMap<u32, String>,
    #[serde(default)]
    listen: BTreeMap<u32, String>,
    tx_buffer_size: Option<u32>,
    queue_size: Option<u32>,
    groups: Option<String>,
    #[serde(alias = "forward-cid")]
    forward_cid: Option<u32>,
    #[serde(alias = "forward-listen")]
    forward_listen: Option<String>,
}

/// Reads the file.
///
/// # Errors
/// [`Error::File`] for a file that cannot be read, [`Error::FileContent`] for what it says.
pub fn read(path: &Path) -> Result<Vec<VmParams>, Error> {
    let unreadable = |what: String| Error::File(path.to_owned(), what);
    let metadata = path.metadata().map_err(|error| unreadable(reason(&error)))?;
    if metadata.len() > MAX_FILE {
        return Err(unreadable(format!("larger than {MAX_FILE} bytes")));
    }
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(reason(&error)))?;
    parse(&text).map_err(|what| Error::FileContent(path.to_owned(), what))
}

fn parse(text: &str) -> Result<Vec<VmParams>, String> {
    let file: File = serde_saphyr::from_str(text).map_err(|error| one_line(&error.to_string()))?;
    if file.vms.is_empty() {
        return Err("the list `vms` is empty".into());
    }
    file.vms.into_iter().map(params).collect()
}

fn params(vm: Vm) -> Result<VmParams, String> {
    if vm.forward_cid.is_some() || vm.forward_listen.is_some() {
        return Err(FORWARDING.into());
    }
    let rules =
        |map: BTreeMap<u32, String>| map.iter().map(|(port, path)| format!("{port}={path}")).collect();
    Ok(VmParams {
        guest_cid: vm.guest_cid,
        socket: vm.socket,
        uds_path: vm.uds_path,
        ports: rules(vm.ports),
        listen: rules(vm.listen),
        tx_buffer_size: vm.tx_buffer_size,
        queue_size: vm.queue_size,
        groups: vm.groups,
    })
}

fn one_line(text: &str) -> String {
    text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("not YAML").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_of_vhost_device_vsock_is_read() {
        let text = "\
vms:
    - guest_cid: 3
      socket: /tmp/vhost3.socket
      uds_path: /tmp/vm3.sock
      tx_buffer_size: 65536
      queue_size: 1024
      groups: group1+groupA
    - guest_cid: 4
      socket: /tmp/vhost4.socket
      uds_path: /tmp/vm4.sock
";
        let vms = parse(text).expect("a good file");
        assert_eq!(vms.len(), 2);
        assert_eq!(vms[0].groups.as_deref(), Some("group1+groupA"));
        assert_eq!(
            (vms[0].guest_cid, vms[0].tx_buffer_size, vms[0].queue_size),
            (Some(3), Some(65536), Some(1024))
        );
        assert_eq!(vms[1].uds_path.as_deref(), Some("/tmp/vm4.sock"));
    }

    #[test]
    fn ports_and_listeners_are_maps() {
        let text =
            "vms:\n- socket: /s\n  ports: { 514: /dev/log, 22: /run/ssh }\n  listen: { 22: seqpacket:/x }\n";
        let vms = parse(text).expect("a good file");
        assert_eq!(vms[0].ports, ["22=/run/ssh", "514=/dev/log"]);
        assert_eq!(vms[0].listen, ["22=seqpacket:/x"]);
    }

    #[test]
    fn mistakes_are_one_line() {
        for text in [
            "",
            "vms: []",
            "vms:\n- guest_cid: x\n  socket: /s\n",
            "vms:\n- sockets: /s\n",
            "vms:\n- socket: /s\n  forward_cid: 1\n",
            "{",
            "other: 1",
            "vms:\n- socket: /s\n  ports: { a: /x }\n",
            "&a [*a]",
        ] {
            let message = parse(text).expect_err(text);
            assert!(!message.is_empty() && !message.contains('\n'), "{message}");
        }
    }
}
