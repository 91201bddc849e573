//! Letters that the primary's log has and this region does not.

use consistency::{AggregateId, Epoch, Event, Position, Version};
use projection::sql::StateColumns;
use projection::{ProjectionDefinition, StoredState};
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

use super::{DeadLetterError, open, remove};
use crate::attempt::bounded;
use crate::checkpoint;
use crate::config::ApplyConfig;
use crate::log::LogClient;
use crate::partition::gap;
use crate::partition::parking;
use crate::partition::plan::{Gap, Letter, REASON_GAP};
use crate::start::key_of;

/// Where an aggregate that is parked for a gap goes on, and up to where it is parked.
struct Open {
    gap: Gap,
    epoch: Epoch,
    through: Position,
}

/// Makes the letters of an aggregate that is parked for a gap complete, with what the primary's log has
/// after its state: what the log says takes the place of what was read. Says how many events came from
/// there; zero when the aggregate is not parked for a gap. Nothing is applied: a retry does that.
pub async fn fill_gap(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    aggregate: &AggregateId,
    config: &ApplyConfig,
    log: &LogClient,
) -> Result<usize, DeadLetterError> {
    let mut connection = pool.acquire().await?;
    let open = find(&mut connection, definition, aggregate);
    let Some(Open { gap, epoch, through }) = bounded(config.attempt_timeout, open).await? else {
        return Ok(0);
    };
    // Nobody waits for a lock while the log is asked.
    let events = gap::fetch(log, epoch, &gap, through, config.gap_events_max).await?;
    let max = config.gap_events_max;
    let events = events.ok_or(DeadLetterError::TooMuchMissing { max })?;
    let count = events.len();
    if count == 0 {
        return Ok(0);
    }
    bounded(config.attempt_timeout, put(&mut connection, definition, aggregate, events)).await?;
    tracing::info!(%aggregate, count, "letters completed from the log");
    Ok(count)
}

async fn find(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    aggregate: &AggregateId,
) -> Result<Option<Open>, DeadLetterError> {
    let key = key_of(definition);
    let last = sqlx::query_scalar!(
        r#"select max(letter.position) as "last!" from parked
               join dead_letter as letter
               using (projection, version, aggregate_type, aggregate_id)
           where parked.projection = $1 and parked.version = $2 and parked.aggregate_type = $3
               and parked.aggregate_id = $4 and parked.reason = $5
           having max(letter.position) is not null"#,
        key.projection.as_str(),
        key.version_column(),
        aggregate.kind().as_str(),
        aggregate.id(),
        REASON_GAP,
    );
    let last = last.fetch_optional(&mut *connection).await?;
    let Some(through) = last.and_then(Position::from_i64) else { return Ok(None) };
    let partition = definition.partition_for(aggregate);
    let stored = checkpoint::stored(connection, &key).await?;
    let held = stored.into_iter().find(|held| held.partition == partition);
    let epoch = held.ok_or(DeadLetterError::NoCheckpoint(key))?.epoch;
    let load = AssertSqlSafe(definition.statements().load_states.clone());
    let ids = vec![aggregate.id().to_owned()];
    let state: Option<StateColumns> =
        sqlx::query_as(load).bind(ids).fetch_optional(connection).await?;
    let state = state.map(StoredState::from_columns).transpose();
    let state = state.map_err(|error| sqlx::Error::Decode(Box::new(error)))?;
    let after = state.map_or(Version::ZERO, |(_, state)| state.version());
    Ok(Some(Open { gap: Gap { aggregate: aggregate.clone(), after }, epoch, through }))
}

async fn put(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    aggregate: &AggregateId,
    events: Vec<Event>,
) -> Result<(), DeadLetterError> {
    let mut transaction = connection.begin().await?;
    open(&mut transaction, definition, aggregate).await?;
    let key = key_of(definition);
    let positions: Vec<i64> = events.iter().map(|event| event.at.position.as_i64()).collect();
    remove(&mut transaction, &key, &positions).await?;
    let error = "read from the log for a retry";
    let letter = |event| Letter { event, error: error.to_owned() };
    let letters: Vec<Letter> = events.into_iter().map(letter).collect();
    parking::bury(&mut transaction, &key, &letters).await?;
    transaction.commit().await?;
    Ok(())
}
