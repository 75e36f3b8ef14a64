//! The DPU memory that a front end shared.

/// The memory table of one front end. Immutable: a change of regions makes a new table.
#[derive(Debug)]
pub struct DpuMemory {}
