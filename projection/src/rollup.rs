//! Rollups: sums and maxima across aggregates.
//!
//! Deltas commute, so that partitions need no order among each other: each keeps its own part of a
//! row, and a read adds the parts up.

use std::collections::BTreeMap;
use std::sync::Arc;

use consistency::{Event, LogPosition, Name, SchemaVersion};
use serde::de::DeserializeOwned;

use crate::decode::{decode, is_known};
use crate::fold::{ErasedFold, TypedFold, encode_state, guarded};
use crate::{
    Fold, FoldError, Folded, LIST_KEY_BYTES_MAX, ProjectionError, StoredState, Upcasters,
    ViewDefinition,
};

/// What each event adds to rows that many aggregates share.
pub trait Rollup: Send + Sync + 'static {
    /// As [`crate::Fold::Event`].
    type Event: DeserializeOwned;

    /// What `event` adds. Pure, and the same however often it is asked.
    fn deltas(
        &self,
        event: Self::Event,
        envelope: &Event,
        deltas: &mut Deltas<'_>,
    ) -> Result<(), FoldError>;
}

/// A fold whose states add up: what an aggregate adds to rows that many share is a matter of its
/// state, and an event changes it by the difference. For sums that an event alone cannot tell, such
/// as what a cancelled order no longer adds.
pub trait Summary: Fold {
    /// What `state` adds. A column of maxima keeps what any state ever added to it; a sum does not.
    fn deltas(&self, state: &Self::State, deltas: &mut Deltas<'_>);
}

/// How the parts of a column combine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Combine {
    Sum,
    Max,
}

/// A column of a rollup: its name and how parts combine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Column {
    pub(crate) name: &'static str,
    pub(crate) combine: Combine,
}

/// One row's part of what an event adds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delta {
    /// The row's key.
    pub key: String,
    /// One value for each column of the definition; `None` adds nothing.
    pub values: Vec<Option<i64>>,
}

/// What a run of events adds to a rollup.
#[derive(Debug)]
pub struct Counted {
    /// Each with the place of its event.
    pub deltas: Vec<(LogPosition, Delta)>,
    /// How many of the events are in it.
    pub consumed: usize,
    /// The state to be kept for the aggregate, as JSON; `None` when there is none.
    pub state: Option<String>,
    /// Why the event at `consumed` is not in it; `None` when all are.
    pub error: Option<ProjectionError>,
}

/// Collects deltas. Several for one key combine.
#[derive(Debug)]
pub struct Deltas<'a> {
    columns: &'a [Column],
    rows: BTreeMap<String, Vec<Option<i64>>>,
    error: Option<String>,
}

impl<'a> Deltas<'a> {
    fn new(columns: &'a [Column]) -> Self {
        Self { columns, rows: BTreeMap::new(), error: None }
    }

    /// Turns what a state adds into what it adds more than `before` did.
    fn subtract(&mut self, before: &Deltas<'_>) -> Result<(), String> {
        let columns = self.columns;
        for (key, held) in &before.rows {
            let values = self.rows.entry(key.clone()).or_insert_with(|| vec![None; columns.len()]);
            for ((column, value), held) in columns.iter().zip(values).zip(held) {
                *value = difference(column.combine, *held, *value)?;
            }
        }
        self.rows.retain(|_, values| values.iter().any(Option::is_some));
        Ok(())
    }

    /// Combines `value` into `column` of the row at `key`.
    pub fn add(&mut self, key: impl Into<String>, column: &str, value: i64) {
        if let Err(reason) = self.try_add(key.into(), column, value) {
            self.error.get_or_insert(reason);
        }
    }

    fn try_add(&mut self, key: String, column: &str, value: i64) -> Result<(), String> {
        if key.is_empty() || key.len() > LIST_KEY_BYTES_MAX || key.contains('\0') {
            return Err(format!("a key has 1 to {LIST_KEY_BYTES_MAX} bytes, none of them zero"));
        }
        let at = self
            .columns
            .iter()
            .position(|known| known.name == column)
            .ok_or_else(|| format!("the rollup has no column {column}"))?;
        let columns = self.columns;
        let values = self.rows.entry(key).or_insert_with(|| vec![None; columns.len()]);
        values[at] = Some(combine(columns[at].combine, values[at], value)?);
        Ok(())
    }
}

fn combine(how: Combine, held: Option<i64>, value: i64) -> Result<i64, String> {
    match (held, how) {
        (None, _) => Ok(value),
        (Some(held), Combine::Max) => Ok(held.max(value)),
        (Some(held), Combine::Sum) => {
            held.checked_add(value).ok_or_else(|| "a sum left 64 bits".to_owned())
        }
    }
}

