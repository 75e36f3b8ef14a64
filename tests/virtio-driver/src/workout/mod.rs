//! A full round of file operations with checked results: what a correct daemon must do, whoever wrote it.
//!
//! Every step works through the FUSE client on one side and looks at the shared directory on the other, so that
//! neither a lying reply nor a missing effect goes unseen. The same round runs against the reference daemon and
//! against ours, over every kind of ring and memory.

mod attributes;
mod content;
mod names;
mod queues;

use std::path::{Path, PathBuf};

use crate::fuse::{Client, FuseError, FuseResult, Session};

/// What the daemon under test is started to do.
#[derive(Clone, Copy, Debug)]
pub struct Expectations {
    /// Extended attributes are on.
    pub xattr: bool,
    /// O_TMPFILE works.
    pub tmpfile: bool,
    /// The daemon acts as root and may take on the caller's identity.
    pub identities: bool,
}

/// A step that did not go as it must.
#[derive(Debug, thiserror::Error)]
#[error("{step}: {problem}")]
pub struct Failure {
    step: &'static str,
    problem: String,
}

/// What a step sees.
struct Bench<'a> {
    session: &'a mut Session,
    /// The shared directory on the host.
    shared: &'a Path,
    expect: Expectations,
}

impl Bench<'_> {
    fn client(&mut self) -> &mut Client {
        self.session.client()
    }

    fn host(&self, path: &str) -> PathBuf {
        self.shared.join(path)
    }
}

/// Outcome of a step.
type Step = Result<(), Problem>;

/// Why a step failed: an unexpected error or a wrong result.
#[derive(Debug)]
struct Problem(String);

impl From<FuseError> for Problem {
    fn from(error: FuseError) -> Self {
        Problem(format!("unexpected error: {error}"))
    }
}

impl From<crate::Error> for Problem {
    fn from(error: crate::Error) -> Self {
        Problem(error.to_string())
    }
}

impl From<std::io::Error> for Problem {
    fn from(error: std::io::Error) -> Self {
        Problem(format!("on the host: {error}"))
    }
}

/// Fails the step unless both are equal.
fn same<T: PartialEq + std::fmt::Debug>(what: &str, got: T, want: T) -> Step {
    if got == want { Ok(()) } else { Err(Problem(format!("{what}: got {got:?}, want {want:?}"))) }
}

/// Fails the step unless the condition holds.
fn ensure(what: &str, condition: bool) -> Step {
    if condition { Ok(()) } else { Err(Problem(what.to_owned())) }
}

/// Fails the step unless both byte strings are equal, naming the first difference.
fn same_bytes(what: &str, got: &[u8], want: &[u8]) -> Step {
    if got == want {
        return Ok(());
    }
    let at = got.iter().zip(want).position(|(got, want)| got != want).unwrap_or(got.len().min(want.len()));
    Err(Problem(format!("{what}: {} bytes, want {}, first difference at {at}", got.len(), want.len())))
}

/// Fails the step unless the operation is refused with this errno.
fn refused<T: std::fmt::Debug>(what: &str, result: FuseResult<T>, errno: rustix::io::Errno) -> Step {
    match result {
        Err(FuseError::Errno(got)) if got == errno => Ok(()),
        other => Err(Problem(format!("{what}: got {other:?}, want {errno}"))),
    }
}

/// Bytes in which every position is recognisable, different for every seed.
pub fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        // xorshift64: good enough that shifted or repeated blocks do not match.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

type StepFn = fn(&mut Bench<'_>) -> Step;

/// All steps, in order. Each cleans up the names it made, so that the order carries no meaning.
const STEPS: &[(&str, StepFn)] = &[
    ("init answers sane limits", queues::init_answers_sane_limits),
    ("missing names are ENOENT", names::missing_names_are_enoent),
    ("written bytes come back and are on the host", content::written_bytes_come_back),
    ("host changes are read", content::host_changes_are_read),
    ("reads at and beyond the end are short", content::reads_at_the_end_are_short),
    ("holes read as zeros and can be found", content::holes_read_as_zeros),
    ("space can be allocated and punched", content::space_can_be_allocated),
    ("ranges are copied between files", content::ranges_are_copied),
    ("open flags are obeyed", content::open_flags_are_obeyed),
    ("an unlinked open file lives on", content::an_unlinked_open_file_lives_on),
    ("sync operations succeed", content::sync_operations_succeed),
    ("unnamed files work", content::unnamed_files_work),
    ("attributes agree with the host", attributes::attributes_agree_with_the_host),
    ("attributes can be set", attributes::attributes_can_be_set),
    ("extended attributes round-trip", attributes::extended_attributes_round_trip),
    ("file system figures agree with the host", attributes::figures_agree_with_the_host),
    ("requests run as their caller", attributes::requests_run_as_their_caller),
    ("locks conflict between owners", attributes::locks_conflict_between_owners),
    ("directories list every entry once", names::directories_list_every_entry_once),
    ("directories nest and refuse removal when full", names::directories_nest),
    ("renames move, replace, refuse and exchange", names::renames_move),
    ("links share their target", names::links_share_their_target),
    ("special files are made but not opened", names::special_files_are_made),
    ("forgotten nodes can be looked up again", names::forgotten_nodes_come_back),
    ("many requests are in flight at once", queues::many_requests_in_flight),
    ("large transfers overlap correctly", queues::large_transfers_overlap),
    ("memory can be added and removed", queues::memory_comes_and_goes),
    ("all queues serve at once", queues::all_queues_serve_at_once),
];

/// Runs every step against a mounted session whose export is `shared` (empty, on the host). Returns the number of
/// steps.
pub fn run(session: &mut Session, shared: &Path, expect: Expectations) -> Result<usize, Failure> {
    for (name, step) in STEPS {
        let mut bench = Bench { session: &mut *session, shared, expect };
        step(&mut bench).map_err(|Problem(problem)| Failure { step: name, problem })?;
    }
    Ok(STEPS.len())
}
