//! A stock Debian kernel for the emulated DPU: image, release name and the modules that it needs, in an order in
//! which they can be loaded.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::apt::{self, Apt, run_tool};
use crate::cache::Cache;
use crate::cpio::Archive;

/// What the DPU needs from its kernel beyond what is built in.
const WANTED: [&str; 5] = ["virtio_pci", "virtio_console", "virtiofs", "virtio_blk", "overlay"];

/// Where the modules lie in the initramfs; loaded in the order of their names.
pub const MODULE_DIRECTORY: &str = "modules";

/// The package that follows the newest cloud kernel of its suite.
const META_PACKAGE: &str = "linux-image-cloud-amd64";

/// A kernel line that the cases run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub enum KernelLine {
    /// Debian bookworm: one request queue per device.
    #[serde(rename = "6.1")]
    V6_1,
    /// Debian bookworm-backports: several request queues (since Linux 6.11).
    #[serde(rename = "6.12")]
    V6_12,
}

impl KernelLine {
    /// The part of the version that stays the same.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
        }
    }
}

impl fmt::Display for KernelLine {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}

impl FromStr for KernelLine {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "6.1" => Ok(Self::V6_1),
            "6.12" => Ok(Self::V6_12),
            _ => Err("6.1 or 6.12 expected".to_owned()),
        }
    }
}

/// A kernel ready to boot.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// Which line it belongs to.
    pub line: KernelLine,
    /// The compressed image as Debian ships it.
    pub image: PathBuf,
    /// A cpio archive with the modules.
    pub modules: PathBuf,
    /// `uname -r`.
    pub release: String,
}

impl Kernel {
    /// The newest kernel of a line, from the cache or from Debian.
    ///
    /// # Errors
    /// When the package cannot be fetched or lacks something.
    pub fn get(cache: &Cache, line: KernelLine) -> Result<Self> {
        let place = cache.directory(&format!("kernel-{line}"), |draft| {
            build(&cache.join("apt"), line, draft)
                .with_context(|| format!("cannot get the Linux {line} kernel"))
        })?;
        let release =
            fs::read_to_string(place.join("release")).context("cannot read the kernel's release")?;
        Ok(Self { line, image: place.join("vmlinuz"), modules: place.join("modules.cpio"), release })
    }
}

fn build(apt_home: &Path, line: KernelLine, draft: &Path) -> Result<()> {
    let apt = Apt::open(apt_home)?;
    let prefix = format!("{line}.");
    let versions = apt.versions(META_PACKAGE)?;
    // apt lists the newest version first.
    let Some((version, depends)) = versions.iter().find(|(version, _)| version.starts_with(&prefix)) else {
        bail!("no version of {META_PACKAGE} is of line {line}: {versions:?}");
    };
    let package = depends
        .split(',')
        .filter_map(|dependency| dependency.split_whitespace().next())
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("{META_PACKAGE} {version} depends on no kernel: {depends:?}"))?;
    let release = package.trim_start_matches("linux-image-");
    let files = apt.fetch(&[package])?;
    let unpacked = draft.join("package");
    for file in &files {
        apt::unpack(file, &unpacked)?;
    }
    fs::rename(unpacked.join(format!("boot/vmlinuz-{release}")), draft.join("vmlinuz"))
        .with_context(|| format!("{package} holds no kernel image"))?;
    pack_modules(&unpacked.join("lib/modules").join(release), &draft.join("modules.cpio"))?;
    fs::write(draft.join("release"), release).context("cannot write the release")?;
    fs::remove_dir_all(&unpacked).context("cannot remove the unpacked package")
}

