//! A read model full of orders, as a log, a relay and a projector made it, and tokens of who has seen it.

use anyhow::Context as _;
use compose::local::{LOG_DATABASE, REGION_DATABASE};
use consistency::{
    AggregateId, Claim, Epoch, EventId, Key, KeyId, KeyRing, LogId, Name, Position, SchemaVersion,
    Token, Version,
};
use event_store::{Append, EventStore, Expected, NewEvent, StoreConfig, Timeouts};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use process::postgres::PostgresConfig;
use uuid::Uuid;

use crate::events;
use crate::servers::{self, Primary};

const APPENDS_AT_ONCE: usize = 1000;
/// Of `OrderPlaced`: the third says what it costs.
const SCHEMA_VERSION: SchemaVersion = SchemaVersion::new(3).expect("three is above zero");

/// Appends the first event of each of these orders, and waits until the region has applied them.
/// Answers the log's head.
pub async fn place(
    primary: &Primary,
    ids: impl IntoIterator<Item = String>,
) -> anyhow::Result<Position> {
    let database = PostgresConfig::new(primary.postgres.url(LOG_DATABASE));
    let timeouts = Timeouts::default();
    let pool = process::postgres::connect_with(&database, "bench", |it| timeouts.apply(it))?;
    let config = StoreConfig::new(LogId::new(primary.secrets.log_id));
    let (store, committer) = EventStore::open(pool.clone(), config).await?;
    stream::iter((0..).zip(ids))
        .map(async |(order, id)| {
            let appended = store.append(placed(order, id)?).await;
            appended.map_err(anyhow::Error::from).map(drop)
        })
        .buffer_unordered(APPENDS_AT_ONCE)
        .try_collect::<()>()
        .await?;
    let head = store.head().await?.at.position;
    committer.stop().await;
    pool.close().await;
    applied(primary, head).await?;
    Ok(head)
}

/// Waits until every projection has applied everything up to a position.
async fn applied(primary: &Primary, head: Position) -> anyhow::Result<()> {
    let pool = servers::pool(&primary.postgres.url(REGION_DATABASE)).await?;
    servers::until("the region has applied everything", async || {
        let lowest = sqlx::query_scalar("select coalesce(min(position), 0) from checkpoint");
        let lowest: i64 = lowest.fetch_one(&pool).await?;
        Ok(head.as_i64() <= lowest)
    })
    .await
}

fn placed(order: u64, id: String) -> anyhow::Result<Append> {
    let (event_type, data) = events::nth_of(order, 0)?;
    let event = NewEvent {
        id: EventId::new(Uuid::now_v7()),
        event_type,
        schema_version: SCHEMA_VERSION,
        data,
    };
    Ok(Append {
        aggregate: AggregateId::new(Name::new("order")?, id)?,
        expected: Expected::Any,
        events: vec![event],
        correlation_id: Uuid::now_v7(),
        causation_id: Uuid::now_v7(),
        idempotency_key_hash: None,
        traceparent: None,
    })
}

/// The body of a request that places an order.
pub fn placing(order: u64) -> anyhow::Result<String> {
    let (event_type, data) = events::nth_of(order, 0)?;
    Ok(format!(
        r#"{{"events":[{{"type":"{event_type}","schema_version":{},"data":{data}}}]}}"#,
        SCHEMA_VERSION.get()
    ))
}

/// The whole request that appends the first event of `id`, which is as that of the order of this number.
pub fn write_request(id: &str, order: u64) -> anyhow::Result<String> {
    let body = placing(order)?;
    Ok(format!(
        "POST /v1/aggregates/order/{id}/events HTTP/1.1\r\nhost: bench\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ))
}

/// The whole request that reads it with the token of its write, and waits.
pub fn read_request(id: &str, token: &str) -> String {
    format!(
        "GET /v1/views/order-detail/{id} HTTP/1.1\r\nhost: bench\r\n\
         consistency-token: {token}\r\nconsistency-policy: wait;ms=5000\r\n\r\n"
    )
}

/// Seals tokens as the gateway does.
#[derive(Debug)]
pub struct Tokens {
    ring: KeyRing,
    head: Position,
}

impl Tokens {
    /// Of callers who have seen the log up to `head`, or some of it.
    pub fn new(primary: &Primary, head: Position) -> anyhow::Result<Self> {
        let secrets = &primary.secrets;
        let key = Key::new(KeyId(1), secrets.token_key.as_bytes())?;
        let ring = KeyRing::new(LogId::new(secrets.log_id), vec![key], KeyId(1))?;
        Ok(Self { ring, head })
    }

    /// The `n`th token: each is another one.
    pub fn nth(&self, n: u64) -> anyhow::Result<String> {
        let seen = Position::new(1 + n % self.head.get()).context("positions are small")?;
        let other = AggregateId::new(Name::new("order")?, format!("other-{n}"))?;
        let claim = Claim { aggregate: other.key(), version: Version::ZERO.next(), position: seen };
        Ok(self.ring.seal(&Token::new(Epoch::FIRST).with_read(seen).with_claim(claim)))
    }

    /// The token of who has read at a position.
    pub fn at(&self, position: Position) -> String {
        self.ring.seal(&Token::new(Epoch::FIRST).with_read(position))
    }
}
