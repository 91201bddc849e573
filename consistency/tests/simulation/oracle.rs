//! What each caller knows, and what an answer owes it.

use std::fmt;

use consistency::{Claim, Epoch, LogPosition, Token};

use super::log::{AGGREGATE_COUNT, Knowledge};

/// What was broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Promise {
    /// Read your writes.
    G1,
    /// Monotonic and causal reads.
    G2,
    /// Effects happen once.
    G4,
    /// Poison does not fake currency.
    G7,
    /// An event can never be applied.
    Stuck,
    /// A version asked for by hand was not shown.
    MinVersion,
    /// A read at the primary missed an event that was in the log when it arrived.
    Linearizable,
    /// An item that was in a list all along was on none of its pages.
    Pages,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    pub promise: Promise,
    pub text: String,
}

impl Violation {
    pub fn new(promise: Promise, text: String) -> Self {
        Self { promise, text }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.promise, self.text)
    }
}

/// Why an answer says `stale`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stale {
    /// Its caller was content with whatever is here.
    Eventual,
    /// It lacks events of a parked aggregate.
    Parked,
}

/// What a 200 shows.
#[derive(Debug, Clone)]
pub struct Answer {
    /// The version of each aggregate that it shows; `None` for those that it says nothing about.
    pub shown: [Option<u64>; AGGREGATE_COUNT],
    /// First event of each aggregate that its snapshot had parked.
    pub parked: [Option<u64>; AGGREGATE_COUNT],
    /// The position that its token covers.
    pub covers: u64,
    /// The position it reports.
    pub reports: Option<u64>,
    /// Whether it says `stale`, and why.
    pub stale: Option<Stale>,
}

/// One caller: what it holds, and what the oracle knows that it knows.
#[derive(Debug)]
pub struct Caller {
    pub token: Token,
    pub knows: Knowledge,
    pub wrote: Knowledge,
    /// Its acknowledged writes.
    pub writes: Vec<Claim>,
    /// Answers to its writes that are on their way.
    pub on_the_way: Vec<(Token, usize, u64)>,
    pub walk: Option<Walk>,
}

/// A walk over the pages of a list, one item a page.
#[derive(Debug, Clone)]
pub struct Walk {
    pub list: u8,
    pub after: Option<(u64, usize)>,
    pub cursor: LogPosition,
    pub knows: Knowledge,
    pub seen: Vec<usize>,
    pub always: Vec<usize>,
}

impl Caller {
    pub fn new() -> Self {
        Self {
            token: Token::new(Epoch::FIRST),
            knows: [0; AGGREGATE_COUNT],
            wrote: [0; AGGREGATE_COUNT],
            writes: Vec::new(),
            on_the_way: Vec::new(),
            walk: None,
        }
    }

    /// An answer that does not say `stale` shows all that the caller knows of what it speaks of, and
    /// does not report a row as newer than what is parked. One that lacks parked events is not for
    /// who wrote them, whatever it says.
    pub fn check(&self, answer: &Answer) -> Result<(), Violation> {
        match answer.stale {
            None => self.check_current(answer),
            Some(Stale::Eventual) => Ok(()),
            Some(Stale::Parked) => self.check_parked(answer),
        }
    }

    fn check_parked(&self, answer: &Answer) -> Result<(), Violation> {
        for (aggregate, shown) in answer.shown.iter().enumerate() {
            let lacks = shown.is_some_and(|shown| shown < self.wrote[aggregate]);
            if lacks && answer.parked[aggregate].is_some() {
                let text = format!("who wrote {:?} is shown {answer:?}", self.wrote);
                return Err(Violation::new(Promise::G7, text));
            }
        }
        Ok(())
    }

    fn check_current(&self, answer: &Answer) -> Result<(), Violation> {
        for (aggregate, shown) in answer.shown.iter().enumerate() {
            let Some(shown) = *shown else { continue };
            if shown < self.knows[aggregate] {
                let promise = if answer.parked[aggregate].is_some() {
                    Promise::G7
                } else if shown < self.wrote[aggregate] {
                    Promise::G1
                } else {
                    Promise::G2
                };
                let text = format!(
                    "aggregate {aggregate} at version {shown}, caller knows {:?}, wrote {:?}, holds {:?}: {answer:?}",
                    self.knows, self.wrote, self.token
                );
                return Err(Violation::new(promise, text));
            }
            let past_parked = |first: u64| answer.reports.is_some_and(|reports| first <= reports);
            if answer.parked[aggregate].is_some_and(past_parked) {
                let text = format!("reported past what is parked: {answer:?}");
                return Err(Violation::new(Promise::G7, text));
            }
        }
        Ok(())
    }
}
