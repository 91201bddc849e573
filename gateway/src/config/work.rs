//! Bounds of reads and of writes.

use std::collections::BTreeSet;

use consistency::{Name, Policy};
use process::config::Period;
use serde::Deserialize;

use crate::currency::WaiterBounds;

/// Bounds of reads.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ReadConfig {
    /// Bound on one wait, whatever the caller asks for.
    pub wait_max: Period,
    /// Reads that wait at once; further ones are refused as `waiters-full`.
    pub waiters_max: usize,
    /// Of them those of one caller who is known by a name; further ones are refused as `rate-limited`.
    pub waiters_per_caller_max: usize,
    /// Reads that go on at once when a commit releases many.
    pub released_max: usize,
    /// Reads that query the database at once; the others stand in line.
    pub queries_max: usize,
    /// Whether reads of rows of one view that come while others are asked for are asked for together.
    pub gather: bool,
    /// Gathered queries of one view at once.
    pub gather_queries_max: usize,
    /// Rows of one gathered query.
    pub gather_keys_max: usize,
    /// Bytes of rows that are kept in memory; 0 keeps none.
    pub memory_bytes_max: u64,
    /// What tells rows apart that have changed from those that have not: 8 bytes for each, in each
    /// partition of each projection. Rows that share one are taken for changed together.
    pub memory_slots_per_partition: usize,
    /// Items of one page of a list.
    pub page_items_max: u32,
    /// Items of a page when the caller does not say.
    pub page_items_default: u32,
    /// Events of one aggregate that are folded for one read.
    pub fold_events_max: u32,
    /// Bound on one look at the database, so that there is time left to ask the primary.
    pub query_timeout: Period,
    /// How long hints may be silent before checkpoints are polled for those who wait.
    pub hints_silence_max: Period,
    /// How often checkpoints are polled then.
    pub poll_interval: Period,
    /// How often the database is looked at when all is well.
    pub refresh_interval: Period,
    /// Lag above which the region counts as degraded.
    pub degraded_lag: Period,
    /// The chain of views that have none of their own.
    pub policy: String,
}

impl Default for ReadConfig {
    fn default() -> Self {
        Self {
            wait_max: Period::from_secs(5),
            waiters_max: 50_000,
            waiters_per_caller_max: 1000,
            released_max: 512,
            queries_max: 64,
            gather: true,
            gather_queries_max: 2,
            gather_keys_max: 256,
            memory_bytes_max: 64 * 1024 * 1024,
            memory_slots_per_partition: 8192,
            page_items_max: 500,
            page_items_default: 50,
            fold_events_max: 100_000,
            query_timeout: Period::from_secs(2),
            hints_silence_max: Period::from_secs(1),
            poll_interval: Period::from_millis(100),
            refresh_interval: Period::from_secs(2),
            degraded_lag: Period::from_secs(30),
            policy: Policy::shipped().to_string(),
        }
    }
}

/// How aggregates are folded from the log.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default)]
pub struct FoldConfig {
    /// A fold of so many events leaves a snapshot of the state behind, so that the next one need not
    /// begin at the first event; 0 leaves none.
    pub snapshot_events: u32,
}

impl Default for FoldConfig {
    fn default() -> Self {
        Self { snapshot_events: 500 }
    }
}

impl ReadConfig {
    /// How many reads may wait, and go on.
    pub fn waiter_bounds(&self) -> WaiterBounds {
        WaiterBounds {
            waiters_max: self.waiters_max,
            per_caller_max: self.waiters_per_caller_max,
            released_max: self.released_max,
        }
    }
}

/// What differs for one view.
#[derive(Debug, Clone, Deserialize)]
pub struct ViewConfig {
    /// Its chain, written like the header `Consistency-Policy`.
    pub policy: String,
}

/// Bounds of writes.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct WriteConfig {
    /// Largest event with its headers; at most the NATS server's `max_payload`.
    pub event_bytes_max: usize,
    /// Events of one append.
    pub events_max: usize,
    /// How often a command is run again when its aggregate moved meanwhile.
    pub command_attempts_max: u32,
    /// How long the answer to a write under an `Idempotency-Key` is kept for its repeats.
    pub idempotency_age_max: Period,
    /// Types of aggregates whose writes must say which version they are meant for. Read at the primary.
    pub if_match_required: BTreeSet<Name>,
}

impl Default for WriteConfig {
    fn default() -> Self {
        Self {
            event_bytes_max: 512 * 1024,
            events_max: 500,
            command_attempts_max: 8,
            idempotency_age_max: Period::from_secs(24 * 60 * 60),
            if_match_required: BTreeSet::new(),
        }
    }
}
