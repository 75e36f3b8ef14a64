//! `dpu-e2e`: runs the cases in the emulated DPU; inside of it, its init and agent.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use e2e::cache::Cache;
use e2e::cases::{self, Case, Group};
use e2e::kernel::{Kernel, KernelLine};
use e2e::lab::Lab;
use e2e::runner::{Outcome, Score, run};
use e2e::suites;
use e2e::verbs::Verb;

/// Names the daemon under test if `--daemon` does not.
const DAEMON_VARIABLE: &str = "BACKEND_FS";

/// Exit code after a signal, as shells have it.
const EXIT_AFTER_SIGNAL: i32 = 130;

/// Runs a vhost-user file-system daemon against an emulated DPU: QEMU with a stock Debian kernel.
#[derive(Debug, Parser)]
#[command(name = "dpu-e2e", version, max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run cases and print a table; exit code 1 if one fails.
    Run {
        /// Only the case of this name; may be repeated.
        #[arg(long = "case", value_name = "NAME")]
        cases: Vec<String>,
        /// Only the cases of this group.
        #[arg(long)]
        group: Option<Group>,
        /// Kernel of the DPU where a case does not need a certain one.
        #[arg(long, default_value = "6.1")]
        kernel: KernelLine,
        /// The daemon under test [default: $BACKEND_FS, or backend-fs next to this program].
        #[arg(long, value_name = "PATH")]
        daemon: Option<PathBuf>,
        /// Print one JSON object in place of the table.
        #[arg(long)]
        json: bool,
    },
    /// Boot a DPU, mount an export, work in it, and show what came out.
    Demo {
        /// Kernel of the DPU.
        #[arg(long, default_value = "6.1")]
        kernel: KernelLine,
        /// The daemon to show [default: $BACKEND_FS, or backend-fs next to this program].
        #[arg(long, value_name = "PATH")]
        daemon: Option<PathBuf>,
    },
    /// Fetch and build what the cases need, so that later runs need no network.
    Fetch,
    /// List the cases.
    List,
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
        Ok(code) => code,
        Err(error) => {
            eprintln!("dpu-e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn perform(task: Task) -> Result<ExitCode> {
    match task {
        Task::Run { cases, group, kernel, daemon, json } => {
            let chosen = choose(&cases, group)?;
            clean_up_on_signals();
            run_cases(&chosen, kernel, &daemon_path(daemon)?, json)
        }
        Task::Demo { kernel, daemon } => {
            clean_up_on_signals();
            let passed = e2e::demo::run(&Lab::new(&daemon_path(daemon)?, kernel)?)?;
            Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Task::Fetch => {
            let cache = Cache::open()?;
            for line in [KernelLine::V6_1, KernelLine::V6_12] {
                println!("Linux {}", Kernel::get(&cache, line)?.release);
            }
            for program in [suites::PJDFSTEST, suites::FSX] {
                println!("{}", program.get(&cache)?.display());
            }
            println!("{}", suites::debian_image(&cache)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::List => {
            for case in cases::all() {
                println!("{:18} {}", case.name, case.about);
            }
            Ok(ExitCode::SUCCESS)
        }
        Task::Do { verb } => verb.perform().map(|()| ExitCode::SUCCESS),
        Task::Agent { port } => e2e::agent::serve(&port).map(|()| ExitCode::SUCCESS),
    }
}

fn choose(names: &[String], group: Option<Group>) -> Result<Vec<Case>> {
    let all = cases::all();
    if let Some(unknown) = names.iter().find(|name| !all.iter().any(|case| case.name == **name)) {
        bail!("there is no case {unknown}; `dpu-e2e list` names them");
    }
    let wanted = |case: &Case| {
        (names.is_empty() || names.iter().any(|name| name == case.name))
            && group.is_none_or(|group| case.group == group)
    };
    Ok(all.into_iter().filter(wanted).collect())
}

fn daemon_path(given: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(path) = given.or_else(|| std::env::var_os(DAEMON_VARIABLE).map(PathBuf::from)) {
        return Ok(path);
    }
    let own = std::env::current_exe().context("cannot find this program's own file")?;
    let path = own.with_file_name("backend-fs");
    if !path.is_file() {
        bail!(
            "there is no daemon at {}: build it (cargo build -p backend-fs) or give --daemon",
            path.display()
        );
    }
    Ok(path)
}

fn run_cases(cases: &[Case], kernel: KernelLine, daemon: &Path, json: bool) -> Result<ExitCode> {
    let lab = Lab::new(daemon, kernel)?;
    let report = run(&lab, cases, tell);
    if json {
        println!("{}", serde_json::to_string_pretty(&report).context("cannot write the report")?);
    } else {
        println!("{}", report.table());
    }
    Ok(if report.is_fine() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Progress goes to the error output, so that the report stands alone on the standard output.
fn tell(score: &Score) {
    let word = match score.outcome {
        Outcome::Pass => "pass",
        Outcome::Fail => "FAIL",
        Outcome::KnownDifference => "differs",
        Outcome::ListOutOfDate => "passes although listed as differing",
    };
    eprintln!("{:18} {word} ({:.1} s) {}", score.case, score.seconds, score.note);
}

/// A thread waits for termination signals, gives back what was taken, and ends the program.
fn clean_up_on_signals() {
    e2e::sys::block_termination_signals();
    std::thread::spawn(|| {
        if e2e::sys::wait_termination_signal().is_ok() {
            eprintln!("dpu-e2e: interrupted, cleaning up");
            e2e::registry::tear_down();
            #[expect(clippy::exit, reason = "the other threads wait for processes that are gone")]
            std::process::exit(EXIT_AFTER_SIGNAL);
        }
    });
}
