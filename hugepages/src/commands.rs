//! What each command does: from arguments to library calls to text.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use hugepages::doctor::{Question, examine, is_healthy};
use hugepages::facts;
use hugepages::mounts::{self, MountError, MountWish};
use hugepages::persist::{self, Lasting, PersistError, Way, Written};
use hugepages::plan::{Goal, Plan, PlanError, Request, plan};
use hugepages::qemu::{Attach, Backend, DpuMemory, shell_line};
use hugepages::reserve::{Reservation, ReserveError, Selection, release};
use hugepages::size::{Bytes, PageSize};
use hugepages::state::{Entry, Locked, StateDir, StateError};
use hugepages::status;
use hugepages::sys;
use hugepages::sysfs::Host;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use crate::Failure;
use crate::args::*;
use crate::tables;

type Done = Result<String, Failure>;

/// Carries out a command. The text is for stdout.
pub fn run(cli: Cli) -> Done {
    let context =
        Context { host: Host::at(&cli.sysroot), state: StateDir::at(&cli.state_dir), sysroot: cli.sysroot };
    match cli.command {
        Command::Reserve(args) => context.reserve(&args),
        Command::Release(args) => context.release(&args),
        Command::Status(args) => context.status(&args),
        Command::Mount(args) => context.mount(args),
        Command::Umount(args) => context.umount(&args.path),
        Command::QemuArgs(args) => context.qemu_args(args),
        Command::LibvirtXml(args) => context.libvirt_xml(args),
        Command::Persist(args) => context.persist(&args),
        Command::Doctor(args) => context.doctor(&args),
        Command::Completions { shell } => {
            let mut text = vec![];
            clap_complete::generate(shell, &mut Cli::command(), "dpu-hugepages", &mut text);
            String::from_utf8(text).map_err(Failure::failed)
        }
        Command::Man(args) => man(args.out_dir.as_deref()),
    }
}

struct Context {
    host: Host,
    state: StateDir,
    sysroot: PathBuf,
}

impl Context {
    /// The page size that was asked for, or the kernel's default. It must exist here.
    fn page_size(&self, asked: Option<PageSize>) -> Result<PageSize, Failure> {
        let known = self.host.page_sizes().map_err(Failure::failed)?;
        if known.is_empty() {
            let text =
                "the kernel has no hugepages: boot one with CONFIG_HUGETLBFS=y, or use plain shared memory";
            return Err(Failure::failed(text));
        }
        let page = match asked {
            Some(page) => page,
            None => self.host.default_page_size().map_err(Failure::failed)?.unwrap_or(known[0]),
        };
        if known.contains(&page) {
            return Ok(page);
        }
        let list: Vec<_> = known.iter().map(PageSize::to_string).collect();
        Err(Failure::Usage(format!("the kernel has no hugepages of {page}; it has {}", list.join(" and "))))
    }

