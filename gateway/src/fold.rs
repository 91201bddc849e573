//! An aggregate's state, made from the log and from the newest snapshot that still holds.

use consistency::{
    AggregateId, Event, EventId, FoldKind, FoldName, FoldSnapshot, Version, is_snapshot_due,
};
use event_store::{EventStore, Keep, ReadError, Tail};
use projection::{
    AggregateDefinition, DocumentDefinition, Folded, ProjectionDefinition, ProjectionError,
    StoredState,
};

use crate::{
    error::{Error, Lag},
    gateway::Gateway,
    telemetry::SnapshotUse,
};

/// Events of one page of the log.
const PAGE_EVENTS: u32 = 500;

/// Why an aggregate could not be folded.
#[derive(Debug, thiserror::Error)]
pub enum FoldError {
    /// The log could not be read.
    #[error("the log could not be read")]
    Read(#[from] ReadError),
    /// An event does not fold, however often it is tried.
    #[error("an event of the aggregate does not fold")]
    Poison(#[from] ProjectionError),
    /// It has more events after its snapshot than are folded for one request.
    #[error("more than {0} events of the aggregate would have to be folded")]
    TooLong(u32),
}

/// The rules that an aggregate is folded by.
#[derive(Debug, Clone, Copy)]
pub enum Rules<'a> {
    /// Those that commands are decided by.
    Aggregate(&'a AggregateDefinition),
    /// Those of a projection, and its document.
    Projection(&'a ProjectionDefinition, &'a DocumentDefinition),
}

impl Rules<'_> {
    fn name(self) -> FoldName {
        let (kind, name, version) = match self {
            Self::Aggregate(rules) => (FoldKind::Aggregate, rules.kind(), rules.version()),
            Self::Projection(rules, _) => {
                (FoldKind::Projection, rules.name(), rules.declared_version())
            }
        };
        FoldName { kind, name: name.clone(), version }
    }

    fn fold(self, folded: Folded, event: &Event) -> Result<Folded, ProjectionError> {
        match self {
            Self::Aggregate(rules) => rules.fold(folded, event),
            Self::Projection(_, rules) => rules.fold(folded, event),
        }
    }

    fn restore(self, stored: &StoredState) -> Result<Folded, ProjectionError> {
        match self {
            Self::Aggregate(rules) => rules.restore(stored),
            Self::Projection(_, rules) => rules.restore(stored),
        }
    }

    fn store(self, folded: &Folded) -> Result<StoredState, ProjectionError> {
        match self {
            Self::Aggregate(rules) => rules.store(folded),
            Self::Projection(_, rules) => rules.store(folded),
        }
    }
}

/// Folds an aggregate up to its last event.
pub async fn aggregate(
    gateway: &Gateway,
    store: &EventStore,
    aggregate: &AggregateId,
    rules: Rules<'_>,
) -> Result<Folded, FoldError> {
    let mut folding = Folding { aggregate, rules, last: None, events_read: 0, replaces: None };
    let begun = folding.begin(gateway, store).await?;
    let folded = folding.go_on(gateway, store, begun).await;
    gateway.instruments.folded(folding.events_read);
    match folded {
        Ok((folded, is_whole)) => {
            folding.keep(gateway, store, &folded);
            let events_max = gateway.config.read.fold_events_max;
            // What was reached is kept, so that the next request goes on from there.
            if is_whole { Ok(folded) } else { Err(FoldError::TooLong(events_max)) }
        }
        Err(error) => Err(error),
    }
}

/// A fold on its way.
struct Folding<'a> {
    aggregate: &'a AggregateId,
    rules: Rules<'a>,
    /// The newest event that was folded here.
    last: Option<EventId>,
    events_read: u32,
    /// The digest of a snapshot that could not be used.
    replaces: Option<[u8; 32]>,
}

/// A state to go on with, and the first events after it.
struct Begun {
    folded: Folded,
    tail: Tail,
}

