//! The lines that give a DPU (a QEMU or libvirt machine) shared memory, on hugepages or not. Pure: nothing is looked
//! up, so that the lines can be made for another host.

#![forbid(unsafe_code)]

use std::fmt::Write as _;
use std::path::PathBuf;

use crate::size::{Bytes, PageSize, compact};

/// Where QEMU takes the memory from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Backend {
    /// A memfd: no path, no mount, no permissions to set. What to use unless something asks for a file.
    Memfd,
    /// A file in this directory: a hugetlbfs mount, or a tmpfs such as `/dev/shm`.
    File(PathBuf),
}

/// How the memory becomes the machine's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    /// `-machine memory-backend=ID` (QEMU 5.0 and later).
    Machine,
    /// `-numa node,memdev=ID`: older QEMU, and machines that have a NUMA layout anyway.
    Numa,
}

/// The memory of one DPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DpuMemory {
    /// Bytes.
    pub size: u64,
    /// Hugepages of this size, or base pages.
    pub page: Option<PageSize>,
    /// Where it comes from.
    pub backend: Backend,
    /// Host nodes to take it from; none means wherever the process runs.
    pub nodes: Vec<u32>,
    /// Take all pages at the start.
    pub prealloc: bool,
    /// The object's id.
    pub id: String,
    /// How it becomes the machine's.
    pub attach: Attach,
}

/// Why there are no such lines.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QemuError {
    /// The size does not fit the pages.
    #[error("{} is not a whole number of hugepages of {page}: use {}{}", Bytes(*size),
        if below == above { String::new() } else { format!("{} or ", compact(*below)) }, compact(*above))]
    Misaligned {
        /// Bytes wanted.
        size: u64,
        /// The page size.
        page: PageSize,
        /// The next size below that fits; the same as `above` if there is none.
        below: u64,
        /// The next size above.
        above: u64,
    },
    /// QEMU counts memory in MiB at best and machines want whole base pages.
    #[error("{} is not a whole number of MiB, as a machine's memory must be", Bytes(*.0))]
    NotMib(u64),
    /// An id that would break the option.
    #[error("the id `{0}` must begin with a letter and have only letters, digits, `-`, `.` and `_`")]
    BadId(String),
    /// libvirt chooses the directory by itself.
    #[error(
        "libvirt places files by itself (hugetlbfs_mount and memory_backing_dir in /etc/libvirt/qemu.conf): leave out the directory"
    )]
    LibvirtPath,
}

impl DpuMemory {
    fn check(&self) -> Result<(), QemuError> {
        if !self.size.is_multiple_of(1 << 20) || self.size == 0 {
            return Err(QemuError::NotMib(self.size));
        }
        if let Some(page) = self.page.filter(|p| !self.size.is_multiple_of(p.bytes())) {
            let above = self.size.next_multiple_of(page.bytes());
            let below = if above > page.bytes() { above - page.bytes() } else { above };
            return Err(QemuError::Misaligned { size: self.size, page, below, above });
        }
        let good = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        if !self.id.starts_with(|c: char| c.is_ascii_alphabetic()) || !self.id.chars().all(good) {
            return Err(QemuError::BadId(self.id.clone()));
        }
        Ok(())
    }

    /// QEMU's arguments, one string each.
    pub fn qemu_args(&self) -> Result<Vec<String>, QemuError> {
        self.check()?;
        let size = compact(self.size);
        let id = &self.id;
        let mut object = match &self.backend {
            Backend::Memfd => format!("memory-backend-memfd,id={id},size={size},share=on"),
            Backend::File(path) => {
                // A comma inside a value is doubled.
                let path = path.display().to_string().replace(',', ",,");
                format!("memory-backend-file,id={id},size={size},mem-path={path},share=on")
            }
        };
        if let (Some(page), Backend::Memfd) = (self.page, &self.backend) {
            let _ = write!(object, ",hugetlb=on,hugetlbsize={page}");
        }
        if self.prealloc {
            object.push_str(",prealloc=on");
        }
        for node in &self.nodes {
            let _ = write!(object, ",host-nodes={node}");
        }
        match self.nodes.len() {
            0 => {}
            1 => object.push_str(",policy=bind"),
            _ => object.push_str(",policy=interleave"),
        }
        let attach = match self.attach {
            Attach::Machine => ["-machine".to_owned(), format!("memory-backend={id}")],
            Attach::Numa => ["-numa".to_owned(), format!("node,memdev={id}")],
        };
        let mut args = vec!["-m".to_owned(), size, "-object".to_owned(), object];
        args.extend(attach);
        Ok(args)
    }

