//! What is appended, and what comes of it.

use consistency::{
    AggregateId, CommittedAt, Epoch, EventId, LogPosition, Name, Position, SchemaVersion,
    Traceparent, Version,
};
use uuid::Uuid;

use crate::idempotency::Idempotency;

/// The events of one aggregate that are committed together or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Append {
    /// What the events belong to.
    pub aggregate: AggregateId,
    /// What the aggregate must look like for the events to be taken.
    pub expected: Expected,
    /// In order; at least one.
    pub events: Vec<NewEvent>,
    /// Shared by everything that follows from one outer request.
    pub correlation_id: Uuid,
    /// What directly caused the events.
    pub causation_id: Uuid,
    /// SHA-256 of the request's idempotency key.
    pub idempotency_key_hash: Option<[u8; 32]>,
    /// The trace of the request.
    pub traceparent: Option<Traceparent>,
}

/// One event before it has a place in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewEvent {
    /// Made by the caller before the append, so that a commit of unknown outcome can be looked up. Never
    /// used twice.
    pub id: EventId,
    /// Names the shape of `data`.
    pub event_type: Name,
    /// The version of that shape.
    pub schema_version: SchemaVersion,
    /// JSON, kept to the byte.
    pub data: String,
}

/// What an append demands of its aggregate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Nothing.
    Any,
    /// That it has no events.
    MustNotExist,
    /// That its last event has this epoch and version. The epoch tells a version from the one of the
    /// same number that a lost tail of the log once held.
    Last {
        /// The epoch the last event was appended in.
        epoch: Epoch,
        /// The last event's version.
        version: Version,
    },
}

impl Expected {
    /// Epoch and version as the log is asked for them.
    pub(crate) fn columns(self) -> (Option<i32>, Option<i64>) {
        match self {
            Self::Any => (None, None),
            Self::MustNotExist => (None, Some(0)),
            Self::Last { epoch, version } => (Some(epoch.as_i32()), Some(version.as_i64())),
        }
    }
}

/// An append on its way to its commit.
#[derive(Debug, Clone)]
pub(crate) struct Command {
    pub append: Append,
    pub idempotency: Option<Idempotency>,
    /// The epoch that it may be appended in; `None` for any.
    pub judged: Option<Epoch>,
}

/// Where committed events stand. Versions and positions of one append follow each other without gaps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Appended {
    /// The epoch of the log.
    pub epoch: Epoch,
    /// The first event's number in its aggregate.
    pub first_version: Version,
    /// The first event's place in the log.
    pub first_position: Position,
    /// When the commit ran.
    pub committed_at: CommittedAt,
    /// The ids, as given, in order; never empty.
    pub event_ids: Vec<EventId>,
}

impl Appended {
    /// The last event's number in its aggregate.
    pub fn last_version(&self) -> Version {
        self.first_version.plus(self.followers())
    }

    /// The last event's epoch and place in the log.
    pub fn last_position(&self) -> LogPosition {
        LogPosition::new(self.epoch, self.first_position.plus(self.followers()))
    }

    fn followers(&self) -> u64 {
        (self.event_ids.len() as u64).saturating_sub(1)
    }
}
