//! Reads what a batch needs, and writes what it changes: one statement a table each way.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use consistency::Event;
use projection::sql::{
    ListStatements, RollupStatements, RowStatements, StateColumns, ViewStatements,
};
use projection::{
    Changes, CustomError, CustomEvent, ListChanges, ProjectionDefinition, ProjectionKind,
    RollupChanges, RowChanges, StateWrites, StoredState, ViewChanges,
};
use sqlx::{AssertSqlSafe, PgConnection};

use super::parking;
use super::plan::{Known, Plan, Writes};
use crate::checkpoint::VersionKey;

/// What the database knows about the aggregates of these events.
pub async fn load<'a>(
    connection: &mut PgConnection,
    key: &VersionKey,
    definition: &ProjectionDefinition,
    events: impl IntoIterator<Item = &'a Event>,
) -> Result<Known, sqlx::Error> {
    let ids: BTreeSet<&str> = events.into_iter().map(|event| event.aggregate.id()).collect();
    let ids: Vec<String> = ids.into_iter().map(str::to_owned).collect();
    let kind = definition.aggregate_type().as_str();
    let parked = parking::parked(connection, key, kind, &ids).await?;
    Ok(Known { states: load_states(connection, definition, ids).await?, parked })
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
    let statements = definition.statements();
    match &plan.writes {
        Writes::Document(changes) => {
            return write_document(connection, definition, changes).await;
        }
        Writes::Rollup(states, changes) => {
            if !write_states(connection, definition, states).await? {
                return Ok(false);
            }
            for view in &statements.views {
                match view {
                    ViewStatements::Rollup(view) => add(connection, view, changes).await?,
                    ViewStatements::Row(_)
                    | ViewStatements::List(_)
                    | ViewStatements::Search(_) => {
                        unreachable!("a rollup has a rollup view only")
                    }
                }
            }
        }
        Writes::Custom(states, events) => {
            if !write_states(connection, definition, states).await? {
                return Ok(false);
            }
            write_custom(connection, definition, events).await?;
        }
    }
    Ok(true)
}

/// Writes what a batch changes in a document projection: its states, and the rows of its views. `false` when a
/// state is not at the version that it was read at.
pub async fn write_document(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    changes: &Changes,
) -> Result<bool, sqlx::Error> {
    if !write_states(connection, definition, &changes.states).await? {
        return Ok(false);
    }
    for (view, changes) in definition.statements().views.iter().zip(&changes.views) {
        match (view, changes) {
            (ViewStatements::Row(view), ViewChanges::Row(changes)) => {
                write_rows(connection, view, changes).await?;
            }
            (ViewStatements::Search(view), ViewChanges::Row(changes)) => {
                put_rows(connection, &view.delete, &view.upsert, changes).await?;
            }
            (ViewStatements::List(view), ViewChanges::List(changes)) => {
                write_list(connection, view, changes).await?;
            }
            (
                ViewStatements::Row(_)
                | ViewStatements::List(_)
                | ViewStatements::Rollup(_)
                | ViewStatements::Search(_),
                ViewChanges::Row(_) | ViewChanges::List(_),
            ) => unreachable!("changes are gathered in the order of the views"),
        }
    }
    Ok(true)
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
    let written: i64 = sqlx::query_scalar(statement)
        .bind(&states.aggregate_ids)
        .bind(&states.partitions)
        .bind(&states.previous_versions)
        .bind(&states.versions)
        .bind(&states.epochs)
        .bind(&states.positions)
        .bind(&states.created_positions)
        .bind(&states.states)
        .fetch_one(connection)
        .await?;
    Ok(usize::try_from(written) == Ok(states.aggregate_ids.len()))
}

/// Writes what changed in a row view.
pub async fn write_rows(
    connection: &mut PgConnection,
    view: &RowStatements,
    changes: &RowChanges,
) -> Result<(), sqlx::Error> {
    put_rows(connection, &view.delete, &view.upsert, changes).await
}

async fn put_rows(
    connection: &mut PgConnection,
    delete: &Arc<str>,
    upsert: &Arc<str>,
    changes: &RowChanges,
) -> Result<(), sqlx::Error> {
    if !changes.deleted_ids.is_empty() {
        let delete = sqlx::query(AssertSqlSafe(Arc::clone(delete)));
        delete.bind(&changes.deleted_ids).execute(&mut *connection).await?;
    }
    if !changes.aggregate_ids.is_empty() {
        sqlx::query(AssertSqlSafe(Arc::clone(upsert)))
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

async fn write_list(
    connection: &mut PgConnection,
    view: &ListStatements,
    changes: &ListChanges,
) -> Result<(), sqlx::Error> {
    if !changes.deleted_keys.is_empty() {
        sqlx::query(AssertSqlSafe(view.delete.clone()))
            .bind(&changes.deleted_keys)
            .bind(&changes.deleted_created_positions)
            .bind(&changes.deleted_ids)
            .execute(&mut *connection)
            .await?;
    }
    if !changes.list_keys.is_empty() {
        sqlx::query(AssertSqlSafe(view.upsert.clone()))
            .bind(&changes.list_keys)
            .bind(&changes.created_positions)
            .bind(&changes.aggregate_ids)
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
