//! The gateway's configuration, as its TOML file has it.

mod mistakes;
#[cfg(test)]
mod tests;
mod work;

use std::{collections::BTreeMap, net::SocketAddr, num::NonZeroUsize, path::PathBuf};

use consistency::{Key, KeyError, KeyId, KeyRing, LogId, Name};
use process::{
    admin::AdminConfig,
    config::{Period, Secret},
    nats::NatsConfig,
    postgres::PostgresConfig,
    server::ServerLimits,
    telemetry::LogConfig,
    tls::ServerTlsConfig,
    trace::OtlpConfig,
};
use serde::Deserialize;
use uuid::Uuid;

use crate::{events::EventsConfig, gather::GatherBounds, proxied::RouteConfig};

pub use self::work::{FoldConfig, ReadConfig, ViewConfig, WriteConfig};
pub use crate::auth::{AuthConfig, AuthMode, JwtConfig, TrustedHeaderConfig};
pub use crate::cors::CorsConfig;
pub use crate::rate_limit::RateLimitConfig;

/// All of it.
#[derive(Debug, Clone, Deserialize)]
pub struct GatewayConfig {
    /// Name of this region.
    pub region: Name,
    /// Whether this region accepts writes.
    #[serde(default)]
    pub primary: bool,
    /// The public listener.
    pub listen: ListenConfig,
    /// The listener for those who run the gateway.
    pub admin: AdminConfig,
    /// Identity of the log.
    pub log: LogConfigSection,
    /// How tokens are sealed and carried.
    pub token: TokenConfig,
    /// This region's read models.
    pub database: PostgresConfig,
    /// The log; at the primary only.
    pub log_database: Option<PostgresConfig>,
    /// This region's NATS server.
    pub nats: NatsConfig,
    /// The relay's NATS user; at the primary only.
    pub relay: Option<RelaySection>,
    /// Where the primary is; everywhere else.
    pub primary_region: Option<PrimaryConfig>,
    /// How regions know each other.
    pub regions: RegionsConfig,
    /// Who may call.
    pub auth: AuthConfig,
    /// How often each caller may ask.
    pub rate_limit: Option<RateLimitConfig>,
    /// Pages of which other origins may ask.
    pub cors: Option<CorsConfig>,
    /// Bounds of reads.
    #[serde(default)]
    pub read: ReadConfig,
    /// What differs for single views.
    #[serde(default)]
    pub views: BTreeMap<String, ViewConfig>,
    /// How aggregates are folded from the log; at the primary only.
    #[serde(default)]
    pub fold: FoldConfig,
    /// Bounds of writes.
    #[serde(default)]
    pub write: WriteConfig,
    /// Paths that lead to services of the user's own.
    #[serde(default, rename = "route")]
    pub routes: Vec<RouteConfig>,
    /// Bounds of server-sent events.
    #[serde(default)]
    pub events: EventsConfig,
    /// How to log.
    #[serde(default, rename = "logging")]
    pub logs: LogConfig,
    /// The collector of traces and metrics.
    #[serde(default)]
    pub otlp: OtlpConfig,
}

/// The public listener.
#[derive(Debug, Clone, Deserialize)]
pub struct ListenConfig {
    /// Where; port 0 takes a free one.
    pub address: SocketAddr,
    /// How callers reach it, be it through a balancer. Cookies are `Secure` unless it is `http`.
    #[serde(default)]
    pub scheme: Scheme,
    /// Bound on one request from its first byte to its answer.
    #[serde(default = "request_timeout_default")]
    pub request_timeout: Period,
    /// Bytes of one request's body.
    #[serde(default = "body_bytes_max_default")]
    pub body_bytes_max: usize,
    /// Requests under way at once; further ones are refused as `overloaded`.
    #[serde(default = "requests_max_default")]
    pub requests_max: usize,
    /// Threads that answer requests; as many as there are processors unless it is set. A connection stays
    /// with one of them.
    pub threads: Option<NonZeroUsize>,
    /// Bounds of connections.
    #[serde(default)]
    pub limits: ServerLimits,
    /// Its certificate; without it, connections are in the clear.
    pub tls: Option<ServerTlsConfig>,
}

fn request_timeout_default() -> Period {
    Period::from_secs(10)
}

fn body_bytes_max_default() -> usize {
    1024 * 1024
}

fn requests_max_default() -> usize {
    50_000
}

/// What callers see in front of the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scheme {
    /// In the clear: for local use.
    Http,
    /// Encrypted.
    #[default]
    Https,
}

/// Identity of the log.
#[derive(Debug, Clone, Copy, Deserialize)]
pub struct LogConfigSection {
    /// Made once, the same in every region.
    pub id: Uuid,
}

