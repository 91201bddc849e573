//! Whether two versions of a projection hold the same: what Postgres computes of each, and where they
//! differ.
//!
//! Every table is seen as lines, each with the key that it is known by in both versions, the partition of
//! its aggregate and what it says, which is shown as a JSON object. The hash of a table is the sum of the
//! hashes of its lines, so that neither the order of the lines nor the number of partitions matters, and parts
//! can be added up. JSON is written only of lines that differ: it would take longer than all the rest.

use std::sync::Arc;

use crate::rollup::{Column, Combine};
use crate::{ProjectionDefinition, ProjectionKind, ViewKind};

/// A row of [`ParityTable::checksum`]: partition, number of lines, and the sums of two hashes as decimal
/// digits.
pub type ChecksumColumns = (i32, i64, String, String);

/// A row of [`ParityTable::differences`]: the key, what the one says and what the other says; null when it
/// has no such line.
pub type DifferenceColumns = (String, Option<String>, Option<String>);

/// What the lines of a table are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParityOf {
    /// How far each aggregate has come. The same in all definitions of a projection.
    Versions,
    /// The states of aggregates, as their definition writes them.
    States,
    /// The rows of a view.
    Rows,
    /// The sums of a rollup, over all partitions.
    Sums,
}

/// How one version is compared with another.
#[derive(Debug, Clone)]
pub struct ParityStatements {
    /// `$1 bigint[]`: a position for each partition, from 0; `$2 bigint`: most ids. Ids of aggregates of
    /// which an event beyond that is applied.
    pub beyond: Arc<str>,
    /// `$1 bigint`: how many. Ids of aggregates that have a state, whichever come.
    pub sample: Arc<str>,
    /// What can be compared, [`ParityOf::Versions`] first.
    pub tables: Vec<ParityTable>,
}

/// One table of a version, or one side of it.
#[derive(Debug, Clone)]
pub struct ParityTable {
    /// `state`, or the view.
    pub name: String,
    /// What is compared.
    pub of: ParityOf,
    /// `$1 text[]`: ids of aggregates that are left out; `$2 text[]`: ids of those that are not, null for
    /// all; sums are of all in any case. Rows of [`ChecksumColumns`]. Rows of a view whose aggregate has no
    /// state are of partition -1, sums of partition 0.
    pub checksum: Arc<str>,
    /// `$1 bigint`: most ids. Ids of aggregates that have a row but no state.
    pub strays: Option<Arc<str>>,
    lines: Lines,
}

/// The lines of a table.
#[derive(Debug, Clone)]
struct Lines {
    /// Columns `partition`, `key`, and one for each field, `f0`, `f1` and so on.
    select: String,
    fields: Vec<Field>,
}

/// One thing that a line says.
#[derive(Debug, Clone)]
struct Field {
    name: String,
    value: String,
    /// It is the text of a JSON value.
    is_json: bool,
}

impl ParityStatements {
    /// Of a version's tables. Tables of custom projections are not compared: only who wrote them knows
    /// what in them follows from events.
    pub fn of(definition: &ProjectionDefinition) -> Self {
        let statements = definition.statements();
        let state = statements.tables().next().expect("every version has a table of states");
        let lines = |columns: &[&str]| state_lines(state, columns);
        let version = lines(&["version", "epoch", "position", "created_position"]);
        let mut tables = vec![
            ParityTable::new("state", ParityOf::Versions, version),
            ParityTable::new("state", ParityOf::States, lines(&["state"])),
        ];
        // The tables of the views follow the one of the states.
        for (view, table) in definition.views().iter().zip(statements.tables().skip(1)) {
            let (of, lines) = match (view.kind(), definition.kind()) {
                (ViewKind::Row | ViewKind::Search(_), _) => {
                    (ParityOf::Rows, row_lines(table, state))
                }
                (ViewKind::List, _) => (ParityOf::Rows, list_lines(table, state)),
                (ViewKind::Rollup, ProjectionKind::Rollup(rollup)) => {
                    (ParityOf::Sums, sum_lines(table, rollup.columns()))
                }
                (ViewKind::Rollup, ProjectionKind::Document(_) | ProjectionKind::Custom(_)) => {
                    continue;
                }
            };
            let strays = (of == ParityOf::Rows).then(|| strays(table, state));
            let table = ParityTable::new(view.name().as_str(), of, lines);
            tables.push(ParityTable { strays, ..table });
        }
        let sample =
            format!(r#"select aggregate_id from "{state}" order by random() limit $1"#).into();
        Self { beyond: beyond(state), sample, tables }
    }
}

impl ParityTable {
    fn new(name: &str, of: ParityOf, lines: Lines) -> Self {
        // Of texts, since hashes of numbers pass over signs. The hash of a record is a sum over its columns:
        // seeded by the line's key, since without that the sum of all lines would not tell which key has
        // which value.
        let fields: Vec<String> =
            (0..lines.fields.len()).map(|nth| format!("f{nth}::text")).collect();
        let fields = fields.join(", ");
        let hash = |seed: u8| {
            let seed = format!("hashtextextended(key, {seed})");
            format!("coalesce(sum(hash_record_extended(row(key, {fields}), {seed})), 0)::text")
        };
        let checksum = format!(
            "select partition, count(*), {}, {} from ({}) as lines
            group by partition order by partition",
            hash(0),
            hash(1),
            lines.select
        );
        Self { name: name.to_owned(), of, checksum: checksum.into(), strays: None, lines }
    }

