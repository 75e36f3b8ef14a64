//! Logging: plain lines on stderr.
//!
//! `RUST_LOG`, when set, wins over `--log-level`. Lines on a terminal are coloured.
#![forbid(unsafe_code)]

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// Severity (`--log-level`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[allow(missing_docs, reason = "named as on the command line")]
pub enum LogLevel {
    Off,
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    /// All of them, most silent first.
    pub const ALL: [LogLevel; 6] =
        [LogLevel::Off, LogLevel::Error, LogLevel::Warn, LogLevel::Info, LogLevel::Debug, LogLevel::Trace];

    /// The word for it, on the command line and in a filter.
    pub fn name(self) -> &'static str {
        match self {
            LogLevel::Off => "off",
            LogLevel::Error => "error",
            LogLevel::Warn => "warn",
            LogLevel::Info => "info",
            LogLevel::Debug => "debug",
            LogLevel::Trace => "trace",
        }
    }
}

/// Starts logging for the whole process. Problems are logged, not returned: a daemon that can serve
/// should not fail over its log.
pub fn init(level: LogLevel) {
    let (filter, complaint) = filter(level, std::env::var("RUST_LOG").ok().as_deref());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).compact();
    // `try_init` fails only when logging was started before, which then stays as it is.
    let _ = builder.with_ansi(io::stderr().is_terminal()).with_writer(io::stderr).try_init();
    if let Some(complaint) = complaint {
        tracing::warn!("{complaint}");
    }
}

/// The filter, and what is wrong with `RUST_LOG` if it could not be used.
fn filter(level: LogLevel, rust_log: Option<&str>) -> (EnvFilter, Option<String>) {
    let own = || EnvFilter::new(level.name());
    match rust_log.filter(|text| !text.trim().is_empty()) {
        None => (own(), None),
        Some(text) => match EnvFilter::builder().parse(text) {
            Ok(filter) => (filter, None),
            Err(error) => {
                let complaint =
                    format!("RUST_LOG '{text}': {error}; using --log-level={} instead", level.name());
                (own(), Some(complaint))
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_wins_over_the_option() {
        assert_eq!(filter(LogLevel::Info, Some("debug")).0.to_string(), "debug");
        assert_eq!(filter(LogLevel::Warn, None).0.to_string(), "warn");
        assert_eq!(filter(LogLevel::Off, Some(" ")).0.to_string(), "off");
    }

    #[test]
    fn a_broken_environment_is_reported_and_ignored() {
        let (filter, complaint) = filter(LogLevel::Error, Some("backend_vsock_uds=loud"));
        assert_eq!(filter.to_string(), "error");
        assert!(complaint.unwrap().starts_with("RUST_LOG 'backend_vsock_uds=loud': "));
    }
}
