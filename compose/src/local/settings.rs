//! The configuration files of gateways and projectors, as text.

use std::fmt::{self, Display, Formatter};

use uuid::Uuid;

/// What all regions share.
#[derive(Clone)]
pub struct SharedSecrets {
    /// The log's identity.
    pub log_id: Uuid,
    /// Seals the tokens.
    pub token_key: String,
    /// Proves one region to another.
    pub credential: String,
}

impl fmt::Debug for SharedSecrets {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "SharedSecrets of {}", self.log_id)
    }
}

/// A NATS server and who connects to it.
#[derive(Debug, Clone)]
pub struct NatsUser {
    url: String,
    user: String,
    password: String,
}

impl NatsUser {
    /// A user, given as name and password, of the server at `url`.
    pub fn new(url: String, (user, password): (String, String)) -> Self {
        NatsUser { url, user, password }
    }
}

/// Where a gateway is.
#[derive(Debug, Clone)]
pub enum Place {
    /// In the region that accepts writes.
    Primary {
        /// The log.
        log_database_url: String,
        /// Who publishes it.
        relay: NatsUser,
    },
    /// Elsewhere.
    Region {
        /// The primary's region name.
        primary: String,
        /// The primary's public listener, as seen from here.
        primary_url: String,
    },
}

/// What a gateway is configured with.
#[derive(Debug, Clone)]
pub struct GatewaySettings {
    /// Its region.
    pub region: String,
    /// Primary or not.
    pub place: Place,
    /// The public listener's address.
    pub listen: String,
    /// The admin listener's address.
    pub admin: String,
    /// The read models.
    pub database_url: String,
    /// The region's NATS server.
    pub nats: NatsUser,
    /// What it shares with the others.
    pub secrets: SharedSecrets,
    /// Further lines, before the first table.
    pub extra: String,
}

/// What a projector is configured with.
#[derive(Debug, Clone)]
pub struct ProjectorSettings {
    /// Its region.
    pub region: String,
    /// The primary's region name.
    pub primary: String,
    /// The admin listener's address.
    pub admin: String,
    /// The read models.
    pub database_url: String,
    /// The region's NATS server.
    pub nats: NatsUser,
    /// The primary's public listener, as seen from here.
    pub primary_url: String,
    /// What it shares with the others.
    pub secrets: SharedSecrets,
}

impl Display for GatewaySettings {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let SharedSecrets { log_id, token_key, credential } = &self.secrets;
        let primary = matches!(self.place, Place::Primary { .. });
        writeln!(f, "region = \"{}\"\nprimary = {primary}", self.region)?;
        if !self.extra.is_empty() {
            writeln!(f, "{}", self.extra.trim_end())?;
        }
        writeln!(f, "\n[listen]\naddress = \"{}\"\nscheme = \"http\"", self.listen)?;
        write_admin(&self.admin, &self.secrets.credential, f)?;
        writeln!(f, "\n[auth]\nmode = \"none\"")?;
        writeln!(f, "\n[log]\nid = \"{log_id}\"")?;
        writeln!(f, "\n[token]\nsigning_key = 1\nkeys = [{{ id = 1, secret = \"{token_key}\" }}]")?;
        writeln!(f, "\n[regions]\ncredential = \"{credential}\"")?;
        writeln!(f, "\n[database]\nurl = \"{}\"", self.database_url)?;
        write_nats(&self.nats, f)?;
        match &self.place {
            Place::Primary { log_database_url, relay } => {
                writeln!(f, "\n[log_database]\nurl = \"{log_database_url}\"")?;
                writeln!(
                    f,
                    "\n[relay]\nuser = \"{}\"\npassword = \"{}\"",
                    relay.user, relay.password
                )
            }
            Place::Region { primary, primary_url } => {
                writeln!(f, "\n[primary_region]\nname = \"{primary}\"\nurl = \"{primary_url}\"")
            }
        }
    }
}

impl Display for ProjectorSettings {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "region = \"{}\"\nprimary_region = \"{}\"", self.region, self.primary)?;
        write_admin(&self.admin, &self.secrets.credential, f)?;
        writeln!(f, "\n[log]\nid = \"{}\"", self.secrets.log_id)?;
        writeln!(f, "\n[database]\nurl = \"{}\"", self.database_url)?;
        write_nats(&self.nats, f)?;
        writeln!(f, "\n[primary_log]\nurl = \"{}\"", self.primary_url)?;
        writeln!(f, "credential = \"{}\"", self.secrets.credential)
    }
}

/// A listener that others can reach wants a credential of them.
fn write_admin(address: &str, credential: &str, f: &mut Formatter<'_>) -> fmt::Result {
    writeln!(f, "\n[admin]\naddress = \"{address}\"")?;
    match address.starts_with("127.") {
        true => Ok(()),
        false => writeln!(f, "credential = \"{credential}\""),
    }
}

fn write_nats(nats: &NatsUser, f: &mut Formatter<'_>) -> fmt::Result {
    let NatsUser { url, user, password } = nats;
    writeln!(f, "\n[nats]\nurl = \"{url}\"\nuser = \"{user}\"\npassword = \"{password}\"")
}
