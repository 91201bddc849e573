//! Whether two versions of a projection hold the same: what Postgres computes of each, and where they
//! differ.
//!
//! Every table is seen as lines, each with the key that it is known by in both versions, the partition of
//! its aggregate and what it says. The hash of a table is the sum of the hashes of its lines, so that neither the order of the lines nor
//! the number of partitions matters, and parts can be added up.

use std::sync::Arc;

use super::Statements;
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
    /// `$1 text[]`: ids of aggregates that are left out, of sums none. Rows of [`ChecksumColumns`]. Rows of
    /// a view whose aggregate has no state are of partition -1, sums of partition 0.
    pub checksum: Arc<str>,
    lines: String,
}

impl ParityStatements {
    /// Of a version's tables. Tables of custom projections are not compared: only who wrote them knows
    /// what in them follows from events.
    pub fn of(definition: &ProjectionDefinition) -> Self {
        let statements = definition.statements();
        let state = statements.tables().next().expect("every version has a table of states");
        let says = "row(version, epoch, position, created_position)::text";
        let mut tables = vec![
            ParityTable::new("state", ParityOf::Versions, state_lines(state, says)),
            ParityTable::new("state", ParityOf::States, state_lines(state, "row(state)::text")),
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
            tables.push(ParityTable::new(view.name().as_str(), of, lines));
        }
        Self { beyond: beyond(statements), tables }
    }
}

impl ParityTable {
    fn new(name: &str, of: ParityOf, lines: String) -> Self {
        let hash = |seed: u8| {
            format!("coalesce(sum(hashtextextended(row(key, says)::text, {seed})), 0)::text")
        };
        let checksum = format!(
            "select partition, count(*), {}, {} from ({lines}) as lines
            group by partition order by partition",
            hash(0),
            hash(1)
        );
        Self { name: name.to_owned(), of, checksum: checksum.into(), lines }
    }

    /// Where the lines of the same table of another version differ. `$1 text[]` as of [`Self::checksum`];
    /// `$2 bigint`: most rows, which are [`DifferenceColumns`].
    pub fn differences(&self, other: &Self) -> Arc<str> {
        format!(
            "select coalesce(one.key, other.key), one.says, other.says
            from ({}) as one full join ({}) as other on one.key = other.key
            where one.says is distinct from other.says
            order by 1 limit $2",
            self.lines, other.lines
        )
        .into()
    }
}

fn beyond(statements: &Statements) -> Arc<str> {
    let state = statements.tables().next().unwrap_or_default();
    format!(
        r#"select aggregate_id from "{state}"
        where position > ($1::bigint[])[partition + 1] limit $2"#
    )
    .into()
}

/// Hashed once, however many ids there are.
fn is_compared(id: &str) -> String {
    format!("not exists (select from unnest($1::text[]) as gone (id) where gone.id = {id})")
}

fn state_lines(table: &str, says: &str) -> String {
    let is_compared = is_compared("aggregate_id");
    format!(
        r#"select partition, aggregate_id as key, {says} as says from "{table}" where {is_compared}"#
    )
}

fn row_lines(table: &str, state: &str) -> String {
    let is_compared = is_compared("line.aggregate_id");
    format!(
        r#"select coalesce(state.partition, -1) as partition, line.aggregate_id as key,
            row(line.version, line.epoch, line.position, line.data::text)::text as says
        from "{table}" as line left join "{state}" as state using (aggregate_id)
        where {is_compared}"#
    )
}

fn list_lines(table: &str, state: &str) -> String {
    let is_compared = is_compared("line.aggregate_id");
    format!(
        r#"select coalesce(state.partition, -1) as partition,
            row(line.list_key, line.created_position, line.aggregate_id)::text as key,
            line.data::text as says
        from "{table}" as line left join "{state}" as state using (aggregate_id)
        where {is_compared}"#
    )
}

/// What a reader would see, who adds the parts up as well.
fn sum_lines(table: &str, columns: &[Column]) -> String {
    let values = super::listed(columns, |_, Column { name, combine }| match combine {
        Combine::Sum => format!(r#", sum("{name}")"#),
        Combine::Max => format!(r#", max("{name}")"#),
    });
    format!(
        r#"select 0 as partition, key, row(max(epoch), max(position){values})::text as says
        from "{table}" where cardinality($1::text[]) >= 0 group by key"#
    )
}
