//! `dpu-hugepages`: parse, do one command, print, exit.
//!
//! Exit status: 0 done, 1 it could not be done, 2 wrong use. Results go to stdout, errors as one line to stderr.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser;

mod args;
mod commands;
mod tables;

/// How a command ends other than well.
#[derive(Debug)]
pub enum Failure {
    /// What was asked for makes no sense on any machine, or not on this one.
    Usage(String),
    /// It could not be done.
    Failed(String),
    /// The doctor found something; its report says what.
    Unhealthy(String),
}

impl Failure {
    /// It could not be done, for this reason.
    pub fn failed(error: impl ToString) -> Failure {
        Failure::Failed(error.to_string())
    }

    /// It makes no sense, for this reason.
    pub fn usage(error: impl ToString) -> Failure {
        Failure::Usage(error.to_string())
    }
}

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let (text, code) = match commands::run(cli) {
        Ok(text) => (text, 0),
        Err(Failure::Unhealthy(text)) => (text, 1),
        Err(Failure::Failed(error)) => {
            eprintln!("dpu-hugepages: {error}");
            return ExitCode::from(1);
        }
        Err(Failure::Usage(error)) => {
            eprintln!("dpu-hugepages: {error}");
            return ExitCode::from(2);
        }
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        // `dpu-hugepages status | head -3`: the reader has seen enough.
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            eprintln!("dpu-hugepages: cannot write the result: {e}");
            ExitCode::from(1)
        }
        _ => ExitCode::from(code),
    }
}
