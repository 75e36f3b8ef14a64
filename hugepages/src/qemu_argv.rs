//! Finds the mistakes in a running QEMU's arguments that leave its memory unshared. Pure.
//!
//! QEMU starts without complaint when a vhost-user device gets memory that is not shared; the device then sees
//! nothing of what the DPU writes. All the ways to get there show in the arguments: no memory backend, one that is
//! never attached, one that is private. Both of QEMU's forms are read, `-object kind,key=value` and the JSON that
//! libvirt writes.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mistake {
    /// A vhost-user device, and no memory backend at all.
    NoBackend,
    /// The backend is there but no machine or NUMA node uses it.
    NotAttached {
        /// The backend's id.
        id: String,
    },
    /// The backend is private.
    NotShared {
        /// The backend's id.
        id: String,
        /// Its kind, such as `memory-backend-file`.
        kind: String,
    },
    /// `-mem-path`, which is private memory.
    MemPath,
    /// Hugepages that are taken only when touched.
    NoPrealloc {
        /// The backend's id.
        id: String,
    },
}

impl Mistake {
    /// Whether it stops the DPU, as opposed to putting it at risk.
    pub fn is_fatal(&self) -> bool {
        !matches!(self, Mistake::NoPrealloc { .. })
    }

    /// What it means.
    pub fn reason(&self) -> String {
        match self {
            Mistake::NoBackend => {
                "it has a vhost-user device but no shared memory backend: its memory is private".to_owned()
            }
            Mistake::NotAttached { id } => {
                format!("its memory backend `{id}` is not used by the machine, whose memory is private")
            }
            Mistake::NotShared { id, kind } => {
                format!("its {kind} `{id}` has no share=on (the default is off): its memory is private")
            }
            Mistake::MemPath => "-mem-path gives memory that is private".to_owned(),
            Mistake::NoPrealloc { id } => {
                format!(
                    "its memory backend `{id}` takes hugepages only when they are touched: it dies of SIGBUS if none \
                     is free then"
                )
            }
        }
    }

    /// What to change in the arguments.
    pub fn fix(&self) -> String {
        match self {
            Mistake::NoBackend | Mistake::MemPath => {
                "start it with `-object memory-backend-memfd,id=mem,size=<RAM>,share=on -machine memory-backend=mem`; \
                 libvirt: `<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>`"
                    .to_owned()
            }
            Mistake::NotAttached { id } => {
                format!("add `-machine memory-backend={id}` (or `-numa node,memdev={id}`)")
            }
            Mistake::NotShared { id, .. } => {
                format!("add `share=on` to the object `{id}`; libvirt: `<access mode='shared'/>` in `<memoryBacking>`")
            }
            Mistake::NoPrealloc { id } => {
                format!("add `prealloc=on` to the object `{id}`; libvirt: `<allocation mode='immediate'/>`")
            }
        }
    }
}

/// Whether the first argument is a QEMU.
pub fn is_qemu(program: &str) -> bool {
    let name = program.rsplit('/').next().unwrap_or(program);
    name.starts_with("qemu-system-") || name == "qemu-kvm" || name == "kvm"
}

/// The mistakes in a QEMU's arguments; none for a QEMU without a vhost-user device.
pub fn mistakes(args: &[String]) -> Vec<Mistake> {
    let options = |name: &str| -> Vec<Values> {
        let is = |arg: &str| arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) == Some(name);
        args.windows(2).filter(|pair| is(&pair[0])).map(|pair| Values::parse(&pair[1])).collect()
    };
    let uses_vhost_user = options("device").iter().any(|d| d.kind("driver").starts_with("vhost-user"))
        || options("netdev").iter().any(|n| n.kind("type") == "vhost-user");
    if !uses_vhost_user {
        return vec![];
    }
    let mut used: Vec<String> = vec![];
    for machine in options("machine").iter().chain(&options("M")) {
        used.extend(machine.get("memory-backend"));
    }
    for option in options("numa").iter().chain(&options("device")) {
        used.extend(option.get("memdev"));
    }
    let mut mistakes = vec![];
    let mut backends = 0;
    for object in options("object") {
        let kind = object.kind("qom-type");
        if !kind.starts_with("memory-backend-") || kind == "memory-backend-epc" {
            continue;
        }
        backends += 1;
        let id = object.get("id").unwrap_or_default();
        let by_default = matches!(kind.as_str(), "memory-backend-memfd" | "memory-backend-shm");
        if !used.contains(&id) {
            mistakes.push(Mistake::NotAttached { id });
        } else if !object.flag("share").unwrap_or(by_default) {
            mistakes.push(Mistake::NotShared { id, kind });
        } else if object.flag("hugetlb") == Some(true) && object.flag("prealloc") != Some(true) {
            mistakes.push(Mistake::NoPrealloc { id });
        }
    }
    if backends == 0 {
        let mem_path = args.iter().any(|a| a == "-mem-path" || a == "--mem-path");
        mistakes.push(if mem_path { Mistake::MemPath } else { Mistake::NoBackend });
    }
    mistakes
}

/// One option's value, taken apart.
struct Values {
    first: String,
    values: BTreeMap<String, String>,
}

