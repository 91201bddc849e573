//! Starting a gateway, and ending it without leaving work behind.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use consistency::{KeyError, LogId};
use event_store::{Committer, EventStore, OpenError, Relay, RelayConfig, RelayState, StoreConfig};
use process::{
    admin::{self, Admin, Condition, Readiness},
    nats::{self, Nats},
    postgres::{self, PostgresConfig},
    server::{self, Workers},
    shutdown,
    telemetry::{Metrics, TelemetryError},
    trace::Traces,
};
use projection::Domain;
use serde_json::json;
use sqlx::migrate::MigrateError;
use tokio::{net::TcpListener, task::JoinHandle, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    config::{AuthMode, GatewayConfig},
    doors::{Doors, DoorsError},
    epochs, feed,
    gateway::{Gateway, Role},
    overview,
    proxied::{RouteError, Routes},
    read_models::ReadModels,
    service::Service,
    telemetry::Instruments,
    token_carrier::TokenCarrier,
    upstream::{Upstream, UpstreamError},
};

/// Rows are found by their keys, also by statements that were planned while there were few.
const READING: [(&str, &str); 2] = [("enable_seqscan", "off"), ("jit", "off")];
/// As collectors know it.
const SERVICE: &str = "tidemark-gateway";
/// How long a primary tries to open its log before it gives up.
const OPEN_TIMEOUT: Duration = Duration::from_secs(60);
const OPEN_RETRY: Duration = Duration::from_millis(250);

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The keys do not make a ring.
    #[error("the tokens' keys are not usable")]
    Keys(#[from] KeyError),
    /// The configuration lacks what its place needs.
    #[error("configuration: {0}")]
    Config(&'static str),
    /// A database's URL is not understood.
    #[error("a database cannot be connected to")]
    Database(#[from] sqlx::Error),
    /// The log's schema cannot be made.
    #[error("the log's migrations fail")]
    Migrate(#[from] MigrateError),
    /// The log cannot be opened.
    #[error("the log cannot be opened")]
    Log(#[from] OpenError),
    /// NATS cannot be connected to, and retrying would not help.
    #[error("nats cannot be connected to")]
    Nats(#[from] async_nats::ConnectError),
    /// Callers cannot be let in.
    #[error("the public listener's doors cannot be set up")]
    Doors(#[from] DoorsError),
    /// The way to the primary is not usable.
    #[error("the way to the primary is not usable")]
    Upstream(#[from] UpstreamError),
    /// A route cannot be.
    #[error("a route cannot be")]
    Route(#[from] RouteError),
    /// An address cannot be listened on.
    #[error("{address} cannot be listened on")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// There are no threads to answer requests with.
    #[error("threads to answer requests cannot be started")]
    Threads(#[source] std::io::Error),
    /// Metrics cannot be set up.
    #[error("telemetry cannot be set up")]
    Telemetry(#[from] TelemetryError),
    /// It was asked to end before it had started.
    #[error("asked to end while starting")]
    Stopped,
}

/// A gateway that runs.
#[derive(Debug)]
pub struct Running {
    /// Where the public listener is.
    pub address: SocketAddr,
    /// Where the admin listener is.
    pub admin_address: SocketAddr,
    task: JoinHandle<bool>,
}

impl Running {
    /// Waits for the end after `stop` was cancelled. `true` when all work was finished in time.
    pub async fn ended(self) -> bool {
        self.task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "the gateway ended abnormally");
            false
        })
    }
}

/// Starts a gateway for `domain`, which runs until `stop` is cancelled.
pub async fn start(
    config: GatewayConfig,
    domain: Domain,
    stop: CancellationToken,
) -> Result<Running, StartError> {
    match config.auth.mode {
        AuthMode::None => tracing::warn!(
            "auth.mode is none: everybody who reaches this listener may read and write everything"
        ),
        AuthMode::Jwt | AuthMode::TrustedHeader => {}
    }
    let doors = Doors::open(&config)?;
    let carrier = TokenCarrier::new(config.key_ring()?, config.token.cookie, config.listen.scheme);
    let metrics = Metrics::new(SERVICE, &config.otlp)?;
    let traces = Traces::new(&config.otlp, SERVICE, config.region.as_str())?;
    let readiness = Readiness::default();
    readiness.set("database", Condition::NotReady("not looked at yet".to_owned()));
    let routes = Routes::new(&config.routes, &domain, &config.read.policy)?;
    let domain = Arc::new(domain);
    let pool = postgres::connect_with(&config.database, SERVICE, |it| it.options(READING))?;
    let queries_max = config.read.queries_max;
    let read_models = ReadModels::new(pool, &domain, queries_max, config.gather());
    let nats = nats::connect(&config.nats, &format!("gateway {}", config.region)).await?;
    let listener = bind(config.listen.address).await?;
    let admin_listener = bind(config.admin.address).await?;
    let (address, admin_address) = (local(&listener)?, local(&admin_listener)?);
    let workers = Workers::start(config.listen.threads).map_err(StartError::Threads)?;
    let (role, log) = role(&config, &stop).await?;
    let instruments = Instruments::new(&metrics.meter(SERVICE), traces);
    let gateway = Gateway::new(config, domain, carrier, read_models, instruments, role, routes);
    let gateway = Arc::new(gateway);
    if let Role::Primary(store) = &gateway.role {
        gateway.learn_history(store.epochs().await.map_err(OpenError::from)?);
    }
    tracing::info!(%address, region = %gateway.config.region, "public listener bound");
    tracing::info!(address = %admin_address, "admin listener bound");
    let parts =
        Parts { gateway, metrics, readiness, nats, log, listener, workers, admin_listener, doors };
    let task = tokio::spawn(run(parts, stop));
    Ok(Running { address, admin_address, task })
}

/// What only a primary has.
struct Log {
    committer: Committer,
    relay_nats: Nats,
    store: EventStore,
}

async fn role(
    config: &GatewayConfig,
    stop: &CancellationToken,
) -> Result<(Role, Option<Log>), StartError> {
    if let Some(primary) = &config.primary_region {
        let upstream = Upstream::new(primary, &config.region, &config.regions.credential)?;
        return Ok((Role::Region(Box::new(upstream)), None));
    }
    let database = config.log_database.as_ref();
    let database = database.ok_or(StartError::Config("log_database is missing"))?;
    let relay = config.relay.as_ref().ok_or(StartError::Config("relay is missing"))?;
    let (store, committer) = open_log(config, database, stop).await?;
    let user = process::nats::NatsConfig {
        user: relay.user.clone(),
        password: relay.password.clone(),
        ..config.nats.clone()
    };
    let relay_nats = nats::connect(&user, &format!("relay {}", config.region)).await?;
    let log = Log { committer, relay_nats, store: store.clone() };
    Ok((Role::Primary(store), Some(log)))
}

/// Opens the log, patiently: a database that starts beside us may need a moment.
async fn open_log(
    config: &GatewayConfig,
    database: &PostgresConfig,
    stop: &CancellationToken,
) -> Result<(EventStore, Committer), StartError> {
    let timeouts = event_store::Timeouts::default();
    let pool = postgres::connect_with(database, "tidemark-log", |it| timeouts.apply(it))?;
    let deadline = Instant::now() + OPEN_TIMEOUT;
    loop {
        let mut store = StoreConfig::new(LogId::new(config.log.id));
        store.payload_bytes_max = config.write.event_bytes_max;
        store.append_events_max = config.write.events_max;
        store.idempotency_age_max = config.write.idempotency_age_max.get();
        let opened = async {
            event_store::migrate(&pool).await?;
            Ok::<_, StartError>(EventStore::open(pool.clone(), store).await?)
        };
        let error = match opened.await {
            Ok(opened) => return Ok(opened),
            Err(error) => error,
        };
        let may_help =
            matches!(&error, StartError::Migrate(_) | StartError::Log(OpenError::Read(_)));
        if !may_help || deadline < Instant::now() {
            return Err(error);
        }
        tracing::warn!(error = %chain(&error), "the log is not open yet");
        tokio::select! {
            biased;
            () = stop.cancelled() => return Err(StartError::Stopped),
            () = tokio::time::sleep(OPEN_RETRY) => {}
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let chain = std::iter::successors(Some(error), |error| error.source());
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

async fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| StartError::Listen { address, source })
}

fn local(listener: &TcpListener) -> Result<SocketAddr, StartError> {
    let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
    listener.local_addr().map_err(|source| StartError::Listen { address: unknown, source })
}

struct Parts {
    gateway: Arc<Gateway>,
    metrics: Metrics,
    readiness: Readiness,
    nats: Nats,
    log: Option<Log>,
    listener: TcpListener,
    workers: Workers,
    admin_listener: TcpListener,
    doors: Doors,
}

/// Runs everything, and ends it in order: intake first, then what intake needed, the admin listener
/// last.
async fn run(parts: Parts, stop: CancellationToken) -> bool {
    let Parts { gateway, metrics, readiness, nats, log, .. } = parts;
    let Parts { listener, workers, admin_listener, doors, .. } = parts;
    let background = CancellationToken::new();
    let admin = tokio::spawn(admin::serve(
        admin_listener,
        gateway.config.admin.credential.clone(),
        admin_of(&gateway, metrics, &readiness),
        background.clone(),
    ));
    let (relay, committer) = start_relay(&gateway, log, &readiness, &background);
    let link = nats.link.clone();
    let feeds = [
        tokio::spawn(feed::listen(
            Arc::clone(&gateway),
            nats,
            readiness.clone(),
            background.clone(),
        )),
        tokio::spawn(feed::poll(Arc::clone(&gateway), readiness.clone(), link, background.clone())),
        tokio::spawn(feed::heartbeat(Arc::clone(&gateway), readiness.clone(), background.clone())),
        tokio::spawn(epochs::watch(Arc::clone(&gateway), readiness.clone(), background.clone())),
    ];
    let draining = readiness.clone();
    let (asked, listened) = (stop.clone(), Arc::clone(&gateway));
    let drain = tokio::spawn(async move {
        asked.cancelled().await;
        listened.listeners.end();
        // What they wait for may take longer than there is left: the next step of their chain will do.
        listened.currency.drain();
        draining.set("draining", Condition::NotReady("shutting down".to_owned()));
    });
    let doorkeeping = doors.keep_fresh(&readiness, &background);
    let tls = doors.tls.clone();
    let answer = doors.around(Service::new(Arc::clone(&gateway)));
    let drained = server::serve_over(
        tls,
        Some(&workers),
        listener,
        gateway.config.listen.limits,
        answer,
        stop,
    )
    .await;
    background.cancel();
    let tasks = feeds.into_iter().chain(doorkeeping).chain([drain, admin]);
    let ended = finish(&gateway, relay, committer, tasks).await;
    // What requests began may have been under way until now.
    drop(workers);
    tracing::info!(drained, ended, "gateway ended");
    drained && ended
}

async fn finish(
    gateway: &Gateway,
    relay: Option<Relay>,
    committer: Option<Committer>,
    tasks: impl Iterator<Item = JoinHandle<()>>,
) -> bool {
    let grace = gateway.config.listen.limits.grace;
    let ending = async {
        gateway.read_models.ended().await;
        if let Some(committer) = committer {
            committer.stop().await;
        }
        if let Some(relay) = relay {
            relay.stopped().await;
        }
        for task in tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "a task ended abnormally");
            }
        }
    };
    shutdown::within(grace.get(), "background tasks", ending).await.is_some()
}

fn start_relay(
    gateway: &Arc<Gateway>,
    log: Option<Log>,
    readiness: &Readiness,
    stop: &CancellationToken,
) -> (Option<Relay>, Option<Committer>) {
    let Some(Log { committer, relay_nats, store }) = log else { return (None, None) };
    let mut config = RelayConfig::new(gateway.config.region.as_str());
    if let Some(section) = &gateway.config.relay {
        config.stream_replica_count = section.stream_replica_count;
        config.stream_age_max = section.stream_age_max.get();
        config.stream_bytes_max = section.stream_bytes_max;
    }
    let relay = Relay::spawn(store, relay_nats.client, config, stop.clone());
    let (mut status, readiness, stop) = (relay.status(), readiness.clone(), stop.clone());
    let watching = Arc::clone(gateway);
    // Ends with the relay, which drops the other end of the channel.
    tokio::spawn(async move {
        loop {
            let now = status.borrow_and_update().clone();
            let published = now.published.map(|at| at.position.get());
            watching.instruments.relayed(published, now.state == RelayState::Active);
            readiness.set("relay", relay_condition(&now.state));
            tokio::select! {
                biased;
                () = stop.cancelled() => return,
                changed = status.changed() => if changed.is_err() { return },
            }
        }
    });
    (Some(relay), Some(committer))
}

/// Writes do not wait for NATS, so a relay in trouble does not take the gateway out.
fn relay_condition(state: &RelayState) -> Condition {
    match state {
        RelayState::Standby | RelayState::Active => Condition::Ready,
        RelayState::Failing(reason) => Condition::Degraded(format!("relay failing: {reason}")),
        RelayState::Refused(reason) => Condition::Degraded(format!("relay refused: {reason}")),
    }
}

fn admin_of(gateway: &Arc<Gateway>, metrics: Metrics, readiness: &Readiness) -> Admin {
    let gateway = Arc::clone(gateway);
    Admin {
        readiness: readiness.clone(),
        metrics,
        status: Arc::new(move || json!(overview::overview(&gateway))),
        operations: None,
    }
}
