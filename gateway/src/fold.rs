//! An aggregate's state, made from the log.

use consistency::{AggregateId, Event};
use event_store::{EventStore, ReadError};
use projection::{Folded, ProjectionError};

use crate::error::Error;

/// Events of one page of the log.
const PAGE_EVENTS: u32 = 500;
/// A page is cut short when its events are large. One of fewer bytes than any bound on them, and of
/// fewer events than were asked for, is the last: asking once more would cost a trip for each fold.
const PAGE_BYTES_WHOLE: usize = 64 * 1024;

/// Why an aggregate could not be folded.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The log could not be read.
    #[error("the log could not be read")]
    Read(#[from] ReadError),
    /// An event does not fold, however often it is tried.
    #[error("an event of the aggregate does not fold")]
    Poison(#[from] ProjectionError),
    /// It has more events than are folded for one request.
    #[error("the aggregate has more than {0} events")]
    TooLong(u32),
}

/// Folds an aggregate from its first event to its last.
pub async fn aggregate(
    store: &EventStore,
    aggregate: &AggregateId,
    events_max: u32,
    fold: impl Fn(Folded, &Event) -> Result<Folded, ProjectionError>,
) -> Result<Folded, FoldError> {
    let mut folded = Folded::nothing();
    loop {
        let from = folded.version().next();
        let events = store.read_aggregate(aggregate, from, PAGE_EVENTS).await?;
        let bytes: usize = events.iter().map(|event| event.data.len()).sum();
        let may_be_cut = PAGE_EVENTS as usize <= events.len() || PAGE_BYTES_WHOLE < bytes;
        for event in &events {
            folded = fold(folded, event)?;
        }
        if events.is_empty() || !may_be_cut {
            return Ok(folded);
        }
        if u64::from(events_max) < folded.version().get() {
            return Err(FoldError::TooLong(events_max));
        }
    }
}

/// Why the state of an aggregate is not known, to a caller who needs it.
pub fn unfolded(error: FoldError) -> Error {
    match error {
        error @ FoldError::Read(_) => Error::unreachable("its log cannot be read", error),
        error @ (FoldError::Poison(_) | FoldError::TooLong(_)) => Error::Internal(Box::new(error)),
    }
}
