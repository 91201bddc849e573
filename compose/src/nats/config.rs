//! The configuration of a region's NATS server: who may do what, and how the regions are joined.
//!
//! Density of positions hangs on these permissions: one stray publish to `events.>` would shift every later sequence.
//! So each user may do what its process needs, and everything else is denied.

use std::fmt::{self, Display, Formatter};
use std::path::PathBuf;

use uuid::Uuid;

use crate::{Error, ports};

/// The account that holds the log's stream, its mirrors and the announcements.
pub const ACCOUNT: &str = "LOG";

/// A server of the topology.
#[derive(Debug, Clone)]
pub struct Config {
    /// The region's name, which is the server's name and its JetStream domain.
    pub region: String,
    /// Primary or not, with what each needs.
    pub role: Role,
    /// The address all its listeners bind to.
    pub bind: String,
    /// Where clients connect.
    pub client_port: u16,
    /// Where the monitoring endpoints are.
    pub monitor_port: u16,
    /// The folder of the streams.
    pub store: PathBuf,
    /// What the passwords are made of.
    pub secret: Secret,
    /// Whether there is a [`User::Operator`]. For tests that cause faults, never for a topology.
    pub operator: bool,
    /// Largest message; the server's own default unless set.
    pub payload_bytes_max: Option<usize>,
    /// What clients have to speak TLS with; without it they speak in the clear.
    pub tls: Option<Tls>,
}

/// The certificate of a server, in files.
#[derive(Debug, Clone)]
pub struct Tls {
    /// Its certificate, in PEM.
    pub certificate: PathBuf,
    /// Its key, in PEM.
    pub key: PathBuf,
    /// What its certificate follows from, for those who connect.
    pub ca: PathBuf,
}

/// What a server is in the topology.
#[derive(Debug, Clone)]
pub enum Role {
    /// Holds the stream; the other regions join it.
    Primary {
        /// Where leaf nodes connect.
        leafnode_port: u16,
        /// The regions that may join.
        regions: Vec<String>,
    },
    /// Joins the primary and mirrors its stream.
    Region {
        /// The primary's region name.
        primary: String,
        /// `host:port` where the primary takes leaf nodes, as seen from here: the WAN proxy, in a topology.
        leaf_remote: String,
    },
}

/// Who connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum User {
    /// Publishes the log. Only at the primary.
    Relay,
    /// Keeps the region's mirror, reads it, and announces what was applied.
    Projector,
    /// Listens to announcements; at the primary it wakes the relay.
    Gateway,
    /// A region's server, joining the primary.
    Leaf(String),
    /// May do everything. Only where [`Config::operator`] says so.
    Operator,
}

impl Display for User {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            User::Relay => f.write_str("relay"),
            User::Projector => f.write_str("projector"),
            User::Gateway => f.write_str("gateway"),
            User::Leaf(region) => write!(f, "leaf-{region}"),
            User::Operator => f.write_str("operator"),
        }
    }
}

/// What the passwords of all users are made of.
#[derive(Clone)]
pub struct Secret(String);

impl Secret {
    /// A secret given by the caller.
    pub fn new(secret: impl Into<String>) -> Self {
        Secret(secret.into())
    }

    /// A secret nobody has had before.
    pub fn random() -> Self {
        Secret(Uuid::new_v4().simple().to_string())
    }

