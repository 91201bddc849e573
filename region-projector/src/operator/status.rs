//! What every partition of a region has reached, and who applies it, as the region's database shows it.
//!
//! Nobody has to run for that; what the running processes know of the log's head they keep there too.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::Args;
use process::postgres;
use serde::Serialize;
use serde_json::json;
use sqlx::PgPool;
use tokio::time::{Instant, sleep};

use super::table::Table;
use super::{NAME, OperatorError, Report};
use crate::config::ProjectorConfig;

/// What every partition has reached, and who applies it.
#[derive(Debug, Clone, Args)]
pub struct StatusCommand {
    /// Of this projection only.
    projection: Option<String>,
    /// Rates are measured over so many milliseconds.
    #[arg(long, default_value_t = 1000)]
    sample_ms: u64,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// One partition at one moment.
#[derive(Debug, Clone)]
struct Seen {
    projection: String,
    version: i32,
    is_active: bool,
    partition: i32,
    epoch: i32,
    position: i64,
    age_seconds: Option<f64>,
    owner: Option<String>,
    is_expired: Option<bool>,
    parked_count: i64,
    is_paused: bool,
    stopped_for: Option<String>,
}

/// One partition as it is shown.
#[derive(Debug, Serialize)]
struct Line {
    projection: String,
    version: i32,
    /// Whether gateways read this version.
    active: bool,
    partition: i32,
    /// The process that applies it.
    owner: Option<String>,
    epoch: i32,
    /// Its stored checkpoint.
    position: i64,
    lag_positions: i64,
    /// Since when the newest stored event was committed, by two clocks; zero when nothing is missing, and
    /// nothing before the first is stored.
    lag_seconds: Option<f64>,
    /// Positions a second.
    rate: f64,
    parked_count: i64,
    paused: bool,
    /// What it waits for an operator for, unless it is paused.
    stopped_for: Option<String>,
}

/// Shows all partitions, or those of one projection.
pub async fn status(
    config: &ProjectorConfig,
    command: &StatusCommand,
) -> Result<Report, OperatorError> {
    let pool = postgres::connect(&config.database, NAME)?;
    let lines = lines(&pool, command).await;
    pool.close().await;
    let (head, lines) = lines?;
    if command.json {
        let head = head.map(|(epoch, position)| [i64::from(epoch), position]);
        return Ok(Report::json(
            &json!({ "region": config.region, "head": head, "partitions": lines }),
        ));
    }
    let mut table = Table::new([
        "projection",
        "version",
        "partition",
        "owner",
        "position",
        "lag",
        "lag s",
        "rate/s",
        "parked",
        "state",
    ]);
    for line in &lines {
        table.row([
            line.projection.as_str(),
            &line.version.to_string(),
            &line.partition.to_string(),
            line.owner.as_deref().unwrap_or("-"),
            &line.position.to_string(),
            &line.lag_positions.to_string(),
            &line.lag_seconds.map_or("-".to_owned(), |seconds| format!("{seconds:.1}")),
            &format!("{:.0}", line.rate),
            &line.parked_count.to_string(),
            &line.state(),
        ]);
    }
    Ok(Report::done(table.or("no projection is here yet")))
}

impl Line {
    fn state(&self) -> String {
        match (&self.stopped_for, &self.owner) {
            _ if self.paused => "paused".to_owned(),
            (Some(reason), _) => format!("stopped: {reason}"),
            (None, None) => "free".to_owned(),
            (None, Some(_)) if self.active => "active".to_owned(),
            (None, Some(_)) => "beside".to_owned(),
        }
    }
}

type Head = Option<(i32, i64)>;

/// Looks twice, which makes a rate.
async fn lines(pool: &PgPool, command: &StatusCommand) -> Result<(Head, Vec<Line>), sqlx::Error> {
    let projection = command.projection.as_deref();
    let name = |seen: &Seen| (seen.projection.clone(), seen.version, seen.partition);
    let began = Instant::now();
    let first = look(pool, projection).await?;
    let before: BTreeMap<_, i64> = first.iter().map(|seen| (name(seen), seen.position)).collect();
    sleep(Duration::from_millis(command.sample_ms)).await;
    let now = look(pool, projection).await?;
    let seconds = began.elapsed().as_secs_f64();
    let head = head(pool).await?;
    let lines = now.into_iter().map(|seen| {
        let moved = before.get(&name(&seen)).map_or(0, |before| seen.position - before);
        line(seen, head, moved as f64 / seconds)
    });
    Ok((head, lines.collect()))
}

fn line(seen: Seen, head: Head, rate: f64) -> Line {
    let newest = head.filter(|(epoch, _)| *epoch == seen.epoch).map(|(_, position)| position);
    let lag_positions = newest.map_or(0, |newest| (newest - seen.position).max(0));
    let lag_seconds = if lag_positions == 0 { Some(0.0) } else { seen.age_seconds };
    let owner = seen.owner.map(|owner| match seen.is_expired {
        Some(true) => format!("{owner} (expired)"),
        Some(false) | None => owner,
    });
    Line {
        projection: seen.projection,
        version: seen.version,
        active: seen.is_active,
        partition: seen.partition,
        owner,
        epoch: seen.epoch,
        position: seen.position,
        lag_positions,
        lag_seconds: lag_seconds.map(|seconds| seconds.max(0.0)),
        rate: rate.max(0.0),
        parked_count: seen.parked_count,
        paused: seen.is_paused,
        stopped_for: seen.stopped_for,
    }
}

async fn look(pool: &PgPool, projection: Option<&str>) -> Result<Vec<Seen>, sqlx::Error> {
    sqlx::query_as!(
        Seen,
        r#"select at.projection, at.version, of.active as is_active, at.partition, at.epoch,
               at.position,
               extract(epoch from clock_timestamp() - at.committed_at)::float8 as age_seconds,
               process.name as "owner?",
               process.expires_at < clock_timestamp() as "is_expired?",
               (select count(*) from parked
                where parked.projection = at.projection and parked.version = at.version
                  and parked.partition = at.partition) as "parked_count!",
               exists (select from projection_pause as pause
                where pause.projection = at.projection) as "is_paused!",
               (select min(reason) from parking_breaker as breaker
                where breaker.projection = at.projection and breaker.version = at.version
                  and breaker.accepted_count < breaker.parked_count) as stopped_for
           from checkpoint as at
           join projection_version as of using (projection, version)
           left join partition_lease as lease using (projection, version, partition)
           left join projector_process as process using (process)
           where $1::text is null or at.projection = $1
           order by at.projection, at.version, at.partition"#,
        projection,
    )
    .fetch_all(pool)
    .await
}

/// The log's head as far as anyone here knows.
async fn head(pool: &PgPool) -> Result<Head, sqlx::Error> {
    let head = sqlx::query!(
        r#"select epoch as "epoch!", position as "position!" from (
               select head_epoch as epoch, head_position as position from projector_process
               union all select epoch, position from checkpoint) as known
           where epoch is not null and position is not null
           order by epoch desc, position desc limit 1"#
    );
    Ok(head.fetch_optional(pool).await?.map(|row| (row.epoch, row.position)))
}
