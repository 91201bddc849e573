//! Stops and lets go on what is applied here, as operators say. It is kept in the region's database, so
//! it outlives every process, and all of them heed it.

use serde::Serialize;
use sqlx::{PgConnection, PgPool};

use crate::breaker::{self, Resumed};
use crate::sharing::rows;

/// A projection that an operator has paused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Paused {
    /// The projection.
    pub projection: String,
    /// Since when, in the database's words.
    pub paused_at: String,
}

/// Reason of a projection that went on after a pause, where others have that of their breaker.
pub const REASON_PAUSED: &str = "paused";

/// Pauses every version of a projection. Pausing it again changes nothing. `None` when there is none of
/// that name.
pub async fn pause(pool: &PgPool, projection: &str) -> Result<Option<Paused>, sqlx::Error> {
    let mut transaction = pool.begin().await?;
    sqlx::query!(
        "insert into projection_pause (projection)
         select $1 where exists (select from projection_version where projection = $1)
         on conflict do nothing",
        projection,
    )
    .execute(&mut *transaction)
    .await?;
    let paused = sqlx::query_as!(
        Paused,
        r#"select projection, paused_at::text as "paused_at!" from projection_pause
           where projection = $1"#,
        projection,
    )
    .fetch_optional(&mut *transaction)
    .await?;
    rows::notify(&mut transaction).await?;
    transaction.commit().await?;
    Ok(paused)
}

/// Lets what has stopped go on, whoever stopped it: one projection, or all. Running projectors notice by
/// themselves.
pub async fn resume(pool: &PgPool, projection: Option<&str>) -> Result<Vec<Resumed>, sqlx::Error> {
    let mut transaction = pool.begin().await?;
    let mut resumed = unpause(&mut transaction, projection).await?;
    resumed.extend(breaker::resume(&mut transaction, projection).await?);
    rows::notify(&mut transaction).await?;
    transaction.commit().await?;
    Ok(resumed)
}

async fn unpause(
    connection: &mut PgConnection,
    projection: Option<&str>,
) -> Result<Vec<Resumed>, sqlx::Error> {
    let unpaused = sqlx::query_scalar!(
        "delete from projection_pause where $1::text is null or projection = $1
         returning projection",
        projection,
    );
    let resumed = |projection| Resumed {
        projection,
        version: None,
        reason: REASON_PAUSED.to_owned(),
        accepted_count: None,
    };
    Ok(unpaused.fetch_all(connection).await?.into_iter().map(resumed).collect())
}
