//! Which version is built: one that was begun before, or a new one.

use consistency::{Adoption, EpochHistory, PartitionCount, Position};
use process::config::Period;
use projection::sql::bulk::BulkStatements;
use projection::{Domain, ProjectionDefinition, ProjectionKind};
use sqlx::{AssertSqlSafe, PgConnection};

use super::{RebuildError, Work};
use crate::checkpoint::{self, VersionKey};
use crate::epochs::{self, Learner};
use crate::health::Health;
use crate::sharing::rows;
use crate::start::{self, key_of};
use crate::versions::{self, Version, VersionState, discard, tables};

/// Bound on dropping what was begun in an epoch that is gone.
const DROP_TIMEOUT: Period = Period::from_secs(60);

/// What an operator asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Which projection.
    pub projection: String,
    /// By which rules; the newest of the binary unless set.
    pub definition: Option<u32>,
    /// Into how many partitions; as the rules say unless set.
    pub partitions: Option<u16>,
}

/// What is to be done next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Events into states.
    Folding,
    /// States into rows.
    Filling,
    /// Keys and indexes.
    Indexing,
}

impl Stage {
    fn as_str(self) -> &'static str {
        match self {
            Self::Folding => "folding",
            Self::Filling => "filling",
            Self::Indexing => "indexing",
        }
    }

    fn of(text: &str) -> Self {
        match text {
            "filling" => Self::Filling,
            "indexing" => Self::Indexing,
            _ => Self::Folding,
        }
    }
}

/// A version that is being built.
pub(super) struct Job {
    pub(super) key: VersionKey,
    pub(super) definition: ProjectionDefinition,
    pub(super) bulk: BulkStatements,
    pub(super) history: EpochHistory,
    /// What is folded in the end; the projectors go on from there.
    pub(super) target: Position,
    pub(super) stage: Stage,
    pub(super) resumed_at: Option<Position>,
    pub(super) is_left_to_projectors: bool,
}

impl Work {
    /// Goes on with what was begun, or begins.
    pub(super) async fn begin(
        &self,
        domain: &Domain,
        request: &Request,
    ) -> Result<Job, RebuildError> {
        let rules = rules(domain, request)?;
        let history = self.learn_epochs(domain).await?;
        let mut connection = self.pool.acquire().await?;
        let all = versions::of_projection(&mut connection, &request.projection).await?;
        let is_it = |version: &&Version| {
            let is_asked =
                request.partitions.is_none_or(|count| count == version.partition_count.get());
            version.state == VersionState::Building
                && version.definition == rules.declared_version()
                && is_asked
        };
        if let Some(version) = all.iter().find(is_it) {
            let definition = rules.instance(version.key.version, version.partition_count)?;
            if let Some(job) = self.resume(&mut connection, definition, &history).await? {
                return Ok(job);
            }
            drop(connection);
            tracing::warn!(version = %version.key, "was begun in an epoch that is gone, begun anew");
            discard::drop_begun(&self.pool, &version.key, DROP_TIMEOUT).await?;
            connection = self.pool.acquire().await?;
        }
        let target = self.head(&history).await?;
        self.begin_anew(&mut connection, (rules, request), &all, (history, target)).await
    }

    /// Also makes sure that the fixed tables are there, and that this is the log they are of.
    async fn learn_epochs(&self, domain: &Domain) -> Result<EpochHistory, RebuildError> {
        let known = start::prepare(&self.pool, domain, self.config.log.id).await?;
        let every = self.config.nats.watch_interval;
        let (learner, epochs) =
            Learner::new(self.pool.clone(), self.log.clone(), every, Health::default(), known);
        learner.learn().await;
        Ok(epochs.known())
    }

