//! Fills gaps in the versions of an aggregate from the primary's log.
//!
//! The chain of positions has no hole when events come to a partition, so versions are missing only
//! when a state is not what its checkpoint says, or when a message is not what the log says. Either
//! way the log knows: what it has of the aggregate takes the place of what was read.

use std::collections::HashMap;

use consistency::{Epoch, Event, Position};

use super::plan::Gap;
use crate::log::{LogClient, LogError};

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
