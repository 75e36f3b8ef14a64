//! The command line. No logic beyond reading values.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use hugepages::size::{Bytes, PageSize};
use hugepages::state::DEFAULT_STATE_DIR;

const EXAMPLES: &str = "\
Examples:
  dpu-hugepages doctor --size 4G           can a DPU with 4G of hugepages start here?
  dpu-hugepages reserve --size 4G          see that 4G of hugepages are free for it
  dpu-hugepages qemu-args --size 4G        the QEMU arguments that use them
  dpu-hugepages status                     pools, who holds pages, mounts
  dpu-hugepages release                    give back what was reserved

Exit status: 0 done (doctor: nothing failed), 1 it could not be done, 2 wrong use. After 1 or 2 from `reserve`
and `release` the pools are as before, unless the message says otherwise.";

/// Reserve, check and back the hugepage memory shared with a DPU.
#[derive(Debug, Parser)]
#[command(name = "dpu-hugepages", version, after_help = EXAMPLES, arg_required_else_help = true)]
pub struct Cli {
    /// Where it is noted what was reserved.
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub state_dir: PathBuf,
    /// Read and write /sys, /proc and /etc of this tree.
    #[arg(long, global = true, value_name = "DIR", default_value = "/", hide = true)]
    pub sysroot: PathBuf,
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Reserve(ReserveArgs),
    Release(ReleaseArgs),
    Status(StatusArgs),
    Mount(MountArgs),
    Umount(UmountArgs),
    QemuArgs(QemuArgs),
    LibvirtXml(LibvirtArgs),
    Persist(PersistArgs),
    Doctor(DoctorArgs),
    /// Print the completions for a shell.
    ///
    /// For example: dpu-hugepages completions bash > /etc/bash_completion.d/dpu-hugepages
    Completions {
        /// The shell.
        shell: Shell,
    },
    Man(ManArgs),
}

/// How much.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Amount {
    /// Memory, rounded up to whole pages: 512M, 2G, 1.5G.
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Bytes>,
    /// Number of hugepages.
    #[arg(long, value_name = "N")]
    pub pages: Option<u64>,
}

/// The same where it may be left out.
#[derive(Debug, Args)]
#[group(multiple = false)]
pub struct OptionalAmount {
    /// Memory, rounded up to whole pages.
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Bytes>,
    /// Number of hugepages.
    #[arg(long, value_name = "N")]
    pub pages: Option<u64>,
}

/// Take hugepages into the kernel's pools.
///
/// By default it sees that the amount is *available*: free and promised to nobody, so that a DPU of this size can
/// start now. Pages that are free already count, and asking twice changes nothing. --total asks for the size of the
/// pool instead, used pages included (as a boot script does), --add for so many more.
///
/// The pages are spread evenly over the NUMA nodes, or over those named. The kernel is asked in steps and what it
/// really gave is read back. If it gives less than asked, memory is compacted and it is asked again; if that does
/// not help, or on Ctrl-C, everything goes back and the reason is told.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dpu-hugepages reserve --size 2G                          2G of the default page size on all nodes
  dpu-hugepages reserve --pages 8 --page-size 1G --node 1  8G as 1G pages on node 1
  dpu-hugepages reserve --size 16G --total                 for a boot script: a pool of at least 16G")]
