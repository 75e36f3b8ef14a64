//! The cases: name, group, set-up, and what each proves.
//!
//! Cases of the same profile share one boot, each in a directory of its own. A case that needs its own daemon or
//! DPU gets the laboratory. A case returns a short note for the table (figures, counts).

pub mod attributes;
pub mod coherence;
pub mod conformance;
pub mod content;
pub mod files;
pub mod lifecycle;
pub mod locks;
pub mod mounting;
pub mod queues;

use anyhow::Result;
use serde::Serialize;

use crate::lab::{Lab, Profile, Stage};

/// Which run a case belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// Quick cases, one behaviour each.
    Basic,
    /// Third-party suites.
    Conformance,
}

/// What a case runs on, and its body.
#[derive(Clone, Copy)]
pub enum Body {
    /// Shares daemon and DPU with the other cases of the profile.
    Shared(&'static Profile, fn(&mut Stage<'_>) -> Result<String>),
    /// Sets up its own.
    Own(fn(&Lab) -> Result<String>),
}

/// One case.
#[derive(Clone, Copy)]
pub struct Case {
    /// Its name, unique.
    pub name: &'static str,
    /// Its group.
    pub group: Group,
    /// What it proves, in a few words.
    pub about: &'static str,
    /// What to do.
    pub body: Body,
}

impl Case {
    const fn basic(
        name: &'static str,
        profile: &'static Profile,
        body: fn(&mut Stage<'_>) -> Result<String>,
        about: &'static str,
    ) -> Self {
        Self { name, group: Group::Basic, about, body: Body::Shared(profile, body) }
    }

    const fn conformance(
        name: &'static str,
        profile: &'static Profile,
        body: fn(&mut Stage<'_>) -> Result<String>,
        about: &'static str,
    ) -> Self {
        Self { name, group: Group::Conformance, about, body: Body::Shared(profile, body) }
    }

    const fn own(name: &'static str, body: fn(&Lab) -> Result<String>, about: &'static str) -> Self {
        Self { name, group: Group::Basic, about, body: Body::Own(body) }
    }
}

/// All cases, in the order of running.
#[must_use]
pub fn all() -> Vec<Case> {
    [
        mounting::CASES,
        files::CASES,
        attributes::CASES,
        content::CASES,
        locks::CASES,
        coherence::CASES,
        queues::CASES,
        lifecycle::CASES,
        conformance::CASES,
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique_and_fit_for_directories() {
        let cases = all();
        let names: BTreeSet<_> = cases.iter().map(|case| case.name).collect();
        assert_eq!(names.len(), cases.len());
        assert!(
            names
                .iter()
                .all(|name| name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-'))
        );
    }
}
