//! Judges whether a DPU of a given size can run here, and says what to do where it cannot. Pure: [`crate::facts`]
//! looks, this decides.
//!
//! Three levels. `fail`: such a DPU will not work. `warn`: it will, but something makes it slow or puts it at risk.
//! `ok`: looked at, nothing to do. Hugepages are never required: a doctor that was asked about plain memory does not
//! complain about empty pools.

#![forbid(unsafe_code)]

use serde::Serialize;

use crate::facts::Facts;
use crate::size::{Bytes, PageSize, compact};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// Nothing to do.
    Ok,
    /// Slow or at risk.
    Warn,
    /// Will not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// A stable name for scripts.
    pub check: &'static str,
    /// How bad it is.
    pub level: Level,
    /// What was found.
    pub reason: String,
    /// The command or change that helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<String>,
}

/// The DPU in question.
#[derive(Debug, Clone, Default)]
pub struct Question {
    /// Bytes of memory it shall have. None: no particular one.
    pub size: Option<u64>,
    /// The hugepages it shall use. None: base pages.
    pub page: Option<PageSize>,
    /// The host nodes its memory shall come from; empty for any.
    pub nodes: Vec<u32>,
}

/// Fewer open files than this leave little room for a DPU that works on many files at once.
const FEW_FILES: u64 = 65_536;

/// Judges every fact, in the order in which an operator would fix things.
pub fn examine(question: &Question, facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![memfd(facts)];
    match question.page {
        Some(page) => hugepages(question, page, facts, &mut findings),
        None => findings.push(plain_memory(question, facts)),
    }
    findings.extend(populate(facts));
    findings.extend(mounts(question, facts));
    abandoned(facts, &mut findings);
    findings.extend(dev_shm(question, facts));
    limits(facts, &mut findings);
    qemus(facts, &mut findings);
    findings
}

/// Whether nothing failed.
pub fn is_healthy(findings: &[Finding]) -> bool {
    findings.iter().all(|f| f.level != Level::Fail)
}

fn ok(check: &'static str, reason: impl Into<String>) -> Finding {
    Finding { check, level: Level::Ok, reason: reason.into(), fix: None }
}

fn warn(check: &'static str, reason: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { check, level: Level::Warn, reason: reason.into(), fix: Some(fix.into()) }
}

fn fail(check: &'static str, reason: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { check, level: Level::Fail, reason: reason.into(), fix: Some(fix.into()) }
}

fn memfd(facts: &Facts) -> Finding {
    match &facts.memfd {
        Some(Err(error)) => fail(
            "memfd",
            format!("no shared memory can be made with memfd_create: {error}"),
            "allow memfd_create in the container's seccomp profile, or use memory-backend-file,mem-path=/dev/shm,share=on",
        ),
        _ => ok("memfd", "shared memory can be made and sealed (memfd_create)"),
    }
}

