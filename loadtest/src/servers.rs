//! The servers that are measured: real ones, in processes of their own, as they are shipped.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream;
use compose::local::settings::{GatewaySettings, NatsUser, Place, SharedSecrets};
use compose::local::{LOG_DATABASE, PRIMARY, REGION_DATABASE};
use compose::nats::{Server, User};
use compose::ports;
use compose::postgres::{self, Cluster};
use compose::process::{Child, Program};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// How long anything may take to start or to settle.
pub const PATIENCE: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(5);

/// A Postgres whose commits reach the disk, with room for the baseline's many connections and the
/// memory that Postgres takes when nobody says otherwise.
pub async fn durable_postgres() -> anyhow::Result<Cluster> {
    let settings = [("max_connections", "400"), ("shared_buffers", "128MB")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let options = postgres::Options { durable: true, settings, ..postgres::Options::default() };
    Ok(Cluster::start(options).await?)
}

/// A pool for looking at what a run left behind.
pub async fn pool(url: &str) -> anyhow::Result<PgPool> {
    let pool = PgPoolOptions::new().max_connections(4).acquire_timeout(PATIENCE).connect(url);
    pool.await.with_context(|| format!("could not connect to {url}"))
}

/// A connection to NATS that may do everything.
pub async fn operator(nats: &Server) -> anyhow::Result<jetstream::Context> {
    let (user, password) = nats.credentials(User::Operator);
    let options = async_nats::ConnectOptions::with_user_and_password(user, password);
    Ok(jetstream::new(options.connect(nats.url()).await?))
}

/// What all processes of one run share.
pub fn secrets() -> SharedSecrets {
    let secret = || format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
    SharedSecrets { log_id: Uuid::now_v7(), token_key: secret(), credential: secret() }
}

/// The primary region: Postgres, NATS and a gateway.
#[derive(Debug)]
pub struct Primary {
    /// Where the gateway answers.
    pub address: SocketAddr,
    /// The log's and the region's database.
    pub postgres: Cluster,
    /// Its NATS server.
    pub nats: Server,
    // The processes end before their folder goes.
    _gateway: Child,
    _folder: TempDir,
}

impl Primary {
    /// Starts all three. `extra` are lines of the gateway's configuration, before its first table.
    pub async fn start(extra: &str) -> anyhow::Result<Self> {
        let (postgres, nats) =
            tokio::try_join!(durable_postgres(), async { Ok(Server::start_single().await?) })?;
        let secrets = secrets();
        postgres.create_database(LOG_DATABASE).await?;
        let database_url = postgres.create_database(REGION_DATABASE).await?;
        let domain = orders::domain()?;
        region_projector::start::prepare(&pool(&database_url).await?, &domain, secrets.log_id)
            .await?;
        let folder = tempfile::tempdir()?;
        let [port, admin_port] = ports::free_many()?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let user = |user: User| NatsUser::new(nats.url(), nats.credentials(user));
        let settings = GatewaySettings {
            region: PRIMARY.into(),
            place: Place::Primary {
                log_database_url: postgres.url(LOG_DATABASE),
                relay: user(User::Relay),
            },
            listen: address.to_string(),
            admin: format!("127.0.0.1:{admin_port}"),
            database_url,
            nats: user(User::Gateway),
            secrets,
            extra: extra.to_owned(),
        };
        let gateway = gateway(folder.path(), &settings)?;
        wait_until_ready(&gateway, &format!("http://127.0.0.1:{admin_port}")).await?;
        Ok(Self { address, postgres, nats, _gateway: gateway, _folder: folder })
    }

    /// Waits until the relay has published all that was appended, so that it does not work on through
    /// the next measurement.
    pub async fn settle(&self, log: &PgPool, nats: &jetstream::Context) -> anyhow::Result<()> {
        let head: i64 = sqlx::query_scalar("select position from log_head").fetch_one(log).await?;
        until("the relay has caught up", async || {
            let stream = nats.get_stream("EVENTS-1").await?;
            Ok(stream.cached_info().state.last_sequence == u64::try_from(head)?)
        })
        .await
    }
}

/// Starts a gateway as it is shipped: the binary beside this one.
fn gateway(folder: &Path, settings: &GatewaySettings) -> anyhow::Result<Child> {
    let config = folder.join("gateway.toml");
    std::fs::write(&config, settings.to_string())?;
    let log = folder.join("gateway.log");
    Ok(Program::new("gateway", binary("gateway")?, log).arg("--config").arg(config).spawn()?)
}

/// A program that was built together with this one.
fn binary(name: &str) -> anyhow::Result<std::path::PathBuf> {
    let own = std::env::current_exe()?;
    let path = own.parent().unwrap_or(Path::new(".")).join(name);
    anyhow::ensure!(path.is_file(), "{} is not there: use `make bench`", path.display());
    Ok(path)
}

async fn wait_until_ready(service: &Child, admin_url: &str) -> anyhow::Result<()> {
    let (http, url) = (reqwest::Client::new(), format!("{admin_url}/readyz"));
    let ready = async || http.get(&url).send().await.is_ok_and(|it| it.status().is_success());
    Ok(service.wait_until("ready", PATIENCE, ready).await?)
}

/// Waits for a condition.
pub async fn until(
    what: &str,
    holds: impl AsyncFn() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let end = Instant::now() + PATIENCE;
    while !holds().await? {
        anyhow::ensure!(Instant::now() < end, "in {PATIENCE:?} it never came true that {what}");
        sleep(LOOK).await;
    }
    Ok(())
}
