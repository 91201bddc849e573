//! Parked aggregates and their dead letters, as an operator deals with them.
//!
//! An aggregate is parked at the first event that could not be applied; that event and all its later
//! ones are its letters. [`retry()`] applies them in order, [`discard()`] gives the first one up. Both
//! lock the checkpoint of the partition and raise its fence, so that a running projector is displaced
//! and reads again what is parked, and both end in an announcement that the caller makes. Where events
//! are missing before the first letter, [`fill_gap()`] adds them from the log.

mod decision;
mod discard;
mod gap;
mod newly_known;
mod retry;

use consistency::{AggregateId, Event, EventError, NameError, Position};
use projection::ProjectionDefinition;
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};

use crate::checkpoint::{self, CheckpointError, Held, VersionKey};
use crate::log::LogError;
use crate::start::key_of;

pub use decision::{Actor, Decision, decisions};
pub(crate) use discard::pass_over;
pub use discard::{Discarded, discard};
pub use gap::fill_gap;
pub use newly_known::newly_known;
pub use retry::{Retried, StillParked, retry};

/// Why letters are where they were: nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum DeadLetterError {
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// The partition's checkpoint cannot be read.
    #[error("the checkpoint cannot be taken over")]
    Checkpoint(#[from] CheckpointError),
    /// The version has no checkpoint for the aggregate's partition.
    #[error("{0} has no checkpoints in this database")]
    NoCheckpoint(VersionKey),
    /// Nothing to do.
    #[error("{aggregate} is not parked in {key}")]
    NotParked {
        /// The version.
        key: VersionKey,
        /// The aggregate.
        aggregate: AggregateId,
    },
    /// The projection folds another aggregate type.
    #[error("{key} folds {expected}, not {found}")]
    OtherType {
        /// The version.
        key: VersionKey,
        /// What it folds.
        expected: String,
        /// What was asked for.
        found: String,
    },
    /// Another letter is the first by now.
    #[error("the first letter is at position {first}, not {asked}")]
    NotFirst {
        /// The position of the first letter.
        first: Position,
        /// What was asked for.
        asked: Position,
    },
    /// A letter that this binary cannot read back.
    #[error("the letter at position {position} cannot be read")]
    Letter {
        /// Where.
        position: i64,
        /// Why not.
        source: EventError,
    },
    /// A name or id that breaks its bounds.
    #[error("a stored name breaks its bounds")]
    Name(#[from] NameError),
    /// The primary's log could not be read.
    #[error("the primary's log cannot be asked for what is missing")]
    Log(#[from] LogError),
    /// More is missing than may be read from the log for one aggregate.
    #[error(
        "the log has more than {max} events (apply.gap_events_max) after the aggregate's state"
    )]
    TooMuchMissing {
        /// The bound.
        max: usize,
    },
    /// A state is not at the version that it was read at, under the lock that should prevent it.
    #[error("the state changed under the lock of its checkpoint")]
    StateChanged,
}

/// A parked aggregate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ParkedAggregate {
    /// The projection that could not apply it.
    pub projection: String,
    /// Its version.
    pub version: i32,
    /// The aggregate's type.
    pub aggregate_type: String,
    /// The aggregate's id.
    pub aggregate_id: String,
    /// The partition it belongs to.
    pub partition: i32,
    /// The epoch that `position` counts in.
    pub epoch: i32,
    /// Its first event that is not applied.
    pub position: i64,
    /// Why, out of a closed set.
    pub reason: String,
    /// Since when, by the region's database.
    pub parked_at: String,
    /// Events that wait.
    pub letter_count: i64,
}

/// One event that is not applied.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeadLetter {
    /// Where it stands in the log.
    pub position: i64,
    /// The event's headers.
    pub headers: Value,
    /// The event's data, to the byte.
    pub data: String,
    /// Why it is here, for operators.
    pub error: String,
    /// Since when, by the region's database.
    pub created_at: String,
}

impl DeadLetter {
    /// A header of the event; empty when it has none of this name.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(Value::as_str).unwrap_or_default()
    }
}