pub struct ReserveArgs {
    #[command(flatten)]
    pub amount: Amount,
    /// Size of one hugepage, such as 2M or 1G [default: the kernel's].
    #[arg(long, value_name = "SIZE")]
    pub page_size: Option<PageSize>,
    /// NUMA node to take pages from; may be repeated, or a list such as 0,1 [default: all nodes].
    #[arg(long = "node", value_name = "N", value_delimiter = ',')]
    pub nodes: Vec<u32>,
    /// The amount is the pool's least size, used pages included.
    #[arg(long, conflicts_with = "add")]
    pub total: bool,
    /// The amount comes on top of what there is.
    #[arg(long)]
    pub add: bool,
    /// Ask the kernel even where the memory figures say that it cannot succeed. This can starve the host for a moment.
    #[arg(long)]
    pub force: bool,
    /// Only show how many pages each node would get.
    #[arg(long)]
    pub dry_run: bool,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Give back what `reserve` took.
///
/// Without options: all of it. Pages that something else put into the pools are never touched, nor are pages in use:
/// then nothing is changed and the users are named. --lazy lets each page go as soon as its user ends.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dpu-hugepages release                             everything that was reserved
  dpu-hugepages release --page-size 2M --size 1G    a part of it
  dpu-hugepages release --node 1                    what was reserved on node 1")]
pub struct ReleaseArgs {
    #[command(flatten)]
    pub amount: OptionalAmount,
    /// Only hugepages of this size [default with --size or --pages: the kernel's default size].
    #[arg(long, value_name = "SIZE")]
    pub page_size: Option<PageSize>,
    /// Only pages on these NUMA nodes.
    #[arg(long = "node", value_name = "N", value_delimiter = ',')]
    pub nodes: Vec<u32>,
    /// Pages in use are given back when their user ends.
    #[arg(long)]
    pub lazy: bool,
    /// Print the result as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Show the pools, who holds hugepages, hugetlbfs mounts, and what was reserved.
///
/// As root, so that the memory of every process can be seen.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Print everything as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Mount a hugetlbfs.
///
/// Only needed by what names a path: QEMU's memory-backend-file, DPDK, libvirt without `<source type='memfd'/>`.
/// Mounting the same again changes nothing. The mount is gone after a boot; --fstab prints the line that keeps it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dpu-hugepages mount                                             /dev/hugepages, the default page size
  dpu-hugepages mount --page-size 1G --group kvm --mode 1770      /dev/hugepages-1G, for QEMU run by group kvm
  dpu-hugepages mount /mnt/dpu0 --size 4G --min-size 4G           4G of the pool, kept for this mount alone

libvirt finds hugetlbfs mounts by itself and makes its own directories below them.")]
pub struct MountArgs {
    /// Where [default: /dev/hugepages, or /dev/hugepages-SIZE for another than the default page size].
    pub path: Option<PathBuf>,
    /// Size of one hugepage [default: the kernel's].
    #[arg(long, value_name = "SIZE")]
    pub page_size: Option<PageSize>,
    /// The most it may hold [default: all there is].
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Bytes>,
    /// Take so much out of the pool for this mount alone.
    #[arg(long, value_name = "SIZE")]
    pub min_size: Option<Bytes>,
    /// Owner of its root directory, a name or a number.
    #[arg(long, value_name = "USER", default_value = "root")]
    pub owner: String,
    /// Group of its root directory, a name or a number.
    #[arg(long, value_name = "GROUP", default_value = "root")]
    pub group: String,
    /// Permissions of its root directory, octal.
    #[arg(long, value_name = "MODE", default_value = "0755", value_parser = parse_mode)]
    pub mode: u32,
    /// Mount nothing, print the line for /etc/fstab.
    #[arg(long)]
    pub fstab: bool,
}

/// Unmount a hugetlbfs.
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// Where it is mounted.
    pub path: PathBuf,
}

/// A hugepage size, or `none` for base pages.
#[derive(Debug, Clone, Copy)]
pub enum PageChoice {
    Plain,
    Huge(PageSize),
}

fn parse_page_choice(text: &str) -> Result<PageChoice, String> {
    match text {
        "none" => Ok(PageChoice::Plain),
        _ => text.parse().map(PageChoice::Huge).map_err(|e| format!("{e}; or `none` for plain memory")),
    }
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err("permissions are an octal number up to 7777, such as 0755 or 1770".to_owned()),
    }
}

/// How QEMU's machine gets the memory.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum AttachChoice {
    /// -machine memory-backend=ID
    Machine,
    /// -numa node,memdev=ID
    Numa,
}

/// The memory of a DPU.
#[derive(Debug, Args)]
pub struct MemoryArgs {
    /// The DPU's memory.
    #[arg(long, value_name = "SIZE")]
    pub size: Bytes,
    /// Size of one hugepage, or `none` for plain shared memory [default: the kernel's].
    #[arg(long, value_name = "SIZE", value_parser = parse_page_choice)]
    pub page_size: Option<PageChoice>,
    /// Host NUMA node to take the memory from; several are interleaved.
    #[arg(long = "node", value_name = "N", value_delimiter = ',')]
    pub nodes: Vec<u32>,
    /// Take pages only when the DPU touches them. It dies of SIGBUS if none is free then.
    #[arg(long)]
    pub no_prealloc: bool,
}

