//! Parked aggregates and their dead letters.

use std::collections::HashSet;

use serde_json::{Map, Value};
use sqlx::PgConnection;
use sqlx::types::Json;

use super::plan::{Letter, Parking};
use crate::checkpoint::VersionKey;

/// Which of these aggregates of one type are parked.
pub async fn parked(
    connection: &mut PgConnection,
    key: &VersionKey,
    aggregate_type: &str,
    ids: &[String],
) -> Result<HashSet<String>, sqlx::Error> {
    let found = sqlx::query_scalar!(
        "select aggregate_id from parked
         where projection = $1 and version = $2 and aggregate_type = $3 and aggregate_id = any($4)",
        key.projection.as_str(),
        key.version_column(),
        aggregate_type,
        ids,
    )
    .fetch_all(connection)
    .await?;
    Ok(found.into_iter().collect())
}

/// How many aggregates of a partition are parked.
pub async fn count(
    connection: &mut PgConnection,
    key: &VersionKey,
    partition: u16,
) -> Result<u64, sqlx::Error> {
    let count = sqlx::query_scalar!(
        r#"select count(*) as "count!" from parked
           where projection = $1 and version = $2 and partition = $3"#,
        key.projection.as_str(),
        key.version_column(),
        i32::from(partition),
    )
    .fetch_one(connection)
    .await?;
    Ok(u64::try_from(count).unwrap_or_default())
}

/// Parks aggregates.
pub async fn park(
    connection: &mut PgConnection,
    key: &VersionKey,
    partition: u16,
    parkings: &[Parking],
) -> Result<(), sqlx::Error> {
    for parking in parkings {
        sqlx::query!(
            "insert into parked
                 (projection, version, aggregate_type, aggregate_id, partition, epoch, position, reason)
             values ($1, $2, $3, $4, $5, $6, $7, $8)",
            key.projection.as_str(),
            key.version_column(),
            parking.aggregate.kind().as_str(),
            parking.aggregate.id(),
            i32::from(partition),
            parking.at.epoch.as_i32(),
            parking.at.position.as_i64(),
            parking.reason,
        )
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}

/// Keeps events for an operator.
pub async fn bury(
    connection: &mut PgConnection,
    key: &VersionKey,
    letters: &[Letter],
) -> Result<(), sqlx::Error> {
    if letters.is_empty() {
        return Ok(());
    }
    let events = || letters.iter().map(|letter| &letter.event);
    let positions: Vec<i64> = events().map(|event| event.at.position.as_i64()).collect();
    let kinds: Vec<String> = events().map(|event| event.aggregate.kind().to_string()).collect();
    let ids: Vec<String> = events().map(|event| event.aggregate.id().to_owned()).collect();
    let headers: Vec<Json<Map<String, Value>>> = events()
        .map(|event| event.headers().into_iter())
        .map(|headers| Json(headers.map(|(name, text)| (name.to_owned(), text.into())).collect()))
        .collect();
    let data: Vec<String> = events().map(|event| storable(&event.data)).collect();
    let errors: Vec<String> = letters.iter().map(|letter| storable(&letter.error)).collect();
    sqlx::query!(
        "insert into dead_letter
             (projection, version, position, aggregate_type, aggregate_id, headers, data, error)
         select $1, $2, letter.* from unnest($3::bigint[], $4::text[], $5::text[], $6::jsonb[],
             $7::text[], $8::text[]) as letter
         on conflict do nothing",
        key.projection.as_str(),
        key.version_column(),
        &positions,
        &kinds,
        &ids,
        &headers as &[Json<Map<String, Value>>],
        &data,
        &errors,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// A zero byte is the one character that a text column refuses. No valid JSON holds one, so nothing
/// that could ever be applied is changed.
fn storable(text: &str) -> String {
    text.replace('\0', "\u{fffd}")
}
