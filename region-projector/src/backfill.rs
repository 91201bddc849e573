//! Fills in what older rows lack of a view that has got a field.
//!
//! Readers are told the field already, made of what the row says. Filling makes the rows anew of their
//! states, a few at a time and no faster than it is told, each batch in a transaction that holds the
//! checkpoints of its partitions: no projector writes those rows meanwhile. The answer of a row is the same
//! before and after, and where it would not be, nothing is written and somebody is told. There is no
//! cursor to be lost: a row that has the field needs nothing.

use std::collections::{BTreeSet, HashMap};
use std::num::NonZeroU32;
use std::time::Duration;

use consistency::{AggregateId, NameError};
use projection::sql::{BackfillStatements, LackingColumns};
use projection::{DocumentDefinition, ProjectionDefinition, ProjectionError};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use tokio::time::{Instant, sleep_until};

use crate::attempt::bounded;
use crate::config::ApplyConfig;
use crate::partition::write;
use crate::start::key_of;

/// Rows of one transaction at most.
const BATCH_ROWS_MAX: u32 = 500;
/// Batches a second, so that a slow rate is even.
const BATCHES_PER_SECOND: u32 = 5;
/// How often it is told how far it has come.
const TOLD_INTERVAL: Duration = Duration::from_secs(10);

/// Why rows are as they were. Those of earlier batches are filled.
#[derive(Debug, thiserror::Error)]
pub enum BackfillError {
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// Rules or a state.
    #[error("the rows of aggregate {aggregate} cannot be made")]
    Rows {
        /// Which.
        aggregate: String,
        /// Why.
        source: ProjectionError,
    },
    /// A stored id.
    #[error("a stored id breaks its bounds")]
    Name(#[from] NameError),
    /// Readers would get another answer from then on.
    #[error(
        "the row of {aggregate} in {view} would change from {read} to {made}: what readers are told is not \
         what the rules make, or the row is damaged (see verify)"
    )]
    Differs {
        /// Whose.
        aggregate: String,
        /// Of which view.
        view: String,
        /// What readers get now.
        read: String,
        /// What they would get.
        made: String,
    },
}

/// What was done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filled {
    /// Rows that were filled in.
    pub row_count: u64,
    /// Rows that lacked a field at the beginning.
    pub lacking_count: u64,
}

/// A row as it is known by its table's key.
type Place = LackingColumns;

/// Fills in every view of a version.
pub async fn backfill(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    rows_per_second: NonZeroU32,
    config: &ApplyConfig,
) -> Result<Filled, BackfillError> {
    let Some(document) = definition.document() else { return Ok(Filled::default()) };
    let statements = BackfillStatements::all(definition);
    let mut filled = Filled::default();
    let mut connection = pool.acquire().await?.detach();
    sqlx::query("select set_config('statement_timeout', '0', false)")
        .execute(&mut connection)
        .await?;
    for view in &statements {
        let count = sqlx::query_scalar::<_, i64>(AssertSqlSafe(view.count.clone()));
        let count = count.fetch_one(&mut connection).await?;
        filled.lacking_count += u64::try_from(count).unwrap_or_default();
    }
    let work = Backfill { definition, document };
    let rate = rows_per_second.get();
    let batch_rows = i64::from((rate / BATCHES_PER_SECOND).clamp(1, BATCH_ROWS_MAX));
    let mut pace = Pace { began: Instant::now(), told: Instant::now(), rate };
    for view in &statements {
        let mut after: Place = (String::new(), 0, String::new());
        loop {
            let page: Vec<Place> = sqlx::query_as(AssertSqlSafe(view.page.clone()))
                .bind(&after.0)
                .bind(after.1)
                .bind(&after.2)
                .bind(batch_rows)
                .fetch_all(&mut connection)
                .await?;
            let Some(last) = page.last() else { break };
            after = last.clone();
            let batch = work.fill(&mut connection, view, &page);
            filled.row_count += bounded(config.attempt_timeout, batch).await?;
            pace.keep(&filled).await;
        }
    }
    connection.close().await?;
    Ok(filled)
}

/// Never ahead of its rate.
struct Pace {
    began: Instant,
    told: Instant,
    rate: u32,
}

impl Pace {
    async fn keep(&mut self, filled: &Filled) {
        if TOLD_INTERVAL <= self.told.elapsed() {
            self.told = Instant::now();
            let Filled { row_count, lacking_count } = *filled;
            let left = lacking_count.saturating_sub(row_count);
            let eta_seconds = left / u64::from(self.rate);
            tracing::info!(row_count, lacking_count, eta_seconds, "rows are filled in");
        }
        let due = filled.row_count as f64 / f64::from(self.rate);
        sleep_until(self.began + Duration::from_secs_f64(due)).await;
    }
}

