//! Tells the region's gateways what was applied.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::connection::State;
use consistency::{AggregateKey, Announcement, AnnouncementSeal, Name, Position, SEAL_HEADER};
use tokio::time::timeout;

use crate::checkpoint::{Held, VersionKey};
use crate::config::ProjectorConfig;
use crate::health::chain_of;
use crate::status::Status;

/// A connection that takes no message for so long, turns included, takes none.
const PUBLISH_MAX: Duration = Duration::from_millis(250);

/// With a few hundred bytes for each, and the keys of one, a message stays far below what a server takes.
const MESSAGE_STEPS_MAX: usize = 64;

/// Where a region's announcements go.
pub fn currency_subject(region: &str) -> String {
    format!("tidemark.{region}.currency")
}

/// Publishes announcements. They are hints: one that is lost is made good by the gateways, who read
/// the checkpoints when they hear nothing.
///
/// An event moves the partition that it belongs to, and every other one of every projection past it. What moves
/// without a change waits for the rest that is about to, and is told in one message; what changed rows is told at
/// once, with what waits.
#[derive(Debug, Clone)]
pub struct Announcer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    client: async_nats::Client,
    region: String,
    subject: String,
    keys_max: usize,
    seal: AnnouncementSeal,
    status: Status,
    unsaid: Mutex<Unsaid>,
    /// Of whoever speaks, so that what is said keeps its order.
    turn: tokio::sync::Mutex<()>,
}

/// Steps that changed nothing, of each partition its last ones as one.
#[derive(Debug, Default)]
struct Unsaid(BTreeMap<(Name, u32, u16), Announcement>);

impl Unsaid {
    fn add(&mut self, step: Announcement) {
        match self.0.entry((step.projection.clone(), step.version, step.partition)) {
            Entry::Vacant(entry) => {
                entry.insert(step);
            }
            Entry::Occupied(mut entry) => {
                let before = entry.get();
                let joins = before.epoch == step.epoch && before.to == step.from;
                let from = if joins { before.from } else { step.from };
                entry.insert(Announcement { from, ..step });
            }
        }
    }
}

impl Announcer {
    /// Speaks for the region that is configured, and names as many keys as it may.
    pub fn new(config: &ProjectorConfig, client: async_nats::Client, status: Status) -> Self {
        let credential = config.primary_log.credential.expose();
        Self(Arc::new(Shared {
            client,
            region: config.region.clone(),
            subject: currency_subject(&config.region),
            keys_max: config.apply.announced_keys_max,
            seal: AnnouncementSeal::new(credential.as_bytes()),
            status,
            unsaid: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }))
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
        let Shared { region, keys_max, status, .. } = &*self.0;
        let keys =
            (touched.len() <= *keys_max).then(|| touched.iter().map(AggregateKey::hint).collect());
        let step = Announcement {
            region: region.clone(),
            epoch: held.epoch,
            projection: key.projection.clone(),
            version: key.version,
            partition: held.partition,
            from,
            to,
            stored: held.mark.position,
            head: status.head(held.epoch).max(to),
            keys,
        };
        if touched.is_empty() {
            self.say_soon(step);
        } else {
            self.0.say(Some(step)).await;
        }
    }

    /// As soon as those had a chance to say theirs who were told of the same event.
    fn say_soon(&self, step: Announcement) {
        let mut unsaid = self.0.unsaid.lock().unwrap_or_else(PoisonError::into_inner);
        let is_first = unsaid.0.is_empty();
        unsaid.add(step);
        if is_first {
            let shared = Arc::clone(&self.0);
            tokio::spawn(async move {
                tokio::task::yield_now().await;
                shared.say(None).await;
            });
        }
    }
}

impl Shared {
    async fn say(&self, step: Option<Announcement>) {
        // Without a connection it would only wait in a queue that is full before long.
        if self.client.connection_state() != State::Connected {
            self.take_unsaid();
            return;
        }
        match timeout(PUBLISH_MAX, self.say_all(step)).await {
            Ok(()) => {}
            Err(_) => {
                // Whoever comes next is to be the first again, who sees to it that all is said.
                self.take_unsaid();
                tracing::debug!("announcements lost, the connection takes nothing");
            }
        }
    }

