//! A region of its own for each test: a NATS server, a Postgres cluster, a log, a projector.

use std::collections::VecDeque;
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use async_nats::{HeaderMap, Subscriber};
use compose::nats::{Server, User};
use compose::postgres::{Cluster, Options};
use consistency::{Announcement, Event, Position};
use futures::StreamExt;
use process::config::{Period, Secret, SecretUrl};
use process::nats::NatsConfig;
use process::postgres::PostgresConfig;
use projection::Domain;
use region_projector::checkpoint::VersionKey;
use region_projector::config::{ApplyConfig, LogIdentity, PrimaryLogConfig, StreamConfig};
use region_projector::{Projector, ProjectorConfig, StartError};
use sqlx::{AssertSqlSafe, PgPool, Postgres, Transaction};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::log::{CREDENTIAL, TestLog};

pub const DEADLINE: Duration = Duration::from_secs(30);
/// Counts those who wait for a table of the database. Other tests have others in the same server.
pub const WAITING: &str = "
    select count(*) from pg_locks join pg_database on pg_database.oid = pg_locks.database
    where datname = current_database() and relation is not null and not granted";
pub const PRIMARY: &str = "us-east";
pub const LOG_ID: Uuid = Uuid::from_u128(7);
pub const STREAM: &str = "EVENTS-1";

pub struct World {
    pub nats: Server,
    pub postgres: Cluster,
    pub database_url: String,
    pub pool: PgPool,
    pub log: TestLog,
    pub client: async_nats::Client,
    pub jetstream: jetstream::Context,
}

impl World {
    pub async fn start() -> Self {
        Self::at(Server::start_single().await.unwrap()).await
    }

    /// For a test that stops its Postgres server, or sets it back.
    pub async fn alone() -> Self {
        let postgres = Cluster::start(Options::default()).await.unwrap();
        Self::of(Server::start_single().await.unwrap(), postgres).await
    }

    /// Around a server that is there; the stream is the caller's when it is not the primary's.
    pub async fn at(nats: Server) -> Self {
        Self::of(nats, Cluster::shared().await.unwrap()).await
    }

    async fn of(nats: Server, postgres: Cluster) -> Self {
        Self::around(nats, postgres, TestLog::start().await).await
    }

    /// Around servers and a log that are there.
    pub async fn around(nats: Server, postgres: Cluster, log: TestLog) -> Self {
        let database_url = postgres.create_database("tidemark_region").await.unwrap();
        let pool = process::postgres::connect(&PostgresConfig::new(&database_url), "test").unwrap();
        let (user, password) = nats.credentials(User::Operator);
        let options = async_nats::ConnectOptions::with_user_and_password(user, password);
        let options = match &nats.config().tls {
            Some(tls) => options.add_root_certificates(tls.ca.clone()),
            None => options,
        };
        let client = options.connect(nats.url()).await.unwrap();
        let jetstream = jetstream::new(client.clone());
        if nats.config().region == PRIMARY {
            create_stream(&jetstream).await;
        }
        Self { nats, postgres, database_url, pool, log, client, jetstream }
    }

    pub fn config(&self) -> ProjectorConfig {
        let (user, password) = self.nats.credentials(User::Projector);
        let mut server = NatsConfig::new(self.nats.url());
        server.user = Some(user);
        server.password = Some(Secret::new(password));
        ProjectorConfig {
            region: self.nats.config().region.clone(),
            primary_region: PRIMARY.into(),
            admin: process::admin::AdminConfig {
                address: "127.0.0.1:0".parse().unwrap(),
                credential: None,
            },
            log: LogIdentity { id: LOG_ID },
            logging: Default::default(),
            otlp: Default::default(),
            database: PostgresConfig::new(&self.database_url),
            nats: StreamConfig {
                server,
                domain: None,
                primary_domain: None,
                watch_interval: Period::from_millis(200),
                mirror_silence_max: Period::from_secs(3),
                nudge_interval: Period::from_secs(5),
                pull_bytes_max: 8 * 1024 * 1024,
            },
            primary_log: PrimaryLogConfig {
                url: SecretUrl::new(format!("http://{}", self.log.address)),
                tls_ca: None,
                credential: Secret::new(CREDENTIAL),
                deadline: Period::from_secs(5),
                page_events_max: 100,
                poll_interval: Period::from_millis(100),
                bridge_events_max: 10_000,
            },
            apply: ApplyConfig {
                verify_interval: Period::from_millis(200),
                retry_pause_max: Period::from_millis(500),
                ..ApplyConfig::default()
            },
            projection: Default::default(),
            sharing: Default::default(),
            rebuild: Default::default(),
            shutdown_grace: Period::from_secs(10),
        }
    }

    pub async fn projector(&self, domain: Domain) -> Projector {
        self.try_projector(self.config(), domain).await.unwrap()
    }

    pub async fn try_projector(
        &self,
        config: ProjectorConfig,
        domain: Domain,
    ) -> Result<Projector, StartError> {
        Projector::start(config, domain, CancellationToken::new()).await
    }

    /// Appends an event to the log and publishes it.
    pub async fn happen(&self, id: &str, event_type: &str, data: &str) -> Position {
        let event = self.log.append(id, event_type, data);
        self.publish(&event).await;
        event.at.position
    }

