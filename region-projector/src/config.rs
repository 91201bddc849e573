//! The configuration of a region's projector.

mod limits;

use std::collections::BTreeMap;
use std::path::PathBuf;

use process::admin::AdminConfig;
use process::config::{Config, Period, Secret, SecretUrl};
use process::nats::NatsConfig;
use process::postgres::PostgresConfig;
use process::telemetry::LogConfig;
use process::tls;
use process::trace::OtlpConfig;
use serde::Deserialize;
use uuid::Uuid;

use crate::rebuild::RebuildConfig;
pub use limits::{ApplyConfig, LimitsConfig, PartitionSet};

/// The whole file.
#[derive(Debug, Clone, Deserialize)]
pub struct ProjectorConfig {
    /// The region whose read models are kept here.
    pub region: String,
    /// The region that accepts writes. Where it is this one, the stream itself is read.
    pub primary_region: String,
    /// The listener for those who run it.
    pub admin: AdminConfig,
    /// Which log is read.
    pub log: LogIdentity,
    /// How it logs.
    #[serde(default)]
    pub logging: LogConfig,
    /// The collector of traces and metrics.
    #[serde(default)]
    pub otlp: OtlpConfig,
    /// The region's database.
    pub database: PostgresConfig,
    /// The region's NATS server.
    pub nats: StreamConfig,
    /// The log over HTTP.
    pub primary_log: PrimaryLogConfig,
    /// How events are applied.
    #[serde(default)]
    pub apply: ApplyConfig,
    /// What single projections have otherwise, by name.
    #[serde(default)]
    pub projection: BTreeMap<String, LimitsConfig>,
    /// How partitions are shared with other processes.
    #[serde(default)]
    pub sharing: SharingConfig,
    /// Bounds of building a projection anew.
    #[serde(default)]
    pub rebuild: RebuildConfig,
    /// How long a shutdown may take.
    #[serde(default = "grace_default")]
    pub shutdown_grace: Period,
}

/// Which log is read: the same everywhere.
#[derive(Debug, Clone, Deserialize)]
pub struct LogIdentity {
    /// Made once, with the log.
    pub id: Uuid,
}

/// The region's NATS server, and where the stream comes from.
#[derive(Debug, Clone, Deserialize)]
pub struct StreamConfig {
    /// The server and our user there.
    #[serde(flatten)]
    pub server: NatsConfig,
    /// The JetStream domain of the server; the region's name unless set.
    pub domain: Option<String>,
    /// The JetStream domain of the primary; its region's name unless set.
    pub primary_domain: Option<String>,
    /// How often the mirror is compared with its origin, and the primary asked for its epochs.
    #[serde(default = "watch_interval_default")]
    pub watch_interval: Period,
    /// A mirror that is behind and has heard nothing for so long is stalled.
    #[serde(default = "silence_max_default")]
    pub mirror_silence_max: Period,
    /// A stalled mirror is nudged this often at most.
    #[serde(default = "nudge_interval_default")]
    pub nudge_interval: Period,
    /// Bytes that one request to the stream brings at most, unless it is a single message; and of the last
    /// messages that are kept for all who follow the stream's end.
    #[serde(default = "pull_bytes_default")]
    pub pull_bytes_max: usize,
}

/// Where the primary serves its log to other regions.
#[derive(Debug, Clone, Deserialize)]
pub struct PrimaryLogConfig {
    /// The primary gateway's public listener.
    pub url: SecretUrl,
    /// Certificates, in PEM, that its own must follow from when the URL is an `https` one; the machine's
    /// own unless set.
    pub tls_ca: Option<PathBuf>,
    /// The regions' credential.
    pub credential: Secret,
    /// The deadline of one page.
    #[serde(default = "log_deadline_default")]
    pub deadline: Period,
    /// Events of one page.
    #[serde(default = "page_events_default")]
    pub page_events_max: usize,
    /// How often it is asked for more while the mirror is stalled.
    #[serde(default = "poll_interval_default")]
    pub poll_interval: Period,
    /// Events that are read from it at most because the stream does not have them, or no more.
    #[serde(default = "bridge_events_default")]
    pub bridge_events_max: u64,
}

/// How the partitions are shared with the region's other projector processes.
#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
pub struct SharingConfig {
    /// A process that has not renewed its leases for so long, by the database's clock, loses them.
    pub lease: Period,
    /// How often it renews them.
    pub renew_interval: Period,
    /// What this process is called, the same after each start; its host and admin port unless set.
    pub name: Option<String>,
}

impl Default for SharingConfig {
    fn default() -> Self {
        Self { lease: Period::from_secs(5), renew_interval: Period::from_secs(1), name: None }
    }
}

const fn grace_default() -> Period {
    Period::from_secs(10)
}

const fn watch_interval_default() -> Period {
    Period::from_secs(1)
}

const fn silence_max_default() -> Period {
    Period::from_secs(3)
}

const fn nudge_interval_default() -> Period {
    Period::from_secs(5)
}

const fn log_deadline_default() -> Period {
    Period::from_secs(5)
}

const fn poll_interval_default() -> Period {
    Period::from_millis(100)
}

const fn pull_bytes_default() -> usize {
    8 * 1024 * 1024
}

const fn bridge_events_default() -> u64 {
    10_000_000
}

const fn page_events_default() -> usize {
    1000
}

impl ProjectorConfig {
    /// Whether this region holds the log.
    pub fn is_primary(&self) -> bool {
        self.region == self.primary_region
    }

    /// How the events of one projection are applied.
    pub fn apply_to(&self, projection: &str) -> ApplyConfig {
        let own = self.projection.get(projection);
        own.map_or(self.apply, |own| own.over(&self.apply))
    }

