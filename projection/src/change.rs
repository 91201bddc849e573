//! What a batch changes, as the columns of the statements that write it.

use crate::{Applied, ProjectionDefinition, ViewKind};

/// Everything that a batch writes besides its checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// For the state table.
    pub states: StateWrites,
    /// For the views, in the order of the definition's views.
    pub views: Vec<ViewChanges>,
}

/// The columns of [`crate::sql::Statements::write_states`], in the order of its parameters.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StateWrites {
    /// `$1`
    pub aggregate_ids: Vec<String>,
    /// `$2`
    pub partitions: Vec<i32>,
    /// `$3`: the versions that must be there; zero where there must be none.
    pub previous_versions: Vec<i64>,
    /// `$4`
    pub versions: Vec<i64>,
    /// `$5`
    pub epochs: Vec<i32>,
    /// `$6`
    pub positions: Vec<i64>,
    /// `$7`
    pub created_positions: Vec<i64>,
    /// `$8`
    pub states: Vec<Option<String>>,
}

/// What a batch changes in one view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ViewChanges {
    /// In a row view, or in a search view, whose table is written in the same way.
    Row(RowChanges),
    /// In a list view.
    List(ListChanges),
}

/// The columns of the statements of a row view.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RowChanges {
    /// `$1` of [`crate::sql::RowStatements::delete`].
    pub deleted_ids: Vec<String>,
    /// `$1` of [`crate::sql::RowStatements::upsert`].
    pub aggregate_ids: Vec<String>,
    /// `$2`
    pub versions: Vec<i64>,
    /// `$3`
    pub epochs: Vec<i32>,
    /// `$4`
    pub positions: Vec<i64>,
    /// `$5`: JSON.
    pub data: Vec<String>,
}

/// The columns of the statements of a list view.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ListChanges {
    /// `$1` of [`crate::sql::ListStatements::delete`].
    pub deleted_keys: Vec<String>,
    /// `$2` of it.
    pub deleted_created_positions: Vec<i64>,
    /// `$3` of it.
    pub deleted_ids: Vec<String>,
    /// `$1` of [`crate::sql::ListStatements::upsert`].
    pub list_keys: Vec<String>,
    /// `$2` of it.
    pub created_positions: Vec<i64>,
    /// `$3` of it.
    pub aggregate_ids: Vec<String>,
    /// `$4` of it: JSON.
    pub data: Vec<String>,
}

impl Changes {
    /// Gathers what was applied to the aggregates of one batch, each of them once. Aggregates that
    /// nothing happened to are left out.
    pub fn gather(definition: &ProjectionDefinition, batch: Vec<Applied>) -> Self {
        let views = definition.views().iter().filter_map(|view| match view.kind() {
            ViewKind::Row | ViewKind::Search(_) => Some(ViewChanges::Row(RowChanges::default())),
            ViewKind::List => Some(ViewChanges::List(ListChanges::default())),
            ViewKind::Rollup => None,
        });
        let mut changes = Self { states: StateWrites::default(), views: views.collect() };
        for applied in batch {
            if applied.after.version() != applied.before.version() {
                changes.add(definition, applied);
            }
        }
        changes
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.states.aggregate_ids.is_empty()
    }

    fn add(&mut self, definition: &ProjectionDefinition, applied: Applied) {
        let (before, after) = (applied.before, applied.after);
        let partition = definition.partition_for(&applied.aggregate);
        let id = applied.aggregate.id();
        for key in applied.deletes {
            match &mut self.views[key.view_index()] {
                ViewChanges::Row(view) => view.deleted_ids.push(id.to_owned()),
                ViewChanges::List(view) => {
                    view.deleted_keys.extend(key.list_key().map(str::to_owned));
                    view.deleted_created_positions.push(after.created().as_i64());
                    view.deleted_ids.push(id.to_owned());
                }
            }
        }
        for row in applied.upserts {
            match &mut self.views[row.key.view_index()] {
                ViewChanges::Row(view) => {
                    view.aggregate_ids.push(id.to_owned());
                    view.versions.push(after.version().as_i64());
                    view.epochs.push(after.at().epoch.as_i32());
                    view.positions.push(after.at().position.as_i64());
                    view.data.push(row.data);
                }
                ViewChanges::List(view) => {
                    view.list_keys.extend(row.key.list_key().map(str::to_owned));
                    view.created_positions.push(after.created().as_i64());
                    view.aggregate_ids.push(id.to_owned());
                    view.data.push(row.data);
                }
            }
        }
        let states = &mut self.states;
        states.aggregate_ids.push(id.to_owned());
        states.partitions.push(i32::from(partition));
        states.previous_versions.push(before.version().as_i64());
        states.versions.push(after.version().as_i64());
        states.epochs.push(after.at().epoch.as_i32());
        states.positions.push(after.at().position.as_i64());
        states.created_positions.push(after.created().as_i64());
        states.states.push(after.state);
    }
}
