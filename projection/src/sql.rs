//! The statements that are generated for the tables of a projection; every other statement of
//! Tidemark is static.
//!
//! A version of a projection has a state table `<projection>_v<version>_state` and a table
//! `<projection>_v<version>_<view>` for each view, `-` written as `_`. Their names are made of
//! [`Name`]s only, which hold nothing that could leave a quoted identifier or a literal.
//!
//! | table | key | further columns |
//! |---|---|---|
//! | state | `aggregate_id` | `partition`, `version`, `epoch`, `position`, `created_position`, `state` |
//! | row view | `aggregate_id` | `version`, `epoch`, `position`, `data` |
//! | list view | `list_key`, `created_position`, `aggregate_id` | `data` |
//! | search view | `aggregate_id` | as a row view, and made of `data`: `words`, `number`, `label` |
//! | rollup | `key`, `partition` | `epoch`, `position`, one for each sum or maximum |
//!
//! Writers lock the checkpoint row of their partition first; rows of different partitions never
//! meet. Readers take rows, checkpoints, parked aggregates and the active version in one statement,
//! which is one snapshot. A reader of a version that was dropped meets a missing table (SQLSTATE
//! 42P01), and has to learn the active version again.

mod backfill;
mod copy;
mod parity;
pub mod bulk;
mod read;
mod search;

use std::fmt::Write;
use std::sync::Arc;

use consistency::Name;

use crate::rollup::{Column, Combine};
use crate::{ProjectionKind, RollupDefinition, ViewDefinition, ViewKind};

pub use backfill::{BackfillStatements, LackingColumns};
pub use copy::CopyTable;
pub use parity::{ChecksumColumns, DifferenceColumns, ParityOf, ParityStatements, ParityTable};
pub use read::{
    GatheredColumns, ListAnswer, ListColumns, ListItem, RollupAnswer, RollupColumns, RollupRow,
    RowAnswer, RowColumns, Snapshot, StoredRow,
};

/// What Postgres cuts longer identifiers to.
pub const IDENTIFIER_BYTES_MAX: usize = 63;

/// A row of [`Statements::load_states`]: aggregate id, version, epoch, position, created position,
/// state. Decoded by [`crate::StoredState::from_columns`].
pub type StateColumns = (String, i64, i32, i64, i64, Option<String>);

/// A row of [`Statements::open`]: whether the checkpoint was moved; aggregate id; whether it is parked;
/// and, null when it has no state, version, epoch, position, created position and state.
pub type OpenedColumns =
    (bool, String, bool, Option<i64>, Option<i32>, Option<i64>, Option<i64>, Option<String>);

/// The SQLSTATE with which [`Statements::apply`] takes back what it wrote: of a division by zero, the one error
/// that an expression can raise by itself.
pub const NOT_AS_READ: &str = "22012";

