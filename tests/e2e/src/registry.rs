//! Everything a run leaves in the system, so that it goes away on every path out of the program.
//!
//! A guard registers itself when it takes something (a process group, a scratch directory, a mount, hugepages)
//! and gives it back when dropped. A termination signal does not run destructors; then [`tear_down`] walks the
//! same list in reverse order. Giving back is done once: whoever takes the entry off the list does it.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::deadline::wait_for;
use crate::sys::tie_to_parent;

/// How long killed processes may take to end when the program is interrupted.
const TEAR_DOWN_LIMIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
enum Taken {
    Group(Pid),
    Directory(PathBuf),
    Mount(PathBuf),
    Hugepages { counter: PathBuf, pages: u64 },
}

#[derive(Debug)]
struct List {
    next: u64,
    entries: Vec<(u64, Taken)>,
}

static LIST: Mutex<List> = Mutex::new(List { next: 0, entries: Vec::new() });

fn list() -> MutexGuard<'static, List> {
    LIST.lock().unwrap_or_else(PoisonError::into_inner)
}

fn register(taken: Taken) -> u64 {
    let mut list = list();
    list.next += 1;
    let ticket = list.next;
    list.entries.push((ticket, taken));
    ticket
}

fn give_back(ticket: u64) {
    let taken = {
        let mut list = list();
        let position = list.entries.iter().position(|(candidate, _)| *candidate == ticket);
        position.map(|position| list.entries.remove(position).1)
    };
    if let Some(taken) = taken {
        undo(&taken);
    }
}

/// Undoing is best effort: there is nobody left to tell, and the rest of the list still has to go.
fn undo(taken: &Taken) {
    match taken {
        Taken::Group(pid) => {
            let _ = kill_process_group(*pid, Signal::KILL);
        }
        Taken::Directory(path) => {
            let _ = fs::remove_dir_all(path);
        }
        Taken::Mount(path) => {
            let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
        }
        Taken::Hugepages { counter, pages } => {
            if let Ok(now) = read_number(counter) {
                let _ = fs::write(counter, now.saturating_sub(*pages).to_string());
            }
        }
    }
}

/// Gives back all that is still taken: processes first, for they use the rest, then newest first.
pub fn tear_down() {
    let entries = std::mem::take(&mut list().entries);
    let groups = entries.iter().filter_map(|(_, taken)| match taken {
        Taken::Group(pid) => Some(*pid),
        _ => None,
    });
    let groups: Vec<Pid> = groups.collect();
    for pid in &groups {
        let _ = kill_process_group(*pid, Signal::KILL);
    }
    // Whatever still runs after that is beyond help.
    let _ = wait_for("killed processes to end", TEAR_DOWN_LIMIT, || {
        Ok((!groups.iter().any(|pid| is_running(*pid))).then_some(()))
    });
    for (_, taken) in entries.iter().rev() {
        undo(taken);
    }
}

/// True until the process is gone or waits to be collected.
fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_pid()));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

pub(crate) fn read_number(path: &Path) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.trim().parse().with_context(|| format!("{} does not hold a number: {text:?}", path.display()))
}

/// A child process and all it started, killed as one group.
#[derive(Debug)]
pub struct Group {
    name: String,
    child: Child,
    ticket: u64,
}

impl Group {
    /// Starts `command` as the leader of a new process group that dies with this program.
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let program = command.get_program().to_string_lossy().into_owned();
        let child =
            tie_to_parent(command).spawn().with_context(|| format!("cannot start {name} ({program})"))?;
        let pid = Pid::from_child(&child);
        Ok(Self { name: name.to_owned(), child, ticket: register(Taken::Group(pid)) })
    }

    /// The process id of the leader.
    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// The leader's pipes, as asked for in the command.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The exit status if the leader has ended.
    ///
    /// # Errors
    /// When the kernel refuses to tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("cannot ask for the state of {}", self.name))
    }

    /// Waits until the leader ends.
    ///
    /// # Errors
    /// When it has not ended after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let name = self.name.clone();
        wait_for(&format!("the end of {name}"), limit, || self.ended())
    }

    /// Sends a signal to the whole group.
    ///
    /// # Errors
    /// When the group does not exist any more.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process_group(self.pid(), signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Kills the group and collects its leader.
    pub fn kill(&mut self) {
        let _ = kill_process_group(self.pid(), Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.kill();
        }
        give_back(self.ticket);
    }
}

/// Says how a process ended, as a reader expects it.
#[must_use]
pub fn describe_exit(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown status".to_owned(),
    }
}

