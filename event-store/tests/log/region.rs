//! A region's log and its stream, for the tests of the relay.

use std::collections::BTreeMap;
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use async_nats::{Client, ConnectOptions};
use compose::nats::{Server, User};
use consistency::{Epoch, Event, Position, stream_name};
use event_store::{Committer, EventStore, Relay, RelayConfig, RelayState, RelayStatus};
use tokio_util::sync::CancellationToken;

use crate::support::{DEADLINE, Database, assert_log_is_whole, eventually};

/// One region's log: a database, a NATS server and a gateway's store.
pub struct Region {
    pub database: Database,
    pub nats: Server,
    pub store: EventStore,
    pub _committer: Committer,
}

/// A relay, with what ends it.
pub struct Running {
    pub relay: Relay,
    pub client: Client,
    pub shutdown: CancellationToken,
}

impl Region {
    pub async fn start() -> Self {
        let (database, nats) = tokio::join!(Database::start(), Server::start_single());
        Self::of(database, nats.unwrap()).await
    }

    /// For a test that sets the database back.
    pub async fn alone() -> Self {
        let (database, nats) = tokio::join!(Database::alone(), Server::start_single());
        Self::of(database, nats.unwrap()).await
    }

    async fn of(database: Database, nats: Server) -> Self {
        let (store, committer) = database.store().await;
        Self { database, nats, store, _committer: committer }
    }

    pub async fn client(&self, user: User) -> Client {
        let (name, password) = self.nats.credentials(user);
        let options = ConnectOptions::with_user_and_password(name, password);
        options.connect(self.nats.url()).await.unwrap()
    }

    pub async fn relay(&self) -> Running {
        self.relay_of(&self.store, config()).await
    }

    pub async fn relay_of(&self, store: &EventStore, config: RelayConfig) -> Running {
        let client = self.client(User::Relay).await;
        let shutdown = CancellationToken::new();
        let relay = Relay::spawn(store.clone(), client.clone(), config, shutdown.clone());
        Running { relay, client, shutdown }
    }

    pub async fn operate(&self) -> jetstream::Context {
        jetstream::new(self.client(User::Operator).await)
    }

    /// Every message of the stream, once it has as many as the log has events. Each must be its
    /// event's, under the sequence that is its position.
    pub async fn published(&self) -> Vec<Message> {
        assert_published(&self.operate().await, &self.database, &self.store).await
    }

    /// As a restore of an older backup would leave it.
    pub async fn cut_log_back_to(&self, last: u64) {
        let last = last as i64;
        let pool = self.database.pool();
        sqlx::query("delete from event where position > $1")
            .bind(last)
            .execute(&pool)
            .await
            .unwrap();
        sqlx::query(
            "update log_head set position = $1,
                 event_id = (select id from event where position = $1)",
        )
        .bind(last)
        .execute(&pool)
        .await
        .unwrap();
    }
}

impl Running {
    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(DEADLINE, self.relay.stopped()).await.unwrap();
    }

    pub async fn until(&self, what: &str, wanted: impl Fn(&RelayStatus) -> bool) -> RelayStatus {
        let mut status = self.relay.status();
        let reached = match tokio::time::timeout(DEADLINE, status.wait_for(wanted)).await {
            Ok(reached) => Some(reached.unwrap().clone()),
            Err(_) => None,
        };
        reached.unwrap_or_else(|| panic!("not in time: {what}; is {:?}", *status.borrow()))
    }

    pub async fn until_refused(&self) -> String {
        let refused = |status: &RelayStatus| matches!(status.state, RelayState::Refused(_));
        let status = self.until("the relay refuses", refused).await;
        let RelayState::Refused(reason) = status.state else { panic!("{status:?}") };
        reason
    }

    pub async fn until_active(&self) {
        self.until("the relay is active", |status| status.state == RelayState::Active).await;
    }

    pub async fn until_published(&self, last: u64) {
        self.until("everything is published", |status| {
            status.published.is_some_and(|at| at.position.get() >= last)
        })
        .await;
    }
}

#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    pub subject: String,
    pub headers: BTreeMap<String, String>,
    pub payload: Vec<u8>,
}

impl Message {
    pub async fn read(stream: &stream::Stream, sequence: u64) -> Self {
        // A cluster that is choosing a leader answers later.
        let raw = eventually("the message can be read", async || {
            stream.get_raw_message(sequence).await.ok()
        })
        .await;
        let headers = raw.headers.iter().map(|(name, values)| {
            assert_eq!(values.len(), 1);
            (name.to_string(), values[0].to_string())
        });
        Self {
            subject: raw.subject.to_string(),
            headers: headers.collect(),
            payload: raw.payload.to_vec(),
        }
    }

    pub fn assert_is_of(&self, event: &Event) {
        let mut headers: BTreeMap<String, String> =
            event.headers().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let before = event.at.position.previous();
        headers.insert("Nats-Expected-Last-Sequence".to_owned(), before.to_string());
        headers.insert("Nats-Expected-Stream".to_owned(), stream_name(event.at.epoch));
        assert_eq!(self.headers, headers);
        assert_eq!(self.subject, event.aggregate.subject());
        assert_eq!(self.payload, event.data.as_bytes());
    }
}

/// A polling interval beyond the test: what is noticed is noticed by being told.
pub fn config() -> RelayConfig {
    RelayConfig { poll_interval: Duration::from_secs(3600), ..polling() }
}

pub fn polling() -> RelayConfig {
    RelayConfig {
        poll_interval: Duration::from_millis(100),
        lease_duration: Duration::from_millis(900),
        ack_wait_max: Duration::from_secs(2),
        ..RelayConfig::new("us-east")
    }
}

/// As [`Region::published`], for any servers.
pub async fn assert_published(
    context: &jetstream::Context,
    database: &Database,
    store: &EventStore,
) -> Vec<Message> {
    let last = assert_log_is_whole(&database.pool()).await as u64;
    let stream = until_stream_ends_at(context, last).await;
    let mut messages = Vec::new();
    for sequence in 1..=last {
        messages.push(Message::read(&stream, sequence).await);
    }
    let events = store.read_range(Position::ZERO, 100_000).await.unwrap();
    for (event, message) in events.iter().zip(&messages) {
        message.assert_is_of(event);
    }
    assert_eq!(events.len(), messages.len());
    messages
}

pub async fn until_stream_ends_at(context: &jetstream::Context, last: u64) -> stream::Stream {
    eventually("the stream ends where the log does", async || {
        let stream = context.get_stream(stream_name(Epoch::FIRST)).await.ok()?;
        let state = &stream.cached_info().state;
        assert!(state.last_sequence <= last, "the stream runs ahead");
        (state.last_sequence == last && state.messages == last).then_some(stream)
    })
    .await
}
