//! The region's read models: rows, and in the same snapshot what says how current they are.

use std::{collections::HashMap, sync::Arc};

use consistency::{AggregateId, Epoch, EpochHistory, LogPosition, Name, Position};
use projection::{
    ColumnError, Domain, ProjectionDefinition,
    sql::{
        ListAnswer, ListColumns, RollupAnswer, RollupColumns, RowAnswer, RowColumns, ViewStatements,
    },
};
use sqlx::{AssertSqlSafe, PgPool};
use tokio::sync::Semaphore;

use crate::gather::{Asker, GatherBounds, Line};

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
    /// The version that is active is not in this binary.
    #[error("version {version} of projection {projection} is not in this binary")]
    UnknownVersion {
        /// The projection.
        projection: Name,
        /// The active version.
        version: u32,
    },
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
            | Self::Statements
            | Self::TimedOut
            | Self::Gathered(_) => false,
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
    /// Every version of every projection, as the domain has them.
    definitions: Vec<Arc<ProjectionDefinition>>,
    // Readers that one commit releases stand in line here instead of at the pool, whose waits end in
    // errors.
    asker: Asker,
    /// By the place of the projection in the domain, and of the view in the projection. Empty when
    /// every read asks for itself.
    lines: HashMap<(usize, usize), Arc<Line>>,
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
    pub version: u32,
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
        let asker = Asker { pool, queries: Arc::new(Semaphore::new(queries_max)) };
        let lines = gather.map(|bounds| lines(domain, bounds)).unwrap_or_default();
        let definitions = domain.projections().iter().cloned().map(Arc::new).collect();
        Self { definitions, asker, lines }
    }

    /// Asks. `moment` is called before the snapshot is taken.
    pub async fn ask(
        &self,
        ask: Ask<'_>,
        moment: impl Fn() -> u64,
    ) -> Result<Snapshot, QueryError> {
        let mut version = ask.version;
        // An active version can change between two looks, but not twice in a row and again.
        for _ in 0..3 {
            let (place, definition) = self.definition(ask.projection, version)?;
            let views = definition.views();
            let view = views.iter().position(|known| known.name() == ask.view);
            let view = view.ok_or(QueryError::Statements)?;
            let (moment, is_late, found) = match (ask.question, self.lines.get(&(place, view))) {
                (Question::Row(aggregate), Some(line)) => {
                    let partition = definition.partition_for(aggregate);
                    let (asker, partition) = (&self.asker, i32::from(partition));
                    let gathered =
                        line.read(asker, partition, aggregate.id(), moment(), ask.join).await?;
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
                    (moment, false, self.look_alone(definition, view, ask.question).await?)
                }
            };
            match found.active_version() {
                Some(active) if active != version => version = active,
                Some(_) | None => {
                    let definition = Arc::clone(definition);
                    return Ok(Snapshot { definition, moment, is_late, found });
                }
            }
        }
        Err(QueryError::UnknownVersion { projection: ask.projection.clone(), version })
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
            Err(error) if error.is_lost_connection() => self.look(definition, view, question).await,
            found => found,
        }
    }

    fn definition(
        &self,
        name: &Name,
        version: u32,
    ) -> Result<(usize, &Arc<ProjectionDefinition>), QueryError> {
        let mut known = self.definitions.iter().enumerate();
        let is_it = |(_, known): &(usize, &Arc<ProjectionDefinition>)| {
            known.version() == version && known.name() == name
        };
        let unknown = || QueryError::UnknownVersion { projection: name.clone(), version };
        known.find(is_it).ok_or_else(unknown)
    }

    async fn look(
        &self,
        definition: &ProjectionDefinition,
        view: usize,
        question: &Question,
    ) -> Result<Found, QueryError> {
        let statements = definition.statements().views.get(view);
        let partition_count = definition.partition_count();
        match (question, statements) {
            (Question::Row(aggregate), Some(ViewStatements::Row(statements))) => {
                let partition = definition.partition_for(aggregate);
                let row: RowColumns = sqlx::query_as(AssertSqlSafe(Arc::clone(&statements.read)))
                    .bind(i32::from(partition))
                    .bind(aggregate.id())
                    .fetch_one(&self.asker.pool)
                    .await?;
                Ok(Found::Row(Arc::new(RowAnswer::from_columns(row)?)))
            }
            (Question::List { key, after, limit }, Some(ViewStatements::List(statements))) => {
                let row: ListColumns = sqlx::query_as(AssertSqlSafe(Arc::clone(&statements.read)))
                    .bind(key)
                    .bind(after.created.as_i64())
                    .bind(&after.aggregate_id)
                    .bind(i64::from(*limit) + 1)
                    .bind(PARKED_COUNT_MAX)
                    .fetch_one(&self.asker.pool)
                    .await?;
                Ok(Found::List(ListAnswer::from_columns(row, partition_count)?))
            }
            (Question::Rollup(key), Some(ViewStatements::Rollup(statements))) => {
                let row: RollupColumns =
                    sqlx::query_as(AssertSqlSafe(Arc::clone(&statements.read)))
                        .bind(key)
                        .bind(PARKED_COUNT_MAX)
                        .fetch_one(&self.asker.pool)
                        .await?;
                Ok(Found::Rollup(RollupAnswer::from_columns(row, partition_count)?))
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
                    .fetch_one(&self.asker.pool)
                    .await?;
                Ok(Found::List(ListAnswer::from_columns(row, partition_count)?))
            }
            (
                Question::Row(_)
                | Question::List { .. }
                | Question::Rollup(_)
                | Question::Search { .. },
                _,
            ) => Err(QueryError::Statements),
        }
    }

    /// Every checkpoint of every active version.
    pub async fn checkpoints(&self) -> Result<Vec<StoredCheckpoint>, QueryError> {
        let rows = sqlx::query!(
            r#"select active.projection, active.version, active.partition_count,
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
        .fetch_all(&self.asker.pool)
        .await?;
        let wrong = |column, value: i64| ColumnError { column, value: value.to_string() };
        let checkpoints = rows.into_iter().map(|row| {
            let version = u32::try_from(row.version);
            let count = u16::try_from(row.partition_count);
            let partition = u16::try_from(row.partition);
            Ok(StoredCheckpoint {
                version: version.map_err(|_| wrong("version", row.version.into()))?,
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
        let rows = sqlx::query!(
            "select epoch, starts_after from adopted_epoch where epoch > 1 order by epoch"
        )
        .fetch_all(&self.asker.pool)
        .await?;
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
}

fn lines(domain: &Domain, bounds: GatherBounds) -> HashMap<(usize, usize), Arc<Line>> {
    let projections = domain.projections().iter().enumerate();
    let views = projections.flat_map(|(place, definition)| {
        let views = definition.statements().views.iter().enumerate();
        views.filter_map(move |(view, statements)| match statements {
            ViewStatements::Row(rows) => Some(((place, view), Arc::clone(&rows.read_many))),
            ViewStatements::List(_) | ViewStatements::Rollup(_) | ViewStatements::Search(_) => None,
        })
    });
    views.map(|(key, statement)| (key, Arc::new(Line::new(statement, bounds)))).collect()
}

fn log_position(epoch: i32, position: i64) -> Result<LogPosition, ColumnError> {
    let wrong = |column, value: i64| ColumnError { column, value: value.to_string() };
    let epoch = Epoch::from_i32(epoch).ok_or_else(|| wrong("epoch", epoch.into()))?;
    let at = Position::from_i64(position).ok_or_else(|| wrong("position", position))?;
    Ok(LogPosition::new(epoch, at))
}
