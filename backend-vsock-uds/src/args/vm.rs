//! The value of `--vm`: one DPU as `key=value` pairs, joined by commas.
#![forbid(unsafe_code)]

/// Parameters of one DPU as they were given, by `--vm` or in a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VmParams {
    /// Context id.
    pub guest_cid: Option<u64>,
    /// vhost-user socket.
    pub socket: Option<String>,
    /// Socket of host programs, and stem of those the DPU reaches.
    pub uds_path: Option<String>,
    /// `PORT=PATH` rules.
    pub ports: Vec<String>,
    /// `PORT=PATH` listeners.
    pub listen: Vec<String>,
    /// Window of a connection.
    pub tx_buffer_size: Option<u32>,
    /// Largest size of a queue.
    pub queue_size: Option<u32>,
    /// Groups, joined by `+`.
    pub groups: Option<String>,
}

/// Reads the value of one `--vm`.
///
/// # Errors
/// One line that says which key is wrong.
pub fn parse(text: &str) -> Result<VmParams, String> {
    let mut vm = VmParams::default();
    for pair in text.trim().split(',') {
        let (key, value) = pair.split_once('=').ok_or(format!("`{pair}` is not KEY=VALUE"))?;
        let value = value.to_owned();
        match key.trim().replace('_', "-").as_str() {
            "guest-cid" => vm.guest_cid = Some(number(key, &value)?),
            "socket" | "socket-path" => vm.socket = Some(value),
            "uds-path" => vm.uds_path = Some(value),
            "port" => vm.ports.push(value),
            "listen" => vm.listen.push(value),
            "tx-buffer-size" => vm.tx_buffer_size = Some(number(key, &value)?),
            "queue-size" => vm.queue_size = Some(number(key, &value)?),
            "groups" => vm.groups = Some(value),
            "forward-cid" | "forward-listen" => return Err(FORWARDING.into()),
            other => {
                return Err(format!(
                    "unknown key `{other}`; there are guest-cid, socket, uds-path, port, listen, \
                     tx-buffer-size, queue-size and groups"
                ));
            }
        }
    }
    Ok(vm)
}

/// Why `forward-cid` is refused.
pub const FORWARDING: &str = "connections are not forwarded to AF_VSOCK sockets of this host; give --uds-path, \
    or --port and --listen, and let socat connect the two: \
    socat UNIX-LISTEN:<uds-path>_<port>,fork VSOCK-CONNECT:<cid>:<port>";

fn number<N: std::str::FromStr>(key: &str, value: &str) -> Result<N, String> {
    value.trim().parse().map_err(|_| format!("{key}: `{value}` is not a number in range"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_either_spelling_are_read() {
        let hyphens = parse(
            "guest-cid=4,socket=/s,uds-path=/u,tx-buffer-size=32768,queue-size=256,groups=a+b,\
             port=22=/run/ssh=1,listen=23=/run/x",
        );
        let underscores = parse(
            "guest_cid=4,socket=/s,uds_path=/u,tx_buffer_size=32768,queue_size=256,groups=a+b,\
             port=22=/run/ssh=1,listen=23=/run/x",
        );
        assert_eq!(hyphens, underscores);
        assert_eq!(
            hyphens,
            Ok(VmParams {
                guest_cid: Some(4),
                socket: Some("/s".into()),
                uds_path: Some("/u".into()),
                ports: vec!["22=/run/ssh=1".into()],
                listen: vec!["23=/run/x".into()],
                tx_buffer_size: Some(32768),
                queue_size: Some(256),
                groups: Some("a+b".into()),
            })
        );
    }

    #[test]
    fn mistakes_are_named() {
        for (text, part) in [
            ("", "not KEY=VALUE"),
            ("guest-cid", "not KEY=VALUE"),
            ("guest-cid=x", "not a number"),
            ("queue-size=-1", "not a number"),
            ("sockets=/x", "unknown key `sockets`"),
            ("forward-cid=1", "not forwarded"),
        ] {
            let message = parse(text).expect_err(text);
            assert!(message.contains(part), "{message}");
        }
    }
}
