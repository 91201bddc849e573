//! Three regions as plain processes: Postgres clusters, NATS servers, gateways, projectors, and the WAN between them.

mod service;
pub mod settings;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::future::{join_all, try_join_all};
use serde::Serialize;
use tempfile::TempDir;
use tokio::time::Instant;
use uuid::Uuid;

use crate::nats::{self, Topology, User, event_link};
use crate::postgres::{self, Cluster};
use crate::process::Program;
use crate::proxy::{Proxies, Stream, Toxic};
use crate::{Error, ports, tools};

pub use service::Service;

use settings::{GatewaySettings, NatsUser, Place, ProjectorSettings, SharedSecrets};

/// The region that accepts writes.
pub const PRIMARY: &str = "us-east";

/// The other regions, with the milliseconds of a round trip between each and the primary.
pub const REGIONS: [(&str, u64); 2] = [("eu-west", 80), ("asia-south", 200)];

/// The database of a region's read models.
pub const REGION_DATABASE: &str = "tidemark_region";

/// The database of the log, at the primary only.
pub const LOG_DATABASE: &str = "tidemark_log";

const READY_DEADLINE: Duration = Duration::from_secs(60);

/// The name of the proxy that a region's requests to the primary go through.
pub fn http_link(region: &str) -> String {
    format!("http-{region}")
}

/// How a stack is to run.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// The first of four ports: the three gateways, primary first, and the API of the proxies. Free ports unless set.
    pub first_port: Option<u16>,
    /// The folder with the binaries of gateway and projector; next to the running program unless set.
    pub binaries: Option<PathBuf>,
    /// How the Postgres clusters run.
    pub postgres: postgres::Options,
    /// Lines added to the configuration of every gateway, before its first table.
    pub gateway_extra: String,
    /// Set in the environment of every gateway and projector.
    pub environment: Vec<(String, String)>,
}

/// Three regions, running. All of it ends with this value.
#[derive(Debug)]
pub struct Stack {
    /// The regions, primary first.
    pub regions: Vec<Region>,
    /// Their NATS servers.
    pub nats: Topology,
    /// The WAN.
    pub proxies: Proxies,
    folder: TempDir,
}

/// One region's processes, but for its NATS server.
#[derive(Debug)]
pub struct Region {
    /// Its name.
    pub name: String,
    /// Answers callers.
    pub gateway: Service,
    /// Folds the log into the read models.
    pub projector: Service,
    /// The read models, and at the primary the log.
    pub postgres: Cluster,
    /// The public listener, as a URL.
    pub url: String,
}

/// Where everything is, for scripts and tests.
#[derive(Debug, Serialize)]
pub struct Addresses {
    /// By region.
    pub regions: BTreeMap<String, RegionAddresses>,
    /// The HTTP API of the proxies.
    pub proxy: String,
    /// Configurations and logs.
    pub folder: PathBuf,
}

/// Where a region's processes are.
#[derive(Debug, Serialize)]
pub struct RegionAddresses {
    /// The gateway's public listener.
    pub gateway: String,
    /// The gateway's admin listener.
    pub gateway_admin: String,
    /// The projector's admin listener.
    pub projector_admin: String,
    /// The NATS server, for clients.
    pub nats: String,
    /// The NATS server's monitoring.
    pub nats_monitor: String,
    /// The read models.
    pub database: String,
    /// The log, at the primary.
    pub log_database: Option<String>,
}

impl Stack {
    /// Starts everything and waits until every gateway and projector says that it is ready.
    pub async fn start(plan: Plan) -> Result<Self, Error> {
        let cache = tools::repository().join("target").join("compose");
        std::fs::create_dir_all(&cache)
            .map_err(Error::io(format!("create {}", cache.display())))?;
        let folder = tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(&cache)
            .map_err(Error::io("create a folder for the run"))?;
        let proxies = Proxies::start(plan.first_port.map_or(0, |first| first + 3)).await?;
        let names = REGIONS.map(|(name, _)| name);
        let (clusters, nats) = tokio::try_join!(
            try_join_all(region_names().map(|name| cluster(name, &plan.postgres))),
            Topology::start(&proxies, PRIMARY, &names, false),
        )?;
        let wiring = Wiring::lay(&plan, &proxies, folder.path()).await?;
        let mut regions = Vec::new();
        for ((name, gateway_port), cluster) in wiring.gateway_ports.iter().zip(clusters) {
            let server = nats.server(name).expect("the topology was started with these regions");
            let region = wiring.region(name, *gateway_port, cluster, server)?;
            if name == &PRIMARY {
                // A mirror that is made before its origin is there looks for it again after 10 s only.
                let stream = async || server.stream_count().await > 0;
                region.gateway.wait_until("publishing", READY_DEADLINE, stream).await?;
            }
            regions.push(region);
        }
        let mut stack = Stack { regions, nats, proxies, folder };
        if let Err(error) = stack.wait_until_ready().await {
            // What the services wrote is worth more than a message.
            stack.keep_logs();
            return Err(error);
        }
        Ok(stack)
    }

