//! Every rule is needed: with it taken away a promise breaks, with it the same course holds.
//!
//! Each rule has a directed course, the shortest known way to break the promise, and where chance
//! finds a way too, a search over seeds. The oracle is the same in both and in the simulation.

use super::{
    action::{Action, Read, Shape, Wish, course, shrink},
    gateway::What,
    log::{Change, partition_of},
    oracle::Promise,
    projector::{Outcome, WORKER_COUNT},
    rules::{Rule, Rules},
    world::run,
};

mod answers;
mod memory;
mod projection;
mod tokens;

const SEED_COUNT: u64 = 4_000;

/// Aggregates `A` and `C` are of the first partition, `B` of the second.
const A: usize = 0;
const B: usize = 1;
const C: usize = 2;
const PRIMARY: usize = 0;
const EU: usize = 1;
const ASIA: usize = 2;
const X: usize = 0;
const Y: usize = 1;
const Z: usize = 2;

/// The course breaks `promise` without the rule, and nothing with it.
fn needed(rule: Rule, promise: Promise, actions: &[Action]) {
    if let Err((number, violation)) = run(Rules::all(), actions) {
        panic!("with all rules {:?} breaks {violation}", actions[number]);
    }
    match run(Rules::without(rule), actions) {
        Err((_, violation)) => assert_eq!(violation.promise, promise, "{violation}"),
        Ok(_) => panic!("without {rule:?} the course breaks nothing"),
    }
}

/// Chance finds a way to break `promise` without the rule, and none on the same seeds with it.
fn needed_by_chance(rule: Rule, promise: Promise, shape: &Shape) {
    for seed in 0..SEED_COUNT {
        let actions = course(seed, shape);
        if let Err((number, violation)) = run(Rules::all(), &actions) {
            panic!("with all rules seed {seed} breaks {violation} at {number}");
        }
        let found = run(Rules::without(rule), &actions);
        if found.is_err_and(|(_, violation)| violation.promise == promise) {
            let (shortest, violation) = shrink(Rules::without(rule), &actions);
            println!("without {rule:?} seed {seed} breaks {violation} by {shortest:#?}");
            return;
        }
    }
    panic!("without {rule:?} no seed below {SEED_COUNT} breaks {promise:?}");
}

fn write(caller: usize, aggregate: usize) -> Action {
    Action::Write { caller, aggregate, change: Change::Into(0), poison: false, late: false }
}

fn delete(caller: usize, aggregate: usize) -> Action {
    Action::Write { caller, aggregate, change: Change::Delete, poison: false, late: false }
}

fn poison(caller: usize, aggregate: usize) -> Action {
    Action::Write { caller, aggregate, change: Change::Into(0), poison: true, late: false }
}

/// A read that gets no help from the primary.
fn asked(caller: usize, region: usize, what: What) -> Read {
    let wish = Wish::Pending;
    Read {
        caller,
        region,
        what,
        wish,
        min_version: 0,
        alone: true,
        patient: false,
        dropped: false,
        late: false,
    }
}

fn read(caller: usize, region: usize, what: What) -> Action {
    Action::Read(asked(caller, region, what))
}

fn read_at_primary(caller: usize, what: What) -> Action {
    Action::Read(Read { wish: Wish::Primary, ..asked(caller, PRIMARY, what) })
}

/// One more event reaches the region.
fn arrive(region: usize) -> Action {
    Action::Arrive { region, lost: false }
}

/// The rightful worker of the aggregate's partition.
fn worker(aggregate: usize) -> usize {
    partition_of(aggregate) * WORKER_COUNT
}

fn plan(region: usize, worker: usize) -> Action {
    Action::Plan { region, worker, event_count: 9, store: false }
}

fn commit(region: usize, worker: usize, outcome: Outcome) -> Action {
    Action::Commit { region, worker, outcome }
}

/// The partition of the aggregate applies all that has arrived.
fn apply(region: usize, aggregate: usize) -> [Action; 2] {
    [plan(region, worker(aggregate)), commit(region, worker(aggregate), Outcome::Known)]
}

/// The gateway hears the oldest hint.
fn hear(region: usize) -> Action {
    Action::Hear { region, index: 0, again: false }
}
