//! The bounds of appending and relaying. Every queue, batch and wait has one.

use std::time::Duration;

use consistency::LogId;
use sqlx::postgres::PgConnectOptions;

/// Bounds of the append path.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// Identity of the log. A database that holds another log is refused.
    pub log_id: LogId,
    /// Largest event with its headers; at most the NATS server's `max_payload`.
    pub payload_bytes_max: usize,
    /// Most events of one append.
    pub append_events_max: usize,
    /// Most appends that are committed together.
    pub gather_commands_max: usize,
    /// Most events that are committed together.
    pub gather_events_max: usize,
    /// Most bytes that are committed together.
    pub gather_bytes_max: usize,
    /// Most appends that wait to be gathered.
    pub queue_commands_max: usize,
    /// Most bytes that wait to be gathered.
    pub queue_bytes_max: usize,
    /// Most bytes of data that one read of several events answers with; a first event always fits.
    pub read_bytes_max: usize,
    /// How long the database is given for one statement. Longer than [`Timeouts::statement`], so that
    /// the server gives up first and says so.
    pub statement_wait_max: Duration,
    /// How long idempotency keys are remembered, by the database's clock.
    pub idempotency_age_max: Duration,
    /// How often older keys are looked for.
    pub prune_interval: Duration,
    /// Most keys that are deleted by one statement.
    pub prune_rows_max: u32,
    /// How long a commit of unknown outcome is looked up before that is the answer.
    pub settle_wait_max: Duration,
}

impl StoreConfig {
    /// The shipped bounds.
    pub fn new(log_id: LogId) -> Self {
        Self {
            log_id,
            payload_bytes_max: 512 * 1024,
            append_events_max: 500,
            gather_commands_max: 1000,
            gather_events_max: 2000,
            gather_bytes_max: 8 * 1024 * 1024,
            queue_commands_max: 10_000,
            queue_bytes_max: 64 * 1024 * 1024,
            read_bytes_max: 8 * 1024 * 1024,
            statement_wait_max: Duration::from_secs(6),
            settle_wait_max: Duration::from_secs(10),
            idempotency_age_max: Duration::from_secs(24 * 60 * 60),
            prune_interval: Duration::from_secs(60),
            prune_rows_max: 500,
        }
    }

    pub(crate) fn contradiction(&self) -> Option<&'static str> {
        let zero = [
            self.payload_bytes_max,
            self.append_events_max,
            self.gather_commands_max,
            self.queue_commands_max,
        ];
        if zero.contains(&0) {
            Some("a bound of zero lets nothing through")
        } else if self.gather_events_max < self.append_events_max {
            Some("gather_events_max is below append_events_max")
        } else if self.gather_bytes_max < self.payload_bytes_max {
            Some("gather_bytes_max is below payload_bytes_max")
        } else if self.queue_bytes_max < self.gather_bytes_max {
            Some("queue_bytes_max is below gather_bytes_max")
        } else if self.prune_interval.is_zero() || self.prune_rows_max == 0 {
            Some("pruning that takes no time or no rows never ends")
        } else if u32::try_from(self.queue_bytes_max).is_err() {
            Some("queue_bytes_max is 4 GiB or more")
        } else {
            None
        }
    }
}

/// What the server bounds on each connection to the log's database, so that a paused or lost gateway
/// cannot hold the log's row lock.
#[derive(Debug, Clone)]
pub struct Timeouts {
    /// Longest statement.
    pub statement: Duration,
    /// Longest wait for a lock.
    pub lock: Duration,
    /// Longest pause inside a transaction.
    pub idle_in_transaction: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            statement: Duration::from_secs(5),
            lock: Duration::from_secs(4),
            idle_in_transaction: Duration::from_secs(2),
        }
    }
}

impl Timeouts {
    /// Adds the bounds to the options that a pool for [`crate::EventStore`] connects with. The log is read
    /// along its keys, also by statements that were planned while it was short.
    pub fn apply(&self, options: PgConnectOptions) -> PgConnectOptions {
        let milliseconds = |duration: Duration| format!("{}ms", duration.as_millis().max(1));
        options.options([
            ("statement_timeout", milliseconds(self.statement)),
            ("lock_timeout", milliseconds(self.lock)),
            ("idle_in_transaction_session_timeout", milliseconds(self.idle_in_transaction)),
            ("enable_seqscan", "off".to_owned()),
            ("enable_bitmapscan", "off".to_owned()),
            ("jit", "off".to_owned()),
            ("plan_cache_mode", "force_generic_plan".to_owned()),
            // What waits for the head must see what it waited for.
            ("default_transaction_isolation", "read committed".to_owned()),
        ])
    }
}

/// How the relay publishes.
#[derive(Debug, Clone)]
pub struct RelayConfig {
    /// The subject that wakes the relay of another process: `tidemark.<primary region>.relay`.
    pub wake_subject: String,
    /// Most messages that wait for their acknowledgement.
    pub in_flight_max: usize,
    /// Most rows of one read of the log.
    pub read_events_max: usize,
    /// How long an acknowledgement may take before the stream is read again.
    pub ack_wait_max: Duration,
    /// How often log and stream are looked at when nothing wakes the relay, and how often a relay that
    /// stands by tries for the lease (a third of its duration, if that is sooner).
    pub poll_interval: Duration,
    /// How long a lease is good for; renewed at a third of it.
    pub lease_duration: Duration,
    /// How long the stream keeps events; zero keeps them whatever their age.
    pub stream_age_max: Duration,
    /// Most bytes that the stream keeps; `None` is as many as the server allows.
    pub stream_bytes_max: Option<u64>,
    /// Copies of the stream in the primary's NATS cluster.
    pub stream_replica_count: usize,
}

impl RelayConfig {
    /// The shipped bounds for a primary region.
    pub fn new(primary_region: &str) -> Self {
        Self {
            wake_subject: format!("tidemark.{primary_region}.relay"),
            in_flight_max: 2000,
            read_events_max: 1000,
            ack_wait_max: Duration::from_secs(5),
            poll_interval: Duration::from_secs(1),
            lease_duration: Duration::from_secs(3),
            stream_age_max: Duration::ZERO,
            stream_bytes_max: None,
            stream_replica_count: 1,
        }
    }
}
