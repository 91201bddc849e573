//! Projections that write what they like, in the transaction that moves their checkpoint.

use std::any::Any;
use std::fmt;
use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::sync::Arc;

use consistency::{Event, Name, SchemaVersion};
use serde::de::DeserializeOwned;
use sqlx::PgConnection;

use crate::decode::{decode, is_known};
use crate::{FoldError, ProjectionError, Upcasters};

/// What to do in the region's database when events of one aggregate type happen. For what neither rows
/// of one aggregate nor sums over many can say, such as a table that others join.
///
/// Events come in the order of the log, every event of an aggregate once and without a gap; those of
/// different partitions come at the same time, so rows that they share are locked by whoever is first.
/// What is written is committed with the checkpoint that vouches for it, or not at all.
pub trait Custom: Send + Sync + 'static {
    /// As [`crate::Fold::Event`].
    type Event: DeserializeOwned + Send + Sync + 'static;

    /// The tables that it writes. Each is named `<projection>_v<version>_...`, since every version has
    /// its own.
    fn tables(&self) -> Vec<CustomTable>;

    /// Writes what `events` do. The transaction is the engine's: it is neither committed nor rolled
    /// back here, and nothing is done outside of it, since it may be taken back and tried again.
    fn apply(
        &self,
        transaction: &mut PgConnection,
        events: &[Happened<'_, Self::Event>],
    ) -> impl Future<Output = Result<(), CustomError>> + Send;
}

/// A table of a custom projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CustomTable {
    /// Its name.
    pub name: &'static str,
    /// `create table if not exists ...`
    pub create: &'static str,
}

/// One event, decoded and brought to its newest schema.
#[derive(Debug)]
pub struct Happened<'e, E> {
    /// What happened.
    pub event: &'e E,
    /// The same event as the log holds it.
    pub envelope: &'e Event,
}

/// Why events are not applied.
#[derive(Debug, thiserror::Error)]
pub enum CustomError {
    /// The database said no. Whether it is tried again depends on what it said.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// One of the events cannot be applied, however often it is tried: its aggregate is parked.
    #[error("the event is refused")]
    Refused(#[source] FoldError),
}

/// A custom projection without its types.
#[derive(Clone)]
pub struct CustomDefinition {
    custom: Arc<dyn ErasedCustom>,
    upcasters: Arc<Upcasters>,
}

impl fmt::Debug for CustomDefinition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CustomDefinition").field("tables", &self.tables()).finish_non_exhaustive()
    }
}

/// A decoded event, its type erased.
pub struct CustomEvent {
    decoded: Box<dyn Any + Send + Sync>,
    envelope: Event,
}

impl fmt::Debug for CustomEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CustomEvent").field("at", &self.envelope.at).finish_non_exhaustive()
    }
}

impl CustomDefinition {
    pub(crate) fn new(custom: Arc<dyn ErasedCustom>) -> Self {
        Self { custom, upcasters: Arc::default() }
    }

    pub(crate) fn set_upcasters(&mut self, upcasters: Arc<Upcasters>) {
        self.upcasters = upcasters;
    }

    /// Its tables, beside the one that says which versions it has applied.
    pub fn tables(&self) -> Vec<CustomTable> {
        self.custom.tables()
    }

    pub(crate) fn knows(&self, event_type: &Name, schema: SchemaVersion) -> bool {
        self.custom.knows(event_type, schema, &self.upcasters)
    }

    /// Decodes an event; its aggregate is to be parked when that fails.
    pub fn decode(&self, event: &Event) -> Result<CustomEvent, ProjectionError> {
        let decoded = self.custom.decode(event, &self.upcasters)?;
        Ok(CustomEvent { decoded, envelope: event.clone() })
    }

    /// Writes what events do, which are in the order of the log.
    pub async fn apply(
        &self,
        transaction: &mut PgConnection,
        events: &[CustomEvent],
    ) -> Result<(), CustomError> {
        self.custom.apply(transaction, events).await
    }
}

/// A [`Custom`] without its types.
pub(crate) trait ErasedCustom: Send + Sync {
    fn tables(&self) -> Vec<CustomTable>;

    fn decode(
        &self,
        event: &Event,
        upcasters: &Upcasters,
    ) -> Result<Box<dyn Any + Send + Sync>, ProjectionError>;

    /// As [`crate::ProjectionDefinition::knows`].
    fn knows(&self, event_type: &Name, schema: SchemaVersion, upcasters: &Upcasters) -> bool;

    fn apply<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        events: &'a [CustomEvent],
    ) -> Pin<Box<dyn Future<Output = Result<(), CustomError>> + Send + 'a>>;
}

pub(crate) struct TypedCustom<C>(pub(crate) C);

impl<C: Custom> ErasedCustom for TypedCustom<C> {
    fn tables(&self) -> Vec<CustomTable> {
        self.0.tables()
    }

    fn decode(
        &self,
        event: &Event,
        upcasters: &Upcasters,
    ) -> Result<Box<dyn Any + Send + Sync>, ProjectionError> {
        Ok(Box::new(decode::<C::Event>(event, upcasters)?))
    }

    fn knows(&self, event_type: &Name, schema: SchemaVersion, upcasters: &Upcasters) -> bool {
        is_known::<C::Event>(event_type, schema, upcasters)
    }

    fn apply<'a>(
        &'a self,
        transaction: &'a mut PgConnection,
        events: &'a [CustomEvent],
    ) -> Pin<Box<dyn Future<Output = Result<(), CustomError>> + Send + 'a>> {
        Box::pin(async move {
            let happened = events.iter().map(|CustomEvent { decoded, envelope }| {
                let event = decoded.downcast_ref().expect("it was decoded by this very type");
                Happened { event, envelope }
            });
            let happened: Vec<Happened<'_, C::Event>> = happened.collect();
            guarded(self.0.apply(transaction, &happened)).await
        })
    }
}

/// A panic refuses the events, as one in a fold does.
async fn guarded(work: impl Future<Output = Result<(), CustomError>>) -> Result<(), CustomError> {
    let mut work = pin!(work);
    poll_fn(|context| {
        catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))).unwrap_or_else(|_| {
            let panicked = FoldError::new("the projection panicked");
            std::task::Poll::Ready(Err(CustomError::Refused(panicked)))
        })
    })
    .await
}
