//! The socket mux as a real process: started as a caller would, with a directory for its sockets.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use virtio_driver::daemon::{Daemon, DaemonCommand};
use virtio_driver::device::DeviceOptions;
use virtio_driver::vsock::Vsock;
use virtio_driver::wait::wait_for;

/// Context id of the DPU.
pub const CID: u64 = 42;

/// How long a host program waits for something that must come.
pub const LIMIT: Duration = Duration::from_secs(20);

/// The daemon as built: the one in `BACKEND_VSOCK_UDS`, or the workspace's own of the same profile.
///
/// # Errors
/// When it is not built.
pub fn program() -> anyhow::Result<PathBuf> {
    let path = match std::env::var_os("BACKEND_VSOCK_UDS") {
        Some(path) => PathBuf::from(path),
        None => {
            let test = std::env::current_exe()?;
            let folder = test.parent().and_then(Path::parent).unwrap_or(Path::new("."));
            folder.join("backend-vsock-uds")
        }
    };
    anyhow::ensure!(path.is_file(), "{} is missing: run `cargo build -p backend-vsock-uds`", path.display());
    Ok(path)
}

/// A running mux.
#[derive(Debug)]
pub struct Mux {
    /// The process.
    pub daemon: Daemon,
    run: tempfile::TempDir,
}

impl Mux {
    /// A mux for one DPU whose whole port family is open.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(extra: &[&str]) -> anyhow::Result<Self> {
        let run = tempfile::tempdir()?;
        let at = |name: &str| run.path().join(name).display().to_string();
        let mut args = vec![format!("--guest-cid={CID}"), "--socket-path".into(), at("vhost")];
        args.extend(["--uds-path".into(), at("vsock"), "--log-level=debug".into()]);
        args.extend(extra.iter().map(|arg| arg.replace("{run}", &run.path().display().to_string())));
        Self::spawn(run, &args)
    }

    /// A mux with exactly these arguments; `{run}` stands for its directory. It must listen at `{run}/vhost`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_with(args: &[&str]) -> anyhow::Result<Self> {
        let run = tempfile::tempdir()?;
        let place = run.path().display().to_string();
        let args: Vec<String> = args.iter().map(|arg| arg.replace("{run}", &place)).collect();
        Self::spawn(run, &args)
    }

    fn spawn(run: tempfile::TempDir, args: &[String]) -> anyhow::Result<Self> {
        let socket = run.path().join("vhost");
        let daemon = DaemonCommand::new(program()?, &socket).args(args).spawn()?;
        Ok(Mux { daemon, run })
    }

    /// A path in the mux's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.run.path().join(name)
    }

    /// A DPU that drives the device.
    ///
    /// # Errors
    /// When it cannot connect.
    pub fn dpu(&mut self) -> anyhow::Result<Vsock> {
        self.dpu_with(DeviceOptions::default())
    }

    /// As [`Mux::dpu`], with options.
    ///
    /// # Errors
    /// When it cannot connect.
    pub fn dpu_with(&mut self, options: DeviceOptions) -> anyhow::Result<Vsock> {
        Ok(Vsock::connect(self.daemon.connect()?, options)?)
    }

    /// A host program that listens where `port` of the host leads.
    ///
    /// # Errors
    /// When it cannot listen.
    pub fn listen(&self, port: u32) -> anyhow::Result<UnixListener> {
        Ok(UnixListener::bind(self.path(&format!("vsock_{port}")))?)
    }

    /// A host program that connects to one of the mux's sockets.
    ///
    /// # Errors
    /// When it cannot.
    pub fn connect(&mut self, name: &str) -> anyhow::Result<UnixStream> {
        let path = self.path(name);
        let stream = wait_for("the mux to listen", LIMIT, || UnixStream::connect(&path).ok())?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(stream)
    }
}

/// The next host program's end of a connection, with time limits.
///
/// # Errors
/// When nothing comes.
pub fn accept(listener: &UnixListener) -> anyhow::Result<UnixStream> {
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.set_write_timeout(Some(LIMIT))?;
    Ok(stream)
}
