//! What the gateway measures. Names and labels, all of them, are here.

mod durations;

use std::time::Duration;

use event_store::RefusalKind;
use opentelemetry::{
    KeyValue,
    metrics::{BoundCounter, Counter, Gauge, Histogram, Meter},
};

use process::trace::Traces;

use self::durations::Durations;
pub use self::durations::RequestKind;
use crate::status::Outcome;

const SERVER_REQUEST_DURATION: &str = "http.server.request.duration";
const READ_DECISIONS: &str = "tidemark.read.decisions";
const WAIT_DURATION: &str = "tidemark.wait.duration";
const SECOND_CHECK_FAILURES: &str = "tidemark.read.second_check_failures";
const WAITERS: &str = "tidemark.waiters";
const APPLIED_POSITION: &str = "tidemark.projection.applied_position";
const LAG_EVENTS: &str = "tidemark.projection.lag_events";
const LAG_SECONDS: &str = "tidemark.projection.lag";
const PARKED: &str = "tidemark.projection.parked";
const HEAD_POSITION: &str = "tidemark.log.head_position";
const LOG_EPOCH: &str = "tidemark.log.epoch";
/// 1 for the reason that appends are refused for, 0 for every other.
const LOG_REFUSED: &str = "tidemark.log.refused";
const RELAY_POSITION: &str = "tidemark.relay.published_position";
const RELAY_ACTIVE: &str = "tidemark.relay.active";
const APPENDS: &str = "tidemark.append.commands";
const FOLD_EVENTS: &str = "tidemark.fold.events";
const FOLDS: &str = "tidemark.fold.count";
const FORWARD_DURATION: &str = "tidemark.forward.duration";

const ROUTE: &str = "http.route";
const METHOD: &str = "http.request.method";
const STATUS_CODE: &str = "http.response.status_code";
const DECISION: &str = "decision";
const OUTCOME: &str = "outcome";
const PROJECTION: &str = "projection";
const REASON: &str = "reason";
const SNAPSHOT: &str = "snapshot";

/// From a tenth of a millisecond to ten seconds.
const SECONDS: [f64; 16] = [
    0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0,
    10.0,
];

/// The instruments.
#[derive(Debug)]
pub struct Instruments {
    /// What spans are made of.
    pub traces: Traces,
    requests: Durations,
    decisions: [(Outcome, BoundCounter<u64>); Outcome::ALL.len()],
    waits: Histogram<f64>,
    second_check_failures: Counter<u64>,
    waiters: Gauge<u64>,
    applied: Gauge<u64>,
    lag_events: Gauge<u64>,
    lag_seconds: Gauge<f64>,
    parked: Gauge<u64>,
    head: Gauge<u64>,
    log_epoch: Gauge<u64>,
    log_refused: Gauge<u64>,
    relay_position: Gauge<u64>,
    relay_active: Gauge<u64>,
    appends: Counter<u64>,
    forwards: Histogram<f64>,
    fold_events: Counter<u64>,
    folds: Counter<u64>,
}

/// What a kept state was good for, as a label.
#[derive(Debug, Clone, Copy)]
pub enum SnapshotUse {
    /// The fold began with it.
    Used,
    /// There was none.
    Missing,
    /// It was of another log or of other rules.
    Unusable,
}

/// How a forward ended, as a label.
#[derive(Debug, Clone, Copy)]
pub enum Forwarded {
    /// With an answer.
    Answered,
    /// Without one.
    Failed,
}

/// How far a projection has come.
#[derive(Debug, Clone, Copy)]
pub struct Progress {
    /// The smallest watermark's position.
    pub applied: u64,
    /// Events between it and the head.
    pub lag_events: u64,
    /// The same in time, as far as clocks tell.
    pub lag: Duration,
    /// Parked aggregates.
    pub parked: u64,
}

