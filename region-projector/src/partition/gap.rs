//! Fills gaps in the versions of an aggregate from the primary's log.
//!
//! The chain of positions has no hole when events come to a partition, so versions are missing only
//! when a state is not what its checkpoint says, or when a message is not what the log says. Either
//! way the log knows: what it has of the aggregate takes the place of what was read.

use std::collections::HashMap;

use consistency::{Epoch, Event, Position};
use tokio::time::Instant;

use super::batch::{Batch, Findings};
use super::plan::Gap;
use super::{Partition, Running};
use crate::health::{Part, chain_of};
use crate::log::{LogClient, LogError};
use crate::retry::Backoff;
use crate::telemetry::FetchReason;

/// Events of aggregates as the log has them, by the aggregates' ids: to be applied instead of those
/// that were read. None when the log could not help.
pub type Healed = HashMap<String, Vec<Event>>;

/// What the log has of an aggregate after a gap's last version, up to a position. `None` when that is
/// more than `events_max`.
pub async fn fetch(
    log: &LogClient,
    epoch: Epoch,
    gap: &Gap,
    through: Position,
    events_max: usize,
) -> Result<Option<Vec<Event>>, LogError> {
    let Gap { aggregate, after } = gap;
    let mut events: Vec<Event> = Vec::new();
    loop {
        let from = events.last().map_or(*after, |last| last.version).next();
        let page = log.read_aggregate(epoch, aggregate, from).await?;
        let ours = page.into_iter().filter(|event| event.aggregate == *aggregate);
        let count = events.len();
        events.extend(ours.take_while(|event| event.at.position <= through));
        if events_max < events.len() {
            return Ok(None);
        }
        // What is left of the aggregate, if anything is, comes after what is to be applied now.
        if events.len() == count {
            return Ok(Some(events));
        }
    }
}

impl Running {
    /// Asks the log for what is missing, as long as it may take. Where that does not help, what was
    /// read stands, and its aggregate is parked.
    pub(super) async fn heal(&self, gaps: &[Gap], batch: &Batch, findings: &mut Findings) {
        let config = self.partition.config;
        let until = Instant::now() + config.gap_wait_max.get();
        for gap in gaps {
            let id = gap.aggregate.id();
            let fetched = self.fetch(gap, batch.through.position, until).await;
            let events = fetched.unwrap_or_else(|| {
                tracing::warn!(partition = self.name, aggregate = %gap.aggregate, "gap is not filled");
                let read = batch.events.iter().filter(|event| event.aggregate.id() == id);
                read.cloned().collect()
            });
            findings.healed.insert(id.to_owned(), events);
        }
    }

    async fn fetch(&self, gap: &Gap, through: Position, until: Instant) -> Option<Vec<Event>> {
        let Partition { log, held, health, telemetry, config, .. } = &self.partition;
        let mut backoff = Backoff::new(config.retry_pause_min, config.retry_pause_max);
        loop {
            match fetch(log, held.epoch, gap, through, config.gap_events_max).await {
                Ok(events) => {
                    health.well(Part::Log, &self.name);
                    telemetry.fetched(FetchReason::Gap, events.iter().flatten().count() as u64);
                    return events;
                }
                Err(error) if Instant::now() < until => {
                    health.unwell(Part::Log, &self.name, chain_of(&error));
                    backoff.pause().await;
                }
                Err(_) => {
                    // It is not asked any more, so nobody would say that it answers again.
                    health.well(Part::Log, &self.name);
                    return None;
                }
            }
        }
    }
}