/// Every statement of one version of a projection.
#[derive(Debug)]
pub struct Statements {
    /// Makes the tables where they are absent; to be run one by one.
    pub create: Vec<Arc<str>>,
    /// Drops the tables that are there.
    pub drop: Arc<str>,
    /// `$1 text[]`: aggregate ids. Rows of [`StateColumns`] for those that have one. A rollup has
    /// states as well, without text: they say which versions it has counted.
    pub load_states: Arc<str>,
    /// Parameters are the fields of [`crate::StateWrites`] in their order. Returns one row of one
    /// `bigint`: how many states were written. Fewer than were given means that a version was not
    /// the one demanded: roll back.
    pub write_states: Arc<str>,
    /// [`Self::write_states`], and everything that writes the views, in one: after its parameters come those
    /// of each view in their order, [`crate::Changes`] field by field or those of [`RollupStatements::add`].
    /// The views of a custom projection are its own to write.
    pub write: Arc<str>,
    /// Moves a partition's checkpoint on and reads what a batch needs, in one snapshot. `$1 integer`:
    /// partition; `$2 integer`, `$3 bigint`, `$4 bigint`: its epoch, position and fence, without which it
    /// stays; `$5 bigint`, `$6 uuid`: the new position and its event; `$7 bigint`: when that one was
    /// committed, in microseconds since 1970, null when that is not known; `$8 text[]`: aggregate ids. A row
    /// of [`OpenedColumns`] for each.
    pub open: Arc<str>,
    /// What [`Self::open`] reads, without moving anything. `$1 text[]`: aggregate ids. A row of
    /// [`OpenedColumns`] for each.
    pub look: Arc<str>,
    /// Moves a partition's checkpoint on and writes, as a transaction of its own: `$1` to `$8` are those of
    /// [`Self::open`], and after them come those of [`Self::write`]. Returns one row of one `boolean`: whether
    /// it was done. It was not when the checkpoint stood elsewhere, or one of the aggregates is parked. It
    /// fails with [`NOT_AS_READ`] when a version was not the one demanded.
    pub apply: Arc<str>,
    /// In the order of the definition's views.
    pub views: Vec<ViewStatements>,
    tables: Vec<String>,
    indexes: Vec<String>,
}

/// The statements of one view.
#[derive(Debug)]
pub enum ViewStatements {
    /// Of a row view.
    Row(RowStatements),
    /// Of a list view.
    List(ListStatements),
    /// Of a rollup.
    Rollup(RollupStatements),
    /// Of a search view.
    Search(SearchStatements),
}

/// The statements of a search view.
#[derive(Debug)]
pub struct SearchStatements {
    /// As of a row view.
    pub delete: Arc<str>,
    /// As of a row view.
    pub upsert: Arc<str>,
    /// `$1 text`: words to be found, as one types them into a search box, empty for any; `$2 bigint`,
    /// `$3 bigint`: least and most number; `$4 text`: label; null for any; `$5` to `$8`: as `$2` to
    /// `$5` of [`ListStatements::read`]. Always one row of [`ListColumns`].
    pub read: Arc<str>,
}

/// The statements of a row view.
#[derive(Debug)]
pub struct RowStatements {
    /// `$1 text[]`: aggregate ids.
    pub delete: Arc<str>,
    /// Aggregate ids, versions, epochs, positions, data, as in [`crate::RowChanges`].
    pub upsert: Arc<str>,
    /// `$1 integer`: the aggregate's partition; `$2 text`: its id. Always one row of [`RowColumns`].
    pub read: Arc<str>,
    /// The same of many in one snapshot, in any order. `$1 integer[]`, `$2 text[]`: partitions and
    /// ids. A row of [`GatheredColumns`] for each.
    pub read_many: Arc<str>,
}

/// The statements of a list view. Deletes run before upserts, or at once with them: no row is in both.
#[derive(Debug)]
pub struct ListStatements {
    /// List keys, created positions, aggregate ids, as in [`crate::ListChanges`].
    pub delete: Arc<str>,
    /// List keys, created positions, aggregate ids, data, as in [`crate::ListChanges`].
    pub upsert: Arc<str>,
    /// `$1 text`: the list's key; `$2 bigint`, `$3 text`: created position and aggregate id of the
    /// item that the page begins after, 0 and empty for the first page; `$4 bigint`: most items;
    /// `$5 bigint`: most parked aggregates. Always one row of [`ListColumns`].
    pub read: Arc<str>,
}

/// The statements of a rollup.
#[derive(Debug)]
pub struct RollupStatements {
    /// Parameters are the fields of [`crate::RollupChanges`] in their order.
    pub add: Arc<str>,
    /// `$1 text`: the row's key; `$2 bigint`: most parked aggregates. Always one row of
    /// [`RollupColumns`].
    pub read: Arc<str>,
}

/// What the names of tables and the literals of statements are made of.
struct Naming<'a> {
    projection: &'a Name,
    version: u32,
    aggregate_type: &'a Name,
}