fn hugepages(question: &Question, page: PageSize, facts: &Facts, findings: &mut Vec<Finding>) {
    let Some((pool, topology)) = facts.pools.get(&page) else {
        let known: Vec<_> = facts.pools.keys().map(PageSize::to_string).collect();
        findings.push(if known.is_empty() {
            fail(
                "hugepage-size",
                "the kernel has no hugepages (CONFIG_HUGETLBFS)",
                "boot a kernel with CONFIG_HUGETLBFS=y, or use plain shared memory: --page-size none",
            )
        } else {
            fail(
                "hugepage-size",
                format!("the kernel has no hugepages of {page}, only of {}", known.join(", ")),
                format!(
                    "use --page-size {}{}",
                    known[0],
                    if page == PageSize::G1 { "; 1G needs the CPU flag pdpe1gb" } else { "" }
                ),
            )
        });
        return;
    };
    findings.push(ok("hugepage-size", format!("the kernel has hugepages of {page}")));
    if let Some(Err(error)) = facts.memfd_hugetlb.get(&page) {
        findings.push(fail(
            "memfd-hugetlb",
            format!("no memfd on hugepages of {page} can be made: {error}"),
            "use memory-backend-file with a hugetlbfs mount (`dpu-hugepages mount`), or Linux 4.14 or later",
        ));
    }
    if let Some(&node) = question.nodes.iter().find(|id| !topology.nodes.iter().any(|n| n.id == **id)) {
        let known: Vec<_> = topology.nodes.iter().map(|n| n.id.to_string()).collect();
        findings.push(fail(
            "numa-node",
            format!("node {node} does not exist or has no memory"),
            format!("use --node {}", known.join(" or ")),
        ));
        return;
    }
    let chosen =
        topology.nodes.iter().filter(|n| question.nodes.is_empty() || question.nodes.contains(&n.id));
    let on_nodes: u64 = chosen.map(|n| n.free).sum();
    // Promised pages are of the whole pool; the same view as in crate::plan.
    let available = on_nodes.min(pool.free.saturating_sub(pool.reserved));
    let place = match question.nodes.as_slice() {
        [] => String::new(),
        nodes => format!(" on node {}", nodes.iter().map(u32::to_string).collect::<Vec<_>>().join(" and ")),
    };
    let options: String = question.nodes.iter().map(|n| format!(" --node {n}")).collect();
    let Some(size) = question.size else {
        let text = format!(
            "{available} hugepages of {page} ({}) are available{place}, {} in the pool",
            Bytes(available * page.bytes()),
            pool.total
        );
        findings.push(ok("hugepages-free", text));
        return cgroup(None, page, facts, findings);
    };
    if !size.is_multiple_of(page.bytes()) {
        let next = compact(size.next_multiple_of(page.bytes()));
        let reason = format!("{} is not a whole number of hugepages of {page}", Bytes(size));
        findings.push(fail("hugepages-size", reason, format!("give the DPU {next}")));
    }
    let needed = page.pages_for(size);
    if available >= needed {
        let text = format!("{available} hugepages of {page} are available{place}, {needed} are needed");
        findings.push(ok("hugepages-free", text));
    } else {
        let reason = format!(
            "only {available} hugepages of {page} are available{place} ({} in the pool, {} free, {} of them promised), but {needed} are needed for {}",
            pool.total,
            pool.free,
            pool.reserved,
            Bytes(size)
        );
        let command = format!("dpu-hugepages reserve --size {} --page-size {page}{options}", compact(size));
        findings.push(fail("hugepages-free", reason, command));
    }
    cgroup(Some(size), page, facts, findings);
}

fn cgroup(size: Option<u64>, page: PageSize, facts: &Facts, findings: &mut Vec<Finding>) {
    if let Some(limit) = facts.cgroup.get(&page) {
        let reason = format!(
            "the control group allows {} of hugepages of {page}, {} are left ({})",
            Bytes(limit.limit),
            Bytes(limit.left),
            limit.file.display()
        );
        findings.push(match size {
            Some(size) if limit.left < size => {
                fail("cgroup-hugetlb", reason, format!("echo max > {}", limit.file.display()))
            }
            _ => ok("cgroup-hugetlb", reason),
        });
    } else {
        findings.push(ok("cgroup-hugetlb", format!("no control group limits hugepages of {page}")));
    }
    if facts.hugetlb_in_memory_cgroup {
        findings.push(warn(
            "cgroup-memory",
            "hugepages count as memory of the control group (cgroup2 is mounted with memory_hugetlb_accounting)",
            "set memory.max of the DPU's group to its memory size plus what QEMU itself needs",
        ));
    }
}

fn plain_memory(question: &Question, facts: &Facts) -> Finding {
    let thp = match facts.thp_shmem.as_deref() {
        Some("always" | "within_size" | "advise" | "force") => {
            "; the kernel may use transparent hugepages for it"
        }
        _ => "",
    };
    match question.size {
        Some(size) if size > facts.memory.available => fail(
            "memory-free",
            format!(
                "only {} of memory are available, {} are needed",
                Bytes(facts.memory.available),
                Bytes(size)
            ),
            "stop something that uses memory, release hugepages (`dpu-hugepages status`), or make the DPU smaller",
        ),
        _ => {
            ok("memory-free", format!("{} of plain memory are available{thp}", Bytes(facts.memory.available)))
        }
    }
}

fn populate(facts: &Facts) -> Option<Finding> {
    (facts.populate == Some(false)).then(|| {
        warn(
            "populate",
            "the kernel cannot fill memory without the risk of SIGBUS (MADV_POPULATE_WRITE is missing)",
            "use Linux 5.14 or later; until then always set prealloc=on and reserve enough pages first",
        )
    })
}

