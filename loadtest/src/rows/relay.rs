//! The relay, from a log that is behind to a stream that has it all, against a loop that publishes the
//! same messages from memory with as many in flight.
//!
//! Both run in this process and publish to the same server, to a stream that is made anew.

use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream;
use compose::nats::{Server, User};
use compose::postgres::Cluster;
use consistency::{AggregateId, EventId, LogId, LogPosition, Name, Position, SchemaVersion};
use event_store::{
    Append, Committer, EventStore, Expected, NewEvent, Relay, RelayConfig, StoreConfig, Timeouts,
};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use process::postgres::PostgresConfig;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::Plan;
use crate::events::{self, EVENTS_PER_ORDER};
use crate::pairs::{Sample, Side, interleave};
use crate::report::{Goal, Line};
use crate::servers::{self, PATIENCE};
use crate::stream::{self as bare, Message};

pub const NAME: &str = "relay";

const ORDER_COUNT: u64 = 20_000;
const EVENT_COUNT: u64 = ORDER_COUNT * EVENTS_PER_ORDER;
const READ_EVENTS: u32 = 1000;
const APPENDS_AT_ONCE: usize = 64;

/// Events a second.
pub async fn measure(plan: Plan) -> anyhow::Result<Vec<Line>> {
    let world = World::start().await?;
    let pairs = interleave(plan.pairs, async |side| {
        bare::create(&world.operator).await?;
        let elapsed = match side {
            Side::Ours => world.relay().await?,
            Side::Baseline => world.publish().await?,
        };
        Ok(Sample::plain(EVENT_COUNT as f64 / elapsed.as_secs_f64()))
    });
    let line = pairs.await?.into_line(NAME, "events/s", Goal::RatioMin(0.8));
    Ok(vec![line.noting(format!("{EVENT_COUNT} events"))])
}

struct World {
    store: EventStore,
    operator: jetstream::Context,
    client: async_nats::Client,
    messages: Vec<Message>,
    head: LogPosition,
    _committer: Committer,
    _nats: Server,
    _postgres: Cluster,
}

impl World {
    async fn start() -> anyhow::Result<Self> {
        let (postgres, nats) = tokio::try_join!(servers::durable_postgres(), async {
            Ok(Server::start_single().await?)
        })?;
        let database = PostgresConfig::new(postgres.create_database("tidemark_log").await?);
        let timeouts = Timeouts::default();
        let pool = process::postgres::connect_with(&database, "bench", |it| timeouts.apply(it))?;
        event_store::migrate(&pool).await?;
        let config = StoreConfig::new(LogId::new(Uuid::now_v7()));
        let (store, committer) = EventStore::open(pool, config).await?;
        fill(&store).await?;
        let messages = messages(&store).await?;
        let operator = servers::operator(&nats).await?;
        let (user, password) = nats.credentials(User::Relay);
        let options = async_nats::ConnectOptions::with_user_and_password(user, password);
        let client = options.connect(nats.url()).await?;
        let head = store.head().await?.at;
        Ok(Self {
            store,
            operator,
            client,
            messages,
            head,
            _committer: committer,
            _nats: nats,
            _postgres: postgres,
        })
    }

    async fn relay(&self) -> anyhow::Result<Duration> {
        let stop = CancellationToken::new();
        let config = RelayConfig::new("us-east");
        let began = Instant::now();
        let relay = Relay::spawn(self.store.clone(), self.client.clone(), config, stop.clone());
        let mut status = relay.status();
        let done = status.wait_for(|status| status.published == Some(self.head));
        timeout(PATIENCE, done).await.context("the relay takes too long")??;
        let elapsed = began.elapsed();
        stop.cancel();
        relay.stopped().await;
        Ok(elapsed)
    }

    async fn publish(&self) -> anyhow::Result<Duration> {
        let context = jetstream::new(self.client.clone());
        let messages = self.messages.clone();
        let began = Instant::now();
        bare::publish(&context, messages).await?;
        Ok(began.elapsed())
    }
}

/// Appends orders, whole ones, many at a time.
async fn fill(store: &EventStore) -> anyhow::Result<()> {
    stream::iter(0..ORDER_COUNT)
        .map(async |order| {
            let appended = store.append(append(order)?).await;
            appended.map_err(anyhow::Error::from).map(drop)
        })
        .buffer_unordered(APPENDS_AT_ONCE)
        .try_collect()
        .await
}

fn append(order: u64) -> anyhow::Result<Append> {
    let events = (0..EVENTS_PER_ORDER).map(|nth| {
        let (event_type, data) = events::nth_of(order, nth)?;
        let id = EventId::new(Uuid::now_v7());
        Ok(NewEvent { id, event_type, schema_version: SchemaVersion::FIRST, data })
    });
    Ok(Append {
        aggregate: AggregateId::new(Name::new("order")?, events::order_id(order))?,
        expected: Expected::MustNotExist,
        events: events.collect::<anyhow::Result<_>>()?,
        correlation_id: Uuid::now_v7(),
        causation_id: Uuid::now_v7(),
        idempotency_key_hash: None,
        traceparent: None,
    })
}

async fn messages(store: &EventStore) -> anyhow::Result<Vec<Message>> {
    let mut messages = Vec::new();
    let mut after = Position::ZERO;
    loop {
        let events = store.read_range(after, READ_EVENTS).await?;
        let Some(last) = events.last() else { return Ok(messages) };
        after = last.at.position;
        messages.extend(events.into_iter().map(Message::of));
    }
}