impl Naming<'_> {
    fn table(&self, suffix: &str) -> String {
        format!("{}_v{}_{suffix}", self.projection, self.version).replace('-', "_")
    }
}

impl Statements {
    pub(crate) fn new(
        projection: &Name,
        version: u32,
        aggregate_type: &Name,
        views: &[ViewDefinition],
        kind: &ProjectionKind,
    ) -> Self {
        let naming = Naming { projection, version, aggregate_type };
        let state_table = naming.table("state");
        let mut create = vec![create_states(&state_table)];
        let mut tables = vec![state_table.clone()];
        let mut statements = Vec::new();
        let mut indexes = Vec::new();
        for view in views {
            let table = naming.table(view.name().as_str());
            let (made, of_view) = match (view.kind(), kind) {
                (ViewKind::Row, _) => (create_rows(&table, KEYED), row_statements(&naming, &table)),
                (ViewKind::List, _) => {
                    (create_list(&table, LIST_KEY), list_statements(&naming, &table, &state_table))
                }
                (ViewKind::Rollup, ProjectionKind::Rollup(rollup)) => {
                    (create_rollup(&table, rollup), rollup_statements(&naming, &table, rollup))
                }
                (ViewKind::Search(fields), _) => {
                    create.push(search::create(&table, fields, KEYED));
                    indexes.push(search::index_name(&table));
                    (
                        search::create_index(&table),
                        search::statements(&naming, &table, &state_table),
                    )
                }
                // Projection::rollup() alone makes rollup views.
                (ViewKind::Rollup, ProjectionKind::Document(_) | ProjectionKind::Custom(_)) => {
                    continue;
                }
            };
            create.push(made);
            statements.push(of_view);
            tables.push(table);
        }
        if let ProjectionKind::Custom(custom) = kind {
            for table in custom.tables() {
                create.push(table.create.into());
                tables.push(table.name.to_owned());
            }
        }
        let quoted: Vec<String> = tables.iter().map(|table| format!("\"{table}\"")).collect();
        let written = written(&state_table, &statements);
        Self {
            create,
            drop: format!("drop table if exists {}", quoted.join(", ")).into(),
            load_states: load_states(&state_table),
            write_states: write_states(&state_table),
            write: format!("with {written} {WRITTEN}").into(),
            open: open(&naming, &state_table),
            look: format!("select true as moved, {}", asked(&naming, &state_table, 1)).into(),
            apply: apply(&naming, &written, &statements),
            views: statements,
            tables,
            indexes,
        }
    }

    /// The names of the tables and of the indexes that have one of their own.
    pub(crate) fn relations(&self) -> impl Iterator<Item = &str> {
        self.tables.iter().chain(&self.indexes).map(String::as_str)
    }

    /// The names of the tables, unquoted.
    pub fn tables(&self) -> impl Iterator<Item = &str> {
        self.tables.iter().map(String::as_str)
    }
}

fn create_states(table: &str) -> Arc<str> {
    format!(
        r#"create table if not exists "{table}" (
            aggregate_id text primary key,
            partition integer not null,
            version bigint not null,
            epoch integer not null,
            position bigint not null,
            created_position bigint not null,
            state text
        ) with (fillfactor = 80)"#
    )
    .into()
}

/// What makes the first column of a table its key.
const KEYED: &str = "primary key";
/// What makes the key of a list's table.
const LIST_KEY: &str = ", primary key (list_key, created_position, aggregate_id)";

fn create_rows(table: &str, key: &str) -> Arc<str> {
    format!(
        r#"create table if not exists "{table}" (
            aggregate_id text {key},
            version bigint not null,
            epoch integer not null,
            position bigint not null,
            data json not null
        ) with (fillfactor = 80)"#
    )
    .into()
}

