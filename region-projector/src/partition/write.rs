//! Reads what a batch needs, and writes what it changes: one statement each way, since in a small batch it
//! is the round trips that take the time.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use consistency::{CommittedAt, Event};
use projection::sql::{NOT_AS_READ, OpenedColumns, RollupStatements, RowStatements, StateColumns};
use projection::{
    Changes, CustomError, CustomEvent, ProjectionDefinition, ProjectionKind, RollupChanges,
    RowChanges, StateWrites, StoredState, ViewChanges,
};
use sqlx::postgres::PgArguments;
use sqlx::query::QueryScalar;
use sqlx::{Arguments as _, AssertSqlSafe, PgConnection, Postgres};

use super::parking;
use super::plan::{Known, Plan, Writes};
use crate::chain::Mark;
use crate::checkpoint::{Held, VersionKey};

/// What the database knows about the aggregates of these events.
pub async fn load<'a>(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    events: impl IntoIterator<Item = &'a Event>,
) -> Result<Known, sqlx::Error> {
    load_of(connection, definition, &ids(events)).await
}

/// The same of the aggregates with these ids.
pub(super) async fn load_of<T: AsRef<str> + Sync>(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    ids: &[T],
) -> Result<Known, sqlx::Error> {
    let statement = AssertSqlSafe(definition.statements().look.clone());
    let ids: Vec<&str> = ids.iter().map(AsRef::as_ref).collect();
    let rows = sqlx::query_as(statement).bind(ids).fetch_all(connection).await?;
    Ok(known(rows)?.unwrap_or_default())
}

/// The ids of the events' aggregates, each once.
pub fn ids<'a>(events: impl IntoIterator<Item = &'a Event>) -> Vec<&'a str> {
    let ids: BTreeSet<&str> = events.into_iter().map(|event| event.aggregate.id()).collect();
    ids.into_iter().collect()
}

/// Moves the checkpoint on, and reads in the same snapshot what the database knows about the aggregates of
/// these events. `None` when the checkpoint is not as `held` says, as of [`crate::checkpoint::advance`].
pub(super) async fn open<'a>(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    held: &Held,
    to: (Mark, CommittedAt),
    events: impl IntoIterator<Item = &'a Event>,
) -> Result<Option<Known>, sqlx::Error> {
    let statement = AssertSqlSafe(definition.statements().open.clone());
    let moving = moving(held, to, events)?;
    known(sqlx::query_as_with(statement, moving).fetch_all(connection).await?)
}

/// What moves the checkpoint on, and the ids of the events' aggregates.
fn moving<'a>(
    held: &Held,
    (to, committed_at): (Mark, CommittedAt),
    events: impl IntoIterator<Item = &'a Event>,
) -> Result<PgArguments, sqlx::Error> {
    let mut all = PgArguments::default();
    let add = || {
        all.add(i32::from(held.partition))?;
        all.add(held.epoch.as_i32())?;
        all.add(held.mark.position.as_i64())?;
        all.add(held.fence)?;
        all.add(to.position.as_i64())?;
        all.add(to.id.get())?;
        all.add(committed_at.unix_micros())?;
        all.add(ids(events))
    };
    add().map_err(sqlx::Error::Encode)?;
    Ok(all)
}

/// `None` when the checkpoint was not moved.
fn known(rows: Vec<OpenedColumns>) -> Result<Option<Known>, sqlx::Error> {
    let mut known = Known { states: HashMap::new(), parked: HashSet::new() };
    for (moved, id, is_parked, version, epoch, position, created, state) in rows {
        if !moved {
            return Ok(None);
        }
        if is_parked {
            known.parked.insert(id.clone());
        }
        if let (Some(version), Some(epoch), Some(position), Some(created)) =
            (version, epoch, position, created)
        {
            let columns = (id, version, epoch, position, created, state);
            let (id, stored) = StoredState::from_columns(columns)
                .map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
            known.states.insert(id, stored);
        }
    }
    Ok(Some(known))
}

