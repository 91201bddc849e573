//! The whole process but its command line.

mod engines;

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream;
use consistency::{EpochHistory, Position, stream_name};
use process::admin::{self, Admin, Readiness};
use process::nats::Nats;
use process::postgres::{AtHand, PostgresConfig};
use process::telemetry::Metrics;
use process::trace::Traces;
use process::{nats, postgres};
use projection::Domain;
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::announce::Announcer;
use crate::config::ProjectorConfig;
use crate::engine::Shared;
use crate::epochs::{Epochs, Learner};
use crate::health::{Health, Part, chain_of};
use crate::log::LogClient;
use crate::mirror::Mirror;
use crate::mirror::watch::{Kept, StreamWatch};
use crate::reader::pull::{Bounds, Stream};
use crate::reader::tail::{self, Tail};
use crate::retry::Backoff;
use crate::sharing::rows::Share;
use crate::sharing::{Keeper, Shareable, Sharing};
use crate::start::{self, StartError, key_of};
use crate::status::{self, Status};
use crate::telemetry::Telemetry;
use crate::versions::Version;
use engines::Engines;

const SERVICE: &str = "region-projector";
/// One to renew with, and one to listen on.
const KEEPER_CONNECTIONS: u32 = 2;
/// A start goes on without NATS after so long.
const CONNECTION_WAIT_MAX: Duration = Duration::from_secs(5);

/// A running projector.
pub struct Projector {
    admin_address: SocketAddr,
    readiness: Readiness,
    status: Status,
    metrics: Metrics,
    stop: CancellationToken,
    work: JoinHandle<Result<(), StartError>>,
    admin: JoinHandle<()>,
    admin_stop: CancellationToken,
}

impl Projector {
    /// Binds the admin listener, and begins. Database and NATS may come later: `/readyz` says what is
    /// missing. Cancelling `stop` ends it in order.
    pub async fn start(
        config: ProjectorConfig,
        domain: Domain,
        stop: CancellationToken,
    ) -> Result<Self, StartError> {
        start::check_named(&config, &domain)?;
        let health = Health::default();
        health.unwell(Part::Start, SERVICE, "starting");
        let metrics = Metrics::new(SERVICE, &config.otlp)?;
        let status = Status::default();
        let pool = postgres::connect(&config.database, SERVICE)?;
        let log = LogClient::new(&config.primary_log)?.of_region(&config.region);
        let nats = nats::connect(&config.nats.server, SERVICE).await?;
        let listener = TcpListener::bind(config.admin.address).await.map_err(StartError::Bind)?;
        let admin_address = listener.local_addr().map_err(StartError::Bind)?;
        tracing::info!(address = %admin_address, "admin listener bound");
        let admin_stop = CancellationToken::new();
        let (region, shown) = (config.region.clone(), status.clone());
        let admin = Admin {
            readiness: health.readiness().clone(),
            metrics: metrics.clone(),
            status: Arc::new(move || shown.to_json(&region, status::now())),
            operations: None,
        };
        let credential = config.admin.credential.clone();
        let admin = tokio::spawn(admin::serve(listener, credential, admin, admin_stop.clone()));
        let traces = Traces::new(&config.otlp, SERVICE, &config.region)?;
        let readiness = health.readiness().clone();
        let telemetry = Arc::new(Telemetry::new(&metrics, &status, traces));
        let shown = status.clone();
        let name = config.sharing.name.clone().unwrap_or_else(|| {
            let host = rustix::system::uname();
            format!("{}:{}", host.nodename().to_string_lossy(), admin_address.port())
        });
        let work = Work { name, config, domain, pool, nats, log, status, health, telemetry };
        let work = tokio::spawn(work.run(stop.clone()));
        Ok(Self { admin_address, readiness, status: shown, metrics, stop, work, admin, admin_stop })
    }

    /// Where the admin listener is.
    pub fn admin_address(&self) -> SocketAddr {
        self.admin_address
    }

    /// What `/readyz` shows.
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// What was reached.
    pub fn status(&self) -> &Status {
        &self.status
    }

    /// What was measured.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Asks it to end.
    pub fn stop(&self) {
        self.stop.cancel();
    }

