//! Whether a version may take over from another: decided from their checkpoints and parked aggregates.

use std::fmt;

use consistency::{EpochHistory, LogPosition, Position};
use sqlx::PgConnection;

use super::SwitchError;
use crate::checkpoint::{Senseless, log_position};
use crate::parity::Difference;
use crate::versions::Version;

/// Differences that a message names at most.
const SHOWN_COUNT_MAX: usize = 5;

/// What one version has reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Side {
    /// Stored checkpoints by partition; `None` where one is missing.
    pub checkpoints: Vec<Option<LogPosition>>,
    /// Parked aggregates.
    pub parked: Vec<ParkedAt>,
}

/// A parked aggregate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParkedAt {
    /// The aggregate's id; a projection is of one type.
    pub aggregate_id: String,
    /// Its first event that is not applied.
    pub at: Position,
}

/// What speaks against a version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// A partition has no checkpoint.
    NoCheckpoint {
        /// Which.
        partition: usize,
    },
    /// Its checkpoints count in an epoch that the log has left, or that is not known here.
    Epoch {
        /// Where it stands.
        at: LogPosition,
        /// The epoch that is known here.
        current: consistency::Epoch,
    },
    /// It has not applied everything that the older one has.
    Behind {
        /// Which partition, where both have as many.
        partition: Option<usize>,
        /// Where it stands.
        new: Position,
        /// Where the older one stands.
        old: Position,
    },
    /// It has parked what the older one has applied.
    Parked {
        /// The first such aggregate.
        aggregate: ParkedAt,
        /// How many there are.
        count: usize,
    },
    /// So little is in both of them that nothing can be said of what they hold.
    TooFarApart,
    /// They do not hold the same.
    Differs {
        /// The first few of each table: what the older one says, and what the newer.
        differences: Vec<Difference>,
    },
}

impl Refusal {
    /// Whether it says that the older one may be damaged, rather than that the newer one is behind.
    pub fn is_difference(&self) -> bool {
        match self {
            Self::Differs { .. } | Self::TooFarApart => true,
            Self::NoCheckpoint { .. }
            | Self::Epoch { .. }
            | Self::Behind { .. }
            | Self::Parked { .. } => false,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoCheckpoint { partition } => {
                write!(f, "partition {partition} has no checkpoint, rebuild it")
            }
            Self::Epoch { at, current } => write!(
                f,
                "its checkpoints count in epoch {}, and the log is in epoch {current}, wait until \
                 its projector has adopted that, or rebuild it",
                at.epoch
            ),
            Self::Behind { partition: Some(partition), new, old } => write!(
                f,
                "partition {partition} is at position {new}, the active version's is at {old}, \
                 wait until it has caught up"
            ),
            Self::Behind { partition: None, new, old } => write!(
                f,
                "its partitions are others, and the last is at position {new} while the active \
                 version's first is at {old}, wait until it has caught up"
            ),
            Self::Parked { aggregate: ParkedAt { aggregate_id, at }, count } => write!(
                f,
                "{count} aggregates are parked that the active version has applied, as \
                 {aggregate_id} is at position {at}, retry or discard its dead letters"
            ),
            Self::TooFarApart => f.write_str(
                "the active version is so far behind that they cannot be compared; if nothing moves \
                 it any more, add --accept-differences",
            ),
            Self::Differs { differences } => {
                let shown: Vec<String> =
                    differences.iter().take(SHOWN_COUNT_MAX).map(ToString::to_string).collect();
                write!(
                    f,
                    "they do not hold the same ({}); if it is the active version that is wrong, add \
                     --accept-differences",
                    shown.join("; ")
                )
            }
        }
    }
}

/// Both sides, and the epochs that positions count in.
pub(super) struct Gate<'a> {
    pub(super) old: &'a Side,
    pub(super) new: &'a Side,
    pub(super) history: &'a EpochHistory,
}

