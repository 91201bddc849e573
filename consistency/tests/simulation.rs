//! A seeded simulation of regions, projectors, gateways and callers around the rules of this crate,
//! and the proof by removal that each rule is needed.
//!
//! The world under `simulation/` keeps a log, regions with a read model each, workers that crash and
//! are replaced, hints that are lost, late and double, operators, and callers who hand each other
//! their tokens. It decides nothing itself: tokens, demands, judgements, decisions, admission and
//! memory are those of the crate. An oracle knows for each caller what it wrote, saw, and causally
//! depends on, and every answer is held against that.
//!
//! `SIMULATION_SEED=17` replays one seed of every shape, `SIMULATION_SEEDS=100000` tries more.

mod simulation {
    pub mod action;
    pub mod counterexamples;
    pub mod database;
    pub mod gateway;
    pub mod log;
    pub mod oracle;
    pub mod projector;
    pub mod read;
    pub mod rules;
    pub mod world;
}

use std::{ops::Range, str::FromStr};

use simulation::{
    action::{Shape, course, shrink},
    rules::Rules,
    world::{Tally, run},
};

fn variable<T: FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is not a number: {text}")))
}

fn seeds(count: u64) -> Range<u64> {
    match variable("SIMULATION_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..variable("SIMULATION_SEEDS").unwrap_or(count),
    }
}

/// Runs every seed, and gives back how the reads of all of them ended.
fn hold(shape: &Shape, seed_count: u64) -> Tally {
    let mut all = Tally::default();
    for seed in seeds(seed_count) {
        let actions = course(seed, shape);
        match run(Rules::all(), &actions) {
            Ok(world) => all.add(&world.tally),
            Err(_) => {
                let (shortest, violation) = shrink(Rules::all(), &actions);
                let lines: String =
                    shortest.iter().map(|action| format!("  {action:?}\n")).collect();
                panic!("SIMULATION_SEED={seed} breaks {violation}\nin {shape:?} by\n{lines}");
            }
        }
    }
    all
}

fn tried_everything(tally: &Tally) -> bool {
    let Tally { current, recalled, folded, eventual, parked, unanswered } = *tally;
    [current, recalled, folded, eventual, parked, unanswered].iter().all(|count| *count > 0)
}

#[test]
fn every_promise_holds_in_large_worlds_where_everything_goes_wrong() {
    let tally = hold(&Shape::EVERYTHING, 2_500);
    assert!(variable::<u64>("SIMULATION_SEED").is_some() || tried_everything(&tally), "{tally:?}");
}

#[test]
fn every_promise_holds_in_small_worlds_where_everything_goes_wrong() {
    hold(&Shape::SMALL, 5_000);
    hold(&Shape::LONELY, 4_000);
}

#[test]
fn every_promise_holds_where_nothing_fails() {
    hold(&Shape::CALM, 4_000);
}

#[test]
fn every_promise_holds_around_poison() {
    hold(&Shape::POISONED, 4_000);
}

#[test]
fn every_promise_holds_around_failing_databases_and_workers() {
    hold(&Shape::FAULTY, 4_000);
}
