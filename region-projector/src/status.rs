//! What every partition has reached, for `/status`, for metrics, and for the check that the database
//! did not go back.

mod stream;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use consistency::{CommittedAt, Epoch, LogPosition, Position};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::activity::Activity;
use crate::checkpoint::{Held, VersionKey};

/// Stretches of the log that are remembered at most while they are not applied.
const STRETCH_COUNT_MAX: usize = 1024;
/// Aggregates that `/status` names for each version, those with the most events of the last minute.
const HOT_KEY_COUNT: usize = 5;

/// What one partition has reached.
#[derive(Debug, Clone, Copy)]
pub struct Reached {
    /// The checkpoint as it was last stored by us.
    pub held: Held,
    /// How far every event is committed, parked or read past.
    pub watermark: Position,
    /// When the event at the watermark was committed; `None` at the beginning.
    pub committed_at: Option<CommittedAt>,
    /// The last time, by our clock, that the watermark was at the log's known head.
    level_at: Option<CommittedAt>,
    /// Aggregates of the partition that are parked.
    pub parked_count: u64,
}

#[derive(Debug, Default)]
struct Inner {
    heads: BTreeMap<Epoch, Position>,
    versions: BTreeMap<(String, u32), BTreeMap<u16, Reached>>,
    /// What each version has read, in order, and may not have applied.
    stretches: BTreeMap<(String, u32), VecDeque<Stretch>>,
    activities: BTreeMap<(String, u32), Activity>,
    stream: Option<stream::Seen>,
}

/// Events that were read together.
#[derive(Debug)]
struct Stretch {
    through: Position,
    /// When the first of them was committed.
    committed_at: CommittedAt,
}

/// Cheap to clone, shared by all clones.
#[derive(Debug, Clone, Default)]
pub struct Status {
    inner: Arc<Mutex<Inner>>,
}

/// How far one partition is behind.
#[derive(Debug, Clone)]
pub struct Lag {
    /// The projection.
    pub projection: String,
    /// Its version.
    pub version: u32,
    /// The partition.
    pub reached: Reached,
    /// Positions between its watermark and the known head.
    pub positions: u64,
    /// Seconds since its oldest missing event was committed, or a little more; zero when nothing is
    /// missing.
    pub seconds: f64,
}

/// What a version has applied in the last minute.
#[derive(Debug, Clone)]
pub struct Pace {
    /// The projection.
    pub projection: String,
    /// Its version.
    pub version: u32,
    /// Events in a second.
    pub rate: f64,
    /// Events of the aggregate that had the most.
    pub hot_key_events: u64,
}

impl Status {
    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The log is known to reach this far.
    pub fn raise_head(&self, epoch: Epoch, position: Position) {
        let mut inner = self.lock();
        let head = inner.heads.entry(epoch).or_default();
        *head = (*head).max(position);
    }

    /// The log's head as far as it is known here.
    pub fn head(&self, epoch: Epoch) -> Position {
        self.lock().heads.get(&epoch).copied().unwrap_or_default()
    }

    /// The log's head in the newest epoch that is known here.
    pub fn newest_head(&self) -> Option<LogPosition> {
        let inner = self.lock();
        inner.heads.last_key_value().map(|(epoch, at)| LogPosition::new(*epoch, *at))
    }

    /// Forgets a version's partitions, since they are being taken over again.
    pub fn forget(&self, key: &VersionKey) {
        self.lock().versions.remove(&(key.projection.to_string(), key.version));
    }

    /// A partition has reached something. `now` is for display.
    pub fn reach(
        &self,
        key: &VersionKey,
        held: Held,
        watermark: Position,
        committed_at: Option<CommittedAt>,
        now: CommittedAt,
    ) {
        let mut inner = self.lock();
        let head = inner.heads.get(&held.epoch).copied().unwrap_or_default();
        let partitions =
            inner.versions.entry((key.projection.to_string(), key.version)).or_default();
        let before = partitions.get(&held.partition).copied();
        let level_at = if head <= watermark { Some(now) } else { before.and_then(|b| b.level_at) };
        let parked_count = before.map_or(0, |before| before.parked_count);
        let reached = Reached { held, watermark, committed_at, level_at, parked_count };
        partitions.insert(held.partition, reached);
    }

