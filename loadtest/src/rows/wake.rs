//! From the moment a projector's commit returns to the answer of the caller who waited for it.
//!
//! Each caller places an order and reads it at once with the token of the write. The projector logs
//! each commit, with a clock that this process shares; a read that had to wait counts from there.

use std::collections::BTreeMap;

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, ensure};
use consistency::PartitionCount;
use serde::Deserialize;
use tokio::sync::Mutex;

use crate::Plan;
use crate::http::Connection;
use crate::load::{closed_loop, percentile_ms};
use crate::report::{Goal, Line};
use crate::seed;
use crate::servers::{Primary, Setup, until};

pub const NAME: &str = "wait_wake";

const LANE_COUNT: usize = 2;
const DURATION: Duration = Duration::from_secs(4);
/// Of each caller, between an answer and its next write: how long a wake takes is asked here, not how long
/// a queue gets when the machine has no more to give.
const PAUSE: Duration = Duration::from_millis(30);
/// As the worked example has it.
const PARTITION_COUNT: u16 = 8;
const LOG_COMMITS: [(&str, &str); 2] = [
    ("PROJECTOR__LOGGING__FILTER", "info,region_projector::partition=debug"),
    ("PROJECTOR__LOGGING__FORMAT", "json"),
];

/// Milliseconds at the 99th percentile.
pub async fn measure(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let setup =
        Setup { projector_settings: LOG_COMMITS.to_vec(), has_projector: true, ..Setup::default() };
    let primary = Primary::start(setup).await?;
    let log = primary.projector.as_ref().context("there is a projector")?.log().to_owned();
    let mut lanes = Vec::new();
    for (lane, connection) in (0..).zip(Connection::open_many(primary.address, LANE_COUNT).await?) {
        lanes.push(Waiting { lane, placed: 0, connection, answered: Vec::new() });
    }
    let lanes = Mutex::new(lanes);
    let mut samples = Vec::new();
    for sample in 0..=plan.pairs {
        let mut lanes = lanes.lock().await;
        closed_loop(&mut lanes, DURATION, Waiting::place_and_read).await?;
        let answered = lanes.iter_mut().flat_map(|lane| std::mem::take(&mut lane.answered));
        let answered: Vec<Answered> = answered.collect();
        let mut wakes = wakes(&log, &answered).await?;
        let (median, p99) = (percentile_ms(&mut wakes, 0.5), percentile_ms(&mut wakes, 0.99));
        eprintln!(
            "  {sample}/{}  {p99:.2} ms at the 99th percentile, {median:.2} at the median, {} of {} waited",
            plan.pairs,
            wakes.len(),
            answered.len()
        );
        if 0 < sample {
            samples.push(p99);
        }
    }
    let line = Line::new(NAME, "ms at the 99th percentile", samples, vec![], Goal::ValueMax(3.0));
    Ok(vec![line.noting(format!(
        "{LANE_COUNT} callers, each with one write and its read, then {} ms of rest",
        PAUSE.as_millis()
    ))])
}

/// A caller.
struct Waiting {
    lane: u64,
    placed: u64,
    connection: Connection,
    answered: Vec<Answered>,
}

/// A read that was answered.
struct Answered {
    order: String,
    position: u64,
    /// Since 1970.
    at: Duration,
    waited: bool,
}

#[derive(Deserialize)]
struct Written {
    position: u64,
}

impl Waiting {
    async fn place_and_read(&mut self) -> anyhow::Result<()> {
        let order = format!("wake-{}-{}", self.lane, self.placed);
        let write = seed::write_request(&order, self.placed)?;
        self.placed += 1;
        let answer = self.connection.exchange(write.as_bytes()).await?.succeeded()?;
        let token = answer.header("consistency-token").context("a write has a token")?;
        let written: Written = serde_json::from_slice(answer.body)?;
        let read = seed::read_request(&order, token);
        let answer = self.connection.exchange(read.as_bytes()).await?.succeeded()?;
        let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let status = answer.header("consistency-status").unwrap_or_default();
        let waited = status.starts_with("waited");
        ensure!(waited || status.starts_with("local"), "answered as {status}");
        self.answered.push(Answered { order, position: written.position, at, waited });
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }
}

/// How long after the commit each of those who waited was answered.
async fn wakes(log: &Path, answered: &[Answered]) -> anyhow::Result<Vec<Duration>> {
    let last = answered.iter().max_by_key(|answer| answer.position).context("nobody read")?;
    let partitions = PartitionCount::new(PARTITION_COUNT).context("there are partitions")?;
    let commits = Mutex::new(Commits::default());
    until("the projector has logged its commits", async || {
        let mut commits = commits.lock().await;
        commits.read(log)?;
        Ok(commits.of(partitions.partition_of(&last.order), last.position).is_some())
    })
    .await?;
    let commits = commits.into_inner();
    let waited = answered.iter().filter(|answer| answer.waited);
    waited
        .map(|answer| {
            let partition = partitions.partition_of(&answer.order);
            let committed = commits.of(partition, answer.position).context("it was committed")?;
            // Clocks of two processors may differ by less than can be measured here.
            Ok(answer.at.saturating_sub(committed))
        })
        .collect()
}

/// When the partitions of orders committed what, since 1970.
#[derive(Default)]
struct Commits {
    by_partition: BTreeMap<(u16, u64), Duration>,
}

#[derive(Deserialize)]
struct LogLine {
    timestamp: String,
    version: Option<String>,
    partition: Option<u16>,
    committed: Option<u64>,
}

impl Commits {
    /// When the first commit at or past a position returned.
    fn of(&self, partition: u16, position: u64) -> Option<Duration> {
        let later = self.by_partition.range((partition, position)..=(partition, u64::MAX));
        later.map(|(_, at)| *at).next()
    }

    fn read(&mut self, log: &Path) -> anyhow::Result<()> {
        for line in std::fs::read_to_string(log)?.lines() {
            // What the process says before its log is set up is not JSON, nor is half a line.
            let Ok(line) = serde_json::from_str::<LogLine>(line) else { continue };
            let (Some("orders v1"), Some(partition), Some(committed)) =
                (line.version.as_deref(), line.partition, line.committed)
            else {
                continue;
            };
            let at: jiff::Timestamp = line.timestamp.parse()?;
            let at = Duration::from_micros(u64::try_from(at.as_microsecond())?);
            self.by_partition.insert((partition, committed), at);
        }
        Ok(())
    }
}
