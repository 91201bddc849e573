//! Documents: one state for each aggregate, and the rows that it makes.

use std::collections::BTreeMap;
use std::sync::Arc;

use consistency::{
    Admission, AggregateId, Epoch, Event, LogPosition, Name, Position, SchemaVersion, Version,
    admit,
};
use serde::Serialize;

use crate::fold::{ErasedFold, TypedFold, guarded, store};
use crate::sql::StateColumns;
use crate::{ColumnError, Fold, Folded, ProjectionError, Upcasters, ViewDefinition, ViewKind};

/// Longest JSON of all rows of one aggregate together, in bytes.
pub const ROWS_BYTES_MAX: usize = 1 << 20;
/// Most rows that one aggregate makes.
pub const ROW_COUNT_MAX: usize = 1000;
/// Longest key of a list, in bytes. It is part of an index, whose entries are bounded.
pub const LIST_KEY_BYTES_MAX: usize = 256;

/// A fold whose state makes rows.
pub trait Document: Fold {
    /// The rows of every view that `state` makes; none for an aggregate without state.
    fn rows(&self, state: &Self::State, rows: &mut Rows<'_>);
}

/// Collects the rows of one aggregate. A mistake is kept and fails the event that led to it.
#[derive(Debug)]
pub struct Rows<'a> {
    aggregate: &'a AggregateId,
    views: &'a [ViewDefinition],
    rows: RowMap,
    bytes: usize,
    error: Option<ProjectionError>,
}

impl Rows<'_> {
    /// The aggregate that the rows are of.
    pub fn aggregate(&self) -> &AggregateId {
        self.aggregate
    }

    /// The aggregate's row in a row view.
    pub fn row(&mut self, view: &str, data: &impl Serialize) {
        self.add(view, ViewKind::Row, None, data);
    }

    /// The aggregate's row in a search view: an object, with the fields that it is found by.
    pub fn hit(&mut self, view: &str, data: &impl Serialize) {
        let known = self.views.iter().find(|known| known.name().as_str() == view);
        let kind = match known.map(ViewDefinition::kind) {
            Some(kind @ ViewKind::Search(_)) => kind,
            // There is none of this name: reported as any other.
            Some(ViewKind::Row | ViewKind::List | ViewKind::Rollup) | None => ViewKind::Rollup,
        };
        self.add(view, kind, None, data);
    }

    /// The aggregate's item under `key` of a list view.
    pub fn item(&mut self, view: &str, key: impl Into<String>, data: &impl Serialize) {
        self.add(view, ViewKind::List, Some(key.into()), data);
    }

    fn add(&mut self, view: &str, kind: ViewKind, key: Option<String>, data: &impl Serialize) {
        if self.error.is_none()
            && let Err(reason) = self.try_add(view, kind, key, data)
        {
            self.error = Some(ProjectionError::Row { view: view.to_owned(), reason });
        }
    }

    fn try_add(
        &mut self,
        view: &str,
        kind: ViewKind,
        list_key: Option<String>,
        data: &impl Serialize,
    ) -> Result<(), String> {
        let view_index = self
            .views
            .iter()
            .position(|known| known.name().as_str() == view && known.kind() == kind)
            .ok_or("the projection has no such view of this kind")?;
        if let Some(key) = &list_key
            && (key.is_empty() || key.len() > LIST_KEY_BYTES_MAX || key.contains('\0'))
        {
            return Err(format!(
                "a list key has 1 to {LIST_KEY_BYTES_MAX} bytes, none of them zero"
            ));
        }
        let data = serde_json::to_string(data).map_err(|error| error.to_string())?;
        self.bytes += data.len();
        if self.bytes > ROWS_BYTES_MAX {
            return Err(format!("one aggregate's rows may have {ROWS_BYTES_MAX} bytes together"));
        }
        if self.rows.len() == ROW_COUNT_MAX {
            return Err(format!("one aggregate may make no more than {ROW_COUNT_MAX} rows"));
        }
        match self.rows.insert(RowKey { view_index, list_key }, data) {
            Some(_) => Err("two rows have the same key".to_owned()),
            None => Ok(()),
        }
    }

    fn finish(self) -> Result<RowMap, ProjectionError> {
        self.error.map_or(Ok(self.rows), Err)
    }
}

