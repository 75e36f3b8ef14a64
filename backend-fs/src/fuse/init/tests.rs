//! What kernels of different ages get, and what each option changes.

use proptest::prelude::*;

use super::super::abi::MINOR;
use super::*;

/// Flags of a kernel's `FUSE_INIT`, as `fs/fuse/inode.c` of that version sends them on virtio-fs.
const LINUX_5_4: u64 = 0x03ff_ffff & !InitFlags::FILE_OPS.bits() & !InitFlags::MAP_ALIGNMENT.bits();
const LINUX_6_1: u64 = 0x1_7bff_fffb;
const LINUX_6_12: u64 = 0x1fd_7bff_fffb;

fn asked(minor: u32, flags: u64) -> InitIn {
    InitIn {
        major: 7,
        minor,
        max_readahead: 131_072,
        flags: flags as u32,
        flags2: (flags >> 32) as u32,
        unused: [0; 11],
    }
}

fn terms(options: &HostOptions, asked: &InitIn) -> Terms {
    match negotiate(asked, &Offered::from(options)) {
        Ok(Agreement::Start(terms)) => terms,
        other => panic!("{other:?}"),
    }
}

fn flags(options: &HostOptions, asked: &InitIn) -> InitFlags {
    terms(options, asked).flags
}

#[test]
fn a_current_kernel_gets_everything_an_export_offers_by_default() {
    let terms = terms(&HostOptions::default(), &asked(41, LINUX_6_12));
    let expected = ALWAYS
        | InitFlags::DO_READDIRPLUS
        | InitFlags::READDIRPLUS_AUTO
        | InitFlags::POSIX_LOCKS
        | InitFlags::FLOCK_LOCKS
        | InitFlags::SUBMOUNTS;
    assert_eq!(terms.flags, expected);
    let reply = terms.reply;
    assert_eq!((reply.major, reply.minor), (7, 41));
    assert_eq!(u64::from(reply.flags) | u64::from(reply.flags2) << 32, expected.bits());
    assert_eq!((reply.max_write, reply.max_pages), (1 << 20, 256));
    assert_eq!((reply.max_readahead, reply.time_gran), (131_072, 1));
    assert_eq!((reply.max_background, reply.congestion_threshold), (65535, 49149));
    assert_eq!((reply.map_alignment, reply.max_stack_depth, reply.request_timeout), (0, 0, 0));
    assert_eq!(reply.unused, [0; 11]);
    let negotiated = Negotiated {
        submounts: true,
        supplementary_groups: true,
        readdirplus: true,
        ..Negotiated::default()
    };
    assert_eq!(terms.negotiated, negotiated);
}

#[test]
fn flags_that_cannot_be_kept_are_never_agreed_to() {
    let never = InitFlags::EXPORT_SUPPORT
        | InitFlags::NO_OPEN_SUPPORT
        | InitFlags::NO_OPENDIR_SUPPORT
        | InitFlags::MAP_ALIGNMENT
        | InitFlags::HAS_INODE_DAX
        | InitFlags::HAS_EXPIRE_ONLY
        | InitFlags::HAS_RESEND
        | InitFlags::EXPLICIT_INVAL_DATA
        | InitFlags::PASSTHROUGH
        | InitFlags::OVER_IO_URING
        | InitFlags::ALLOW_IDMAP
        | InitFlags::HANDLE_KILLPRIV
        | InitFlags::REQUEST_TIMEOUT
        | InitFlags::SPLICE_READ
        | InitFlags::SPLICE_WRITE
        | InitFlags::SPLICE_MOVE;
    let everything = HostOptions {
        cache: CachePolicy::Always,
        writeback: true,
        allow_mmap: true,
        posix_acl: Offer::Always,
        security_label: Offer::Always,
        killpriv_v2: true,
        ..Default::default()
    };
    assert!(!flags(&everything, &asked(45, u64::MAX)).intersects(never));
}

#[test]
fn each_option_changes_its_flags() {
    let all = asked(45, u64::MAX);
    let change = |change: fn(&mut HostOptions)| {
        let mut options = HostOptions::default();
        change(&mut options);
        flags(&options, &all).symmetric_difference(flags(&HostOptions::default(), &all))
    };
    assert_eq!(change(|o| o.writeback = true), InitFlags::WRITEBACK_CACHE);
    assert_eq!(change(|o| o.host_locks = false), InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS);
    assert_eq!(change(|o| o.readdirplus = false), InitFlags::DO_READDIRPLUS | InitFlags::READDIRPLUS_AUTO);
    assert_eq!(change(|o| o.announce_submounts = false), InitFlags::SUBMOUNTS);
    assert_eq!(change(|o| o.killpriv_v2 = true), InitFlags::HANDLE_KILLPRIV_V2);
    assert_eq!(change(|o| o.allow_mmap = true), InitFlags::DIRECT_IO_ALLOW_MMAP);
    assert_eq!(change(|o| o.cache = CachePolicy::Always), InitFlags::CACHE_SYMLINKS);
    assert_eq!(change(|o| o.cache = CachePolicy::Never), InitFlags::empty());
    assert_eq!(change(|o| o.posix_acl = Offer::Auto), InitFlags::POSIX_ACL | InitFlags::DONT_MASK);
    assert_eq!(change(|o| o.security_label = Offer::Always), InitFlags::SECURITY_CTX);
}

