//! Builds a projection anew.

use clap::Args;
use projection::Domain;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{OperatorError, Report};
use crate::config::ProjectorConfig;
use crate::rebuild::begin::Request;
use crate::rebuild::progress::{self, Progress};
use crate::rebuild::{self, Rebuilt};

/// Builds a projection anew from the log, beside the version that is read.
#[derive(Debug, Clone, Args)]
pub struct RebuildCommand {
    /// Which projection.
    projection: String,
    /// By the rules that are declared with this number; by the newest unless set.
    #[arg(long)]
    definition: Option<u32>,
    /// Into so many partitions; as the rules say unless set.
    #[arg(long)]
    partitions: Option<u16>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Builds, and shows how far it is on standard error.
pub async fn rebuild(
    config: &ProjectorConfig,
    domain: &Domain,
    command: &RebuildCommand,
    stop: &CancellationToken,
) -> Result<Report, OperatorError> {
    let RebuildCommand { projection, definition, partitions, json } = command.clone();
    let request = Request { projection: projection.clone(), definition, partitions };
    let progress = Progress::default();
    let began = Instant::now();
    let building = rebuild::rebuild(config, domain, &request, &progress, stop);
    let shown = progress.clone().show(&projection);
    let built = progress::beside(shown, Box::pin(building)).await.map_err(Box::new)?;
    let Rebuilt { key, definition, resumed_at, through, parked_count, is_left_to_projectors } =
        built;
    if json {
        return Ok(Report::json(&json!({
            "version": key.version,
            "definition": definition,
            "resumed_at": resumed_at,
            "through": through.position,
            "parked_count": parked_count,
            "is_left_to_projectors": is_left_to_projectors,
        })));
    }
    let seconds = began.elapsed().as_secs_f64();
    let text = if is_left_to_projectors {
        format!(
            "{key} is begun: it writes what it likes, so the region's projectors apply the log to it\n"
        )
    } else {
        format!(
            "{key} is built by definition {definition} up to position {} in {seconds:.1} s, with \
             {parked_count} aggregates parked; the region's projectors take it up\n",
            through.position
        )
    };
    Ok(Report::done(text + &format!("to have it read: region-projector switch {projection}\n")))
}
