//! Write through Europe, read in Europe with the token: three regions, with 80 ms between Europe and
//! the primary, against an echo through the same proxy with the same distance.
//!
//! The write has to cross the ocean and back, and so does the echo. What is added is everything else: the
//! commit, the event's own way to Europe, its projection there and the read.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use compose::local::{Plan as StackPlan, REGIONS, Stack};
use compose::ports;
use compose::postgres;
use compose::process::Child;
use compose::proxy::{Stream, Toxic};
use tempfile::TempDir;
use tokio::sync::Mutex;

use crate::Plan;
use crate::bare::{self, Template};
use crate::http::Connection;
use crate::load::{Load, closed_loop};
use crate::pairs::{Sample, Side, interleave};
use crate::report::{Goal, Line};
use crate::seed;

pub const NAME: &str = "ryw_end_to_end";
const P99_NAME: &str = "ryw_end_to_end_p99";

/// Few enough that three regions on one machine have processor to spare: what is asked is how long it takes,
/// not how long a queue gets.
const LANE_COUNT: usize = 2;
const DURATION: Duration = Duration::from_secs(8);
const ADDED_MS_MAX: f64 = 10.0;
const ADDED_P99_MS_MAX: f64 = 25.0;

/// Milliseconds that are added, at the median and at the 99th percentile. An echo's median is taken off
/// both.
pub async fn measure(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let world = Box::pin(World::start()).await?;
    let tails = Mutex::new(Vec::new());
    let pairs = interleave(plan.pairs, async |side| {
        let load = world.run(side).await?;
        if side == Side::Ours {
            tails.lock().await.push(load.latency_ms(0.99));
        }
        let remark = format!("({:.2} ms at the 99th percentile)", load.latency_ms(0.99));
        Ok(Sample { value: load.latency_ms(0.5), remark })
    })
    .await?;
    // The first pair was the warm-up.
    let tails = tails.into_inner().into_iter().skip(1);
    let added = pairs.ours.iter().zip(&pairs.baseline).map(|(ours, echo)| ours - echo);
    let added_tails = tails.zip(&pairs.baseline).map(|(ours, echo)| ours - echo);
    let note = format!(
        "write and read took {:?} ms, the echo {:?} ms, at the median",
        pairs.ours, pairs.baseline
    );
    let goal = Goal::ValueMax(ADDED_MS_MAX);
    let median = Line::new(NAME, "ms added at the median", added.collect(), vec![], goal);
    let goal = Goal::ValueMax(ADDED_P99_MS_MAX);
    let unit = "ms added at the 99th percentile";
    let tail = Line::new(P99_NAME, unit, added_tails.collect(), vec![], goal);
    world.stack.stop().await?;
    Ok(vec![median.noting(note), tail])
}

struct World {
    stack: Stack,
    callers: Mutex<Vec<Caller>>,
    echoes: Mutex<Vec<Connection>>,
    _echo_server: Child,
    _folder: TempDir,
}

impl World {
    async fn start() -> anyhow::Result<Self> {
        let (europe, round_trip_ms) = REGIONS[0];
        let postgres = postgres::Options { durable: true, ..postgres::Options::default() };
        let plan = StackPlan { postgres, ..StackPlan::default() };
        let stack = Stack::start(plan).await?;
        let folder = tempfile::tempdir()?;
        let [echo_port, proxy_port] = ports::free_many()?;
        let [echo, proxy] = [echo_port, proxy_port].map(|port| format!("127.0.0.1:{port}"));
        let answer = Template::new("text/plain", "echo");
        let echo_server = bare::start(folder.path(), echo.parse()?, &answer, None).await?;
        stack.proxies.create("echo", &proxy, &echo).await?;
        for (name, stream) in [("upstream", Stream::Upstream), ("downstream", Stream::Downstream)] {
            stack.proxies.add_toxic("echo", Toxic::latency(name, stream, round_trip_ms / 2))?;
        }
        let echoes = Connection::open_many(proxy.parse()?, LANE_COUNT).await?;
        let region = stack.region(europe).context("there is a region in Europe")?;
        let address = region.url.trim_start_matches("http://").parse()?;
        let connections = Connection::open_many(address, LANE_COUNT).await?;
        let callers =
            (0..).zip(connections).map(|(lane, connection)| Caller { lane, placed: 0, connection });
        let callers = Mutex::new(callers.collect());
        let echoes = Mutex::new(echoes);
        Ok(Self { stack, callers, echoes, _echo_server: echo_server, _folder: folder })
    }

    async fn run(&self, side: Side) -> anyhow::Result<Load> {
        match side {
            Side::Ours => {
                closed_loop(&mut self.callers.lock().await, DURATION, Caller::write_and_read).await
            }
            Side::Baseline => {
                closed_loop(&mut self.echoes.lock().await, DURATION, async |echo| {
                    let request = b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n";
                    echo.exchange(request).await?.succeeded().map(drop)
                })
                .await
            }
        }
    }
}

/// A caller in Europe.
struct Caller {
    lane: u64,
    placed: u64,
    connection: Connection,
}

impl Caller {
    async fn write_and_read(&mut self) -> anyhow::Result<()> {
        let order = format!("trip-{}-{}", self.lane, self.placed);
        let write = seed::write_request(&order, self.placed)?;
        self.placed += 1;
        let answer = self.connection.exchange(write.as_bytes()).await?.succeeded()?;
        let token = answer.header("consistency-token").context("a write has a token")?;
        let read = seed::read_request(&order, token);
        let answer = self.connection.exchange(read.as_bytes()).await?.succeeded()?;
        let status = answer.header("consistency-status").unwrap_or_default();
        let here = status.starts_with("waited") || status.starts_with("local");
        ensure!(here && answer.status == 200, "{} {status}", answer.status);
        Ok(())
    }
}
