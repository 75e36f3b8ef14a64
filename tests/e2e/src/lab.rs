//! What cases work with: the artefacts, the daemon's program, and a session of daemon and DPU with the export
//! mounted.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::daemon::{Daemon, DaemonProgram};
use crate::dpu::{Dpu, DpuConfig, FsDevice, Memory};
use crate::initramfs::{Base, Luggage, Passenger};
use crate::kernel::{Kernel, KernelLine};
use crate::registry::Scratch;
use crate::side::{DpuSide, HostSide};
use crate::suites::{self, DEBIAN};

/// The tag of the export.
pub const TAG: &str = "export";

/// Where the DPU mounts it.
pub const MOUNT: &str = "/mnt";

/// Host programs that every DPU takes along, from Debian's `acl` package.
const ACL_PROGRAMS: [&str; 2] = ["/usr/bin/getfacl", "/usr/bin/setfacl"];

/// Where the programs of third-party suites lie in the DPU.
pub const SUITE_PROGRAMS: &str = "/opt/bin";

/// A `sleep` that is a program of its own, from Debian's coreutils.
const SLEEP: &str = "/bin/sleep";

/// Memory of a DPU that runs third-party suites.
const SUITES_MEMORY_MIB: u64 = 1024;

/// Lines of the DPU's kernel log that mean trouble.
const KERNEL_TROUBLE: &str = "BUG:|WARNING:|Oops|blocked for more than|Call Trace|general protection";

/// How daemon and DPU are set up for a number of cases.
#[derive(Debug, PartialEq, Eq)]
pub struct Profile {
    /// Its name in the results.
    pub name: &'static str,
    /// The kernel, if it must be a certain one.
    pub kernel: Option<KernelLine>,
    /// The DPU's memory.
    pub memory: Memory,
    /// Request queues of the device.
    pub request_queues: u16,
    /// Processors of the DPU.
    pub processors: u16,
    /// Whether third-party suites come along: more memory, their programs, a Debian root.
    pub suites: bool,
    /// Arguments of the daemon besides socket and directory.
    pub daemon: &'static [&'static str],
}

impl Profile {
    /// What most users run: the daemon's default cache rules, extended attributes and ACLs.
    pub const AUTO: Self = Self {
        name: "auto",
        kernel: None,
        memory: Memory::Plain,
        request_queues: 1,
        processors: 2,
        suites: false,
        daemon: &["--cache=auto", "--xattr", "--posix-acl", "--announce-submounts"],
    };
}

/// The artefacts of a run.
#[derive(Debug)]
pub struct Lab {
    /// The cache.
    pub cache: Cache,
    /// The daemon under test.
    pub daemon: DaemonProgram,
    line: KernelLine,
    base: Base,
    kernels: Mutex<BTreeMap<KernelLine, Kernel>>,
    _scratch: Scratch,
}

impl Lab {
    /// Looks at the daemon and packs what all DPUs share.
    ///
    /// # Errors
    /// When the daemon or a needed program is missing.
    pub fn new(daemon: &Path, line: KernelLine) -> Result<Self> {
        let daemon = DaemonProgram::at(daemon)?;
        let scratch = Scratch::new("base")?;
        let base = Base::pack(scratch.path())?;
        Ok(Self { cache: Cache::open()?, daemon, line, base, kernels: Mutex::default(), _scratch: scratch })
    }

    /// A kernel: the given line, or the one chosen for this run.
    ///
    /// # Errors
    /// When it cannot be fetched.
    pub fn kernel(&self, line: Option<KernelLine>) -> Result<Kernel> {
        let line = line.unwrap_or(self.line);
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kernel) = kernels.get(&line) {
            return Ok(kernel.clone());
        }
        let kernel = Kernel::get(&self.cache, line)?;
        kernels.insert(line, kernel.clone());
        Ok(kernel)
    }

    /// A new, empty export that everybody may write to.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn export(&self) -> Result<Scratch> {
        let export = Scratch::new("export")?;
        open_to_all(export.path())?;
        Ok(export)
    }

    /// Starts the daemon on an export.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start_daemon(&self, export: &Path, arguments: &[&str]) -> Result<Daemon> {
        let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        Daemon::start(&self.daemon, export, &arguments)
    }

    /// A DPU of the usual make with one device.
    ///
    /// # Errors
    /// When its kernel cannot be fetched.
    pub fn dpu_config(&self, line: Option<KernelLine>, socket: &Path) -> Result<DpuConfig> {
        let mut config = DpuConfig::new(&self.kernel(line)?);
        config.devices.push(FsDevice::new(socket, TAG));
        config.luggage = luggage();
        Ok(config)
    }

    /// Boots a DPU.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn boot(&self, config: &DpuConfig) -> Result<Dpu> {
        Dpu::boot(&self.base, config)
    }

    /// Boots a DPU and mounts the export in it.
    ///
    /// # Errors
    /// When it does not come up or the mount is refused.
    pub fn boot_and_mount(&self, config: &DpuConfig) -> Result<Dpu> {
        let dpu = self.boot(config)?;
        mount(&dpu)?;
        Ok(dpu)
    }
}

/// Mounts the export in a DPU.
///
/// # Errors
/// When the mount is refused.
pub fn mount(dpu: &Dpu) -> Result<()> {
    dpu.run(&["mount", "-t", "virtiofs", TAG, MOUNT])?.success().map(drop)
}

