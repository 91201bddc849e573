//! Reads: the rows, and in the same snapshot everything that says how current they are.

use consistency::{
    AggregateId, Epoch, LogPosition, Name, Parked, PartitionCount, Position, Version,
};

use super::{Naming, listed};
use crate::ColumnError;
use crate::rollup::{Column, Combine};

/// The one row of a row view's read: active version, checkpoint's epoch and position, position the
/// aggregate is parked at, and of the row version, epoch, position and data.
pub type RowColumns = (
    Option<i32>,
    Option<i32>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i32>,
    Option<i64>,
    Option<String>,
);

/// A row of the read of many: which of those asked for, from 1, then as in [`RowColumns`].
pub type GatheredColumns = (
    i64,
    Option<i32>,
    Option<i32>,
    Option<i64>,
    Option<i64>,
    Option<i64>,
    Option<i32>,
    Option<i64>,
    Option<String>,
);

/// The one row of a list view's read: active version; the checkpoints' partitions, epochs and
/// positions; types, ids and positions of parked aggregates, and whether these are all; of the items
/// aggregate ids, versions, epochs, positions, created positions and data.
pub type ListColumns = (
    Option<i32>,
    Vec<i32>,
    Vec<i32>,
    Vec<i64>,
    Vec<String>,
    Vec<String>,
    Vec<i64>,
    bool,
    Vec<String>,
    Vec<i64>,
    Vec<i32>,
    Vec<i64>,
    Vec<i64>,
    Vec<String>,
);

/// The one row of a rollup's read: the first eight as in [`ListColumns`], then of the row epoch and
/// position in one array, and its values.
pub type RollupColumns = (
    Option<i32>,
    Vec<i32>,
    Vec<i32>,
    Vec<i64>,
    Vec<String>,
    Vec<String>,
    Vec<i64>,
    bool,
    Option<Vec<i64>>,
    Option<Vec<Option<i64>>>,
);

/// What a row view holds for one aggregate, and how current that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowAnswer {
    /// The version of the projection that is to be read. When it is another than the one that was
    /// asked, ask that one. `None` before the first version is active.
    pub active_version: Option<u32>,
    /// The checkpoint of the aggregate's partition; `None` is not current.
    pub checkpoint: Option<LogPosition>,
    /// Where the aggregate's first event stands that is not applied. It may have no row as well.
    pub parked: Option<Position>,
    /// The row.
    pub row: Option<StoredRow>,
}

/// A row of a row view.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredRow {
    /// The aggregate's version.
    pub version: Version,
    /// The aggregate's newest event.
    pub at: LogPosition,
    /// JSON.
    pub data: String,
}

/// How current an answer is that any event may have made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// As in [`RowAnswer`].
    pub active_version: Option<u32>,
    /// Checkpoints by partition; a missing one is not current.
    pub checkpoints: Vec<Option<LogPosition>>,
    /// Parked aggregates of the projection, those parked at the smallest positions first.
    pub parked: Vec<Parked>,
    /// Whether `parked` holds them all. When it does not, any aggregate may be parked.
    pub parked_complete: bool,
}

/// A page of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListAnswer {
    /// How current it is.
    pub snapshot: Snapshot,
    /// In the order of created position and aggregate id.
    pub items: Vec<ListItem>,
}

/// An item of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListItem {
    /// The aggregate's id.
    pub key: String,
    /// The aggregate's version.
    pub version: Version,
    /// The aggregate's newest event.
    pub at: LogPosition,
    /// The aggregate's first event. With `key` the place of the item in its list.
    pub created: Position,
    /// JSON.
    pub data: String,
}

/// A row of a rollup, if there is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollupAnswer {
    /// How current it is.
    pub snapshot: Snapshot,
    /// The row.
    pub row: Option<RollupRow>,
}

/// A row of a rollup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RollupRow {
    /// The newest event in it.
    pub at: LogPosition,
    /// One for each column of the definition; `None` when nothing was ever added to it.
    pub values: Vec<Option<i64>>,
}