impl Folding<'_> {
    async fn begin(&mut self, gateway: &Gateway, store: &EventStore) -> Result<Begun, FoldError> {
        let tail = store.read_tail(self.aggregate, &self.rules.name(), PAGE_EVENTS).await?;
        self.replaces = tail.unusable;
        let used = match (&tail.snapshot, tail.unusable) {
            (Some(snapshot), _) => match self.restored(snapshot) {
                Some(folded) => {
                    gateway.instruments.began_fold(SnapshotUse::Used);
                    return Ok(Begun { folded, tail });
                }
                None => SnapshotUse::Unusable,
            },
            (None, Some(_)) => SnapshotUse::Unusable,
            (None, None) => SnapshotUse::Missing,
        };
        gateway.instruments.began_fold(used);
        let folded = Folded::nothing();
        if tail.snapshot.is_none() {
            return Ok(Begun { folded, tail });
        }
        self.events_read = tail.events_read;
        let tail = store.read_on(self.aggregate, Version::ZERO.next(), PAGE_EVENTS).await?;
        Ok(Begun { folded, tail })
    }

    /// `None` when the state is not what these rules make, though it says so.
    fn restored(&mut self, snapshot: &FoldSnapshot) -> Option<Folded> {
        let FoldSnapshot { version, at, created, state, .. } = snapshot.clone();
        match self.rules.restore(&StoredState::new(version, at, created, state)) {
            Ok(folded) => Some(folded),
            Err(error) => {
                let fold = self.rules.name();
                tracing::warn!(
                    %error,
                    fold = fold.text(),
                    fold_version = fold.version,
                    "a snapshot does not decode: were the rules changed without a new version?"
                );
                self.replaces = Some(snapshot.digest(&fold, self.aggregate));
                None
            }
        }
    }

    /// Folds page after page. `false` when the bound was reached before the aggregate's end.
    async fn go_on(
        &mut self,
        gateway: &Gateway,
        store: &EventStore,
        Begun { mut folded, mut tail }: Begun,
    ) -> Result<(Folded, bool), FoldError> {
        loop {
            self.events_read = self.events_read.saturating_add(tail.events_read);
            for event in &tail.events {
                folded = self.rules.fold(folded, event)?;
                self.last = Some(event.id);
            }
            if !tail.is_cut {
                return Ok((folded, true));
            }
            if gateway.config.read.fold_events_max < self.events_read {
                return Ok((folded, false));
            }
            let from = folded.version().next();
            tail = store.read_on(self.aggregate, from, PAGE_EVENTS).await?;
        }
    }

    fn keep(self, gateway: &Gateway, store: &EventStore, folded: &Folded) {
        let interval = gateway.config.fold.snapshot_events;
        let Some(event_id) = self.last.filter(|_| is_snapshot_due(self.events_read, interval))
        else {
            return;
        };
        match self.rules.store(folded) {
            Ok(stored) => store.keep_snapshot(Keep {
                aggregate: self.aggregate.clone(),
                fold: self.rules.name(),
                snapshot: FoldSnapshot {
                    version: stored.version(),
                    at: stored.at(),
                    event_id,
                    created: stored.created(),
                    state: stored.state().map(str::to_owned),
                },
                replaces: self.replaces,
            }),
            Err(error) => tracing::debug!(%error, "no snapshot of a state that cannot be stored"),
        }
    }
}

/// Why the state of an aggregate is not known, to a caller who needs it.
pub fn unfolded(error: FoldError) -> Error {
    match error {
        error @ FoldError::Read(_) => Error::unreachable("its log cannot be read", error),
        // It is parked wherever it is projected, and nothing but its events is at fault.
        error @ FoldError::Poison(_) => {
            tracing::debug!(%error, "aggregate not folded");
            Error::Parked(Lag::default())
        }
        error @ FoldError::TooLong(_) => Error::Internal(Box::new(error)),
    }
}
