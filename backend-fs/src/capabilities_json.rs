//! What `--print-capabilities` prints: the answer of a vhost-user back-end program to management
//! software (QEMU's `docs/interop/vhost-user.json`, "Backend program conventions" of
//! `vhost-user.rst`).
#![forbid(unsafe_code)]

/// Features that libvirt, Incus and others look for before they use an option. Only what is true:
/// virtiofsd's `migrate-precopy` is missing as long as the device state cannot be transferred.
pub const FEATURES: [&str; 3] =
    ["posix-acl-negotiation-mode", "security-label-negotiation-mode", "separate-options"];

/// The JSON text, without a newline at the end. `type` comes first, as everybody else prints it.
pub fn text() -> String {
    let features = FEATURES.map(|feature| format!("    \"{feature}\"")).join(",\n");
    format!("{{\n  \"type\": \"fs\",\n  \"features\": [\n{features}\n  ]\n}}")
}