impl Values {
    fn parse(text: &str) -> Values {
        if text.starts_with('{') {
            let json: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
            let plain = |v: &serde_json::Value| match v {
                serde_json::Value::String(s) => s.clone(),
                serde_json::Value::Bool(on) => if *on { "on" } else { "off" }.to_owned(),
                other => other.to_string(),
            };
            let entries = json.as_object().into_iter().flatten();
            return Values {
                first: String::new(),
                values: entries.map(|(k, v)| (k.clone(), plain(v))).collect(),
            };
        }
        // A doubled comma is a comma in a value.
        let mut parts = vec![String::new()];
        let mut chars = text.chars().peekable();
        while let Some(c) = chars.next() {
            match (c, parts.last_mut()) {
                (',', Some(last)) if chars.peek() == Some(&',') => {
                    chars.next();
                    last.push(',');
                }
                (',', _) => parts.push(String::new()),
                (c, Some(last)) => last.push(c),
                (_, None) => {}
            }
        }
        let first = parts.first().filter(|p| !p.contains('=')).cloned().unwrap_or_default();
        let values = parts.iter().map(|part| match part.split_once('=') {
            Some((name, value)) => (name.to_owned(), value.to_owned()),
            None => (part.clone(), "on".to_owned()),
        });
        Values { first, values: values.collect() }
    }

    /// The leading word without a name, or the key that stands for it in JSON and in the long form.
    fn kind(&self, key: &str) -> String {
        if self.first.is_empty() { self.get(key).unwrap_or_default() } else { self.first.clone() }
    }

    fn get(&self, key: &str) -> Option<String> {
        self.values.get(key).cloned()
    }

    fn flag(&self, key: &str) -> Option<bool> {
        self.values.get(key).map(|v| matches!(v.as_str(), "on" | "yes" | "true" | "y"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(line: &str) -> Vec<Mistake> {
        mistakes(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    const FS: &str = "-chardev socket,id=c,path=/s -device vhost-user-fs-pci,chardev=c,tag=t";

    #[test]
    fn shared_memory_is_no_mistake() {
        for line in [
            "-object memory-backend-memfd,id=mem,size=4G,share=on -machine q35,memory-backend=mem",
            "-object memory-backend-memfd,id=mem,size=4G -numa node,memdev=mem",
            "-object memory-backend-file,id=m,size=1G,mem-path=/dev/shm,share=on -M pc,memory-backend=m",
            r#"-object {"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"hugetlb":true,"prealloc":true} -machine pc,memory-backend=pc.ram"#,
        ] {
            assert_eq!(check(&format!("qemu-system-x86_64 {line} {FS}")), [], "{line}");
        }
    }

    #[test]
    fn a_qemu_without_vhost_user_may_have_any_memory() {
        assert_eq!(check("qemu-system-x86_64 -m 4G -device virtio-net-pci,netdev=n -netdev user,id=n"), []);
    }

    #[test]
    fn each_mistake_is_found() {
        let id = || "mem".to_owned();
        assert_eq!(check(&format!("q -m 4G {FS}")), [Mistake::NoBackend]);
        assert_eq!(check("q -m 4G -netdev vhost-user,id=n,chardev=c"), [Mistake::NoBackend]);
        assert_eq!(check(&format!("q -mem-path /dev/hugepages {FS}")), [Mistake::MemPath]);
        assert_eq!(
            check(&format!("q -object memory-backend-memfd,id=mem,size=4G,share=on {FS}")),
            [Mistake::NotAttached { id: id() }]
        );
        let kind = || "memory-backend-file".to_owned();
        for object in [
            "memory-backend-file,id=mem,mem-path=/x",
            "memory-backend-file,id=mem,mem-path=/x,share=off",
            r#"{"qom-type":"memory-backend-file","id":"mem","share":false}"#,
        ] {
            assert_eq!(
                check(&format!("q --object {object} --machine memory-backend=mem {FS}")),
                [Mistake::NotShared { id: id(), kind: kind() }],
                "{object}"
            );
        }
        let risky =
            check(&format!("q -object memory-backend-memfd,id=mem,hugetlb=on -numa node,memdev=mem {FS}"));
        assert_eq!(risky, [Mistake::NoPrealloc { id: id() }]);
        assert!(!risky[0].is_fatal());
        assert!(
            check(&format!(
                "q -object memory-backend-file,id=dimm,mem-path=/a,,b -device pc-dimm,memdev=dimm {FS}"
            ))[0]
                .is_fatal()
        );
    }

    #[test]
    fn qemu_is_known_by_its_name() {
        assert!(is_qemu("/usr/bin/qemu-system-x86_64") && is_qemu("/usr/libexec/qemu-kvm") && is_qemu("kvm"));
        assert!(!is_qemu("/usr/bin/qemu-img") && !is_qemu("virtqemud"));
    }

    proptest! {
        #[test]
        fn any_arguments_are_survived(args in proptest::collection::vec("-?(object|device|machine|\\PC{0,12})|\\{\\PC{0,12}", 0..12)) {
            mistakes(&args);
        }
    }
}
