//! What can happen, and how a seed chooses it.

use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::{
    gateway::What,
    log::{Change, PARTITION_COUNT},
    oracle::Violation,
    projector::{Outcome, WORKER_COUNT},
    rules::Rules,
    world::{CALLER_COUNT, run},
};

/// One thing that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    Write { caller: usize, aggregate: usize, change: Change, poison: bool, late: bool },
    Repeat { caller: usize, write: usize },
    Conflict { caller: usize, aggregate: usize },
    Acknowledge { caller: usize, index: usize },
    Share { from: usize, to: usize },
    Read(Read),
    Turn { caller: usize, region: usize, list: u8 },
    Arrive { region: usize, lost: bool },
    FetchHoles { region: usize },
    Plan { region: usize, worker: usize, event_count: usize, store: bool },
    Commit { region: usize, worker: usize, outcome: Outcome },
    TakeOver { region: usize, worker: usize },
    FailOver { region: usize, copies_back: usize },
    Cure { region: usize },
    Retry { region: usize, aggregate: usize },
    Discard { region: usize, aggregate: usize },
    Hear { region: usize, index: usize, again: bool },
    LoseHint { region: usize, index: usize },
    Poll { region: usize },
    RestartGateway { region: usize },
    InsertLate { region: usize, index: usize },
}

/// One read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    pub caller: usize,
    pub region: usize,
    pub what: What,
    pub wish: Wish,
    /// Zero: none asked for.
    pub min_version: u64,
    pub alone: bool,
    pub patient: bool,
    pub dropped: bool,
    pub late: bool,
}

/// What the caller wants done when the read is not current.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    Shipped,
    Pending,
    Eventual,
    Primary,
}

/// How large a random world is, and what goes wrong in it.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub aggregate_count: usize,
    pub region_count: usize,
    pub action_count: usize,
    /// Databases that fall back, workers that are taken over, commits of unknown outcome.
    pub faults: bool,
    /// Events that cannot be applied, and operators.
    pub poison: bool,
    /// Hints that are lost, late and double; gateways that restart.
    pub lost_hints: bool,
}

impl Shape {
    pub const EVERYTHING: Self = Self {
        aggregate_count: 6,
        region_count: 3,
        action_count: 150,
        faults: true,
        poison: true,
        lost_hints: true,
    };
    pub const SMALL: Self =
        Self { aggregate_count: 2, region_count: 2, action_count: 50, ..Self::EVERYTHING };
    /// One aggregate in one region, where rare coincidences are likely.
    pub const LONELY: Self =
        Self { aggregate_count: 1, region_count: 1, action_count: 90, ..Self::EVERYTHING };
    pub const CALM: Self = Self { faults: false, poison: false, lost_hints: false, ..Self::SMALL };
    pub const POISONED: Self = Self { poison: true, ..Self::CALM };
    pub const FAULTY: Self = Self { poison: false, ..Self::SMALL };
}

/// The course of actions that a seed stands for.
pub fn course(seed: u64, shape: &Shape) -> Vec<Action> {
    let mut chance = Chance { rng: StdRng::seed_from_u64(seed), shape };
    (0..shape.action_count).map(|_| chance.action()).collect()
}

/// Takes away every action that the violation does not need.
pub fn shrink(rules: Rules, actions: &[Action]) -> (Vec<Action>, Violation) {
    let (last, mut violation) = run(rules, actions).expect_err("only what fails is shrunk");
    let mut shortest = actions[..=last].to_vec();
    let mut at = shortest.len();
    while at > 0 {
        at -= 1;
        let mut shorter = shortest.clone();
        shorter.remove(at);
        if let Err((last, other)) = run(rules, &shorter)
            && other.promise == violation.promise
        {
            shorter.truncate(last + 1);
            shortest = shorter;
            violation = other;
            at = at.min(shortest.len());
        }
    }
    (shortest, violation)
}

struct Chance<'a> {
    rng: StdRng,
    shape: &'a Shape,
}

