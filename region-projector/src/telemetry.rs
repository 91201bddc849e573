//! What the projector measures: every name and label in one place.

use std::time::{Duration, SystemTime};

use consistency::Event;
use opentelemetry::KeyValue;
use opentelemetry::metrics::{Counter, Gauge, Histogram, Meter};
use process::trace::{SpanKind, Traces};
use tokio::time::Instant;

use crate::checkpoint::VersionKey;
use crate::status::{self, Status};

const METER: &str = "tidemark.projector";

/// Spans of one batch at most: more say nothing new.
const BATCH_SPANS_MAX: usize = 64;

/// Events by what became of them.
const EVENTS: &str = "tidemark.projection.events";
/// Seconds that a batch took from its first statement to its commit.
const BATCH_DURATION: &str = "tidemark.projection.batch.duration";
/// Attempts that failed and were made again.
const RETRIES: &str = "tidemark.projection.retries";
/// Batches that were folded while the one before was committed.
const FOLDED_AHEAD: &str = "tidemark.projection.folded_ahead";
/// Aggregates that were parked.
const PARKED: &str = "tidemark.projection.parkings";
/// Whether a version has stopped since too much would be parked: 1, or 0 once it went on.
const STOPPED: &str = "tidemark.projection.stopped";
/// Events that had to be read from the primary's log.
const FETCHED: &str = "tidemark.log.fetched_events";
/// Nudges to a stalled mirror.
const NUDGES: &str = "tidemark.mirror.nudges";
/// Times that everything was taken over anew.
const RESTARTS: &str = "tidemark.projection.restarts";
/// The stored position of a partition.
const CHECKPOINT: &str = "tidemark.projection.checkpoint";
/// The position that a partition has reached.
const WATERMARK: &str = "tidemark.projection.watermark";
/// Positions that a partition is behind.
const LAG_POSITIONS: &str = "tidemark.projection.lag.positions";
/// Seconds since the oldest event that a partition is missing was committed.
const LAG_SECONDS: &str = "tidemark.projection.lag";
/// Aggregates of a partition that are parked now.
const PARKED_AGGREGATES: &str = "tidemark.projection.parked_aggregates";
/// Events that a version applies in a second, over the last minute.
const RATE: &str = "tidemark.projection.rate";
/// Events of the last minute of the aggregate that had the most; `/status` names it.
const HOT_KEY_EVENTS: &str = "tidemark.projection.hot_key.events";
/// The first position that the region's stream has.
const STREAM_FIRST: &str = "tidemark.stream.first_position";
/// Events that the stream holds before the first that a partition may need again; negative when what
/// it needs is gone.
const STREAM_MARGIN: &str = "tidemark.stream.margin.positions";
/// Seconds since the mirror has heard of its origin.
const MIRROR_SILENCE: &str = "tidemark.mirror.silence";

const LABEL_PROJECTION: &str = "projection";
const LABEL_VERSION: &str = "version";
const LABEL_PARTITION: &str = "partition";
const LABEL_OUTCOME: &str = "outcome";
const LABEL_REASON: &str = "reason";

/// Why the log was read instead of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchReason {
    /// The stream went on past what was missing.
    Hole,
    /// A message was not the event of its place.
    Unreadable,
    /// The mirror stood still.
    Stalled,
    /// The stream begins after what is read next.
    Retention,
    /// Versions of an aggregate were missing.
    Gap,
    /// It is of an earlier epoch, which has another stream.
    PastEpoch,
}

impl FetchReason {
    const ALL: [Self; 5] =
        [Self::Hole, Self::Unreadable, Self::Stalled, Self::Retention, Self::Gap];

    fn label(self) -> &'static str {
        match self {
            Self::Hole => "hole",
            Self::Unreadable => "unreadable",
            Self::Stalled => "stalled",
            Self::Retention => "retention",
            Self::Gap => "gap",
            Self::PastEpoch => "past-epoch",
        }
    }
}

/// What became of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// They are in the rows.
    Applied,
    /// They were in the rows already.
    Duplicate,
    /// They are with the dead letters.
    DeadLettered,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Applied => "applied",
            Self::Duplicate => "duplicate",
            Self::DeadLettered => "dead-lettered",
        }
    }
}

