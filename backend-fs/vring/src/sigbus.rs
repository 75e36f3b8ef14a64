//! Keeps the daemon alive when shared memory is taken away under it.
//!
//! A front end that truncates its memory file leaves mappings without backing; touching them raises
//! SIGBUS, which would end the process and with it every other front end. Mappings of DPU memory are
//! therefore [`register`]ed in a table that the signal handler can read without locks. A fault inside
//! a registered mapping puts a page of private zeroes in place, sets the mapping's "lost" flag and
//! writes to its event descriptor; the interrupted copy then goes on and the session that owns the
//! mapping ends with a clear message. A SIGBUS from anywhere else keeps its default action.
//!
//! The table is a fixed array of atomics. A slot belongs to a mapping as long as its [`Guard`] lives;
//! the thread that faults holds the mapping, so the slot that matters cannot change while the handler
//! looks at it. Other slots may change at the same time: they are read as start, length, start again.
//!
//! System calls that touch lost memory fail with EFAULT and need no help.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::{Arc, Once};

/// Mappings that can be registered at a time: several full memory tables.
pub const MAX_MAPPINGS: usize = 4096;

struct Slot {
    taken: AtomicBool,
    /// First address, 0 while the slot is not in use.
    start: AtomicUsize,
    len: AtomicUsize,
    page_size: AtomicUsize,
    event: AtomicI32,
    lost: AtomicBool,
}

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page_size: AtomicUsize::new(0),
            event: AtomicI32::new(-1),
            lost: AtomicBool::new(false),
        }
    }
}

static SLOTS: [Slot; MAX_MAPPINGS] = [const { Slot::new() }; MAX_MAPPINGS];
/// Slots below this index may be in use; only grows.
static HIGH_WATER: AtomicUsize = AtomicUsize::new(0);
static INSTALL: Once = Once::new();

/// No slot is free: [`MAX_MAPPINGS`] mappings exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_MAPPINGS} memory regions are mapped already, no further one can be guarded")]
pub struct RegistryFull;

/// A registered mapping. Drop it *before* the mapping goes.
#[derive(Debug)]
pub struct Guard {
    slot: usize,
    /// Keeps the descriptor open that the handler writes to.
    _event: Arc<OwnedFd>,
}

impl Guard {
    /// Whether a page of the mapping was lost.
    pub fn is_lost(&self) -> bool {
        SLOTS[self.slot].lost.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let slot = &SLOTS[self.slot];
        slot.start.store(0, Ordering::SeqCst);
        slot.event.store(-1, Ordering::SeqCst);
        slot.taken.store(false, Ordering::Release);
    }
}

/// Guards the mapping `start..start + len`, whose pages have `page_size` bytes. `event` is an eventfd
/// that gets a write when a page is lost.
///
/// # Errors
/// [`RegistryFull`].
pub fn register(
    start: usize,
    len: usize,
    page_size: usize,
    event: Arc<OwnedFd>,
) -> Result<Guard, RegistryFull> {
    INSTALL.call_once(install);
    for (index, slot) in SLOTS.iter().enumerate() {
        if slot.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok() {
            slot.lost.store(false, Ordering::SeqCst);
            slot.len.store(len, Ordering::SeqCst);
            slot.page_size.store(page_size, Ordering::SeqCst);
            slot.event.store(event.as_raw_fd(), Ordering::SeqCst);
            slot.start.store(start, Ordering::SeqCst);
            HIGH_WATER.fetch_max(index + 1, Ordering::SeqCst);
            return Ok(Guard { slot: index, _event: event });
        }
    }
    Err(RegistryFull)
}

/// The slot whose mapping holds `address`, with the page the address lies in.
fn find(address: usize) -> Option<(&'static Slot, usize, usize)> {
    let used = HIGH_WATER.load(Ordering::SeqCst).min(MAX_MAPPINGS);
    SLOTS[..used].iter().find_map(|slot| {
        let start = slot.start.load(Ordering::SeqCst);
        let len = slot.len.load(Ordering::SeqCst);
        let page_size = slot.page_size.load(Ordering::SeqCst);
        let same = slot.start.load(Ordering::SeqCst) == start;
        let inside = start != 0 && same && address >= start && address - start < len;
        (inside && page_size.is_power_of_two()).then_some((slot, address & !(page_size - 1), page_size))
    })
}

