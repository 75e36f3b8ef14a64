//! Event descriptors of the front end that this side writes.
#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;

/// An event descriptor that is written without ever blocking.
#[derive(Debug)]
pub(super) struct Notifier {
    pub(super) fd: OwnedFd,
    /// The descriptor is in blocking mode, which is the front end's to choose.
    blocking: bool,
}

impl Notifier {
    pub(super) fn new(fd: OwnedFd) -> Notifier {
        let blocking = !rustix::fs::fcntl_getfl(&fd).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK));
        Notifier { fd, blocking }
    }

    /// Adds one. A full or closed descriptor is the front end's loss.
    pub(super) fn signal(&self) {
        if self.blocking {
            // An eventfd blocks its writer only when it is full, and then it is signalled anyway.
            let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            if poll(&mut fds, Some(&now)).is_err() || !fds[0].revents().contains(PollFlags::OUT) {
                return;
            }
        }
        let _ = rustix::io::write(&self.fd, &1u64.to_ne_bytes());
    }
}
