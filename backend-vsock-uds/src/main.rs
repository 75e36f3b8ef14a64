//! Entry point: parse, then serve. The only place that decides how the process ends.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use backend_vsock_uds::args::invocation::{Invocation, invocation};
use backend_vsock_uds::config::Config;
use backend_vsock_uds::sandbox::descriptors;
use backend_vsock_uds::{daemon, logging};

fn main() -> ExitCode {
    match invocation(std::env::args_os().collect()) {
        Ok(Invocation::Print(text)) => {
            let mut stdout = io::stdout().lock();
            match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
                Ok(()) => ExitCode::SUCCESS,
                // `--help | head` is no failure.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
                Err(error) => fail(&format!("cannot write to stdout: {error}"), 1),
            }
        }
        Ok(Invocation::Serve(config)) => serve(*config),
        Err(refusal) => fail(&refusal.message, refusal.exit_code),
    }
}

fn serve(config: Config) -> ExitCode {
    // Before anything here opens a descriptor that stays, the log included.
    if let Err(error) = descriptors::close_inherited(config.inherited_fd()) {
        return fail(&format!("cannot close inherited descriptors: {error}"), 1);
    }
    logging::init(config.log_level);
    match daemon::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&chain(&error), 1),
    }
}

/// An error and its causes on one line.
fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line
}

fn fail(message: &str, code: u8) -> ExitCode {
    // When stderr is gone as well, the exit code has to do.
    let _ = writeln!(io::stderr(), "backend-vsock-uds: {message}");
    ExitCode::from(code)
}