    /// Waits for its end: after a stop, or when it cannot start at all.
    pub async fn join(self) -> Result<(), StartError> {
        let ended = self.work.await;
        self.admin_stop.cancel();
        let _ = self.admin.await;
        ended?
    }
}

struct Work {
    name: String,
    config: ProjectorConfig,
    domain: Domain,
    pool: PgPool,
    nats: Nats,
    log: LogClient,
    status: Status,
    health: Health,
    telemetry: Arc<Telemetry>,
}

impl Work {
    async fn run(self, stop: CancellationToken) -> Result<(), StartError> {
        let Some(known) = stop.run_until_cancelled(self.prepare()).await else { return Ok(()) };
        let (learner, epochs) = self.learner(known?);
        self.await_connection(&stop).await;
        // Before anything is read that may be lost by now; without an answer, what is known has to do.
        if stop.run_until_cancelled(learner.learn()).await.is_none() {
            return Ok(());
        }
        let learner = tokio::spawn(learner.run(stop.clone()));
        let (keeper, sharing) = self.keeper()?;
        let keeper_stop = CancellationToken::new();
        let keeper = tokio::spawn(keeper.run(keeper_stop.clone()));
        let mut outcome = Ok(());
        while !stop.is_cancelled() {
            outcome = self.read_epoch(&sharing, &epochs, &stop).await;
        }
        // Every partition has come to rest, so others may have them at once.
        keeper_stop.cancel();
        keeper.await?;
        learner.await?;
        self.pool.close().await;
        // What was announced last is still in the client's buffer.
        if let Err(error) = self.nats.client.flush().await {
            tracing::debug!(error = chain_of(&error), "last announcements lost");
        }
        outcome
    }

    /// Reads the newest epoch that is known, until it is stopped or a newer one is known. An error stops
    /// everything.
    async fn read_epoch(
        &self,
        sharing: &Sharing,
        epochs: &Epochs,
        stop: &CancellationToken,
    ) -> Result<(), StartError> {
        let history = epochs.known();
        let over = stop.child_token();
        let (stalled, stalled_seen) = watch::channel(false);
        let (begins, begins_seen) = watch::channel(Position::ZERO);
        let (tail, tail_reader) = tail::of(self.stream(&history));
        let shared = self.shared(&history, (sharing, epochs), (stalled_seen, begins_seen), tail);
        let watching = self.stream_watch(&history, (stalled, begins)).run(over.clone());
        let watching = tokio::spawn(watching);
        self.health.well(Part::Start, SERVICE);
        let mut seen = sharing.seen();
        // What is known already is news to these engines.
        seen.mark_changed();
        let engines = Engines::new(self, shared, tail_reader, over.clone());
        let mut running = pin!(engines.run(seen));
        let outcome = loop {
            tokio::select! {
                biased;
                outcome = &mut running => break outcome,
                // What is under way is finished, and counts in the new epoch if that kept it.
                () = epochs.newer_than(&history), if !over.is_cancelled() => over.cancel(),
            }
        };
        over.cancel();
        let outcome = outcome.and(watching.await.map_err(StartError::from));
        if outcome.is_err() {
            stop.cancel();
        }
        outcome
    }