impl RowAnswer {
    /// Checks what the statement returned.
    pub fn from_columns(columns: RowColumns) -> Result<Self, ColumnError> {
        let (active, checkpoint_epoch, checkpoint_position, parked, version, epoch, position, data) =
            columns;
        let row = match (version, epoch, position, data) {
            (Some(version), Some(epoch), Some(position), Some(data)) => Some(StoredRow {
                version: ColumnError::version(version)?,
                at: log_position("epoch", epoch, "position", position)?,
                data,
            }),
            (_, _, _, _) => None,
        };
        Ok(Self {
            active_version: active_version(active)?,
            checkpoint: match (checkpoint_epoch, checkpoint_position) {
                (Some(epoch), Some(position)) => {
                    Some(log_position("checkpoint_epoch", epoch, "checkpoint_position", position)?)
                }
                (_, _) => None,
            },
            parked: parked.map(|at| self::position("parked_position", at)).transpose()?,
            row,
        })
    }
}

impl RowAnswer {
    /// The same of one among many, and which it is, from 0.
    pub fn from_gathered(columns: GatheredColumns) -> Result<(usize, Self), ColumnError> {
        let (place, a, b, c, d, e, f, g, h) = columns;
        let at = usize::try_from(place).ok().and_then(|place| place.checked_sub(1));
        let at = at.ok_or_else(|| wrong("place", place))?;
        Ok((at, Self::from_columns((a, b, c, d, e, f, g, h))?))
    }
}

type SnapshotColumns =
    (Option<i32>, Vec<i32>, Vec<i32>, Vec<i64>, Vec<String>, Vec<String>, Vec<i64>, bool);

impl Snapshot {
    fn from_columns(
        columns: SnapshotColumns,
        partition_count: PartitionCount,
    ) -> Result<Self, ColumnError> {
        let (active, partitions, epochs, positions, kinds, ids, parked_at, parked_complete) =
            columns;
        let mut checkpoints = vec![None; usize::from(partition_count.get())];
        for ((partition, epoch), at) in partitions.into_iter().zip(epochs).zip(positions) {
            let slot = usize::try_from(partition).ok().and_then(|at| checkpoints.get_mut(at));
            *slot.ok_or_else(|| wrong("checkpoint_partitions", partition))? =
                Some(log_position("checkpoint_epochs", epoch, "checkpoint_positions", at)?);
        }
        let parked = kinds.into_iter().zip(ids).zip(parked_at).map(|((kind, id), at)| {
            let kind = Name::new(kind).map_err(|error| wrong("parked_types", error))?;
            let aggregate =
                AggregateId::new(kind, id).map_err(|error| wrong("parked_ids", error))?;
            Ok(Parked { aggregate: aggregate.key(), position: position("parked_positions", at)? })
        });
        Ok(Self {
            active_version: active_version(active)?,
            checkpoints,
            parked: parked.collect::<Result<_, _>>()?,
            parked_complete,
        })
    }

    /// The smallest stored checkpoint; `None` when one is missing.
    pub fn smallest_checkpoint(&self) -> Option<LogPosition> {
        self.checkpoints.iter().copied().min().flatten()
    }

    /// The largest stored checkpoint, which is what an answer of this snapshot shows.
    pub fn largest_checkpoint(&self) -> Option<LogPosition> {
        self.checkpoints.iter().copied().max().flatten()
    }
}

impl ListAnswer {
    /// Checks what the statement returned.
    pub fn from_columns(
        columns: ListColumns,
        partition_count: PartitionCount,
    ) -> Result<Self, ColumnError> {
        let (a, b, c, d, e, f, g, h, keys, versions, epochs, positions, created, data) = columns;
        let snapshot = Snapshot::from_columns((a, b, c, d, e, f, g, h), partition_count)?;
        let stood = epochs.into_iter().zip(positions).zip(created);
        let items = keys.into_iter().zip(versions).zip(stood).zip(data);
        let items = items.map(|(((key, version), ((epoch, at), created)), data)| {
            Ok(ListItem {
                key,
                version: ColumnError::version(version)?,
                at: log_position("item_epochs", epoch, "item_positions", at)?,
                created: position("item_created_positions", created)?,
                data,
            })
        });
        Ok(Self { snapshot, items: items.collect::<Result<_, _>>()? })
    }
}

