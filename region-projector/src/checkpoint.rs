//! How far each partition has come, stored with the rows it vouches for.
//!
//! The checkpoint moves by compare-and-set on fence and position at once, exactly one row, in the
//! transaction that writes the rows. The fence alone would apply a batch twice when a commit's
//! outcome is unknown, and a fence that is only read protects nothing.

use std::collections::BTreeSet;
use std::fmt;

use consistency::{CommittedAt, Epoch, EventId, LogPosition, Name, Position};
use sqlx::PgConnection;

use crate::chain::Mark;

/// One version of a projection, as the fixed tables name it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VersionKey {
    /// The projection.
    pub projection: Name,
    /// Its version.
    pub version: u32,
}

impl fmt::Display for VersionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} v{}", self.projection, self.version)
    }
}

impl VersionKey {
    /// For a database column.
    pub(crate) fn version_column(&self) -> i32 {
        i32::try_from(self.version).unwrap_or(i32::MAX)
    }
}

/// A partition's checkpoint as it was taken over, or as this holder last moved it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Which partition.
    pub partition: u16,
    /// The epoch that the position counts in.
    pub epoch: Epoch,
    /// The stored checkpoint.
    pub mark: Mark,
    /// What makes us its holder.
    pub fence: i64,
}

impl Held {
    /// The stored checkpoint's place.
    pub fn at(&self) -> LogPosition {
        LogPosition::new(self.epoch, self.mark.position)
    }
}

/// A checkpoint row that breaks its own constraints.
#[derive(Debug, thiserror::Error)]
#[error("checkpoint of partition {partition} does not make sense")]
pub struct Senseless {
    partition: i32,
}

impl Senseless {
    pub(crate) fn of(partition: i32) -> Self {
        Self { partition }
    }
}

/// Why checkpoints cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// A row that makes no sense.
    #[error(transparent)]
    Senseless(#[from] Senseless),
}

/// Creates the checkpoints of a version that has none, at the beginning of the log.
pub async fn create(
    connection: &mut PgConnection,
    key: &VersionKey,
    partition_count: u16,
    epoch: Epoch,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "insert into checkpoint (projection, version, partition, epoch, position, event_id, fence)
         select $1, $2, partition, $4, 0, $5, 0
         from generate_series(0, $3::integer - 1) as partition
         on conflict do nothing",
        key.projection.as_str(),
        key.version_column(),
        i32::from(partition_count),
        epoch.as_i32(),
        EventId::NIL.get(),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Takes partitions of a version over: whoever held one before can commit no more.
pub async fn take(
    connection: &mut PgConnection,
    key: &VersionKey,
    partitions: &BTreeSet<u16>,
) -> Result<Vec<Held>, CheckpointError> {
    let partitions: Vec<i32> = partitions.iter().copied().map(i32::from).collect();
    let rows = sqlx::query!(
        "update checkpoint set fence = fence + 1
         where projection = $1 and version = $2 and partition = any($3)
         returning partition, epoch, position, event_id, fence",
        key.projection.as_str(),
        key.version_column(),
        &partitions,
    )
    .fetch_all(connection)
    .await?;
    let held = rows.into_iter().map(|row| {
        held(row.partition, row.epoch, row.position, row.event_id, row.fence)
            .ok_or(Senseless { partition: row.partition })
    });
    let mut held = held.collect::<Result<Vec<_>, _>>()?;
    held.sort_by_key(|held| held.partition);
    Ok(held)
}

/// Takes one partition over, and with it the lock of its checkpoint until the transaction ends. `None`
/// when the version has no such partition.
pub async fn take_one(
    connection: &mut PgConnection,
    key: &VersionKey,
    partition: u16,
) -> Result<Option<Held>, CheckpointError> {
    let row = sqlx::query!(
        "update checkpoint set fence = fence + 1
         where projection = $1 and version = $2 and partition = $3
         returning partition, epoch, position, event_id, fence",
        key.projection.as_str(),
        key.version_column(),
        i32::from(partition),
    )
    .fetch_optional(connection)
    .await?;
    let held = row.map(|row| {
        held(row.partition, row.epoch, row.position, row.event_id, row.fence)
            .ok_or(Senseless { partition: row.partition })
    });
    Ok(held.transpose()?)
}

/// The checkpoints as they are stored now.
pub async fn stored(
    connection: &mut PgConnection,
    key: &VersionKey,
) -> Result<Vec<Held>, CheckpointError> {
    let rows = sqlx::query!(
        "select partition, epoch, position, event_id, fence from checkpoint
         where projection = $1 and version = $2 order by partition",
        key.projection.as_str(),
        key.version_column(),
    )
    .fetch_all(connection)
    .await?;
    let held = rows.into_iter().map(|row| {
        held(row.partition, row.epoch, row.position, row.event_id, row.fence)
            .ok_or(Senseless { partition: row.partition })
    });
    Ok(held.collect::<Result<_, _>>()?)
}

/// Moves a checkpoint on. `false` when the row is not as `held` says: then nothing may be committed,
/// since another holder or another past has come in between.
pub async fn advance(
    connection: &mut PgConnection,
    key: &VersionKey,
    held: &Held,
    to: Mark,
    committed_at: Option<CommittedAt>,
) -> Result<bool, sqlx::Error> {
    let moved = sqlx::query!(
        "update checkpoint set
             position = $7, event_id = $8,
             committed_at = coalesce(
                 timestamptz 'epoch' + $9::bigint * interval '1 microsecond', committed_at)
         where projection = $1 and version = $2 and partition = $3
           and epoch = $4 and position = $5 and fence = $6",
        key.projection.as_str(),
        key.version_column(),
        i32::from(held.partition),
        held.epoch.as_i32(),
        held.mark.position.as_i64(),
        held.fence,
        to.position.as_i64(),
        to.id.get(),
        committed_at.map(CommittedAt::unix_micros),
    )
    .execute(connection)
    .await?;
    Ok(moved.rows_affected() == 1)
}

/// The place that a checkpoint's row names.
pub(crate) fn log_position(
    partition: i32,
    epoch: i32,
    position: i64,
) -> Result<LogPosition, Senseless> {
    let place = Epoch::from_i32(epoch).zip(Position::from_i64(position));
    let (epoch, position) = place.ok_or(Senseless { partition })?;
    Ok(LogPosition::new(epoch, position))
}

fn held(
    partition: i32,
    epoch: i32,
    position: i64,
    event_id: sqlx::types::Uuid,
    fence: i64,
) -> Option<Held> {
    let mark = Mark { position: Position::from_i64(position)?, id: EventId::new(event_id) };
    let partition = u16::try_from(partition).ok()?;
    Some(Held { partition, epoch: Epoch::from_i32(epoch)?, mark, fence })
}