    async fn say_all(&self, step: Option<Announcement>) {
        let _turn = self.turn.lock().await;
        let mut steps: Vec<Announcement> = self.take_unsaid().0.into_values().collect();
        steps.extend(step);
        for steps in steps.chunks(MESSAGE_STEPS_MAX) {
            let text = serde_json::to_vec(steps).expect("an announcement has text keys only");
            let mut headers = async_nats::HeaderMap::new();
            headers.insert(SEAL_HEADER, self.seal.seal(&text));
            let subject = self.subject.clone();
            let published = self.client.publish_with_headers(subject, headers, text.into());
            if let Err(error) = published.await {
                tracing::debug!(error = chain_of(&error), "announcements lost");
            }
        }
    }

    fn take_unsaid(&self) -> Unsaid {
        std::mem::take(&mut *self.unsaid.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use compose::nats::{Server, User};
    use consistency::Epoch;
    use futures::StreamExt as _;

    use super::*;

    fn step(partition: u16, from: u64, to: u64) -> Announcement {
        let position = |value| Position::new(value).unwrap();
        Announcement {
            region: "eu-west".to_owned(),
            epoch: Epoch::FIRST,
            projection: Name::new("orders").unwrap(),
            version: 1,
            partition,
            from: position(from),
            to: position(to),
            stored: position(from),
            head: position(to),
            keys: Some(Vec::new()),
        }
    }

    fn all(steps: impl IntoIterator<Item = Announcement>) -> Vec<(u16, u64, u64)> {
        let mut unsaid = Unsaid::default();
        steps.into_iter().for_each(|step| unsaid.add(step));
        let said = |step: Announcement| (step.partition, step.from.get(), step.to.get());
        unsaid.0.into_values().map(said).collect()
    }

    #[test]
    fn steps_of_a_partition_that_follow_each_other_are_one() {
        assert_eq!(all([step(0, 3, 5), step(1, 3, 5), step(0, 5, 9)]), [(0, 3, 9), (1, 3, 5)]);
    }

    #[tokio::test]
    async fn what_was_not_said_in_time_keeps_nothing_later_from_being_said() {
        let server = Server::start_single().await.unwrap();
        let (name, password) = server.credentials(User::Operator);
        let options = async_nats::ConnectOptions::with_user_and_password(name, password);
        let client = options.connect(server.url()).await.unwrap();
        let mut heard = client.subscribe("said").await.unwrap();
        let announcer = Announcer(Arc::new(Shared {
            client,
            region: "eu-west".to_owned(),
            subject: "said".to_owned(),
            keys_max: 1,
            seal: AnnouncementSeal::new(b"a credential of the regions"),
            status: Status::default(),
            unsaid: Mutex::default(),
            turn: tokio::sync::Mutex::default(),
        }));
        let turn = announcer.0.turn.lock().await;
        announcer.say_soon(step(0, 3, 5));
        let given_up = async {
            while 1 < Arc::strong_count(&announcer.0) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(30), given_up).await.unwrap();
        drop(turn);
        announcer.say_soon(step(1, 3, 5));
        let said = timeout(Duration::from_secs(30), heard.next()).await.unwrap().unwrap();
        let said: Vec<Announcement> = serde_json::from_slice(&said.payload).unwrap();
        assert_eq!(said, [step(1, 3, 5)]);
    }

    #[test]
    fn a_step_that_does_not_follow_is_told_as_it_is() {
        assert_eq!(all([step(0, 3, 5), step(0, 6, 9)]), [(0, 6, 9)]);
        let next = Announcement { epoch: Epoch::new(2).unwrap(), ..step(0, 5, 6) };
        assert_eq!(all([step(0, 3, 5), next]), [(0, 5, 6)]);
    }
}
