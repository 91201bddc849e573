//! Steps that bring events of older schemas to the newest one.

use std::collections::BTreeMap;

use consistency::{Event, SchemaVersion};
use serde_json::Value;

use crate::{FoldError, ProjectionError};

/// Brings an event's data from one schema version to the next. Pure.
pub type Upcast = fn(Value) -> Result<Value, FoldError>;

/// The steps of every event type. A type without steps is at schema version 1.
#[derive(Debug, Clone, Default)]
pub struct Upcasters {
    steps: BTreeMap<String, Vec<Upcast>>,
}

impl Upcasters {
    /// The newest schema version of an event type: what is written, and what folds decode.
    pub fn current(&self, event_type: &str) -> SchemaVersion {
        u16::try_from(self.steps_of(event_type).len() + 1)
            .ok()
            .and_then(SchemaVersion::new)
            .expect("add() lets no type have more steps than schema versions")
    }

    /// Adds the step from schema version `from` to the next. The steps of a type are added in order;
    /// `false` when this one is out of order.
    #[must_use]
    pub fn add(&mut self, event_type: &str, from: u16, step: Upcast) -> bool {
        let current = self.current(event_type);
        let in_order = current.get() == from && current.next().is_some();
        if in_order {
            self.steps.entry(event_type.to_owned()).or_default().push(step);
        }
        in_order
    }

    /// The data of `event` in the newest schema; `None` when they already are.
    pub fn upcast(&self, event: &Event) -> Result<Option<Value>, ProjectionError> {
        let event_type = event.event_type.as_str();
        let (found, known) = (event.schema_version, self.current(event_type));
        if found == known {
            return Ok(None);
        }
        if found > known {
            return Err(ProjectionError::UnknownSchemaVersion {
                event_type: event.event_type.clone(),
                found: found.get(),
                known: known.get(),
            });
        }
        let mut data = serde_json::from_str(&event.data).map_err(ProjectionError::Decode)?;
        for step in &self.steps_of(event_type)[usize::from(found.get()) - 1..] {
            data = step(data)
                .map_err(|source| ProjectionError::Upcast { from: found.get(), source })?;
        }
        Ok(Some(data))
    }

    fn steps_of(&self, event_type: &str) -> &[Upcast] {
        self.steps.get(event_type).map_or(&[], Vec::as_slice)
    }
}
