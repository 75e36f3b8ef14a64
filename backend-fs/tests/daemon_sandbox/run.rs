//! Running the probe and waiting for what it says.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longest time a probe may take, on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The unprivileged user of the cases.
pub const NOBODY: u32 = 65534;

/// A directory to export, with something beside it that must not be reached:
///
/// ```text
/// base/export/inside          "inside"
/// base/export/out -> base/outside/secret (absolute)
/// base/export/up  -> ../outside/secret
/// base/outside/secret         "secret"
/// base/probe                  this program, so that any user can execute it
/// ```
pub struct Place {
    base: TempDir,
}

impl Place {
    pub fn new() -> Self {
        let base = tempfile::tempdir().unwrap();
        let open =
            |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
        open(base.path());
        for name in ["export", "outside"] {
            std::fs::create_dir(base.path().join(name)).unwrap();
            open(&base.path().join(name));
        }
        std::fs::write(base.path().join("export/inside"), "inside").unwrap();
        std::fs::write(base.path().join("outside/secret"), "secret").unwrap();
        symlink(base.path().join("outside/secret"), base.path().join("export/out")).unwrap();
        symlink("../outside/secret", base.path().join("export/up")).unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), base.path().join("probe")).unwrap();
        Self { base }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.base.path().join(name)
    }

    pub fn inode(&self, name: &str) -> u64 {
        std::fs::metadata(self.path(name)).unwrap().ino()
    }

    /// The probe with this mode and filter, exporting `export`.
    pub fn probe(&self, mode: &str, seccomp: &str) -> Probe {
        let mut command = Command::new(self.path("probe"));
        command.arg("probe").arg(format!("--mode={mode}")).arg(format!("--seccomp={seccomp}"));
        command.arg(format!("--export={}", self.path("export").display()));
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Group of its own, so that a case that fails leaves nothing behind.
        command.process_group(0);
        Probe { command }
    }
}

/// A probe to be started.
pub struct Probe {
    pub command: Command,
}

impl Probe {
    pub fn arg(mut self, argument: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.arg(argument);
        self
    }

    pub fn args(mut self, arguments: &[&str]) -> Self {
        self.command.args(arguments);
        self
    }

    pub fn by_nobody(mut self) -> Self {
        // Without groups of its own, `Command` drops root's when it changes the user.
        self.command.uid(NOBODY).gid(NOBODY);
        self
    }

    /// Runs it to its end.
    pub fn run(self) -> Ran {
        self.start().finish()
    }

    pub fn start(mut self) -> Running {
        Running { child: self.command.spawn().unwrap() }
    }
}

/// A probe that runs.
pub struct Running {
    pub child: Child,
}

impl Running {
    /// Reads one line of its output.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        let stdout = self.child.stdout.as_mut().unwrap();
        BufReader::with_capacity(1, stdout).read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    pub fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    pub fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    /// Pids of its children: the server.
    pub fn server(&self) -> i32 {
        let pid = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        children.split_whitespace().next().expect("the supervisor has a child").parse().unwrap()
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Ran {
        let begin = Instant::now();
        wait_for("the probe's end", PATIENCE, || self.child.try_wait().unwrap().is_some());
        let took = begin.elapsed();
        let mut ran = Output { status: self.child.wait().unwrap(), stdout: Vec::new(), stderr: Vec::new() };
        self.child.stdout.take().unwrap().read_to_end(&mut ran.stdout).unwrap();
        self.child.stderr.take().unwrap().read_to_end(&mut ran.stderr).unwrap();
        Ran {
            code: ran.status.code(),
            out: String::from_utf8(ran.stdout).unwrap().trim_end().to_owned(),
            err: String::from_utf8(ran.stderr).unwrap().trim_end().to_owned(),
            took,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = rustix::process::kill_process_group(self.pid(), rustix::process::Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// A probe that ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl Ran {
    /// Its output, when all went well.
    pub fn good(self) -> String {
        assert_eq!((self.code, self.err.as_str()), (Some(0), ""), "output: {}", self.out);
        self.out
    }
}

/// Waits until `condition` holds.
pub fn wait_for(what: &str, patience: Duration, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    // wait-loop: `condition`, until the deadline
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {patience:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}