    pub async fn add(&self, id: &str, n: i64) -> Position {
        self.happen(id, "Added", &format!("{{\"n\":{n}}}")).await
    }

    pub async fn publish(&self, event: &Event) {
        publish(&self.jetstream, event).await;
    }

    /// Takes a message out of the stream, as if it had been lost.
    pub async fn lose(&self, position: Position) {
        let stream = self.jetstream.get_stream(STREAM).await.unwrap();
        assert!(stream.delete_message(position.get()).await.unwrap());
    }

    pub async fn announcements(&self) -> Announcements {
        let subject = "tidemark.us-east.currency";
        let mut subscriber = self.client.subscribe(subject).await.unwrap();
        // What comes back shows that the server has the subscription. A flush would not.
        self.client.publish(subject, "".into()).await.unwrap();
        while !subscriber.next().await.unwrap().payload.is_empty() {}
        Announcements { subscriber, unheard: VecDeque::new(), message_count: 0, step_count: 0 }
    }

    /// A transaction that holds what the statement locks for as long as the test takes.
    pub async fn hold(&self, statement: impl Into<String>) -> Transaction<'static, Postgres> {
        let mut transaction = self.pool.begin().await.unwrap();
        let lasting = "set local idle_in_transaction_session_timeout = 0";
        sqlx::query(lasting).execute(&mut *transaction).await.unwrap();
        sqlx::query(AssertSqlSafe(statement.into())).execute(&mut *transaction).await.unwrap();
        transaction
    }

    /// Waits until every partition of the first version of `tallies` has stored a position.
    pub async fn stored(&self, position: Position) {
        eventually("the checkpoints are stored", async || {
            self.lowest_checkpoint().await.is_some_and(|lowest| position <= lowest)
        })
        .await;
    }

    /// The lowest stored checkpoint of `tallies`.
    pub async fn lowest_checkpoint(&self) -> Option<Position> {
        let lowest: Result<Option<i64>, _> = sqlx::query_scalar(
            "select min(position) from checkpoint where projection = 'tallies' and version = 1",
        )
        .fetch_one(&self.pool)
        .await;
        lowest.ok().flatten().and_then(Position::from_i64)
    }

    /// The sum and version of a tally's row.
    pub async fn tally(&self, id: &str) -> Option<(i64, i64)> {
        let row = "select (data->>'sum')::bigint, version from tallies_v1_tally
                   where aggregate_id = $1";
        sqlx::query_as(row).bind(id).fetch_optional(&self.pool).await.unwrap()
    }

    /// The ids in a list, in order.
    pub async fn list(&self, key: &str) -> Vec<String> {
        let items = "select aggregate_id from tallies_v1_by_list where list_key = $1
                     order by created_position";
        sqlx::query_scalar(items).bind(key).fetch_all(&self.pool).await.unwrap()
    }

    pub async fn count(&self, statement: &'static str) -> i64 {
        sqlx::query_scalar(statement).fetch_one(&self.pool).await.unwrap()
    }
}

pub async fn create_stream(jetstream: &jetstream::Context) {
    let config = stream::Config {
        name: STREAM.into(),
        subjects: vec!["events.>".into()],
        ..stream::Config::default()
    };
    jetstream.create_stream(config).await.unwrap();
}

pub async fn publish(jetstream: &jetstream::Context, event: &Event) {
    let mut headers = HeaderMap::new();
    for (name, value) in event.headers() {
        headers.insert(name, value.as_str());
    }
    let subject = event.aggregate.subject();
    let data = event.data.clone().into();
    let published = jetstream.publish_with_headers(subject, headers, data).await.unwrap();
    let ack = published.await.unwrap();
    assert_eq!(ack.sequence, event.at.position.get(), "stream sequence is position");
}

pub fn tallies() -> VersionKey {
    VersionKey { projection: consistency::Name::new("tallies").unwrap(), version: 1 }
}

/// Stops a projector in order.
pub async fn stop(projector: Projector) {
    projector.stop();
    timeout(DEADLINE, projector.join()).await.expect("ends in time").unwrap();
}

pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + DEADLINE;
    while !holds().await {
        assert!(Instant::now() < end, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What the projector tells the gateways.
pub struct Announcements {
    subscriber: Subscriber,
    unheard: VecDeque<Announcement>,
    /// Of those that were looked at.
    pub message_count: usize,
    /// In them.
    pub step_count: usize,
}

impl Announcements {
    /// The next announcement that fits.
    pub async fn find(&mut self, mut fits: impl FnMut(&Announcement) -> bool) -> Announcement {
        let found = timeout(DEADLINE, async {
            loop {
                while let Some(announcement) = self.unheard.pop_front() {
                    assert!(announcement.is_coherent(), "{announcement:?}");
                    if fits(&announcement) {
                        return announcement;
                    }
                }
                let message = self.subscriber.next().await.expect("the subscription stands");
                let said: Vec<Announcement> = serde_json::from_slice(&message.payload).unwrap();
                self.message_count += 1;
                self.step_count += said.len();
                self.unheard.extend(said);
            }
        });
        found.await.expect("announced in time")
    }
}