/// How tokens are sealed and carried.
#[derive(Debug, Clone, Deserialize)]
pub struct TokenConfig {
    /// The key that seals; all keys open.
    pub signing_key: u16,
    /// The ring.
    pub keys: Vec<KeyConfig>,
    /// Whether browsers carry the token in a cookie.
    #[serde(default)]
    pub cookie: bool,
}

/// One key of the ring.
#[derive(Debug, Clone, Deserialize)]
pub struct KeyConfig {
    /// Its number.
    pub id: u16,
    /// At least 32 bytes.
    pub secret: Secret,
}

/// The relay's NATS user. The server is the region's.
#[derive(Debug, Clone, Deserialize)]
pub struct RelaySection {
    /// Its name; the only user that may publish events.
    pub user: Option<String>,
    /// Its password.
    pub password: Option<Secret>,
    /// Copies of the stream in the primary's NATS cluster.
    #[serde(default = "one")]
    pub stream_replica_count: usize,
    /// How long the stream keeps events; 0 keeps them whatever their age. The log keeps them all.
    #[serde(default = "for_ever")]
    pub stream_age_max: Period,
    /// Bytes of events that the stream keeps; as many as the server allows when it is not set.
    #[serde(default)]
    pub stream_bytes_max: Option<u64>,
}

fn for_ever() -> Period {
    Period::from_secs(0)
}

fn one() -> usize {
    1
}

/// Where the primary is.
#[derive(Debug, Clone, Deserialize)]
pub struct PrimaryConfig {
    /// Name of the primary region.
    pub name: Name,
    /// Its public listener, as in `https://primary.example.com` or `http://10.0.0.1:8080`.
    pub url: String,
    /// Certificates, in PEM, that its own must follow from when the URL is an `https` one; the machine's
    /// own unless set.
    pub tls_ca: Option<PathBuf>,
    /// Requests under way to it at once. They share one connection, so no more than the primary takes
    /// on one (`listen.limits.streams_max` there).
    #[serde(default = "forwards_max_default")]
    pub forwards_max: usize,
    /// How many of them may be reads, which may wait there; the rest is kept for writes.
    #[serde(default = "forwarded_reads_max_default")]
    pub forwarded_reads_max: usize,
    /// Requests of proxied routes under way to it at once. They have a connection each.
    #[serde(default = "forwarded_streams_max_default")]
    pub forwarded_streams_max: usize,
    /// Bound on connecting to it.
    #[serde(default = "primary_connect_timeout_default")]
    pub connect_timeout: Period,
    /// Failures in a row after which it is left alone for a while.
    #[serde(default = "breaker_failures_max_default")]
    pub breaker_failures_max: u32,
    /// For how long.
    #[serde(default = "breaker_open_default")]
    pub breaker_open: Period,
    /// How often its head is asked for when nothing else tells it.
    #[serde(default = "heartbeat_interval_default")]
    pub heartbeat_interval: Period,
}

fn forwards_max_default() -> usize {
    240
}

fn forwarded_reads_max_default() -> usize {
    160
}

fn forwarded_streams_max_default() -> usize {
    256
}

fn primary_connect_timeout_default() -> Period {
    Period::from_secs(2)
}

fn breaker_failures_max_default() -> u32 {
    5
}

fn breaker_open_default() -> Period {
    Period::from_secs(1)
}

fn heartbeat_interval_default() -> Period {
    Period::from_secs(2)
}

/// How regions know each other.
#[derive(Debug, Clone, Deserialize)]
pub struct RegionsConfig {
    /// Shared by all regions' gateways and projectors.
    pub credential: Secret,
    /// Bytes of the log that each region is given a second; at the primary only.
    #[serde(default = "log_bytes_per_second_max_default")]
    pub log_bytes_per_second_max: u64,
}

fn log_bytes_per_second_max_default() -> u64 {
    64 * 1024 * 1024
}

impl GatewayConfig {
    /// The ring of keys for tokens of the configured log.
    pub fn key_ring(&self) -> Result<KeyRing, KeyError> {
        let keys = self.token.keys.iter();
        let keys = keys
            .map(|key| Key::new(KeyId(key.id), key.secret.expose().as_bytes()))
            .collect::<Result<_, _>>()?;
        KeyRing::new(LogId::new(self.log.id), keys, KeyId(self.token.signing_key))
    }

    /// The name of the primary region, be it this one.
    pub fn primary_name(&self) -> &Name {
        self.primary_region.as_ref().map_or(&self.region, |primary| &primary.name)
    }

    /// How reads of rows are gathered; `None` when each asks for itself.
    pub fn gather(&self) -> Option<GatherBounds> {
        self.read.gather.then_some(GatherBounds {
            queries_max: self.read.gather_queries_max,
            keys_max: self.read.gather_keys_max,
            timeout: self.read.query_timeout.get(),
        })
    }
}
