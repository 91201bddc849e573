//! Three regions on this machine, without Docker.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use compose::local::{Plan, Stack};
use compose::postgres::{self, Cluster};
use compose::{demo, docker, tools};
use tokio::signal::unix::{SignalKind, signal};

/// Starts three regions as plain processes, with an emulated WAN between them.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tells the read-your-writes story step by step, then stops.
    Demo(Ports),
    /// Starts the regions and stays until Ctrl-C.
    Up {
        #[command(flatten)]
        ports: Ports,
        /// Where to write the addresses, as JSON.
        #[arg(long)]
        addresses_file: Option<PathBuf>,
    },
    /// Starts the regions, runs a program with their addresses in its environment (`URL_US_EAST`, `URL_EU_WEST`,
    /// `URL_ASIA_SOUTH`, `URL_PROXY`), stops, and ends as the program did.
    Run {
        #[command(flatten)]
        ports: Ports,
        /// The program and its arguments.
        #[arg(trailing_var_arg = true, required = true)]
        program: Vec<String>,
    },
    /// Writes the configurations for Docker into the checkout.
    Render,
    /// Runs a program with `DATABASE_URL` of a database that has all migrations, as compiling checked statements
    /// needs it.
    WithDatabase {
        /// The program and its arguments.
        #[arg(trailing_var_arg = true, required = true)]
        program: Vec<String>,
    },
}

#[derive(Debug, Args)]
struct Ports {
    /// The first of four ports: three gateways and the API of the proxies. Free ports unless set.
    #[arg(long)]
    first_port: Option<u16>,
}

#[tokio::main]
async fn main() -> ExitCode {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    obey(Arguments::parse().command).await.unwrap_or_else(|error| {
        eprintln!("{error:#}");
        ExitCode::FAILURE
    })
}

async fn obey(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Demo(ports) => with_stack(ports, async |stack| tell(stack).await).await,
        Command::Up { ports, addresses_file } => {
            with_stack(ports, async |stack| stay(stack, addresses_file.as_ref()).await).await
        }
        Command::Run { ports, program } => {
            with_stack(ports, async |stack| run(stack, &program).await).await
        }
        Command::WithDatabase { program } => with_database(&program).await,
        Command::Render => docker::render().map(|()| ExitCode::SUCCESS).map_err(Into::into),
    }
}

/// Starts the regions, does something with them, and stops them, whatever becomes of it.
async fn with_stack(
    ports: Ports,
    act: impl AsyncFnOnce(&Stack) -> anyhow::Result<ExitCode>,
) -> anyhow::Result<ExitCode> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let interrupted = async {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    tokio::pin!(interrupted);
    let postgres = postgres::Options { durable: true, ..postgres::Options::default() };
    let plan = Plan { first_port: ports.first_port, postgres, ..Plan::default() };
    let mut stack = tokio::select! {
        biased;
        // What has been started ends with the unfinished start.
        () = &mut interrupted => return Ok(ExitCode::FAILURE),
        stack = Box::pin(Stack::start(plan)) => stack.context("the regions did not start")?,
    };
    let result = tokio::select! {
        biased;
        () = &mut interrupted => Ok(ExitCode::SUCCESS),
        result = act(&stack) => result,
    };
    if !matches!(&result, Ok(code) if *code == ExitCode::SUCCESS) {
        stack.keep_logs();
    }
    stack.stop().await.context("the regions did not stop in order")?;
    result
}

async fn tell(stack: &Stack) -> anyhow::Result<ExitCode> {
    let promised = demo::tell(stack).await?;
    Ok(if promised { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Until it is interrupted, or a service falls.
async fn stay(stack: &Stack, addresses_file: Option<&PathBuf>) -> anyhow::Result<ExitCode> {
    let addresses = stack.addresses();
    if let Some(file) = addresses_file {
        std::fs::write(file, serde_json::to_string_pretty(&addresses)?)
            .with_context(|| format!("could not write {}", file.display()))?;
    }
    for (name, region) in &addresses.regions {
        println!(
            "{name:<12} gateway {}   admin {}   projector {}",
            region.gateway, region.gateway_admin, region.projector_admin
        );
    }
    println!("{:<12} {}   (Toxiproxy's HTTP API)", "proxies", addresses.proxy);
    println!("{:<12} {}\n", "logs", addresses.folder.display());
    let europe = &addresses.regions["eu-west"].gateway;
    let json = "-H 'Content-Type: application/json'";
    println!(
        "curl -si {europe}/v1/commands/RegisterCustomer {json} -d '{{\"customer_id\":\"ada\",\"name\":\"Ada\"}}'"
    );
    println!("curl -si {europe}/v1/currency");
    println!("curl -si {}/proxies/events-eu-west -d '{{\"enabled\":false}}'", addresses.proxy);
    let config = addresses.folder.join("eu-west/region-projector.toml");
    let projector = std::env::current_exe()?.with_file_name("region-projector");
    println!("{} --config {} status", projector.display(), config.display());
    println!("\nCtrl-C stops everything");
    loop {
        if let Some(fallen) = stack.fallen() {
            eprintln!("{fallen}");
            return Ok(ExitCode::FAILURE);
        }
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    }
}

async fn run(stack: &Stack, program: &[String]) -> anyhow::Result<ExitCode> {
    let addresses = stack.addresses();
    let mut variables = vec![("URL_PROXY".to_owned(), addresses.proxy.clone())];
    for (name, region) in &addresses.regions {
        let variable = format!("URL_{}", name.to_uppercase().replace('-', "_"));
        variables.push((variable, region.gateway.clone()));
    }
    let code = run_program(program, variables).await?;
    if let Some(fallen) = stack.fallen() {
        eprintln!("{fallen}");
        return Ok(ExitCode::FAILURE);
    }
    Ok(code)
}

async fn with_database(program: &[String]) -> anyhow::Result<ExitCode> {
    const DATABASE: &str = "tidemark";
    let cluster = Cluster::start(postgres::Options::default()).await?;
    let url = cluster.create_database(DATABASE).await?;
    for schema in ["primary", "region"] {
        let folder = tools::repository().join("migrations").join(schema);
        let entries = std::fs::read_dir(&folder)?.collect::<Result<Vec<_>, _>>()?;
        let mut files: Vec<PathBuf> = entries.into_iter().map(|entry| entry.path()).collect();
        files.sort();
        for file in files {
            cluster.run_file(DATABASE, &file).await?;
        }
    }
    let code = run_program(program, vec![("DATABASE_URL".to_owned(), url)]).await?;
    Ok(code)
}

async fn run_program(
    program: &[String],
    variables: Vec<(String, String)>,
) -> anyhow::Result<ExitCode> {
    let (path, arguments) = program.split_first().context("no program to run")?;
    let mut command = tokio::process::Command::new(path);
    command.args(arguments).envs(variables).kill_on_drop(true);
    let status = command.status().await.with_context(|| format!("could not run {path}"))?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}
