//! What is applied at once, and what is found out about it.

use consistency::{CommittedAt, Event};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::gap::Healed;
use super::plan::{Condemned, Gap, Plan};
use crate::breaker::Trip;
use crate::chain::Mark;
use crate::config::ApplyConfig;
use crate::reader::{Chunk, bytes_of};

/// What has arrived and is applied at once.
#[derive(Debug)]
pub struct Batch {
    /// The partition's events, in log order.
    pub events: Vec<Event>,
    /// The last event that was read, whosever it is.
    pub through: Mark,
    /// When that one was committed.
    pub committed_at: CommittedAt,
    /// The place that the events take among what is not applied.
    pub(super) room: Option<OwnedSemaphorePermit>,
}

impl Batch {
    /// Takes what else has arrived, up to bounds that the last chunk may pass.
    pub(super) fn gather(
        first: Chunk,
        chunks: &mut mpsc::Receiver<Chunk>,
        config: &ApplyConfig,
        events_max: usize,
    ) -> Self {
        let Chunk { events, through, committed_at, room } = first;
        let mut bytes: usize = events.iter().map(bytes_of).sum();
        let mut batch = Self { events, through, committed_at, room };
        while batch.events.len() < events_max
            && bytes < config.batch_bytes_max
            && let Ok(chunk) = chunks.try_recv()
        {
            bytes += chunk.events.iter().map(bytes_of).sum::<usize>();
            match (&mut batch.room, chunk.room) {
                (Some(held), Some(more)) => held.merge(more),
                (held @ None, more) => *held = more,
                (Some(_), None) => {}
            }
            batch.events.extend(chunk.events);
            batch.through = chunk.through;
            batch.committed_at = chunk.committed_at;
        }
        batch
    }

    /// Whether it has an event of an aggregate.
    pub(super) fn is_of(&self, aggregate_id: &str) -> bool {
        self.events.iter().any(|event| event.aggregate.id() == aggregate_id)
    }

    /// The first events and the rest. The first go as far as their last event: nothing of the partition
    /// lies between.
    pub(super) fn cut(mut self, count: usize) -> (Self, Self) {
        let later = self.events.split_off(count);
        let room = self.room.take();
        let rest = Self { events: later, room, ..self };
        if let Some(last) = self.events.last() {
            (self.through, self.committed_at) = (Mark::of(last), last.committed_at);
        }
        (self, rest)
    }
}

/// What earlier tries of a batch have found out.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) condemned: Condemned,
    pub(super) healed: Healed,
}

impl Findings {
    pub(super) fn are_none(&self) -> bool {
        self.condemned.is_empty() && self.healed.is_empty()
    }

    /// The events to apply: those of the batch, but what the log says where that is known better.
    pub(super) fn events<'a>(
        &'a self,
        batch: &'a Batch,
    ) -> impl Iterator<Item = &'a Event> + Clone {
        let read = batch.events.iter();
        let read = read.filter(|event| !self.healed.contains_key(event.aggregate.id()));
        read.chain(self.healed.values().flatten())
    }
}

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Applied {
    Committed,
    /// It may be too much at once.
    NotAtOnce,
}

/// Why an attempt did not commit.
#[derive(Debug)]
pub(super) enum Failed {
    Displaced,
    Tripped(Trip),
    /// Events are missing that the log may have.
    Gaps(Vec<Gap>),
    /// Sums leave their bounds when all is added up at once.
    TooMuch,
    /// What was folded ahead does not fit what is stored.
    Stale,
    Database(sqlx::Error),
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
}

/// Why a plan is not carried out: something else may spare what it would park.
pub(super) fn reconsider(plan: &Plan, batch: &Batch, findings: &Findings) -> Option<Failed> {
    let asked = |gap: &&Gap| findings.healed.contains_key(gap.aggregate.id());
    let gaps: Vec<Gap> = plan.gaps.iter().filter(|gap| !asked(gap)).cloned().collect();
    if !gaps.is_empty() {
        return Some(Failed::Gaps(gaps));
    }
    (plan.overflowed && 1 < batch.events.len()).then_some(Failed::TooMuch)
}
