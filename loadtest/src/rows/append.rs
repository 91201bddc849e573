//! Appends through a gateway against plain inserts into the same Postgres.
//!
//! The baseline is what a service without an event store would do: one insert of the same event, one
//! transaction, into a table with the log's columns and indexes but for the order of commits, which it
//! does not promise. Ours answers over HTTP with a token, assigns dense positions, and publishes to NATS
//! meanwhile.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::ensure;
use async_nats::jetstream;
use compose::local::LOG_DATABASE;
use sqlx::{Connection as _, PgConnection, PgPool};
use tokio::sync::Mutex;
use uuid::Uuid;

use crate::Plan;
use crate::http::Connection;
use crate::load::{Load, closed_loop};
use crate::pairs::{Sample, Side, interleave};
use crate::report::{Goal, Line};
use crate::servers::{self, Primary, Setup};

pub const HTTP: &str = "append_http";
pub const LATENCY: &str = "append_latency";

const CONNECTION_COUNT: usize = 256;
/// How many clients the baseline is tried with; the best of them is what ours is compared with.
const CLIENT_COUNTS: [usize; 4] = [1, 8, 64, 256];
const OURS_DURATION: Duration = Duration::from_secs(2);
const CLIENTS_DURATION: Duration = Duration::from_millis(750);
const LATENCY_DURATION: Duration = Duration::from_millis(1500);
/// Events of one aggregate before the next begins.
const EVENTS_PER_AGGREGATE: u64 = 5;
const DATA: &str = r#"{"product_id":"p-1234","product_name":"Tide table for the northern sea","unit_price_cents":2500,"quantity":2}"#;

/// Appends a second.
pub async fn http(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let world = World::start(CONNECTION_COUNT, 256).await?;
    let pairs = interleave(plan.pairs, async |side| match side {
        Side::Ours => {
            let load = world.append(OURS_DURATION).await?;
            Ok(Sample { value: load.rate(), remark: String::new() })
        }
        Side::Baseline => {
            let mut best = (0.0, 0);
            for count in CLIENT_COUNTS {
                let rate = world.insert(count, CLIENTS_DURATION).await?.rate();
                best = if best.0 < rate { (rate, count) } else { best };
            }
            Ok(Sample { value: best.0, remark: format!("with {} clients", best.1) })
        }
    });
    Ok(vec![pairs.await?.into_line(HTTP, "appends/s", Goal::RatioMin(2.0))])
}

/// The median of one append at a time.
pub async fn latency(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let world = World::start(1, 1).await?;
    let pairs = interleave(plan.pairs, async |side| {
        let load = match side {
            Side::Ours => world.append(LATENCY_DURATION).await?,
            Side::Baseline => world.insert(1, LATENCY_DURATION).await?,
        };
        Ok(Sample::plain(load.latency_ms(0.5)))
    });
    Ok(vec![pairs.await?.into_line(LATENCY, "ms at the median", Goal::RatioMax(2.0))])
}

struct World {
    primary: Primary,
    log: PgPool,
    nats: jetstream::Context,
    appending: Mutex<Vec<Appending>>,
    inserting: Mutex<Vec<Inserting>>,
}

impl World {
    async fn start(appending_count: usize, inserting_count: usize) -> anyhow::Result<Self> {
        let primary = Primary::start(Setup::default()).await?;
        let log = servers::pool(&primary.postgres.url(LOG_DATABASE)).await?;
        let nats = servers::operator(&primary.nats).await?;
        let url = primary.postgres.create_database("plain").await?;
        let table = include_str!("append/plain.sql");
        sqlx::raw_sql(table).execute(&mut PgConnection::connect(&url).await?).await?;
        let mut inserting = Vec::new();
        for lane in 0..inserting_count {
            inserting.push(Inserting {
                lane,
                sent: 0,
                connection: PgConnection::connect(&url).await?,
            });
        }
        let appending = Connection::open_many(primary.address, appending_count).await?;
        let lanes = appending.into_iter().enumerate();
        let appending = lanes.map(|(lane, connection)| Appending { lane, sent: 0, connection });
        let appending = Mutex::new(appending.collect());
        Ok(Self { primary, log, nats, appending, inserting: Mutex::new(inserting) })
    }

    async fn append(&self, duration: Duration) -> anyhow::Result<Load> {
        let mut lanes = self.appending.lock().await;
        let load = closed_loop(&mut lanes, duration, Appending::append).await?;
        self.primary.settle(&self.log, &self.nats).await?;
        Ok(load)
    }

    async fn insert(&self, count: usize, duration: Duration) -> anyhow::Result<Load> {
        let mut lanes = self.inserting.lock().await;
        closed_loop(&mut lanes[..count], duration, Inserting::insert).await
    }
}

/// One connection to the gateway.
struct Appending {
    lane: usize,
    sent: u64,
    connection: Connection,
}

impl Appending {
    async fn append(&mut self) -> anyhow::Result<()> {
        let mut request = String::with_capacity(512);
        let body = format!(r#"{{"events":[{{"type":"ItemAdded","data":{DATA}}}]}}"#);
        write!(
            request,
            "POST /v1/aggregates/order/{}-{}/events HTTP/1.1\r\nhost: bench\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            self.lane,
            self.sent / EVENTS_PER_AGGREGATE,
            body.len(),
        )?;
        self.sent += 1;
        let answer = self.connection.exchange(request.as_bytes()).await?.succeeded()?;
        ensure!(answer.header("consistency-token").is_some(), "a write without a token");
        Ok(())
    }
}

/// One client of the baseline.
struct Inserting {
    lane: usize,
    sent: u64,
    connection: PgConnection,
}

impl Inserting {
    async fn insert(&mut self) -> anyhow::Result<()> {
        let (aggregate, version) =
            (self.sent / EVENTS_PER_AGGREGATE, self.sent % EVENTS_PER_AGGREGATE + 1);
        self.sent += 1;
        let request_id = Uuid::now_v7();
        sqlx::query(
            "insert into plain_event (
                 id, aggregate_type, aggregate_id, version, event_type, schema_version,
                 correlation_id, causation_id, data
             ) values ($1, 'order', $2, $3, 'ItemAdded', 1, $4, $4, $5::text::json)",
        )
        .bind(Uuid::now_v7())
        .bind(format!("{}-{aggregate}", self.lane))
        .bind(i64::try_from(version)?)
        .bind(request_id)
        .bind(DATA)
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }
}