#[test]
fn posix_acls_need_all_three_of_their_flags() {
    let options = |posix_acl| HostOptions { posix_acl, ..Default::default() };
    for missing in [InitFlags::POSIX_ACL, InitFlags::DONT_MASK, InitFlags::SETXATTR_EXT] {
        let asked = asked(45, !missing.bits());
        let terms = terms(&options(Offer::Auto), &asked);
        assert!(!terms.flags.intersects(InitFlags::POSIX_ACL | InitFlags::DONT_MASK), "{missing:?}");
        assert!(!terms.negotiated.posix_acl && !terms.negotiated.dont_mask);
        let refused = negotiate(&asked, &Offered::from(&options(Offer::Always)));
        assert_eq!(refused, Err(Refusal::PosixAcl), "{missing:?}");
    }
    let terms = terms(&options(Offer::Always), &asked(45, u64::MAX));
    assert!(terms.negotiated.posix_acl && terms.negotiated.dont_mask);
}

#[test]
fn required_labels_are_refused_to_a_kernel_without() {
    let options = |security_label| HostOptions { security_label, ..Default::default() };
    let without = asked(45, !InitFlags::SECURITY_CTX.bits());
    let refused = negotiate(&without, &Offered::from(&options(Offer::Always)));
    assert_eq!(refused, Err(Refusal::SecurityLabel));
    assert!(!terms(&options(Offer::Auto), &without).negotiated.security_label);
}

#[test]
fn the_upper_flags_count_only_when_announced() {
    let hidden = asked(45, !InitFlags::INIT_EXT.bits());
    let terms = terms(&HostOptions::default(), &hidden);
    assert_eq!(terms.reply.flags2, 0);
    assert!(!terms.negotiated.supplementary_groups);
    assert!(!terms.flags.contains(InitFlags::INIT_EXT));
}

#[test]
fn older_kernels_get_what_they_know() {
    let options = HostOptions::default();
    let old = terms(&options, &asked(31, LINUX_5_4));
    assert_eq!((old.minor, old.reply.minor), (31, 31));
    assert!(old.flags.contains(InitFlags::PARALLEL_DIROPS | InitFlags::MAX_PAGES));
    assert!(!old.flags.intersects(InitFlags::SUBMOUNTS | InitFlags::SETXATTR_EXT | InitFlags::INIT_EXT));
    let stable = terms(&options, &asked(37, LINUX_6_1));
    assert!(stable.flags.contains(InitFlags::SUBMOUNTS | InitFlags::SETXATTR_EXT | InitFlags::INIT_EXT));
    assert!(!stable.negotiated.supplementary_groups);
    // 7.23: neither parallel directory operations nor more than 32 pages.
    let oldest = terms(&options, &asked(23, 0x3_ffff));
    assert_eq!((oldest.reply.max_write, oldest.reply.max_pages), (131_072, 0));
    assert!(!oldest.flags.contains(InitFlags::PARALLEL_DIROPS));
}

#[test]
fn versions_outside_the_range_are_refused_or_asked_again() {
    let offered = Offered::from(&HostOptions::default());
    for (major, minor) in [(6, 45), (0, 0), (7, 0), (7, 22)] {
        let refused = negotiate(&InitIn { major, ..asked(minor, u64::MAX) }, &offered);
        assert_eq!(refused, Err(Refusal::Version { major, minor }));
    }
    for major in [8, u32::MAX] {
        let answer = negotiate(&InitIn { major, ..asked(0, u64::MAX) }, &offered);
        let expected = InitOut { major: 7, minor: MINOR, ..Default::default() };
        assert_eq!(answer, Ok(Agreement::AskAgain(expected)));
    }
    assert_eq!(terms(&HostOptions::default(), &asked(u32::MAX, u64::MAX)).reply.minor, MINOR);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..Default::default() })]

    #[test]
    fn nothing_is_agreed_to_that_was_not_asked_for(minor in 23..100_u32, asked_flags: u64, readahead: u32) {
        let asked = InitIn { max_readahead: readahead, ..asked(minor, asked_flags) };
        let terms = terms(&HostOptions { posix_acl: Offer::Auto, ..Default::default() }, &asked);
        let low = asked_flags & 0xffff_ffff;
        let able = if low & InitFlags::INIT_EXT.bits() != 0 { asked_flags } else { low };
        prop_assert_eq!(terms.flags.bits() & !able, 0);
        prop_assert!(terms.reply.max_readahead <= readahead);
        prop_assert!(terms.reply.minor <= minor && terms.reply.minor <= MINOR);
    }
}
