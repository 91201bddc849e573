//! Who decided what on dead letters.

use consistency::AggregateId;
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};

use super::{DeadLetter, DeadLetterError};
use crate::checkpoint::VersionKey;

/// Longest name of an actor, in bytes.
const ACTOR_BYTES_MAX: usize = 200;

/// Who decides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Actor(String);

impl Actor {
    /// Whoever says so; what is too long or unprintable of it is left out.
    pub fn new(name: &str) -> Self {
        let mut kept: String = name.chars().filter(|c| !c.is_control()).collect();
        while ACTOR_BYTES_MAX < kept.len() {
            kept.pop();
        }
        Self(if kept.is_empty() { "unknown".to_owned() } else { kept })
    }

    /// A projector that knows more than the one before.
    pub fn projector() -> Self {
        Self(format!("region-projector {}", env!("CARGO_PKG_VERSION")))
    }
}

/// What was decided on the letters of one aggregate.
#[derive(Debug)]
pub(super) enum Outcome<'a> {
    /// So many were applied, the first of them here, and the next one was not for this reason.
    Retried { position: Option<i64>, applied_count: usize, stopped_by: Option<&'a str> },
    /// This one was given up; the later ones wait.
    Discarded { letter: &'a DeadLetter, is_parked: bool },
}

/// Remembers a decision, in the transaction that carries it out.
pub(super) async fn record(
    connection: &mut PgConnection,
    actor: &Actor,
    key: &VersionKey,
    aggregate: &AggregateId,
    outcome: Outcome<'_>,
) -> Result<(), sqlx::Error> {
    let (decision, position, count, stopped_by, letter) = match outcome {
        Outcome::Retried { position, applied_count, stopped_by } => {
            ("retry", position, applied_count, stopped_by, None)
        }
        Outcome::Discarded { letter, is_parked } => {
            let stopped_by = is_parked.then_some("waiting");
            ("discard", Some(letter.position), 1, stopped_by, Some(letter))
        }
    };
    let headers = letter.map(|letter| Json(&letter.headers));
    sqlx::query!(
        "insert into letter_decision
             (actor, decision, projection, version, aggregate_type, aggregate_id, position,
              letter_count, stopped_by, headers, data)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        actor.0,
        decision,
        key.projection.as_str(),
        key.version_column(),
        aggregate.kind().as_str(),
        aggregate.id(),
        position,
        i64::try_from(count).unwrap_or(i64::MAX),
        stopped_by,
        headers as _,
        letter.map(|letter| letter.data.as_str()),
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A decision that was carried out.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Decision {
    /// When, by the region's database.
    pub decided_at: String,
    /// Who.
    pub actor: String,
    /// `retry` or `discard`.
    pub decision: String,
    /// The projection.
    pub projection: String,
    /// Its version.
    pub version: i32,
    /// The aggregate's type.
    pub aggregate_type: String,
    /// The aggregate's id.
    pub aggregate_id: String,
    /// Where the first letter stood that was decided on.
    pub position: Option<i64>,
    /// Letters that are letters no more.
    pub letter_count: i64,
    /// Why the next one still is; `None` when the aggregate is not parked any more.
    pub stopped_by: Option<String>,
    /// The headers of an event that was given up.
    pub headers: Option<Value>,
    /// Its data.
    pub data: Option<String>,
}

/// Decisions, the newest first.
pub async fn decisions(
    pool: &PgPool,
    projection: Option<&str>,
    count_max: i64,
) -> Result<Vec<Decision>, DeadLetterError> {
    let rows = sqlx::query!(
        r#"select to_char(decided_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS"Z"')
               as "decided_at!", actor, decision, projection, version, aggregate_type, aggregate_id,
               position, letter_count, stopped_by,
               headers as "headers: Json<Map<String, Value>>", data
           from letter_decision where $1::text is null or projection = $1
           order by id desc limit $2"#,
        projection,
        count_max,
    )
    .fetch_all(pool)
    .await?;
    let decisions = rows.into_iter().map(|row| Decision {
        decided_at: row.decided_at,
        actor: row.actor,
        decision: row.decision,
        projection: row.projection,
        version: row.version,
        aggregate_type: row.aggregate_type,
        aggregate_id: row.aggregate_id,
        position: row.position,
        letter_count: row.letter_count,
        stopped_by: row.stopped_by,
        headers: row.headers.map(|headers| Value::Object(headers.0)),
        data: row.data,
    });
    Ok(decisions.collect())
}
