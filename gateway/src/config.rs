//! The gateway's configuration, as its TOML file has it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    path::PathBuf,
};

use consistency::{Key, KeyError, KeyId, KeyRing, LogId, Name, Policy};
use process::{
    admin::AdminConfig,
    config::{Config, Period, Secret},
    nats::NatsConfig,
    postgres::PostgresConfig,
    server::ServerLimits,
    telemetry::LogConfig,
    tls::{self, ServerTlsConfig},
    trace::OtlpConfig,
};
use serde::Deserialize;
use uuid::Uuid;

use crate::{
    currency::WaiterBounds, events::EventsConfig, gather::GatherBounds, proxied::RouteConfig,
};

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

/// Bounds of reads.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct ReadConfig {
    /// Bound on one wait, whatever the caller asks for.
    pub wait_max: Period,
    /// Reads that wait at once; further ones are refused as `waiters-full`.
    pub waiters_max: usize,
    /// Of them those of one caller who is known by a name; further ones are refused as `rate-limited`.
    pub waiters_per_caller_max: usize,
    /// Reads that go on at once when a commit releases many.
    pub released_max: usize,
    /// Reads that query the database at once; the others stand in line.
    pub queries_max: usize,
    /// Whether reads of rows of one view that come while others are asked for are asked for together.
    pub gather: bool,
    /// Gathered queries of one view at once.
    pub gather_queries_max: usize,
    /// Rows of one gathered query.
    pub gather_keys_max: usize,
    /// Bytes of rows that are kept in memory; 0 keeps none.
    pub memory_bytes_max: u64,
    /// What tells rows apart that have changed from those that have not: 8 bytes for each, in each
    /// partition of each projection. Rows that share one are taken for changed together.
    pub memory_slots_per_partition: usize,
    /// Items of one page of a list.
    pub page_items_max: u32,
    /// Items of a page when the caller does not say.
    pub page_items_default: u32,
    /// Events of one aggregate that are folded for one read.
    pub fold_events_max: u32,
    /// Bound on one look at the database, so that there is time left to ask the primary.
    pub query_timeout: Period,
    /// How long hints may be silent before checkpoints are polled for those who wait.
    pub hints_silence_max: Period,
    /// How often checkpoints are polled then.
    pub poll_interval: Period,
    /// How often the database is looked at when all is well.
    pub refresh_interval: Period,
    /// Lag above which the region counts as degraded.
    pub degraded_lag: Period,
    /// The chain of views that have none of their own.
    pub policy: String,
}

impl Default for ReadConfig {
    fn default() -> Self {
        Self {
            wait_max: Period::from_secs(5),
            waiters_max: 50_000,
            waiters_per_caller_max: 1000,
            released_max: 512,
            queries_max: 64,
            gather: true,
            gather_queries_max: 2,
            gather_keys_max: 256,
            memory_bytes_max: 64 * 1024 * 1024,
            memory_slots_per_partition: 8192,
            page_items_max: 500,
            page_items_default: 50,
            fold_events_max: 100_000,
            query_timeout: Period::from_secs(2),
            hints_silence_max: Period::from_secs(1),
            poll_interval: Period::from_millis(100),
            refresh_interval: Period::from_secs(2),
            degraded_lag: Period::from_secs(30),
            policy: Policy::shipped().to_string(),
        }
    }
}

/// How aggregates are folded from the log.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(default)]
pub struct FoldConfig {
    /// A fold of so many events leaves a snapshot of the state behind, so that the next one need not
    /// begin at the first event; 0 leaves none.
    pub snapshot_events: u32,
}

impl Default for FoldConfig {
    fn default() -> Self {
        Self { snapshot_events: 500 }
    }
}

impl ReadConfig {
    /// How many reads may wait, and go on.
    pub fn waiter_bounds(&self) -> WaiterBounds {
        WaiterBounds {
            waiters_max: self.waiters_max,
            per_caller_max: self.waiters_per_caller_max,
            released_max: self.released_max,
        }
    }
}

/// What differs for one view.
#[derive(Debug, Clone, Deserialize)]
pub struct ViewConfig {
    /// Its chain, written like the header `Consistency-Policy`.
    pub policy: String,
}

