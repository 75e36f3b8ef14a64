//! What a command line asks the program to do: serve, or print something.
#![forbid(unsafe_code)]

use std::ffi::OsString;

use clap::Parser;
use clap::error::ErrorKind;

use super::{Args, generate, legacy};
use crate::capabilities_json;
use crate::config::{self, Config};

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invocation {
    /// Run the daemon.
    Serve(Box<Config>),
    /// Print this on stdout and end with 0.
    Print(Vec<u8>),
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
pub fn invocation(argv: Vec<OsString>) -> Result<Invocation, Refusal> {
    // Management software may ask this of any command line, however incomplete.
    if argv.iter().skip(1).any(|argument| argument == "--print-capabilities") {
        return Ok(Invocation::Print((capabilities_json::text() + "\n").into_bytes()));
    }
    let args = match parse(argv) {
        Ok(args) => args,
        Err(Stop::Print(text)) => return Ok(Invocation::Print(text.into_bytes())),
        Err(Stop::Usage(message)) => return Err(Refusal { message, exit_code: 2 }),
    };
    if let Some(what) = args.generate {
        return Ok(Invocation::Print(generate::text(what)));
    }
    match Config::try_from(args) {
        Ok(config) => Ok(Invocation::Serve(Box::new(config))),
        Err(error) => Err(refusal(&error)),
    }
}

fn refusal(error: &config::Error) -> Refusal {
    let message = match error.exit_code() {
        2 => format!("{error} (try --help)"),
        _ => error.to_string(),
    };
    Refusal { message, exit_code: error.exit_code() }
}

/// Why there is nothing to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Help or the version was asked for; this is it.
    Print(String),
    /// The command line is wrong; one line.
    Usage(String),
}

/// Parses a command line, legacy options included. `argv` begins with the program's name.
pub fn parse(mut argv: Vec<OsString>) -> Result<Args, Stop> {
    let args = Args::try_parse_from(&argv).map_err(stop)?;
    let options = legacy::modern(&args.legacy_options, args.legacy_debug)
        .map_err(|error| Stop::Usage(error.to_string()))?;
    if options.is_empty() {
        return Ok(args);
    }
    // There are no positional arguments, so only an idle `--` can stand at the end.
    argv.pop_if(|last| last == "--");
    argv.extend(options.into_iter().map(OsString::from));
    Args::try_parse_from(argv).map_err(stop)
}

fn stop(error: clap::Error) -> Stop {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Stop::Print(error.render().to_string()),
        _ => Stop::Usage(one_line(&error.render().to_string())),
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
