//! The primary's server and the regions' servers, joined through the WAN proxies.

use crate::nats::{Config, Role, Secret, Server};
use crate::proxy::Proxies;
use crate::{Error, ports};

/// The name of the proxy a region's leaf node goes through.
pub fn event_link(region: &str) -> String {
    format!("events-{region}")
}

/// Servers of several regions. The first is the primary.
#[derive(Debug)]
pub struct Topology {
    /// The primary's server.
    pub primary: Server,
    /// The other regions' servers.
    pub regions: Vec<Server>,
}

impl Topology {
    /// Starts the servers, and a proxy called `events-<region>` for each region that joins the primary. `operator`
    /// as in [`Config::operator`].
    pub async fn start(
        proxies: &Proxies,
        primary: &str,
        regions: &[&str],
        operator: bool,
    ) -> Result<Self, Error> {
        let secret = Secret::random();
        let leafnode_port = ports::free()?;
        let names = regions.iter().map(|region| (*region).to_owned()).collect();
        let role = Role::Primary { leafnode_port, regions: names };
        let origin = Config { secret: secret.clone(), operator, ..Config::local(primary, role)? };
        let origin = Server::start(origin).await?;
        let mut joined = Vec::new();
        for region in regions {
            let leaf_remote = format!("127.0.0.1:{}", ports::free()?);
            let upstream = format!("127.0.0.1:{leafnode_port}");
            proxies.create(&event_link(region), &leaf_remote, &upstream).await?;
            let role = Role::Region { primary: primary.to_owned(), leaf_remote };
            let config =
                Config { secret: secret.clone(), operator, ..Config::local(*region, role)? };
            joined.push(Server::start(config).await?);
        }
        Ok(Topology { primary: origin, regions: joined })
    }

    /// The server of a region, the primary's too.
    pub fn server(&self, region: &str) -> Option<&Server> {
        std::iter::once(&self.primary)
            .chain(&self.regions)
            .find(|server| server.config().region == region)
    }
}
