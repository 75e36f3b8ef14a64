//! `bench`: the daemons side by side with their peers and with the bare system calls.
//!
//! One process plays the DPU's driver (crate `virtio-driver`), bound to CPU 0; every daemon is bound to CPU 1. All
//! contenders run at the same time, idle except when it is their turn; rounds interleave (peer, peer, peer, ours,
//! limit, and again), so that a change of the machine's mood meets all of them. Every reply is checked, every read
//! byte compared at least at the borders of its page, every write found again in the file.
//!
//! Map: [`args`] command line, [`fixture`] shared directory, [`contender`] who is started how, [`rows`] what is
//! measured and what the goals are, [`load`] what one round does, [`limit`] the same without a daemon, [`measure`]
//! clocks and CPUs, [`report`] verdicts, table and JSON.

mod args;
mod contender;
mod fixture;
mod limit;
mod load;
mod measure;
mod report;
mod rows;

use std::num::NonZeroUsize;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use virtio_driver::memory::HugepageReservation;

use args::{Arguments, FsArguments, Subject};
use contender::{Contender, Rig};
use fixture::Fixture;
use limit::LimitRig;
use measure::{DRIVER_CPU, pin_this_thread};
use report::{Machine, Outcome, Rounds};
use rows::{ROWS, Row};

fn main() -> ExitCode {
    let Subject::Fs(args) = Arguments::parse().subject;
    let rows = match select(&args.only) {
        Ok(rows) => rows,
        Err(error) => {
            eprintln!("bench: {error:#}");
            return ExitCode::from(2);
        }
    };
    match run(&args, &rows) {
        Ok(met) if met || !args.gate => ExitCode::SUCCESS,
        Ok(_) => ExitCode::from(1),
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(1)
        }
    }
}

/// Measures and prints; true if every goal was met.
fn run(args: &FsArguments, rows: &[&'static Row]) -> anyhow::Result<bool> {
    if args.list {
        rows.iter().for_each(|row| {
            println!("{:4} {:36} {:10} {}", row.id, row.title(), row.metric.unit(), report::goal_text(row));
        });
        return Ok(true);
    }
    let mut contenders =
        vec![Contender::Virtiofsd, Contender::VirtiofsdNoHandles, Contender::CVirtiofsd, Contender::Ours];
    let mut hugepages = None;
    if rows.iter().any(|row| row.about_hugepages()) {
        hugepages = reserve_hugepages();
        contenders.extend(hugepages.as_ref().map(|_| Contender::OursHugepages));
    }
    Contender::check_all(&contenders, args)?;
    if rustix::process::geteuid().as_raw() != 0 {
        bail!("the benchmark needs root: the peers keep capabilities and file handles only as root");
    }

    let machine = Machine::here();
    eprintln!("{} on {} x {}, load {}", machine.kernel, machine.cpus, machine.cpu, machine.load);
    if machine.load > 1.0 {
        eprintln!(
            "warning: the machine is busy; whoever sleeps looks better than he is, repeat this on a quiet machine"
        );
    }
    pin_this_thread(DRIVER_CPU)?;
    let fixture = Fixture::new()?;
    let mut rigs = contenders
        .iter()
        .map(|contender| Rig::start(*contender, args, &fixture))
        .collect::<anyhow::Result<Vec<_>>>()?;
    let limits = LimitRig::new(&fixture)?;

    let mut outcomes = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let rounds = measure_row(row, args, &mut rigs, &limits)
            .with_context(|| format!("{} {}", row.id, row.title()))?;
        let outcome = report::judge(row, &rounds);
        eprintln!("{:2}/{} {}", index + 1, rows.len(), progress(&outcome));
        outcomes.push(outcome);
    }
    drop(rigs);
    drop(hugepages);
    print_report(args, &machine, rows, &outcomes)?;
    Ok(outcomes.iter().all(|outcome| outcome.missed.is_empty()))
}

/// The rows a selection names; all if it is empty.
fn select(only: &[String]) -> anyhow::Result<Vec<&'static Row>> {
    for selection in only {
        if !ROWS.iter().any(|row| row.is_named_by(selection)) {
            bail!("no row is called {selection:?}; `bench fs --list` shows them");
        }
    }
    let named = |row: &&Row| only.is_empty() || only.iter().any(|selection| row.is_named_by(selection));
    Ok(ROWS.iter().filter(named).collect())
}

/// Hugepages for one more session, or none with a word about it.
fn reserve_hugepages() -> Option<HugepageReservation> {
    match HugepageReservation::new(NonZeroUsize::new(128 << 20)?) {
        Ok(reservation) => Some(reservation),
        Err(error) => {
            eprintln!("without the hugepage rows: {error}");
            None
        }
    }
}

/// All rounds of one row, interleaved.
fn measure_row(row: &Row, args: &FsArguments, rigs: &mut [Rig], limits: &LimitRig) -> anyhow::Result<Rounds> {
    let mut rounds = Rounds::default();
    let length = args.round_length();
    for number in 0..args.rounds() {
        let seed = u64::from(number);
        for rig in rigs.iter_mut() {
            let ours = matches!(rig.contender, Contender::Ours | Contender::OursHugepages);
            if row.about_hugepages() && !ours
                || !row.about_hugepages() && rig.contender == Contender::OursHugepages
            {
                continue;
            }
            let round = row
                .load
                .run(rig, row.completion, length, seed)
                .with_context(|| format!("{:?}, round {}", rig.contender, number + 1))?;
            rounds.push(rig.contender, round);
        }
        rounds.limit.extend(limits.run(row.limit, row.completion, length, seed)?);
    }
    Ok(rounds)
}

/// One line per finished row.
fn progress(outcome: &Outcome) -> String {
    let figures: Vec<String> =
        outcome.figures.iter().map(|(name, value)| format!("{name} {value:.2}")).collect();
    format!("{} {} ({}): {}", outcome.id, outcome.name, outcome.unit, figures.join(", "))
}

fn print_report(
    args: &FsArguments,
    machine: &Machine,
    rows: &[&Row],
    outcomes: &[Outcome],
) -> anyhow::Result<()> {
    println!("{}", report::table(rows, outcomes));
    let compared: Vec<bool> = outcomes.iter().filter_map(|outcome| outcome.not_slower).collect();
    let not_slower = compared.iter().filter(|fast| **fast).count();
    let met = outcomes.iter().filter(|outcome| outcome.missed.is_empty()).count();
    println!("not slower than the fastest peer: {not_slower} of {} rows", compared.len());
    println!("goals met: {met} of {} rows", outcomes.len());
    println!(
        "P: the driver polls; E: it sleeps on an eventfd. {} rounds of {:?}, {} on {} x {}, load {}",
        args.rounds(),
        args.round_length(),
        machine.kernel,
        machine.cpus,
        machine.cpu,
        machine.load
    );
    if let Some(path) = &args.json {
        let report = report::Report {
            machine,
            rounds: args.rounds(),
            round_seconds: args.round_length().as_secs_f64(),
            rows: outcomes,
        };
        report::write_json(path, &report)?;
    }
    Ok(())
}
