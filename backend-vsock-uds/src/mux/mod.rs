//! All connections of one DPU.

pub mod deadline;
pub mod rxq;
pub mod table;
