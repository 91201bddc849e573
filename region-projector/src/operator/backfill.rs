//! Fills in what older rows lack, for an operator.

use std::num::NonZeroU32;

use clap::Args;
use process::postgres;
use projection::Domain;
use serde_json::json;

use super::{NAME, OperatorError, Report, chosen};
use crate::backfill;
use crate::config::ProjectorConfig;
use crate::start::key_of;

/// Fills in what older rows lack of a view that has got a field.
#[derive(Debug, Clone, Args)]
pub struct BackfillCommand {
    /// Which projection.
    projection: String,
    /// The version of the projection; the active one unless set.
    #[arg(long)]
    projection_version: Option<u32>,
    /// No faster than that.
    #[arg(long, default_value = "1000")]
    rows_per_second: NonZeroU32,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Fills in.
pub async fn backfill(
    config: &ProjectorConfig,
    domain: &Domain,
    command: &BackfillCommand,
) -> Result<Report, OperatorError> {
    let pool = postgres::connect(&config.database, NAME)?;
    let version = command.projection_version;
    let definition = chosen(&pool, domain, &command.projection, version).await?;
    let apply = config.apply_to(definition.name().as_str());
    let filled = backfill::backfill(&pool, &definition, command.rows_per_second, &apply);
    let filled = Box::pin(filled).await;
    pool.close().await;
    let filled = filled?;
    if command.json {
        return Ok(Report::json(&json!({ "row_count": filled.row_count })));
    }
    let key = key_of(&definition);
    Ok(Report::done(match filled.row_count {
        0 => format!("no row of {key} lacks anything\n"),
        count => format!("{count} rows of {key} are filled in\n"),
    }))
}
