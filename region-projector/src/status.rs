//! What every partition has reached, for `/status`, for metrics, and for the check that the database
//! did not go back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use consistency::{CommittedAt, Epoch, Position};
use serde_json::{Value, json};

use crate::checkpoint::{Held, VersionKey};

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
    /// Seconds that its newest missing event has been waiting, at most; zero when nothing is missing.
    pub seconds: f64,
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
            let seconds = if positions == 0 { 0.0 } else { seconds_behind(&reached, now) };
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
                json!({ "projection": projection, "version": version, "partitions": partitions })
            })
            .collect();
        let heads = self.lock().heads.clone();
        let head = heads.last_key_value().map(|(epoch, position)| json!([epoch, position]));
        json!({ "region": region, "head": head, "projections": projections })
    }
}

/// Both bounds are above the truth: what is missing was committed after the event at the watermark,
/// and after the moment when nothing was missing.
fn seconds_behind(reached: &Reached, now: CommittedAt) -> f64 {
    let since = reached.committed_at.max(reached.level_at);
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
}
