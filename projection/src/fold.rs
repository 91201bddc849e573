//! How an aggregate's state follows from its events.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

use consistency::{Admission, Event, LogPosition, Name, Position, SchemaVersion, Version, admit};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::decode::{decode, is_known};
use crate::{FoldError, ProjectionError, StoredState, Upcasters};

/// Longest state as JSON, in bytes.
pub const STATE_BYTES_MAX: usize = 1 << 20;

/// The rules of one aggregate type: pure, without clock, randomness or IO.
pub trait Fold: Send + Sync + 'static {
    /// What the events add up to. A changed shape, like a changed rule, needs a new version of every
    /// projection on it, and of the aggregate ([`crate::DomainBuilder::aggregate_version`]): states are
    /// kept, and are only told apart by that.
    type State: Serialize + DeserializeOwned + Send + Sync + 'static;
    /// An enum with serde's external tags (the default): each variant is an event type, its content
    /// the event's data. A last variant `#[serde(other)] Other` takes the types that do not matter.
    type Event: DeserializeOwned;

    /// The state after `event`. `None` says that the aggregate has no state: not yet, or no more.
    /// `envelope` is the same event as the log holds it.
    fn fold(
        &self,
        state: Option<Self::State>,
        event: Self::Event,
        envelope: &Event,
    ) -> Result<Option<Self::State>, FoldError>;
}

/// The state of one aggregate after some of its events, its type erased.
pub struct Folded {
    version: Version,
    at: LogPosition,
    created: Position,
    state: Option<Box<dyn Any + Send + Sync>>,
}

impl Folded {
    /// Before the first event.
    pub const fn nothing() -> Self {
        Self {
            version: Version::ZERO,
            at: LogPosition::ORIGIN,
            created: Position::ZERO,
            state: None,
        }
    }

    /// The number of events that are in it.
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Where the newest of them stands in the log.
    pub const fn at(&self) -> LogPosition {
        self.at
    }

    /// Where the first of them stands.
    pub const fn created(&self) -> Position {
        self.created
    }

    /// Whether the aggregate has a state.
    pub const fn exists(&self) -> bool {
        self.state.is_some()
    }

    /// The state; `None` as well when it is of another type.
    pub fn state<S: 'static>(&self) -> Option<&S> {
        self.state.as_deref().and_then(<dyn Any + Send + Sync>::downcast_ref)
    }
}

impl std::fmt::Debug for Folded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Folded")
            .field("version", &self.version)
            .field("at", &self.at)
            .field("created", &self.created)
            .field("exists", &self.exists())
            .finish()
    }
}

/// A [`Fold`] without its types.
pub(crate) trait ErasedFold: Send + Sync {
    /// The state after the next event of the aggregate.
    fn fold(
        &self,
        folded: Folded,
        event: &Event,
        upcasters: &Upcasters,
    ) -> Result<Folded, ProjectionError>;

    /// A state as JSON text; `None` when there is none.
    fn encode(&self, folded: &Folded) -> Result<Option<String>, ProjectionError>;

    /// A stored state as it was.
    fn decode(&self, stored: &StoredState) -> Result<Folded, ProjectionError>;

    /// As [`crate::ProjectionDefinition::knows`].
    fn knows(&self, event_type: &Name, schema: SchemaVersion, upcasters: &Upcasters) -> bool;
}

pub(crate) struct TypedFold<F>(pub(crate) F);

impl<F: Fold> ErasedFold for TypedFold<F> {
    fn fold(
        &self,
        folded: Folded,
        event: &Event,
        upcasters: &Upcasters,
    ) -> Result<Folded, ProjectionError> {
        if admit(folded.version, event.version) != Admission::Apply {
            let reason = format!("version {} cannot follow {}", event.version, folded.version);
            return Err(ProjectionError::Fold(FoldError::new(reason)));
        }
        let before = match folded.state {
            Some(state) => Some(*state.downcast::<F::State>().map_err(|_| other_type())?),
            None => None,
        };
        let after = guarded(|| {
            let decoded = decode::<F::Event>(event, upcasters)?;
            self.0.fold(before, decoded, event).map_err(ProjectionError::Fold)
        })?;
        let created =
            if folded.version == Version::ZERO { event.at.position } else { folded.created };
        Ok(Folded {
            version: event.version,
            at: event.at,
            created,
            state: after.map(|state| Box::new(state) as Box<dyn Any + Send + Sync>),
        })
    }

    fn encode(&self, folded: &Folded) -> Result<Option<String>, ProjectionError> {
        let Some(state) = &folded.state else { return Ok(None) };
        let state = state.downcast_ref::<F::State>().ok_or_else(other_type)?;
        guarded(|| {
            let text = serde_json::to_string(state);
            text.map(Some).map_err(|error| ProjectionError::State(error.to_string()))
        })
    }

    fn decode(&self, stored: &StoredState) -> Result<Folded, ProjectionError> {
        let state = match &stored.state {
            Some(text) => {
                let state: F::State = guarded(|| {
                    serde_json::from_str(text)
                        .map_err(|error| ProjectionError::State(error.to_string()))
                })?;
                Some(Box::new(state) as Box<dyn Any + Send + Sync>)
            }
            None => None,
        };
        Ok(Folded { version: stored.version, at: stored.at, created: stored.created, state })
    }

    fn knows(&self, event_type: &Name, schema: SchemaVersion, upcasters: &Upcasters) -> bool {
        is_known::<F::Event>(event_type, schema, upcasters)
    }
}

/// A state as it is stored, within its bound.
pub(crate) fn encode_state(
    fold: &(impl ErasedFold + ?Sized),
    folded: &Folded,
) -> Result<Option<String>, ProjectionError> {
    let state = fold.encode(folded)?;
    match state.as_ref().map(String::len).filter(|bytes| *bytes > STATE_BYTES_MAX) {
        Some(bytes) => {
            Err(ProjectionError::State(format!("{bytes} bytes are more than {STATE_BYTES_MAX}")))
        }
        None => Ok(state),
    }
}

/// A state with its places, as it is stored.
pub(crate) fn store(
    fold: &(impl ErasedFold + ?Sized),
    folded: &Folded,
) -> Result<StoredState, ProjectionError> {
    let state = encode_state(fold, folded)?;
    Ok(StoredState::new(folded.version, folded.at, folded.created, state))
}

/// Turns a panic of the domain's code into an error, so that one event cannot take a projector
/// down for ever. What the code was working on is not used afterwards.
pub(crate) fn guarded<T>(
    run: impl FnOnce() -> Result<T, ProjectionError>,
) -> Result<T, ProjectionError> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let said = panic
            .downcast_ref::<&str>()
            .map(|said| (*said).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        Err(ProjectionError::Panic(said.unwrap_or_else(|| "no message".to_owned())))
    })
}

fn other_type() -> ProjectionError {
    ProjectionError::State("state is of another aggregate type".to_owned())
}