    /// Prepares the database, however long that takes.
    async fn prepare(&self) -> Result<EpochHistory, StartError> {
        let apply = &self.config.apply;
        let mut backoff = Backoff::new(apply.retry_pause_min, apply.retry_pause_max);
        loop {
            match start::prepare(&self.pool, &self.domain, self.config.log.id).await {
                Ok(known) => {
                    self.health.well(Part::Database, SERVICE);
                    return Ok(known);
                }
                Err(error) if error.is_transient() => {
                    self.health.unwell(Part::Database, SERVICE, chain_of(&error));
                    backoff.pause().await;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Partitions announce where they begin, which is lost without a connection. Where there is none
    /// for a while, gateways find out by themselves.
    async fn await_connection(&self, stop: &CancellationToken) {
        let mut link = self.nats.link.clone();
        let connected = timeout(CONNECTION_WAIT_MAX, link.wait_for(|link| link.connected));
        if let Some(Err(_)) = stop.run_until_cancelled(connected).await {
            tracing::warn!("beginning without a connection to nats");
        }
    }

    /// With connections of its own: renewing must not wait for those who write.
    fn keeper(&self) -> Result<(Keeper, Sharing), StartError> {
        let database =
            PostgresConfig { connections_max: KEEPER_CONNECTIONS, ..self.config.database.clone() };
        let pool = postgres::connect(&database, SERVICE)?;
        let (domain, limits) = (self.domain.clone(), self.config.clone());
        let share = move |version: &Version| {
            let definition = engines::instance(version, &domain)?;
            let partitions = limits.apply_to(definition.name().as_str()).partitions;
            Some(Share { key: key_of(&definition), is_by_hand: partitions.is_some() })
        };
        let follow = |version: &&Version| version.state.follows_the_log();
        let shareable: Shareable =
            Box::new(move |all| all.iter().filter(follow).filter_map(&share).collect());
        let known = (self.status.clone(), self.health.clone());
        let config = self.config.sharing.clone();
        Ok(Keeper::new(pool, self.name.clone(), config, shareable, known))
    }

    fn stream(&self, history: &EpochHistory) -> Stream {
        let batch = self.config.primary_log.page_events_max;
        Stream {
            context: jetstream::new(self.nats.client.clone()),
            name: stream_name(history.current()),
            bounds: Bounds { batch, bytes_max: self.config.nats.pull_bytes_max },
        }
    }

    fn shared(
        &self,
        history: &EpochHistory,
        (sharing, epochs): (&Sharing, &Epochs),
        (stalled, begins): (watch::Receiver<bool>, watch::Receiver<Position>),
        tail: Tail,
    ) -> Shared {
        let client = self.nats.client.clone();
        Shared {
            connections: AtHand::new(self.pool.clone(), 1),
            tail,
            history: history.clone(),
            epochs: epochs.clone(),
            log: self.log.clone(),
            page_events_max: self.config.primary_log.page_events_max,
            bridge_events_max: self.config.primary_log.bridge_events_max,
            begins,
            stalled,
            poll_interval: self.config.primary_log.poll_interval.get(),
            announcer: Announcer::new(&self.config, client, self.status.clone()),
            sharing: sharing.clone(),
            status: self.status.clone(),
            health: self.health.clone(),
            telemetry: Arc::clone(&self.telemetry),
            config: self.config.apply,
            // The rest of the grace is for leaving in order.
            drain_max: self.config.shutdown_grace.get() / 2,
        }
    }

    fn stream_watch(
        &self,
        history: &EpochHistory,
        told: (watch::Sender<bool>, watch::Sender<Position>),
    ) -> StreamWatch {
        let known = (self.status.clone(), self.health.clone(), Arc::clone(&self.telemetry));
        stream_watch(&self.config, &self.nats.client, history, told, known)
    }

    fn learner(&self, stored: EpochHistory) -> (Learner, Epochs) {
        let every = self.config.nats.watch_interval;
        Learner::new(self.pool.clone(), self.log.clone(), every, self.health.clone(), stored)
    }
}

/// Watches over the stream of the newest epoch, and says whether it is stalled and where it begins.
pub(crate) fn stream_watch(
    config: &ProjectorConfig,
    client: &async_nats::Client,
    history: &EpochHistory,
    (stalled, begins): (watch::Sender<bool>, watch::Sender<Position>),
    (status, health, telemetry): (Status, Health, Arc<Telemetry>),
) -> StreamWatch {
    let epoch = history.current();
    let stream = stream_name(epoch);
    let kept = if config.is_primary() {
        Kept::Origin { context: Box::new(jetstream::new(client.clone())), stream }
    } else {
        let mirror = Mirror::new(client, &stream, config.primary_domain());
        Kept::Mirror(Box::new(mirror.starting_after(history.current_starts_after())))
    };
    StreamWatch {
        kept,
        epoch,
        every: config.nats.watch_interval.get(),
        silence_max: config.nats.mirror_silence_max.get(),
        nudge_interval: config.nats.nudge_interval.get(),
        stalled,
        begins,
        status,
        health,
        telemetry,
    }
}
