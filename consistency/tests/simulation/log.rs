//! The log, and what its events reveal to who sees them.

use consistency::{AggregateKey, Epoch, LogPosition, Position, Version};

/// More than a token has room for claims.
pub const AGGREGATE_COUNT: usize = 6;
pub const PARTITION_COUNT: usize = 2;

/// The version of each aggregate that somebody has seen, or wrote, or depends on.
pub type Knowledge = [u64; AGGREGATE_COUNT];

pub fn learn(known: &mut Knowledge, more: &Knowledge) {
    for (known, more) in known.iter_mut().zip(more) {
        *known = (*known).max(*more);
    }
}

pub fn position(value: u64) -> Position {
    Position::new(value).expect("positions of the simulation are small")
}

pub fn version(value: u64) -> Version {
    Version::new(value).expect("versions of the simulation are small")
}

pub fn at(value: u64) -> LogPosition {
    LogPosition::new(Epoch::FIRST, position(value))
}

pub fn key(aggregate: usize) -> AggregateKey {
    AggregateKey::from_bytes([aggregate as u8 + 1; 12])
}

pub fn partition_of(aggregate: usize) -> usize {
    aggregate % PARTITION_COUNT
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The row exists from now on, under this list key.
    Into(u8),
    /// The row is gone.
    Delete,
}

#[derive(Debug, Clone)]
pub struct LogEvent {
    pub position: u64,
    pub aggregate: usize,
    pub version: u64,
    pub change: Change,
    pub poison: bool,
    /// What its writer knew, joined with what the aggregate's earlier events reveal, and itself.
    reveals: Knowledge,
}

#[derive(Debug, Default)]
pub struct Log {
    events: Vec<LogEvent>,
}

impl Log {
    pub fn append(
        &mut self,
        aggregate: usize,
        change: Change,
        poison: bool,
        knows: &Knowledge,
    ) -> &LogEvent {
        let version = self.version_of(aggregate) + 1;
        let mut reveals = self.revealed(aggregate, version - 1);
        learn(&mut reveals, knows);
        reveals[aggregate] = version;
        let position = self.head() + 1;
        self.events.push(LogEvent { position, aggregate, version, change, poison, reveals });
        self.events.last().expect("one was just pushed")
    }

    pub fn head(&self) -> u64 {
        self.events.len() as u64
    }

    pub fn events_of(&self, aggregate: usize) -> impl DoubleEndedIterator<Item = &LogEvent> {
        self.events.iter().filter(move |event| event.aggregate == aggregate)
    }

    pub fn version_of(&self, aggregate: usize) -> u64 {
        self.events_of(aggregate).next_back().map_or(0, |event| event.version)
    }

    pub fn last_position_of(&self, aggregate: usize) -> Option<u64> {
        self.events_of(aggregate).next_back().map(|event| event.position)
    }

    pub fn at(&self, position: u64) -> &LogEvent {
        &self.events[position as usize - 1]
    }

    /// The events of `(from, to]` in a partition.
    pub fn range(&self, from: u64, to: u64, partition: usize) -> impl Iterator<Item = &LogEvent> {
        let events = self.events.iter().skip(from as usize).take(to.saturating_sub(from) as usize);
        events.filter(move |event| partition_of(event.aggregate) == partition)
    }

    /// What is known to who sees the aggregate at a version.
    pub fn revealed(&self, aggregate: usize, version: u64) -> Knowledge {
        let event = self.events_of(aggregate).find(|event| event.version == version);
        event.map_or([0; AGGREGATE_COUNT], |event| event.reveals)
    }
}
