//! Acting as the caller: file system ids, groups, capabilities and umask of the calling thread.
//!
//! New inodes are made with the caller's ids, so that owner, group, set-group-id inheritance and ACLs
//! come out as they would on a local file system. Everything here changes the calling thread alone and
//! is undone when the guard is dropped. A caller that is root needs no system call.
//!
//! Once per thread, before the first such operation, the thread gets a umask and a working directory of
//! its own (umask 0: the DPU's kernel has applied the caller's, unless `FUSE_DONT_MASK` was negotiated)
//! and loses its supplementary groups: a set-group-id bit for one of the *daemon's* groups would
//! otherwise be granted to a caller who is no member (CVE-2022-0358).
//!
//! When the DPU sends no supplementary groups, a caller whom only such a group allows to write to the
//! directory would be refused, although the DPU's kernel has checked the access already. `CAP_DAC_OVERRIDE`
//! is then kept; `CAP_FSETID` is not.
#![forbid(unsafe_code)]

use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::options::HostOptions;
use super::sys;
use crate::filesystem::{Context, Result};

/// Capabilities that go with file system user id 0 (`CAP_FS_SET`, kernel `security/commoncap.c`).
const FS_CAPABILITIES: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::LINUX_IMMUTABLE)
    .union(CapabilitySet::MAC_OVERRIDE);

thread_local! {
    static THREAD: Thread = const {
        Thread {
            private_fs: Cell::new(false),
            in_proc: Cell::new(false),
            groups_dropped: Cell::new(false),
            capabilities: Cell::new(None),
            proven: Cell::new((0, 0)),
        }
    };
}

/// What was done to the calling thread and stays.
struct Thread {
    private_fs: Cell<bool>,
    in_proc: Cell<bool>,
    groups_dropped: Cell<bool>,
    /// The thread's capabilities while it acts for nobody.
    capabilities: Cell<Option<CapabilitySets>>,
    /// The last ids that the kernel was seen to accept.
    proven: Cell<(u32, u32)>,
}

/// Gives the calling thread its own umask (0) and working directory.
fn own_fs() -> Result<()> {
    THREAD.with(|thread| {
        if !thread.private_fs.get() {
            sys::unshare_thread_fs()?;
            rustix::process::umask(Mode::empty());
            thread.private_fs.set(true);
        }
        Ok(())
    })
}

/// Makes `/proc/self/fd` the calling thread's working directory, so that the calls which only take a
/// path reach an open file by its number.
pub(super) fn enter_proc(proc_self_fd: BorrowedFd) -> Result<()> {
    own_fs()?;
    THREAD.with(|thread| {
        if !thread.in_proc.get() {
            rustix::process::fchdir(proc_self_fd)?;
            thread.in_proc.set(true);
        }
        Ok(())
    })
}

