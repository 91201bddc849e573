//! Gives the first letter of an aggregate up.

use consistency::{AggregateId, Event, Position};
use projection::sql::{RowColumns, StateColumns, ViewStatements};
use projection::{ProjectionDefinition, RowChanges, StateWrites};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

use super::decision::{Actor, Outcome, record};
use super::{DeadLetter, DeadLetterError, event_of, letters, open, park_at, remove, unpark};
use crate::attempt::bounded;
use crate::checkpoint::Held;
use crate::config::ApplyConfig;
use crate::partition::write;
use crate::start::key_of;

/// Reason of an aggregate whose first letter was discarded: the later ones wait for a retry.
const REASON_WAITING: &str = "waiting";

/// What was discarded.
#[derive(Debug, Clone, PartialEq)]
pub struct Discarded {
    /// The partition as it was taken over; its checkpoint has not moved.
    pub held: Held,
    /// The letter, which is nowhere else in the region any more. The log still has its event.
    pub letter: DeadLetter,
    /// Where the aggregate is parked now; `None` when it is not parked any more.
    pub parked_at: Option<Position>,
}

/// Discards the first letter of a parked aggregate, which has to be at `position`. The aggregate's
/// state and its row in every row view count the event as read, so that later events are no gap and
/// nobody waits for a version that will not come; nothing else of them changes. Later letters stay
/// for a retry; without any the aggregate is not parked any more. The caller announces its key.
pub async fn discard(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    aggregate: &AggregateId,
    position: Position,
    config: &ApplyConfig,
    actor: &Actor,
) -> Result<Discarded, DeadLetterError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin().await?;
    let work = async {
        let discarded = discard_in(&mut transaction, definition, aggregate, position).await?;
        let (letter, is_parked) = (&discarded.letter, discarded.parked_at.is_some());
        let outcome = Outcome::Discarded { letter, is_parked };
        record(&mut transaction, actor, &key_of(definition), aggregate, outcome).await?;
        Ok::<_, DeadLetterError>(discarded)
    };
    let discarded = bounded(config.attempt_timeout, work).await?;
    transaction.commit().await?;
    tracing::warn!(version = %key_of(definition), %aggregate, %position, "event discarded");
    Ok(discarded)
}

async fn discard_in(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    aggregate: &AggregateId,
    position: Position,
) -> Result<Discarded, DeadLetterError> {
    let held = open(connection, definition, aggregate).await?;
    let key = key_of(definition);
    let mut letters = letters(connection, &key, aggregate, 2).await?.into_iter();
    let Some(letter) = letters.next() else {
        let aggregate = aggregate.clone();
        return Err(DeadLetterError::NotParked { key, aggregate });
    };
    let event = event_of(&letter)?;
    let first = event.at.position;
    if first != position {
        return Err(DeadLetterError::NotFirst { first, asked: position });
    }
    pass_over(connection, definition, held.partition, &event).await?;
    remove(connection, &key, &[letter.position]).await?;
    let next = letters.next().map(|next| event_of(&next)).transpose()?;
    match &next {
        Some(next) => park_at(connection, &key, next, REASON_WAITING).await?,
        None => unpark(connection, &key, aggregate).await?,
    }
    Ok(Discarded { held, letter, parked_at: next.map(|next| next.at.position) })
}

/// Advances state and rows to the event without folding it.
pub(crate) async fn pass_over(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    partition: u16,
    event: &Event,
) -> Result<(), DeadLetterError> {
    let load = AssertSqlSafe(definition.statements().load_states.clone());
    let id = event.aggregate.id();
    let stored: Option<StateColumns> =
        sqlx::query_as(load).bind(vec![id.to_owned()]).fetch_optional(&mut *connection).await?;
    let (previous_version, created, state) = stored.map_or_else(
        || (0, event.at.position.as_i64(), None),
        |(_, version, _, _, created, state)| (version, created, state),
    );
    if event.version.as_i64() <= previous_version {
        return Ok(());
    }
    let states = StateWrites {
        aggregate_ids: vec![id.to_owned()],
        partitions: vec![i32::from(partition)],
        previous_versions: vec![previous_version],
        versions: vec![event.version.as_i64()],
        epochs: vec![event.at.epoch.as_i32()],
        positions: vec![event.at.position.as_i64()],
        created_positions: vec![created],
        states: vec![state],
    };
    if !write::write_states(connection, definition, &states).await? {
        return Err(DeadLetterError::StateChanged);
    }
    for view in &definition.statements().views {
        match view {
            ViewStatements::Row(view) => {
                let read = sqlx::query_as(AssertSqlSafe(view.read.clone()));
                let read = read.bind(i32::from(partition)).bind(id).fetch_one(&mut *connection);
                let columns: RowColumns = read.await?;
                let (.., data) = columns;
                // An aggregate without a row has nothing to advance.
                let Some(data) = data else { continue };
                let row = RowChanges {
                    deleted_ids: Vec::new(),
                    aggregate_ids: vec![id.to_owned()],
                    versions: vec![event.version.as_i64()],
                    epochs: vec![event.at.epoch.as_i32()],
                    positions: vec![event.at.position.as_i64()],
                    data: vec![data],
                };
                write::write_rows(connection, view, &row).await?;
            }
            // The items of a list and of a search take version and position from the state, and
            // rollups have none of a single aggregate.
            ViewStatements::List(_) | ViewStatements::Search(_) | ViewStatements::Rollup(_) => {}
        }
    }
    Ok(())
}
