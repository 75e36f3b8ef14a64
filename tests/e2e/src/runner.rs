//! Runs cases and keeps the score.
//!
//! Cases of one profile follow each other on one session. After a failure the session is looked at, and replaced
//! if daemon or DPU cannot be used any more, so that one failure does not become many.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;

use crate::cases::{Body, Case};
use crate::expect::known_difference;
use crate::lab::{Lab, Profile, Session};

/// How a case came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// As it must be.
    Pass,
    /// Not as it must be.
    Fail,
    /// Fails, as it is known of this daemon.
    KnownDifference,
    /// Passes, although this daemon is listed as failing: the list is out of date.
    ListOutOfDate,
}

impl Outcome {
    /// True if the run as a whole may pass.
    #[must_use]
    pub fn is_fine(self) -> bool {
        matches!(self, Self::Pass | Self::KnownDifference)
    }

    fn word(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::KnownDifference => "differs",
            Self::ListOutOfDate => "PASSES NOW",
        }
    }
}

/// The result of one case.
#[derive(Clone, Debug, Serialize)]
pub struct Score {
    /// The case.
    pub case: String,
    /// How it came out.
    pub outcome: Outcome,
    /// Time taken, boot included where it is the case's own.
    pub seconds: f64,
    /// What it noted, or why it failed.
    pub note: String,
}

/// The results of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The daemon.
    pub daemon: String,
    /// All results in order.
    pub scores: Vec<Score>,
    /// Time for all of it.
    pub seconds: f64,
}

impl Report {
    /// True if nothing stands against the daemon.
    #[must_use]
    pub fn is_fine(&self) -> bool {
        self.scores.iter().all(|score| score.outcome.is_fine())
    }

    /// The table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(UTF8_BORDERS_ONLY)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_header(["case", "result", "seconds", "note"]);
        for score in &self.scores {
            let first_line = score.note.lines().next().unwrap_or_default();
            table.add_row([&score.case, score.outcome.word(), &format!("{:.1}", score.seconds), first_line]);
        }
        let count = |outcome| self.scores.iter().filter(|score| score.outcome == outcome).count();
        format!(
            "{table}\n{}: {} cases in {:.0} s: {} pass, {} fail, {} known differences, {} pass although listed as differing",
            self.daemon,
            self.scores.len(),
            self.seconds,
            count(Outcome::Pass),
            count(Outcome::Fail),
            count(Outcome::KnownDifference),
            count(Outcome::ListOutOfDate),
        )
    }
}

/// Runs the cases in order; each result is told as soon as it is there.
#[must_use]
pub fn run(lab: &Lab, cases: &[Case], mut tell: impl FnMut(&Score)) -> Report {
    let start = Instant::now();
    let mut runner = Runner { lab, session: None, scores: Vec::new(), tell: &mut tell };
    for case in cases {
        runner.run(case);
    }
    runner.end_session();
    Report {
        daemon: lab.daemon.version.clone(),
        scores: runner.scores,
        seconds: start.elapsed().as_secs_f64(),
    }
}

struct Runner<'run> {
    lab: &'run Lab,
    session: Option<(&'static Profile, Session)>,
    scores: Vec<Score>,
    tell: &'run mut dyn FnMut(&Score),
}

impl Runner<'_> {
    fn run(&mut self, case: &Case) {
        match case.body {
            Body::Shared(profile, body) => {
                if self.session.as_ref().is_none_or(|(current, _)| *current != profile) {
                    self.end_session();
                    let start = Instant::now();
                    match Session::start(self.lab, profile) {
                        Ok(session) => self.session = Some((profile, session)),
                        Err(error) => return self.score(case, start.elapsed(), Err(error)),
                    }
                }
                let start = Instant::now();
                let Some((_, session)) = &mut self.session else { return };
                let result = guarded(|| {
                    let mut stage = session.stage(case.name)?;
                    let note = body(&mut stage)?;
                    stage.daemon.check_alive()?;
                    Ok(note)
                });
                let result = result.map_err(|error| error.context(session.daemon.log_tail()));
                if result.is_err() && !session.is_usable() {
                    self.session = None;
                }
                self.score(case, start.elapsed(), result);
            }
            Body::Own(body) => {
                self.end_session();
                let start = Instant::now();
                let result = guarded(|| body(self.lab));
                self.score(case, start.elapsed(), result);
            }
        }
    }

    /// Ends the session, if there is one; that it ends well is a result of its own.
    fn end_session(&mut self) {
        let Some((profile, session)) = self.session.take() else { return };
        let start = Instant::now();
        let result = guarded(|| session.end().context("unmount, switch off, and code 0 of the daemon"));
        let name = format!("end-of-{}", profile.name);
        self.keep(name, start.elapsed(), result.map(|()| String::new()), None);
    }

    fn score(&mut self, case: &Case, elapsed: Duration, result: Result<String>) {
        let known = known_difference(self.lab.daemon.flavor, case.name);
        self.keep(case.name.to_owned(), elapsed, result, known);
    }

    fn keep(&mut self, case: String, elapsed: Duration, result: Result<String>, known: Option<&str>) {
        let (outcome, note) = match (result, known) {
            (Ok(note), None) => (Outcome::Pass, note),
            (Ok(_), Some(reason)) => (Outcome::ListOutOfDate, format!("listed as: {reason}")),
            (Err(error), Some(reason)) => {
                (Outcome::KnownDifference, format!("{reason}\n{}", explain(&error)))
            }
            (Err(error), None) => (Outcome::Fail, explain(&error)),
        };
        let score = Score { case, outcome, seconds: elapsed.as_secs_f64(), note };
        (self.tell)(&score);
        self.scores.push(score);
    }
}

/// The cause first, then what was going on, then logs.
fn explain(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = error.chain().map(ToString::to_string).collect();
    // Logs are attached outermost, and are the longest.
    parts.sort_by_key(|part| part.contains('\n'));
    parts.join("; ")
}

/// A panic in a case is a failure of that case.
fn guarded<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_default();
        Err(anyhow!("the case panicked: {text}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_with_its_text() {
        let error = guarded::<()>(|| panic!("out of range {}", 7)).unwrap_err();
        assert!(error.to_string().contains("out of range 7"));
    }

    #[test]
    fn the_cause_comes_before_the_log() {
        let error = anyhow!("cause").context("doing this").context("daemon log:\n  a\n  b");
        assert_eq!(explain(&error), "doing this; cause; daemon log:\n  a\n  b");
    }

    #[test]
    fn a_report_with_a_failure_is_not_fine() {
        let score = |outcome| Score { case: "c".to_owned(), outcome, seconds: 0.1, note: "n".to_owned() };
        let report = |outcome| Report { daemon: "d".to_owned(), scores: vec![score(outcome)], seconds: 0.1 };
        assert!(report(Outcome::Pass).is_fine() && report(Outcome::KnownDifference).is_fine());
        assert!(!report(Outcome::Fail).is_fine() && !report(Outcome::ListOutOfDate).is_fine());
        assert!(report(Outcome::Fail).table().contains("FAIL"));
    }
}
