//! States into rows, and tables into tables with indexes.

use std::collections::BTreeSet;

use consistency::AggregateId;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use projection::sql::StateColumns;
use projection::sql::bulk::BulkIndex;
use projection::{DocumentDefinition, ProjectionError, Row, StoredState};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::begin::Job;
use super::copy::CopyRows;
use super::progress::Phase;
use super::{RebuildError, Work};
use crate::partition::failure::{Failure, classify};

/// Blocks of the state table whose rows are made and copied in one transaction. Ranges that are done are
/// remembered by their first block, so it is the same for ever.
const RANGE_BLOCKS: i64 = 1024;
/// Bytes of rows that are copied at once, nearly.
const COPY_BYTES: usize = 4 * 1024 * 1024;

/// The rows of one aggregate.
struct Made {
    id: String,
    state: StoredState,
    rows: Vec<Row>,
}

impl Work {
    /// Makes the rows of every state, and copies them.
    pub(super) async fn fill(&self, job: &Job) -> Result<(), RebuildError> {
        let Some(document) = job.definition.document() else { return Ok(()) };
        let blocks = sqlx::query_scalar(AssertSqlSafe(job.bulk.count_blocks.clone()));
        let blocks: i64 = blocks.fetch_one(&self.pool).await?;
        let done = sqlx::query_scalar!(
            "select first_block from rebuild_range where projection = $1 and version = $2",
            job.key.projection.as_str(),
            job.key.version_column(),
        );
        let done: BTreeSet<i64> = done.fetch_all(&self.pool).await?.into_iter().collect();
        let all = (0..blocks).step_by(RANGE_BLOCKS as usize);
        let total = u64::try_from(all.clone().count()).unwrap_or_default();
        self.progress.begin(Phase::Filling, done.len() as u64, total);
        stream::iter(all.filter(|first| !done.contains(first)))
            .map(|first| Box::pin(self.fill_range(job, document, first)))
            .buffer_unordered(self.config.rebuild.workers_max)
            .try_for_each(async |()| Ok(()))
            .await
    }

    async fn fill_range(
        &self,
        job: &Job,
        document: &DocumentDefinition,
        first: i64,
    ) -> Result<(), RebuildError> {
        let mut reading = self.pool.acquire().await?;
        let mut writing = self.pool.begin().await?;
        let (from, to) = (format!("({first},0)"), format!("({},0)", first + RANGE_BLOCKS));
        let scan = sqlx::query_as(AssertSqlSafe(job.bulk.scan_states.clone())).bind(from).bind(to);
        let mut states = scan.fetch(&mut *reading);
        let (mut made, mut bytes, mut refused) = (Vec::new(), 0, Vec::new());
        while let Some(columns) = states.try_next().await? {
            let columns: StateColumns = columns;
            let (id, state) = StoredState::from_columns(columns)?;
            match rows_of(job, document, &id, &state) {
                Ok(rows) => {
                    bytes += rows.iter().map(|row| row.data.len()).sum::<usize>();
                    made.push(Made { id, state, rows });
                }
                // It is found out which event is at fault when it is folded again.
                Err(_) => refused.push(id),
            }
            if COPY_BYTES < bytes {
                copy(&mut writing, job, &made, &mut refused).await?;
                made.clear();
                bytes = 0;
            }
        }
        drop(states);
        copy(&mut writing, job, &made, &mut refused).await?;
        sqlx::query!(
            "insert into rebuild_range (projection, version, first_block, refused)
             values ($1, $2, $3, $4)",
            job.key.projection.as_str(),
            job.key.version_column(),
            first,
            &refused,
        )
        .execute(&mut *writing)
        .await?;
        writing.commit().await?;
        self.progress.add(1);
        Ok(())
    }

    /// Gives the tables their keys and indexes, as many at a time as there are workers.
    pub(super) async fn index(&self, job: &Job) -> Result<(), RebuildError> {
        let indexes: Vec<&BulkIndex> =
            job.bulk.views.iter().flat_map(|view| &view.indexes).collect();
        self.progress.begin(Phase::Indexing, 0, indexes.len() as u64);
        stream::iter(indexes)
            .map(|index| Box::pin(self.make(index)))
            .buffer_unordered(self.config.rebuild.workers_max)
            .try_for_each(async |()| Ok::<_, RebuildError>(()))
            .await?;
        // Or the first readers would be answered by guesses.
        for table in job.definition.statements().tables() {
            let analyze = format!("analyze \"{table}\"");
            sqlx::query(AssertSqlSafe(analyze)).execute(&self.pool).await?;
        }
        Ok(())
    }

    async fn make(&self, index: &BulkIndex) -> Result<(), RebuildError> {
        let is_there = sqlx::query_scalar(AssertSqlSafe(index.is_there.clone()));
        let is_there: bool = is_there.fetch_one(&self.pool).await?;
        if !is_there {
            sqlx::query(AssertSqlSafe(index.create.clone())).execute(&self.pool).await?;
        }
        self.progress.add(1);
        Ok(())
    }
}

fn rows_of(
    job: &Job,
    document: &DocumentDefinition,
    id: &str,
    state: &StoredState,
) -> Result<Vec<Row>, ProjectionError> {
    let aggregate = AggregateId::new(job.definition.aggregate_type().clone(), id)
        .map_err(|error| ProjectionError::State(error.to_string()))?;
    document.rows(&aggregate, &document.restore(state)?)
}

/// Copies the rows of these aggregates. Those of one that the database refuses are left out.
async fn copy(
    connection: &mut PgConnection,
    job: &Job,
    made: &[Made],
    refused: &mut Vec<String>,
) -> Result<(), RebuildError> {
    let mut parts = vec![made];
    while let Some(part) = parts.pop() {
        let mut savepoint = connection.begin().await?;
        let error = match copy_all(&mut savepoint, job, part).await {
            Ok(()) => {
                savepoint.commit().await?;
                continue;
            }
            Err(error) => error,
        };
        match classify(&error) {
            Failure::Transient(_) => return Err(error.into()),
            Failure::Permanent(_) => savepoint.rollback().await?,
        }
        match part {
            [alone] => refused.push(alone.id.clone()),
            several => {
                let (left, right) = several.split_at(several.len() / 2);
                parts.extend([right, left]);
            }
        }
    }
    Ok(())
}

async fn copy_all(
    connection: &mut PgConnection,
    job: &Job,
    made: &[Made],
) -> Result<(), sqlx::Error> {
    let mut views: Vec<CopyRows> = job.bulk.views.iter().map(|_| CopyRows::default()).collect();
    for Made { id, state, rows } in made {
        for row in rows {
            let view = &mut views[row.key.view_index()];
            match row.key.list_key() {
                None => {
                    view.row(5)
                        .text(id)
                        .bigint(state.version().as_i64())
                        .integer(state.at().epoch.as_i32())
                        .bigint(state.at().position.as_i64())
                        .text(&row.data);
                }
                Some(key) => {
                    view.row(4).text(key).bigint(state.created().as_i64()).text(id).text(&row.data);
                }
            }
        }
    }
    for (rows, view) in views.into_iter().zip(&job.bulk.views) {
        if let Some(statement) = &view.copy {
            super::copy_in(connection, statement, rows).await?;
        }
    }
    Ok(())
}