    /// The password of the user called `name`.
    pub fn password(&self, name: &str) -> String {
        format!("{name}-{}", self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Config {
    /// A server on loopback with free ports and a new secret; the store is set when it is started.
    pub fn local(region: impl Into<String>, role: Role) -> Result<Self, Error> {
        let [client_port, monitor_port] = ports::free_many()?;
        Ok(Config {
            region: region.into(),
            role,
            bind: "127.0.0.1".into(),
            client_port,
            monitor_port,
            store: PathBuf::new(),
            secret: Secret::random(),
            operator: false,
            payload_bytes_max: None,
            tls: None,
        })
    }

    fn grants(&self) -> Vec<Grant> {
        let mut grants = match &self.role {
            Role::Primary { regions, .. } => {
                let mut grants = vec![relay(&self.region), primary_projector(&self.region)];
                grants.push(primary_gateway(&self.region));
                grants.extend(regions.iter().map(|region| leaf(&self.region, region)));
                grants
            }
            Role::Region { primary, .. } => {
                vec![region_projector(&self.region, primary), region_gateway(&self.region)]
            }
        };
        if self.operator {
            let everything = vec![">".to_owned()];
            grants.push(Grant::new(User::Operator, everything.clone(), everything));
        }
        grants
    }
}

/// What a user may publish and what it may subscribe to. Nothing else.
struct Grant {
    user: User,
    publish: Vec<String>,
    subscribe: Vec<String>,
}

impl Grant {
    fn new(user: User, publish: Vec<String>, subscribe: Vec<String>) -> Self {
        Grant { user, publish, subscribe }
    }
}

/// Replies to a client's requests.
const INBOX: &str = "_INBOX.>";

fn relay(region: &str) -> Grant {
    let wake = wake_subject(region);
    let mut publish = vec!["events.>".to_owned(), wake.clone()];
    publish
        .extend(api("$JS.API", &["INFO", "STREAM.CREATE.*", "STREAM.UPDATE.*", "STREAM.INFO.*"]));
    publish.extend(api(
        "$JS.API",
        &["STREAM.NAMES", "STREAM.MSG.GET.*", "DIRECT.GET.*", "DIRECT.GET.*.>"],
    ));
    Grant::new(User::Relay, publish, vec![INBOX.into(), wake])
}

/// What reading a stream takes: consumers of every kind, their acknowledgements and their flow control.
fn consume() -> Vec<String> {
    let mut publish =
        api("$JS.API", &["INFO", "STREAM.INFO.*", "STREAM.NAMES", "STREAM.MSG.GET.*"]);
    publish.extend(api("$JS.API", &["DIRECT.GET.*", "DIRECT.GET.*.>", "CONSUMER.CREATE.*"]));
    publish.extend(api("$JS.API", &["CONSUMER.CREATE.*.>", "CONSUMER.INFO.*.*"]));
    publish.extend(api("$JS.API", &["CONSUMER.MSG.NEXT.*.*", "CONSUMER.DELETE.*.*"]));
    publish.extend(["$JS.ACK.>".to_owned(), "$JS.FC.>".to_owned()]);
    publish
}

fn primary_projector(region: &str) -> Grant {
    let mut publish = consume();
    publish.push(currency_subject(region));
    Grant::new(User::Projector, publish, vec![INBOX.into()])
}

fn primary_gateway(region: &str) -> Grant {
    let wake = wake_subject(region);
    Grant::new(
        User::Gateway,
        vec![wake.clone()],
        vec![INBOX.into(), currency_subject(region), wake],
    )
}

/// A leaf node's rights, seen from the primary: it publishes what its region sends and subscribes to what its region
/// wants. Announcements and events are in neither list.
///
/// A mirror asks for a consumer at the origin, is answered on `$JSC.R`, gets its messages on `$JS.M`, and confirms
/// them on `$JS.FC`: without the last it stalls after the first megabytes, and says nothing.
fn leaf(primary: &str, region: &str) -> Grant {
    let origin = format!("$JS.{primary}.API");
    let mut publish = api(&origin, &["CONSUMER.CREATE.*", "CONSUMER.CREATE.*.>", "STREAM.INFO.*"]);
    publish.push("$JS.FC.*.>".into());
    let subscribe = vec![INBOX.into(), "$JSC.R.*".into(), "$JS.M.*".into()];
    Grant::new(User::Leaf(region.into()), publish, subscribe)
}

/// Besides reading, it keeps the mirror: creates it, asks how far the origin is, and says the mirror's own request for
/// a consumer again when a cut swallowed it. The server would wait half a minute for the answer to a lost request.
fn region_projector(region: &str, primary: &str) -> Grant {
    let repeated = format!("$JS.{primary}.API.CONSUMER.CREATE.*");
    let mut publish = consume();
    publish.extend(api("$JS.API", &["STREAM.CREATE.*", "STREAM.UPDATE.*", "STREAM.DELETE.*"]));
    publish.push(format!("$JS.{primary}.API.STREAM.INFO.*"));
    publish.extend([repeated.clone(), currency_subject(region)]);
    Grant::new(User::Projector, publish, vec![INBOX.into(), repeated])
}

fn region_gateway(region: &str) -> Grant {
    Grant::new(User::Gateway, Vec::new(), vec![INBOX.into(), currency_subject(region)])
}

fn api(prefix: &str, calls: &[&str]) -> Vec<String> {
    calls.iter().map(|call| format!("{prefix}.{call}")).collect()
}

/// Where a region's projector announces what it has applied.
pub fn currency_subject(region: &str) -> String {
    format!("tidemark.{region}.currency")
}

/// Where the primary's gateways wake the relay.
pub fn wake_subject(region: &str) -> String {
    format!("tidemark.{region}.relay")
}

/// The configuration file's text.
impl Display for Config {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let Config { region, bind, client_port, monitor_port, .. } = self;
        writeln!(f, "server_name: \"{region}\"")?;
        writeln!(f, "listen: \"{bind}:{client_port}\"")?;
        writeln!(f, "http: \"{bind}:{monitor_port}\"")?;
        // A silent link is noticed in seconds: the default of two minutes is longer than most cuts.
        writeln!(f, "ping_interval: \"5s\"\nping_max: 2\n")?;
        if let Some(bytes) = self.payload_bytes_max {
            writeln!(f, "max_payload: {bytes}")?;
        }
        writeln!(f, "jetstream {{")?;
        writeln!(f, "  domain: \"{region}\"")?;
        writeln!(f, "  store_dir: \"{}\"", self.store.display())?;
        writeln!(f, "  max_memory_store: 64MB\n  max_file_store: 10GB\n}}\n")?;
        if let Some(tls) = &self.tls {
            let (certificate, key) = (tls.certificate.display(), tls.key.display());
            writeln!(f, "tls {{\n  cert_file: \"{certificate}\"\n  key_file: \"{key}\"\n}}\n")?;
        }
        self.fmt_leafnodes(f)?;
        writeln!(f, "system_account: SYS\naccounts {{\n  SYS {{}}\n  {ACCOUNT} {{")?;
        writeln!(f, "    jetstream: enabled\n    users: [")?;
        for grant in self.grants() {
            self.fmt_grant(&grant, f)?;
        }
        writeln!(f, "    ]\n  }}\n}}")
    }
}

impl Config {
    fn fmt_leafnodes(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match &self.role {
            Role::Primary { leafnode_port, .. } => {
                writeln!(f, "leafnodes {{\n  listen: \"{}:{leafnode_port}\"\n}}\n", self.bind)
            }
            Role::Region { leaf_remote, .. } => {
                let user = User::Leaf(self.region.clone()).to_string();
                let password = self.secret.password(&user);
                writeln!(f, "leafnodes {{\n  reconnect: \"1s\"\n  remotes: [{{")?;
                writeln!(f, "    url: \"nats-leaf://{user}:{password}@{leaf_remote}\"")?;
                writeln!(f, "    account: {ACCOUNT}")?;
                // Otherwise the server learns the primary's own address and reconnects around the proxy.
                writeln!(f, "    ignore_discovered_servers: true\n  }}]\n}}\n")
            }
        }
    }

    fn fmt_grant(&self, grant: &Grant, f: &mut Formatter<'_>) -> fmt::Result {
        let user = grant.user.to_string();
        let password = self.secret.password(&user);
        writeln!(f, "      {{\n        user: \"{user}\", password: \"{password}\"")?;
        writeln!(f, "        permissions {{")?;
        fmt_subjects("publish", &grant.publish, f)?;
        fmt_subjects("subscribe", &grant.subscribe, f)?;
        writeln!(f, "        }}\n      }}")
    }
}

/// An empty list would allow everything, so it is written as a denial.
fn fmt_subjects(kind: &str, subjects: &[String], f: &mut Formatter<'_>) -> fmt::Result {
    if subjects.is_empty() {
        return writeln!(f, "          {kind}: {{ deny: [\">\"] }}");
    }
    let subjects: Vec<String> = subjects.iter().map(|subject| format!("\"{subject}\"")).collect();
    writeln!(f, "          {kind}: {{ allow: [{}] }}", subjects.join(", "))
}