/// Unmounts the export in a DPU.
///
/// # Errors
/// When the mount is busy.
pub fn unmount(dpu: &Dpu) -> Result<()> {
    dpu.run(&["umount", MOUNT])?.success().map(drop)
}

/// Lets everybody read and write a directory.
///
/// # Errors
/// When its permissions cannot be changed.
pub fn open_to_all(directory: &Path) -> Result<()> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o777))
        .with_context(|| format!("cannot change the permissions of {}", directory.display()))
}

fn suite_program(host: PathBuf, name: &str) -> Passenger {
    Passenger { host, dpu: format!("{SUITE_PROGRAMS}/{name}") }
}

/// Mounts the Debian root and, inside of it, what its programs need and the export.
fn enter_debian(dpu: &Dpu) -> Result<()> {
    let script = format!(
        "mkdir -p {DEBIAN}; mount -t ext4 -o ro /dev/vda {DEBIAN}
         for name in dev proc sys; do mount --bind /$name {DEBIAN}/$name; done
         mount -t tmpfs tmpfs {DEBIAN}/tmp; mount -t tmpfs tmpfs {DEBIAN}/root
         mount --bind {MOUNT} {DEBIAN}{MOUNT}"
    );
    dpu.run(&["sh", "-ec", &script])?.success().map(drop)
}

fn luggage() -> Luggage {
    let programs = ACL_PROGRAMS
        .iter()
        .filter(|program| Path::new(program).is_file())
        .map(|program| Passenger { host: PathBuf::from(program), dpu: (*program).to_owned() })
        .collect();
    Luggage { programs, files: Vec::new() }
}

/// Checks that the DPU's kernel has nothing to complain about.
///
/// # Errors
/// With the lines of its log that mean trouble.
pub fn check_kernel_log(dpu: &Dpu) -> Result<()> {
    let found = dpu.run(&["sh", "-c", &format!("dmesg | grep -E -A 12 '{KERNEL_TROUBLE}'")])?;
    match found.code {
        Some(1) if found.stdout.is_empty() => Ok(()),
        _ => bail!("the DPU's kernel complains:\n{}{}", found.stdout, found.stderr),
    }
}

/// A daemon, a DPU, and the export mounted in it.
#[derive(Debug)]
pub struct Session {
    /// The DPU.
    pub dpu: Dpu,
    /// The daemon.
    pub daemon: Daemon,
    /// The export.
    pub export: Scratch,
    suites: bool,
}

impl Session {
    /// Starts all of it.
    ///
    /// # Errors
    /// When a part does not come up.
    pub fn start(lab: &Lab, profile: &Profile) -> Result<Self> {
        let export = lab.export()?;
        let daemon = lab.start_daemon(export.path(), profile.daemon)?;
        let mut config = lab.dpu_config(profile.kernel, daemon.socket())?;
        config.memory = profile.memory;
        config.processors = profile.processors;
        for device in &mut config.devices {
            device.request_queues = profile.request_queues;
        }
        if profile.suites {
            config.memory_mib = SUITES_MEMORY_MIB;
            config.disks.push(suites::debian_image(&lab.cache)?);
            for program in [suites::PJDFSTEST, suites::FSX] {
                config.luggage.programs.push(suite_program(program.get(&lab.cache)?, program.name));
            }
            config.luggage.programs.push(suite_program(PathBuf::from(SLEEP), "sleep"));
        }
        let dpu = lab.boot_and_mount(&config).with_context(|| daemon.log_tail())?;
        if profile.suites {
            enter_debian(&dpu)?;
        }
        Ok(Self { dpu, daemon, export, suites: profile.suites })
    }

    /// A directory of the export for one case, and both sides of it.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn stage(&mut self, name: &str) -> Result<Stage<'_>> {
        let directory = self.export.join(name);
        fs::create_dir(&directory).with_context(|| format!("cannot create {}", directory.display()))?;
        open_to_all(&directory)?;
        Ok(Stage {
            host: HostSide::new(&directory)?,
            dpu: DpuSide::new(&self.dpu, &format!("{MOUNT}/{name}")),
            daemon: &mut self.daemon,
        })
    }

    /// True if daemon and DPU can still be used.
    pub fn is_usable(&mut self) -> bool {
        let alive = self.daemon.check_alive().is_ok();
        let answers = self
            .dpu
            .run_program(crate::dpu::program(&["stat", "-f", MOUNT]), std::time::Duration::from_secs(10));
        alive && answers.is_ok_and(|finished| finished.code == Some(0))
    }

    /// Ends it in order: unmount, switch off, and the daemon ends by itself with code 0.
    ///
    /// # Errors
    /// When a step fails or the DPU's kernel complained.
    pub fn end(mut self) -> Result<()> {
        self.daemon.check_alive()?;
        if self.suites {
            self.dpu.run(&["umount", &format!("{DEBIAN}{MOUNT}")])?.success()?;
        }
        unmount(&self.dpu)?;
        check_kernel_log(&self.dpu)?;
        self.dpu.power_off()?;
        self.daemon.expect_end()
    }
}

/// What a case of a session gets.
#[derive(Debug)]
pub struct Stage<'session> {
    /// Its directory as the host sees it.
    pub host: HostSide,
    /// The same directory as the DPU sees it.
    pub dpu: DpuSide<'session>,
    /// The daemon.
    pub daemon: &'session mut Daemon,
}
