//! Tells the region's gateways what was applied.

use std::collections::BTreeSet;
use std::time::Duration;

use async_nats::connection::State;
use consistency::{AggregateKey, Announcement, AnnouncementSeal, Position, SEAL_HEADER};
use tokio::time::timeout;

use crate::checkpoint::{Held, VersionKey};
use crate::config::ProjectorConfig;
use crate::health::chain_of;
use crate::status::Status;

/// A connection that takes no message for so long takes none.
const PUBLISH_MAX: Duration = Duration::from_millis(250);

/// Where a region's announcements go.
pub fn currency_subject(region: &str) -> String {
    format!("tidemark.{region}.currency")
}

/// Publishes announcements. They are hints: one that is lost is made good by the gateways, who read
/// the checkpoints when they hear nothing.
#[derive(Debug, Clone)]
pub struct Announcer {
    client: async_nats::Client,
    region: String,
    subject: String,
    keys_max: usize,
    seal: AnnouncementSeal,
    status: Status,
}

impl Announcer {
    /// Speaks for the region that is configured, and names as many keys as it may.
    pub fn new(config: &ProjectorConfig, client: async_nats::Client, status: Status) -> Self {
        let credential = config.primary_log.credential.expose();
        Self {
            client,
            region: config.region.clone(),
            subject: currency_subject(&config.region),
            keys_max: config.apply.announced_keys_max,
            seal: AnnouncementSeal::new(credential.as_bytes()),
            status,
        }
    }

    /// A partition's watermark moved from `from` to `to`, and these aggregates' rows may have changed.
    /// `held` is what is stored by now.
    pub async fn announce(
        &self,
        key: &VersionKey,
        held: &Held,
        from: Position,
        to: Position,
        touched: &BTreeSet<AggregateKey>,
    ) {
        let keys = (touched.len() <= self.keys_max)
            .then(|| touched.iter().map(AggregateKey::hint).collect());
        let announcement = Announcement {
            region: self.region.clone(),
            epoch: held.epoch,
            projection: key.projection.clone(),
            version: key.version,
            partition: held.partition,
            from,
            to,
            stored: held.mark.position,
            head: self.status.head(held.epoch).max(to),
            keys,
        };
        let text = serde_json::to_vec(&announcement).expect("an announcement has text keys only");
        // Without a connection it would only wait in a queue that is full before long.
        if self.client.connection_state() != State::Connected {
            return;
        }
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(SEAL_HEADER, self.seal.seal(&text));
        let subject = self.subject.clone();
        let published = self.client.publish_with_headers(subject, headers, text.into());
        match timeout(PUBLISH_MAX, published).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(error = chain_of(&error), "announcement lost"),
            Err(_) => tracing::debug!("announcement lost, the connection takes nothing"),
        }
    }
}
