//! The region's read models: rows, and in the same snapshot what says how current they are.

use std::sync::Arc;

use consistency::{AggregateId, Epoch, EpochHistory, LogPosition, Name, Position};
use process::postgres::AtHand;
use projection::{
    ColumnError, Domain, ProjectionDefinition, ViewDefinition,
    sql::{
        ListAnswer, ListColumns, RollupAnswer, RollupColumns, RowAnswer, RowColumns, ViewStatements,
    },
};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::sync::Semaphore;
use tokio_util::task::TaskTracker;

use crate::{
    gather::{Asker, GatherBounds},
    versions::{KnownVersion, Versions},
};

/// Parked aggregates that one answer looks at; beyond, any aggregate may be parked.
const PARKED_COUNT_MAX: i64 = 1000;

/// Why the read models could not be read.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The database cannot be reached, or could not answer.
    #[error("the region's database is unavailable")]
    Unavailable(#[from] sqlx::Error),
    /// A column holds what it never may.
    #[error("the region's database holds what it never may")]
    Column(#[from] ColumnError),
    /// The rules of the version that is active are not in this binary.
    #[error("the rules of version {version} of projection {projection} are not in this binary")]
    UnknownVersion {
        /// The projection.
        projection: Name,
        /// The active version.
        version: u32,
    },
    /// No version of the projection is active yet.
    #[error("no version of projection {0} is active")]
    NoActiveVersion(Name),
    /// The definition and its statements do not belong together.
    #[error("the view has no statements of its kind")]
    Statements,
    /// The database did not answer in time.
    #[error("the region's database does not answer")]
    TimedOut,
    /// A question that was asked for several reads at once failed.
    #[error("a question asked for several reads failed")]
    Gathered(#[source] Arc<QueryError>),
}

impl QueryError {
    /// Whether the same question on another connection may well be answered.
    pub fn is_lost_connection(&self) -> bool {
        const ADMIN_SHUTDOWN: &str = "57P01";
        match self {
            Self::Unavailable(sqlx::Error::Io(_)) => true,
            Self::Unavailable(error) => error
                .as_database_error()
                .is_some_and(|error| error.code().as_deref() == Some(ADMIN_SHUTDOWN)),
            Self::Column(_)
            | Self::UnknownVersion { .. }
            | Self::NoActiveVersion(_)
            | Self::Statements
            | Self::TimedOut
            | Self::Gathered(_) => false,
        }
    }

    /// Whether there was no answer in time: another question may well be answered.
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::TimedOut | Self::Unavailable(sqlx::Error::PoolTimedOut) => true,
            Self::Gathered(error) => error.is_timeout(),
            Self::Unavailable(_)
            | Self::Column(_)
            | Self::UnknownVersion { .. }
            | Self::NoActiveVersion(_)
            | Self::Statements => false,
        }
    }

    /// Whether the database was there and refused, as it does when a table is gone.
    fn is_refusal(&self) -> bool {
        match self {
            Self::Unavailable(error) => error.as_database_error().is_some(),
            Self::Gathered(error) => error.is_refusal(),
            Self::Column(_)
            | Self::UnknownVersion { .. }
            | Self::NoActiveVersion(_)
            | Self::Statements
            | Self::TimedOut => false,
        }
    }
}

/// Where an item stands in its list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The aggregate's first event.
    pub created: Position,
    /// The aggregate's id.
    pub aggregate_id: String,
}

/// What a read asks of a view.
#[derive(Debug, Clone)]
pub enum Question {
    /// The row of an aggregate.
    Row(AggregateId),
    /// A page of a list.
    List {
        /// Which list.
        key: String,
        /// The item before the page.
        after: Place,
        /// Most items; one more is read, to know whether there are more.
        limit: u32,
    },
    /// A row of a rollup.
    Rollup(String),
    /// A page of what is found in a search view.
    Search {
        /// What it is found by.
        filter: Filter,
        /// The item before the page.
        after: Place,
        /// As in [`Question::List`].
        limit: u32,
    },
}

/// What the rows of a search are found by; `None` is any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// Words, as one types them into a search box; empty is any.
    pub words: String,
    /// The least number.
    pub number_min: Option<i64>,
    /// The most.
    pub number_max: Option<i64>,
    /// The label.
    pub label: Option<String>,
}

/// One snapshot, and the version of the projection that it is of.
#[derive(Debug)]
pub struct Snapshot {
    /// Whose tables were read.
    pub definition: Arc<ProjectionDefinition>,
    /// [`crate::currency::Currency::moment`] before.
    pub moment: u64,
    /// It was being taken already when it was asked for, and may be older than who asked.
    pub is_late: bool,
    /// What was there.
    pub found: Found,
}