impl RollupAnswer {
    /// Checks what the statement returned.
    pub fn from_columns(
        columns: RollupColumns,
        partition_count: PartitionCount,
    ) -> Result<Self, ColumnError> {
        let (a, b, c, d, e, f, g, h, newest, values) = columns;
        let snapshot = Snapshot::from_columns((a, b, c, d, e, f, g, h), partition_count)?;
        let row = match (newest.as_deref(), values) {
            (Some(&[epoch, at]), Some(values)) => {
                let epoch = i32::try_from(epoch).map_err(|_| wrong("newest", epoch))?;
                Some(RollupRow { at: log_position("newest", epoch, "newest", at)?, values })
            }
            (_, _) => None,
        };
        Ok(Self { snapshot, row })
    }
}

fn wrong(column: &'static str, value: impl ToString) -> ColumnError {
    ColumnError { column, value: value.to_string() }
}

fn active_version(version: Option<i32>) -> Result<Option<u32>, ColumnError> {
    let checked = |version| u32::try_from(version).map_err(|_| wrong("active_version", version));
    version.map(checked).transpose()
}

fn position(column: &'static str, value: i64) -> Result<Position, ColumnError> {
    Position::from_i64(value).ok_or_else(|| wrong(column, value))
}

fn log_position(
    epoch_column: &'static str,
    epoch: i32,
    position_column: &'static str,
    at: i64,
) -> Result<LogPosition, ColumnError> {
    let epoch = Epoch::from_i32(epoch).ok_or_else(|| wrong(epoch_column, epoch))?;
    Ok(LogPosition::new(epoch, position(position_column, at)?))
}

pub(super) fn row(naming: &Naming<'_>, table: &str) -> String {
    row_of(naming, table, "", "(values (1)) as always", "$1::integer", "$2::text")
}

pub(super) fn rows(naming: &Naming<'_>, table: &str) -> String {
    // Arrays that the planner looked into would be planned for again and again, which takes longer than
    // to answer.
    let many = "unnest((select $1::integer[]), (select $2::text[])) with ordinality
            as asked(partition, id, place)";
    row_of(naming, table, "asked.place,", many, "asked.partition", "asked.id")
}

fn row_of(
    naming: &Naming<'_>,
    table: &str,
    place: &str,
    asked: &str,
    partition: &str,
    id: &str,
) -> String {
    let Naming { projection, version, aggregate_type } = naming;
    format!(
        r#"select {place}
            (select active.version from projection_version as active
                where active.projection = '{projection}' and active.active) as active_version,
            checkpoint.epoch as checkpoint_epoch,
            checkpoint.position as checkpoint_position,
            (select parked.position from parked
                where parked.projection = '{projection}' and parked.version = {version}
                    and parked.aggregate_type = '{aggregate_type}'
                    and parked.aggregate_id = {id}) as parked_position,
            held.version, held.epoch, held.position, held.data::text as data
        from {asked}
        left join lateral (
            select checkpoint.epoch, checkpoint.position from checkpoint
            where checkpoint.projection = '{projection}' and checkpoint.version = {version}
                and checkpoint.partition = {partition}
            limit 1
        ) as checkpoint on true
        left join lateral (
            select held.version, held.epoch, held.position, held.data from "{table}" as held
            where held.aggregate_id = {id}
            limit 1
        ) as held on true"#
    )
}

/// The page is cut before versions are looked up, so that a long list costs no more than a short one.
pub(super) fn list(naming: &Naming<'_>, table: &str, state_table: &str) -> String {
    let page = format!(
        r#"select held.created_position, held.aggregate_id, held.data
                from "{table}" as held
                where held.list_key = $1::text
                    and (held.created_position, held.aggregate_id) > ($2::bigint, $3::text)
                order by held.created_position, held.aggregate_id
                limit $4::bigint"#
    );
    self::page(naming, &page, state_table, "$5")
}

