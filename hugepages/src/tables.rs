//! What people read: tables and sentences. Columns are separated by blanks, so that awk can read them too; scripts
//! should use --json.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use hugepages::doctor::{Finding, Level};
use hugepages::size::Bytes;
use hugepages::status::{Hold, Holder, PoolStatus, Status};

fn table(header: &[&str], numbers: &[usize]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for at in numbers {
        if let Some(column) = table.column_mut(*at) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn section(text: &mut String, title: &str, table: &Table) {
    if !text.is_empty() {
        text.push('\n');
    }
    let _ = writeln!(text, "{title}");
    for line in table.lines() {
        let _ = writeln!(text, "  {}", line.trim_end());
    }
}

/// The whole of `status`.
pub fn status(status: &Status) -> String {
    let mut text = String::new();
    if status.pools.is_empty() {
        text.push_str("The kernel has no hugepages (CONFIG_HUGETLBFS).\n");
        return text;
    }
    section(&mut text, "Pools (pages)", &pools(&status.pools));
    if status.holders.is_empty() {
        text.push_str("\nNo process holds hugepages.\n");
    } else {
        section(&mut text, "Held by", &holders(&status.holders));
    }
    if status.unreadable_processes > 0 {
        let _ = writeln!(
            text,
            "  {} processes could not be looked into; run as root to see all.",
            status.unreadable_processes
        );
    }
    if !status.files.is_empty() {
        let mut files = table(&["FILE", "PAGE", "MEMORY", "USED"], &[1, 2]);
        for file in &status.files {
            let used = if file.used { "yes" } else { "no: remove it to give its pages back" };
            files.add_row([
                file.path.display().to_string(),
                file.page_size.to_string(),
                Bytes(file.bytes).to_string(),
                used.to_owned(),
            ]);
        }
        section(&mut text, "Files in hugetlbfs", &files);
    }
    if !status.mounts.is_empty() {
        let mut mounts = table(&["MOUNT", "OPTIONS"], &[]);
        for mount in &status.mounts {
            mounts.add_row([mount.path.display().to_string(), mount.options()]);
        }
        section(&mut text, "hugetlbfs mounts", &mounts);
    }
    if !status.recorded.is_empty() {
        let mut recorded = table(&["PAGE", "NODE", "PAGES", "MEMORY"], &[0, 1, 2, 3]);
        for entry in &status.recorded {
            let bytes = Bytes(entry.pages.saturating_mul(entry.page_size.bytes()));
            recorded.add_row([
                entry.page_size.to_string(),
                entry.node.to_string(),
                entry.pages.to_string(),
                bytes.to_string(),
            ]);
        }
        section(&mut text, "Reserved by dpu-hugepages (`release` gives it back)", &recorded);
    }
    text
}

fn pools(pools: &[PoolStatus]) -> Table {
    let header = ["PAGE", "NODE", "TOTAL", "FREE", "PROMISED", "AVAILABLE", "SURPLUS", "MEMORY"];
    let mut table = table(&header, &[0, 1, 2, 3, 4, 5, 6, 7]);
    for pool in pools {
        let page = if pool.default { format!("{}*", pool.page_size) } else { pool.page_size.to_string() };
        table.add_row([
            page.clone(),
            "all".to_owned(),
            pool.total.to_string(),
            pool.free.to_string(),
            pool.reserved.to_string(),
            pool.available().to_string(),
            pool.surplus.to_string(),
            memory(pool.total, pool.page_bytes),
        ]);
        // With one node the line above says it all.
        for node in pool.nodes.iter().filter(|_| pool.nodes.len() > 1) {
            table.add_row([
                page.clone(),
                node.id.to_string(),
                node.total.to_string(),
                node.free.to_string(),
                "-".to_owned(),
                "-".to_owned(),
                node.surplus.to_string(),
                memory(node.total, pool.page_bytes),
            ]);
        }
    }
    table
}

fn memory(pages: u64, page: u64) -> String {
    match pages.saturating_mul(page) {
        0 => "0".to_owned(),
        bytes => Bytes(bytes).to_string(),
    }
}

fn holders(holders: &[Holder]) -> Table {
    let mut table = table(&["PID", "COMMAND", "PAGE", "MEMORY", "OF", "NODES", "HOW", "WHAT"], &[0, 2, 3, 4]);
    for holder in holders {
        let nodes: Vec<_> = holder.nodes.keys().map(u32::to_string).collect();
        let how = match (holder.hold, holder.shared) {
            (Hold::Mapped, true) => "shared",
            (Hold::Mapped, false) => "private",
            (Hold::Open, _) => "open",
        };
        table.add_row([
            holder.pid.to_string(),
            holder.command.clone(),
            holder.page_size.to_string(),
            if holder.bytes == 0 { "0".to_owned() } else { Bytes(holder.bytes).to_string() },
            Bytes(holder.size).to_string(),
            if nodes.is_empty() { "-".to_owned() } else { nodes.join(",") },
            how.to_owned(),
            holder.path.trim_end_matches(" (deleted)").to_owned(),
        ]);
    }
    table
}

/// Who holds pages of one size, in a few words for an error message.
pub fn holders_in_short(holders: &[Holder]) -> String {
    let texts: Vec<_> = holders
        .iter()
        .map(|h| format!("{} (pid {}, {})", h.command, h.pid, Bytes(h.bytes.max(h.size))))
        .collect();
    texts.join(", ")
}

/// The whole of `doctor`.
pub fn findings(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let level = match finding.level {
            Level::Ok => "ok  ",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        let _ = writeln!(text, "{level}  {:<15} {}", finding.check, finding.reason);
        if let Some(fix) = &finding.fix {
            let _ = writeln!(text, "{:22}fix: {fix}", "");
        }
    }
    let count = |level| findings.iter().filter(|f| f.level == level).count();
    let _ = match (count(Level::Fail), count(Level::Warn)) {
        (0, 0) => writeln!(text, "\nNothing to fix."),
        (failed, warned) => writeln!(text, "\n{failed} failed, {warned} to look at."),
    };
    text
}