/// A directory that is removed with all its content.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    ticket: u64,
}

impl Scratch {
    /// Makes a new directory with mode 0755 below the system's directory for temporary files.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(label: &str) -> Result<Self> {
        let base = std::env::temp_dir();
        for attempt in 0_u32.. {
            let path = base.join(format!("dpu-e2e-{}-{label}-{attempt}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => {
                    let ticket = register(Taken::Directory(path.clone()));
                    return Ok(Self { path, ticket });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot create {}", path.display()));
                }
            }
        }
        anyhow::bail!("no free name for a scratch directory in {}", base.display())
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of an entry in it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        give_back(self.ticket);
    }
}

/// A tmpfs mounted on a host directory for as long as this lives.
#[derive(Debug)]
pub struct HostMount {
    ticket: u64,
}

impl HostMount {
    /// Mounts a small tmpfs on `target`.
    ///
    /// # Errors
    /// When the mount is refused (it needs root).
    pub fn tmpfs(target: &Path) -> Result<Self> {
        rustix::mount::mount("tmpfs", target, "tmpfs", MountFlags::NOSUID, Some(c"size=16m,mode=0777"))
            .with_context(|| format!("cannot mount a tmpfs on {} (it needs root)", target.display()))?;
        Ok(Self { ticket: register(Taken::Mount(target.to_owned())) })
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        give_back(self.ticket);
    }
}

/// Hugepages of the default 2 MiB size added to the machine's pool for as long as this lives.
#[derive(Debug)]
pub struct Hugepages {
    ticket: u64,
}

/// The kernel's counter of 2 MiB pages (Documentation/admin-guide/mm/hugetlbpage.rst).
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// Bytes of one hugepage in [`POOL`].
pub const HUGEPAGE_BYTES: u64 = 2 << 20;

impl Hugepages {
    /// Grows the pool until `bytes` are free, and remembers by how much.
    ///
    /// # Errors
    /// When the kernel gives fewer pages than asked for; then the pool is as before.
    pub fn reserve(bytes: u64) -> Result<Self> {
        let pool = Path::new(POOL);
        let counter = pool.join("nr_hugepages");
        let needed = bytes.div_ceil(HUGEPAGE_BYTES);
        let free = read_number(&pool.join("free_hugepages"))?;
        let promised = read_number(&pool.join("resv_hugepages"))?;
        let before = read_number(&counter)?;
        let missing = needed.saturating_sub(free.saturating_sub(promised));
        if missing > 0 {
            fs::write(&counter, (before + missing).to_string())
                .with_context(|| format!("cannot write {} (it needs root)", counter.display()))?;
        }
        let given = read_number(&counter)?.saturating_sub(before);
        let ticket = register(Taken::Hugepages { counter, pages: given });
        if given < missing {
            give_back(ticket);
            anyhow::bail!(
                "the kernel gave {given} of {missing} hugepages of 2 MiB: memory is short or fragmented"
            );
        }
        Ok(Self { ticket })
    }
}

impl Drop for Hugepages {
    fn drop(&mut self) {
        give_back(self.ticket);
    }
}

/// Hugepages of 2 MiB that a process has mapped and touched.
///
/// # Errors
/// When the process is gone.
pub fn hugepages_of(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // Lines such as `Shared_Hugetlb:     2048 kB` (Documentation/filesystems/proc.rst).
    let kibibytes: u64 = text
        .lines()
        .filter(|line| line.contains("_Hugetlb:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    Ok(kibibytes / (HUGEPAGE_BYTES >> 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scratch_directory_goes_away_with_its_content() {
        let scratch = Scratch::new("unit").unwrap();
        let path = scratch.path().to_owned();
        fs::create_dir(path.join("deep")).unwrap();
        fs::write(path.join("deep/file"), "x").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn a_group_takes_its_grandchildren_along() {
        let mut group = Group::spawn(
            "shell",
            Command::new("sh")
                .args(["-c", "sleep 1000 & echo $!; wait"])
                .stdout(std::process::Stdio::piped()),
        )
        .unwrap();
        let mut line = String::new();
        let stdout = group.child().stdout.take().unwrap();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).unwrap();
        let grandchild = Pid::from_raw(line.trim().parse().unwrap()).unwrap();
        assert!(is_running(grandchild));
        drop(group);
        // A killed orphan may stay a zombie until the machine's init collects it.
        wait_for("the grandchild to be gone", Duration::from_secs(5), || {
            Ok((!is_running(grandchild)).then_some(()))
        })
        .unwrap();
    }
}
