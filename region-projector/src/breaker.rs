//! Stops a version before too many of its aggregates are parked for one reason.
//!
//! One bad event is parked and the rest goes on; hundreds that fail alike are a mistake in the rules,
//! and to park them all would only make work for operators. The batch that would pass the bound is
//! not committed, so a mended binary takes it up as if nothing had happened. Otherwise an operator
//! resumes, which accepts as many as there would be, or starts with a higher bound.

use std::collections::BTreeMap;

use serde::Serialize;
use sqlx::PgConnection;

use crate::checkpoint::VersionKey;
use crate::partition::plan::Parking;

/// What stopped a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{parked_count} aggregates would be parked for reason {reason}, resume to accept them")]
pub struct Trip {
    /// Out of a closed set.
    pub reason: &'static str,
    /// Aggregates that would be parked for it.
    pub parked_count: i64,
}

/// What an operator lets go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Resumed {
    /// The projection.
    pub projection: String,
    /// Its version; `None` when all of them were paused.
    pub version: Option<i32>,
    /// What it had stopped for.
    pub reason: String,
    /// Aggregates that may be parked for it before any counts against the bound.
    pub accepted_count: Option<i64>,
}

/// Whether these parkings pass the bound, together with those before them. Other partitions may be
/// parking at the same time, so a bound may be passed by what they have in flight.
pub async fn check(
    connection: &mut PgConnection,
    key: &VersionKey,
    parkings: &[Parking],
    parked_aggregates_max: u64,
) -> Result<Option<Trip>, sqlx::Error> {
    let mut added: BTreeMap<&'static str, i64> = BTreeMap::new();
    for parking in parkings {
        *added.entry(parking.reason).or_default() += 1;
    }
    let bound = i64::try_from(parked_aggregates_max).unwrap_or(i64::MAX);
    for (reason, added_count) in added {
        let known = sqlx::query!(
            r#"select
                   (select count(*) from parked
                    where projection = $1 and version = $2 and reason = $3) as "parked_count!",
                   coalesce((select accepted_count from parking_breaker
                    where projection = $1 and version = $2 and reason = $3), 0)
                       as "accepted_count!""#,
            key.projection.as_str(),
            key.version_column(),
            reason,
        )
        .fetch_one(&mut *connection)
        .await?;
        let parked_count = known.parked_count + added_count;
        if parked_count - known.accepted_count > bound {
            return Ok(Some(Trip { reason, parked_count }));
        }
    }
    Ok(None)
}

/// Says in the database that a version has stopped, which stops it in every process. `true` when an
/// operator has accepted as much already.
pub async fn trip(
    connection: &mut PgConnection,
    key: &VersionKey,
    trip: &Trip,
) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar!(
        r#"insert into parking_breaker as breaker (projection, version, reason, parked_count)
           values ($1, $2, $3, $4)
           on conflict (projection, version, reason) do update set
               parked_count = excluded.parked_count,
               tripped_at = excluded.tripped_at
           returning accepted_count >= parked_count as "is_accepted!""#,
        key.projection.as_str(),
        key.version_column(),
        trip.reason,
        trip.parked_count,
    )
    .fetch_one(connection)
    .await
}

/// Accepts what has stopped: of one projection, or of all.
pub async fn resume(
    connection: &mut PgConnection,
    projection: Option<&str>,
) -> Result<Vec<Resumed>, sqlx::Error> {
    sqlx::query_as!(
        Resumed,
        r#"update parking_breaker set accepted_count = parked_count
           where accepted_count < parked_count and ($1::text is null or projection = $1)
           returning projection, version as "version?", reason,
               accepted_count as "accepted_count?""#,
        projection,
    )
    .fetch_all(connection)
    .await
}