    /// Events up to a position were read, the first of them committed at this time.
    pub fn read(&self, key: &VersionKey, committed_at: CommittedAt, through: Position) {
        let mut inner = self.lock();
        let name = (key.projection.to_string(), key.version);
        let partitions = inner.versions.get(&name);
        let applied = partitions.and_then(|all| all.values().map(|one| one.watermark).min());
        let stretches = inner.stretches.entry(name).or_default();
        while stretches.front().is_some_and(|oldest| Some(oldest.through) <= applied) {
            stretches.pop_front();
        }
        let is_full = stretches.len() == STRETCH_COUNT_MAX;
        match stretches.back_mut() {
            // One that is too long says more than the truth, and never less.
            Some(newest) if is_full => newest.through = through,
            Some(_) | None => stretches.push_back(Stretch { through, committed_at }),
        }
    }

    /// Events of these aggregates were applied, each as often as it is named.
    pub fn applied<'i>(
        &self,
        key: &VersionKey,
        now: Instant,
        ids: impl IntoIterator<Item = &'i str>,
    ) {
        let name = (key.projection.to_string(), key.version);
        self.lock().activities.entry(name).or_default().note(now, ids);
    }

    /// What each version has applied in the last minute.
    pub fn paces(&self, now: Instant) -> Vec<Pace> {
        let mut inner = self.lock();
        let names: Vec<(String, u32)> = inner.versions.keys().cloned().collect();
        let paces = names.into_iter().map(|name| {
            let activity = inner.activities.entry(name.clone()).or_default();
            let hottest = activity.hot_keys(now, 1);
            let hot_key_events = hottest.first().map_or(0, |key| key.event_count);
            let (rate, (projection, version)) = (activity.rate(now), name);
            Pace { projection, version, rate, hot_key_events }
        });
        paces.collect()
    }

    /// So many aggregates of a partition are parked.
    pub fn set_parked(&self, key: &VersionKey, partition: u16, count: u64) {
        let mut inner = self.lock();
        let partitions = inner.versions.get_mut(&(key.projection.to_string(), key.version));
        if let Some(reached) = partitions.and_then(|all| all.get_mut(&partition)) {
            reached.parked_count = count;
        }
    }

    /// What the partitions of a version hold.
    pub fn held(&self, key: &VersionKey) -> Vec<Held> {
        let inner = self.lock();
        let partitions = inner.versions.get(&(key.projection.to_string(), key.version));
        partitions.into_iter().flatten().map(|(_, reached)| reached.held).collect()
    }

    /// How far every partition is behind.
    pub fn lags(&self, now: CommittedAt) -> Vec<Lag> {
        let inner = self.lock();
        let each = inner.versions.iter().flat_map(|((projection, version), partitions)| {
            partitions.values().map(move |reached| (projection, *version, *reached))
        });
        each.map(|(projection, version, reached)| {
            let head = inner.heads.get(&reached.held.epoch).copied().unwrap_or_default();
            let positions = head.since(reached.watermark);
            let stretches = inner.stretches.get(&(projection.clone(), version));
            let seconds =
                if positions == 0 { 0.0 } else { seconds_behind(&reached, stretches, now) };
            Lag { projection: projection.clone(), version, reached, positions, seconds }
        })
        .collect()
    }

    /// The body of `/status`.
    pub fn to_json(&self, region: &str, now: CommittedAt) -> Value {
        let mut projections: BTreeMap<(String, u32), Vec<Value>> = BTreeMap::new();
        for lag in self.lags(now) {
            let Lag { projection, version, reached, positions, seconds } = lag;
            let partition = json!({
                "partition": reached.held.partition,
                "epoch": reached.held.epoch,
                "checkpoint": reached.held.mark.position,
                "watermark": reached.watermark,
                "lag_positions": positions,
                "lag_seconds": seconds,
                "parked_count": reached.parked_count,
            });
            projections.entry((projection, version)).or_default().push(partition);
        }
        let projections: Vec<Value> = projections
            .into_iter()
            .map(|((projection, version), partitions)| {
                let (rate, hot_keys) = self.busiest(&(projection.clone(), version));
                json!({ "projection": projection, "version": version, "rate": rate,
                    "hot_keys": hot_keys, "partitions": partitions })
            })
            .collect();
        let heads = self.lock().heads.clone();
        let head = heads.last_key_value().map(|(epoch, position)| json!([epoch, position]));
        let stream = self.stream(now);
        json!({ "region": region, "head": head, "stream": stream, "projections": projections })
    }
}