/// Moves the checkpoint on and writes a plan that parks nothing, in one statement, which is its transaction.
/// `false` when nothing was done: somebody came between what the plan was made of and this, or the plan is not
/// one for a single statement.
pub(super) async fn apply<'a>(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    held: &Held,
    to: (Mark, CommittedAt),
    events: impl IntoIterator<Item = &'a Event>,
    writes: &Writes,
) -> Result<bool, sqlx::Error> {
    let statement = AssertSqlSafe(definition.statements().apply.clone());
    let moving = sqlx::query_scalar_with(statement, moving(held, to, events)?);
    let all = match writes {
        Writes::Document(changes) if !changes.is_empty() => bind_document(moving, changes),
        Writes::Rollup(states, changes) if !states.aggregate_ids.is_empty() => {
            bind_rollup(moving, states, changes)
        }
        Writes::Document(_) | Writes::Rollup(..) | Writes::Custom(..) => return Ok(false),
    };
    match all.fetch_one(connection).await {
        Err(error) if is_not_as_read(&error) => Ok(false),
        done => done,
    }
}

fn is_not_as_read(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code == NOT_AS_READ)
}

/// The states of these aggregates.
pub async fn load_states(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    ids: Vec<String>,
) -> Result<HashMap<String, StoredState>, sqlx::Error> {
    let statement = AssertSqlSafe(definition.statements().load_states.clone());
    let rows: Vec<StateColumns> = sqlx::query_as(statement).bind(ids).fetch_all(connection).await?;
    let states = rows.into_iter().map(|columns| {
        StoredState::from_columns(columns).map_err(|error| sqlx::Error::Decode(Box::new(error)))
    });
    states.collect()
}

/// Writes the plan. `false` when a state is not at the version that it was read at: then nothing of
/// it may be committed.
pub async fn write(
    connection: &mut PgConnection,
    key: &VersionKey,
    definition: &ProjectionDefinition,
    partition: u16,
    plan: &Plan,
) -> Result<bool, sqlx::Error> {
    parking::park(connection, key, partition, &plan.parkings).await?;
    parking::bury(connection, key, &plan.letters).await?;
    match &plan.writes {
        Writes::Document(changes) => write_document(connection, definition, changes).await,
        Writes::Rollup(states, changes) => {
            write_rollup(connection, definition, states, changes).await
        }
        Writes::Custom(states, events) => {
            if !write_states(connection, definition, states).await? {
                return Ok(false);
            }
            write_custom(connection, definition, events).await?;
            Ok(true)
        }
    }
}

/// Writes what a batch changes in a document projection: its states, and the rows of its views. `false` when a
/// state is not at the version that it was read at.
pub async fn write_document(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    changes: &Changes,
) -> Result<bool, sqlx::Error> {
    if changes.is_empty() {
        return Ok(true);
    }
    let statement = AssertSqlSafe(definition.statements().write.clone());
    let all = bind_document(sqlx::query_scalar(statement), changes);
    are_all_written(all.fetch_one(connection).await?, &changes.states)
}

fn bind_document<'q, T>(statement: Scalar<'q, T>, changes: &'q Changes) -> Scalar<'q, T> {
    let states = bind_states(statement, &changes.states);
    changes.views.iter().fold(states, |all, changes| match changes {
        ViewChanges::Row(rows) => all
            .bind(&rows.deleted_ids)
            .bind(&rows.aggregate_ids)
            .bind(&rows.versions)
            .bind(&rows.epochs)
            .bind(&rows.positions)
            .bind(&rows.data),
        ViewChanges::List(items) => all
            .bind(&items.deleted_keys)
            .bind(&items.deleted_created_positions)
            .bind(&items.deleted_ids)
            .bind(&items.list_keys)
            .bind(&items.created_positions)
            .bind(&items.aggregate_ids)
            .bind(&items.data),
    })
}

