//! Speed, measured as ratios in one run: each row is the median of interleaved pairs of ours and a
//! baseline on the same servers, minutes apart at most.
//!
//! What a row measures, and against what, is said at the top of its module in [`rows`].

mod bare;
mod events;
mod http;
mod load;
mod pairs;
mod report;
mod rows;
mod seed;
mod servers;
mod stream;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use bare::Bare;
use clap::Parser;
use mimalloc::MiMalloc;
use report::Report;
use rows::Row;

// As the services have it, since some rows run their parts in this process.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

/// Measures, prints a Markdown table and writes a report.
#[derive(Debug, Parser)]
struct Arguments {
    /// The rows to measure, separated by commas; all unless set.
    #[arg(long, value_delimiter = ',')]
    only: Vec<Row>,
    #[command(flatten)]
    plan: Plan,
    /// Where the report goes; `target/bench/report.json` of the checkout unless set.
    #[arg(long)]
    report: Option<PathBuf>,
    /// Ends with an error when a goal is missed.
    #[arg(long)]
    check: bool,
    /// A baseline as a process of its own.
    #[command(subcommand)]
    bare: Option<Bare>,
}

/// How much is measured.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Plan {
    /// Pairs of one measurement of ours and one of the baseline.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Events of the backlog of `project_documents`.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(50_000..))]
    project_events: u64,
    /// Events of the log of `rebuild`; ten million is the full one.
    #[arg(long, default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(50_000..))]
    rebuild_events: u64,
}

fn main() -> anyhow::Result<ExitCode> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::new("error"))
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    if let Some(bare) = arguments.bare {
        // With as many threads as a service has.
        let runtime = tokio::runtime::Runtime::new()?;
        return runtime.block_on(bare.serve()).map(|()| ExitCode::SUCCESS);
    }
    let wanted = if arguments.only.is_empty() { Row::ALL.to_vec() } else { arguments.only };
    let file = arguments.report.unwrap_or_else(report::default_file);
    let mut report = Report::default();
    let mut failed = false;
    for row in wanted {
        eprintln!("measuring {}", row.name());
        match row.measure(arguments.plan).with_context(|| format!("{} failed", row.name())) {
            Ok(lines) => report.add(lines),
            Err(error) => {
                eprintln!("{error:?}");
                failed = true;
            }
        }
        report.write(&file)?;
    }
    println!("{report}");
    let missed = report.missed();
    for name in &missed {
        println!("goal missed: {name}");
    }
    let wrong = failed || (arguments.check && !missed.is_empty());
    Ok(if wrong { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}
