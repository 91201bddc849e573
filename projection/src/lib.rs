//! What a projection is: pure rules from events to rows, and the SQL that they become.
//!
//! A developer implements [`Fold`] (how an aggregate's state follows from its events), and on top of
//! it [`Document`] (the rows that a state makes in any number of views) or [`Summary`] (what a state
//! adds to sums and maxima across aggregates), or, without a state, [`Rollup`] (what an event adds) or
//! [`Custom`] (what it writes, in whatever tables). A [`Command`] decides on new events. [`Domain::builder`]
//! checks it all together and erases the types: the services see a [`ProjectionDefinition`] or a
//! [`CommandDefinition`] and never a domain's own types.
//!
//! Nothing here reads a clock or a socket, but what a [`Custom`] does with the transaction it is given. The engine asks [`DocumentDefinition::apply`] what a run
//! of events changes, gathers the answers into [`Changes`], and binds those to the statements of
//! [`sql::Statements`].
//!
//! ```
//! use consistency::Event;
//! use projection::{Document, Domain, Fold, FoldError, Projection, Rows};
//! use serde::{Deserialize, Serialize};
//!
//! #[derive(Serialize, Deserialize)]
//! struct Light {
//!     lit: bool,
//! }
//!
//! #[derive(Serialize, Deserialize)]
//! enum LightEvent {
//!     SwitchedOn,
//!     SwitchedOff,
//! }
//!
//! struct Lights;
//!
//! impl Fold for Lights {
//!     type State = Light;
//!     type Event = LightEvent;
//!
//!     fn fold(&self, _: Option<Light>, event: LightEvent, _: &Event) -> Result<Option<Light>, FoldError> {
//!         Ok(Some(Light { lit: matches!(event, LightEvent::SwitchedOn) }))
//!     }
//! }
//!
//! impl Document for Lights {
//!     fn rows(&self, light: &Light, rows: &mut Rows<'_>) {
//!         rows.row("light", light);
//!         rows.item("lights-by-state", if light.lit { "lit" } else { "dark" }, light);
//!     }
//! }
//!
//! let domain = Domain::builder()
//!     .aggregate("light", Lights)
//!     .projection(
//!         Projection::document("lights", 1, "light", Lights).row("light").list("lights-by-state"),
//!     )
//!     .build()?;
//! assert!(domain.view("lights-by-state").is_some());
//! # Ok::<(), projection::DomainError>(())
//! ```

mod change;
mod command;
mod custom;
mod decode;
mod definition;
mod document;
mod domain;
mod error;
mod fold;
mod rehearsal;
mod rollup;
mod schema;
pub mod sql;
mod upcast;
mod view;

pub use change::{Changes, ListChanges, RowChanges, StateWrites, ViewChanges};
pub use command::{
    Command, CommandDefinition, CommandError, Found, NewEventData, Prepared, RuleViolation,
};
pub use custom::{Custom, CustomDefinition, CustomError, CustomEvent, CustomTable, Happened};
pub use definition::{PartitionStrategy, Projection, ProjectionDefinition, ProjectionKind};
pub use document::{
    Applied, Document, DocumentDefinition, LIST_KEY_BYTES_MAX, ROW_COUNT_MAX, ROWS_BYTES_MAX, Row,
    RowKey, Rows, Stop, StoredState,
};
pub use domain::{AggregateDefinition, Domain, DomainBuilder, DomainError};
pub use error::{ColumnError, FoldError, ProjectionError};
pub use fold::{Fold, Folded, STATE_BYTES_MAX};
pub use rehearsal::{Rehearsal, RehearsalError};
pub use rollup::{Counted, Delta, Deltas, Rollup, RollupChanges, RollupDefinition, Summary};
pub use schema::{AggregateSchemas, SchemaOf, Schemas};
pub use upcast::{Upcast, Upcasters};
pub use view::{LaterField, LaterValue, SearchFields, ViewDefinition, ViewKind};