    /// `None` when it has folded what the log lost since.
    async fn resume(
        &self,
        connection: &mut PgConnection,
        definition: ProjectionDefinition,
        history: &EpochHistory,
    ) -> Result<Option<Job>, RebuildError> {
        let key = key_of(&definition);
        let mut transaction = sqlx::Connection::begin(&mut *connection).await?;
        match epochs::adopt(&mut transaction, &key, history).await? {
            Adoption::Here | Adoption::InPlace => transaction.commit().await?,
            Adoption::Beyond { .. } | Adoption::Newer(_) => return Ok(None),
        }
        let row = sqlx::query!(
            r#"select target_position, phase, (select min(position) from checkpoint
                   where projection = $1 and version = $2) as reached
               from rebuild where projection = $1 and version = $2"#,
            key.projection.as_str(),
            key.version_column(),
        );
        let Some(row) = row.fetch_optional(connection).await? else { return Ok(None) };
        let reached = row.reached.and_then(Position::from_i64).unwrap_or_default();
        let stage = Stage::of(&row.phase);
        let target = match stage {
            // More has happened since, and now is as good a time to fold it as later.
            Stage::Folding => self.head(history).await?,
            Stage::Filling | Stage::Indexing => {
                Position::from_i64(row.target_position).unwrap_or_default()
            }
        };
        tracing::info!(version = %key, %reached, phase = row.phase, "going on");
        Ok(Some(Job {
            bulk: BulkStatements::of(&definition),
            key,
            definition,
            history: history.clone(),
            target,
            stage,
            resumed_at: Some(reached),
            is_left_to_projectors: false,
        }))
    }

    async fn begin_anew(
        &self,
        connection: &mut PgConnection,
        (rules, request): (&ProjectionDefinition, &Request),
        all: &[Version],
        (history, target): (EpochHistory, Position),
    ) -> Result<Job, RebuildError> {
        // Numbers of versions that were dropped count as well: they are never given again.
        let highest = all.last().map_or(0, |version| version.key.version);
        let number = rules.declared_version().max(highest + 1);
        let count = request.partitions.unwrap_or(rules.partition_count().get());
        let count = PartitionCount::new(count).ok_or(RebuildError::PartitionCount(count))?;
        let is_left_to_projectors = match rules.kind() {
            ProjectionKind::Custom(_) if number == rules.declared_version() => true,
            ProjectionKind::Custom(_) => return Err(RebuildError::CustomAgain(key_of(rules))),
            ProjectionKind::Document(_) | ProjectionKind::Rollup(_) => false,
        };
        let definition = rules.instance(number, count)?;
        let job = Job {
            key: key_of(&definition),
            bulk: BulkStatements::of(&definition),
            definition,
            history,
            target,
            stage: Stage::Folding,
            resumed_at: None,
            is_left_to_projectors,
        };
        create(connection, &job).await?;
        tracing::info!(version = %job.key, %target, "begun");
        Ok(job)
    }

    /// What was to be done before is done.
    pub(super) async fn enter(&self, job: &mut Job, stage: Stage) -> Result<(), RebuildError> {
        sqlx::query!(
            "update rebuild set phase = $3, target_position = $4
             where projection = $1 and version = $2",
            job.key.projection.as_str(),
            job.key.version_column(),
            stage.as_str(),
            job.target.as_i64(),
        )
        .execute(&self.pool)
        .await?;
        job.stage = stage;
        Ok(())
    }

    /// From here on the version is the projectors'.
    pub(super) async fn hand_over(&self, job: &Job) -> Result<(), RebuildError> {
        let mut transaction = self.pool.begin().await?;
        let (projection, version) = (job.key.projection.as_str(), job.key.version_column());
        sqlx::query!(
            "with gone as (delete from rebuild where projection = $1 and version = $2),
                 filled as (delete from rebuild_range where projection = $1 and version = $2)
             update projection_version set state = 'ready', state_since = clock_timestamp()
             where projection = $1 and version = $2",
            projection,
            version,
        )
        .execute(&mut *transaction)
        .await?;
        rows::notify(&mut transaction).await?;
        transaction.commit().await?;
        Ok(())
    }
}

fn rules<'d>(
    domain: &'d Domain,
    request: &Request,
) -> Result<&'d ProjectionDefinition, RebuildError> {
    let of = || domain.stored().filter(|known| known.name().as_str() == request.projection);
    let known = || of().map(ProjectionDefinition::declared_version);
    let wanted = request.definition.or_else(|| known().max());
    let found = of().find(|rules| Some(rules.declared_version()) == wanted);
    found.ok_or_else(|| RebuildError::UnknownDefinition {
        projection: request.projection.clone(),
        definition: wanted.map(|number| number.to_string()).unwrap_or_default(),
        known: known().map(|number| number.to_string()).collect::<Vec<_>>().join(", "),
    })
}

/// Row, tables and checkpoints, all or nothing.
async fn create(connection: &mut PgConnection, job: &Job) -> Result<(), RebuildError> {
    let Job { key, definition, .. } = job;
    let mut transaction = sqlx::Connection::begin(connection).await?;
    let there = tables::all(&mut transaction).await?;
    let own = |name: &str| definition.statements().tables().any(|table| table == name);
    if let Some(table) = there.into_iter().find(|table| own(&table.name)) {
        return Err(RebuildError::TableInTheWay(table.name));
    }
    let state = if job.is_left_to_projectors { "ready" } else { "building" };
    let count = definition.partition_count().get();
    sqlx::query!(
        "insert into projection_version
             (projection, version, partition_count, active, definition, state)
         values ($1, $2, $3, false, $4, $5)",
        key.projection.as_str(),
        key.version_column(),
        i32::from(count),
        i32::try_from(definition.declared_version()).unwrap_or(i32::MAX),
        state,
    )
    .execute(&mut *transaction)
    .await?;
    let statements =
        if job.is_left_to_projectors { &definition.statements().create } else { &job.bulk.create };
    for statement in statements {
        sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut *transaction).await?;
    }
    let epoch = job.history.current();
    checkpoint::create(&mut transaction, key, count, epoch).await?;
    if !job.is_left_to_projectors {
        sqlx::query!(
            "insert into rebuild (projection, version, target_epoch, target_position, phase)
             values ($1, $2, $3, $4, 'folding')",
            key.projection.as_str(),
            key.version_column(),
            epoch.as_i32(),
            job.target.as_i64(),
        )
        .execute(&mut *transaction)
        .await?;
    }
    rows::notify(&mut transaction).await?;
    transaction.commit().await?;
    Ok(())
}
