//! A domain in memory: what its views would show after these events.
//!
//! For tests of a domain, which need no server. Everything is folded by the code that the services
//! fold with.

use consistency::{
    AggregateId, CommittedAt, Epoch, Event, EventId, LogPosition, Name, NameError, Position,
    Version,
};
use serde::Serialize;
use serde_json::{Map, Value};
use uuid::Uuid;

use crate::decode::encode;
use crate::{
    Domain, Folded, ProjectionDefinition, ProjectionError, ProjectionKind, Row, StoredState,
};

/// Why there is nothing to show.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// The aggregate's type or id breaks its bounds.
    #[error("the aggregate cannot be named so")]
    Name(#[from] NameError),
    /// The event is not an enum with external tags.
    #[error("the event does not encode")]
    Encode(#[from] serde_json::Error),
    /// No projection feeds a view of this name and kind.
    #[error("the domain has no such view as {0}")]
    UnknownView(String),
    /// An event cannot be applied.
    #[error("an event cannot be applied")]
    Projection(#[from] ProjectionError),
}

/// A log in memory and what follows from it.
#[derive(Debug)]
pub struct Rehearsal<'d> {
    domain: &'d Domain,
    log: Vec<Event>,
}

impl<'d> Rehearsal<'d> {
    /// Nothing has happened yet.
    pub fn of(domain: &'d Domain) -> Self {
        Self { domain, log: Vec::new() }
    }

    /// An event happens to an aggregate, in the newest schema of its type.
    pub fn happen<E: Serialize>(
        &mut self,
        kind: &str,
        id: &str,
        event: &E,
    ) -> Result<&mut Self, RehearsalError> {
        let aggregate = AggregateId::new(Name::new(kind)?, id)?;
        let (event_type, data) = encode(event)?;
        let schema_version = self.domain.upcasters().current(&event_type);
        let newest = self.log.iter().rev().find(|event| event.aggregate == aggregate);
        let version = newest.map_or(Version::ZERO, |event| event.version).next();
        let last = self.log.last();
        let position = last.map_or(Position::ZERO, |event| event.at.position).next();
        let id = Uuid::from_u128(u128::from(position.get()));
        self.log.push(Event {
            at: LogPosition::new(Epoch::FIRST, position),
            id: EventId::new(id),
            previous_id: last.map_or(EventId::NIL, |event| event.id),
            aggregate,
            version,
            event_type: Name::new(event_type)?,
            schema_version,
            committed_at: CommittedAt::from_unix_micros(position.as_i64()),
            correlation_id: id,
            causation_id: id,
            idempotency_key_hash: None,
            traceparent: None,
            data,
        });
        Ok(self)
    }

    /// The row of an aggregate in a row view or a search view.
    pub fn row(&self, view: &str, id: &str) -> Result<Option<Value>, RehearsalError> {
        let rows = self.rows(view)?;
        let found = rows
            .into_iter()
            .find(|(aggregate, row)| aggregate.id() == id && row.key.list_key().is_none());
        Ok(found.map(|(_, row)| serde_json::from_str(&row.data)).transpose()?)
    }

    /// The items of a list, in its order.
    pub fn list(&self, view: &str, key: &str) -> Result<Vec<Value>, RehearsalError> {
        let rows = self.rows(view)?.into_iter();
        let items = rows.filter(|(_, row)| row.key.list_key() == Some(key));
        Ok(items.map(|(_, row)| serde_json::from_str(&row.data)).collect::<Result<_, _>>()?)
    }

    /// The sums and maxima of a rollup under a key; empty when there are none.
    pub fn rollup(&self, view: &str, key: &str) -> Result<Map<String, Value>, RehearsalError> {
        let (definition, _) = self.view(view)?;
        let ProjectionKind::Rollup(rollup) = definition.kind() else {
            return Err(RehearsalError::UnknownView(view.to_owned()));
        };
        let mut deltas = Vec::new();
        for aggregate in self.aggregates(definition) {
            let events: Vec<&Event> = self.events_of(aggregate).collect();
            let counted = rollup.count(&StoredState::NOTHING, &events);
            counted.error.map_or(Ok(()), Err)?;
            deltas.extend(counted.deltas);
        }
        let parts = rollup.gather(0, deltas.iter().map(|(at, delta)| (*at, delta)))?;
        let Some(place) = parts.keys.iter().position(|known| known == key) else {
            return Ok(Map::new());
        };
        let columns = rollup.column_names().zip(&parts.columns);
        Ok(columns.map(|(name, column)| (name.to_owned(), column[place].into())).collect())
    }

    /// Every row of a view, with its aggregate, in the order of the aggregates' first events.
    fn rows(&self, view: &str) -> Result<Vec<(&AggregateId, Row)>, RehearsalError> {
        let (definition, view_index) = self.view(view)?;
        let Some(document) = definition.document() else {
            return Err(RehearsalError::UnknownView(view.to_owned()));
        };
        let mut rows = Vec::new();
        for aggregate in self.aggregates(definition) {
            let nothing = Ok(Folded::nothing());
            let folded = self.events_of(aggregate).fold(nothing, |folded, event| {
                folded.and_then(|folded| document.fold(folded, event))
            })?;
            let made = document.rows(aggregate, &folded)?.into_iter();
            let of_view = made.filter(|row| row.key.view_index() == view_index);
            rows.extend(of_view.map(|row| (aggregate, row)));
        }
        Ok(rows)
    }

    fn view(&self, view: &str) -> Result<(&'d ProjectionDefinition, usize), RehearsalError> {
        let unknown = || RehearsalError::UnknownView(view.to_owned());
        let (definition, found) = self.domain.view(view).ok_or_else(unknown)?;
        let view_index = definition.views().iter().position(|known| known == found);
        Ok((definition, view_index.ok_or_else(unknown)?))
    }

    fn aggregates(&self, definition: &ProjectionDefinition) -> impl Iterator<Item = &AggregateId> {
        let kind = definition.aggregate_type().clone();
        let first = self.log.iter().filter(|event| event.version == Version::ZERO.next());
        first.map(|event| &event.aggregate).filter(move |aggregate| *aggregate.kind() == kind)
    }

    fn events_of<'a>(&'a self, aggregate: &'a AggregateId) -> impl Iterator<Item = &'a Event> {
        self.log.iter().filter(move |event| event.aggregate == *aggregate)
    }
}
