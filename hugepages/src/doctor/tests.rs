//! Each judgement from facts that call for it.

use std::path::PathBuf;

use super::*;
use crate::cgroup::HugetlbLimit;
use crate::facts::{Limit, Qemu, Room};
use crate::mounts::HugetlbMount;
use crate::plan::{NodeState, Topology};
use crate::qemu_argv::Mistake;
use crate::status::HugetlbFile;
use crate::sysfs::{MemInfo, Pool};

const PAGE: PageSize = PageSize::M2;

/// Two nodes with 512 free pages each, of which 24 are promised.
fn good() -> Facts {
    let node = |id| NodeState { id, total: 512, free: 512, surplus: 0, available: 1 << 30 };
    let pool = Pool { total: 1024, free: 1024, reserved: 24, ..Pool::default() };
    let topology = Topology { page: PAGE, reserved: 24, nodes: vec![node(0), node(1)] };
    Facts {
        pools: [(PAGE, (pool, topology))].into(),
        default_page: Some(PAGE),
        memory: MemInfo { total: 8 << 30, free: 4 << 30, available: 6 << 30 },
        memfd: Some(Ok(())),
        memfd_hugetlb: [(PAGE, Ok(()))].into(),
        populate: Some(true),
        nofile: Some(Limit { soft: Some(1024), hard: Some(1 << 20) }),
        memlock: Some(Limit { soft: Some(8 << 20), hard: Some(8 << 20) }),
        dev_shm: Some(Room { size: 4 << 30, free: 4 << 30 }),
        process: "self".into(),
        ..Facts::default()
    }
}

fn ask(size: u64) -> Question {
    Question { size: Some(size), page: Some(PAGE), nodes: vec![] }
}

fn of<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
    findings.iter().find(|f| f.check == check).unwrap_or_else(|| panic!("no {check} in {findings:?}"))
}

#[test]
fn a_good_host_has_nothing_to_fix() {
    let findings = examine(&ask(1 << 30), &good());
    assert!(findings.iter().all(|f| f.level == Level::Ok && f.fix.is_none()), "{findings:?}");
    assert!(is_healthy(&findings));
}

#[test]
fn too_few_pages_fail_with_the_reserve_command() {
    let findings = examine(&ask(2 << 30), &good());
    let finding = of(&findings, "hugepages-free");
    assert_eq!(finding.level, Level::Fail);
    assert!(finding.reason.contains("only 1000 hugepages of 2M are available"), "{}", finding.reason);
    assert_eq!(finding.fix.as_deref(), Some("dpu-hugepages reserve --size 2G --page-size 2M"));
    assert!(!is_healthy(&findings));
}

#[test]
fn a_node_counts_only_its_own_pages() {
    let on = |nodes: &[u32]| Question { nodes: nodes.to_vec(), ..ask(1200 << 20) };
    let findings = examine(&on(&[1]), &good());
    let finding = of(&findings, "hugepages-free");
    assert_eq!(finding.level, Level::Fail);
    assert_eq!(finding.fix.as_deref(), Some("dpu-hugepages reserve --size 1200M --page-size 2M --node 1"));
    assert_eq!(of(&examine(&on(&[0, 1]), &good()), "hugepages-free").level, Level::Ok);
    assert_eq!(of(&examine(&on(&[4]), &good()), "numa-node").fix.as_deref(), Some("use --node 0 or 1"));
}

#[test]
fn a_size_that_is_no_whole_number_of_pages_fails() {
    let findings = examine(&ask((1 << 30) + 1), &good());
    assert_eq!(of(&findings, "hugepages-size").fix.as_deref(), Some("give the DPU 1026M"));
}

#[test]
fn a_page_size_the_kernel_lacks_fails() {
    let findings = examine(&Question { page: Some(PageSize::G1), ..ask(1 << 30) }, &good());
    let fix = of(&findings, "hugepage-size").fix.as_deref().unwrap();
    assert!(fix.contains("--page-size 2M") && fix.contains("pdpe1gb"), "{fix}");
    let none = Facts { pools: [].into(), ..good() };
    assert!(of(&examine(&ask(1 << 30), &none), "hugepage-size").reason.contains("CONFIG_HUGETLBFS"));
}

