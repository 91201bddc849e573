//! Servers, stores and events for the tests.

use std::time::Duration;

use compose::postgres::{Cluster, Options};
use consistency::{AggregateId, EventId, LogId, Name, Position, SchemaVersion, Version};
use event_store::{
    Append, AppendError, Appended, Committer, EventStore, Expected, NewEvent, StoreConfig, Timeouts,
};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{PgPool, Postgres, Transaction};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

pub const DEADLINE: Duration = Duration::from_secs(30);
pub const LOG_ID: LogId = LogId::new(Uuid::from_u128(0x7469_6465));

/// A cluster with a migrated log.
pub struct Database {
    pub cluster: Cluster,
    pub url: String,
}

impl Database {
    pub async fn start() -> Self {
        Self::of(Cluster::shared().await.unwrap()).await
    }

    /// For a test that stops its server, or sets it back.
    pub async fn alone() -> Self {
        Self::of(Cluster::start(Options::default()).await.unwrap()).await
    }

    async fn of(cluster: Cluster) -> Self {
        let url = cluster.create_database("tidemark_log").await.unwrap();
        let database = Self { cluster, url };
        event_store::migrate(&database.pool()).await.unwrap();
        database
    }

    /// For looking at the log, and for interfering with it; without the bounds of a store's pool.
    pub fn pool(&self) -> PgPool {
        PgPoolOptions::new().connect_lazy(&self.url).unwrap()
    }

    /// A store with a pool and a committer of its own, as another process would have.
    pub async fn store(&self) -> (EventStore, Committer) {
        EventStore::open(pool(&self.url), StoreConfig::new(LOG_ID)).await.unwrap()
    }
}

/// As a gateway connects.
pub fn pool(url: &str) -> PgPool {
    pool_of(url, true)
}

/// The same, which may ask each connection whether it is alive before it is used.
pub fn pool_of(url: &str, asks_before: bool) -> PgPool {
    let options: PgConnectOptions = url.parse().unwrap();
    PgPoolOptions::new()
        .max_connections(16)
        .test_before_acquire(asks_before)
        .acquire_timeout(Duration::from_secs(3))
        .connect_lazy_with(Timeouts::default().apply(options))
}

pub fn order(id: &str) -> AggregateId {
    AggregateId::new(Name::new("order").unwrap(), id).unwrap()
}

pub fn event(data: &str) -> NewEvent {
    NewEvent {
        id: EventId::new(Uuid::now_v7()),
        event_type: Name::new("OrderPlaced").unwrap(),
        schema_version: SchemaVersion::FIRST,
        data: data.to_owned(),
    }
}

pub fn append(aggregate: &AggregateId, expected: Expected, event_count: usize) -> Append {
    Append {
        aggregate: aggregate.clone(),
        expected,
        events: (0..event_count).map(|nth| event(&format!("{{\"nth\": {nth}}}"))).collect(),
        correlation_id: Uuid::new_v4(),
        causation_id: Uuid::new_v4(),
        idempotency_key_hash: None,
        traceparent: None,
    }
}

/// Appends one event to each of `count` orders in turn.
pub async fn fill(store: &EventStore, count: usize) {
    for nth in 0..count {
        let order = order(&format!("o-{}", nth % 7));
        store.append(append(&order, Expected::Any, 1)).await.unwrap();
    }
}

pub fn is_conflict(answer: &Result<Appended, AppendError>) -> bool {
    matches!(answer, Err(AppendError::Conflict { .. }))
}

pub fn position(value: u64) -> Position {
    Position::new(value).unwrap()
}

pub fn version(value: u64) -> Version {
    Version::new(value).unwrap()
}

/// Waits until `condition` answers something.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < end, "not within {DEADLINE:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

/// Holds the log's row lock until it is dropped, so that appends gather behind one that waits for it.
pub async fn hold_head(pool: &PgPool) -> Transaction<'static, Postgres> {
    let mut lock = pool.begin().await.unwrap();
    sqlx::query("select from log_head for update").execute(&mut *lock).await.unwrap();
    lock
}

/// Waits until so many appends wait for the head.
pub async fn until_blocked(pool: &PgPool, count: i64) {
    eventually("appends wait for the head", async || {
        let waiting: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity
             where datname = current_database() and wait_event_type = 'Lock' and query like '%append_events%'",
        )
        .fetch_one(pool)
        .await
        .unwrap();
        (count <= waiting).then_some(())
    })
    .await;
}

/// Positions are dense, predecessors are named, versions of each aggregate have no gap.
pub async fn assert_log_is_whole(pool: &PgPool) -> i64 {
    let (count, last): (i64, i64) =
        sqlx::query_as("select count(*), coalesce(max(position), 0) from event")
            .fetch_one(pool)
            .await
            .unwrap();
    assert_eq!(count, last, "positions are dense");
    let strangers: i64 = sqlx::query_scalar(
        "select count(*) from (
             select previous_id, lag(id) over (order by position) as before from event
         ) as e
         where previous_id <> coalesce(before, '00000000-0000-0000-0000-000000000000')",
    )
    .fetch_one(pool)
    .await
    .unwrap();
    assert_eq!(strangers, 0, "each event names its predecessor");
    let gaps: i64 = sqlx::query_scalar(
        "select count(*) from (
             select version, row_number() over (
                 partition by aggregate_type, aggregate_id order by position
             ) as nth
             from event
         ) as e
         where version <> nth",
    )
    .fetch_one(pool)
    .await
    .unwrap();
    assert_eq!(gaps, 0, "versions follow each other in the order of positions");
    let head_is_last: bool = sqlx::query_scalar(
        "select h.position = coalesce(max(e.position), 0)
             and h.event_id = coalesce(
                 (select id from event order by position desc limit 1),
                 '00000000-0000-0000-0000-000000000000'
             )
         from log_head as h left join event as e on true
         group by h.position, h.event_id",
    )
    .fetch_one(pool)
    .await
    .unwrap();
    assert!(head_is_last);
    count
}
