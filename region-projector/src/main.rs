//! The projector of the worked example: orders.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use process::config::{EXIT_CODE, load};
use process::{shutdown, telemetry};
use region_projector::{Projector, ProjectorConfig};

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
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let config = match load::<ProjectorConfig>(&arguments.config, "PROJECTOR", std::env::vars()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{:#}", anyhow::Error::new(error));
            return Ok(ExitCode::from(EXIT_CODE));
        }
    };
    telemetry::init_logs(&config.logging)?;
    tracing::info!(?config, "configuration");
    match arguments.command {
        Some(Command::Run) | None => run(config).await,
    }
}

async fn run(config: ProjectorConfig) -> anyhow::Result<ExitCode> {
    let grace = config.shutdown_grace.get();
    let stop = shutdown::on_signal()?;
    let domain = orders::domain().context("the domain is not well formed")?;
    let projector = Projector::start(config, domain, stop.clone()).await?;
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
