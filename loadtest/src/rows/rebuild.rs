//! A read model built anew from its log and switched to, against the projector that applies the same log.
//!
//! Both are of one database: the projector makes the version that is read, and the rebuild a second one
//! beside it, which takes over only if both hold the same, row by row. So each pair is a check as well.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use compose::nats::Server;
use compose::process::{Child, Program};
use consistency::Position;
use tokio::time::{Instant, sleep};

use super::project;
use crate::Plan;
use crate::events::{self, EVENTS_PER_ORDER};
use crate::pairs::Pairs;
use crate::report::{Goal, Line};
use crate::servers::{self, PATIENCE};
use crate::stream::{self, Message};

pub const NAME: &str = "rebuild";

/// Peak memory of the process that rebuilds, in MiB.
const PEAK_MIB_MAX: u64 = 1024;
const LOOK: Duration = Duration::from_millis(20);

/// Events a second.
pub async fn measure(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let count = plan.rebuild_events;
    let (postgres, nats) =
        tokio::try_join!(servers::durable_postgres(), async { Ok(Server::start_single().await?) })?;
    let operator = servers::operator(&nats).await?;
    stream::create(&operator).await?;
    let messages = (0..count).map(|place| events::at(place).map(Message::of));
    stream::publish(&operator, messages.filter_map(Result::ok)).await?;
    let head = Position::new(count).context("positions are small")?;
    let (secrets, domain) = (servers::secrets(), project::domain()?);
    let folder = tempfile::tempdir()?;
    let (mut pairs, mut peak_mib) = (Pairs::default(), 0);
    for pair in 0..=plan.pairs {
        let database = project::fresh_database(&postgres, &domain, &secrets).await?;
        let settings = project::settings(&nats, &secrets, &database)?;
        let projected = project::project(&settings, &domain, head).await?;
        let config = folder.path().join("region-projector.toml");
        std::fs::write(&config, settings.to_string())?;
        let began = Instant::now();
        let peak = run(&config, &["rebuild", "orders"], count).await?;
        let folded = began.elapsed();
        run(&config, &["switch", "orders"], count).await?;
        let elapsed = began.elapsed();
        project::drop_database(&postgres, &database).await?;
        let rate = |elapsed: Duration| count as f64 / elapsed.as_secs_f64();
        eprintln!(
            "  {pair}/{} ours {:.0} (rebuild alone {:.0}, peak {peak} MiB)   baseline {:.0}",
            plan.pairs,
            rate(elapsed),
            rate(folded),
            rate(projected)
        );
        ensure!(peak <= PEAK_MIB_MAX, "{peak} MiB at its peak");
        peak_mib = peak_mib.max(peak);
        if 0 < pair {
            pairs.ours.push(rate(elapsed));
            pairs.baseline.push(rate(projected));
        }
    }
    let orders = count / EVENTS_PER_ORDER;
    let note = format!("{count} events, {orders} orders, peak memory {peak_mib} MiB");
    Ok(vec![pairs.into_line(NAME, "events/s", Goal::RatioMin(2.0)).noting(note)])
}

/// Runs a command of the projector's to its end, and says how many MiB it took at its peak.
async fn run(config: &Path, words: &[&str], event_count: u64) -> anyhow::Result<u64> {
    let log = config.with_extension("log");
    let program = Program::new(words[0], servers::binary("region-projector")?, log);
    let child = program.arg("--config").arg(config).args(words).spawn()?;
    let end = Instant::now() + 10 * PATIENCE + Duration::from_millis(event_count / 10);
    let mut peak_kib = 0;
    while child.is_running() {
        peak_kib = peak_kib.max(peak_of(&child).unwrap_or_default());
        ensure!(Instant::now() < end, "{} takes too long: {}", words[0], child.log_tail());
        sleep(LOOK).await;
    }
    let status = child.exit_status().context("it has ended")?;
    ensure!(status.success(), "{} failed: {}", words[0], child.log_tail());
    Ok(peak_kib / 1024)
}

fn peak_of(child: &Child) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.pid())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse().ok()
}
