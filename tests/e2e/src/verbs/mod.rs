//! Single file operations, run on the host and in the DPU alike: `dpu-e2e do VERB …`.

use anyhow::Result;
use clap::Subcommand;

use crate::agent::Enter;

/// What to do.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    /// Become another user or enter another root, then become a program.
    Enter(Enter),
}

impl Verb {
    /// Does it.
    ///
    /// # Errors
    /// When the operation fails.
    pub fn perform(&self) -> Result<()> {
        match self {
            Self::Enter(enter) => enter.become_program(),
        }
    }
}
