//! The processes of a region and their leases, as the database has them.

use std::collections::{BTreeMap, BTreeSet};

use consistency::LogPosition;
use sqlx::PgConnection;
use uuid::Uuid;

use super::split::Split;
use crate::checkpoint::VersionKey;
use crate::versions::{self, Version};

/// Where processes tell each other that something has changed.
pub const CHANNEL: &str = "tidemark_projector";

/// A version that a process takes part in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Which version.
    pub key: VersionKey,
    /// Whether its partitions were named by hand.
    pub is_by_hand: bool,
}

/// What the database shows at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Who shares what.
    pub splits: BTreeMap<(String, i32), Split>,
    /// Projections that an operator has paused.
    pub paused: BTreeSet<String>,
    /// Versions, and what becomes of them.
    pub versions: Vec<Version>,
    /// Versions that have stopped since this process started, and are not resumed, with the reason.
    pub tripped: BTreeMap<(String, i32), String>,
}

/// Prolongs the life of a process. `false` when it is not there: it was taken for dead, or never came.
pub async fn renew(
    connection: &mut PgConnection,
    process: Uuid,
    lease_ms: u32,
    head: Option<LogPosition>,
) -> Result<bool, sqlx::Error> {
    let renewed = sqlx::query!(
        "update projector_process set
             expires_at = clock_timestamp() + $2::bigint * interval '1 millisecond',
             head_epoch = coalesce($3, head_epoch),
             head_position = coalesce($4, head_position)
         where process = $1",
        process,
        i64::from(lease_ms),
        head.map(|head| head.epoch.as_i32()),
        head.map(|head| head.position.as_i64()),
    )
    .execute(connection)
    .await?;
    Ok(renewed.rows_affected() == 1)
}

/// Comes in, in the place of whoever had the name before.
pub async fn join(
    connection: &mut PgConnection,
    process: Uuid,
    name: &str,
    lease_ms: u32,
    shares: &[Share],
) -> Result<(), sqlx::Error> {
    sqlx::query!("delete from projector_process where name = $1", name)
        .execute(&mut *connection)
        .await?;
    sqlx::query!(
        "insert into projector_process (process, name, expires_at)
         values ($1, $2, clock_timestamp() + $3::bigint * interval '1 millisecond')",
        process,
        name,
        i64::from(lease_ms),
    )
    .execute(&mut *connection)
    .await?;
    share(connection, process, shares).await?;
    notify(connection).await
}