/// Which row of its aggregate a row is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RowKey {
    view_index: usize,
    list_key: Option<String>,
}

impl RowKey {
    /// The place of its view among the definition's views.
    pub fn view_index(&self) -> usize {
        self.view_index
    }

    /// The key of the list it is in; `None` in a row view.
    pub fn list_key(&self) -> Option<&str> {
        self.list_key.as_deref()
    }
}

/// One row of one aggregate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Which.
    pub key: RowKey,
    /// JSON.
    pub data: String,
}

/// The state of one aggregate as the state table holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredState {
    pub(crate) version: Version,
    pub(crate) at: LogPosition,
    pub(crate) created: Position,
    pub(crate) state: Option<String>,
}

impl StoredState {
    /// Of an aggregate that has no row in the state table.
    pub const NOTHING: Self = Self {
        version: Version::ZERO,
        at: LogPosition::ORIGIN,
        created: Position::ZERO,
        state: None,
    };

    /// Of an aggregate with so many events, the newest and the first of which stand there.
    pub fn new(
        version: Version,
        at: LogPosition,
        created: Position,
        state: Option<String>,
    ) -> Self {
        Self { version, at, created, state }
    }

    /// The aggregate's id and its state, from a row of [`crate::sql::Statements::load_states`].
    pub fn from_columns(columns: StateColumns) -> Result<(String, Self), ColumnError> {
        let (aggregate_id, version, epoch, position, created_position, state) = columns;
        let positioned = |column, value: i64| {
            Position::from_i64(value)
                .ok_or_else(|| ColumnError { column, value: value.to_string() })
        };
        let epoch = Epoch::from_i32(epoch)
            .ok_or_else(|| ColumnError { column: "epoch", value: epoch.to_string() })?;
        let stored = Self {
            version: ColumnError::version(version)?,
            at: LogPosition::new(epoch, positioned("position", position)?),
            created: positioned("created_position", created_position)?,
            state,
        };
        Ok((aggregate_id, stored))
    }

    /// The number of events that are in it.
    pub fn version(&self) -> Version {
        self.version
    }

    /// Where the newest of them stands in the log.
    pub fn at(&self) -> LogPosition {
        self.at
    }

    /// Where the first of them stands.
    pub fn created(&self) -> Position {
        self.created
    }

    /// The state as JSON; `None` when the aggregate has none.
    pub fn state(&self) -> Option<&str> {
        self.state.as_deref()
    }
}

/// Why [`DocumentDefinition::apply`] went no further.
#[derive(Debug)]
pub enum Stop {
    /// Events between the state and the next event are missing.
    Gap {
        /// The version of the state.
        state: Version,
        /// The version of the event.
        event: Version,
    },
    /// The event cannot be applied, however often it is tried.
    Poison(ProjectionError),
}

/// What a run of events does to one aggregate.
#[derive(Debug)]
pub struct Applied {
    /// Which.
    pub aggregate: AggregateId,
    /// The state before.
    pub before: StoredState,
    /// The state after. Equal to `before` when every event was in it already.
    pub after: StoredState,
    /// Rows that are new or changed. A row of a row view is changed with every event, since it
    /// carries its aggregate's version.
    pub upserts: Vec<Row>,
    /// Rows that are no more.
    pub deletes: Vec<RowKey>,
    /// How many of the events are in `after`, those that were in `before` already among them.
    pub consumed: usize,
    /// Why the event at `consumed` is not; `None` when all are.
    pub stop: Option<Stop>,
}

/// A document without its types.
#[derive(Clone)]
pub struct DocumentDefinition {
    document: Arc<dyn ErasedDocument>,
    views: Arc<[ViewDefinition]>,
    upcasters: Arc<Upcasters>,
}

impl std::fmt::Debug for DocumentDefinition {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DocumentDefinition").field("views", &self.views).finish_non_exhaustive()
    }
}

impl DocumentDefinition {
    pub(crate) fn new(document: Arc<dyn ErasedDocument>, views: Arc<[ViewDefinition]>) -> Self {
        Self { document, views, upcasters: Arc::default() }
    }

