//! Reads of rows with a token, another one each time, against bare hyper servers that answer with the
//! same headers: one that has the bytes in memory, and one that runs the same prepared statement.
//!
//! The gateway opens and judges each token, checks again in the rows' snapshot, and seals a new one; the
//! baselines do none of it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use compose::local::REGION_DATABASE;
use compose::ports;
use compose::process::Child;
use tempfile::TempDir;
use tokio::sync::Mutex;

use crate::Plan;
use crate::bare::{self, Database, Template};
use crate::events;
use crate::http::Connection;
use crate::load::{Load, closed_loop};
use crate::pairs::{Sample, Side, interleave};
use crate::report::{Goal, Line, median};
use crate::seed::{self, Tokens};
use crate::servers::{Primary, Setup};

/// What is read, and how.
#[derive(Debug, Clone, Copy)]
pub struct Reads {
    name: &'static str,
    key_count: u64,
    connection_count: usize,
    /// Of the gateway.
    settings: &'static [(&'static str, &'static str)],
    /// Whether the baseline asks the database.
    asks_database: bool,
    ratio_min: f64,
}

/// Rows in memory.
pub const CACHED: Reads = Reads {
    name: "fresh_read_cached",
    key_count: 10_000,
    connection_count: 64,
    settings: &[],
    asks_database: false,
    ratio_min: 0.65,
};

/// Rows from the database, each asked for by itself.
pub const DATABASE: Reads = Reads {
    name: "fresh_read_db",
    key_count: 100_000,
    connection_count: 64,
    settings: &[("GATEWAY__READ__MEMORY_BYTES_MAX", "0"), ("GATEWAY__READ__GATHER", "false")],
    asks_database: true,
    ratio_min: 0.85,
};

/// Rows from the database, asked for together.
pub const GATHERED: Reads = Reads {
    name: "fresh_read_gathered",
    key_count: 100_000,
    connection_count: 256,
    settings: &[("GATEWAY__READ__MEMORY_BYTES_MAX", "0")],
    asks_database: true,
    ratio_min: 1.3,
};

const DURATION: Duration = Duration::from_secs(2);

impl Reads {
    /// As in the report.
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// Reads a second.
    pub async fn measure(self, plan: Plan) -> anyhow::Result<Vec<Line>> {
        let world = World::start(self).await?;
        let kept = Mutex::new(Vec::new());
        let read = async |lanes: &Mutex<Vec<Reading>>| {
            closed_loop(&mut lanes.lock().await, DURATION, Reading::read).await
        };
        let pairs = interleave(plan.pairs, async |side| {
            let load = match side {
                Side::Ours => read(&world.ours).await?,
                Side::Baseline => {
                    if let Some(lanes) = &world.keeping {
                        kept.lock().await.push(read(lanes).await?.rate());
                    }
                    read(&world.bare).await?
                }
            };
            Ok(Sample { value: load.rate(), remark: remark(&load) })
        });
        let line = pairs.await?.into_line(self.name, "reads/s", Goal::RatioMin(self.ratio_min));
        // The first did not count for the others either.
        let kept = kept.into_inner();
        Ok(vec![match median(kept.get(1..).unwrap_or_default()) {
            Some(kept) => line.noting(format!(
                "the bare server with connections kept at hand, as ours: {kept:.0} reads/s"
            )),
            None => line,
        }])
    }
}

fn remark(load: &Load) -> String {
    format!("({:.2} ms at the median)", load.latency_ms(0.5))
}

struct World {
    ours: Mutex<Vec<Reading>>,
    bare: Mutex<Vec<Reading>>,
    /// The bare server that keeps its connections at hand.
    keeping: Option<Mutex<Vec<Reading>>>,
    _bare_servers: Vec<Child>,
    _primary: Primary,
    _folder: TempDir,
}

impl World {
    async fn start(reads: Reads) -> anyhow::Result<Self> {
        let setup = Setup {
            gateway_settings: reads.settings.to_vec(),
            has_projector: true,
            ..Setup::default()
        };
        let primary = Primary::start(setup).await?;
        let head = seed::place(&primary, (0..reads.key_count).map(events::order_id)).await?;
        let tokens = Arc::new(Tokens::new(&primary, head)?);
        let folder = tempfile::tempdir()?;
        let mut first = Reading::open(primary.address, 1, reads.key_count, &tokens).await?;
        let template = Template::of(&first[0].exchange().await?);
        let [bare, keeping] =
            ports::free_many()?.map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let url = primary.postgres.url(REGION_DATABASE);
        let database = |keeps| Database { url: url.clone(), keeps };
        let pooled = reads.asks_database.then(|| database(false));
        let start =
            async |listen, database| bare::start(folder.path(), listen, &template, database).await;
        let mut bare_servers = vec![start(bare, pooled).await?];
        if reads.asks_database {
            bare_servers.push(start(keeping, Some(database(true))).await?);
        }
        let lanes = async |address| {
            Reading::open(address, reads.connection_count, reads.key_count, &tokens).await
        };
        Ok(Self {
            ours: Mutex::new(lanes(primary.address).await?),
            bare: Mutex::new(lanes(bare).await?),
            keeping: match reads.asks_database {
                true => Some(Mutex::new(lanes(keeping).await?)),
                false => None,
            },
            _bare_servers: bare_servers,
            _primary: primary,
            _folder: folder,
        })
    }
}

/// A connection that reads one row after another.
struct Reading {
    connection: Connection,
    tokens: Arc<Tokens>,
    key_count: u64,
    /// Counts requests; starts elsewhere on every connection.
    nth: u64,
}

impl Reading {
    async fn open(
        address: SocketAddr,
        count: usize,
        key_count: u64,
        tokens: &Arc<Tokens>,
    ) -> anyhow::Result<Vec<Self>> {
        let connections = Connection::open_many(address, count).await?;
        let reading = (0..).zip(connections).map(|(lane, connection)| Self {
            connection,
            tokens: Arc::clone(tokens),
            key_count,
            nth: lane << 32,
        });
        Ok(reading.collect())
    }

    async fn exchange(&mut self) -> anyhow::Result<crate::http::Answer<'_>> {
        self.nth += 1;
        // Spreads requests over the keys without a pattern that a cache could follow.
        let key = events::order_id(self.nth.wrapping_mul(0x9E37_79B9_7F4A_7C15) % self.key_count);
        let token = self.tokens.nth(self.nth)?;
        let request = format!(
            "GET /v1/views/order-detail/{key} HTTP/1.1\r\nhost: bench\r\n\
             consistency-token: {token}\r\n\r\n"
        );
        self.connection.exchange(request.as_bytes()).await?.succeeded()
    }

    async fn read(&mut self) -> anyhow::Result<()> {
        let answer = self.exchange().await?;
        let status = answer.header("consistency-status").unwrap_or_default();
        ensure!(status.starts_with("local"), "not served at once from here: {status}");
        ensure!(answer.body.starts_with(b"{\"key\":"), "no row");
        Ok(())
    }
}