impl Instruments {
    /// Makes them.
    pub fn new(meter: &Meter, traces: Traces) -> Self {
        let seconds = |name| {
            meter.f64_histogram(name).with_unit("s").with_boundaries(SECONDS.to_vec()).build()
        };
        let decisions = meter.u64_counter(READ_DECISIONS).build();
        let decided = |outcome: Outcome| {
            (outcome, decisions.bind(&[KeyValue::new(DECISION, outcome.as_str())]))
        };
        Self {
            traces,
            requests: Durations::new(seconds(SERVER_REQUEST_DURATION)),
            decisions: Outcome::ALL.map(decided),
            waits: seconds(WAIT_DURATION),
            second_check_failures: meter.u64_counter(SECOND_CHECK_FAILURES).build(),
            waiters: meter.u64_gauge(WAITERS).build(),
            applied: meter.u64_gauge(APPLIED_POSITION).build(),
            lag_events: meter.u64_gauge(LAG_EVENTS).build(),
            lag_seconds: meter.f64_gauge(LAG_SECONDS).with_unit("s").build(),
            parked: meter.u64_gauge(PARKED).build(),
            head: meter.u64_gauge(HEAD_POSITION).build(),
            log_epoch: meter.u64_gauge(LOG_EPOCH).build(),
            log_refused: meter.u64_gauge(LOG_REFUSED).build(),
            relay_position: meter.u64_gauge(RELAY_POSITION).build(),
            relay_active: meter.u64_gauge(RELAY_ACTIVE).build(),
            appends: meter.u64_counter(APPENDS).build(),
            forwards: seconds(FORWARD_DURATION),
            fold_events: meter.u64_counter(FOLD_EVENTS).build(),
            folds: meter.u64_counter(FOLDS).build(),
        }
    }

    /// A request was answered.
    pub fn answered(&self, kind: RequestKind, took: Duration) {
        self.requests.record(kind, took);
    }

    /// A read came to this.
    pub fn decided(&self, outcome: Outcome) {
        if let Some((_, decided)) = self.decisions.iter().find(|(known, _)| *known == outcome) {
            decided.add(1);
        }
    }

    /// A read waited.
    pub fn waited(&self, took: Duration, satisfied: bool) {
        let outcome = if satisfied { "satisfied" } else { "timed-out" };
        self.waits.record(took.as_secs_f64(), &[KeyValue::new(OUTCOME, outcome)]);
    }

    /// Memory said current and the database did not.
    pub fn second_check_failed(&self) {
        self.second_check_failures.add(1, &[]);
    }

    /// So many reads wait, and the log's head is known to be here.
    pub fn standing(&self, waiters: usize, head: u64) {
        self.waiters.record(waiters as u64, &[]);
        self.head.record(head, &[]);
    }

    /// How far a projection has come.
    pub fn progressed(&self, projection: &str, progress: Progress) {
        let labels = [KeyValue::new(PROJECTION, projection.to_owned())];
        self.applied.record(progress.applied, &labels);
        self.lag_events.record(progress.lag_events, &labels);
        self.lag_seconds.record(progress.lag.as_secs_f64(), &labels);
        self.parked.record(progress.parked, &labels);
    }

    /// The log is in this epoch, and refuses appends for this reason.
    pub fn log(&self, epoch: u32, refused: Option<RefusalKind>) {
        self.log_epoch.record(u64::from(epoch), &[]);
        for kind in RefusalKind::ALL {
            let labels = [KeyValue::new(REASON, kind.as_str())];
            self.log_refused.record(u64::from(refused == Some(kind)), &labels);
        }
    }

    /// The relay of this process has published so far, or waits for its turn.
    pub fn relayed(&self, published: Option<u64>, is_active: bool) {
        self.relay_active.record(u64::from(is_active), &[]);
        if let Some(published) = published {
            self.relay_position.record(published, &[]);
        }
    }

    /// An append came to this.
    pub fn appended(&self, outcome: &'static str) {
        self.appends.add(1, &[KeyValue::new(OUTCOME, outcome)]);
    }

    /// An aggregate is being folded from the log.
    pub fn began_fold(&self, snapshot: SnapshotUse) {
        let snapshot = match snapshot {
            SnapshotUse::Used => "used",
            SnapshotUse::Missing => "missing",
            SnapshotUse::Unusable => "unusable",
        };
        self.folds.add(1, &[KeyValue::new(SNAPSHOT, snapshot)]);
    }

    /// So many events were read for it.
    pub fn folded(&self, events_read: u32) {
        self.fold_events.add(u64::from(events_read), &[]);
    }

    /// A request was forwarded.
    pub fn forwarded(&self, took: Duration, ended: Forwarded) {
        let outcome = match ended {
            Forwarded::Answered => "answered",
            Forwarded::Failed => "failed",
        };
        self.forwards.record(took.as_secs_f64(), &[KeyValue::new(OUTCOME, outcome)]);
    }
}
