//! What can go wrong, told apart by what a caller can do about it.

use std::sync::Arc;

use consistency::{LogId, LogPosition, Position, Version};

/// Why an append was not done, or why nobody knows.
#[derive(Debug, Clone, thiserror::Error)]
pub enum AppendError {
    /// It breaks a bound; nothing was sent to the database.
    #[error("append is invalid")]
    Invalid(#[from] InvalidAppend),
    /// The aggregate is not as expected. Nothing was committed.
    #[error("aggregate is at version {current}, which is not the expected one")]
    Conflict {
        /// The aggregate's version; zero when it has no events.
        current: Version,
        /// Epoch and position of its last event; position zero when it has no events.
        at: LogPosition,
    },
    /// Too many appends are waiting. Nothing was committed.
    #[error("the append queue is full")]
    Overloaded,
    /// The store is shutting down. Nothing was committed.
    #[error("the event store is stopping")]
    Stopping,
    /// The log takes no appends until an operator has looked at it. Nothing was committed.
    #[error("the log refuses appends: {reason}")]
    Refused {
        /// What the operator is to look at.
        reason: String,
    },
    /// The log is in another epoch than the one that the caller was judged in. Nothing was committed; judged
    /// again in the new epoch, it may be appended.
    #[error("another epoch of the log was opened")]
    EpochOver,
    /// The database cannot be reached or cannot commit now. Nothing was committed.
    #[error("the log's database is unavailable")]
    Unavailable(#[source] Arc<sqlx::Error>),
    /// The database refused this append by itself, for example for an event id used before. Nothing was
    /// committed, and nothing will be if it is tried again.
    #[error("the log's database refused the append")]
    Rejected(#[source] Arc<sqlx::Error>),
    /// The connection was lost during the commit, and looking the events up failed as well: they may be
    /// in the log or not.
    #[error("the outcome of the commit is unknown")]
    OutcomeUnknown,
}

/// How an append breaks its bounds. The text is safe to show to a caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAppend {
    /// There is nothing to append.
    #[error("an append has at least one event")]
    NoEvents,
    /// More events than fit one append.
    #[error("an append has at most {max} events, this one has {count}")]
    TooManyEvents {
        /// How many were given.
        count: usize,
        /// The bound.
        max: usize,
    },
    /// The same id twice in one append.
    #[error("event {index} repeats the id of an event before it")]
    RepeatedId {
        /// Which event, from 0.
        index: usize,
    },
    /// Data that not every reader of the log could read as JSON.
    #[error("data of event {index} is not JSON: {detail}")]
    Data {
        /// Which event, from 0.
        index: usize,
        /// Where and why.
        detail: String,
    },
    /// An event that could be committed but never published.
    #[error("event {index} takes {bytes} bytes with its headers, at most {max} can be published")]
    TooLarge {
        /// Which event, from 0.
        index: usize,
        /// Its bytes, headers included.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// The events together are more than one commit takes.
    #[error("the events take {bytes} bytes together, an append has at most {max}")]
    TooLargeTogether {
        /// Their bytes, headers included.
        bytes: usize,
        /// The bound.
        max: usize,
    },
}

/// Why the log could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The configuration contradicts itself.
    #[error("event store configuration: {0}")]
    Config(&'static str),
    /// The database holds another log.
    #[error("the database holds log {found}, configured is {configured}")]
    OtherLog {
        /// The id in the database.
        found: LogId,
        /// The id in the configuration.
        configured: LogId,
    },
    /// The log could not be read.
    #[error("the log could not be read")]
    Read(#[from] ReadError),
}

/// Why the log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The database cannot be reached, or could not answer.
    #[error("the log's database is unavailable")]
    Unavailable(#[from] sqlx::Error),
    /// A row that the append function cannot have written.
    #[error("the log's row at position {position} is corrupt: {what}")]
    Corrupt {
        /// Where; zero when it is not about an event.
        position: Position,
        /// What is wrong with it.
        what: &'static str,
    },
}