/// Takes part in these versions as well.
pub async fn share(
    connection: &mut PgConnection,
    process: Uuid,
    shares: &[Share],
) -> Result<(), sqlx::Error> {
    let projections: Vec<String> =
        shares.iter().map(|share| share.key.projection.to_string()).collect();
    let versions: Vec<i32> = shares.iter().map(|share| share.key.version_column()).collect();
    let by_hand: Vec<bool> = shares.iter().map(|share| share.is_by_hand).collect();
    sqlx::query!(
        "insert into projector_share (process, projection, version, by_hand)
         select $1, share.* from unnest($2::text[], $3::integer[], $4::boolean[]) as share
         on conflict do nothing",
        process,
        &projections,
        &versions,
        &by_hand,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Goes, and frees everything that it held.
pub async fn leave(connection: &mut PgConnection, process: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query!("delete from projector_process where process = $1", process)
        .execute(&mut *connection)
        .await?;
    notify(connection).await
}

/// Removes those who have not prolonged their lives in time. Says their names.
pub async fn bury(connection: &mut PgConnection, me: Uuid) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar!(
        "delete from projector_process where expires_at < clock_timestamp() and process <> $1
         returning name",
        me,
    )
    .fetch_all(connection)
    .await
}

/// Wakes every process of the region, when the transaction commits.
pub async fn notify(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    // The channel's name is a constant; a parameter would not make it more so.
    sqlx::query!("select pg_notify($1, '')", CHANNEL).execute(connection).await?;
    Ok(())
}

/// What is to be known to decide anything.
pub async fn look(connection: &mut PgConnection, me: Uuid) -> Result<Snapshot, sqlx::Error> {
    let versions = versions::all(connection).await?;
    let mut snapshot = Snapshot { versions, ..Snapshot::default() };
    let members =
        sqlx::query!("select projection, version, process from projector_share where not by_hand");
    for row in members.fetch_all(&mut *connection).await? {
        let split = snapshot.splits.entry((row.projection, row.version)).or_default();
        split.members.insert(row.process);
    }
    let leases =
        sqlx::query!("select projection, version, partition, process from partition_lease");
    for row in leases.fetch_all(&mut *connection).await? {
        let Ok(partition) = u16::try_from(row.partition) else { continue };
        let split = snapshot.splits.entry((row.projection, row.version)).or_default();
        split.holders.insert(partition, row.process);
    }
    let paused = sqlx::query_scalar!("select projection from projection_pause");
    snapshot.paused.extend(paused.fetch_all(&mut *connection).await?);
    let tripped = sqlx::query!(
        "select projection, version, reason from parking_breaker
         where accepted_count < parked_count and tripped_at > (
             select started_at from projector_process where process = $1)",
        me,
    );
    for row in tripped.fetch_all(&mut *connection).await? {
        snapshot.tripped.insert((row.projection, row.version), row.reason);
    }
    Ok(snapshot)
}

/// Makes `wanted` what a process holds of a version, as far as nobody else holds it: what is not wanted
/// any more is given up, what is free is taken. Says what is held in the end, under lock until the
/// transaction ends. `None` when the process is not in.
pub async fn settle(
    connection: &mut PgConnection,
    process: Uuid,
    key: &VersionKey,
    wanted: &BTreeSet<u16>,
) -> Result<Option<BTreeSet<u16>>, sqlx::Error> {
    let is_in = sqlx::query_scalar!(
        r#"select true as "is_in!" from projector_process where process = $1 for key share"#,
        process,
    );
    if is_in.fetch_optional(&mut *connection).await?.is_none() {
        return Ok(None);
    }
    let columns: Vec<i32> = wanted.iter().copied().map(i32::from).collect();
    let given = sqlx::query!(
        "delete from partition_lease
         where process = $1 and projection = $2 and version = $3 and partition <> all($4)",
        process,
        key.projection.as_str(),
        key.version_column(),
        &columns,
    );
    let given_count = given.execute(&mut *connection).await?.rows_affected();
    let taken = sqlx::query!(
        "insert into partition_lease (projection, version, partition, process)
         select $2, $3, partition, $1 from unnest($4::integer[]) as partition order by partition
         on conflict do nothing",
        process,
        key.projection.as_str(),
        key.version_column(),
        &columns,
    );
    let taken_count = taken.execute(&mut *connection).await?.rows_affected();
    if 0 < given_count + taken_count {
        notify(connection).await?;
    }
    held(connection, process, key).await.map(Some)
}

/// Takes partitions that were named by hand, whoever holds them.
pub async fn seize(
    connection: &mut PgConnection,
    process: Uuid,
    key: &VersionKey,
    partitions: &BTreeSet<u16>,
) -> Result<(), sqlx::Error> {
    let columns: Vec<i32> = partitions.iter().copied().map(i32::from).collect();
    let seized = sqlx::query!(
        "insert into partition_lease as lease (projection, version, partition, process)
         select $2, $3, partition, $1 from unnest($4::integer[]) as partition
         where exists (select from projector_process where process = $1) order by partition
         on conflict (projection, version, partition) do update set process = excluded.process
         where lease.process <> excluded.process",
        process,
        key.projection.as_str(),
        key.version_column(),
        &columns,
    );
    match seized.execute(&mut *connection).await?.rows_affected() {
        0 => Ok(()),
        _ => notify(connection).await,
    }
}

async fn held(
    connection: &mut PgConnection,
    process: Uuid,
    key: &VersionKey,
) -> Result<BTreeSet<u16>, sqlx::Error> {
    let held = sqlx::query_scalar!(
        "select partition from partition_lease
         where process = $1 and projection = $2 and version = $3 for share",
        process,
        key.projection.as_str(),
        key.version_column(),
    );
    let held = held.fetch_all(connection).await?;
    Ok(held.into_iter().filter_map(|partition| u16::try_from(partition).ok()).collect())
}
