//! The gateway of the worked example: orders.

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use gateway::{
    GatewayConfig,
    operator::{self, EpochCommand},
};
use process::{
    config::{EXIT_CODE, load},
    shutdown, telemetry,
};

/// Answers reads and takes writes for one region.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file; every key of it can be set from the environment as well, as in
    /// GATEWAY__DATABASE__URL.
    #[arg(long, env = "GATEWAY_CONFIG")]
    config: PathBuf,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answers requests until it is asked to end. What is done when nothing is said.
    Serve,
    /// Looks at the log's epochs, and opens another.
    #[command(subcommand)]
    Epoch(EpochCommand),
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    let config = match load::<GatewayConfig>(&arguments.config, "GATEWAY", std::env::vars()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{:#}", anyhow::Error::new(error));
            return Ok(ExitCode::from(EXIT_CODE));
        }
    };
    telemetry::init_logs(&config.logs)?;
    match arguments.command {
        Some(Command::Serve) | None => serve(config).await,
        Some(Command::Epoch(command)) => {
            let printed = operator::epoch(&config, &arguments.config, command).await?;
            std::io::stdout().write_all(printed.as_bytes())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn serve(config: GatewayConfig) -> anyhow::Result<ExitCode> {
    tracing::info!(?config, "configuration");
    let stop = shutdown::on_signal()?;
    let domain = orders::domain().context("the domain is not well formed")?;
    let running = gateway::start(config, domain, stop).await?;
    let finished = running.ended().await;
    Ok(if finished { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
