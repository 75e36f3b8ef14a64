//! Stage 4: the export becomes the root directory.
//!
//! Mode `namespace`, in the server's own mount namespace:
//!
//! 1. every mount becomes a slave of the host's: what the host mounts below the export later
//!    appears, nothing done here goes back;
//! 2. the export is cloned with everything mounted below it (`open_tree`), device nodes and set-id
//!    bits lose their meaning on the clone, and with `--readonly` it becomes read-only in the kernel;
//! 3. the clone is mounted over the export;
//! 4. a procfs of the new pid namespace is mounted on `/proc`, `/proc/self/fd` of it is bound over that
//!    and held as a descriptor, and both are unmounted again: a detached mount has no parent, so `..`
//!    of the descriptor stays where it is;
//! 5. `pivot_root(".", ".")` into the clone, and the old root is detached.
//!
//! The order matters: the export is cloned before `/proc` is covered, so that `/` and directories below
//! `/proc` can be exported.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, open, openat};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_change, mount_move, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, chroot, fchdir, pivot_root};

use super::Error;
use super::options::SandboxMode;

/// All that the file system server needs of the world of paths.
#[derive(Debug)]
pub struct View {
    /// Root of the export, `O_PATH`.
    pub root: OwnedFd,
    /// `/proc/self/fd` of this process, `O_PATH`: the way to reopen an `O_PATH` descriptor.
    pub proc_self_fd: OwnedFd,
}

/// Confines this process to `export` the way `mode` says. Must run in the server, after
/// [`super::process::split`].
///
/// # Errors
/// [`Error::Mount`] with the step that failed.
pub fn confine(mode: SandboxMode, export: &Path, readonly: bool) -> Result<View, Error> {
    let steps = Steps { export };
    match mode {
        SandboxMode::Namespace => steps.namespace(readonly),
        SandboxMode::Chroot => steps.chroot(),
        SandboxMode::None => steps.none(),
    }
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

struct Steps<'a> {
    export: &'a Path,
}

impl Steps<'_> {
    fn failed(&self, step: &'static str) -> impl FnOnce(Errno) -> Error {
        let export = self.export.to_owned();
        move |errno| Error::Mount { export, step, source: errno.into() }
    }

    fn namespace(&self, readonly: bool) -> Result<View, Error> {
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
            .map_err(self.failed("detaching mount propagation from the host"))?;
        let clone = open_tree(
            CWD,
            self.export,
            OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_RECURSIVE,
        )
        .map_err(self.failed("cloning the mount of the export"))?;
        self.restrict(&clone, readonly)?;
        move_mount(&clone, "", CWD, self.export, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .map_err(self.failed("mounting the export over itself"))?;

        let harmless = MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOSUID | MountFlags::RELATIME;
        mount("proc", "/proc", "proc", harmless, None).map_err(self.failed(
            "mounting a private /proc (inside a container that hides parts of /proc use --sandbox=chroot or none)",
        ))?;
        mount_bind("/proc/self/fd", "/proc").map_err(self.failed("binding /proc/self/fd"))?;
        let proc_self_fd =
            open("/proc", DIRECTORY, Mode::empty()).map_err(self.failed("opening /proc/self/fd"))?;
        for step in ["detaching /proc/self/fd", "detaching the private /proc"] {
            unmount("/proc", UnmountFlags::DETACH).map_err(self.failed(step))?;
        }

        self.pivot(&clone)?;
        let root = open("/", DIRECTORY, Mode::empty()).map_err(self.failed("opening the new root"))?;
        Ok(View { root, proc_self_fd })
    }

    /// Takes from the clone what serving files never needs. Kernels before 5.12 cannot do it; that
    /// is no reason not to start: the server never opens device nodes and never executes, and read-only
    /// is enforced per request as well.
    fn restrict(&self, clone: &OwnedFd, readonly: bool) -> Result<(), Error> {
        let mut attributes = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
        if readonly {
            attributes |= libc::MOUNT_ATTR_RDONLY;
        }
        match set_mount_attributes(clone, attributes) {
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
                tracing::debug!("mount_setattr is not available: the export keeps its mount flags");
                Ok(())
            }
            Err(source) => Err(Error::Mount {
                export: self.export.to_owned(),
                step: "taking device nodes from the export",
                source,
            }),
            Ok(()) => Ok(()),
        }
    }

    fn pivot(&self, clone: &OwnedFd) -> Result<(), Error> {
        let old = open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(self.failed("opening the old root"))?;
        fchdir(clone).map_err(self.failed("changing to the export"))?;
        match pivot_root(".", ".") {
            Ok(()) => {
                // The old root now lies over the new one.
                fchdir(&old).map_err(self.failed("changing to the old root"))?;
                unmount(".", UnmountFlags::DETACH).map_err(self.failed("detaching the old root"))?;
                fchdir(clone).map_err(self.failed("changing to the export"))?;
            }
            // An initramfs cannot be pivoted away from. Its mount stays below the new root, where no
            // path leads: the root directory is the top of every walk.
            Err(Errno::INVAL) => {
                mount_move(".", "/").map_err(self.failed("moving the export over the root"))?;
                chroot(".").map_err(self.failed("chroot to the export"))?;
            }
            Err(errno) => return Err(self.failed("pivot_root to the export")(errno)),
        }
        chdir("/").map_err(self.failed("changing to the new root"))
    }

    fn chroot(&self) -> Result<View, Error> {
        let proc_self_fd =
            open("/proc/self/fd", DIRECTORY, Mode::empty()).map_err(self.failed("opening /proc/self/fd"))?;
        chroot(self.export).map_err(self.failed("chroot to the export"))?;
        chdir("/").map_err(self.failed("changing to the new root"))?;
        let root = open("/", DIRECTORY, Mode::empty()).map_err(self.failed("opening the new root"))?;
        Ok(View { root, proc_self_fd })
    }

    /// `O_DIRECTORY` is left out: a single file can be exported, in this mode alone.
    fn none(&self) -> Result<View, Error> {
        let proc_self_fd =
            open("/proc/self/fd", DIRECTORY, Mode::empty()).map_err(self.failed("opening /proc/self/fd"))?;
        let root = openat(CWD, self.export, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
            .map_err(self.failed("opening the export"))?;
        Ok(View { root, proc_self_fd })
    }
}

fn set_mount_attributes(tree: &OwnedFd, attributes: u64) -> io::Result<()> {
    let change = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation: 0, userns_fd: 0 };
    // SAFETY: the path is a constant C string and the kernel reads `change`, whose size it is told.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