/// Bounds of writes.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct WriteConfig {
    /// Largest event with its headers; at most the NATS server's `max_payload`.
    pub event_bytes_max: usize,
    /// Events of one append.
    pub events_max: usize,
    /// How often a command is run again when its aggregate moved meanwhile.
    pub command_attempts_max: u32,
    /// How long the answer to a write under an `Idempotency-Key` is kept for its repeats.
    pub idempotency_age_max: Period,
    /// Types of aggregates whose writes must say which version they are meant for. Read at the primary.
    pub if_match_required: BTreeSet<Name>,
}

impl Default for WriteConfig {
    fn default() -> Self {
        Self {
            event_bytes_max: 512 * 1024,
            events_max: 500,
            command_attempts_max: 8,
            idempotency_age_max: Period::from_secs(24 * 60 * 60),
            if_match_required: BTreeSet::new(),
        }
    }
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

    fn policy_mistakes(&self) -> Vec<String> {
        let default = ("read.policy".to_owned(), &self.read.policy);
        let views = self.views.iter().map(|(view, c)| (format!("views.{view}.policy"), &c.policy));
        std::iter::once(default)
            .chain(views)
            .filter_map(|(key, text)| Some(format!("{key}: {}", Policy::parse(text).err()?)))
            .collect()
    }

    fn place_mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut demand = |holds: bool, mistake: &str| {
            if !holds {
                mistakes.push(mistake.to_owned());
            }
        };
        if self.primary {
            demand(self.log_database.is_some(), "log_database: must be set at the primary");
            demand(self.relay.is_some(), "relay: must be set at the primary");
            demand(self.primary_region.is_none(), "primary_region: this region is the primary");
        } else {
            demand(self.log_database.is_none(), "log_database: only the primary has the log");
            demand(self.relay.is_none(), "relay: only the primary runs a relay");
            demand(self.primary_region.is_some(), "primary_region: must be set");
        }
        if let Some(relay) = &self.relay {
            let count = relay.stream_replica_count;
            demand((1..=5).contains(&count), "relay.stream_replica_count: must be from 1 to 5");
            // The stream would lose an event that the log has just taken.
            let room = relay.stream_bytes_max.is_none_or(|max| {
                usize::try_from(max).is_ok_and(|max| self.write.event_bytes_max < max)
            });
            demand(room, "relay.stream_bytes_max: must be above write.event_bytes_max");
        }
        if let Some(primary) = &self.primary_region {
            demand(primary.name != self.region, "primary_region.name: is this region");
            let url = primary.url.parse::<http::Uri>().ok();
            let whole = url.is_some_and(|url| {
                matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()
            });
            demand(whole, "primary_region.url: must be a URL like http://10.0.0.1:8080");
            demand(0 < primary.forwards_max, "primary_region.forwards_max: must be above zero");
            let room = primary.forwarded_reads_max < primary.forwards_max;
            demand(room, "primary_region.forwarded_reads_max: must be below forwards_max");
        }
        mistakes
    }

    fn tls_mistakes(&self) -> Vec<String> {
        let mut mistakes = self.nats.mistakes();
        mistakes.extend(self.listen.tls.iter().flat_map(|own| own.mistakes("listen.tls")));
        let primary = self.primary_region.as_ref().and_then(|primary| primary.tls_ca.as_deref());
        mistakes.extend(tls::roots_mistakes("primary_region.tls_ca", primary));
        mistakes
    }

    fn bound_mistakes(&self) -> Vec<String> {
        let bounds = [
            (self.listen.body_bytes_max, "listen.body_bytes_max"),
            (self.listen.requests_max, "listen.requests_max"),
            (self.listen.limits.header_count_max, "listen.limits.header_count_max"),
            (
                self.listen.limits.answer_stall_max.millis() as usize,
                "listen.limits.answer_stall_max",
            ),
            (self.read.waiters_max, "read.waiters_max"),
            (self.read.waiters_per_caller_max, "read.waiters_per_caller_max"),
            (self.read.released_max, "read.released_max"),
            (self.read.queries_max, "read.queries_max"),
            (self.read.gather_queries_max, "read.gather_queries_max"),
            (self.read.gather_keys_max, "read.gather_keys_max"),
            (self.read.memory_slots_per_partition, "read.memory_slots_per_partition"),
            (self.read.page_items_default as usize, "read.page_items_default"),
            (self.write.events_max, "write.events_max"),
            (self.regions.log_bytes_per_second_max as usize, "regions.log_bytes_per_second_max"),
            (self.write.command_attempts_max as usize, "write.command_attempts_max"),
            (self.write.idempotency_age_max.millis() as usize, "write.idempotency_age_max"),
            (self.read.poll_interval.millis() as usize, "read.poll_interval"),
            (self.read.query_timeout.millis() as usize, "read.query_timeout"),
            (self.read.refresh_interval.millis() as usize, "read.refresh_interval"),
            (self.listen.request_timeout.millis() as usize, "listen.request_timeout"),
        ];
        let zero = bounds.iter().filter(|(bound, _)| *bound == 0);
        let mut mistakes: Vec<String> =
            zero.map(|(_, key)| format!("{key}: must be above zero")).collect();
        if self.read.page_items_max < self.read.page_items_default {
            mistakes.push("read.page_items_default: is above read.page_items_max".to_owned());
        }
        mistakes
    }
}