/// What a snapshot holds.
#[derive(Debug)]
pub enum Found {
    /// A row, or that there is none. Shared by all who asked for it at once.
    Row(Arc<RowAnswer>),
    /// A page.
    List(ListAnswer),
    /// A row of a rollup, or that there is none.
    Rollup(RollupAnswer),
}

/// A stored checkpoint of an active version.
#[derive(Debug, Clone)]
pub struct StoredCheckpoint {
    /// The projection.
    pub projection: String,
    /// Its active version.
    pub version: u32,
    /// The number of that version's rules.
    pub definition: u32,
    /// How many partitions it has.
    pub partition_count: u16,
    /// The partition.
    pub partition: u16,
    /// How far it has come.
    pub at: LogPosition,
    /// Age of the newest event in it, by the clocks of two databases: for display.
    pub age_ms: Option<i64>,
    /// Parked aggregates of the whole projection.
    pub parked_count: i64,
}

/// Reads them, so many at a time.
#[derive(Debug)]
pub struct ReadModels {
    versions: Versions,
    // Readers that one commit releases stand in line here instead of at the pool, whose waits end in
    // errors.
    asker: Asker,
}

/// What is asked, of which version, and how new the answer must be.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// The projection.
    pub projection: &'a Name,
    /// The view that it feeds.
    pub view: &'a Name,
    /// What of the view.
    pub question: &'a Question,
    /// The version that is believed to be active; the snapshot is of the one that is.
    pub version: Option<u32>,
    /// A snapshot that is being taken already will do.
    pub join: bool,
}

impl ReadModels {
    /// Over a pool, at most so many queries at once. Reads of rows are gathered when there are bounds
    /// for it.
    pub fn new(
        pool: PgPool,
        domain: &Domain,
        queries_max: usize,
        gather: Option<GatherBounds>,
    ) -> Self {
        let queries = Arc::new(Semaphore::new(queries_max));
        let connections_max = pool.options().get_max_connections();
        let connections = AtHand::new(pool, connections_max);
        let asker = Asker { connections, queries, flights: TaskTracker::new() };
        Self { versions: Versions::new(domain, gather), asker }
    }

    /// Waits for the gathered questions that are under way. To be called when nobody asks any more.
    pub async fn ended(&self) {
        self.asker.flights.close();
        self.asker.flights.wait().await;
    }

    /// The rules of a version over its own tables, when they are known.
    pub fn definition(&self, projection: &Name, version: u32) -> Option<Arc<ProjectionDefinition>> {
        let known = self.versions.get(projection, version)?;
        Some(Arc::clone(&known.definition))
    }

    /// Asks. `moment` is called before the snapshot is taken.
    pub async fn ask(
        &self,
        ask: Ask<'_>,
        moment: impl Fn() -> u64,
    ) -> Result<Snapshot, QueryError> {
        let mut believed = ask.version;
        let mut refused = None;
        // An active version can change between two looks, but not twice in a row and again.
        for _ in 0..3 {
            let known = believed.and_then(|version| self.versions.get(ask.projection, version));
            let known = match known {
                Some(known) => known,
                None => Box::pin(self.active(ask.projection)).await?,
            };
            let version = known.definition.version();
            // The tables of the last one are not there, and it is still the one to be read.
            if let Some(error) = refused.take_if(|(of, _)| *of == version) {
                return Err(error.1);
            }
            let asked = self.ask_version(&known, &ask, &moment).await;
            match asked {
                // Dropped after another one took its place.
                Err(error) if error.is_refusal() => {
                    (believed, refused) = (None, Some((version, error)))
                }
                Err(error) => return Err(error),
                Ok(snapshot) => match snapshot.found.active_version() {
                    Some(active) if active != version => believed = Some(active),
                    Some(_) | None => return Ok(snapshot),
                },
            }
        }
        let version = believed.unwrap_or_default();
        Err(QueryError::UnknownVersion { projection: ask.projection.clone(), version })
    }

    async fn ask_version(
        &self,
        known: &KnownVersion,
        ask: &Ask<'_>,
        moment: &impl Fn() -> u64,
    ) -> Result<Snapshot, QueryError> {
        let definition = &known.definition;
        let mut views = definition.views().iter();
        let view = views.position(|known| known.name() == ask.view);
        let view = view.ok_or(QueryError::Statements)?;
        let (moment, is_late, found) = match (ask.question, known.lines.get(&view)) {
            (Question::Row(aggregate), Some(line)) => {
                let partition = i32::from(definition.partition_for(aggregate));
                let gathered =
                    line.read(&self.asker, partition, aggregate.id(), moment(), ask.join).await?;
                (gathered.moment, gathered.is_late, Found::Row(gathered.answer))
            }
            (
                Question::Row(_)
                | Question::List { .. }
                | Question::Rollup(_)
                | Question::Search { .. },
                _,
            ) => {
                let moment = moment();
                // Boxed, as above: thousands may wait for rows that are gathered, and need no room for it.
                let looking = Box::pin(self.look_alone(definition, view, ask.question));
                (moment, false, looking.await?)
            }
        };
        let found = found.complete(&definition.views()[view]);
        Ok(Snapshot { definition: Arc::clone(definition), moment, is_late, found })
    }

