//! The supervisor's life: wait, forward, report, clean up.
//!
//! | state | signal | server ends |
//! |---|---|---|
//! | serving | forward `SIGTERM`, start the grace period → ending | mirror its exit code |
//! | ending | `SIGKILL` → ending | 0 when it went by itself, an error when it had to be killed |
#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::Error;
use super::notify::{Notifier, State};
use crate::listener::Leftovers;
use crate::sandbox::options::SandboxOptions;
use crate::sandbox::process::{Ending, Event, Supervisor};
use crate::sandbox::signals::SignalFd;

/// Time the server has to end by itself. Management software that waits for a back-end to end
/// kills it after "a few seconds" (QEMU, docs/interop/vhost-user.rst, "Backend program conventions").
pub const GRACE: Duration = Duration::from_secs(3);

/// Watches the server until it ends, then removes `leftovers`.
///
/// # Errors
/// [`Error::Mirrored`] when the server failed and said why; [`Error::Killed`], [`Error::Stuck`].
pub fn supervise(
    mut supervisor: Supervisor,
    options: &SandboxOptions,
    signals: &SignalFd,
    notifier: &Notifier,
    leftovers: Leftovers,
) -> Result<(), Error> {
    supervisor.release(options)?;
    let ending = watch(&mut supervisor, signals, notifier);
    drop(leftovers);
    ending
}

fn watch(supervisor: &mut Supervisor, signals: &SignalFd, notifier: &Notifier) -> Result<(), Error> {
    let mut deadline: Option<Instant> = None;
    let mut killed = false;
    loop {
        let timeout = deadline.filter(|_| !killed).map(|at| at.saturating_duration_since(Instant::now()));
        match supervisor.next(signals, timeout) {
            Event::Ready => notifier.tell(State::Ready),
            Event::Signal(signal) if deadline.is_none() => {
                tracing::info!("{}: ending", name(signal));
                notifier.tell(State::Stopping);
                supervisor.signal(Signal::TERM);
                deadline = Some(Instant::now() + GRACE);
            }
            Event::Signal(_) | Event::Timeout => {
                killed = true;
                supervisor.signal(Signal::KILL);
            }
            Event::Ended(Ending::Exited(0)) => return Ok(()),
            Event::Ended(Ending::Exited(code)) => return Err(Error::Mirrored(code)),
            Event::Ended(Ending::Killed(_)) if killed => return Err(Error::Stuck),
            Event::Ended(Ending::Killed(signal)) => {
                return Err(Error::Killed { signal, advice: advice(signal) });
            }
        }
    }
}

fn name(signal: Signal) -> &'static str {
    match signal {
        Signal::TERM => "SIGTERM",
        Signal::INT => "SIGINT",
        Signal::HUP => "SIGHUP",
        _ => "signal",
    }
}

fn advice(signal: i32) -> &'static str {
    match signal {
        libc::SIGSYS => {
            " (SIGSYS): it made a system call that is not on the allow list; the kernel log names it \
             (audit type 1326), --seccomp=log lets it pass"
        }
        libc::SIGKILL => " (SIGKILL): somebody killed it, or memory ran out (see the kernel log)",
        libc::SIGBUS => " (SIGBUS): shared memory or the export's file system failed below it",
        libc::SIGSEGV => " (SIGSEGV)",
        libc::SIGABRT => " (SIGABRT)",
        _ => "",
    }
}