/// `key` is a constraint of the table, or nothing.
fn create_list(table: &str, key: &str) -> Arc<str> {
    format!(
        r#"create table if not exists "{table}" (
            list_key text not null,
            created_position bigint not null,
            aggregate_id text not null,
            data json not null{key}
        ) with (fillfactor = 80)"#
    )
    .into()
}

fn create_rollup(table: &str, rollup: &RollupDefinition) -> Arc<str> {
    let columns = listed(rollup.columns(), |_, column| format!("\"{}\" bigint,", column.name));
    format!(
        r#"create table if not exists "{table}" (
            key text not null,
            partition integer not null,
            epoch integer not null,
            position bigint not null,
            {columns}
            primary key (key, partition)
        ) with (fillfactor = 80)"#
    )
    .into()
}

fn load_states(table: &str) -> Arc<str> {
    format!(
        r#"select aggregate_id, version, epoch, position, created_position, state
        from "{table}" where aggregate_id = any($1::text[])"#
    )
    .into()
}

/// Whoever else changes the checkpoint, or what is parked under its lock, changes its place or its fence: so
/// when it was moved, nothing of what the same snapshot shows has changed since.
fn open(naming: &Naming<'_>, state_table: &str) -> Arc<str> {
    let (moved, asked) = (moved(naming, ""), asked(naming, state_table, 8));
    format!("with {moved} select exists (select from moved) as moved, {asked}").into()
}

/// What was written was planned by what an earlier snapshot showed. Nobody has changed it since, by the same
/// rule, and the versions of the states say so once more.
fn apply(naming: &Naming<'_>, written: &str, views: &[ViewStatements]) -> Arc<str> {
    const TAKEN: usize = 8;
    let Naming { projection, version, aggregate_type } = naming;
    let unless_parked = format!(
        "and not exists (select from parked
            where parked.projection = '{projection}' and parked.version = {version}
                and parked.aggregate_type = '{aggregate_type}'
                and parked.aggregate_id = any($8::text[]))"
    );
    let moved = moved(naming, &unless_parked);
    let (written, _) = renumbered(written, TAKEN);
    // That of the states, and those of the views.
    let part_count = 1 + views.iter().flat_map(ViewStatements::writing).count();
    let (if_moved, ids) = (only_if_moved(&written, part_count), TAKEN + 1);
    format!(
        "with {moved}, {if_moved}
        select case when not exists (select from moved) then false
            when ({WRITTEN}) = coalesce(cardinality(${ids}::text[]), 0) then true
            else 0 = 1 / ((select count(*) from moved) - 1) end"
    )
    .into()
}

/// Moves the checkpoint of a partition on, on a further condition.
fn moved(Naming { projection, version, .. }: &Naming<'_>, condition: &str) -> String {
    format!(
        r#"moved as (
            update checkpoint set position = $5::bigint, event_id = $6::uuid,
                committed_at = coalesce(
                    timestamptz 'epoch' + $7::bigint * interval '1 microsecond', committed_at)
            where projection = '{projection}' and version = {version} and partition = $1::integer
                and epoch = $2::integer and position = $3::bigint and fence = $4::bigint {condition}
            returning 1
        )"#
    )
}

/// What is known of the aggregates whose ids are in a parameter, looked up one by one as in [`states_written`].
fn asked(naming: &Naming<'_>, state_table: &str, ids: usize) -> String {
    let Naming { projection, version, aggregate_type } = naming;
    format!(
        r#"asked.id,
            exists (select from parked
                where parked.projection = '{projection}' and parked.version = {version}
                    and parked.aggregate_type = '{aggregate_type}'
                    and parked.aggregate_id = asked.id) as is_parked,
            state.version, state.epoch, state.position, state.created_position, state.state
        from unnest(${ids}::text[]) as asked (id)
        left join lateral (
            select held.version, held.epoch, held.position, held.created_position, held.state
            from "{state_table}" as held where held.aggregate_id = asked.id
            limit 1
        ) as state on true"#
    )
}