    /// Refuses before anything is done where the pools cannot be written.
    fn require_write(&self, what: &str, page: PageSize) -> Result<(), Failure> {
        let file = self.host.path("sys/kernel/mm/hugepages").join(page.sysfs_name()).join("nr_hugepages");
        match rustix::fs::access(&file, rustix::fs::Access::WRITE_OK) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::ROFS) => Err(Failure::Failed(format!(
                "{what} hugepages is not possible here: {} is read-only, as in a container. Run it on the host itself",
                file.display()
            ))),
            Err(_) => Err(Failure::Failed(format!("{what} hugepages needs root: run it with sudo"))),
        }
    }

    /// Takes the lock, and says so when that takes a while.
    fn lock(&self) -> Result<Locked, Failure> {
        match self.state.try_lock(&self.host) {
            Err(StateError::Busy { .. }) => {
                eprintln!("dpu-hugepages: waiting for another dpu-hugepages to finish");
                self.state.lock(&self.host)
            }
            other => other,
        }
        .map_err(Failure::failed)
    }

    fn reserve(&self, args: &ReserveArgs) -> Done {
        let page = self.page_size(args.page_size)?;
        let request = Request {
            pages: match (args.amount.size, args.amount.pages) {
                (Some(Bytes(size)), _) => page.pages_for(size),
                (None, pages) => pages.unwrap_or(0),
            },
            goal: match (args.total, args.add) {
                (true, _) => Goal::Total,
                (_, true) => Goal::Add,
                _ => Goal::Available,
            },
            nodes: args.nodes.clone(),
            check_memory: !args.force,
        };
        let make_plan = || {
            let topology = self.host.topology(page).map_err(Failure::failed)?;
            plan(&request, &topology).map_err(|error| match error {
                PlanError::NotEnoughMemory { .. } => Failure::failed(error),
                _ => Failure::usage(error),
            })
        };
        // Wrong use is told whether or not the caller is root.
        let first = make_plan()?;
        if args.dry_run {
            return Ok(report_plan(&first, &request, args.json));
        }
        self.require_write("reserving", page)?;
        sys::catch_stop_signals().map_err(Failure::failed)?;
        let record = self.lock()?;
        // The pools may have changed while another one held the lock.
        let plan = make_plan()?;
        let taken = self.take(record, &plan)?;
        Ok(report_taken(&plan, &request, &taken, args.json))
    }

    fn take(&self, record: Locked, plan: &Plan) -> Result<Vec<Entry>, Failure> {
        if plan.shares.is_empty() {
            return Ok(vec![]);
        }
        let mut reservation = Reservation::begin(&self.host, record, plan).map_err(Failure::failed)?;
        let bar = ProgressBar::new(reservation.progress().total);
        if let Ok(style) = ProgressStyle::with_template("reserving {bar:30} {pos}/{len} pages of {msg}") {
            bar.set_style(style);
        }
        bar.set_message(plan.page.to_string());
        loop {
            let step = reservation.step();
            bar.set_position(reservation.progress().done);
            if !matches!(step, Ok(false)) {
                bar.finish_and_clear();
            }
            if step.map_err(Failure::failed)? {
                return reservation.finish().map_err(Failure::failed);
            }
            if sys::stop_requested() {
                bar.finish_and_clear();
                let kept = reservation.roll_back().map_err(Failure::failed)?;
                return Err(Failure::Failed(match kept {
                    0 => "interrupted: all pages were given back".to_owned(),
                    n => format!(
                        "interrupted: {n} pages are in use by now and were kept; `dpu-hugepages release` gives them back"
                    ),
                }));
            }
        }
    }

    fn release(&self, args: &ReleaseArgs) -> Done {
        let amount = args.amount.size.is_some() || args.amount.pages.is_some();
        let page = match args.page_size {
            None if !amount => None,
            asked => Some(self.page_size(asked)?),
        };
        let pages = match (args.amount.size, args.amount.pages, page) {
            (Some(Bytes(size)), _, Some(page)) => Some(page.pages_for(size)),
            (_, pages, _) => pages,
        };
        if pages == Some(0) {
            return Err(Failure::usage("0 pages asked for: give --size or --pages above zero"));
        }
        self.require_write("releasing", self.page_size(page)?)?;
        let mut record = self.lock()?;
        let select = Selection { page, nodes: args.nodes.clone(), pages, lazy: args.lazy };
        let released = release(&self.host, &mut record, &select).map_err(|error| self.explain(error))?;
        if args.json {
            let list: Vec<_> = released
                .iter()
                .map(|r| json!({"page_size": r.page, "node": r.node, "pages": r.pages, "still_used": r.still_used, "kept": r.kept}))
                .collect();
            return Ok(pretty(&json!({ "released": list })));
        }
        if released.is_empty() {
            return Ok("Nothing to release: no such reservation is on record.\n".to_owned());
        }
        let mut text = String::new();
        for r in released {
            let memory = Bytes(r.pages.saturating_mul(r.page.bytes()));
            let _ =
                write!(text, "Released {} hugepages of {} ({memory}) on node {}", r.pages, r.page, r.node);
            let _ = match r.still_used {
                0 => writeln!(text, "."),
                n => writeln!(text, "; {n} of them are in use and go when their user ends."),
            };
            if r.kept > 0 {
                let _ = writeln!(
                    text,
                    "The kernel kept {} more: run `dpu-hugepages release` again when their users have ended.",
                    r.kept
                );
            }
        }
        Ok(text)
    }

    /// Adds who holds the pages.
    fn explain(&self, error: ReserveError) -> Failure {
        if let ReserveError::InUse { page, .. } = error {
            let (holders, _) = status::holders(&self.host, true);
            let of_size: Vec<_> = holders.into_iter().filter(|h| h.page_size == page).collect();
            if !of_size.is_empty() {
                return Failure::Failed(format!("{error}. Held by: {}", tables::holders_in_short(&of_size)));
            }
        }
        match error {
            ReserveError::NotReserved { .. } => Failure::usage(error),
            _ => Failure::failed(error),
        }
    }

    fn status(&self, args: &StatusArgs) -> Done {
        let recorded = self.state.read(&self.host).map_err(Failure::failed)?;
        let status = status::read(&self.host, &recorded).map_err(Failure::failed)?;
        Ok(if args.json { pretty(&json!(status)) } else { tables::status(&status) })
    }

    fn mount(&self, args: MountArgs) -> Done {
        let page_size = self.page_size(args.page_size)?;
        let default = self.host.default_page_size().map_err(Failure::failed)?;
        let wish = MountWish {
            path: args.path.unwrap_or_else(|| match default == Some(page_size) {
                true => "/dev/hugepages".into(),
                false => format!("/dev/hugepages-{page_size}").into(),
            }),
            page_size,
            size: args.size.map(|b| b.0),
            min_size: args.min_size.map(|b| b.0),
            uid: id_of(&args.owner, "user", sys::user_id)?,
            gid: id_of(&args.group, "group", sys::group_id)?,
            mode: args.mode,
        };
        if args.fstab {
            return Ok(wish.fstab_line() + "\n");
        }
        match mounts::mount(&self.host, &wish) {
            Ok(true) => Ok(format!("Mounted hugetlbfs on {} ({}).\n", wish.path.display(), wish.options())),
            Ok(false) => Ok(format!("{} is mounted so already.\n", wish.path.display())),
            Err(
                error @ (MountError::Relative(_)
                | MountError::Misaligned { .. }
                | MountError::MinAboveSize
                | MountError::NoSuchPageSize { .. }),
            ) => Err(Failure::usage(error)),
            Err(error) => Err(Failure::failed(error)),
        }
    }

    fn umount(&self, path: &Path) -> Done {
        mounts::umount(&self.host, path).map_err(Failure::failed)?;
        Ok(format!("Unmounted {}.\n", path.display()))
    }

    /// The page size for lines that are only printed: it need not exist here, but the default does.
    fn chosen_page(&self, choice: Option<PageChoice>) -> Result<Option<PageSize>, Failure> {
        match choice {
            Some(PageChoice::Plain) => Ok(None),
            Some(PageChoice::Huge(page)) => Ok(Some(page)),
            None => self.page_size(None).map(Some),
        }
    }

    fn dpu_memory(&self, args: &MemoryArgs) -> Result<DpuMemory, Failure> {
        let page = self.chosen_page(args.page_size)?;
        Ok(DpuMemory {
            size: args.size.0,
            page,
            backend: Backend::Memfd,
            nodes: args.nodes.clone(),
            // Plain pages come when they are touched, and there is no pool that could be empty then.
            prealloc: page.is_some() && !args.no_prealloc,
            id: "mem".to_owned(),
            attach: Attach::Machine,
        })
    }

    fn qemu_args(&self, args: QemuArgs) -> Done {
        let memory = DpuMemory {
            backend: args.mem_path.map_or(Backend::Memfd, Backend::File),
            id: args.id,
            attach: match args.attach {
                AttachChoice::Machine => Attach::Machine,
                AttachChoice::Numa => Attach::Numa,
            },
            ..self.dpu_memory(&args.memory)?
        };
        let list = memory.qemu_args().map_err(Failure::usage)?;
        Ok(if args.json { pretty(&json!(list)) } else { shell_line(&list) + "\n" })
    }

    fn libvirt_xml(&self, args: LibvirtArgs) -> Done {
        self.dpu_memory(&args.memory)?.libvirt_xml().map_err(Failure::usage)
    }

    fn persist(&self, args: &PersistArgs) -> Done {
        let root = args.root.as_deref().unwrap_or(&self.sysroot);
        let failed = |error: PersistError| Failure::failed(error);
        if args.remove {
            let gone = persist::remove(root).map_err(failed)?;
            if gone.is_empty() {
                return Ok("Nothing to remove.\n".to_owned());
            }
            return Ok(gone.iter().map(|p| format!("Removed {}.\n", p.display())).collect());
        }
        let page = self.page_size(args.page_size)?;
        let pages = args.size.map_or(args.pages.unwrap_or(0), |Bytes(size)| page.pages_for(size));
        if pages == 0 {
            return Err(Failure::usage("0 pages asked for: give --size or --pages above zero"));
        }
        let known = self.host.nodes().map_err(Failure::failed)?;
        if let Some(node) = args.nodes.iter().find(|n| !known.contains(n)) {
            return Err(Failure::usage(PlanError::UnknownNode { node: *node, known }));
        }
        let wish = Lasting { page, pages, nodes: args.nodes.clone() };
        match persist::way(&wish, self.host.default_page_size().map_err(Failure::failed)?) {
            Way::CommandLine(line) => Ok(format!(
                "{line}\n\nAdd this to the kernel's command line and boot. With GRUB: append it to GRUB_CMDLINE_LINUX in \
                 /etc/default/grub,\nthen run update-grub (Debian, Ubuntu) or grub2-mkconfig -o /boot/grub2/grub.cfg. \
                 With systemd-boot or on\nFedora: grubby --update-kernel=ALL --args=\"{line}\".\n"
            )),
            Way::File { path, text } => {
                let written = persist::write(root, path, &text).map_err(failed)?;
                let file = root.join(path);
                let mut text = match written {
                    Written::New => format!("Wrote {}; it takes effect at the next boot.\n", file.display()),
                    Written::Same => format!("{} says so already.\n", file.display()),
                };
                for rival in persist::rivals(root) {
                    let _ = writeln!(
                        text,
                        "Note: {} sets vm.nr_hugepages as well; the file read last wins.",
                        rival.display()
                    );
                }
                Ok(text)
            }
        }
    }

    fn doctor(&self, args: &DoctorArgs) -> Done {
        let page = match args.page_size {
            Some(PageChoice::Plain) => None,
            Some(PageChoice::Huge(page)) => Some(page),
            // A kernel without hugepages is a finding here, not an error.
            None => self.host.default_page_size().map_err(Failure::failed)?.or(Some(PageSize::M2)),
        };
        let process = args.pid.map_or("self".to_owned(), |pid| pid.to_string());
        if args.pid.is_some() && !self.host.path(format!("proc/{process}")).exists() {
            return Err(Failure::Usage(format!("there is no process {process}")));
        }
        let question = Question { size: args.size.map(|b| b.0), page, nodes: args.nodes.clone() };
        let facts = facts::gather(&self.host, &process).map_err(Failure::failed)?;
        let findings = examine(&question, &facts);
        let healthy = is_healthy(&findings);
        let text = if args.json {
            pretty(&json!({ "healthy": healthy, "findings": findings }))
        } else {
            tables::findings(&findings)
        };
        if healthy { Ok(text) } else { Err(Failure::Unhealthy(text)) }
    }
}

