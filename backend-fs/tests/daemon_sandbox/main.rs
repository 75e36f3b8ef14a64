//! The sandbox, from inside and from outside: real processes take it on and try to get past it.
//!
//! The test program is two programs. Started by `cargo test` it runs the cases; started as
//! `<self> probe …` it is a daemon without a device ([`probe`]): it splits, confines and seals itself
//! with the daemon's own code, then does the one thing it was told to try and says how that went.
//! Cases need root, as the daemon's namespaces do; those of an unprivileged daemon run the probe as
//! user 65534.

#![allow(clippy::unwrap_used, clippy::expect_used)] // Helpers of tests fail by panicking, like tests.

mod cases;
mod forbidden;
mod probe;
mod run;

use std::panic::catch_unwind;
use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let first = arguments.next();
    if first.as_deref() == Some("probe") {
        return probe::main(arguments);
    }
    let rest: Vec<String> = first.into_iter().chain(arguments).collect();
    if rest.iter().any(|argument| argument == "--list") {
        for (name, _) in cases::ALL {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    let filters: Vec<&String> = rest.iter().filter(|argument| !argument.starts_with('-')).collect();
    let chosen =
        |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let mut failed = Vec::new();
    let mut passed = 0;
    for (name, case) in cases::ALL.iter().filter(|(name, _)| chosen(name)) {
        let good = catch_unwind(case).is_ok();
        println!("test {name} ... {}", if good { "ok" } else { "FAILED" });
        if good {
            passed += 1;
        } else {
            failed.push(*name);
        }
    }
    println!(
        "\ntest result: {}. {passed} passed; {} failed",
        if failed.is_empty() { "ok" } else { "FAILED" },
        failed.len()
    );
    if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
