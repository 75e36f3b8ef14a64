//! `dpu-e2e`: runs the cases in the emulated DPU; inside of it, its init and agent.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use e2e::verbs::Verb;

/// Runs test cases in an emulated DPU.
#[derive(Debug, Parser)]
#[command(name = "dpu-e2e", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boot a DPU, mount an export, switch off.
    Try {
        #[arg(long)]
        daemon: PathBuf,
        #[arg(long, default_value = "6.1")]
        kernel: e2e::kernel::KernelLine,
        #[arg(long)]
        huge: bool,
    },
    /// Do one file operation (on either side).
    #[command(hide = true)]
    Do {
        #[command(subcommand)]
        verb: Verb,
    },
    /// Take orders from the host (in the DPU).
    #[command(hide = true)]
    Agent {
        /// The port of the protocol.
        port: PathBuf,
    },
}

fn main() -> ExitCode {
    if std::process::id() == 1 {
        if let Err(error) = e2e::agent::init() {
            eprintln!("dpu-e2e: {error:#}");
        }
        e2e::agent::power_off();
        return ExitCode::FAILURE;
    }
    match perform(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dpu-e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<()> {
    match task {
        Task::Try { daemon, kernel, huge } => try_it(&daemon, kernel, huge),
        Task::Do { verb } => verb.perform(),
        Task::Agent { port } => e2e::agent::serve(&port),
    }
}

fn try_it(daemon: &std::path::Path, line: e2e::kernel::KernelLine, huge: bool) -> Result<()> {
    use e2e::{cache::Cache, daemon::*, dpu::*, initramfs::Base, kernel::Kernel, registry::Scratch};
    let cache = Cache::open()?;
    let t = std::time::Instant::now();
    let kernel = Kernel::get(&cache, line)?;
    eprintln!("kernel {} {:?}", kernel.release, t.elapsed());
    let scratch = Scratch::new("base")?;
    let base = Base::pack(scratch.path())?;
    eprintln!("base {:?}", t.elapsed());
    let export = Scratch::new("export")?;
    let program = DaemonProgram::at(daemon)?;
    let mut daemon = Daemon::start(&program, export.path(), &[])?;
    let mut config = DpuConfig::new(&kernel);
    if huge {
        config.memory = Memory::Hugepages;
    }
    config.devices.push(FsDevice::new(daemon.socket(), "export"));
    let dpu = Dpu::boot(&base, &config)?;
    eprintln!("boot {:?} {}", dpu.boot_time, dpu.kernel);
    dpu.run(&["mount", "-t", "virtiofs", "export", "/mnt"])?.success()?;
    dpu.run(&["sh", "-c", "echo from the DPU > /mnt/hello"])?.success()?;
    eprintln!("host sees {:?}", std::fs::read_to_string(export.join("hello"))?);
    eprintln!("{}", dpu.run(&["sh", "-c", "df -h /mnt; id; uname -a; lsmod"])?.success()?);
    dpu.run(&["umount", "/mnt"])?.success()?;
    dpu.power_off()?;
    daemon.expect_end()?;
    eprintln!("all {:?}", t.elapsed());
    Ok(())
}
