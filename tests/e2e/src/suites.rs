//! Third-party suites for the DPU: programs from crates.io, and a Debian root with programs from its packages.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::{self, Apt, run_tool};
use crate::cache::Cache;

/// A program on crates.io.
#[derive(Clone, Copy, Debug)]
pub struct CrateProgram {
    /// Name of the crate and of its program.
    pub name: &'static str,
    /// Its version; the lock file that comes with it is used.
    pub version: &'static str,
}

/// Tests of POSIX semantics.
pub const PJDFSTEST: CrateProgram = CrateProgram { name: "pjdfstest", version: "0.2.2" };

/// The file system exerciser: random operations on one file, each read compared with what was written.
pub const FSX: CrateProgram = CrateProgram { name: "fsx", version: "0.3.2" };

impl CrateProgram {
    /// The program's file, built if it is not in the cache.
    ///
    /// # Errors
    /// When cargo fails.
    pub fn get(self, cache: &Cache) -> Result<PathBuf> {
        let place = cache.directory(&format!("{}-{}", self.name, self.version), |draft| {
            let crate_version = format!("{}@{}", self.name, self.version);
            let target = draft.join("target");
            run_tool(
                Command::new("cargo")
                    .args(["install", "--quiet", "--locked", "--root"])
                    .arg(draft)
                    .arg(&crate_version)
                    .env("CARGO_TARGET_DIR", &target),
            )
            .with_context(|| format!("cannot build {crate_version}"))?;
            fs::remove_dir_all(&target).context("cannot remove the build directory")
        })?;
        Ok(place.join("bin").join(self.name))
    }
}

/// What is in the Debian root besides what these depend on.
const PACKAGES: [&str; 11] = [
    "coreutils",
    "dash",
    "dbench",
    "diffutils",
    "fio",
    "findutils",
    "git",
    "grep",
    "sed",
    "sqlite3",
    "stress-ng",
];

/// What is left out: no program reads it.
const LEFT_OUT: [&str; 5] =
    ["usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man", "usr/share/lintian"];

/// Directories of the merged `/usr` that older paths lead to.
const MERGED: [&str; 4] = ["bin", "lib", "lib64", "sbin"];

/// Where the root is mounted in the DPU.
pub const DEBIAN: &str = "/debian";

/// Bytes that the image has free for the file system's own needs.
const IMAGE_SLACK: u64 = 64 << 20;

/// A Debian root as a disk image (ext4, to be mounted read-only).
///
/// The packages are unpacked, not installed: no maintainer script runs.
///
/// # Errors
/// When packages cannot be fetched or the image cannot be made.
pub fn debian_image(cache: &Cache) -> Result<PathBuf> {
    let place = cache.directory("debian-root", |draft| {
        let apt = Apt::open(&cache.join("apt"))?;
        let packages = apt.fetch_with_dependencies(&PACKAGES)?;
        let root = draft.join("root");
        make_root(&root)?;
        for package in &packages {
            apt::unpack(package, &root)?;
        }
        for path in LEFT_OUT {
            match fs::remove_dir_all(root.join(path)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {path}"));
                }
                _ => {}
            }
        }
        make_image(&root, &draft.join("root.ext4"))?;
        fs::remove_dir_all(&root).context("cannot remove the unpacked root")
    })?;
    Ok(place.join("root.ext4"))
}

fn make_root(root: &Path) -> Result<()> {
    for directory in ["dev", "etc", "mnt", "proc", "root", "sys", "tmp", "var/tmp", "run"] {
        let path = root.join(directory);
        fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
    }
    for name in MERGED {
        let target = Path::new("usr").join(name);
        fs::create_dir_all(root.join(&target)).with_context(|| format!("cannot create {name}"))?;
        symlink(&target, root.join(name)).with_context(|| format!("cannot link {name}"))?;
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
        .context("cannot write passwd")?;
    fs::write(root.join("etc/group"), "root:x:0:\nnogroup:x:65534:\n").context("cannot write group")
}

fn make_image(root: &Path, image: &Path) -> Result<()> {
    let used = run_tool(Command::new("du").args(["-sb", "--apparent-size"]).arg(root))?;
    let used: u64 =
        used.split_whitespace().next().unwrap_or_default().parse().context("du printed no number")?;
    // Small files round up to blocks, and the inode table takes its part.
    let size = (used + used / 4 + IMAGE_SLACK) >> 10;
    let mke2fs = ["/sbin/mke2fs", "/usr/sbin/mke2fs"].iter().find(|path| Path::new(path).is_file());
    let mke2fs = mke2fs.context("mke2fs is missing: run `tests/setup packages` to install what is needed")?;
    run_tool(
        Command::new(mke2fs)
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
            .arg(root)
            .arg(image)
            .arg(format!("{size}k")),
    )
    .map(drop)
}
