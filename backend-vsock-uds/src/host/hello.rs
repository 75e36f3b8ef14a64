//! The greeting of a host program that wants to reach a port of the DPU: `CONNECT <port>\n`, answered
//! by `OK <assigned port>\n` (the "hybrid vsock" protocol of Firecracker, Cloud Hypervisor,
//! vhost-device-vsock and systemd-ssh-proxy).
//!
//! The greeting may arrive byte by byte, and the program's first data may follow it in the same
//! segment: [`parse`] is given everything received so far and says how much of it is the greeting.
//! The caller peeks, parses, and takes exactly the greeting out of the socket.
//!
//! Port numbers that this side assigns fit five digits ([`MAX_ASSIGNED_PORT`]), because
//! systemd-ssh-proxy reads the answer into a buffer of the size of `OK 65535\n`.
#![forbid(unsafe_code)]

/// Longest greeting: `CONNECT 4294967295\n` with room for surplus blanks and `\r`.
pub const MAX_GREETING: usize = 32;

/// Largest port number this side assigns.
pub const MAX_ASSIGNED_PORT: u32 = 65_535;

/// What has been received so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greeting {
    /// A beginning of a greeting.
    Partial,
    /// A greeting of `len` bytes, its end of line included, that asks for `port`.
    Complete {
        /// Port of the DPU.
        port: u32,
        /// Bytes of the greeting.
        len: usize,
    },
    /// Not a greeting.
    Invalid,
}

/// Reads a greeting from the start of `received`.
pub fn parse(received: &[u8]) -> Greeting {
    let window = &received[..received.len().min(MAX_GREETING)];
    let Some(end) = window.iter().position(|byte| *byte == b'\n') else {
        let plausible = window.len() < MAX_GREETING && is_beginning(window);
        return if plausible { Greeting::Partial } else { Greeting::Invalid };
    };
    let line = window[..end].strip_suffix(b"\r").unwrap_or(&window[..end]);
    match line.split_at_checked(KEYWORD.len()) {
        Some((keyword, port)) if keyword.eq_ignore_ascii_case(KEYWORD) => match parse_port(port) {
            Some(port) => Greeting::Complete { port, len: end + 1 },
            None => Greeting::Invalid,
        },
        _ => Greeting::Invalid,
    }
}

/// The answer to a greeting.
pub fn answer(assigned_port: u32) -> String {
    format!("OK {assigned_port}\n")
}

const KEYWORD: &[u8] = b"CONNECT ";

/// Whether more bytes could make a greeting of this.
fn is_beginning(bytes: &[u8]) -> bool {
    let keyword = &bytes[..bytes.len().min(KEYWORD.len())];
    let rest = &bytes[keyword.len()..];
    keyword.eq_ignore_ascii_case(&KEYWORD[..keyword.len()])
        && rest.iter().all(|byte| byte.is_ascii_digit() || *byte == b'\r')
}

fn parse_port(digits: &[u8]) -> Option<u32> {
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_greeting_in_one_piece_is_understood() {
        assert_eq!(parse(b"CONNECT 22\n"), Greeting::Complete { port: 22, len: 11 });
    }

    #[test]
    fn lower_case_and_carriage_return_are_accepted() {
        assert_eq!(parse(b"connect 1024\r\n"), Greeting::Complete { port: 1024, len: 14 });
    }

    #[test]
    fn data_behind_the_greeting_is_not_part_of_it() {
        assert_eq!(parse(b"CONNECT 5\nSSH-2.0-x\r\n"), Greeting::Complete { port: 5, len: 10 });
    }

    #[test]
    fn every_beginning_is_partial() {
        let whole = b"CONNECT 4294967295\n";
        for end in 0..whole.len() {
            assert_eq!(parse(&whole[..end]), Greeting::Partial, "{end} bytes");
        }
        assert_eq!(parse(whole), Greeting::Complete { port: u32::MAX, len: whole.len() });
    }

    #[test]
    fn nonsense_is_refused_as_soon_as_it_shows() {
        for nonsense in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"CONNECT",
            b"CONNECT \n",
            b"CONNECT -1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"CONNECT 99999999999999999999999999999",
            b"\n",
            b"\0",
        ] {
            let expected = if nonsense == b"CONNECT" { Greeting::Partial } else { Greeting::Invalid };
            assert_eq!(parse(nonsense), expected, "{}", nonsense.escape_ascii());
        }
    }

    proptest! {
        #[test]
        fn random_bytes_never_panic_and_a_verdict_is_final(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut verdict = Greeting::Partial;
            for end in 0..=bytes.len() {
                let now = parse(&bytes[..end]);
                if verdict == Greeting::Partial {
                    verdict = now;
                }
                prop_assert_eq!(now, verdict, "the verdict changed at {}", end);
            }
        }

        #[test]
        fn any_port_is_understood_whatever_follows(port in any::<u32>(), rest in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut bytes = format!("CONNECT {port}\n").into_bytes();
            let len = bytes.len();
            bytes.extend_from_slice(&rest);
            prop_assert_eq!(parse(&bytes), Greeting::Complete { port, len });
        }

        #[test]
        fn answers_fit_systemd_ssh_proxy(port in 0..=MAX_ASSIGNED_PORT) {
            prop_assert!(answer(port).len() <= "OK 65535\n".len());
        }
    }
}
