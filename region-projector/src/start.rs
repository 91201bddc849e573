//! What has to be there before events are applied: tables, versions, checkpoints, epochs.

use std::collections::BTreeMap;

use consistency::{Epoch, EpochHistory};
use projection::{Domain, DomainError, ProjectionDefinition};
use sqlx::migrate::MigrateError;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};
use uuid::Uuid;

use crate::checkpoint::{self, VersionKey};
use crate::config::ProjectorConfig;
use crate::epochs::{self, EpochError};
use crate::log::LogError;
use crate::versions::{self, Version, VersionState};

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
    /// The rules of a version that is read are not in this binary, so nobody would keep it current.
    #[error("{key} is active, but its rules, definition {definition}, are not in this binary")]
    ActiveVersionUnknown {
        /// The active version.
        key: VersionKey,
        /// The number of its rules.
        definition: u32,
    },
    /// The tables of a version cannot be named.
    #[error("a version cannot have tables of its own")]
    Version(#[from] DomainError),
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
            | Self::Version(_)
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
    let known = make_ready(pool, log_id).await?;
    let mut connection = pool.acquire().await?;
    for definition in newest(domain) {
        introduce(&mut connection, definition).await?;
    }
    let versions = versions::all(&mut connection).await?;
    check_active(&versions, domain)?;
    for version in versions.iter().filter(|version| version.state.follows_the_log()) {
        if let Some(definition) = version.definition_in(domain)? {
            create(&mut connection, &definition, known.current()).await?;
        }
    }
    Ok(known)
}

/// Makes the fixed tables, and says which epochs are known here.
pub(crate) async fn make_ready(pool: &PgPool, log_id: Uuid) -> Result<EpochHistory, StartError> {
    let mut migrator = sqlx::migrate!("../migrations/region");
    // A newer binary may have been here: its migrations only add.
    migrator.set_ignore_missing(true);
    migrator.run(pool).await?;
    let mut connection = pool.acquire().await?;
    check_log(&mut connection, log_id).await?;
    epochs::stored(&mut connection).await.map_err(|error| match error {
        EpochError::Database(error) => StartError::Database(error),
        EpochError::Disordered | EpochError::Log(_) => StartError::Epochs,
    })
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

fn check_active(versions: &[Version], domain: &Domain) -> Result<(), StartError> {
    let known = |version: &Version| {
        domain.projection(version.key.projection.as_str(), version.definition).is_some()
    };
    let mut active = versions.iter().filter(|version| version.state == VersionState::Active);
    match active.find(|version| !known(version)) {
        Some(Version { key, definition, .. }) => {
            Err(StartError::ActiveVersionUnknown { key: key.clone(), definition: *definition })
        }
        None => Ok(()),
    }
}

/// The newest rules of each projection that is stored.
fn newest(domain: &Domain) -> impl Iterator<Item = &ProjectionDefinition> {
    let mut newest = BTreeMap::new();
    for definition in domain.stored() {
        let known = newest.entry(definition.name()).or_insert(definition);
        if known.declared_version() < definition.declared_version() {
            *known = definition;
        }
    }
    newest.into_values()
}

/// The first version of a projection is active at once: there is none that it could be older than. Any
/// further one is a rebuild.
async fn introduce(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
) -> Result<(), sqlx::Error> {
    let key = key_of(definition);
    sqlx::query!(
        "insert into projection_version (projection, version, partition_count, active, definition)
         select $1, $2, $3, true, $2
         where not exists (select from projection_version where projection = $1)
         on conflict (projection, version) do nothing",
        key.projection.as_str(),
        key.version_column(),
        i32::from(definition.partition_count().get()),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The tables and checkpoints of a version, all or nothing, unless it was dropped meanwhile.
async fn create(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    epoch: Epoch,
) -> Result<(), StartError> {
    let key = key_of(definition);
    let mut transaction = connection.begin().await?;
    let is_there = sqlx::query_scalar!(
        r#"select true as "is_there!" from projection_version
           where projection = $1 and version = $2 and state in ('ready', 'retired') for share"#,
        key.projection.as_str(),
        key.version_column(),
    );
    if is_there.fetch_optional(&mut *transaction).await?.is_none() {
        return Ok(());
    }
    for statement in &definition.statements().create {
        sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut *transaction).await?;
    }
    checkpoint::create(&mut transaction, &key, definition.partition_count().get(), epoch).await?;
    transaction.commit().await?;
    Ok(())
}