impl Config for GatewayConfig {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = self.admin.mistakes();
        mistakes.extend(self.place_mistakes());
        mistakes.extend(self.policy_mistakes());
        mistakes.extend(self.bound_mistakes());
        mistakes.extend(self.events.mistakes());
        let routes = self.routes.iter().enumerate();
        mistakes.extend(routes.flat_map(|(nth, route)| route.mistakes(&format!("route.{nth}"))));
        mistakes.extend(self.auth.mistakes());
        mistakes.extend(self.rate_limit.iter().flat_map(RateLimitConfig::mistakes));
        mistakes.extend(self.cors.iter().flat_map(CorsConfig::mistakes));
        mistakes.extend(self.tls_mistakes());
        mistakes.extend(self.key_ring().err().map(|error| format!("token: {error}")));
        if self.regions.credential.expose().len() < 16 {
            mistakes.push("regions.credential: must have at least 16 bytes".to_owned());
        }
        mistakes
    }
}

#[cfg(test)]
mod tests {
    use process::config::{ConfigError, load_from};

    use super::*;

    const REGION: &str = r#"
        region = "eu-west"
        listen.address = "127.0.0.1:0"
        admin.address = "127.0.0.1:0"
        log.id = "00000000-0000-0000-0000-000000000001"
        token = { signing_key = 1, keys = [{ id = 1, secret = "0123456789abcdef0123456789abcdef" }] }
        database.url = "postgres://me:hush@127.0.0.1/region"
        nats = { url = "nats://127.0.0.1:4222", user = "gateway", password = "hush" }
        primary_region = { name = "us-east", url = "http://127.0.0.1:8081" }
        regions.credential = "0123456789abcdef"
        auth.mode = "none"
        views.order-detail.policy = "wait;ms=250, forward"
    "#;

    fn read(text: &str) -> Result<GatewayConfig, ConfigError> {
        load_from(text.parse().unwrap(), "GATEWAY", [])
    }

    fn mistakes(text: &str) -> String {
        match read(text) {
            Err(ConfigError::Mistakes(mistakes)) => mistakes.join("\n"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_region_needs_little_and_prints_no_secret() {
        let config = read(REGION).unwrap();
        assert_eq!(config.primary_name().as_str(), "us-east");
        let printed = format!("{config:?}");
        assert!(!printed.contains("hush") && !printed.contains("0123456789abcdef"), "{printed}");
    }

    #[test]
    fn a_primary_without_a_log_is_refused() {
        let found = mistakes(&format!("primary = true\n{REGION}"));
        for key in ["log_database:", "relay:", "primary_region:"] {
            assert!(found.contains(key), "{found}");
        }
    }

    #[test]
    fn weak_secrets_and_wrong_policies_are_refused() {
        let weak = REGION.replace("0123456789abcdef0123456789abcdef", "short");
        assert!(mistakes(&weak).contains("token: key 1"));
        let wrong = REGION.replace("wait;ms=250, forward", "hope");
        assert!(mistakes(&wrong).contains("views.order-detail.policy:"));
        let open =
            REGION.replace("admin.address = \"127.0.0.1:0\"", "admin.address = \"0.0.0.0:1\"");
        assert!(mistakes(&open).contains("admin.credential:"));
    }
}
