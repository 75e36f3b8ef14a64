//! One FUSE session: what was negotiated, shared by all threads that serve.
//!
//! | state | served | left by |
//! |---|---|---|
//! | closed | `INIT`; forgets are dropped, all else is `EIO` | a successful `INIT` |
//! | open | everything; a second `INIT` (a rebooted DPU) closes first | `DESTROY`, `INIT`, [`Session::close`] |
//!
//! The request path reads one atomic word. Changes of state are serialized by a lock that only
//! `INIT`, `DESTROY` and the end of the connection take. Requests that another queue has under way
//! while the state changes end as they would have; what they leave in the file system goes with
//! the next close, and the budgets of the file system bound it until then.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::io::Errno;
use tracing::{info, warn};

use super::abi::{InitIn, InitOut, MINOR_EXTENSIONS};
use super::counters::{Registry, Totals};
use super::extension::Accepted;
use super::init::{self, Agreement, Offered, Terms};
use super::init_flags::InitFlags;
use crate::filesystem::FileSystem;
use crate::host::options::HostOptions;

/// The parts of the wire format that depend on what was negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// `FUSE_SETXATTR` has its long arguments.
    pub setxattr_ext: bool,
    /// Extensions that may come.
    pub extensions: Accepted,
    /// A security label follows the names without being counted in the header (7.36 and 7.37).
    pub uncounted_label: bool,
}

/// Set in the state word while the session is open.
const OPEN: u64 = 1 << 63;
const SETXATTR_EXT: u64 = 1 << 0;
const GROUPS: u64 = 1 << 1;
const LABEL: u64 = 1 << 2;
const UNCOUNTED_LABEL: u64 = 1 << 3;

/// See the module.
#[derive(Debug)]
pub struct Session {
    offered: Offered,
    /// [`OPEN`] and the bits of [`Layout`]; 0 while closed.
    state: AtomicU64,
    /// Held while the state changes.
    change: Mutex<()>,
    registry: Arc<Registry>,
}

impl Session {
    /// A closed session of an export with these options.
    pub fn new(options: &HostOptions) -> Self {
        Self {
            offered: Offered::from(options),
            state: AtomicU64::new(0),
            change: Mutex::new(()),
            registry: Arc::default(),
        }
    }

    /// The wire format in force; `None` while closed.
    #[inline]
    pub fn layout(&self) -> Option<Layout> {
        let state = self.state.load(Ordering::Acquire);
        (state & OPEN != 0).then_some(Layout {
            setxattr_ext: state & SETXATTR_EXT != 0,
            extensions: Accepted { groups: state & GROUPS != 0, label: state & LABEL != 0 },
            uncounted_label: state & UNCOUNTED_LABEL != 0,
        })
    }

    /// Whether a DPU has it open.
    pub fn is_open(&self) -> bool {
        self.layout().is_some()
    }

    /// What was served so far, over all threads and connections.
    pub fn totals(&self) -> Totals {
        self.registry.totals()
    }

    /// The registry that each serving thread joins.
    pub(super) fn registry(&self) -> &Arc<Registry> {
        &self.registry
    }

    /// Serves `FUSE_INIT`.
    ///
    /// # Errors
    /// What the DPU is told. The session is then closed.
    pub fn open<F: FileSystem>(&self, fs: &F, asked: &InitIn) -> Result<InitOut, Errno> {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        self.shut(fs);
        match init::negotiate(asked, &self.offered) {
            Ok(Agreement::AskAgain(reply)) => {
                info!(major = asked.major, "DPU kernel speaks a newer FUSE protocol, asking for 7");
                Ok(reply)
            }
            Ok(Agreement::Start(terms)) => {
                fs.init(terms.negotiated);
                info!(minor = terms.minor, flags = ?terms.flags, "DPU mounted the export, FUSE 7");
                self.state.store(state(&terms), Ordering::Release);
                Ok(terms.reply)
            }
            Err(refusal) => {
                warn!("mount refused: {refusal}");
                Err(refusal.errno())
            }
        }
    }

    /// Serves `FUSE_DESTROY`, and is called when the connection ends: drops all state of the DPU.
    pub fn close<F: FileSystem>(&self, fs: &F) {
        let _change = self.change.lock().unwrap_or_else(PoisonError::into_inner);
        self.shut(fs);
    }

    /// Closes if open. New requests are refused before the file system drops its state.
    fn shut<F: FileSystem>(&self, fs: &F) {
        if self.state.swap(0, Ordering::AcqRel) != 0 {
            fs.destroy();
        }
    }
}

fn state(terms: &Terms) -> u64 {
    let has = |flag| terms.flags.contains(flag);
    let label = has(InitFlags::SECURITY_CTX);
    [
        (true, OPEN),
        (has(InitFlags::SETXATTR_EXT), SETXATTR_EXT),
        (has(InitFlags::CREATE_SUPP_GROUP), GROUPS),
        (label, LABEL),
        (label && terms.minor < MINOR_EXTENSIONS, UNCOUNTED_LABEL),
    ]
    .into_iter()
    .filter(|(set, _)| *set)
    .fold(0, |state, (_, bit)| state | bit)
}
