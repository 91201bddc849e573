//! Which version of a projection is read, and what becomes of the others.

use std::fmt::Write as _;

use clap::Args;
use consistency::Name;
use process::config::Period;
use process::postgres;
use projection::Domain;
use serde_json::json;
use sqlx::PgPool;

use super::table::Table;
use super::{NAME, OperatorError, Report};
use crate::checkpoint::VersionKey;
use crate::config::ProjectorConfig;
use crate::switch::{self, GateConfig, Switched, To};
use crate::versions::{self, Version, VersionState, discard, tables};

/// Lists the versions of projections, and tables that are of none.
#[derive(Debug, Clone, Args)]
pub struct VersionsCommand {
    /// Of this projection only.
    projection: Option<String>,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Has gateways read a version that was built beside the active one.
#[derive(Debug, Clone, Args)]
pub struct SwitchCommand {
    /// Which projection.
    projection: String,
    /// To this version; to the newest that was never read unless set.
    #[arg(long)]
    to: Option<u32>,
    #[command(flatten)]
    gate: GateArguments,
}

/// Has gateways read the version again that they read before the last switch.
#[derive(Debug, Clone, Args)]
pub struct RollbackCommand {
    /// Which projection.
    projection: String,
    #[command(flatten)]
    gate: GateArguments,
}

/// How strict and how patient a switch is.
#[derive(Debug, Clone, Copy, Args)]
struct GateArguments {
    /// Takes over though the tables differ, which is told: the active version is known to be wrong.
    #[arg(long)]
    accept_differences: bool,
    /// The active version stands still for so many seconds at most, while the other one comes to
    /// where it stands.
    #[arg(long, default_value_t = 10)]
    catch_up_seconds_max: u32,
    /// The deadline of comparing one pair of tables, in seconds.
    #[arg(long, default_value_t = 600)]
    compare_seconds_max: u32,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Drops a version that is not read, with its tables.
#[derive(Debug, Clone, Args)]
pub struct DropCommand {
    /// Which projection.
    projection: String,
    /// Which version of it.
    version: u32,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Drops versions that were read before, and tables that are of no version.
#[derive(Debug, Clone, Args)]
pub struct PruneCommand {
    /// Versions of this projection only; tables of no version are left alone then.
    projection: Option<String>,
    /// Does it, instead of telling what would be done.
    #[arg(long)]
    yes: bool,
    /// Prints JSON.
    #[arg(long)]
    json: bool,
}

/// Bound on dropping, which is quick once nobody is at the tables.
const DROP_TIMEOUT: Period = Period::from_secs(60);

/// Lists versions.
pub async fn versions(
    config: &ProjectorConfig,
    domain: &Domain,
    command: &VersionsCommand,
) -> Result<Report, OperatorError> {
    let pool = postgres::connect(&config.database, NAME)?;
    let found = look(&pool, domain, command.projection.as_deref()).await;
    pool.close().await;
    let Found { lines, orphans } = found?;
    if command.json {
        return Ok(Report::json(&json!({ "versions": lines, "orphans": names(&orphans) })));
    }
    let mut table = Table::new([
        "projection",
        "version",
        "definition",
        "partitions",
        "state",
        "since",
        "position",
        "mb",
    ]);
    for line in &lines {
        let known = if line.is_known { "" } else { " (not in this binary)" };
        table.row([
            line.projection.as_str(),
            &line.version.to_string(),
            &format!("{}{known}", line.definition),
            &line.partition_count.to_string(),
            line.state.as_str(),
            &line.since,
            &line.position.map_or("-".to_owned(), |position| position.to_string()),
            &(line.bytes / 1_000_000).to_string(),
        ]);
    }
    let mut text = table.or("no projection is here yet");
    for orphan in &orphans {
        // Writing to a text cannot fail.
        let _ = writeln!(text, "table {} is of no version", orphan.name);
    }
    Ok(Report::done(text))
}

/// A version as it is listed.
#[derive(Debug, serde::Serialize)]
struct Line {
    projection: String,
    version: u32,
    definition: u32,
    /// Whether its rules are in this binary.
    is_known: bool,
    partition_count: u16,
    state: VersionState,
    since: String,
    /// The lowest of its checkpoints.
    position: Option<i64>,
    bytes: i64,
}

struct Found {
    lines: Vec<Line>,
    orphans: Vec<tables::Table>,
}

async fn look(
    pool: &PgPool,
    domain: &Domain,
    projection: Option<&str>,
) -> Result<Found, sqlx::Error> {
    let mut connection = pool.acquire().await?;
    let versions = versions::all(&mut connection).await?;
    let tables = tables::all(&mut connection).await?;
    let mut lines = Vec::new();
    for version in &versions {
        let Version { key, definition, partition_count, state } = version;
        if projection.is_some_and(|only| only != key.projection.as_str()) {
            continue;
        }
        let row = sqlx::query!(
            r#"select state_since::text as "since!",
                   (select min(position) from checkpoint
                    where projection = $1 and version = $2) as position
               from projection_version where projection = $1 and version = $2"#,
            key.projection.as_str(),
            key.version_column(),
        );
        let row = row.fetch_one(&mut *connection).await?;
        let own = tables.iter().filter(|table| {
            tables::owner(&table.name, &versions).is_some_and(|owner| owner.key == *key)
        });
        lines.push(Line {
            projection: key.projection.to_string(),
            version: key.version,
            definition: *definition,
            is_known: domain.projection(key.projection.as_str(), *definition).is_some(),
            partition_count: partition_count.get(),
            state: *state,
            since: row.since,
            position: row.position,
            bytes: own.map(|table| table.bytes).sum(),
        });
    }
    let orphans = tables::orphans(&tables, &versions);
    Ok(Found { lines, orphans: if projection.is_none() { orphans } else { Vec::new() } })
}

fn names(tables: &[tables::Table]) -> Vec<&str> {
    tables.iter().map(|table| table.name.as_str()).collect()
}

/// Switches.
pub async fn switch(
    config: &ProjectorConfig,
    domain: &Domain,
    command: &SwitchCommand,
) -> Result<Report, OperatorError> {
    let to = command.to.map_or(To::Ready, To::Version);
    take_over(config, domain, &command.projection, to, command.gate).await
}

/// Goes back.
pub async fn rollback(
    config: &ProjectorConfig,
    domain: &Domain,
    command: &RollbackCommand,
) -> Result<Report, OperatorError> {
    take_over(config, domain, &command.projection, To::Retired, command.gate).await
}

async fn take_over(
    config: &ProjectorConfig,
    domain: &Domain,
    projection: &str,
    to: To,
    arguments: GateArguments,
) -> Result<Report, OperatorError> {
    let gate = GateConfig {
        catch_up_max: Period::from_secs(arguments.catch_up_seconds_max.into()),
        statement_timeout: Period::from_secs(arguments.compare_seconds_max.into()),
        accept_differences: arguments.accept_differences,
    };
    let pool = postgres::connect(&config.database, NAME)?;
    let switched = Box::pin(switch::switch(&pool, domain, projection, to, &gate)).await;
    pool.close().await;
    let Switched { from, to, accepted, not_compared } = switched?;
    let accepted: Vec<String> = accepted.iter().map(ToString::to_string).collect();
    if arguments.json {
        let said = json!({
            "from": from.version, "to": to.version, "accepted": accepted,
            "not_compared": not_compared,
        });
        return Ok(Report::json(&said));
    }
    let mut text = String::new();
    for difference in &accepted {
        let _ = writeln!(text, "accepted: {difference}");
    }
    for table in &not_compared {
        let _ = writeln!(text, "not compared: {table}");
    }
    let _ = writeln!(
        text,
        "gateways read {to} now, and {from} goes on beside it\n\
         to go back: region-projector rollback {projection}\n\
         to be rid of it: region-projector drop {projection} {}",
        from.version
    );
    Ok(Report::done(text))
}

/// Drops one version.
pub async fn drop_version(
    config: &ProjectorConfig,
    command: &DropCommand,
) -> Result<Report, OperatorError> {
    let projection = Name::new(command.projection.as_str())?;
    let key = VersionKey { projection, version: command.version };
    let pool = postgres::connect(&config.database, NAME)?;
    let dropped = discard::drop_version(&pool, &key, DROP_TIMEOUT).await;
    pool.close().await;
    let dropped = dropped?;
    Ok(if command.json {
        Report::json(&json!({ "version": key.version, "tables": names(&dropped) }))
    } else {
        Report::done(format!("{key} is dropped, with {} tables\n", dropped.len()))
    })
}

/// Drops what nobody reads any more.
pub async fn prune(
    config: &ProjectorConfig,
    domain: &Domain,
    command: &PruneCommand,
) -> Result<Report, OperatorError> {
    let pool = postgres::connect(&config.database, NAME)?;
    let pruned = pruned(&pool, domain, command).await;
    pool.close().await;
    let (versions, orphans) = pruned?;
    let shown: Vec<String> = versions.iter().map(ToString::to_string).collect();
    if command.json {
        let said = json!({
            "done": command.yes, "versions": shown, "orphans": names(&orphans),
        });
        return Ok(Report::json(&said));
    }
    if versions.is_empty() && orphans.is_empty() {
        return Ok(Report::done("there is nothing to be dropped\n".to_owned()));
    }
    let will = if command.yes { "is dropped" } else { "would be dropped" };
    let mut text = String::new();
    for key in shown {
        let _ = writeln!(text, "{key} {will}");
    }
    for orphan in &orphans {
        let _ = writeln!(text, "table {} {will}", orphan.name);
    }
    if !command.yes {
        text.push_str("add --yes to do it\n");
    }
    Ok(Report::done(text))
}

async fn pruned(
    pool: &PgPool,
    domain: &Domain,
    command: &PruneCommand,
) -> Result<(Vec<VersionKey>, Vec<tables::Table>), OperatorError> {
    let only = command.projection.as_deref();
    let found = look(pool, domain, only).await?;
    let mut keys = Vec::new();
    for line in found.lines.iter().filter(|line| line.state == VersionState::Retired) {
        let projection = Name::new(line.projection.as_str())?;
        keys.push(VersionKey { projection, version: line.version });
    }
    let mut orphans = found.orphans;
    if command.yes {
        for key in &keys {
            discard::drop_version(pool, key, DROP_TIMEOUT).await?;
        }
        if only.is_none() {
            orphans = discard::drop_orphans(pool, DROP_TIMEOUT).await?;
        }
    }
    Ok((keys, orphans))
}