    pub(crate) fn set_upcasters(&mut self, upcasters: Arc<Upcasters>) {
        self.upcasters = upcasters;
    }

    pub(crate) fn knows(&self, event_type: &Name, schema: SchemaVersion) -> bool {
        self.document.knows(event_type, schema, &self.upcasters)
    }

    /// The state after the next event of the aggregate; the next, or it is an error. For reading an
    /// aggregate from the log; a projector uses [`Self::apply`].
    pub fn fold(&self, folded: Folded, event: &Event) -> Result<Folded, ProjectionError> {
        self.document.fold(folded, event, &self.upcasters)
    }

    /// A state as it is stored, within its bound.
    pub fn store(&self, folded: &Folded) -> Result<StoredState, ProjectionError> {
        store(&*self.document, folded)
    }

    /// A stored state as it was.
    pub fn restore(&self, stored: &StoredState) -> Result<Folded, ProjectionError> {
        self.document.decode(stored)
    }

    /// Every row that a state makes.
    pub fn rows(
        &self,
        aggregate: &AggregateId,
        folded: &Folded,
    ) -> Result<Vec<Row>, ProjectionError> {
        let rows = self.row_map(aggregate, folded)?;
        Ok(rows.into_iter().map(|(key, data)| Row { key, data }).collect())
    }

    /// The aggregate's row in the row view `view`, as JSON; `None` when it has none there.
    pub fn row(
        &self,
        aggregate: &AggregateId,
        folded: &Folded,
        view: &Name,
    ) -> Result<Option<String>, ProjectionError> {
        let mut rows = self.row_map(aggregate, folded)?;
        let view_index = self.views.iter().position(|known| known.name() == view);
        Ok(view_index.and_then(|view_index| rows.remove(&RowKey { view_index, list_key: None })))
    }

    /// What `events`, the aggregate's own in order, change. Those that `before` holds already are
    /// passed over. Goes as far as it can: what follows the first event that cannot be applied is
    /// left out, and `stop` says why. Rows are made once, of the last state, so an event whose own
    /// rows would be unusable does no harm when a later one of the run mends them.
    pub fn apply(
        &self,
        aggregate: &AggregateId,
        before: StoredState,
        events: &[&Event],
    ) -> Applied {
        self.apply_as(Making::StatesAndRows, aggregate, before, events)
    }

    /// The same without rows, for who makes them of the last state of all.
    pub fn apply_to_state(
        &self,
        aggregate: &AggregateId,
        before: StoredState,
        events: &[&Event],
    ) -> Applied {
        self.apply_as(Making::States, aggregate, before, events)
    }

    fn apply_as(
        &self,
        making: Making,
        aggregate: &AggregateId,
        before: StoredState,
        events: &[&Event],
    ) -> Applied {
        let Admitted { run, gap } = admitted(before.version, events);
        let (reached, poison) = match self.fold_all(making, aggregate, &before, &run) {
            Ok(reached) => (reached, None),
            Err(_) => self.fold_until_poison(making, aggregate, &before, &run),
        };
        let (consumed, stop) = match (poison, gap) {
            (Some((at, error)), _) => (run[at].0, Some(Stop::Poison(error))),
            (None, Some((at, gap))) => (at, Some(gap)),
            (None, None) => (events.len(), None),
        };
        let (upserts, deletes) = self.difference(&reached);
        Applied {
            aggregate: aggregate.clone(),
            before,
            after: reached.state,
            upserts,
            deletes,
            consumed,
            stop,
        }
    }

    fn fold_all(
        &self,
        making: Making,
        aggregate: &AggregateId,
        before: &StoredState,
        run: &[(usize, &Event)],
    ) -> Result<Reached, ProjectionError> {
        if run.is_empty() {
            return Ok(Reached::nowhere(before));
        }
        let mut folded = self.document.decode(before)?;
        let rows_before = self.made(making, aggregate, &folded)?;
        for (_, event) in run {
            folded = self.fold(folded, event)?;
        }
        let state = self.store(&folded)?;
        let rows = self.made(making, aggregate, &folded)?;
        Ok(Reached { state, rows_before, rows })
    }