    /// The version that is active now, whatever was known.
    async fn active(&self, projection: &Name) -> Result<Arc<KnownVersion>, QueryError> {
        let row = sqlx::query!(
            r#"select version, coalesce(definition, version) as "definition!", partition_count
               from projection_version where projection = $1 and active"#,
            projection.as_str(),
        );
        // In line with the reads: all who met a table that is gone come here at once.
        let permit = self.asker.queries.acquire().await.expect("the semaphore is never closed");
        let mut connection = self.asker.connections.take().await?;
        let row = row.fetch_optional(&mut *connection).await?;
        connection.keep();
        drop(permit);
        let row = row.ok_or_else(|| QueryError::NoActiveVersion(projection.clone()))?;
        let wrong = |column, value: i32| ColumnError { column, value: value.to_string() };
        let version = u32::try_from(row.version).map_err(|_| wrong("version", row.version))?;
        let wrong_rules = |_| wrong("definition", row.definition);
        let definition = u32::try_from(row.definition).map_err(wrong_rules)?;
        let count = row.partition_count;
        let count = u16::try_from(count).map_err(|_| wrong("partition_count", count))?;
        let known = self.versions.learn(projection, version, definition, count);
        known.ok_or_else(|| QueryError::UnknownVersion { projection: projection.clone(), version })
    }

    /// Whether the rules of the version that a checkpoint is of are in this binary. They are known from
    /// then on.
    pub fn learn(&self, stored: &StoredCheckpoint) -> bool {
        let Ok(projection) = Name::new(stored.projection.as_str()) else { return false };
        let StoredCheckpoint { version, definition, partition_count, .. } = *stored;
        self.versions.learn(&projection, version, definition, partition_count).is_some()
    }

    async fn look_alone(
        &self,
        definition: &ProjectionDefinition,
        view: usize,
        question: &Question,
    ) -> Result<Found, QueryError> {
        let _permit = self.asker.queries.acquire().await.expect("the semaphore is never closed");
        match self.look(definition, view, question).await {
            // The server was restarted under a pooled connection: another one may well do.
            Err(error) if error.is_lost_connection() => {
                self.asker.connections.forget();
                self.look(definition, view, question).await
            }
            found => found,
        }
    }

    async fn look(
        &self,
        definition: &ProjectionDefinition,
        view: usize,
        question: &Question,
    ) -> Result<Found, QueryError> {
        let statements = definition.statements().views.get(view);
        let partition_count = definition.partition_count();
        let mut connection = self.asker.connections.take().await?;
        let found = match (question, statements) {
            (Question::Row(aggregate), Some(ViewStatements::Row(statements))) => {
                let partition = definition.partition_for(aggregate);
                let row: RowColumns = sqlx::query_as(AssertSqlSafe(Arc::clone(&statements.read)))
                    .bind(i32::from(partition))
                    .bind(aggregate.id())
                    .fetch_one(&mut *connection)
                    .await?;
                Found::Row(Arc::new(RowAnswer::from_columns(row)?))
            }
            (Question::List { key, after, limit }, Some(ViewStatements::List(statements))) => {
                let row: ListColumns = sqlx::query_as(AssertSqlSafe(Arc::clone(&statements.read)))
                    .bind(key)
                    .bind(after.created.as_i64())
                    .bind(&after.aggregate_id)
                    .bind(i64::from(*limit) + 1)
                    .bind(PARKED_COUNT_MAX)
                    .fetch_one(&mut *connection)
                    .await?;
                Found::List(ListAnswer::from_columns(row, partition_count)?)
            }
            (Question::Rollup(key), Some(ViewStatements::Rollup(statements))) => {
                let row: RollupColumns =
                    sqlx::query_as(AssertSqlSafe(Arc::clone(&statements.read)))
                        .bind(key)
                        .bind(PARKED_COUNT_MAX)
                        .fetch_one(&mut *connection)
                        .await?;
                Found::Rollup(RollupAnswer::from_columns(row, partition_count)?)
            }
            (
                Question::Search { filter, after, limit },
                Some(ViewStatements::Search(statements)),
            ) => {
                let row: ListColumns = sqlx::query_as(AssertSqlSafe(Arc::clone(&statements.read)))
                    .bind(&filter.words)
                    .bind(filter.number_min)
                    .bind(filter.number_max)
                    .bind(&filter.label)
                    .bind(after.created.as_i64())
                    .bind(&after.aggregate_id)
                    .bind(i64::from(*limit) + 1)
                    .bind(PARKED_COUNT_MAX)
                    .fetch_one(&mut *connection)
                    .await?;
                Found::List(ListAnswer::from_columns(row, partition_count)?)
            }
            (
                Question::Row(_)
                | Question::List { .. }
                | Question::Rollup(_)
                | Question::Search { .. },
                _,
            ) => return Err(QueryError::Statements),
        };
        connection.keep();
        Ok(found)
    }