/// Parked aggregates of one projection, or of all, those parked at the smallest positions first.
pub async fn list(
    pool: &PgPool,
    projection: Option<&str>,
    count_max: i64,
) -> Result<Vec<ParkedAggregate>, DeadLetterError> {
    let parked = sqlx::query_as!(
        ParkedAggregate,
        r#"select projection, version, aggregate_type, aggregate_id, partition, epoch, position,
               reason,
               to_char(parked_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') as "parked_at!",
               (select count(*) from dead_letter as letter
                where letter.projection = parked.projection and letter.version = parked.version
                  and letter.aggregate_type = parked.aggregate_type
                  and letter.aggregate_id = parked.aggregate_id) as "letter_count!"
           from parked where $1::text is null or projection = $1
           order by projection, version, position limit $2"#,
        projection,
        count_max,
    );
    Ok(parked.fetch_all(pool).await?)
}

/// The first letters of an aggregate, in the order of the log.
pub async fn show(
    pool: &PgPool,
    key: &VersionKey,
    aggregate: &AggregateId,
    count_max: i64,
) -> Result<Vec<DeadLetter>, DeadLetterError> {
    let mut connection = pool.acquire().await?;
    Ok(letters(&mut connection, key, aggregate, count_max).await?)
}

/// Takes the aggregate's partition over, with the lock of its checkpoint. Nobody is displaced for an
/// aggregate that is not parked.
async fn open(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    aggregate: &AggregateId,
) -> Result<Held, DeadLetterError> {
    let key = key_of(definition);
    if aggregate.kind() != definition.aggregate_type() {
        let (expected, found) = (definition.aggregate_type().to_string(), aggregate.kind());
        return Err(DeadLetterError::OtherType { key, expected, found: found.to_string() });
    }
    require_parked(connection, &key, aggregate).await?;
    let partition = definition.partition_for(aggregate);
    let held = checkpoint::take_one(connection, &key, partition).await?;
    let held = held.ok_or_else(|| DeadLetterError::NoCheckpoint(key.clone()))?;
    // Another operator may have been quicker.
    require_parked(connection, &key, aggregate).await?;
    Ok(held)
}

async fn require_parked(
    connection: &mut PgConnection,
    key: &VersionKey,
    aggregate: &AggregateId,
) -> Result<(), DeadLetterError> {
    let is_parked = sqlx::query_scalar!(
        r#"select exists (
               select from parked where projection = $1 and version = $2
                   and aggregate_type = $3 and aggregate_id = $4) as "is_parked!""#,
        key.projection.as_str(),
        key.version_column(),
        aggregate.kind().as_str(),
        aggregate.id(),
    );
    match is_parked.fetch_one(connection).await? {
        true => Ok(()),
        false => {
            let aggregate = aggregate.clone();
            Err(DeadLetterError::NotParked { key: key.clone(), aggregate })
        }
    }
}

async fn letters(
    connection: &mut PgConnection,
    key: &VersionKey,
    aggregate: &AggregateId,
    count_max: i64,
) -> Result<Vec<DeadLetter>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select position, headers as "headers: Json<Map<String, Value>>", data, error,
               to_char(created_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') as "created_at!"
           from dead_letter
           where projection = $1 and version = $2 and aggregate_type = $3 and aggregate_id = $4
           order by position limit $5"#,
        key.projection.as_str(),
        key.version_column(),
        aggregate.kind().as_str(),
        aggregate.id(),
        count_max,
    )
    .fetch_all(connection)
    .await?;
    let letters = rows.into_iter().map(|row| DeadLetter {
        position: row.position,
        headers: Value::Object(row.headers.0),
        data: row.data,
        error: row.error,
        created_at: row.created_at,
    });
    Ok(letters.collect())
}

/// The event of a letter, as it was read from the log.
fn event_of(letter: &DeadLetter) -> Result<Event, DeadLetterError> {
    let header = |name: &'static str| letter.headers.get(name).and_then(Value::as_str);
    Event::from_message(header, letter.data.clone().into_bytes())
        .map_err(|source| DeadLetterError::Letter { position: letter.position, source })
}

async fn remove(
    connection: &mut PgConnection,
    key: &VersionKey,
    positions: &[i64],
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "delete from dead_letter where projection = $1 and version = $2 and position = any($3)",
        key.projection.as_str(),
        key.version_column(),
        positions,
    )
    .execute(connection)
    .await?;
    Ok(())
}

async fn unpark(
    connection: &mut PgConnection,
    key: &VersionKey,
    aggregate: &AggregateId,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "delete from parked where projection = $1 and version = $2
             and aggregate_type = $3 and aggregate_id = $4",
        key.projection.as_str(),
        key.version_column(),
        aggregate.kind().as_str(),
        aggregate.id(),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// The aggregate stays parked, at the event that is the first of its letters now.
async fn park_at(
    connection: &mut PgConnection,
    key: &VersionKey,
    event: &Event,
    reason: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update parked set epoch = $5, position = $6, reason = $7
         where projection = $1 and version = $2 and aggregate_type = $3 and aggregate_id = $4",
        key.projection.as_str(),
        key.version_column(),
        event.aggregate.kind().as_str(),
        event.aggregate.id(),
        event.at.epoch.as_i32(),
        event.at.position.as_i64(),
        reason,
    )
    .execute(connection)
    .await?;
    Ok(())
}