/// The instruments.
#[derive(Debug)]
pub struct Telemetry {
    /// What spans are made of.
    pub traces: Traces,
    events: Counter<u64>,
    batch_duration: Histogram<f64>,
    retries: Counter<u64>,
    folded_ahead: Counter<u64>,
    parked: Counter<u64>,
    stopped: Gauge<u64>,
    fetched: Counter<u64>,
    nudges: Counter<u64>,
    restarts: Counter<u64>,
}

impl Telemetry {
    /// Makes the instruments; what partitions have reached is read from `status` when it is asked for.
    pub fn new(metrics: &process::telemetry::Metrics, status: &Status, traces: Traces) -> Self {
        let meter = metrics.meter(METER);
        observe(&meter, status);
        let telemetry = Self {
            traces,
            events: meter.u64_counter(EVENTS).build(),
            batch_duration: meter.f64_histogram(BATCH_DURATION).with_unit("s").build(),
            retries: meter.u64_counter(RETRIES).build(),
            folded_ahead: meter.u64_counter(FOLDED_AHEAD).build(),
            parked: meter.u64_counter(PARKED).build(),
            stopped: meter.u64_gauge(STOPPED).build(),
            fetched: meter.u64_counter(FETCHED).build(),
            nudges: meter.u64_counter(NUDGES).build(),
            restarts: meter.u64_counter(RESTARTS).build(),
        };
        // A counter that is not there yet cannot be seen to rise for the first time.
        telemetry.nudges.add(0, &[]);
        for reason in FetchReason::ALL {
            telemetry.fetched(reason, 0);
        }
        telemetry
    }

    /// A version begins.
    pub fn begun(&self, key: &VersionKey) {
        self.restarts.add(0, &of_version(key));
    }

    /// Something became of `count` events.
    pub fn events(&self, key: &VersionKey, outcome: Outcome, count: usize) {
        if count > 0 {
            let [projection, version] = of_version(key);
            let outcome = KeyValue::new(LABEL_OUTCOME, outcome.label());
            self.events.add(count as u64, &[projection, version, outcome]);
        }
    }

    /// A span for each event of a batch that committed, under the append that it came from.
    pub fn spans(&self, key: &VersionKey, partition: u16, events: &[Event], took: Duration) {
        let began = SystemTime::now().checked_sub(took).unwrap_or(SystemTime::UNIX_EPOCH);
        let traced = events.iter().filter_map(|event| Some((event, event.traceparent.as_ref()?)));
        for (event, parent) in traced.take(BATCH_SPANS_MAX) {
            let kind = SpanKind::Consumer;
            let mut span = self.traces.span_since("project", kind, parent.as_str(), began);
            span.set("tidemark.projection", key.to_string());
            span.set("tidemark.partition", i64::from(partition));
            span.set("tidemark.position", event.at.position.as_i64());
        }
    }

    /// A batch was committed.
    pub fn batch(&self, key: &VersionKey, seconds: f64) {
        self.batch_duration.record(seconds, &of_version(key));
    }

    /// An attempt failed; `reason` is out of a closed set.
    pub fn retried(&self, key: &VersionKey, reason: &'static str) {
        let [projection, version] = of_version(key);
        self.retries.add(1, &[projection, version, KeyValue::new(LABEL_REASON, reason)]);
    }

    /// A batch that was folded ahead is applied as it is.
    pub fn folded_ahead(&self, key: &VersionKey) {
        self.folded_ahead.add(1, &of_version(key));
    }

    /// An aggregate was parked; `reason` is out of a closed set.
    pub fn parked(&self, key: &VersionKey, reason: &'static str) {
        let [projection, version] = of_version(key);
        self.parked.add(1, &[projection, version, KeyValue::new(LABEL_REASON, reason)]);
    }

    /// A version has stopped for `reason`, which is out of a closed set, or goes on.
    pub fn stopped(&self, key: &VersionKey, reason: &str, is_stopped: bool) {
        let [projection, version] = of_version(key);
        let labels = [projection, version, KeyValue::new(LABEL_REASON, reason.to_owned())];
        self.stopped.record(is_stopped.into(), &labels);
    }