struct Backfill<'a> {
    definition: &'a ProjectionDefinition,
    document: &'a DocumentDefinition,
}

impl Backfill<'_> {
    /// Fills a few rows, and says how many still lacked something.
    async fn fill(
        &self,
        connection: &mut PgConnection,
        view: &BackfillStatements,
        page: &[Place],
    ) -> Result<u64, BackfillError> {
        let ids: BTreeSet<&str> = page.iter().map(|(_, _, id)| id.as_str()).collect();
        let aggregates = ids
            .into_iter()
            .map(|id| AggregateId::new(self.definition.aggregate_type().clone(), id.to_owned()));
        let aggregates = aggregates.collect::<Result<Vec<_>, _>>()?;
        let mut transaction = connection.begin().await?;
        self.hold(&mut transaction, &aggregates).await?;
        let lacking = lacking(&mut transaction, view, page).await?;
        let made = self.make(&mut transaction, view, &aggregates).await?;
        let definition = &self.definition.views()[view.view_index];
        let mut columns = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (list_key, created, id, data) in lacking {
            let read = definition.complete(data);
            let made = made.get(&(list_key.clone(), id.clone()));
            if made != Some(&read) {
                let view = definition.name().to_string();
                let made = made.cloned().unwrap_or_else(|| "nothing".to_owned());
                return Err(BackfillError::Differs { aggregate: id, view, read, made });
            }
            columns.0.push(list_key);
            columns.1.push(created);
            columns.2.push(id);
            columns.3.push(read);
        }
        let fill = sqlx::query(AssertSqlSafe(view.fill.clone()))
            .bind(&columns.0)
            .bind(&columns.1)
            .bind(&columns.2)
            .bind(&columns.3)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        Ok(fill.rows_affected())
    }

    /// Keeps whoever applies events to these aggregates waiting until the transaction ends.
    async fn hold(
        &self,
        connection: &mut PgConnection,
        aggregates: &[AggregateId],
    ) -> Result<(), sqlx::Error> {
        let partitions = aggregates.iter().map(|one| self.definition.partition_for(one));
        let partitions: BTreeSet<i32> = partitions.map(i32::from).collect();
        let partitions: Vec<i32> = partitions.into_iter().collect();
        let key = key_of(self.definition);
        sqlx::query!(
            "select partition from checkpoint
             where projection = $1 and version = $2 and partition = any($3)
             order by partition for update",
            key.projection.as_str(),
            key.version_column(),
            &partitions,
        )
        .fetch_all(connection)
        .await?;
        Ok(())
    }

    /// The rows of the view as the rules make them of the states, by list key and aggregate.
    async fn make(
        &self,
        connection: &mut PgConnection,
        view: &BackfillStatements,
        aggregates: &[AggregateId],
    ) -> Result<HashMap<(String, String), String>, BackfillError> {
        let ids = aggregates.iter().map(|one| one.id().to_owned()).collect();
        let states = write::load_states(connection, self.definition, ids).await?;
        let mut made = HashMap::new();
        for aggregate in aggregates {
            let Some(state) = states.get(aggregate.id()) else { continue };
            let id = aggregate.id().to_owned();
            let rows = self.document.restore(state);
            let rows = rows.and_then(|folded| self.document.rows(aggregate, &folded));
            let rows =
                rows.map_err(|source| BackfillError::Rows { aggregate: id.clone(), source })?;
            for row in rows.into_iter().filter(|row| row.key.view_index() == view.view_index) {
                let list_key = row.key.list_key().unwrap_or_default().to_owned();
                made.insert((list_key, id.clone()), row.data);
            }
        }
        Ok(made)
    }
}

async fn lacking(
    connection: &mut PgConnection,
    view: &BackfillStatements,
    page: &[Place],
) -> Result<Vec<(String, i64, String, String)>, sqlx::Error> {
    let list_keys: Vec<&str> = page.iter().map(|(list_key, _, _)| list_key.as_str()).collect();
    let created: Vec<i64> = page.iter().map(|(_, created, _)| *created).collect();
    let ids: Vec<&str> = page.iter().map(|(_, _, id)| id.as_str()).collect();
    sqlx::query_as(AssertSqlSafe(view.lacking.clone()))
        .bind(list_keys)
        .bind(created)
        .bind(ids)
        .fetch_all(connection)
        .await
}