fn mounts(question: &Question, facts: &Facts) -> Option<Finding> {
    let page = question.page?;
    let mount = facts.mounts.iter().find(|m| m.page_size == Some(page));
    let Some(mount) = mount else {
        return Some(ok(
            "hugetlbfs",
            format!(
                "no hugetlbfs of {page} is mounted; only memory-backend-file and DPDK need one (`dpu-hugepages mount`)"
            ),
        ));
    };
    match (mount.size, question.size) {
        (Some(limit), Some(size)) if limit < size => Some(warn(
            "hugetlbfs",
            format!(
                "the hugetlbfs on {} may hold only {}, less than {}",
                mount.path.display(),
                Bytes(limit),
                Bytes(size)
            ),
            format!(
                "use a memfd, or mount a larger one: `dpu-hugepages umount {}`, then `dpu-hugepages mount --size {}`",
                mount.path.display(),
                compact(size)
            ),
        )),
        _ => Some(ok("hugetlbfs", format!("a hugetlbfs of {page} is mounted on {}", mount.path.display()))),
    }
}

fn abandoned(facts: &Facts, findings: &mut Vec<Finding>) {
    for file in &facts.abandoned {
        findings.push(warn(
            "abandoned-file",
            format!(
                "{} holds {} of hugepages and no process has it open",
                file.path.display(),
                Bytes(file.bytes)
            ),
            format!("if nothing will use it again: rm {}", file.path.display()),
        ));
    }
}

fn dev_shm(question: &Question, facts: &Facts) -> Option<Finding> {
    let room = facts.dev_shm?;
    let size = question.size.filter(|_| question.page.is_none());
    let short = size.is_some_and(|size| room.free < size);
    let container = if facts.container { ", and this is a container" } else { "" };
    // Docker and Podman give 64 MiB unless told otherwise.
    let tiny = facts.container && room.size <= 64 << 20;
    Some(if short || tiny {
        warn(
            "dev-shm",
            format!(
                "/dev/shm has {} left of {}{container}: memory-backend-file,mem-path=/dev/shm would die of SIGBUS",
                Bytes(room.free),
                Bytes(room.size)
            ),
            if facts.container {
                "use memory-backend-memfd, which has no such limit, or start the container with --shm-size"
                    .to_owned()
            } else {
                let size = compact(size.unwrap_or(room.size).next_multiple_of(1 << 20));
                format!(
                    "use memory-backend-memfd, which has no such limit, or: mount -o remount,size={size} /dev/shm"
                )
            },
        )
    } else {
        ok("dev-shm", format!("/dev/shm has {} left", Bytes(room.free)))
    })
}

fn limits(facts: &Facts, findings: &mut Vec<Finding>) {
    let whose =
        if facts.process == "self" { "this shell".to_owned() } else { format!("process {}", facts.process) };
    if let Some(limit) = facts.nofile {
        findings.push(match limit.hard {
            Some(hard) if hard < FEW_FILES => warn(
                "nofile",
                format!("{whose} may have only {hard} files open: a DPU that keeps more open gets ENFILE"),
                "systemd: LimitNOFILE=1048576 in the unit; shell: ulimit -Hn 1048576 as root",
            ),
            Some(hard) => ok("nofile", format!("{whose} may have {hard} files open")),
            None => ok("nofile", format!("{whose} may have any number of files open")),
        });
    }
    if let Some(limit) = facts.memlock {
        findings.push(match limit.hard {
            None => ok("memlock", format!("{whose} may lock any amount of memory")),
            // Only registered I/O buffers and device assignment lock memory; sharing it does not.
            Some(hard) => ok(
                "memlock",
                format!("{whose} may lock {} of memory; sharing memory needs none", Bytes(hard)),
            ),
        });
    }
}

fn qemus(facts: &Facts, findings: &mut Vec<Finding>) {
    for qemu in &facts.qemus {
        let name = qemu.name.as_ref().map_or(String::new(), |n| format!(" ({n})"));
        for mistake in &qemu.mistakes {
            let reason = format!("QEMU process {}{name}: {}", qemu.pid, mistake.reason());
            findings.push(if mistake.is_fatal() {
                fail("qemu-memory", reason, mistake.fix())
            } else {
                warn("qemu-memory", reason, mistake.fix())
            });
        }
    }
    let bad = facts.qemus.iter().filter(|q| !q.mistakes.is_empty()).count();
    if !facts.qemus.is_empty() && bad == 0 {
        let count = facts.qemus.len();
        let text = format!(
            "{count} QEMU process{} running, no mistake in how they share memory",
            if count == 1 { "" } else { "es" }
        );
        findings.push(ok("qemu-memory", text));
    }
}

#[cfg(test)]
#[path = "doctor/tests.rs"]
mod tests;