/// The same of a rollup: what it has counted, and what is added to its rows.
async fn write_rollup(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    states: &StateWrites,
    changes: &RollupChanges,
) -> Result<bool, sqlx::Error> {
    if states.aggregate_ids.is_empty() {
        return Ok(true);
    }
    let statement = AssertSqlSafe(definition.statements().write.clone());
    let all = bind_rollup(sqlx::query_scalar(statement), states, changes);
    are_all_written(all.fetch_one(connection).await?, states)
}

fn bind_rollup<'q, T>(
    statement: Scalar<'q, T>,
    states: &'q StateWrites,
    changes: &'q RollupChanges,
) -> Scalar<'q, T> {
    let all = bind_states(statement, states)
        .bind(&changes.keys)
        .bind(&changes.partitions)
        .bind(&changes.epochs)
        .bind(&changes.positions);
    changes.columns.iter().fold(all, |all, column| all.bind(column))
}

type Scalar<'q, T> = QueryScalar<'q, Postgres, T, PgArguments>;

fn bind_states<'q, T>(statement: Scalar<'q, T>, states: &'q StateWrites) -> Scalar<'q, T> {
    statement
        .bind(&states.aggregate_ids)
        .bind(&states.partitions)
        .bind(&states.previous_versions)
        .bind(&states.versions)
        .bind(&states.epochs)
        .bind(&states.positions)
        .bind(&states.created_positions)
        .bind(&states.states)
}

fn are_all_written(written: i64, states: &StateWrites) -> Result<bool, sqlx::Error> {
    Ok(usize::try_from(written) == Ok(states.aggregate_ids.len()))
}

async fn write_custom(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    events: &[CustomEvent],
) -> Result<(), sqlx::Error> {
    let ProjectionKind::Custom(custom) = definition.kind() else {
        unreachable!("the plan is of the definition's kind")
    };
    if events.is_empty() {
        return Ok(());
    }
    custom.apply(connection, events).await.map_err(|error| match error {
        CustomError::Database(error) => error,
        // The one error of the database's that is ours to fill, and as permanent.
        CustomError::Refused(error) => sqlx::Error::Encode(Box::new(error)),
    })
}

/// Writes states. `false` when one is not at the version that it was read at.
pub async fn write_states(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    states: &StateWrites,
) -> Result<bool, sqlx::Error> {
    if states.aggregate_ids.is_empty() {
        return Ok(true);
    }
    let statement = AssertSqlSafe(definition.statements().write_states.clone());
    let written = bind_states(sqlx::query_scalar(statement), states).fetch_one(connection).await?;
    are_all_written(written, states)
}

/// Writes what changed in a row view.
pub async fn write_rows(
    connection: &mut PgConnection,
    view: &RowStatements,
    changes: &RowChanges,
) -> Result<(), sqlx::Error> {
    if !changes.deleted_ids.is_empty() {
        let delete = sqlx::query(AssertSqlSafe(Arc::clone(&view.delete)));
        delete.bind(&changes.deleted_ids).execute(&mut *connection).await?;
    }
    if !changes.aggregate_ids.is_empty() {
        sqlx::query(AssertSqlSafe(Arc::clone(&view.upsert)))
            .bind(&changes.aggregate_ids)
            .bind(&changes.versions)
            .bind(&changes.epochs)
            .bind(&changes.positions)
            .bind(&changes.data)
            .execute(connection)
            .await?;
    }
    Ok(())
}

/// Adds what changed in a rollup.
pub async fn add(
    connection: &mut PgConnection,
    view: &RollupStatements,
    changes: &RollupChanges,
) -> Result<(), sqlx::Error> {
    if changes.keys.is_empty() {
        return Ok(());
    }
    let add = sqlx::query(AssertSqlSafe(view.add.clone()))
        .bind(&changes.keys)
        .bind(&changes.partitions)
        .bind(&changes.epochs)
        .bind(&changes.positions);
    let add = changes.columns.iter().fold(add, |add, column| add.bind(column));
    add.execute(connection).await?;
    Ok(())
}