fn pretty(value: &serde_json::Value) -> String {
    format!("{value:#}\n")
}

fn id_of(name: &str, kind: &str, find: fn(&str) -> std::io::Result<Option<u32>>) -> Result<u32, Failure> {
    // Root is 0 everywhere, also where there is no list of users.
    if let Some(id) = name.parse().ok().or((name == "root").then_some(0)) {
        return Ok(id);
    }
    match find(name) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => Err(Failure::Usage(format!("there is no {kind} `{name}`"))),
        Err(e) => Err(Failure::Failed(format!("cannot look up the {kind} `{name}`: {e}"))),
    }
}

fn report_plan(plan: &Plan, request: &Request, as_json: bool) -> String {
    if as_json {
        return pretty(&json!({ "goal": request.goal, "plan": plan }));
    }
    if plan.pages() == 0 {
        return nothing_missing(plan, request);
    }
    let line = |s: &hugepages::plan::Share| {
        format!("Node {}: {} more hugepages of {} (the pool has {}).\n", s.node, s.add, plan.page, s.before)
    };
    plan.shares.iter().map(line).collect()
}

fn report_taken(plan: &Plan, request: &Request, taken: &[Entry], as_json: bool) -> String {
    let pages: u64 = taken.iter().map(|e| e.pages).sum();
    if as_json {
        let nodes: Vec<_> = taken.iter().map(|e| json!({ "node": e.node, "pages": e.pages })).collect();
        let page = plan.page;
        return pretty(
            &json!({ "page_size": page, "goal": request.goal, "asked": request.pages, "taken": pages, "nodes": nodes }),
        );
    }
    if taken.is_empty() {
        return nothing_missing(plan, request);
    }
    let nodes: Vec<_> = taken.iter().map(|e| format!("node {}: {}", e.node, e.pages)).collect();
    let memory = Bytes(pages.saturating_mul(plan.page.bytes()));
    let surplus = match plan.shares.iter().map(|s| s.converts).sum() {
        0u64 => String::new(),
        n => format!(" {n} of them were surplus pages in use, which stay in the pool from now on."),
    };
    format!("Reserved {pages} hugepages of {} ({memory}; {}).{surplus}\n", plan.page, nodes.join(", "))
}

fn nothing_missing(plan: &Plan, request: &Request) -> String {
    let what = if request.goal == Goal::Total { "in the pool" } else { "available" };
    format!("Nothing to do: {} hugepages of {} are {what} already.\n", request.pages, plan.page)
}

fn man(out_dir: Option<&Path>) -> Done {
    let command = Cli::command();
    match out_dir {
        None => {
            let mut text = vec![];
            clap_mangen::Man::new(command).render(&mut text).map_err(Failure::failed)?;
            String::from_utf8(text).map_err(Failure::failed)
        }
        Some(dir) => {
            let write = || {
                std::fs::create_dir_all(dir)?;
                clap_mangen::generate_to(command, dir)
            };
            write().map_err(|e| {
                Failure::Failed(format!("cannot write manual pages to {}: {e}", dir.display()))
            })?;
            Ok(format!("Wrote the manual pages to {}.\n", dir.display()))
        }
    }
}
