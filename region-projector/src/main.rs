//! The projector of the worked example: orders.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use mimalloc::MiMalloc;
use process::config::{EXIT_CODE, load};
use process::{shutdown, telemetry};
use projection::Domain;
use region_projector::operator::{
    self, BackfillCommand, DeadLettersCommand, DropCommand, PauseCommand, PruneCommand,
    RebuildCommand, Report, ResumeCommand, RollbackCommand, SnapshotCommand, StatusCommand,
    SwitchCommand, VerifyCommand, VersionsCommand,
};
use region_projector::{Projector, ProjectorConfig};

// Batches are made of many small allocations.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Folds the log into the read models of one region.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file; every key of it can be set from the environment as well, as in
    /// PROJECTOR__DATABASE__URL.
    #[arg(long, env = "PROJECTOR_CONFIG")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Applies events until it is asked to end. What is done when nothing is said.
    Run,
    /// Looks at events that could not be applied, retries and discards them.
    #[command(subcommand)]
    DeadLetters(DeadLettersCommand),
    /// Stops a projection in every process of the region, until it is resumed.
    Pause(PauseCommand),
    /// Lets projections go on that were paused, or stopped before too much was parked.
    Resume(ResumeCommand),
    /// What every partition has reached, and who applies it.
    Status(StatusCommand),
    /// Lists the versions of projections, and tables that are of none.
    Versions(VersionsCommand),
    /// Builds a projection anew from the log, beside the version that is read. Run again, it goes on.
    Rebuild(RebuildCommand),
    /// Has gateways read a version that was built beside the active one.
    Switch(SwitchCommand),
    /// Has gateways read the version again that they read before the last switch.
    Rollback(RollbackCommand),
    /// Drops a version that is not read, with its tables.
    Drop(DropCommand),
    /// Drops versions that were read before, and tables that are of no version.
    Prune(PruneCommand),
    /// Fills in what older rows lack of a view that has got a field.
    Backfill(BackfillCommand),
    /// Copies a view with its checkpoints into a file, and takes it in elsewhere.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Folds the log again and compares a view with it.
    Verify(VerifyCommand),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let environment = std::env::vars().map(short_names);
    let config = match load::<ProjectorConfig>(&arguments.config, "PROJECTOR", environment) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{:#}", anyhow::Error::new(error));
            return Ok(ExitCode::from(EXIT_CODE));
        }
    };
    telemetry::init_logs(&config.logging)?;
    match arguments.command {
        Some(Command::Run) | None => run(config).await,
        Some(Command::DeadLetters(command)) => {
            report(&operator::dead_letters(&config, &domain()?, command).await?)
        }
        Some(Command::Pause(command)) => report(&operator::pause(&config, &command).await?),
        Some(Command::Status(command)) => report(&operator::status(&config, &command).await?),
        Some(Command::Versions(command)) => {
            report(&operator::versions(&config, &domain()?, &command).await?)
        }
        Some(Command::Rebuild(command)) => {
            let stop = shutdown::on_signal()?;
            report(&Box::pin(operator::rebuild(&config, &domain()?, &command, &stop)).await?)
        }
        Some(Command::Switch(command)) => {
            report(&operator::switch(&config, &domain()?, &command).await?)
        }
        Some(Command::Rollback(command)) => {
            report(&operator::rollback(&config, &domain()?, &command).await?)
        }
        Some(Command::Drop(command)) => report(&operator::drop_version(&config, &command).await?),
        Some(Command::Prune(command)) => {
            report(&operator::prune(&config, &domain()?, &command).await?)
        }
        Some(Command::Backfill(command)) => {
            report(&Box::pin(operator::backfill(&config, &domain()?, &command)).await?)
        }
        Some(Command::Snapshot(command)) => {
            report(&Box::pin(operator::snapshot(&config, &domain()?, &command)).await?)
        }
        Some(Command::Verify(command)) => {
            report(&Box::pin(operator::verify(&config, &domain()?, &command)).await?)
        }
        Some(Command::Resume(command)) => report(&operator::resume(&config, &command).await?),
    }
}

/// `PARTITIONS=0,1` is what one types by hand.
fn short_names((name, value): (String, String)) -> (String, String) {
    let is_short = name == "PARTITIONS";
    (if is_short { "PROJECTOR__APPLY__PARTITIONS".to_owned() } else { name }, value)
}

fn domain() -> anyhow::Result<Domain> {
    orders::domain().context("the domain is not well formed")
}

/// A retry that failed again fails the command.
fn report(report: &Report) -> anyhow::Result<ExitCode> {
    std::io::stdout().write_all(report.text.as_bytes())?;
    Ok(if report.is_done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn run(config: ProjectorConfig) -> anyhow::Result<ExitCode> {
    tracing::info!(?config, "configuration");
    let grace = config.shutdown_grace.get();
    let stop = shutdown::on_signal()?;
    let projector = Projector::start(config, domain()?, stop.clone()).await?;
    let mut ended = std::pin::pin!(projector.join());
    let ended = tokio::select! {
        biased;
        // A start that cannot succeed ends before anyone asks.
        ended = &mut ended => Some(ended),
        () = stop.cancelled() => shutdown::within(grace, "projector", ended).await,
    };
    match ended {
        Some(ended) => ended.map(|()| ExitCode::SUCCESS).map_err(Into::into),
        None => Ok(ExitCode::FAILURE),
    }
}
