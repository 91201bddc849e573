//! Pauses projections, and lets go on what has stopped.

use clap::Args;
use process::postgres;
use serde_json::json;

use super::table::Table;
use super::{NAME, OperatorError, Report};
use crate::config::ProjectorConfig;
use crate::pause;

/// Stops a projection in every process of the region.
#[derive(Debug, Clone, Args)]
pub struct PauseCommand {
    /// Which projection.
    projection: String,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Lets projections go on that were paused, or stopped before too much was parked.
#[derive(Debug, Clone, Args)]
pub struct ResumeCommand {
    /// This projection only.
    projection: Option<String>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Stops a projection until it is resumed. What is being committed is still committed.
pub async fn pause(
    config: &ProjectorConfig,
    command: &PauseCommand,
) -> Result<Report, OperatorError> {
    let pool = postgres::connect(&config.database, NAME)?;
    let paused = pause::pause(&pool, &command.projection).await;
    pool.close().await;
    let unknown = || OperatorError::UnknownProjection(command.projection.clone());
    let paused = paused?.ok_or_else(unknown)?;
    Ok(if command.json {
        Report::json(&json!(paused))
    } else {
        Report::done(format!("{} is paused since {}\n", paused.projection, paused.paused_at))
    })
}

/// Lets what has stopped go on.
pub async fn resume(
    config: &ProjectorConfig,
    command: &ResumeCommand,
) -> Result<Report, OperatorError> {
    let pool = postgres::connect(&config.database, NAME)?;
    let resumed = pause::resume(&pool, command.projection.as_deref()).await;
    pool.close().await;
    let resumed = resumed?;
    if command.json {
        return Ok(Report::json(&json!(resumed)));
    }
    let mut table = Table::new(["projection", "version", "reason", "accepted"]);
    let shown = |number: Option<String>| number.unwrap_or_else(|| "-".to_owned());
    for resumed in &resumed {
        let version = shown(resumed.version.map(|version| version.to_string()));
        let accepted = shown(resumed.accepted_count.map(|count| count.to_string()));
        table.row([resumed.projection.as_str(), &version, &resumed.reason, &accepted]);
    }
    Ok(Report::done(table.or("nothing has stopped")))
}