fn write_states(table: &str) -> Arc<str> {
    format!("with {} {WRITTEN}", states_written(table)).into()
}

/// How many states [`states_written`] wrote.
const WRITTEN: &str =
    "select (select count(*) from updated) + (select count(*) from inserted) as written";

/// How many parameters [`states_written`] takes.
const STATE_PARAMETER_COUNT: usize = 8;

/// Demands the previous version rather than a smaller one, which would hide a gap. The states are looked up one
/// by one; the last condition of the update always holds, and has the planner expect few. By a join it may read
/// the index through for ever, because of how few there were when it planned.
fn states_written(table: &str) -> String {
    format!(
        r#"given as (
            select given.* from unnest(
                $1::text[], $2::integer[], $3::bigint[], $4::bigint[], $5::integer[],
                $6::bigint[], $7::bigint[], $8::text[]
            ) as given (
                aggregate_id, partition, previous_version, version, epoch, position,
                created_position, state
            )
        ), updated as (
            update "{table}" as held
            set version = given.version, epoch = given.epoch, position = given.position,
                created_position = given.created_position, state = given.state
            from given cross join lateral (
                select known.ctid as place from "{table}" as known
                where known.aggregate_id = given.aggregate_id
                    and known.version = given.previous_version
                limit 1
            ) as found
            where held.ctid = found.place and held.version = given.previous_version
                and given.previous_version > 0 and given.version > given.previous_version
            returning 1
        ), inserted as (
            insert into "{table}"
                (aggregate_id, partition, version, epoch, position, created_position, state)
            select aggregate_id, partition, version, epoch, position, created_position, state
            from given where previous_version = 0
            on conflict (aggregate_id) do nothing
            returning 1
        )"#
    )
}

/// States and views, for one statement. What one part of it writes another does not see, so no two may write
/// the same row; they do not, since a batch changes a row once.
fn written(state_table: &str, views: &[ViewStatements]) -> String {
    let mut all = states_written(state_table);
    let mut taken = STATE_PARAMETER_COUNT;
    for (nth, statement) in views.iter().flat_map(ViewStatements::writing).enumerate() {
        let part;
        (part, taken) = renumbered(statement, taken);
        write!(all, ", part_{nth} as ({part})").expect("writing to a string cannot fail");
    }
    all
}

impl ViewStatements {
    /// Everything that writes the view, in the order in which the changes have the columns.
    fn writing(&self) -> Vec<&Arc<str>> {
        match self {
            Self::Row(RowStatements { delete, upsert, .. })
            | Self::Search(SearchStatements { delete, upsert, .. })
            | Self::List(ListStatements { delete, upsert, .. }) => vec![delete, upsert],
            Self::Rollup(RollupStatements { add, .. }) => vec![add],
        }
    }
}

/// The statement with its parameters after those that are taken, and how many are taken then.
fn renumbered(statement: &str, taken: usize) -> (String, usize) {
    let mut parts = statement.split('$');
    let before = parts.next().unwrap_or_default().to_owned();
    parts.fold((before, taken), |(text, last), part| {
        let end = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
        let (number, rest) = part.split_at(end);
        let number = taken + number.parse::<usize>().expect("a parameter has a number");
        (format!("{text}${number}{rest}"), last.max(number))
    })
}

/// The statement, each of whose parts writes what it is given in arrays, with nothing given unless the
/// checkpoint was moved. To join with that costs less than to ask it of each array.
fn only_if_moved(statement: &str, part_count: usize) -> String {
    const GIVEN: &str = " unnest(";
    let given_count = statement.matches(GIVEN).count();
    assert_eq!(
        given_count, part_count,
        "a part writes what it is given in another way: {statement}"
    );
    statement.replace(GIVEN, &format!(" moved,{GIVEN}"))
}