    /// The region of that name.
    pub fn region(&self, name: &str) -> Option<&Region> {
        self.regions.iter().find(|region| region.name == name)
    }

    /// The region of that name, to stop and start what is in it.
    pub fn region_mut(&mut self, name: &str) -> Option<&mut Region> {
        self.regions.iter_mut().find(|region| region.name == name)
    }

    /// Where everything is.
    pub fn addresses(&self) -> Addresses {
        let regions =
            self.regions.iter().map(|region| (region.name.clone(), self.addresses_of(region)));
        Addresses {
            regions: regions.collect(),
            proxy: self.proxies.url(),
            folder: self.folder.path().to_path_buf(),
        }
    }

    /// The name of a service that has ended without being asked to, with the end of its log.
    pub fn fallen(&self) -> Option<String> {
        let services = self.regions.iter().flat_map(|region| [&region.gateway, &region.projector]);
        services.filter_map(Service::fallen).next()
    }

    /// Stops everything in order: who takes requests first, who keeps data last. Returns the first trouble, after
    /// all is stopped.
    pub async fn stop(mut self) -> Result<(), Error> {
        let mut results =
            join_all(self.regions.iter_mut().map(|region| region.gateway.stop())).await;
        results
            .extend(join_all(self.regions.iter_mut().map(|region| region.projector.stop())).await);
        let Topology { primary, regions } = &mut self.nats;
        results.extend(join_all(regions.iter_mut().map(nats::Server::stop)).await);
        results.push(primary.stop().await);
        self.proxies.stop().await;
        let clusters = self.regions.iter_mut().map(|region| region.postgres.stop());
        results.extend(join_all(clusters).await);
        let trouble = results.into_iter().find_map(Result::err);
        if let Some(error) = trouble {
            self.keep_logs();
            return Err(error);
        }
        Ok(())
    }

    /// Keeps configurations and logs when the stack ends, and says where they are.
    pub fn keep_logs(&mut self) {
        self.folder.disable_cleanup(true);
        eprintln!("configurations and logs: {}", self.folder.path().display());
    }

    async fn wait_until_ready(&self) -> Result<(), Error> {
        let http = reqwest::Client::new();
        let end = Instant::now() + READY_DEADLINE;
        for region in &self.regions {
            for service in [&region.gateway, &region.projector] {
                let left = end.saturating_duration_since(Instant::now());
                service.wait_until_ready(&http, left).await?;
            }
        }
        Ok(())
    }

    fn addresses_of(&self, region: &Region) -> RegionAddresses {
        let nats = self.nats.server(&region.name).expect("every region has a server");
        let is_primary = region.name == PRIMARY;
        RegionAddresses {
            gateway: region.url.clone(),
            gateway_admin: region.gateway.admin_url(),
            projector_admin: region.projector.admin_url(),
            nats: nats.url(),
            nats_monitor: nats.monitor_url(),
            database: region.postgres.url(REGION_DATABASE),
            log_database: is_primary.then(|| region.postgres.url(LOG_DATABASE)),
        }
    }
}

/// All regions, primary first.
fn region_names() -> impl Iterator<Item = &'static str> {
    std::iter::once(PRIMARY).chain(REGIONS.map(|(name, _)| name))
}

/// A region's cluster with its databases.
async fn cluster(region: &str, options: &postgres::Options) -> Result<Cluster, Error> {
    let cluster = Cluster::start(options.clone()).await?;
    cluster.create_database(REGION_DATABASE).await?;
    if region == PRIMARY {
        cluster.create_database(LOG_DATABASE).await?;
    }
    Ok(cluster)
}

/// What the services' configurations are made of.
struct Wiring<'a> {
    plan: &'a Plan,
    folder: &'a Path,
    binaries: PathBuf,
    secrets: SharedSecrets,
    /// By region, primary first.
    gateway_ports: Vec<(&'static str, u16)>,
    /// The primary's public listener as each other region sees it.
    primary_urls: BTreeMap<&'static str, String>,
}