/// Print the QEMU arguments for a DPU's shared memory.
///
/// One line for a shell, to be added to the rest of the command line. Changes nothing.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  qemu-system-x86_64 $(dpu-hugepages qemu-args --size 4G) ...
  dpu-hugepages qemu-args --size 8G --page-size 1G --node 1
  dpu-hugepages qemu-args --size 512M --page-size none")]
pub struct QemuArgs {
    #[command(flatten)]
    pub memory: MemoryArgs,
    /// Use a file in this directory (a hugetlbfs mount, or /dev/shm) instead of a memfd.
    #[arg(long, value_name = "DIR")]
    pub mem_path: Option<PathBuf>,
    /// How the machine gets the memory; `numa` also works before QEMU 5.0.
    #[arg(long, value_enum, default_value = "machine")]
    pub attach: AttachChoice,
    /// Name of the memory object.
    #[arg(long, value_name = "ID", default_value = "mem")]
    pub id: String,
    /// Print a JSON array of arguments.
    #[arg(long)]
    pub json: bool,
}

/// Print the libvirt elements for a DPU's shared memory.
///
/// They go into `<domain>` (virsh edit), in place of those of the same name. Changes nothing.
#[derive(Debug, Args)]
pub struct LibvirtArgs {
    #[command(flatten)]
    pub memory: MemoryArgs,
}

/// Make a reservation come back after each boot.
///
/// Writes /etc/sysctl.d/60-dpu-hugepages.conf; for named nodes, or another than the default page size,
/// /etc/tmpfiles.d/dpu-hugepages.conf. For 1G pages it prints the kernel's arguments, since memory is too fragmented
/// for them later. The pools are not changed now: that is `reserve`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dpu-hugepages persist --size 4G
  dpu-hugepages persist --pages 8 --page-size 1G
  dpu-hugepages persist --remove")]
pub struct PersistArgs {
    /// Memory, rounded up to whole pages.
    #[arg(long, value_name = "SIZE", conflicts_with = "pages", required_unless_present_any = ["pages", "remove"])]
    pub size: Option<Bytes>,
    /// Number of hugepages.
    #[arg(long, value_name = "N")]
    pub pages: Option<u64>,
    /// Size of one hugepage [default: the kernel's].
    #[arg(long, value_name = "SIZE")]
    pub page_size: Option<PageSize>,
    /// NUMA nodes to spread the pages over [default: the kernel spreads them].
    #[arg(long = "node", value_name = "N", value_delimiter = ',')]
    pub nodes: Vec<u32>,
    /// Remove what was written before.
    #[arg(long, conflicts_with_all = ["size", "pages", "page_size", "nodes"])]
    pub remove: bool,
    /// Write into the tree at this directory, for building images.
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
}

/// Check whether a DPU's memory can be shared here, and say what to change.
///
/// Looks at shared memory, hugepages and their NUMA nodes, limits, control groups, /dev/shm, left-over files, and
/// the arguments of running QEMUs. Each finding is ok, warn (works, but slow or at risk) or fail, with the fix.
/// Exit status 1 if anything failed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dpu-hugepages doctor --size 4G
  dpu-hugepages doctor --size 8G --page-size 1G --node 1
  dpu-hugepages doctor --size 2G --page-size none        without hugepages
  dpu-hugepages doctor --pid 4711 --json                 limits and control groups of a running process")]
pub struct DoctorArgs {
    /// Memory the DPU shall have.
    #[arg(long, value_name = "SIZE")]
    pub size: Option<Bytes>,
    /// Size of one hugepage, or `none` for plain shared memory [default: the kernel's].
    #[arg(long, value_name = "SIZE", value_parser = parse_page_choice)]
    pub page_size: Option<PageChoice>,
    /// Host NUMA nodes its memory shall come from.
    #[arg(long = "node", value_name = "N", value_delimiter = ',')]
    pub nodes: Vec<u32>,
    /// Look at the limits and control groups of this process instead of the own ones.
    #[arg(long, value_name = "PID")]
    pub pid: Option<u32>,
    /// Print the findings as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Print the manual page.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Write the pages of all commands into this directory instead.
    #[arg(long, value_name = "DIR")]
    pub out_dir: Option<PathBuf>,
}
