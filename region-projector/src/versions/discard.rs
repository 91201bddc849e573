//! Drops versions, and tables that nobody owns.
//!
//! Tables and checkpoints go in one transaction: a reader sees both or neither, and one that comes late
//! meets a missing table, which sends it to the version that is active. The row of the version stays,
//! so that its number is never given again.

use process::config::Period;
use sqlx::{AssertSqlSafe, PgConnection, PgPool};

use super::tables::{self, Table};
use super::{Version, VersionState};
use crate::checkpoint::VersionKey;
use crate::lease;
use crate::sharing::rows;
use crate::switch::{lock_versions, prepare};

/// How long a drop waits for those who read or write what goes, before it gives way to them.
const LOCK_WAIT_MAX_MS: &str = "5000";

/// Why nothing was dropped.
#[derive(Debug, thiserror::Error)]
pub enum DropError {
    /// The database. Where somebody is still at the tables it says that a lock took too long.
    #[error("the database refused, and nothing is dropped")]
    Database(#[from] sqlx::Error),
    /// There is no such version.
    #[error("there is no {0}")]
    UnknownVersion(VersionKey),
    /// Gateways read it.
    #[error("{0} is what gateways read: switch to another version first")]
    Active(VersionKey),
    /// It is being filled.
    #[error("{0} is being rebuilt: end that first")]
    Building(VersionKey),
    /// It is gone.
    #[error("{0} was dropped before")]
    Dropped(VersionKey),
}

/// Drops a version that is not read. Says which tables went.
pub async fn drop_version(
    pool: &PgPool,
    key: &VersionKey,
    statement_timeout: Period,
) -> Result<Vec<Table>, DropError> {
    drop_as(Who::Operator, pool, key, statement_timeout).await
}

/// The same of a version that is being built, for who builds it.
pub async fn drop_begun(
    pool: &PgPool,
    key: &VersionKey,
    statement_timeout: Period,
) -> Result<Vec<Table>, DropError> {
    drop_as(Who::Builder, pool, key, statement_timeout).await
}

/// Who drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    Operator,
    /// Holds the lease.
    Builder,
}

async fn drop_as(
    who: Who,
    pool: &PgPool,
    key: &VersionKey,
    statement_timeout: Period,
) -> Result<Vec<Table>, DropError> {
    let mut transaction = pool.begin().await?;
    prepare(&mut transaction, statement_timeout).await?;
    let projection = key.projection.as_str();
    lock_versions(&mut transaction, projection).await?;
    let all = super::all(&mut transaction).await?;
    let version = all.iter().find(|version| version.key == *key);
    let version = version.ok_or_else(|| DropError::UnknownVersion(key.clone()))?;
    match version.state {
        VersionState::Active => return Err(DropError::Active(key.clone())),
        VersionState::Dropped => return Err(DropError::Dropped(key.clone())),
        VersionState::Building
            if who == Who::Operator && !lease::try_within(&mut transaction, projection).await? =>
        {
            return Err(DropError::Building(key.clone()));
        }
        VersionState::Building | VersionState::Ready | VersionState::Retired => {}
    }
    forget(&mut transaction, key).await?;
    let tables = tables::all(&mut transaction).await?;
    let is_its = |table: &&Table| {
        tables::owner(&table.name, &all).is_some_and(|owner: &Version| owner.key == *key)
    };
    let tables: Vec<Table> = tables.iter().filter(is_its).cloned().collect();
    drop_tables(&mut transaction, &tables).await?;
    rows::notify(&mut transaction).await?;
    transaction.commit().await?;
    Ok(tables)
}

/// Everything that the fixed tables know of a version, checkpoints first: whoever writes step by step has their
/// lock, and is waited for before any table's. Who writes with one statement has those of the tables first, and
/// may be ended for it by the server: it comes again, and finds no checkpoint.
async fn forget(connection: &mut PgConnection, key: &VersionKey) -> Result<(), sqlx::Error> {
    let (projection, version) = (key.projection.as_str(), key.version_column());
    sqlx::query!(
        "delete from checkpoint where projection = $1 and version = $2",
        projection,
        version
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query!(
        "with unparked as (delete from parked where projection = $1 and version = $2),
             unburied as (delete from dead_letter where projection = $1 and version = $2),
             mended as (delete from parking_breaker where projection = $1 and version = $2),
             freed as (delete from partition_lease where projection = $1 and version = $2),
             left_alone as (delete from projector_share where projection = $1 and version = $2),
             built as (delete from rebuild where projection = $1 and version = $2),
             filled as (delete from rebuild_range where projection = $1 and version = $2)
         update projection_version set state = 'dropped', state_since = clock_timestamp()
         where projection = $1 and version = $2",
        projection,
        version,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Drops tables that are of no version. One that is somebody's by now is left alone.
pub async fn drop_orphans(
    pool: &PgPool,
    statement_timeout: Period,
) -> Result<Vec<Table>, DropError> {
    let mut transaction = pool.begin().await?;
    prepare(&mut transaction, statement_timeout).await?;
    // Nobody makes a version meanwhile.
    sqlx::query!("lock table projection_version in share mode").execute(&mut *transaction).await?;
    let versions = super::all(&mut transaction).await?;
    let orphans = tables::orphans(&tables::all(&mut transaction).await?, &versions);
    drop_tables(&mut transaction, &orphans).await?;
    transaction.commit().await?;
    Ok(orphans)
}

async fn drop_tables(connection: &mut PgConnection, tables: &[Table]) -> Result<(), sqlx::Error> {
    if tables.is_empty() {
        return Ok(());
    }
    sqlx::query!(r#"select set_config('lock_timeout', $1, true) as "set""#, LOCK_WAIT_MAX_MS)
        .fetch_one(&mut *connection)
        .await?;
    // The names are those that the database has told, of a form that needs no escape.
    let names: Vec<String> = tables.iter().map(|table| format!("\"{}\"", table.name)).collect();
    let statement = format!("drop table if exists {}", names.join(", "));
    sqlx::query(AssertSqlSafe(statement)).execute(connection).await?;
    Ok(())
}