#[test]
fn plain_memory_needs_no_hugepages() {
    let plain = |size| Question { size: Some(size), page: None, nodes: vec![] };
    let none = Facts { pools: [].into(), ..good() };
    assert!(is_healthy(&examine(&plain(1 << 30), &none)));
    let findings = examine(&plain(7 << 30), &good());
    assert_eq!(of(&findings, "memory-free").level, Level::Fail);
    assert_eq!(of(&findings, "dev-shm").level, Level::Warn);
    assert!(of(&findings, "dev-shm").fix.as_deref().unwrap().contains("remount,size=7G"));
}

#[test]
fn memfd_trouble_fails() {
    let facts = Facts {
        memfd: Some(Err("EPERM".into())),
        memfd_hugetlb: [(PAGE, Err("ENOSYS".into()))].into(),
        ..good()
    };
    let findings = examine(&ask(1 << 30), &facts);
    assert_eq!(
        (of(&findings, "memfd").level, of(&findings, "memfd-hugetlb").level),
        (Level::Fail, Level::Fail)
    );
}

#[test]
fn a_control_group_limit_below_the_size_fails() {
    let file = PathBuf::from("/sys/fs/cgroup/vm/hugetlb.2MB.max");
    let limit = HugetlbLimit { file, limit: 1 << 30, left: 512 << 20 };
    let facts = Facts { cgroup: [(PAGE, limit)].into(), hugetlb_in_memory_cgroup: true, ..good() };
    let findings = examine(&ask(1 << 30), &facts);
    assert_eq!(
        of(&findings, "cgroup-hugetlb").fix.as_deref(),
        Some("echo max > /sys/fs/cgroup/vm/hugetlb.2MB.max")
    );
    assert_eq!(of(&findings, "cgroup-memory").level, Level::Warn);
    assert_eq!(of(&examine(&ask(256 << 20), &facts), "cgroup-hugetlb").level, Level::Ok);
}

#[test]
fn limits_mounts_and_leftovers_are_told() {
    let mount = HugetlbMount {
        path: "/dev/hugepages".into(),
        page_size: Some(PAGE),
        size: Some(256 << 20),
        min_size: None,
        uid: 0,
        gid: 0,
        mode: 0o755,
    };
    let left =
        HugetlbFile { path: "/dev/hugepages/rtemap_0".into(), bytes: 2 << 20, page_size: PAGE, used: false };
    let facts = Facts {
        nofile: Some(Limit { soft: Some(1024), hard: Some(20_000) }),
        populate: Some(false),
        mounts: vec![mount],
        abandoned: vec![left],
        ..good()
    };
    let findings = examine(&ask(1 << 30), &facts);
    for check in ["nofile", "populate", "hugetlbfs", "abandoned-file"] {
        assert_eq!(of(&findings, check).level, Level::Warn, "{check}");
    }
    assert!(of(&findings, "abandoned-file").fix.as_deref().unwrap().ends_with("rm /dev/hugepages/rtemap_0"));
    assert!(is_healthy(&findings), "a warning is not a failure");
}

#[test]
fn a_container_with_its_small_dev_shm_is_warned() {
    let facts = Facts { container: true, dev_shm: Some(Room { size: 64 << 20, free: 64 << 20 }), ..good() };
    let findings = examine(&ask(1 << 30), &facts);
    assert!(of(&findings, "dev-shm").fix.as_deref().unwrap().contains("--shm-size"));
}

#[test]
fn a_running_qemu_without_shared_memory_fails() {
    let qemu = |mistakes| Qemu { pid: 42, name: Some("dpu0".into()), mistakes };
    let facts = |mistakes| Facts { qemus: vec![qemu(mistakes)], ..good() };
    let findings = examine(&ask(1 << 30), &facts(vec![Mistake::NoBackend]));
    let finding = of(&findings, "qemu-memory");
    assert_eq!(finding.level, Level::Fail);
    assert!(finding.reason.contains("process 42 (dpu0)"), "{}", finding.reason);
    assert_eq!(of(&examine(&ask(1 << 30), &facts(vec![])), "qemu-memory").level, Level::Ok);
    let risky = facts(vec![Mistake::NoPrealloc { id: "mem".into() }]);
    assert_eq!(of(&examine(&ask(1 << 30), &risky), "qemu-memory").level, Level::Warn);
}