impl<'a> Wiring<'a> {
    /// Chooses ports and secrets, opens the HTTP links and makes all links as slow as the distance.
    async fn lay(plan: &'a Plan, proxies: &Proxies, folder: &'a Path) -> Result<Self, Error> {
        let gateway_ports = (0..)
            .zip(region_names())
            .map(|(offset, name)| {
                Ok((name, plan.first_port.map_or_else(ports::free, |first| Ok(first + offset))?))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let (_, primary_port) = gateway_ports[0];
        let mut primary_urls =
            BTreeMap::from([(PRIMARY, format!("http://127.0.0.1:{primary_port}"))]);
        for (region, round_trip_ms) in REGIONS {
            let listen = format!("127.0.0.1:{}", ports::free()?);
            let upstream = format!("127.0.0.1:{primary_port}");
            proxies.create(&http_link(region), &listen, &upstream).await?;
            primary_urls.insert(region, format!("http://{listen}"));
            for link in [event_link(region), http_link(region)] {
                for (name, stream) in
                    [("wan_upstream", Stream::Upstream), ("wan_downstream", Stream::Downstream)]
                {
                    proxies.add_toxic(&link, Toxic::latency(name, stream, round_trip_ms / 2))?;
                }
            }
        }
        let binaries = plan.binaries.clone().map_or_else(service::binaries, Ok)?;
        let secrets = SharedSecrets::random();
        Ok(Wiring { plan, folder, binaries, secrets, gateway_ports, primary_urls })
    }

    fn region(
        &self,
        name: &str,
        gateway_port: u16,
        postgres: Cluster,
        nats: &nats::Server,
    ) -> Result<Region, Error> {
        let folder = self.folder.join(name);
        std::fs::create_dir(&folder).map_err(Error::io(format!("create {}", folder.display())))?;
        let database_url = postgres.url(REGION_DATABASE);
        let user = |user: User| NatsUser::new(nats.url(), nats.credentials(user));
        let primary_url = self.primary_urls[name].clone();
        let place = if name == PRIMARY {
            let log_database_url = postgres.url(LOG_DATABASE);
            Place::Primary { log_database_url, relay: user(User::Relay) }
        } else {
            Place::Region { primary: PRIMARY.into(), primary_url: primary_url.clone() }
        };
        let [gateway_admin, projector_admin] = ports::free_many()?;
        let gateway = GatewaySettings {
            region: name.into(),
            place,
            listen: format!("127.0.0.1:{gateway_port}"),
            admin: format!("127.0.0.1:{gateway_admin}"),
            database_url: database_url.clone(),
            nats: user(User::Gateway),
            secrets: self.secrets.clone(),
            extra: self.plan.gateway_extra.clone(),
        };
        let projector = ProjectorSettings {
            region: name.into(),
            primary: PRIMARY.into(),
            admin: format!("127.0.0.1:{projector_admin}"),
            database_url,
            nats: user(User::Projector),
            primary_url,
            secrets: self.secrets.clone(),
        };
        Ok(Region {
            name: name.into(),
            gateway: self.service("gateway", &folder, &gateway.to_string(), gateway_admin)?,
            projector: self.service(
                "region-projector",
                &folder,
                &projector.to_string(),
                projector_admin,
            )?,
            postgres,
            url: format!("http://127.0.0.1:{gateway_port}"),
        })
    }

    fn service(
        &self,
        binary: &str,
        folder: &Path,
        settings: &str,
        admin_port: u16,
    ) -> Result<Service, Error> {
        let config = folder.join(format!("{binary}.toml"));
        std::fs::write(&config, settings)
            .map_err(Error::io(format!("write {}", config.display())))?;
        let path = service::binary(&self.binaries, binary)?;
        let region = folder.file_name().unwrap_or_default().to_string_lossy();
        let log = folder.join(format!("{binary}.log"));
        let program =
            Program::new(format!("{binary} of {region}"), path, log).arg("--config").arg(config);
        let environment = self.plan.environment.iter();
        let program = environment.fold(program, |program, (name, value)| program.env(name, value));
        Service::start(program, admin_port)
    }
}

impl SharedSecrets {
    fn random() -> Self {
        let secret = || format!("{}{}", Uuid::new_v4().simple(), Uuid::new_v4().simple());
        SharedSecrets { log_id: Uuid::now_v7(), token_key: secret(), credential: secret() }
    }
}
