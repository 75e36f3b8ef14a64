//! Life of the daemon: listen, isolate, serve, reconnect, stop.

use crate::config::Config;

/// Why the daemon could not start, or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This build has no device.
    #[error("this build cannot serve {}", .0.display())]
    NoDevice(std::path::PathBuf),
}

/// Serves until the front end is gone for good or a signal ends the daemon.
pub fn run(config: Config) -> Result<(), Error> {
    Err(Error::NoDevice(config.shared_dir.as_path().to_owned()))
}
