//! The servers that are measured: real ones, in processes of their own, as they are shipped.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use async_nats::jetstream;
use compose::local::settings::{
    GatewaySettings, NatsUser, Place, ProjectorSettings, SharedSecrets,
};
use compose::local::{LOG_DATABASE, PRIMARY, REGION_DATABASE};
use compose::nats::{Server, User};
use compose::ports;
use compose::postgres::{self, Cluster};
use compose::process::{Child, Program, Signal};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

/// How long anything may take to start or to settle.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// How long a condition may take to come true.
const CONDITION_PATIENCE: Duration = Duration::from_secs(300);
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

/// How the services are set up, where that is not as they are shipped.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Lines of the gateway's configuration, before its first table.
    pub gateway_extra: String,
    /// Environment of the gateway.
    pub gateway_settings: Vec<(&'static str, &'static str)>,
    /// Environment of the projector.
    pub projector_settings: Vec<(&'static str, &'static str)>,
    /// Whether there is a projector.
    pub has_projector: bool,
}

/// The primary region: Postgres, NATS, a gateway, and a projector where one is wanted.
#[derive(Debug)]
pub struct Primary {
    // They end in this order: the services while their servers are there.
    /// The gateway's process.
    pub gateway: Child,
    /// The projector's process.
    pub projector: Option<Child>,
    /// Where the gateway answers.
    pub address: SocketAddr,
    /// Where the gateway says how it is.
    pub admin_url: String,
    /// The log's and the region's database.
    pub postgres: Cluster,
    /// Its NATS server.
    pub nats: Server,
    /// What its processes share.
    pub secrets: SharedSecrets,
    // After the processes, so that they have ended when it goes.
    _folder: TempDir,
}

impl Primary {
    /// Starts all of it.
    pub async fn start(setup: Setup) -> anyhow::Result<Self> {
        let (postgres, nats) =
            tokio::try_join!(durable_postgres(), async { Ok(Server::start_single().await?) })?;
        let secrets = secrets();
        postgres.create_database(LOG_DATABASE).await?;
        let database_url = postgres.create_database(REGION_DATABASE).await?;
        let domain = orders::domain()?;
        region_projector::start::prepare(&pool(&database_url).await?, &domain, secrets.log_id)
            .await?;
        let folder = tempfile::tempdir()?;
        let [port, admin_port, projector_port] = ports::free_many()?;
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
            database_url: database_url.clone(),
            nats: user(User::Gateway),
            secrets: secrets.clone(),
            extra: setup.gateway_extra,
        };
        let gateway =
            service(folder.path(), "gateway", &settings.to_string(), &setup.gateway_settings)?;
        let admin_url = format!("http://127.0.0.1:{admin_port}");
        let projector = ProjectorSettings {
            region: PRIMARY.into(),
            primary: PRIMARY.into(),
            admin: format!("127.0.0.1:{projector_port}"),
            database_url,
            nats: user(User::Projector),
            primary_url: format!("http://{address}"),
            secrets: secrets.clone(),
        };
        wait_until_ready(&gateway, &admin_url).await?;
        let projector = if setup.has_projector {
            let (settings, more) = (projector.to_string(), &setup.projector_settings);
            let projector = service(folder.path(), "region-projector", &settings, more)?;
            wait_until_ready(&projector, &format!("http://127.0.0.1:{projector_port}")).await?;
            Some(projector)
        } else {
            None
        };
        Ok(Self {
            address,
            admin_url,
            postgres,
            nats,
            secrets,
            gateway,
            projector,
            _folder: folder,
        })
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

/// Starts a service as it is shipped: the binary beside this one.
fn service(
    folder: &Path,
    name: &str,
    settings: &str,
    environment: &[(&str, &str)],
) -> anyhow::Result<Child> {
    let config = folder.join(format!("{name}.toml"));
    std::fs::write(&config, settings)?;
    let log = folder.join(format!("{name}.log"));
    let program = Program::new(name, binary(name)?, log)
        .arg("--config")
        .arg(config)
        // A build that counts what it does tells of it at its end.
        .end_signal(Signal::TERM);
    let with = |program: Program, (key, value): &(&str, &str)| program.env(*key, value);
    Ok(environment.iter().fold(program, with).spawn()?)
}

/// A program that was built together with this one.
pub fn binary(name: &str) -> anyhow::Result<std::path::PathBuf> {
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

/// Waits for a condition, which may take a while on a busy machine.
pub async fn until(
    what: &str,
    holds: impl AsyncFn() -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    let end = Instant::now() + CONDITION_PATIENCE;
    while !holds().await? {
        anyhow::ensure!(
            Instant::now() < end,
            "in {CONDITION_PATIENCE:?} it never came true that {what}"
        );
        sleep(LOOK).await;
    }
    Ok(())
}
