//! The gateway of the worked example: orders.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::Parser;
use gateway::GatewayConfig;
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
    tracing::info!(?config, "configuration");
    let stop = shutdown::on_signal()?;
    let domain = orders::domain().context("the domain is not well formed")?;
    let running = gateway::start(config, domain, stop).await?;
    let finished = running.ended().await;
    Ok(if finished { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