    /// Where the lines of the same table of another version differ. `$1` and `$2` as of
    /// [`Self::checksum`]; `$3 bigint`: most rows, which are [`DifferenceColumns`].
    pub fn differences(&self, other: &Self) -> Arc<str> {
        format!(
            "select coalesce(one.key, other.key), one.says, other.says
            from ({}) as one full join ({}) as other on one.key = other.key
            where one.says is distinct from other.says
            order by 1 limit $3",
            self.lines.shown(),
            other.lines.shown()
        )
        .into()
    }
}

impl Lines {
    /// `select` has a gap for the fields.
    fn new(fields: Vec<Field>, select: impl FnOnce(&str) -> String) -> Self {
        let listed =
            super::listed(&fields, |nth, Field { value, .. }| format!(", {value} as f{nth}"));
        Self { select: select(&listed), fields }
    }

    /// Columns `key` and `says`.
    fn shown(&self) -> String {
        let says: Vec<String> = (0..)
            .zip(&self.fields)
            .map(|(nth, Field { name, is_json, .. })| {
                format!("'{name}', f{nth}{}", if *is_json { "::json" } else { "" })
            })
            .collect();
        let says = says.join(", ");
        let select = &self.select;
        format!("select key, json_build_object({says})::text as says from ({select}) as lines")
    }
}

impl Field {
    fn new(name: &str, value: impl Into<String>) -> Self {
        Self { name: name.to_owned(), value: value.into(), is_json: false }
    }

    fn data() -> Self {
        Self { is_json: true, ..Self::new("data", "line.data::text") }
    }
}

fn beyond(state: &str) -> Arc<str> {
    format!(
        r#"select aggregate_id from "{state}"
        where position > ($1::bigint[])[partition + 1] limit $2"#
    )
    .into()
}

fn strays(table: &str, state: &str) -> Arc<str> {
    format!(
        r#"select distinct line.aggregate_id from "{table}" as line
        where not exists (
            select from "{state}" as state where state.aggregate_id = line.aggregate_id)
        limit $1"#
    )
    .into()
}

/// Hashed once, however many ids there are.
fn is_compared(id: &str) -> String {
    format!(
        "not exists (select from unnest($1::text[]) as gone (id) where gone.id = {id})
        and ($2::text[] is null or {id} = any($2::text[]))"
    )
}

fn state_lines(table: &str, columns: &[&str]) -> Lines {
    let is_compared = is_compared("aggregate_id");
    let fields = columns.iter().map(|column| Field::new(column, *column)).collect();
    Lines::new(fields, |fields| {
        format!(
            r#"select partition, aggregate_id as key{fields} from "{table}" where {is_compared}"#
        )
    })
}

fn row_lines(table: &str, state: &str) -> Lines {
    let is_compared = is_compared("line.aggregate_id");
    let column = |name: &str| Field::new(name, format!("line.{name}"));
    let fields = vec![column("version"), column("epoch"), column("position"), Field::data()];
    Lines::new(fields, |fields| {
        format!(
            r#"select coalesce(state.partition, -1) as partition, line.aggregate_id as key{fields}
            from "{table}" as line left join "{state}" as state using (aggregate_id)
            where {is_compared}"#
        )
    })
}

fn list_lines(table: &str, state: &str) -> Lines {
    let is_compared = is_compared("line.aggregate_id");
    Lines::new(vec![Field::data()], |fields| {
        format!(
            r#"select coalesce(state.partition, -1) as partition,
                json_build_array(line.list_key, line.created_position, line.aggregate_id)::text
                    as key{fields}
            from "{table}" as line left join "{state}" as state using (aggregate_id)
            where {is_compared}"#
        )
    })
}

/// What a reader would see, who adds the parts up as well.
fn sum_lines(table: &str, columns: &[Column]) -> Lines {
    let mut fields =
        vec![Field::new("epoch", "max(epoch)"), Field::new("position", "max(position)")];
    fields.extend(columns.iter().map(|Column { name, combine }| match combine {
        Combine::Sum => Field::new(name, format!(r#"sum("{name}")"#)),
        Combine::Max => Field::new(name, format!(r#"max("{name}")"#)),
    }));
    Lines::new(fields, |fields| {
        format!(
            r#"select 0 as partition, key{fields}
            from "{table}" where cardinality($1::text[]) >= 0 and ($2::text[] is null or true)
            group by key"#
        )
    })
}
