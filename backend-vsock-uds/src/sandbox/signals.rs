//! Signals as something to wait for: the ones that end the daemon are blocked in every thread and
//! read from a `signalfd`, so that no code of ours ever runs in a signal handler.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::process::Signal;

use super::Error;

/// Signals that end the daemon cleanly.
pub const ENDING: [Signal; 3] = [Signal::TERM, Signal::INT, Signal::HUP];

/// The ending signals, to be polled and read.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks [`ENDING`] for this thread and every thread and process that it starts from now on,
    /// and ignores `SIGPIPE` (a peer that goes away is an error of the write, not a reason to die).
    ///
    /// # Errors
    /// [`Error::Signals`].
    pub fn take_over() -> Result<Self, Error> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: `sigemptyset` initialises the set that the other calls then use; the pointers are
        // valid for the calls; SIG_IGN is a valid disposition for SIGPIPE.
        let fd = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            for signal in ENDING {
                libc::sigaddset(set.as_mut_ptr(), signal.as_raw());
            }
            if libc::signal(libc::SIGPIPE, libc::SIG_IGN) == libc::SIG_ERR {
                return Err(Error::Signals(io::Error::last_os_error()));
            }
            let outcome = libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
            if outcome != 0 {
                return Err(Error::Signals(io::Error::from_raw_os_error(outcome)));
            }
            libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if fd < 0 {
            return Err(Error::Signals(io::Error::last_os_error()));
        }
        // SAFETY: `signalfd` just returned it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The next pending signal, if there is one.
    pub fn next(&self) -> Option<Signal> {
        let mut info = [0u8; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::read(&self.0, &mut info) {
            // `ssi_signo` is the first field (signalfd(2)).
            Ok(n) if n == info.len() => {
                let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                i32::try_from(number).ok().and_then(Signal::from_named_raw)
            }
            _ => None,
        }
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