    /// One by one, each from the stored state before it, since a fold that fails has consumed its
    /// state. Also finds the event whose rows are at fault.
    fn fold_until_poison(
        &self,
        making: Making,
        aggregate: &AggregateId,
        before: &StoredState,
        run: &[(usize, &Event)],
    ) -> (Reached, Option<(usize, ProjectionError)>) {
        let mut reached = Reached::nowhere(before);
        for (at, event) in run.iter().enumerate() {
            match self.fold_all(making, aggregate, &reached.state, &[*event]) {
                Ok(next) if at == 0 => reached = next,
                Ok(next) => reached = Reached { rows_before: reached.rows_before, ..next },
                Err(error) => return (reached, Some((at, error))),
            }
        }
        (reached, None)
    }

    fn difference(&self, reached: &Reached) -> (Vec<Row>, Vec<RowKey>) {
        let Reached { rows_before, rows, .. } = reached;
        let is_changed = |key: &RowKey, data: &String| match self.views[key.view_index].kind() {
            ViewKind::Row | ViewKind::Search(_) => true,
            ViewKind::List | ViewKind::Rollup => rows_before.get(key) != Some(data),
        };
        let upserts = rows
            .iter()
            .filter(|(key, data)| is_changed(key, data))
            .map(|(key, data)| Row { key: key.clone(), data: data.clone() })
            .collect();
        let deletes = rows_before.keys().filter(|key| !rows.contains_key(key)).cloned().collect();
        (upserts, deletes)
    }

    fn made(
        &self,
        making: Making,
        aggregate: &AggregateId,
        folded: &Folded,
    ) -> Result<RowMap, ProjectionError> {
        match making {
            Making::StatesAndRows => self.row_map(aggregate, folded),
            Making::States => Ok(RowMap::new()),
        }
    }

    fn row_map(&self, aggregate: &AggregateId, folded: &Folded) -> Result<RowMap, ProjectionError> {
        let mut rows =
            Rows { aggregate, views: &self.views, rows: RowMap::new(), bytes: 0, error: None };
        guarded(|| self.document.rows(folded, &mut rows))?;
        rows.finish()
    }
}

/// What a fold is to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Making {
    StatesAndRows,
    States,
}

type RowMap = BTreeMap<RowKey, String>;

/// How far a fold came.
struct Reached {
    state: StoredState,
    rows_before: RowMap,
    rows: RowMap,
}

impl Reached {
    fn nowhere(before: &StoredState) -> Self {
        Self { state: before.clone(), rows_before: RowMap::new(), rows: RowMap::new() }
    }
}

/// The events that follow a state without a gap, with their places among those given, and where
/// the first gap is.
struct Admitted<'e> {
    run: Vec<(usize, &'e Event)>,
    gap: Option<(usize, Stop)>,
}

fn admitted<'e>(state: Version, events: &[&'e Event]) -> Admitted<'e> {
    let mut version = state;
    let mut run = Vec::with_capacity(events.len());
    for (at, event) in events.iter().enumerate() {
        match admit(version, event.version) {
            Admission::Apply => {
                version = event.version;
                run.push((at, *event));
            }
            Admission::Duplicate => {}
            Admission::Gap => {
                let gap = Stop::Gap { state: version, event: event.version };
                return Admitted { run, gap: Some((at, gap)) };
            }
        }
    }
    Admitted { run, gap: None }
}

/// A [`Document`] without its types.
pub(crate) trait ErasedDocument: ErasedFold {
    fn rows(&self, folded: &Folded, rows: &mut Rows<'_>) -> Result<(), ProjectionError>;
}

impl<D: Document> ErasedDocument for TypedFold<D> {
    fn rows(&self, folded: &Folded, rows: &mut Rows<'_>) -> Result<(), ProjectionError> {
        match (folded.state::<D::State>(), folded.exists()) {
            (Some(state), _) => self.0.rows(state, rows),
            (None, false) => {}
            (None, true) => {
                let reason = "state is of another aggregate type".to_owned();
                return Err(ProjectionError::State(reason));
            }
        }
        Ok(())
    }
}
