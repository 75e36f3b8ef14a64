//! What a command line asks the program to do: serve, or print something.
#![forbid(unsafe_code)]

use std::ffi::OsString;

use clap::Parser;
use clap::error::ErrorKind;

use super::Args;
use crate::config::Config;

/// What `--print-capabilities` prints: the answer of a vhost-user back-end program to management software
/// (QEMU's `docs/interop/vhost-user.rst`, "Backend program conventions"). There are no features of type
/// `vsock` to name.
pub const CAPABILITIES: &str = "{\n  \"type\": \"vsock\",\n  \"features\": []\n}\n";

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Run the daemon.
    Serve(Box<Config>),
    /// Print this on stdout and end with 0.
    Print(String),
}

/// A command line that is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One line, without the program's name.
    pub message: String,
    /// 2: the command line is wrong; 1: it does not fit this host.
    pub exit_code: u8,
}

/// Decides what to do. `argv` begins with the program's name.
///
/// # Errors
/// [`Refusal`]; nothing was changed anywhere then.
pub fn invocation(argv: Vec<OsString>) -> Result<Invocation, Refusal> {
    // Management software may ask this of any command line, however incomplete.
    if argv.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Invocation::Print(CAPABILITIES.into()));
    }
    let args = match Args::try_parse_from(argv) {
        Ok(args) => args,
        Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
            return Ok(Invocation::Print(error.render().to_string()));
        }
        Err(error) => {
            return Err(Refusal { message: one_line(&error.render().to_string()), exit_code: 2 });
        }
    };
    match Config::try_from(args) {
        Ok(config) => Ok(Invocation::Serve(Box::new(config))),
        Err(error) => {
            let hint = if error.exit_code() == 2 { " (try --help)" } else { "" };
            Err(Refusal { message: format!("{error}{hint}"), exit_code: error.exit_code() })
        }
    }
}

/// clap's message, which is several paragraphs, as one line: the message and its hints, without
/// the usage.
fn one_line(rendered: &str) -> String {
    let text = rendered.strip_prefix("error: ").unwrap_or(rendered);
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let mut line = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ");
    line.push_str(" (try --help)");
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> Result<Invocation, Refusal> {
        invocation(
            std::iter::once("backend-vsock-uds").chain(arguments.iter().copied()).map(Into::into).collect(),
        )
    }

    #[test]
    fn capabilities_are_printed_whatever_else_is_given() {
        let expected = Ok(Invocation::Print(CAPABILITIES.into()));
        assert_eq!(run(&["--print-capabilities"]), expected);
        assert_eq!(run(&["--nonsense", "--print-capabilities", "--fd"]), expected);
    }

    #[test]
    fn help_and_version_are_no_mistakes() {
        for option in ["--help", "-h", "--version", "-V"] {
            assert!(
                matches!(run(&[option]), Ok(Invocation::Print(text)) if text.contains("backend-vsock-uds"))
            );
        }
    }

    #[test]
    fn mistakes_are_one_line_and_exit_two() {
        for arguments in [
            &[][..],
            &["--socket", "/x"],
            &["--nonsense"],
            &["--socket", "/x", "--fd", "3", "--uds-path", "/y"],
            &["--socket", "/x", "--vm", "socket=/y,uds-path=/z"],
            &["--config", "/dev/null", "--vm", "socket=/y,uds-path=/z"],
            &["--socket", "/x", "--uds-path", "/y", "--guest-cid", "2"],
            &["--socket", "/x", "--uds-path", "/y", "--guest-cid", "4294967295"],
            &["--socket", "/x", "--uds-path", "/y", "--queue-size", "1000"],
            &["--socket", "/x", "--uds-path", "/y", "--tx-buffer-size", "10"],
            &["--socket", "/x", "--uds-path", "/y", "--socket-mode", "999"],
            &["--socket", "/x", "--forward-cid", "1"],
            &["--socket", "/x", "--port", "22"],
            &["--socket", "/x", "--port", "22=/a", "--port", "22=/b"],
            &["--socket", "/x", "--port", "22=relative"],
            &["--socket", "/x", "--uds-path", "/x"],
            &["--vm", "socket=/x,uds-path=/y", "--vm", "socket=/a,uds-path=/b"],
            &["--vm", "socket=/x,uds-path=/y", "--vm", "guest-cid=4,socket=/x,uds-path=/b"],
            &["--vm", "uds-path=/y"],
        ] {
            let refusal = run(arguments).expect_err(&arguments.join(" "));
            assert_eq!(refusal.exit_code, 2, "{arguments:?}: {}", refusal.message);
            assert!(
                !refusal.message.contains('\n') && refusal.message.ends_with("(try --help)"),
                "{refusal:?}"
            );
        }
    }
}