    /// The JetStream domain of the region's server.
    pub fn domain(&self) -> &str {
        self.nats.domain.as_deref().unwrap_or(&self.region)
    }

    /// The JetStream domain that the mirror copies from.
    pub fn primary_domain(&self) -> &str {
        self.nats.primary_domain.as_deref().unwrap_or(&self.primary_region)
    }
}

impl Config for ProjectorConfig {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = self.admin.mistakes();
        mistakes.extend(self.nats.server.mistakes());
        let roots = self.primary_log.tls_ca.as_deref();
        mistakes.extend(tls::roots_mistakes("primary_log.tls_ca", roots));
        for (key, name) in [("region", &self.region), ("primary_region", &self.primary_region)] {
            // The name is a token of NATS subjects.
            let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if name.is_empty() || !name.chars().all(plain) {
                mistakes.push(format!("{key}: must be lower-case letters, digits and dashes"));
            }
        }
        if !self.is_primary() && self.domain() == self.primary_domain() {
            mistakes.push("nats.domain: must not be the primary's, a mirror needs its own".into());
        }
        mistakes.extend(self.apply.mistakes("apply"));
        mistakes.extend(self.rebuild.mistakes());
        for (name, limits) in &self.projection {
            // What is wrong everywhere has been said.
            let wrong =
                limits.over(&ApplyConfig::default()).mistakes(&format!("projection.{name}"));
            mistakes.extend(wrong);
        }
        let positive = [
            ("nats.pull_bytes_max", self.nats.pull_bytes_max),
            ("primary_log.page_events_max", self.primary_log.page_events_max),
        ];
        let zero = positive.into_iter().filter(|(_, value)| *value == 0);
        mistakes.extend(zero.map(|(key, _)| format!("{key}: must not be zero")));
        if self.sharing.lease.get() < 2 * self.sharing.renew_interval.get() {
            mistakes.push("sharing.lease: must be twice sharing.renew_interval at least".into());
        }
        if self.apply.retry_pause_max < self.apply.retry_pause_min {
            mistakes.push("apply.retry_pause_max: must not be below apply.retry_pause_min".into());
        }
        mistakes
    }
}

#[cfg(test)]
mod tests {
    use process::config::load_from;

    use super::*;

    const FILE: &str = r#"
        region = "eu-west"
        primary_region = "us-east"
        admin.address = "127.0.0.1:0"
        log.id = "7a5f7f0e-52a3-4f35-8d54-0f3c0b1d2e3f"
        database.url = "postgres://localhost/tidemark_region"
        nats.url = "nats://localhost"
        primary_log.url = "http://localhost"
        primary_log.credential = "secret"
    "#;

    fn loaded(
        environment: &[(&str, &str)],
    ) -> Result<ProjectorConfig, process::config::ConfigError> {
        let owned = environment.iter().map(|(name, value)| (name.to_string(), value.to_string()));
        load_from(FILE.parse().unwrap(), "PROJECTOR", owned)
    }

    #[test]
    fn a_small_file_is_enough() {
        let config = loaded(&[]).unwrap();
        assert!(!config.is_primary());
        assert_eq!((config.domain(), config.primary_domain()), ("eu-west", "us-east"));
        assert_eq!(config.apply.batch_events_max, 1000);
        let printed = format!("{config:?}");
        assert!(!printed.contains("secret"), "{printed}");
    }

    #[test]
    fn a_projection_has_its_own_limits_and_the_rest_from_all() {
        let config = loaded(&[
            ("PROJECTOR__APPLY__BATCH_EVENTS_MAX", "500"),
            ("PROJECTOR__APPLY__PARTITIONS", "0,1"),
            ("PROJECTOR__PROJECTION__ORDERS__BATCH_EVENTS_MAX", "10"),
            ("PROJECTOR__PROJECTION__ORDERS__PARTITIONS", "[7]"),
        ])
        .unwrap();
        let (orders, other) = (config.apply_to("orders"), config.apply_to("other"));
        assert_eq!((orders.batch_events_max, other.batch_events_max), (10, 500));
        assert_eq!(orders.batch_ms_max, other.batch_ms_max);
        let named = |limits: ApplyConfig| limits.partitions.unwrap().below(8);
        assert_eq!(named(orders), [7].into());
        assert_eq!(named(other), [0, 1].into());
        for wrong in ["0,x", "1024", ""] {
            let said = loaded(&[("PROJECTOR__APPLY__PARTITIONS", wrong)]).unwrap_err().to_string();
            assert!(said.contains("apply.partitions"), "{wrong}: {said}");
        }
    }

    #[test]
    fn mistakes_are_reported_together() {
        let wrong = [
            ("PROJECTOR__REGION", "EU West"),
            ("PROJECTOR__NATS__DOMAIN", "us-east"),
            ("PROJECTOR__APPLY__BATCH_EVENTS_MAX", "0"),
            ("PROJECTOR__APPLY__RETRY_PAUSE_MAX", "1ms"),
            ("PROJECTOR__PROJECTION__ORDERS__BATCH_MS_MAX", "0"),
            ("PROJECTOR__SHARING__LEASE", "1s"),
            ("PROJECTOR__ADMIN__ADDRESS", "0.0.0.0:9000"),
        ];
        let said = loaded(&wrong).unwrap_err().to_string();
        let keys = ["region", "nats.domain", "batch_events_max", "retry_pause_max", "credential"];
        let keys = keys.into_iter().chain(["projection.orders.batch_ms_max", "sharing.lease"]);
        for key in keys {
            assert!(said.contains(key), "{key}: {said}");
        }
    }
}
