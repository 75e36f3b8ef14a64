//! Descriptors that came with `exec`: stage 0 closes those nobody named, `--fd` takes one over.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// First descriptor that is not a standard stream.
const FIRST: u32 = 3;

/// Closes every descriptor from 3 on but `keep`. To be called first in `main`, before anything of
/// this process opened one: a descriptor leaked by the caller would otherwise stay open in the
/// isolated process and lead past every change of root.
///
/// # Errors
/// From `close_range(2)`; on kernels before 5.9, which lack the call, nothing is closed and
/// nothing fails.
pub fn close_inherited(keep: Option<RawFd>) -> io::Result<()> {
    let keep = keep.and_then(|fd| u32::try_from(fd).ok()).filter(|fd| *fd >= FIRST);
    match keep {
        None => close_range(FIRST, u32::MAX),
        Some(fd) => {
            if fd > FIRST {
                close_range(FIRST, fd - 1)?;
            }
            close_range(fd + 1, u32::MAX)
        }
    }
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the numbers are not used by this process: the caller calls this before it opens any.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if outcome == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}

/// Makes an inherited descriptor (`--fd`) this process's own, closed on `exec`.
///
/// # Errors
/// `EBADF` when it is not open.
pub fn take_inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only looks at the number.
    if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open (checked above), and `--fd` hands its ownership to this process; nothing
    // else here knows the number.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owned)
}
