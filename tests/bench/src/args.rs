//! Command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

/// Measures the daemons side by side with their peers and with the bare system calls.
#[derive(Debug, Parser)]
#[command(version, disable_help_subcommand = true)]
pub struct Arguments {
    /// What to measure.
    #[command(subcommand)]
    pub subject: Subject,
}

/// What to measure.
#[derive(Debug, Subcommand)]
pub enum Subject {
    /// backend-fs against virtiofsd 1.14, the C virtiofsd 7.2 and the bare system calls
    Fs(FsArguments),
}

/// Options of `bench fs`.
#[derive(Debug, Args)]
pub struct FsArguments {
    /// The backend-fs to measure
    #[arg(long, value_name = "FILE", default_value = "target/release/backend-fs")]
    pub ours: PathBuf,

    /// virtiofsd 1.14
    #[arg(long, value_name = "FILE", env = "VIRTIOFSD", default_value = ".cache/peers/bin/virtiofsd")]
    pub virtiofsd: PathBuf,

    /// The C virtiofsd of QEMU 7.2 (Debian package qemu-system-common)
    #[arg(long, value_name = "FILE", default_value = "/usr/lib/qemu/virtiofsd")]
    pub c_virtiofsd: PathBuf,

    /// Only these rows, by number (F1,F5) or part of their name
    #[arg(long, value_name = "ROWS", value_delimiter = ',')]
    pub only: Vec<String>,

    /// A short look: 3 rounds of 0.1 s. The figures are rough
    #[arg(long)]
    pub quick: bool,

    /// Rounds per row; the order is peer, peer, peer, ours, limit in each
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub rounds: u32,

    /// Length of one round
    #[arg(long, value_name = "SECONDS", default_value_t = 0.4)]
    pub seconds: f64,

    /// Write the figures of every round to FILE as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// List the rows and their goals, measure nothing
    #[arg(long)]
    pub list: bool,

    /// Exit with 1 if a row misses its goal
    #[arg(long)]
    pub gate: bool,
}

impl FsArguments {
    /// Rounds to run.
    pub fn rounds(&self) -> u32 {
        if self.quick { 3 } else { self.rounds }
    }

    /// Length of a round.
    pub fn round_length(&self) -> Duration {
        if self.quick {
            Duration::from_millis(100)
        } else {
            Duration::from_secs_f64(self.seconds.clamp(0.01, 60.0))
        }
    }
}
