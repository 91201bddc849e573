//! Compares a view with the log, for an operator.

use std::fmt::Write as _;

use clap::Args;
use process::postgres;
use projection::{Domain, ProjectionDefinition};
use serde_json::{Value, json};

use super::table::Table;
use super::{NAME, OperatorError, Report, chosen};
use crate::config::ProjectorConfig;
use crate::log::LogClient;
use crate::start::key_of;
use crate::verify::{Extent, Verified, Verify};

/// Folds the log again and compares a view with it. Fails when they differ.
#[derive(Debug, Clone, Args)]
pub struct VerifyCommand {
    /// Which projection.
    projection: String,
    /// The version of the projection; the active one unless set.
    #[arg(long)]
    projection_version: Option<u32>,
    /// So many aggregates of the view, and as many places of the log.
    #[arg(long, default_value_t = 1000, conflicts_with = "whole")]
    sample: u32,
    /// Everything, sums as well.
    #[arg(long)]
    whole: bool,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Verifies.
pub async fn verify(
    config: &ProjectorConfig,
    domain: &Domain,
    command: &VerifyCommand,
) -> Result<Report, OperatorError> {
    let log = LogClient::new(&config.primary_log)?.of_region(&config.region);
    let pool = postgres::connect(&config.database, NAME)?;
    let version = command.projection_version;
    let definition = chosen(&pool, domain, &command.projection, version).await?;
    let verify = Verify {
        pool: &pool,
        log: &log,
        definition: &definition,
        page_events_max: config.primary_log.page_events_max,
    };
    let extent = if command.whole { Extent::Whole } else { Extent::Sample(command.sample) };
    let verified = Box::pin(verify.run(extent)).await;
    pool.close().await;
    let verified = verified?;
    let is_done = verified.is_sound();
    let text = match command.json {
        true => format!("{:#}\n", in_json(&definition, &verified)),
        false => in_words(&definition, &verified),
    };
    Ok(Report { text, is_done })
}

fn in_json(definition: &ProjectionDefinition, verified: &Verified) -> Value {
    let differences = verified.parity.differences.iter().map(|difference| {
        let fields = difference.fields().into_iter().map(
            |field| json!({ "field": field.path, "expected": field.one, "found": field.other }),
        );
        let fields: Vec<Value> = fields.collect();
        json!({ "table": difference.table, "key": difference.key, "fields": fields })
    });
    json!({
        "projection": definition.name().as_str(),
        "version": definition.version(),
        "is_sound": verified.is_sound(),
        "positions": verified.positions,
        "event_count": verified.event_count,
        "compared_count": verified.parity.compared_count,
        "left_out_count": verified.parity.left_out_count,
        "not_compared": verified.parity.not_compared,
        "unfoldable": verified.unfoldable,
        "differences": differences.collect::<Vec<_>>(),
    })
}

fn in_words(definition: &ProjectionDefinition, verified: &Verified) -> String {
    let parity = &verified.parity;
    let mut table = Table::new(["table", "key", "field", "expected", "found"]);
    for difference in &parity.differences {
        for field in difference.fields() {
            let place = [difference.table.as_str(), &difference.key, &field.path];
            table.row([place[0], place[1], place[2], &field.one, &field.other]);
        }
    }
    for (id, error) in &verified.unfoldable {
        table.row(["log", id, "", error, "applied"]);
    }
    let (key, events) = (key_of(definition), verified.event_count);
    let mut text = table.or(&format!("{key} holds what the log says"));
    let end = verified.positions.iter().max().copied().unwrap_or_default();
    let compared = parity.compared_count;
    // Writing to a text cannot fail.
    let _ =
        writeln!(text, "{compared} aggregates of {events} events compared up to position {end}");
    if parity.left_out_count != 0 {
        let _ = writeln!(text, "{} were parked or un-parked meanwhile", parity.left_out_count);
    }
    if !parity.not_compared.is_empty() {
        let _ = writeln!(text, "not compared: {}", parity.not_compared.join(", "));
    }
    text
}
