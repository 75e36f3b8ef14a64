//! What the host and the agent in the emulated DPU say to each other.
//!
//! One JSON value per line over a virtio-serial port of its own, so that kernel messages on the console cannot
//! get in between. The host sends [`Order`]s, the agent answers with [`Event`]s. Every program that runs in the
//! DPU has a number chosen by the host; its events come in the order `Started`, any number of `Output`, then one
//! `Exited`; or a single `Refused`. Programs run side by side: a waiting lock does not hold up the next order.
//!
//! Output bytes are carried as text whose characters U+0000 to U+00FF stand for the byte values, so that any
//! output survives and plain text stays readable in the log.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Name of the virtio-serial port, as found in `/sys/class/virtio-ports/*/name`.
pub const PORT_NAME: &str = "dpu-e2e";

/// Who a program runs as.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// A program to run in the DPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Program and arguments; at least one entry.
    pub argv: Vec<String>,
    /// Additions to the environment.
    pub env: Vec<(String, String)>,
    /// Working directory (inside `root` if that is given).
    pub cwd: Option<String>,
    /// Directory that becomes the root directory.
    pub root: Option<String>,
    /// Who it runs as; root if not given.
    pub user: Option<Credentials>,
}

/// From the host to the DPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "order")]
pub enum Order {
    /// Run a program.
    Run {
        /// Number that its events carry.
        id: u64,
        /// The program.
        program: Program,
    },
    /// Send a signal to a program's process group.
    Signal {
        /// The program's number.
        id: u64,
        /// Signal number.
        signal: i32,
    },
    /// Switch the DPU off.
    PowerOff,
    /// Restart the DPU.
    Reboot,
}

/// Where output came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// From the DPU to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "event")]
pub enum Event {
    /// The agent takes orders now.
    Ready {
        /// `uname -r`.
        kernel: String,
        /// Milliseconds since the kernel started.
        uptime_ms: u64,
    },
    /// The program runs.
    Started {
        /// Its number.
        id: u64,
        /// Its process id in the DPU.
        pid: u32,
    },
    /// The program wrote something.
    Output {
        /// Its number.
        id: u64,
        /// Where to.
        stream: Stream,
        /// The bytes, see the module text.
        text: String,
    },
    /// The program ended; nothing follows.
    Exited {
        /// Its number.
        id: u64,
        /// Exit code, if it exited.
        code: Option<i32>,
        /// Signal, if it was killed.
        signal: Option<i32>,
    },
    /// The program could not be started; nothing follows.
    Refused {
        /// Its number.
        id: u64,
        /// Why.
        reason: String,
    },
}

/// Turns bytes into the text form of the protocol.
#[must_use]
pub fn text_of(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

/// Turns the text form of the protocol into bytes; `None` for a character that stands for no byte.
#[must_use]
pub fn bytes_of(text: &str) -> Option<Vec<u8>> {
    text.chars().map(|character| u8::try_from(u32::from(character)).ok()).collect()
}

/// One line of the protocol, with its newline.
///
/// # Errors
/// Never for the types of this module; the signature is that of the JSON writer.
pub fn line_of<T: Serialize>(value: &T) -> serde_json::Result<String> {
    let mut line = serde_json::to_string(value)?;
    line.push('\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_output_survives_the_line(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let event = Event::Output { id: 7, stream: Stream::Stderr, text: text_of(&bytes) };
            let line = line_of(&event).unwrap();
            prop_assert_eq!(line.matches('\n').count(), 1);
            let back: Event = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(&back, &event);
            let Event::Output { text, .. } = back else { unreachable!() };
            prop_assert_eq!(bytes_of(&text).unwrap(), bytes);
        }
    }

    #[test]
    fn a_character_beyond_a_byte_is_refused() {
        assert_eq!(bytes_of("caf\u{e9}"), Some(vec![b'c', b'a', b'f', 0xe9]));
        assert_eq!(bytes_of("\u{100}"), None);
    }
}