/// What brings a part from `held` to `value`; `None` when nothing has to.
fn difference(how: Combine, held: Option<i64>, value: Option<i64>) -> Result<Option<i64>, String> {
    match (held, value, how) {
        (None, value, _) => Ok(value),
        (Some(held), value, _) if value == Some(held) => Ok(None),
        (Some(_), value, Combine::Max) => Ok(value),
        (Some(held), value, Combine::Sum) => {
            let changed = value.unwrap_or(0).checked_sub(held);
            changed.map(Some).ok_or_else(|| "a sum left 64 bits".to_owned())
        }
    }
}

/// A rollup without its types.
#[derive(Clone)]
pub struct RollupDefinition {
    rollup: Arc<dyn ErasedRollup>,
    view: ViewDefinition,
    columns: Arc<[Column]>,
    upcasters: Arc<Upcasters>,
}

impl std::fmt::Debug for RollupDefinition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RollupDefinition")
            .field("view", &self.view)
            .field("columns", &self.columns)
            .finish_non_exhaustive()
    }
}

/// The parts that a batch of events adds to a rollup, as the columns of
/// [`crate::sql::RollupStatements::add`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RollupChanges {
    /// `$1`: the rows' keys.
    pub keys: Vec<String>,
    /// `$2`: the partition, the same for all.
    pub partitions: Vec<i32>,
    /// `$3`: epochs of the newest events in the parts.
    pub epochs: Vec<i32>,
    /// `$4`: positions of the newest events in the parts.
    pub positions: Vec<i64>,
    /// `$5` and on: one array for each column of the definition.
    pub columns: Vec<Vec<Option<i64>>>,
}

impl RollupDefinition {
    pub(crate) fn new(
        rollup: Arc<dyn ErasedRollup>,
        view: ViewDefinition,
        columns: Arc<[Column]>,
    ) -> Self {
        Self { rollup, view, columns, upcasters: Arc::default() }
    }

    pub(crate) fn set_upcasters(&mut self, upcasters: Arc<Upcasters>) {
        self.upcasters = upcasters;
    }

    pub(crate) fn columns(&self) -> &[Column] {
        &self.columns
    }

    /// The one view that it feeds.
    pub fn view(&self) -> &ViewDefinition {
        &self.view
    }

    /// The names of its columns, in the order of their values.
    pub fn column_names(&self) -> impl Iterator<Item = &'static str> {
        self.columns.iter().map(|column| column.name)
    }

    pub(crate) fn knows(&self, event_type: &Name, schema: SchemaVersion) -> bool {
        self.rollup.knows(event_type, schema, &self.upcasters)
    }

    /// What `events` add, which follow `before` in the order of their aggregate without a gap. Goes
    /// as far as it can.
    pub fn count(&self, before: &StoredState, events: &[&Event]) -> Counted {
        let mut deltas = Vec::new();
        if events.is_empty() {
            return Counted { deltas, consumed: 0, state: before.state.clone(), error: None };
        }
        let (consumed, error) = match self.count_into(before, events, &mut deltas) {
            Ok(state) => return Counted { deltas, consumed: events.len(), state, error: None },
            Err(failed) => failed,
        };
        // A fold that fails has consumed its state, so it starts again and stops before.
        deltas.clear();
        match self.count_into(before, &events[..consumed], &mut deltas) {
            Ok(state) => Counted { deltas, consumed, state, error: Some(error) },
            Err((_, error)) => {
                let state = before.state.clone();
                Counted { deltas: Vec::new(), consumed: 0, state, error: Some(error) }
            }
        }
    }

    /// The state after `events`, or the place of the one that failed.
    fn count_into(
        &self,
        before: &StoredState,
        events: &[&Event],
        deltas: &mut Vec<(LogPosition, Delta)>,
    ) -> Result<Option<String>, (usize, ProjectionError)> {
        let mut folded = self.rollup.begin(before).map_err(|error| (0, error))?;
        for (place, event) in events.iter().enumerate() {
            let added;
            (folded, added) = self.step(folded, event).map_err(|error| (place, error))?;
            deltas.extend(added.into_iter().map(|delta| (event.at, delta)));
        }
        let last = events.len().saturating_sub(1);
        self.rollup.end(&folded).map_err(|error| (last, error))
    }

    fn step(&self, folded: Folded, event: &Event) -> Result<(Folded, Vec<Delta>), ProjectionError> {
        let mut deltas = Deltas::new(&self.columns);
        let folded = guarded(|| self.rollup.step(folded, event, &self.upcasters, &mut deltas))?;
        match deltas.error {
            Some(reason) => {
                Err(ProjectionError::Row { view: self.view.name().to_string(), reason })
            }
            None => {
                let rows = deltas.rows.into_iter();
                Ok((folded, rows.map(|(key, values)| Delta { key, values }).collect()))
            }
        }
    }

    /// Combines the deltas of a batch of one partition into one part for each row.
    pub fn gather<'d>(
        &self,
        partition: u16,
        deltas: impl IntoIterator<Item = (LogPosition, &'d Delta)>,
    ) -> Result<RollupChanges, ProjectionError> {
        let mut rows: BTreeMap<&str, (LogPosition, Vec<Option<i64>>)> = BTreeMap::new();
        for (at, delta) in deltas {
            let (newest, held) =
                rows.entry(&delta.key).or_insert_with(|| (at, vec![None; self.columns.len()]));
            *newest = at.max(*newest);
            for ((column, held), value) in self.columns.iter().zip(held).zip(&delta.values) {
                if let Some(value) = value {
                    *held = Some(combine(column.combine, *held, *value).map_err(|reason| {
                        ProjectionError::Row { view: self.view.name().to_string(), reason }
                    })?);
                }
            }
        }
        let mut changes = RollupChanges {
            columns: vec![Vec::with_capacity(rows.len()); self.columns.len()],
            ..RollupChanges::default()
        };
        for (key, (at, values)) in rows {
            changes.keys.push(key.to_owned());
            changes.partitions.push(i32::from(partition));
            changes.epochs.push(at.epoch.as_i32());
            changes.positions.push(at.position.as_i64());
            for (column, value) in changes.columns.iter_mut().zip(values) {
                column.push(value);
            }
        }
        Ok(changes)
    }
}