impl Chance<'_> {
    fn action(&mut self) -> Action {
        let faults = u32::from(self.shape.faults);
        let poison = u32::from(self.shape.poison);
        let hints = u32::from(self.shape.lost_hints);
        let weights = [
            120,
            6,
            6,
            8,
            12,
            160,
            25,
            90,
            10 * faults,
            120,
            100,
            6 * faults,
            8 * faults,
            3 * poison,
            8 * poison,
            5 * poison,
            80,
            10 * hints,
            8 * hints,
            4 * hints,
            12,
        ];
        let mut ticket = self.rng.random_range(0..weights.iter().sum::<u32>());
        let kind = weights.iter().position(|weight| {
            let drawn = ticket < *weight;
            ticket = ticket.saturating_sub(*weight);
            drawn
        });
        self.action_of(kind.unwrap_or(0))
    }

    fn action_of(&mut self, kind: usize) -> Action {
        let (caller, region, aggregate) = (self.caller(), self.region(), self.aggregate());
        let (worker, index) = (self.worker(), self.small());
        match kind {
            0 => self.write(caller, aggregate),
            1 => Action::Repeat { caller, write: index },
            2 => Action::Conflict { caller, aggregate },
            3 => Action::Acknowledge { caller, index },
            4 => Action::Share { from: caller, to: self.caller() },
            5 => Action::Read(self.read(caller, region, aggregate)),
            6 => Action::Turn { caller, region, list: self.list() },
            7 => Action::Arrive { region, lost: self.shape.faults && self.one_in(12) },
            8 => Action::FetchHoles { region },
            9 => {
                let event_count = self.rng.random_range(1..4);
                Action::Plan { region, worker, event_count, store: self.one_in(4) }
            }
            10 => Action::Commit { region, worker, outcome: self.outcome() },
            11 => Action::TakeOver { region, worker },
            12 => Action::FailOver { region, copies_back: index + 1 },
            13 => Action::Cure { region },
            14 => Action::Retry { region, aggregate },
            15 => Action::Discard { region, aggregate },
            16 => {
                let again = self.shape.lost_hints && self.one_in(6);
                Action::Hear { region, index: if self.one_in(3) { index } else { 0 }, again }
            }
            17 => Action::LoseHint { region, index },
            18 => Action::Poll { region },
            19 => Action::RestartGateway { region },
            _ => Action::InsertLate { region, index },
        }
    }

    fn write(&mut self, caller: usize, aggregate: usize) -> Action {
        let change = if self.one_in(4) { Change::Delete } else { Change::Into(self.list()) };
        let poison = self.shape.poison && self.one_in(10);
        Action::Write { caller, aggregate, change, poison, late: self.one_in(10) }
    }

    fn read(&mut self, caller: usize, region: usize, aggregate: usize) -> Read {
        let what = match self.rng.random_range(0..6) {
            0 => What::List,
            1 => What::Rollup,
            _ => What::Row(aggregate),
        };
        let wish = match self.rng.random_range(0..16) {
            0 => Wish::Eventual,
            1 => Wish::Primary,
            2..9 => Wish::Pending,
            _ => Wish::Shipped,
        };
        Read {
            caller,
            region,
            what,
            wish,
            min_version: if self.one_in(12) { self.rng.random_range(1..4) } else { 0 },
            alone: self.one_in(6),
            patient: self.one_in(8),
            dropped: self.one_in(20),
            late: self.one_in(4),
        }
    }

    fn outcome(&mut self) -> Outcome {
        match self.rng.random_range(0..8) {
            0 if self.shape.faults => Outcome::Unknown,
            1 if self.shape.faults => Outcome::Crash,
            _ => Outcome::Known,
        }
    }

    fn worker(&mut self) -> usize {
        let rightful = self.rng.random_range(0..PARTITION_COUNT) * WORKER_COUNT;
        rightful + usize::from(self.shape.faults && self.one_in(4))
    }

    fn caller(&mut self) -> usize {
        self.rng.random_range(0..CALLER_COUNT.min(self.shape.region_count + 1))
    }

    fn region(&mut self) -> usize {
        self.rng.random_range(0..self.shape.region_count)
    }

    fn aggregate(&mut self) -> usize {
        self.rng.random_range(0..self.shape.aggregate_count)
    }

    fn list(&mut self) -> u8 {
        self.rng.random_range(0..2)
    }

    fn small(&mut self) -> usize {
        self.rng.random_range(0..4)
    }

    fn one_in(&mut self, count: u32) -> bool {
        self.rng.random_range(0..count) == 0
    }
}