impl Status {
    /// Events in a second of the last minute, and the aggregates with most of them.
    fn busiest(&self, name: &(String, u32)) -> (f64, Vec<Value>) {
        let now = Instant::now();
        let mut inner = self.lock();
        let Some(activity) = inner.activities.get_mut(name) else { return (0.0, Vec::new()) };
        let keys = activity.hot_keys(now, HOT_KEY_COUNT).into_iter().map(
            |key| json!({ "aggregate_id": key.aggregate_id, "events_last_minute": key.event_count }),
        );
        (activity.rate(now), keys.collect())
    }
}

/// When the oldest missing event was committed, where it was read. Otherwise two bounds above the
/// truth: what is missing was committed after the event at the watermark, and after the moment when
/// nothing was missing.
fn seconds_behind(
    reached: &Reached,
    stretches: Option<&VecDeque<Stretch>>,
    now: CommittedAt,
) -> f64 {
    let mut read = stretches.into_iter().flatten();
    let oldest = read.find(|stretch| reached.watermark < stretch.through);
    let since = match oldest {
        // A stretch that is applied in part began earlier than what is missing of it.
        Some(stretch) => reached.committed_at.max(Some(stretch.committed_at)),
        None => reached.committed_at.max(reached.level_at),
    };
    let micros = since.map_or(0, |since| now.unix_micros() - since.unix_micros());
    micros.max(0) as f64 / 1e6
}

/// Our clock, for display.
pub fn now() -> CommittedAt {
    let since = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    CommittedAt::from_unix_micros(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use consistency::{EventId, Name};

    use super::*;
    use crate::chain::Mark;

    fn at(seconds: i64) -> CommittedAt {
        CommittedAt::from_unix_micros(seconds * 1_000_000)
    }

    #[test]
    fn lag_counts_from_the_last_event_or_from_when_nothing_was_missing() {
        let key = VersionKey { projection: Name::new("orders").unwrap(), version: 1 };
        let position = |value| Position::new(value).unwrap();
        let mark = Mark { position: position(5), id: EventId::NIL };
        let held = Held { partition: 0, epoch: Epoch::FIRST, mark, fence: 1 };
        let status = Status::default();
        status.raise_head(Epoch::FIRST, position(5));
        status.reach(&key, held, position(5), Some(at(100)), at(1000));
        assert_eq!(status.lags(at(2000))[0].seconds, 0.0, "quiet is not late");
        status.raise_head(Epoch::FIRST, position(7));
        let lag = &status.lags(at(1003))[0];
        assert_eq!((lag.positions, lag.seconds), (2, 3.0));
        status.reach(&key, held, position(6), Some(at(1002)), at(1004));
        assert_eq!(status.lags(at(1004))[0].seconds, 2.0);
    }

    #[test]
    fn lag_counts_from_the_oldest_event_that_was_read_and_is_not_applied() {
        let key = VersionKey { projection: Name::new("orders").unwrap(), version: 1 };
        let position = |value| Position::new(value).unwrap();
        let mark = Mark { position: position(5), id: EventId::NIL };
        let held = |partition| Held { partition, epoch: Epoch::FIRST, mark, fence: 1 };
        let status = Status::default();
        status.raise_head(Epoch::FIRST, position(9));
        for partition in [0, 1] {
            status.reach(&key, held(partition), position(5), Some(at(100)), at(1000));
        }
        status.read(&key, at(400), position(7));
        status.read(&key, at(900), position(9));
        let seconds = |status: &Status| {
            status.lags(at(1000)).iter().map(|lag| lag.seconds).collect::<Vec<_>>()
        };
        assert_eq!(seconds(&status), [600.0, 600.0]);
        status.reach(&key, held(0), position(7), Some(at(450)), at(1000));
        assert_eq!(seconds(&status), [100.0, 600.0]);
        status.reach(&key, held(1), position(9), Some(at(950)), at(1000));
        assert_eq!(seconds(&status), [100.0, 0.0]);
    }
}
