//! Parsers of `/proc/PID/smaps`, `maps` and `numa_maps`, as far as hugepages are concerned. Pure.
//!
//! Formats: `Documentation/filesystems/proc.rst`. A mapping is the address line and the `Name: value` lines after it.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use crate::size::PageSize;

/// One mapping of a process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// `MAP_SHARED`, as opposed to `MAP_PRIVATE`.
    pub shared: bool,
    /// Device of the file, major and minor.
    pub device: (u32, u32),
    /// Inode of the file, 0 for anonymous memory.
    pub inode: u64,
    /// Path of the file as the kernel shows it.
    pub path: String,
    /// Size of the pages in bytes; 0 in `maps`, which does not say.
    pub page_size: u64,
    /// Bytes of hugetlb pages that are mapped.
    pub hugetlb: u64,
}

/// Reads `smaps` or `maps`. Lines that are neither an address line nor a known field are passed over.
pub fn parse_smaps(text: &str) -> Vec<Vma> {
    let mut list: Vec<Vma> = vec![];
    for line in text.lines() {
        if let Some(vma) = parse_address_line(line) {
            list.push(vma);
        } else if let (Some(vma), Some((name, value))) = (list.last_mut(), line.split_once(':')) {
            let kib = || value.split_whitespace().next().and_then(|v| v.parse::<u64>().ok()).unwrap_or(0);
            match name {
                "KernelPageSize" => vma.page_size = kib().saturating_mul(1024),
                "Shared_Hugetlb" | "Private_Hugetlb" => {
                    vma.hugetlb = vma.hugetlb.saturating_add(kib().saturating_mul(1024));
                }
                _ => {}
            }
        }
    }
    list
}

/// `7f46-7f48 rw-s 00000000 00:11 38470    /memfd:dpu (deleted)`
fn parse_address_line(line: &str) -> Option<Vma> {
    let mut rest = line;
    let mut word = || {
        let text = rest.trim_start();
        let end = text.find(' ').unwrap_or(text.len());
        rest = &text[end..];
        &text[..end]
    };
    let (start, end) = word().split_once('-')?;
    let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
    let shared = word().as_bytes().get(3) == Some(&b's');
    let _offset = word();
    let (major, minor) = word().split_once(':')?;
    let device = (u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = word().parse().ok()?;
    Some(Vma { start, end, shared, device, inode, path: rest.trim_start().to_owned(), ..Vma::default() })
}

/// Pages per node of the hugetlb mappings in `numa_maps`, by start address.
pub fn parse_numa_maps(text: &str) -> BTreeMap<u64, BTreeMap<u32, u64>> {
    let mut map = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let Some(start) = words.next().and_then(|w| u64::from_str_radix(w, 16).ok()) else {
            continue;
        };
        let words: Vec<_> = words.collect();
        if !words.contains(&"huge") {
            continue;
        }
        let node = |word: &&str| {
            let (node, pages) = word.strip_prefix('N')?.split_once('=')?;
            Some((node.parse().ok()?, pages.parse().ok()?))
        };
        map.insert(start, words.iter().filter_map(node).collect());
    }
    map
}

/// `HugetlbPages` of `/proc/PID/status` in bytes: cheap to read, and zero for nearly every process.
pub fn hugetlb_of_status(text: &str) -> u64 {
    let line = text.lines().find_map(|l| l.strip_prefix("HugetlbPages:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0).saturating_mul(1024)
}

impl Vma {
    /// The hugepage size of a hugetlb mapping. None for any other mapping.
    ///
    /// The kernel marks such mappings with the flag `ht`, but only their page size exceeds a base page in any case.
    pub fn hugetlb_page(&self, base: u64) -> Option<PageSize> {
        if self.page_size > base { PageSize::new(self.page_size) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SMAPS: &str = "\
7f467e400000-7f4680400000 rw-s 00000000 00:11 38470                      /memfd:dpu mem (deleted)
Size:              32768 kB
KernelPageSize:     2048 kB
MMUPageSize:        2048 kB
Shared_Hugetlb:     2048 kB
Private_Hugetlb:    8192 kB
VmFlags: rd wr sh mr mw me ms de ht
7f4680522000-7f4680524000 r--p 00001000 fe:0a 21562                      /usr/lib/x.so
Size:                  8 kB
KernelPageSize:        4 kB
7ffd0000-7ffd1000 rw-p 00000000 00:00 0
KernelPageSize:        4 kB
";

    #[test]
    fn a_hugetlb_mapping_is_recognised() {
        let list = parse_smaps(SMAPS);
        assert_eq!(list.len(), 3);
        assert_eq!(
            list[0],
            Vma {
                start: 0x7f46_7e40_0000,
                end: 0x7f46_8040_0000,
                shared: true,
                device: (0, 0x11),
                inode: 38470,
                path: "/memfd:dpu mem (deleted)".into(),
                page_size: 2 << 20,
                hugetlb: 10 << 20,
            }
        );
        assert_eq!(list[0].hugetlb_page(4096), Some(PageSize::M2));
        assert_eq!((list[1].hugetlb_page(4096), list[1].shared, list[1].device), (None, false, (0xfe, 10)));
        assert_eq!((list[2].inode, list[2].path.as_str()), (0, ""));
    }

    #[test]
    fn nodes_come_from_numa_maps() {
        let text = "7f46 default file=/memfd:x\\040(deleted) huge dirty=4 N0=3 N2=1 kernelpagesize_kB=2048\n\
                    7f47 default file=/lib/x N0=9 kernelpagesize_kB=4\n";
        let map = parse_numa_maps(text);
        assert_eq!(map.len(), 1);
        assert_eq!(map[&0x7f46], BTreeMap::from([(0, 3), (2, 1)]));
    }

    #[test]
    fn the_status_line_counts_bytes() {
        assert_eq!(hugetlb_of_status("Name:\tx\nHugetlbPages:\t    8192 kB\n"), 8 << 20);
        assert_eq!(hugetlb_of_status("Name:\tx\n"), 0);
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "(\\PC{0,30}\n){0,8}") {
            parse_smaps(&text);
            parse_numa_maps(&text);
            hugetlb_of_status(&text);
        }
    }
}
