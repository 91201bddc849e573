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
use crate::bare::{self, Template};
use crate::events;
use crate::http::Connection;
use crate::load::{Load, closed_loop};
use crate::pairs::{Sample, Side, interleave};
use crate::report::{Goal, Line};
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
        let pairs = interleave(plan.pairs, async |side| {
            let lanes = if side == Side::Ours { &world.ours } else { &world.bare };
            let load = closed_loop(&mut lanes.lock().await, DURATION, Reading::read).await?;
            Ok(Sample { value: load.rate(), remark: remark(&load) })
        });
        Ok(vec![pairs.await?.into_line(self.name, "reads/s", Goal::RatioMin(self.ratio_min))])
    }
}

fn remark(load: &Load) -> String {
    format!("({:.2} ms at the median)", load.latency_ms(0.5))
}

struct World {
    ours: Mutex<Vec<Reading>>,
    bare: Mutex<Vec<Reading>>,
    _bare_server: Child,
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
        let listen = SocketAddr::from(([127, 0, 0, 1], ports::free()?));
        let database = reads.asks_database.then(|| primary.postgres.url(REGION_DATABASE));
        let bare_server = bare::start(folder.path(), listen, &template, database).await?;
        let lanes = async |address| {
            Reading::open(address, reads.connection_count, reads.key_count, &tokens).await
        };
        Ok(Self {
            ours: Mutex::new(lanes(primary.address).await?),
            bare: Mutex::new(lanes(listen).await?),
            _bare_server: bare_server,
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