fn drop_groups() -> Result<()> {
    THREAD.with(|thread| {
        if !thread.groups_dropped.get() {
            match sys::set_thread_groups(&[]) {
                // Without CAP_SETGID no other ids can be taken either, so no rights of the daemon's
                // groups go to anybody who does not have them.
                Ok(()) | Err(Errno::PERM) => thread.groups_dropped.set(true),
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    })
}

/// The thread's capabilities while it acts for nobody. Asked for once.
fn base_capabilities() -> Result<CapabilitySets> {
    THREAD.with(|thread| match thread.capabilities.get() {
        Some(sets) => Ok(sets),
        None => {
            let sets = capabilities(None)?;
            thread.capabilities.set(Some(sets));
            Ok(sets)
        }
    })
}

fn set_effective(sets: CapabilitySets, effective: CapabilitySet) -> Result<()> {
    set_capabilities(None, CapabilitySets { effective, ..sets })
}

/// The calling thread acts as the caller until this is dropped.
pub(super) struct AsCaller {
    /// File system ids to go back to.
    uid: Option<u32>,
    gid: Option<u32>,
    groups: bool,
    umask: bool,
    /// Capabilities were changed apart from what changing the user id does.
    capabilities: bool,
    /// The guard belongs to its thread.
    thread: PhantomData<*const ()>,
}

impl AsCaller {
    /// For an operation that makes an inode. `umask` is what the kernel is to apply (where the directory
    /// has no default ACL).
    ///
    /// # Errors
    /// `EPERM`: the caller's ids are not mapped or may not be taken.
    pub(super) fn create(cx: &Context, options: &HostOptions, umask: u32) -> Result<Self> {
        Self::enter(cx, options, umask, cx.groups.is_none())
    }

    /// For an operation whose access the DPU's kernel has not checked: no right is added.
    ///
    /// # Errors
    /// As [`AsCaller::create`].
    pub(super) fn checked(cx: &Context, options: &HostOptions) -> Result<Self> {
        Self::enter(cx, options, 0, false)
    }

    fn enter(cx: &Context, options: &HostOptions, umask: u32, keep_dac_override: bool) -> Result<Self> {
        let uid = options.uid_map.to_host(cx.uid).ok_or(Errno::PERM)?;
        let gid = options.gid_map.to_host(cx.gid).ok_or(Errno::PERM)?;
        own_fs()?;
        let mut guard = Self {
            uid: None,
            gid: None,
            groups: false,
            umask: false,
            capabilities: false,
            thread: PhantomData,
        };
        if umask != 0 {
            rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
            guard.umask = true;
        }
        if uid == 0 && gid == 0 {
            return Ok(guard);
        }
        drop_groups()?;
        // Taken before the ids change: that changes them.
        let base = base_capabilities()?;
        if let Some(groups) = cx.groups.filter(|groups| uid != 0 && !groups.is_empty()) {
            if options.gid_map.is_identity() {
                sys::set_thread_groups(groups)?;
            } else {
                let mapped: Option<Vec<u32>> =
                    groups.iter().map(|gid| options.gid_map.to_host(*gid)).collect();
                sys::set_thread_groups(&mapped.ok_or(Errno::PERM)?)?;
            }
            guard.groups = true;
        }
        // The user id last: it takes the right to change the others.
        if gid != 0 {
            guard.gid = Some(sys::set_thread_fsgid(gid));
        }
        if uid != 0 {
            guard.uid = Some(sys::set_thread_fsuid(uid));
        }
        guard.prove(uid, gid)?;
        if let Some(before) = guard.uid {
            let plain = base.effective - FS_CAPABILITIES;
            let dac_override = base.effective & CapabilitySet::DAC_OVERRIDE;
            let wanted = if keep_dac_override { plain | dac_override } else { plain };
            // Leaving user id 0 has taken the file system capabilities away; leaving another has not.
            if wanted != plain || before != 0 {
                // Going back to user id 0 puts those of the permitted set back by itself.
                let by_itself = FS_CAPABILITIES & base.permitted == FS_CAPABILITIES & base.effective;
                guard.capabilities = before != 0 || !by_itself;
                set_effective(base, wanted)?;
            }
        }
        Ok(guard)
    }

    /// It acts as a user other than 0, without the capabilities that go with that.
    pub(super) fn is_other_user(&self) -> bool {
        self.uid.is_some()
    }

    /// The kernel ignores ids that it refuses, so they are read back, once for each new pair.
    fn prove(&self, uid: u32, gid: u32) -> Result<()> {
        THREAD.with(|thread| {
            if thread.proven.get() == (uid, gid) {
                return Ok(());
            }
            let uid_holds = uid == 0 || sys::thread_fsuid() == uid;
            let gid_holds = gid == 0 || sys::thread_fsgid() == gid;
            if !(uid_holds && gid_holds) {
                return Err(Errno::PERM);
            }
            thread.proven.set((uid, gid));
            Ok(())
        })
    }
}

impl Drop for AsCaller {
    fn drop(&mut self) {
        if self.umask {
            rustix::process::umask(Mode::empty());
        }
        if let Some(uid) = self.uid {
            sys::set_thread_fsuid(uid);
        }
        if let Some(gid) = self.gid {
            sys::set_thread_fsgid(gid);
        }
        if self.groups
            && let Err(errno) = sys::set_thread_groups(&[])
        {
            // The next creation on this thread tries again before it acts.
            THREAD.with(|thread| thread.groups_dropped.set(false));
            tracing::error!(%errno, "could not drop the groups of a caller");
        }
        if self.capabilities {
            restore_capabilities();
        }
    }
}

/// Puts the thread's own capabilities back.
fn restore_capabilities() {
    let restored = base_capabilities().and_then(|base| set_effective(base, base.effective));
    if let Err(errno) = restored {
        THREAD.with(|thread| thread.capabilities.set(None));
        tracing::error!(%errno, "could not restore the capabilities of this thread");
    }
}

/// The calling thread has no `CAP_FSETID` until this is dropped: the kernel clears set-user-id and
/// set-group-id bits on writes as it does for callers who are not privileged.
pub(super) struct WithoutFsetid {
    changed: bool,
    thread: PhantomData<*const ()>,
}

impl WithoutFsetid {
    /// With `wanted` false nothing is done.
    pub(super) fn enter(wanted: bool) -> Result<Self> {
        let mut guard = Self { changed: false, thread: PhantomData };
        if wanted {
            let base = base_capabilities()?;
            if base.effective.contains(CapabilitySet::FSETID) {
                set_effective(base, base.effective - CapabilitySet::FSETID)?;
                guard.changed = true;
            }
        }
        Ok(guard)
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if self.changed {
            restore_capabilities();
        }
    }
}
