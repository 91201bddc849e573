//! What has to be there before events are applied: tables, versions, checkpoints, epochs.

use consistency::{Epoch, EpochHistory};
use projection::{Domain, ProjectionDefinition};
use sqlx::migrate::MigrateError;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use uuid::Uuid;

use crate::checkpoint::{self, VersionKey};
use crate::config::ProjectorConfig;
use crate::epochs::{self, EpochError};
use crate::log::LogError;

/// Why the projector cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The fixed tables could not be brought up to date.
    #[error("the migrations of the region did not run")]
    Migrate(#[from] MigrateError),
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// The way to the primary's log is not usable.
    #[error("the way to the primary's log is not usable")]
    Log(#[from] LogError),
    /// A version that is read is not in this binary, so nobody would keep it current.
    #[error("version {version} of projection {projection} is active, but not in this binary")]
    ActiveVersionUnknown {
        /// The projection.
        projection: String,
        /// Its active version.
        version: i32,
    },
    /// The number of partitions was changed without a new version.
    #[error("{key} was made with {stored} partitions, this binary has {compiled}")]
    PartitionCount {
        /// Which version.
        key: VersionKey,
        /// As it was made.
        stored: i32,
        /// As this binary has it.
        compiled: u16,
    },
    /// The read models of this database are of another log.
    #[error("this database belongs to log {stored}, the configuration names {configured}")]
    OtherLog {
        /// Whose read models are here.
        stored: Uuid,
        /// What was to be read.
        configured: Uuid,
    },
    /// The configuration has limits for a projection that is not there.
    #[error("the configuration names projection {0}, which is not in this binary")]
    UnknownProjection(String),
    /// None of the partitions that are named by hand is there.
    #[error("no projection has any of the partitions that are named by hand")]
    NoPartition,
    /// The epochs that the region has stored make no sense.
    #[error("the stored epochs do not rise one by one")]
    Epochs,
    /// The connection to NATS cannot be set up as configured.
    #[error("the connection to NATS cannot be set up")]
    Nats(#[from] async_nats::ConnectError),
    /// The admin listener's address cannot be bound.
    #[error("the admin address cannot be bound")]
    Bind(#[source] std::io::Error),
    /// The instruments cannot be made.
    #[error("telemetry cannot be set up")]
    Telemetry(#[from] process::telemetry::TelemetryError),
    /// A task of the service panicked.
    #[error("a task of the service panicked")]
    Panicked(#[from] tokio::task::JoinError),
}

impl StartError {
    /// Whether the same start may succeed later. The others need another binary or an operator.
    pub fn is_transient(&self) -> bool {
        match self {
            // An unreachable database looks like this in both.
            Self::Database(_) => true,
            Self::Migrate(error) => matches!(error, MigrateError::Execute(_)),
            Self::ActiveVersionUnknown { .. }
            | Self::PartitionCount { .. }
            | Self::OtherLog { .. }
            | Self::UnknownProjection(_)
            | Self::NoPartition
            | Self::Epochs
            | Self::Log(_)
            | Self::Nats(_)
            | Self::Bind(_)
            | Self::Telemetry(_)
            | Self::Panicked(_) => false,
        }
    }
}

/// Makes everything that is absent, and says which epochs are known here.
pub async fn prepare(
    pool: &PgPool,
    domain: &Domain,
    log_id: Uuid,
) -> Result<EpochHistory, StartError> {
    let mut migrator = sqlx::migrate!("../migrations/region");
    // A newer binary may have been here: its migrations only add.
    migrator.set_ignore_missing(true);
    migrator.run(pool).await?;
    let mut connection = pool.acquire().await?;
    check_log(&mut connection, log_id).await?;
    check_active(&mut connection, domain).await?;
    let known = epochs::stored(&mut connection).await.map_err(|error| match error {
        EpochError::Database(error) => StartError::Database(error),
        EpochError::Disordered | EpochError::Log(_) => StartError::Epochs,
    })?;
    for definition in domain.stored() {
        create(&mut connection, definition, known.current()).await?;
    }
    Ok(known)
}

/// Whether the projections and partitions that a configuration names are there.
pub fn check_named(config: &ProjectorConfig, domain: &Domain) -> Result<(), StartError> {
    let is_known =
        |name: &&String| domain.projections().iter().any(|one| one.name().as_str() == *name);
    if let Some(unknown) = config.projection.keys().find(|name| !is_known(name)) {
        return Err(StartError::UnknownProjection(unknown.clone()));
    }
    // A projection with fewer partitions than are named has none of them here.
    let is_applied = |definition: &ProjectionDefinition| {
        let by_hand = config.apply_to(definition.name().as_str()).partitions;
        by_hand.is_none_or(|named| !named.below(definition.partition_count().get()).is_empty())
    };
    let is_any = domain.stored().any(is_applied);
    if is_any { Ok(()) } else { Err(StartError::NoPartition) }
}

/// Names of a version in the fixed tables.
pub fn key_of(definition: &ProjectionDefinition) -> VersionKey {
    VersionKey { projection: definition.name().clone(), version: definition.version() }
}

async fn check_log(connection: &mut PgConnection, configured: Uuid) -> Result<(), StartError> {
    sqlx::query!(
        "insert into log_identity (log_id) values ($1) on conflict do nothing",
        configured
    )
    .execute(&mut *connection)
    .await?;
    let stored = sqlx::query_scalar!("select log_id from log_identity").fetch_one(connection);
    let stored = stored.await?;
    if stored == configured { Ok(()) } else { Err(StartError::OtherLog { stored, configured }) }
}

async fn check_active(connection: &mut PgConnection, domain: &Domain) -> Result<(), StartError> {
    let active = sqlx::query!("select projection, version from projection_version where active")
        .fetch_all(connection)
        .await?;
    let known = |projection: &str, version: i32| {
        u32::try_from(version).is_ok_and(|version| domain.projection(projection, version).is_some())
    };
    match active.into_iter().find(|row| !known(&row.projection, row.version)) {
        Some(row) => Err(StartError::ActiveVersionUnknown {
            projection: row.projection,
            version: row.version,
        }),
        None => Ok(()),
    }
}

/// One version with its tables and checkpoints, all or nothing. The first version of a projection is
/// active at once: there is none that it could be older than.
async fn create(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    epoch: Epoch,
) -> Result<(), StartError> {
    let key = key_of(definition);
    let partition_count = definition.partition_count().get();
    let mut transaction = connection.begin().await?;
    sqlx::query!(
        "insert into projection_version (projection, version, partition_count, active)
         values ($1, $2, $3, not exists (
             select from projection_version where projection = $1 and active))
         on conflict (projection, version) do nothing",
        key.projection.as_str(),
        key.version_column(),
        i32::from(partition_count),
    )
    .execute(&mut *transaction)
    .await?;
    let stored = sqlx::query_scalar!(
        "select partition_count from projection_version where projection = $1 and version = $2",
        key.projection.as_str(),
        key.version_column(),
    )
    .fetch_one(&mut *transaction)
    .await?;
    if stored != i32::from(partition_count) {
        return Err(StartError::PartitionCount { key, stored, compiled: partition_count });
    }
    for statement in &definition.statements().create {
        sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut *transaction).await?;
    }
    checkpoint::create(&mut transaction, &key, partition_count, epoch).await?;
    transaction.commit().await?;
    Ok(())
}