    /// Every checkpoint of every active version.
    pub async fn checkpoints(&self) -> Result<Vec<StoredCheckpoint>, QueryError> {
        let mut connection = self.asker.connections.take().await?;
        let rows = sqlx::query!(
            r#"select active.projection, active.version, active.partition_count,
                    coalesce(active.definition, active.version) as "definition!",
                    checkpoint.partition, checkpoint.epoch, checkpoint.position,
                    (extract(epoch from clock_timestamp() - checkpoint.committed_at) * 1000)::bigint
                        as age_ms,
                    (select count(*) from parked
                        where parked.projection = active.projection
                            and parked.version = active.version) as "parked_count!"
                from projection_version as active
                join checkpoint on checkpoint.projection = active.projection
                    and checkpoint.version = active.version
                where active.active
                order by active.projection, checkpoint.partition"#
        )
        .fetch_all(&mut *connection)
        .await?;
        connection.keep();
        let wrong = |column, value: i64| ColumnError { column, value: value.to_string() };
        let checkpoints = rows.into_iter().map(|row| {
            let version = u32::try_from(row.version);
            let count = u16::try_from(row.partition_count);
            let partition = u16::try_from(row.partition);
            Ok(StoredCheckpoint {
                version: version.map_err(|_| wrong("version", row.version.into()))?,
                definition: u32::try_from(row.definition)
                    .map_err(|_| wrong("definition", row.definition.into()))?,
                partition_count: count
                    .map_err(|_| wrong("partition_count", row.partition_count.into()))?,
                partition: partition.map_err(|_| wrong("partition", row.partition.into()))?,
                at: log_position(row.epoch, row.position)?,
                projection: row.projection,
                age_ms: row.age_ms,
                parked_count: row.parked_count,
            })
        });
        Ok(checkpoints.collect::<Result<_, ColumnError>>()?)
    }

    /// The epochs that the region has adopted. `None` when they do not rise one by one.
    pub async fn epochs(&self) -> Result<Option<EpochHistory>, QueryError> {
        let mut connection = self.asker.connections.take().await?;
        let rows = sqlx::query!(
            "select epoch, starts_after from adopted_epoch where epoch > 1 order by epoch"
        )
        .fetch_all(&mut *connection)
        .await?;
        connection.keep();
        let starts = rows.into_iter().map(|row| {
            log_position(row.epoch, row.starts_after).map(|start| (start.epoch, start.position))
        });
        Ok(EpochHistory::new(starts.collect::<Result<_, _>>()?))
    }
}

impl Found {
    fn active_version(&self) -> Option<u32> {
        match self {
            Self::Row(row) => row.active_version,
            Self::List(list) => list.snapshot.active_version,
            Self::Rollup(rollup) => rollup.snapshot.active_version,
        }
    }

    /// With the fields that the view has got since some of the rows were written.
    fn complete(self, view: &ViewDefinition) -> Self {
        if view.later_fields().is_empty() {
            return self;
        }
        match self {
            Self::Row(shared) => {
                let mut answer = RowAnswer::clone(&shared);
                if let Some(row) = &mut answer.row {
                    row.data = view.complete(std::mem::take(&mut row.data));
                }
                Self::Row(Arc::new(answer))
            }
            Self::List(mut list) => {
                for item in &mut list.items {
                    item.data = view.complete(std::mem::take(&mut item.data));
                }
                Self::List(list)
            }
            Self::Rollup(rollup) => Self::Rollup(rollup),
        }
    }
}

fn log_position(epoch: i32, position: i64) -> Result<LogPosition, ColumnError> {
    let wrong = |column, value: i64| ColumnError { column, value: value.to_string() };
    let epoch = Epoch::from_i32(epoch).ok_or_else(|| wrong("epoch", epoch.into()))?;
    let at = Position::from_i64(position).ok_or_else(|| wrong("position", position))?;
    Ok(LogPosition::new(epoch, at))
}