fn row_statements(naming: &Naming<'_>, table: &str) -> ViewStatements {
    ViewStatements::Row(RowStatements {
        delete: delete_rows(table),
        upsert: upsert_rows(table),
        read: read::row(naming, table).into(),
        read_many: read::rows(naming, table).into(),
    })
}

fn delete_rows(table: &str) -> Arc<str> {
    format!(
        r#"delete from "{table}" where aggregate_id = any(array(
            select id from unnest($1::text[]) as gone (id)
        ))"#
    )
    .into()
}

fn upsert_rows(table: &str) -> Arc<str> {
    format!(
        r#"insert into "{table}" (aggregate_id, version, epoch, position, data)
        select aggregate_id, version, epoch, position, data::json from unnest(
            $1::text[], $2::bigint[], $3::integer[], $4::bigint[], $5::text[]
        ) as given (aggregate_id, version, epoch, position, data)
        on conflict (aggregate_id) do update set version = excluded.version,
            epoch = excluded.epoch, position = excluded.position, data = excluded.data"#
    )
    .into()
}

fn list_statements(naming: &Naming<'_>, table: &str, state_table: &str) -> ViewStatements {
    // The items are looked up one by one. A join may read the index through instead, by a plan that was made
    // when there were few.
    let delete = format!(
        r#"delete from "{table}" where ctid = any(array(
            select found.place from unnest($1::text[], $2::bigint[], $3::text[])
                as gone (list_key, created_position, aggregate_id)
            cross join lateral (
                select held.ctid as place from "{table}" as held
                where held.list_key = gone.list_key
                    and held.created_position = gone.created_position
                    and held.aggregate_id = gone.aggregate_id
                limit 1
            ) as found
        ))"#
    );
    let upsert = format!(
        r#"insert into "{table}" (list_key, created_position, aggregate_id, data)
        select list_key, created_position, aggregate_id, data::json from unnest(
            $1::text[], $2::bigint[], $3::text[], $4::text[]
        ) as given (list_key, created_position, aggregate_id, data)
        on conflict (list_key, created_position, aggregate_id) do update set data = excluded.data"#
    );
    ViewStatements::List(ListStatements {
        delete: delete.into(),
        upsert: upsert.into(),
        read: read::list(naming, table, state_table).into(),
    })
}

fn rollup_statements(
    naming: &Naming<'_>,
    table: &str,
    rollup: &RollupDefinition,
) -> ViewStatements {
    let columns = rollup.columns();
    let names = listed(columns, |_, column| format!(", \"{}\"", column.name));
    let arrays = listed(columns, |at, _| format!(", ${}::bigint[]", at + 5));
    let combined = listed(columns, |_, Column { name, combine }| match combine {
        Combine::Max => format!(r#", "{name}" = greatest(held."{name}", excluded."{name}")"#),
        Combine::Sum => format!(
            r#", "{name}" = case when held."{name}" is null then excluded."{name}"
                else held."{name}" + coalesce(excluded."{name}", 0) end"#
        ),
    });
    let newer = "(excluded.epoch, excluded.position) > (held.epoch, held.position)";
    let add = format!(
        r#"insert into "{table}" as held (key, partition, epoch, position{names})
        select key, partition, epoch, position{names} from unnest(
            $1::text[], $2::integer[], $3::integer[], $4::bigint[]{arrays}
        ) as given (key, partition, epoch, position{names})
        on conflict (key, partition) do update set
            epoch = case when {newer} then excluded.epoch else held.epoch end,
            position = case when {newer} then excluded.position else held.position end{combined}"#
    );
    ViewStatements::Rollup(RollupStatements {
        add: add.into(),
        read: read::rollup(naming, table, columns).into(),
    })
}

fn listed<T>(items: &[T], text: impl Fn(usize, &T) -> String) -> String {
    items.iter().enumerate().fold(String::new(), |mut list, (at, item)| {
        write!(list, "{}", text(at, item)).expect("writing to a string cannot fail");
        list
    })
}