    /// Events were read from the log.
    pub fn fetched(&self, reason: FetchReason, count: u64) {
        self.fetched.add(count, &[KeyValue::new(LABEL_REASON, reason.label())]);
    }

    /// A mirror was nudged.
    pub fn nudged(&self) {
        self.nudges.add(1, &[]);
    }

    /// A version was taken over anew.
    pub fn restarted(&self, key: &VersionKey) {
        self.restarts.add(1, &of_version(key));
    }
}

fn of_version(key: &VersionKey) -> [KeyValue; 2] {
    [
        KeyValue::new(LABEL_PROJECTION, key.projection.to_string()),
        KeyValue::new(LABEL_VERSION, i64::from(key.version)),
    ]
}

fn of_partition(lag: &status::Lag) -> [KeyValue; 3] {
    [
        KeyValue::new(LABEL_PROJECTION, lag.projection.clone()),
        KeyValue::new(LABEL_VERSION, i64::from(lag.version)),
        KeyValue::new(LABEL_PARTITION, i64::from(lag.reached.held.partition)),
    ]
}

fn observe(meter: &Meter, status: &Status) {
    observe_partitions(meter, status);
    observe_paces(meter, status);
    observe_stream(meter, status);
}

fn observe_partitions(meter: &Meter, status: &Status) {
    type Measure = fn(&status::Lag) -> u64;
    let gauges: [(&'static str, Measure); 4] = [
        (CHECKPOINT, |lag| lag.reached.held.mark.position.get()),
        (WATERMARK, |lag| lag.reached.watermark.get()),
        (LAG_POSITIONS, |lag| lag.positions),
        (PARKED_AGGREGATES, |lag| lag.reached.parked_count),
    ];
    for (name, value) in gauges {
        let status = status.clone();
        let gauge = meter.u64_observable_gauge(name).with_callback(move |observer| {
            for lag in status.lags(status::now()) {
                observer.observe(value(&lag), &of_partition(&lag));
            }
        });
        gauge.build();
    }
    let status = status.clone();
    let seconds = meter.f64_observable_gauge(LAG_SECONDS).with_unit("s");
    let seconds = seconds.with_callback(move |observer| {
        for lag in status.lags(status::now()) {
            observer.observe(lag.seconds, &of_partition(&lag));
        }
    });
    seconds.build();
}

fn observe_paces(meter: &Meter, status: &Status) {
    let shown = status.clone();
    let rate = meter.f64_observable_gauge(RATE).with_callback(move |observer| {
        for pace in shown.paces(Instant::now()) {
            observer.observe(pace.rate, &of_pace(&pace));
        }
    });
    rate.build();
    let shown = status.clone();
    let hottest = meter.u64_observable_gauge(HOT_KEY_EVENTS).with_callback(move |observer| {
        for pace in shown.paces(Instant::now()) {
            observer.observe(pace.hot_key_events, &of_pace(&pace));
        }
    });
    hottest.build();
}

fn of_pace(pace: &status::Pace) -> [KeyValue; 2] {
    [
        KeyValue::new(LABEL_PROJECTION, pace.projection.clone()),
        KeyValue::new(LABEL_VERSION, i64::from(pace.version)),
    ]
}

fn observe_stream(meter: &Meter, status: &Status) {
    let shown = status.clone();
    let first = meter.u64_observable_gauge(STREAM_FIRST).with_callback(move |observer| {
        if let Some(first) = shown.stream_first() {
            observer.observe(first.get(), &[]);
        }
    });
    first.build();
    let shown = status.clone();
    let margin = meter.i64_observable_gauge(STREAM_MARGIN).with_callback(move |observer| {
        if let Some(margin) = shown.margin() {
            observer.observe(margin, &[]);
        }
    });
    margin.build();
    let shown = status.clone();
    let silence = meter.f64_observable_gauge(MIRROR_SILENCE).with_unit("s");
    let silence = silence.with_callback(move |observer| {
        if let Some(seconds) = shown.silence_seconds(status::now()) {
            observer.observe(seconds, &[]);
        }
    });
    silence.build();
}