    /// The elements to put into libvirt's `<domain>`.
    pub fn libvirt_xml(&self) -> Result<String, QemuError> {
        self.check()?;
        if matches!(self.backend, Backend::File(_)) {
            return Err(QemuError::LibvirtPath);
        }
        let mut xml = format!("<memory unit='MiB'>{}</memory>\n<memoryBacking>\n", self.size >> 20);
        if let Some(page) = self.page {
            let short = page.to_string();
            let (number, unit) = short.split_at(short.len() - 1);
            let _ = writeln!(xml, "  <hugepages>\n    <page size='{number}' unit='{unit}'/>\n  </hugepages>");
        }
        xml.push_str("  <source type='memfd'/>\n  <access mode='shared'/>\n");
        if self.prealloc {
            xml.push_str("  <allocation mode='immediate'/>\n");
        }
        xml.push_str("</memoryBacking>\n");
        if !self.nodes.is_empty() {
            let list = self.nodes.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
            let mode = if self.nodes.len() == 1 { "strict" } else { "interleave" };
            let _ = writeln!(xml, "<numatune>\n  <memory mode='{mode}' nodeset='{list}'/>\n</numatune>");
        }
        Ok(xml)
    }
}

/// Arguments as one line for a POSIX shell.
pub fn shell_line(args: &[String]) -> String {
    let quote = |arg: &String| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=,./:+@%".contains(c);
        if !arg.is_empty() && arg.chars().all(plain) {
            arg.clone()
        } else {
            format!("'{}'", arg.replace('\'', "'\\''"))
        }
    };
    args.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> DpuMemory {
        DpuMemory {
            size: 4 << 30,
            page: Some(PageSize::M2),
            backend: Backend::Memfd,
            nodes: vec![],
            prealloc: true,
            id: "mem".into(),
            attach: Attach::Machine,
        }
    }

    #[test]
    fn hugepage_lines_for_qemu() {
        assert_eq!(
            shell_line(&memory().qemu_args().unwrap()),
            "-m 4G -object memory-backend-memfd,id=mem,size=4G,share=on,hugetlb=on,hugetlbsize=2M,prealloc=on -machine \
             memory-backend=mem"
        );
        let numa = DpuMemory { nodes: vec![1], attach: Attach::Numa, page: Some(PageSize::G1), ..memory() };
        assert_eq!(
            numa.qemu_args().unwrap()[3..],
            [
                "memory-backend-memfd,id=mem,size=4G,share=on,hugetlb=on,hugetlbsize=1G,prealloc=on,host-nodes=1,policy=bind",
                "-numa",
                "node,memdev=mem"
            ]
        );
    }

    #[test]
    fn a_file_backend_names_the_directory() {
        let file = DpuMemory {
            backend: Backend::File("/mnt/a,b c".into()),
            nodes: vec![0, 1],
            prealloc: false,
            ..memory()
        };
        let args = file.qemu_args().unwrap();
        assert_eq!(
            args[3],
            "memory-backend-file,id=mem,size=4G,mem-path=/mnt/a,,b c,share=on,host-nodes=0,host-nodes=1,policy=interleave"
        );
        assert!(shell_line(&args).contains("'memory-backend-file,"));
        assert_eq!(file.libvirt_xml(), Err(QemuError::LibvirtPath));
    }

    #[test]
    fn elements_for_libvirt() {
        let xml = DpuMemory { nodes: vec![0], page: Some(PageSize::G1), ..memory() }.libvirt_xml().unwrap();
        assert_eq!(
            xml,
            "<memory unit='MiB'>4096</memory>\n<memoryBacking>\n  <hugepages>\n    <page size='1' unit='G'/>\n  \
             </hugepages>\n  <source type='memfd'/>\n  <access mode='shared'/>\n  <allocation mode='immediate'/>\n\
             </memoryBacking>\n<numatune>\n  <memory mode='strict' nodeset='0'/>\n</numatune>\n"
        );
        let plain = DpuMemory { page: None, prealloc: false, ..memory() }.libvirt_xml().unwrap();
        assert!(!plain.contains("hugepages") && plain.contains("<access mode='shared'/>"), "{plain}");
    }

    #[test]
    fn sizes_and_ids_that_qemu_would_refuse_are_refused() {
        let odd = DpuMemory { size: (4 << 30) + (1 << 20), ..memory() };
        assert_eq!(
            odd.qemu_args().unwrap_err().to_string(),
            "4.00 GiB is not a whole number of hugepages of 2M: use 4G or 4098M"
        );
        let small = DpuMemory { size: 512 << 20, page: Some(PageSize::G1), ..memory() };
        assert!(small.qemu_args().unwrap_err().to_string().ends_with("use 1G"));
        assert!(matches!(DpuMemory { size: 4096, ..memory() }.qemu_args(), Err(QemuError::NotMib(_))));
        assert!(matches!(DpuMemory { id: "a,b".into(), ..memory() }.qemu_args(), Err(QemuError::BadId(_))));
    }

    #[test]
    fn quoting_survives_a_shell() {
        let args = ["a b".to_owned(), "it's".to_owned(), String::new(), "x=1,y".to_owned()];
        let line = shell_line(&args);
        let echoed = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("printf '%s\\n' {line}"))
            .output()
            .unwrap();
        assert_eq!(String::from_utf8(echoed.stdout).unwrap(), "a b\nit's\n\nx=1,y\n");
    }
}