fn install() {
    // SAFETY: `action` is fully initialised (zeroed is a valid `sigaction`); the handler only uses
    // async-signal-safe system calls and atomics. SA_ONSTACK uses the stacks that std gives threads.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        // Cannot fail: SIGBUS may be handled and the pointers are valid.
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut());
    }
}

extern "C" fn on_sigbus(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; errno belongs to the interrupted thread and is put
    // back. `mmap`, `write`, `sigaction` and `raise` are async-signal-safe. MAP_FIXED replaces exactly
    // one page of a registered mapping, which the faulting thread keeps alive (module docs).
    unsafe {
        let saved_errno = *libc::__errno_location();
        let from_kernel = (*info).si_code > 0;
        let address = (*info).si_addr() as usize;
        if from_kernel && let Some((slot, page, page_size)) = find(address) {
            let replaced = libc::mmap(
                page as *mut libc::c_void,
                page_size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if replaced != libc::MAP_FAILED {
                slot.lost.store(true, Ordering::Release);
                notify(slot.event.load(Ordering::SeqCst));
                *libc::__errno_location() = saved_errno;
                return;
            }
        }
        // Not ours: restore the default action. A fault recurs on return and then ends the process;
        // a signal that somebody sent must be sent again.
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGBUS, &raw const default, std::ptr::null_mut());
        if !from_kernel {
            libc::raise(libc::SIGBUS);
        }
        *libc::__errno_location() = saved_errno;
    }
}

/// Adds one to the eventfd. It is non-blocking and its value is never important.
fn notify(event: RawFd) {
    let one = 1u64;
    // SAFETY: `one` is eight readable bytes; a bad descriptor only makes the call fail.
    let _ = unsafe { libc::write(event, (&raw const one).cast(), 8) };
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Runs the test `name` of this binary in a process of its own, with a variable that makes it do
    /// the deadly thing. Returns the signal that ended it.
    fn die(name: &str) -> Option<i32> {
        let exe = std::env::current_exe().unwrap();
        let full_name = format!("sigbus::tests::{name}");
        let mut child = Command::new(exe);
        child.args(["--exact", &full_name, "--nocapture"]).env("SIGBUS_TEST_DIE", name);
        child.output().unwrap().status.signal()
    }

    fn must_die(name: &str) -> bool {
        std::env::var("SIGBUS_TEST_DIE").is_ok_and(|value| value == name)
    }

    fn guarded() -> Guard {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
        register(0x1000, 0x1000, 0x1000, Arc::new(event)).unwrap()
    }

    #[test]
    fn sent_signal_keeps_its_default_action() {
        if must_die("sent_signal_keeps_its_default_action") {
            let _guard = guarded();
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::BUS).unwrap();
            return;
        }
        assert_eq!(die("sent_signal_keeps_its_default_action"), Some(libc::SIGBUS));
    }

    #[test]
    fn fault_outside_of_registered_mappings_keeps_its_default_action() {
        if must_die("fault_outside_of_registered_mappings_keeps_its_default_action") {
            let _guard = guarded();
            let fd = rustix::fs::memfd_create(c"sigbus", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
            let flags = rustix::mm::MapFlags::SHARED;
            // SAFETY: a fresh mapping of an empty file; reading it faults, which is the point.
            unsafe {
                let address = std::ptr::null_mut();
                let base =
                    rustix::mm::mmap(address, 4096, rustix::mm::ProtFlags::READ, flags, &fd, 0).unwrap();
                base.cast::<u8>().read_volatile();
            }
            return;
        }
        let signal = die("fault_outside_of_registered_mappings_keeps_its_default_action");
        assert_eq!(signal, Some(libc::SIGBUS));
    }
}
