//! The gateway of the worked example: orders.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use gateway::{
    GatewayConfig,
    operator::{self, EpochCommand},
};
use mimalloc::MiMalloc;
use process::{
    config::{EXIT_CODE, load},
    shutdown, telemetry,
};

// Requests are made of many small allocations.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Answers reads and takes writes for one region.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The configuration file; every key of it can be set from the environment as well, as in
    /// GATEWAY__DATABASE__URL.
    #[arg(long, env = "GATEWAY_CONFIG", global = true)]
    config: Option<PathBuf>,
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
    /// Looks at consistency tokens.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Says everything that is wrong with a configuration file, and starts nothing.
    CheckConfig {
        /// The file; what the environment sets counts as well.
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Prints what a token says. With --config, its seal is checked.
    Inspect {
        /// As a header or a cookie carries it.
        token: String,
    },
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::Serve) | None => match configured(arguments.config) {
            Ok((_, config)) => serve(config).await,
            Err(exit) => Ok(exit),
        },
        Some(Command::Epoch(command)) => match configured(arguments.config) {
            Ok((path, config)) => epoch(&path, &config, command).await,
            Err(exit) => Ok(exit),
        },
        Some(Command::Token(TokenCommand::Inspect { token })) => inspect(&token, arguments.config),
        Some(Command::CheckConfig { file }) => Ok(match configured(Some(file)) {
            Ok((path, _)) => {
                println!("{} is a sound configuration", path.display());
                ExitCode::SUCCESS
            }
            Err(exit) => exit,
        }),
    }
}

/// The configuration, or what to exit with: everything that is wrong with it was said.
fn configured(path: Option<PathBuf>) -> Result<(PathBuf, GatewayConfig), ExitCode> {
    let Some(path) = path else {
        eprintln!("a configuration is needed: --config or GATEWAY_CONFIG");
        return Err(ExitCode::from(EXIT_CODE));
    };
    match load::<GatewayConfig>(&path, "GATEWAY", std::env::vars()) {
        Ok(config) => Ok((path, config)),
        Err(error) => {
            eprintln!("{:#}", anyhow::Error::new(error));
            Err(ExitCode::from(EXIT_CODE))
        }
    }
}

fn inspect(token: &str, path: Option<PathBuf>) -> anyhow::Result<ExitCode> {
    let config = match path.map(|path| configured(Some(path))).transpose() {
        Ok(config) => config.map(|(_, config)| config),
        Err(exit) => return Ok(exit),
    };
    let inspected = gateway::inspect(token, config.as_ref());
    std::io::stdout().write_all(inspected.text.as_bytes())?;
    Ok(if inspected.is_sound { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn epoch(
    path: &Path,
    config: &GatewayConfig,
    command: EpochCommand,
) -> anyhow::Result<ExitCode> {
    telemetry::init_logs(&config.logs)?;
    let printed = operator::epoch(config, path, command).await?;
    std::io::stdout().write_all(printed.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(config: GatewayConfig) -> anyhow::Result<ExitCode> {
    telemetry::init_logs(&config.logs)?;
    tracing::info!(?config, "configuration");
    let stop = shutdown::on_signal()?;
    let domain = orders::domain().context("the domain is not well formed")?;
    let running = gateway::start(config, domain, stop).await?;
    let finished = running.ended().await;
    Ok(if finished { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