impl Gate<'_> {
    /// Whether nothing but waiting longer could help.
    pub(super) fn is_caught_up(&self) -> bool {
        let waits = |refusal: &Refusal| match refusal {
            Refusal::Behind { .. } => true,
            Refusal::NoCheckpoint { .. }
            | Refusal::Epoch { .. }
            | Refusal::Parked { .. }
            | Refusal::TooFarApart
            | Refusal::Differs { .. } => false,
        };
        !self.refusals().iter().any(waits)
    }

    /// Everything that speaks against the newer one, but for what its tables hold.
    pub(super) fn refusals(&self) -> Vec<Refusal> {
        let missing = self.new.checkpoints.iter().position(Option::is_none);
        if let Some(partition) = missing {
            return vec![Refusal::NoCheckpoint { partition }];
        }
        let mut refusals = Vec::new();
        let current = self.history.current();
        let elsewhere = self.new.checkpoints.iter().flatten().find(|at| at.epoch != current);
        if let Some(at) = elsewhere {
            refusals.push(Refusal::Epoch { at: *at, current });
        }
        refusals.extend(self.behind());
        refusals.extend(self.parked());
        refusals
    }

    fn behind(&self) -> Vec<Refusal> {
        let new: Vec<Position> =
            self.new.checkpoints.iter().flatten().map(|at| at.position).collect();
        let old: Vec<Position> = self.old.checkpoints.iter().map(|at| self.owed(*at)).collect();
        if new.len() == old.len() {
            let pairs = new.into_iter().zip(old).enumerate();
            let behind = pairs.filter(|(_, (new, old))| new < old);
            return behind
                .map(|(at, (new, old))| Refusal::Behind { partition: Some(at), new, old })
                .collect();
        }
        let (least, most) = (new.into_iter().min(), old.into_iter().max());
        match (least.unwrap_or_default(), most.unwrap_or_default()) {
            (new, old) if new < old => vec![Refusal::Behind { partition: None, new, old }],
            _ => Vec::new(),
        }
    }

    /// How much of what the older one has applied the log still knows: what it lost is owed to nobody.
    fn owed(&self, old: Option<LogPosition>) -> Position {
        old.map_or(Position::ZERO, |at| at.position.min(self.history.kept_of(at.epoch)))
    }

    fn parked(&self) -> Option<Refusal> {
        let is_new = |parked: &&ParkedAt| {
            let mut old = self.old.parked.iter();
            !old.any(|old| old.aggregate_id == parked.aggregate_id && old.at <= parked.at)
                && self.old.checkpoints.iter().any(|at| parked.at <= self.owed(*at))
        };
        let newly: Vec<&ParkedAt> = self.new.parked.iter().filter(is_new).collect();
        let aggregate = newly.first().copied()?.clone();
        Some(Refusal::Parked { aggregate, count: newly.len() })
    }
}

/// What a version has reached, under the lock of its checkpoints until the transaction ends.
pub(super) async fn lock(
    connection: &mut PgConnection,
    version: &Version,
) -> Result<Side, SwitchError> {
    sqlx::query!(
        "select partition from checkpoint where projection = $1 and version = $2
         order by partition for update",
        version.key.projection.as_str(),
        version.key.version_column(),
    )
    .fetch_all(&mut *connection)
    .await?;
    look(connection, version).await
}

/// The same without a lock.
pub(super) async fn look(
    connection: &mut PgConnection,
    version: &Version,
) -> Result<Side, SwitchError> {
    let (projection, number) = (version.key.projection.as_str(), version.key.version_column());
    let rows = sqlx::query!(
        "select partition, epoch, position from checkpoint where projection = $1 and version = $2",
        projection,
        number,
    );
    let mut checkpoints = vec![None; usize::from(version.partition_count.get())];
    for row in rows.fetch_all(&mut *connection).await? {
        let at = log_position(row.partition, row.epoch, row.position);
        let at = at.map_err(crate::checkpoint::CheckpointError::from)?;
        let slot = usize::try_from(row.partition).ok().and_then(|at| checkpoints.get_mut(at));
        let senseless = || Senseless::of(row.partition);
        *slot.ok_or_else(senseless).map_err(crate::checkpoint::CheckpointError::from)? = Some(at);
    }
    let rows = sqlx::query!(
        "select aggregate_id, position from parked where projection = $1 and version = $2
         order by position",
        projection,
        number,
    );
    let parked = rows.fetch_all(connection).await?.into_iter().filter_map(|row| {
        Some(ParkedAt { aggregate_id: row.aggregate_id, at: Position::from_i64(row.position)? })
    });
    Ok(Side { checkpoints, parked: parked.collect() })
}
