//! An attacker in the DPU: chains and ring states that no driver makes.
