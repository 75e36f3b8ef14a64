//! Listings.

use std::collections::BTreeSet;

use backend_fs::filesystem::{FileSystem, NodeId};
use backend_fs::host::options::HostOptions;
use rustix::io::Errno;

use crate::support::*;

fn names(listed: &[Listed]) -> BTreeSet<String> {
    listed.iter().map(|entry| entry.name.clone()).collect()
}

#[test]
fn every_entry_is_listed_once_in_any_reply_size() {
    for on in [On::Disk, On::Memory] {
        let export = Export::with(on, HostOptions::default());
        let mut wanted: BTreeSet<String> = [".", ".."].map(String::from).into();
        for number in 0..700 {
            let name = format!("{number:0width$}", width = 1 + number % 200);
            export.put(&name, "");
            wanted.insert(name);
        }
        for plus in [false, true] {
            for reply in [600, 4096, 128 << 10] {
                let listed = export.list(ROOT, reply, plus);
                assert_eq!(listed.len(), wanted.len(), "{plus} {reply}");
                assert_eq!(names(&listed), wanted);
            }
        }
    }
}

#[test]
fn a_listing_goes_on_anywhere() {
    let export = Export::new();
    for number in 0..100 {
        export.put(&number.to_string(), "");
    }
    let handle = export.fs.opendir(&AS_ROOT, ROOT, 0).unwrap().handle;
    let all = export.list_page(ROOT, handle, 0, 64 << 10, false).unwrap();
    for (at, entry) in all.iter().enumerate() {
        let rest = export.list_page(ROOT, handle, entry.next, 64 << 10, false).unwrap();
        assert_eq!(rest, all[at + 1..]);
    }
}

#[test]
fn attributes_come_with_references_and_dots_without() {
    let export = Export::new();
    export.put("file", "");
    std::fs::create_dir(export.path.join("dir")).unwrap();
    let listed = export.list(ROOT, 4096, true);
    for entry in &listed {
        match entry.name.as_str() {
            "." | ".." => assert_eq!((entry.node, entry.kind), (0, 4)),
            name => {
                assert_eq!(entry.node, export.node(name).0);
                export.fs.forget(NodeId(entry.node), 2);
            }
        }
    }
    assert_eq!(export.fs.counts().inodes, 1);
    assert_eq!(listed.iter().find(|entry| entry.name == "dir").unwrap().kind, 4);
    assert_eq!(listed.iter().find(|entry| entry.name == "file").unwrap().kind, 8);
}

#[test]
fn entries_that_do_not_fit_take_no_reference() {
    let export = Export::new();
    for number in 0..50 {
        export.put(&number.to_string(), "");
    }
    let handle = export.fs.opendir(&AS_ROOT, ROOT, 0).unwrap().handle;
    let page = export.list_page(ROOT, handle, 0, 1000, true).unwrap();
    let referenced = page.iter().filter(|entry| entry.node != 0).count();
    assert!(referenced > 0);
    assert_eq!(export.fs.counts().inodes, 1 + referenced);
}

#[test]
fn what_is_above_the_export_is_not_shown() {
    let export = Export::new();
    use std::os::unix::fs::MetadataExt;
    let above = export.path.parent().unwrap().metadata().unwrap().ino();
    assert!(export.list(ROOT, 4096, false).iter().all(|entry| entry.ino != above));
}

#[test]
fn offsets_out_of_the_air_do_no_harm() {
    let export = Export::new();
    export.put("file", "");
    let handle = export.fs.opendir(&AS_ROOT, ROOT, 0).unwrap().handle;
    for offset in [1, 2, 12345, i64::MAX as u64 - 1, i64::MAX as u64, 1 << 63, u64::MAX] {
        let page = export.list_page(ROOT, handle, offset, 4096, true);
        assert!(page.is_ok() || page == Err(Errno::INVAL), "{offset}: {page:?}");
    }
    let whole = export.list_page(ROOT, handle, 0, 4096, false).unwrap();
    assert_eq!(whole.len(), 3);
}

#[test]
fn files_cannot_be_listed() {
    let export = Export::new();
    export.put("file", "");
    let (node, handle) = export.open("file", RDONLY);
    assert_eq!(export.list_page(node, handle, 0, 4096, false), Err(Errno::BADF));
    assert_eq!(export.fs.opendir(&AS_ROOT, node, 0).err(), Some(Errno::NOTDIR));
}

#[test]
fn threads_that_share_a_handle_do_not_mix_their_places() {
    let export = Export::new();
    for number in 0..300 {
        export.put(&format!("file-{number}"), "");
    }
    let handle = export.fs.opendir(&AS_ROOT, ROOT, 0).unwrap().handle;
    let wanted = names(&export.list(ROOT, 64 << 10, false));
    std::thread::scope(|scope| {
        for plus in [false, true, false, true] {
            let (export, wanted) = (&export, &wanted);
            scope.spawn(move || {
                for _ in 0..20 {
                    let mut found = Vec::new();
                    let mut offset = 0;
                    loop {
                        let page = export.list_page(ROOT, handle, offset, 2048, plus).unwrap();
                        let Some(last) = page.last() else { break };
                        offset = last.next;
                        found.extend(page);
                    }
                    assert_eq!(found.len(), wanted.len());
                    assert_eq!(names(&found), *wanted);
                }
            });
        }
    });
}

#[test]
fn files_that_come_and_go_meanwhile_disturb_nobody() {
    let export = Export::new();
    for number in 0..200 {
        export.put(&format!("stays-{number}"), "");
    }
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut number = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let path = export.put(&format!("goes-{}", number % 50), "");
                std::fs::remove_file(path).unwrap();
                number += 1;
            }
        });
        for _ in 0..20 {
            let listed = export.list(ROOT, 2048, true);
            let stays = listed.iter().filter(|entry| entry.name.starts_with("stays")).count();
            assert_eq!(stays, 200);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
