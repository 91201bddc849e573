//! Views as files, for an operator.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use process::postgres;
use projection::Domain;
use serde_json::json;

use super::table::Table;
use super::{NAME, OperatorError, Report, chosen};
use crate::config::ProjectorConfig;
use crate::log::LogClient;
use crate::snapshot::file::Snapshot;
use crate::snapshot::{self, Header, Import};

/// Views as files.
#[derive(Debug, Clone, Subcommand)]
pub enum SnapshotCommand {
    /// Copies a view into a file, with everything that is needed to go on from there.
    Export {
        /// Which projection.
        projection: String,
        /// The file, which must not be there yet.
        file: PathBuf,
        /// The version of the projection; the active one unless set.
        #[arg(long)]
        projection_version: Option<u32>,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Checks a file and says what is in it.
    Inspect {
        /// The file.
        file: PathBuf,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
    /// Takes a file in. The projectors go on from where it stands.
    Import {
        /// The file.
        file: PathBuf,
        /// As a further version, which can take over by a switch, if the projection is here already.
        #[arg(long)]
        beside: bool,
        /// Prints JSON.
        #[arg(long)]
        json: bool,
    },
}

/// Does a command on snapshots.
pub async fn snapshot(
    config: &ProjectorConfig,
    domain: &Domain,
    command: &SnapshotCommand,
) -> Result<Report, OperatorError> {
    match command {
        SnapshotCommand::Export { projection, file, projection_version, json } => {
            let header = export(config, domain, projection, *projection_version, file).await?;
            if *json {
                return Ok(Report::json(&json!(header)));
            }
            Ok(Report::done(format!("{}, written to {}\n", of(&header), file.display())))
        }
        SnapshotCommand::Inspect { file, json } => inspect(file, *json),
        SnapshotCommand::Import { file, beside, json } => {
            import(config, domain, file, *beside, *json).await
        }
    }
}

async fn export(
    config: &ProjectorConfig,
    domain: &Domain,
    projection: &str,
    version: Option<u32>,
    file: &Path,
) -> Result<Header, OperatorError> {
    let pool = postgres::connect(&config.database, NAME)?;
    let definition = chosen(&pool, domain, projection, version).await?;
    let exported = Box::pin(snapshot::export(&pool, &definition, &config.region, file)).await;
    pool.close().await;
    Ok(exported?)
}

fn inspect(file: &Path, json: bool) -> Result<Report, OperatorError> {
    let snapshot = Snapshot::open(file)?;
    let counts = snapshot.line_counts()?;
    let header = &snapshot.header;
    if json {
        return Ok(Report::json(&json!({ "header": header, "line_counts": counts })));
    }
    let mut table = Table::new(["table", "lines"]);
    for (of, count) in header.tables.iter().zip(counts) {
        table.row([of.name.trim_start_matches(':'), &count.to_string()]);
    }
    let mut text = table.or("no tables");
    // Writing to a text cannot fail.
    let _ = writeln!(text, "{}, taken in {} at {}", of(header), header.region, header.exported_at);
    let _ = writeln!(text, "log {}, definition {}", header.log_id, header.definition);
    Ok(Report::done(text))
}

async fn import(
    config: &ProjectorConfig,
    domain: &Domain,
    file: &Path,
    beside: bool,
    json: bool,
) -> Result<Report, OperatorError> {
    let log = LogClient::new(&config.primary_log)?.of_region(&config.region);
    let pool = postgres::connect(&config.database, NAME)?;
    let import = Import { pool: &pool, domain, log_id: config.log.id, log: &log, beside };
    let imported = Box::pin(import.run(file)).await;
    pool.close().await;
    let snapshot::Imported { key, is_active, line_count } = imported?;
    if json {
        let said = json!({
            "projection": key.projection.as_str(),
            "version": key.version,
            "is_active": is_active,
            "line_count": line_count,
        });
        return Ok(Report::json(&said));
    }
    let next = match is_active {
        true => "gateways read it; the projectors go on from there".to_owned(),
        false => format!(
            "the projectors go on from there; to have gateways read it: \
             region-projector switch {} --to {}",
            key.projection, key.version
        ),
    };
    Ok(Report::done(format!("{line_count} lines are taken in as {key}\n{next}\n")))
}

fn of(header: &Header) -> String {
    let positions = header.checkpoints.iter().map(|checkpoint| checkpoint.position);
    let (least, most) = (positions.clone().min(), positions.max());
    format!(
        "{} v{} at positions {} to {}",
        header.projection,
        header.version,
        least.unwrap_or_default(),
        most.unwrap_or_default()
    )
}