/// A [`Rollup`] or a [`Summary`] without its types.
pub(crate) trait ErasedRollup: Send + Sync {
    /// What was kept for an aggregate.
    fn begin(&self, before: &StoredState) -> Result<Folded, ProjectionError>;

    /// What the next event adds.
    fn step(
        &self,
        folded: Folded,
        event: &Event,
        upcasters: &Upcasters,
        deltas: &mut Deltas<'_>,
    ) -> Result<Folded, ProjectionError>;

    /// What is to be kept.
    fn end(&self, folded: &Folded) -> Result<Option<String>, ProjectionError>;

    /// As [`crate::ProjectionDefinition::knows`].
    fn knows(&self, event_type: &Name, schema: SchemaVersion, upcasters: &Upcasters) -> bool;
}

pub(crate) struct TypedRollup<R>(pub(crate) R);

impl<R: Rollup> ErasedRollup for TypedRollup<R> {
    fn begin(&self, _: &StoredState) -> Result<Folded, ProjectionError> {
        Ok(Folded::nothing())
    }

    fn step(
        &self,
        folded: Folded,
        event: &Event,
        upcasters: &Upcasters,
        deltas: &mut Deltas<'_>,
    ) -> Result<Folded, ProjectionError> {
        let decoded = decode::<R::Event>(event, upcasters)?;
        self.0.deltas(decoded, event, deltas).map_err(ProjectionError::Fold)?;
        Ok(folded)
    }

    fn end(&self, _: &Folded) -> Result<Option<String>, ProjectionError> {
        Ok(None)
    }

    fn knows(&self, event_type: &Name, schema: SchemaVersion, upcasters: &Upcasters) -> bool {
        is_known::<R::Event>(event_type, schema, upcasters)
    }
}

pub(crate) struct TypedSummary<S>(pub(crate) TypedFold<S>);

impl<S: Summary> TypedSummary<S> {
    fn deltas(&self, folded: &Folded, deltas: &mut Deltas<'_>) {
        if let Some(state) = folded.state::<S::State>() {
            self.0.0.deltas(state, deltas);
        }
    }
}

impl<S: Summary> ErasedRollup for TypedSummary<S> {
    fn begin(&self, before: &StoredState) -> Result<Folded, ProjectionError> {
        self.0.decode(before)
    }

    fn step(
        &self,
        folded: Folded,
        event: &Event,
        upcasters: &Upcasters,
        deltas: &mut Deltas<'_>,
    ) -> Result<Folded, ProjectionError> {
        let mut before = Deltas::new(deltas.columns);
        self.deltas(&folded, &mut before);
        let folded = self.0.fold(folded, event, upcasters)?;
        self.deltas(&folded, deltas);
        if deltas.error.is_none()
            && let Err(reason) = deltas.subtract(&before)
        {
            deltas.error = Some(reason);
        }
        Ok(folded)
    }

    fn end(&self, folded: &Folded) -> Result<Option<String>, ProjectionError> {
        encode_state(&self.0, folded)
    }

    fn knows(&self, event_type: &Name, schema: SchemaVersion, upcasters: &Upcasters) -> bool {
        self.0.knows(event_type, schema, upcasters)
    }
}
