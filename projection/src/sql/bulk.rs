//! The statements of a rebuild: tables that get their keys and indexes when they are full, and rows
//! that are copied in.

use std::sync::Arc;

use super::{create_list, create_rows, search};
use crate::{ProjectionDefinition, ViewKind};

/// Every statement of filling one version's tables.
#[derive(Debug)]
pub struct BulkStatements {
    /// Makes the tables; to be run one by one. That of states has its key, which a rebuild reads by.
    pub create: Vec<Arc<str>>,
    /// Copies states, as binary rows of aggregate id, partition, version, epoch, position, created
    /// position and state.
    pub copy_states: Arc<str>,
    /// In the order of the definition's views.
    pub views: Vec<BulkView>,
    /// Returns one `bigint`: the blocks of the state table.
    pub count_blocks: Arc<str>,
    /// `$1 text`, `$2 text`: places of the state table, as in `(0,0)`; rows of
    /// [`super::StateColumns`] from the first up to the second. Only while nobody writes states.
    pub scan_states: Arc<str>,
    /// `$1 text`: an aggregate's id.
    pub delete_state: Arc<str>,
}

/// The statements of one view.
#[derive(Debug)]
pub struct BulkView {
    /// Copies rows; `None` where they are added up instead, by the view's own statement. Binary rows of
    /// aggregate id, version, epoch, position and data, or of list key, created position, aggregate
    /// id and data.
    pub copy: Option<Arc<str>>,
    /// To be made when it is full.
    pub indexes: Vec<BulkIndex>,
}

/// An index, of a key or for searches.
#[derive(Debug)]
pub struct BulkIndex {
    /// Returns one `boolean`: whether it is there.
    pub is_there: Arc<str>,
    /// Makes it.
    pub create: Arc<str>,
}

impl BulkStatements {
    /// Of one version.
    pub fn of(definition: &ProjectionDefinition) -> Self {
        let statements = definition.statements();
        let mut tables = statements.tables().map(str::to_owned);
        let state = tables.next().unwrap_or_default();
        // The first is of the state table.
        let mut create: Vec<Arc<str>> = statements.create.iter().take(1).cloned().collect();
        let kinds = definition.views().iter().map(|view| view.kind());
        let views =
            kinds.zip(tables).map(|(kind, table)| view(definition, kind, &table, &mut create));
        let views = views.collect();
        let columns = "aggregate_id, partition, version, epoch, position, created_position, state";
        Self {
            create,
            copy_states: copy(&state, columns),
            views,
            count_blocks: format!(
                "select pg_relation_size('\"{state}\"') / current_setting('block_size')::bigint"
            )
            .into(),
            scan_states: format!(
                r#"select aggregate_id, version, epoch, position, created_position, state
                from "{state}" where ctid >= $1::text::tid and ctid < $2::text::tid"#
            )
            .into(),
            delete_state: format!(r#"delete from "{state}" where aggregate_id = $1"#).into(),
        }
    }
}

fn view(
    definition: &ProjectionDefinition,
    kind: ViewKind,
    table: &str,
    create: &mut Vec<Arc<str>>,
) -> BulkView {
    let rows = "aggregate_id, version, epoch, position, data";
    let keyed_by = |columns: &str| {
        let is_there = format!(
            r#"select exists (select from pg_index
                where indrelid = '"{table}"'::regclass and indisprimary)"#
        );
        let create = format!(r#"alter table "{table}" add primary key ({columns})"#);
        BulkIndex { is_there: is_there.into(), create: create.into() }
    };
    match kind {
        ViewKind::Row => {
            create.push(create_rows(table, "not null"));
            BulkView { copy: Some(copy(table, rows)), indexes: vec![keyed_by("aggregate_id")] }
        }
        ViewKind::Search(fields) => {
            create.push(search::create(table, fields, "not null"));
            let index = search::index_name(table);
            let is_there = format!(r#"select to_regclass('"{index}"') is not null"#).into();
            let words = BulkIndex { is_there, create: search::create_index(table) };
            let indexes = vec![keyed_by("aggregate_id"), words];
            BulkView { copy: Some(copy(table, rows)), indexes }
        }
        ViewKind::List => {
            create.push(create_list(table, ""));
            let columns = "list_key, created_position, aggregate_id";
            let copy = copy(table, "list_key, created_position, aggregate_id, data");
            BulkView { copy: Some(copy), indexes: vec![keyed_by(columns)] }
        }
        // Parts are added up all along, so their key is there from the beginning.
        ViewKind::Rollup => {
            create.extend(definition.statements().create.iter().skip(1).cloned());
            BulkView { copy: None, indexes: Vec::new() }
        }
    }
}

fn copy(table: &str, columns: &str) -> Arc<str> {
    format!(r#"copy "{table}" ({columns}) from stdin (format binary)"#).into()
}
