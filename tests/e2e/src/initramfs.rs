//! The first root file system of the emulated DPU: busybox, this program (as init, agent and tool), the modules
//! of its kernel, and whatever host programs a case takes along, each with the shared libraries it needs.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::run_tool;
use crate::cpio::Archive;
use crate::kernel::Kernel;

/// Where this program lies in the DPU.
pub const AGENT: &str = "/bin/dpu-e2e";

/// A statically linked busybox as Debian's busybox-static installs it.
const BUSYBOX: &str = "/usr/bin/busybox";

/// Directories that the agent mounts on or that programs expect.
const DIRECTORIES: [&str; 9] = ["dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "usr/sbin"];

/// Users and groups that conformance suites look up by name.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n\
                      tests:x:1001:1001:tests:/:/bin/sh\npjdfstest:x:1002:1002:pjdfstest:/:/bin/sh\n";
const GROUP: &str = "root:x:0:\nnogroup:x:65534:\ntests:x:1001:\npjdfstest:x:1002:\n";

/// A host program to take along.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passenger {
    /// Where it lies on the host.
    pub host: PathBuf,
    /// Where it will lie in the DPU.
    pub dpu: String,
}

/// Files to take along as they are: path in the DPU and content.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Luggage {
    /// Programs with their libraries.
    pub programs: Vec<Passenger>,
    /// Plain files.
    pub files: Vec<(String, Vec<u8>)>,
}

/// The part of the initramfs that is the same for all DPUs of one run of this program.
#[derive(Debug)]
pub struct Base {
    archive: PathBuf,
}

impl Base {
    /// Packs busybox and this program into `directory`.
    ///
    /// # Errors
    /// When a program is missing or cannot be read.
    pub fn pack(directory: &Path) -> Result<Self> {
        let archive = directory.join("base.cpio");
        let mut cpio = create(&archive)?;
        for path in DIRECTORIES {
            cpio.directory(path)?;
        }
        cpio.file("etc/passwd", 0o644, PASSWD.as_bytes())?;
        cpio.file("etc/group", 0o644, GROUP.as_bytes())?;
        let busybox = fs::read(BUSYBOX).with_context(|| {
            format!("{BUSYBOX} is missing: run `tests/setup packages` to install what is needed")
        })?;
        cpio.file("bin/busybox", 0o755, &busybox)?;
        for applet in run_tool(Command::new(BUSYBOX).arg("--list"))?.lines() {
            if applet != "busybox" {
                cpio.symlink(&format!("bin/{applet}"), "busybox")?;
            }
        }
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let stripped = directory.join("dpu-e2e.stripped");
        run_tool(Command::new("strip").arg("-o").arg(&stripped).arg(&program))?;
        let mut taken = BTreeSet::new();
        let passenger = Passenger { host: stripped.clone(), dpu: AGENT.to_owned() };
        add_program(&mut cpio, &passenger, &mut taken)?;
        cpio.symlink("init", AGENT)?;
        cpio.finish().context("cannot write the initramfs")?;
        fs::remove_file(&stripped).context("cannot remove the stripped program")?;
        Ok(Self { archive })
    }

    /// Writes the whole initramfs for one DPU to `target`.
    ///
    /// # Errors
    /// When something cannot be read or written.
    pub fn compose(&self, kernel: &Kernel, luggage: &Luggage, target: &Path) -> Result<()> {
        let mut out = File::create(target).with_context(|| format!("cannot create {}", target.display()))?;
        for part in [&self.archive, &kernel.modules] {
            let mut input = File::open(part).with_context(|| format!("cannot open {}", part.display()))?;
            std::io::copy(&mut input, &mut out).with_context(|| format!("cannot copy {}", part.display()))?;
        }
        let mut cpio = Archive::new(BufWriter::new(out));
        let mut taken = BTreeSet::new();
        for passenger in &luggage.programs {
            add_program(&mut cpio, passenger, &mut taken)?;
        }
        for (path, content) in &luggage.files {
            cpio.file(path, 0o644, content)?;
        }
        cpio.finish().context("cannot write the initramfs")?;
        Ok(())
    }
}

fn create(path: &Path) -> Result<Archive<BufWriter<File>>> {
    let file = File::create(path).with_context(|| format!("cannot create {}", path.display()))?;
    Ok(Archive::new(BufWriter::new(file)))
}

fn add_program<W: Write>(
    cpio: &mut Archive<W>,
    passenger: &Passenger,
    taken: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    let content =
        fs::read(&passenger.host).with_context(|| format!("cannot read {}", passenger.host.display()))?;
    cpio.file(&passenger.dpu, 0o755, &content)?;
    for library in shared_libraries(&passenger.host)? {
        if taken.insert(library.clone()) {
            let content = fs::read(&library).with_context(|| format!("cannot read {}", library.display()))?;
            cpio.file(&library.to_string_lossy(), 0o755, &content)?;
        }
    }
    Ok(())
}

/// The shared libraries of a program and its loader, by the paths under which the loader looks for them.
fn shared_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).env("LC_ALL", "C").output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let complaint = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        // What ldd says of a static program.
        if complaint.contains("not a dynamic executable") || text.contains("statically linked") {
            return Ok(Vec::new());
        }
        bail!("ldd cannot read {}: {}", program.display(), complaint.trim());
    }
    parse_ldd(&text).with_context(|| format!("{} cannot be taken along", program.display()))
}

/// Lines are `name => /path (address)`, `/loader (address)`, `linux-vdso… (address)`, `name => not found`.
fn parse_ldd(text: &str) -> Result<Vec<PathBuf>> {
    let mut libraries = Vec::new();
    for line in text.lines().map(str::trim) {
        let (name, path) = line.split_once(" => ").unwrap_or((line, line));
        let path = path.split(" (").next().unwrap_or(path);
        if path.starts_with("not found") {
            bail!("its library {name} is not installed");
        }
        if path.starts_with('/') {
            libraries.push(PathBuf::from(path));
        }
    }
    Ok(libraries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ldd_lines_give_libraries_and_loader() {
        let text = "\tlinux-vdso.so.1 (0x00007ffc)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f3e)\n\t/lib64/ld-linux-x86-64.so.2 (0x00007f3f)\n";
        let libraries = parse_ldd(text).unwrap();
        assert_eq!(
            libraries,
            [Path::new("/lib/x86_64-linux-gnu/libc.so.6"), Path::new("/lib64/ld-linux-x86-64.so.2")]
        );
        let error = parse_ldd("\tlibfoo.so.1 => not found\n").unwrap_err();
        assert!(error.to_string().contains("libfoo.so.1"));
    }

    #[test]
    fn a_static_program_needs_no_library() {
        assert_eq!(parse_ldd("\tstatically linked\n").unwrap(), Vec::<PathBuf>::new());
    }
}