fn pack_modules(tree: &Path, archive: &Path) -> Result<()> {
    let mut shelf = Shelf { files: BTreeMap::new(), builtin: Vec::new(), loaded: Vec::new() };
    shelf.scan(&tree.join("kernel"))?;
    let builtin = tree.join("modules.builtin");
    let text = fs::read_to_string(&builtin).with_context(|| format!("cannot read {}", builtin.display()))?;
    shelf.builtin = text.lines().map(|line| module_name(Path::new(line))).collect();
    for name in WANTED {
        shelf.load(name)?;
    }
    let file = fs::File::create(archive).with_context(|| format!("cannot create {}", archive.display()))?;
    let mut cpio = Archive::new(BufWriter::new(file));
    for (index, (name, content)) in shelf.loaded.iter().enumerate() {
        cpio.file(&format!("{MODULE_DIRECTORY}/{index:02}-{name}.ko"), 0o644, content)?;
    }
    cpio.finish().context("cannot write the modules")?;
    Ok(())
}

/// The module files of a kernel, and those taken so far with what they depend on before them.
struct Shelf {
    files: BTreeMap<String, PathBuf>,
    builtin: Vec<String>,
    loaded: Vec<(String, Vec<u8>)>,
}

impl Shelf {
    fn scan(&mut self, directory: &Path) -> Result<()> {
        let entries =
            fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))?;
        for entry in entries {
            let path = entry.with_context(|| format!("cannot list {}", directory.display()))?.path();
            if path.is_dir() {
                self.scan(&path)?;
            } else {
                self.files.insert(module_name(&path), path);
            }
        }
        Ok(())
    }

    fn load(&mut self, name: &str) -> Result<()> {
        if self.loaded.iter().any(|(loaded, _)| loaded == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            if self.builtin.iter().any(|builtin| builtin == name) {
                return Ok(());
            }
            bail!("the kernel has no module {name}, and it is not built in");
        };
        let content = read_module(path)?;
        for dependency in module_dependencies(&content)? {
            self.load(&dependency)?;
        }
        self.loaded.push((name.to_owned(), content));
        Ok(())
    }
}

/// The name by which modules refer to each other: without suffixes, dashes as underscores.
fn module_name(path: &Path) -> String {
    let file = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = file.split(".ko").next().unwrap_or_default();
    stem.replace('-', "_")
}

fn read_module(path: &Path) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => {
            let output = Command::new("xz")
                .args(["--decompress", "--stdout"])
                .arg(path)
                .output()
                .context("cannot run xz: run `tests/setup packages` to install what is needed")?;
            if !output.status.success() {
                bail!("xz cannot unpack {}", path.display());
            }
            Ok(output.stdout)
        }
        Some("zst") => {
            let draft = path.with_extension("");
            run_tool(Command::new("zstd").args(["-d", "-q", "-f", "-o"]).arg(&draft).arg(path))?;
            fs::read(&draft).with_context(|| format!("cannot read {}", draft.display()))
        }
        _ => fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// The `depends=a,b` string of a module's `.modinfo` section.
fn module_dependencies(content: &[u8]) -> Result<Vec<String>> {
    const KEY: &[u8] = b"\0depends=";
    let start = content
        .windows(KEY.len())
        .position(|window| window == KEY)
        .context("a kernel module has no list of dependencies")?
        + KEY.len();
    let value = content[start..].split(|byte| *byte == 0).next().unwrap_or_default();
    let value = std::str::from_utf8(value).context("a kernel module's dependencies are not text")?;
    Ok(value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_are_read_from_modinfo() {
        let content = b"\x7fELF\0license=GPL\0depends=virtio,virtio-ring\0retpoline=Y\0";
        assert_eq!(module_dependencies(content).unwrap(), ["virtio", "virtio_ring"]);
        assert_eq!(module_dependencies(b"x\0depends=\0y").unwrap(), Vec::<String>::new());
        assert!(module_dependencies(b"nothing").is_err());
    }

    #[test]
    fn names_ignore_suffix_and_dashes() {
        assert_eq!(module_name(Path::new("a/virtio-rng.ko.xz")), "virtio_rng");
        assert_eq!(module_name(Path::new("kernel/fs/fuse/fuse.ko")), "fuse");
    }
}