/// A row's place is its aggregate's, which the state knows.
pub(super) fn search(naming: &Naming<'_>, table: &str, state_table: &str) -> String {
    let page = format!(
        r#"select placed.created_position, held.aggregate_id, held.data
                from "{table}" as held
                join "{state_table}" as placed on placed.aggregate_id = held.aggregate_id
                where ($1::text = '' or held.words @@ websearch_to_tsquery('simple', $1::text))
                    and ($2::bigint is null or held.number >= $2::bigint)
                    and ($3::bigint is null or held.number <= $3::bigint)
                    and ($4::text is null or held.label = $4::text)
                    and (placed.created_position, held.aggregate_id) > ($5::bigint, $6::text)
                order by placed.created_position, held.aggregate_id
                limit $7::bigint"#
    );
    self::page(naming, &page, state_table, "$8")
}

/// Items of `page`, a query of created position, aggregate id and data. Their versions are looked up one by one:
/// a join may read all states, by a plan that was made when there were few.
fn page(naming: &Naming<'_>, page: &str, state_table: &str, parked_limit: &str) -> String {
    let (snapshot, sources) = snapshot(naming, parked_limit);
    let page_order = "order by page.created_position, page.aggregate_id";
    let gathered = |column: &str, kind: &str| {
        format!("coalesce(array_agg({column} {page_order}), '{{}}')::{kind}[]")
    };
    let ids = gathered("page.aggregate_id", "text");
    let versions = gathered("state.version", "bigint");
    let epochs = gathered("state.epoch", "integer");
    let positions = gathered("state.position", "bigint");
    let created = gathered("page.created_position", "bigint");
    let data = gathered("page.data::text", "text");
    format!(
        r#"select {snapshot}, items.*
        from {sources}, (
            select {ids} as item_ids, {versions} as item_versions, {epochs} as item_epochs,
                {positions} as item_positions, {created} as item_created_positions,
                {data} as item_data
            from (
                {page}
            ) as page
            cross join lateral (
                select held.version, held.epoch, held.position from "{state_table}" as held
                where held.aggregate_id = page.aggregate_id
                limit 1
            ) as state
        ) as items"#
    )
}

pub(super) fn rollup(naming: &Naming<'_>, table: &str, columns: &[Column]) -> String {
    let (snapshot, sources) = snapshot(naming, "$2");
    let values = listed(columns, |at, Column { name, combine }| {
        let comma = if at == 0 { "" } else { ", " };
        let function = match combine {
            Combine::Sum => "sum",
            Combine::Max => "max",
        };
        format!(r#"{comma}{function}(held."{name}")::bigint"#)
    });
    format!(
        r#"select {snapshot}, parts.*
        from {sources}, (
            select max(array[held.epoch, held.position]::bigint[]) as newest,
                case when count(*) > 0 then array[{values}] end as values
            from "{table}" as held where held.key = $1::text
        ) as parts"#
    )
}

/// Columns and sources of [`Snapshot`]; `limit` is the parameter that bounds the parked aggregates.
fn snapshot(naming: &Naming<'_>, limit: &str) -> (String, String) {
    let Naming { projection, version, .. } = naming;
    let columns = format!(
        r#"(select active.version from projection_version as active
            where active.projection = '{projection}' and active.active) as active_version,
        checkpoints.*, parked_first.*"#
    );
    let sources = format!(
        r#"(
            select coalesce(array_agg(partition), '{{}}') as checkpoint_partitions,
                coalesce(array_agg(epoch), '{{}}') as checkpoint_epochs,
                coalesce(array_agg(position), '{{}}') as checkpoint_positions
            from checkpoint where projection = '{projection}' and version = {version}
        ) as checkpoints, (
            select coalesce(array_agg(aggregate_type order by position), '{{}}') as parked_types,
                coalesce(array_agg(aggregate_id order by position), '{{}}') as parked_ids,
                coalesce(array_agg(position order by position), '{{}}') as parked_positions,
                count(*) <= {limit}::bigint as parked_complete
            from (
                select aggregate_type, aggregate_id, position from parked
                where projection = '{projection}' and version = {version}
                order by position limit {limit}::bigint + 1
            ) as bounded
        ) as parked_first"#
    );
    (columns, sources)
}
