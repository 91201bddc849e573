//! Whether two versions of a projection hold the same.
//!
//! Both are in one database, which computes a checksum of each table and, where two differ, says where.
//! Two versions that are applied by themselves are hardly ever at the same place: aggregates of which the
//! one has applied an event that the other has not reached are left out, and so are parked ones. Sums
//! cannot leave anybody out, so they are compared when the same events are in both.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use projection::ProjectionDefinition;
use projection::sql::{
    ChecksumColumns, DifferenceColumns, ParityOf, ParityStatements, ParityTable,
};
use serde::Serialize;
use serde_json::Value;
use sqlx::{AssertSqlSafe, PgConnection};

use crate::checkpoint::{self, CheckpointError, Held};
use crate::start::key_of;

/// Most aggregates that are left out; beyond that the versions are too far apart to be compared.
const LEFT_OUT_COUNT_MAX: i64 = 100_000;
/// Most differences of a table that are named.
const DIFFERENCE_COUNT_MAX: i64 = 20;

/// Why two versions cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum ParityError {
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// Checkpoints.
    #[error("the checkpoints cannot be read")]
    Checkpoint(#[from] CheckpointError),
    /// One of them has checkpoints missing.
    #[error("{0} has no checkpoints")]
    NoCheckpoint(String),
    /// The database computed what is no checksum.
    #[error("a checksum makes no sense")]
    Senseless,
    /// One of them is so far behind that there is little left to compare.
    #[error(
        "the versions differ in more than {LEFT_OUT_COUNT_MAX} aggregates that only one has reached"
    )]
    TooFarApart,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// How far each aggregate has come: for versions of different definitions, whose rows are not the same.
    Versions,
    /// That, and states, rows and sums: for two versions of one definition.
    Rows,
}

/// A checksum of lines in any order.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Digest {
    line_count: i64,
    sums: [i128; 2],
}

impl Digest {
    /// How many lines.
    pub fn line_count(&self) -> i64 {
        self.line_count
    }

    /// The checksum of the lines of both.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        let sum = |at: usize| self.sums[at].wrapping_add(other.sums[at]);
        Self { line_count: self.line_count + other.line_count, sums: [sum(0), sum(1)] }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The low 64 bits of each say as much as a hash can.
        let [one, other] = self.sums.map(|sum| sum as u64);
        write!(f, "{}:{one:016x}{other:016x}", self.line_count)
    }
}

/// The checksum of one table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableDigest {
    /// `state`, or the view.
    pub name: String,
    /// What of it.
    pub of: ParityOf,
    /// By partition. Of a rollup there is one, of the sums that a reader sees; of rows whose aggregate has no
    /// state it is -1.
    pub partitions: BTreeMap<i32, Digest>,
}

impl TableDigest {
    /// Over all partitions, whose number may differ from that of another version.
    pub fn whole(&self) -> Digest {
        self.partitions.values().copied().fold(Digest::default(), Digest::with)
    }
}

/// What two versions do not have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// `state`, or the view.
    pub table: String,
    /// The aggregate, the place in a list (its key, created position and aggregate), or the key of a sum.
    pub key: String,
    /// What the first version says, a JSON object; `None` when it has nothing there.
    pub one: Option<String>,
    /// What the second says.
    pub other: Option<String>,
}

/// What two versions say differently of one thing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Field {
    /// Its path, the names of its objects joined by dots; empty when one of them has nothing there at all.
    pub path: String,
    /// What the first says, as JSON; `nothing` when it does not say it.
    pub one: String,
    /// What the second says.
    pub other: String,
}

impl Difference {
    /// What exactly differs.
    pub fn fields(&self) -> Vec<Field> {
        let value = |says: &Option<String>| -> Option<Value> {
            says.as_ref().map(|says| serde_json::from_str(says).unwrap_or(Value::Null))
        };
        let mut fields = Vec::new();
        diverge(String::new(), value(&self.one), value(&self.other), &mut fields);
        fields
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {}", self.key, self.table)?;
        for Field { path, one, other } in self.fields() {
            let colon = if path.is_empty() { "" } else { ": " };
            write!(f, ", {path}{colon}{one}, but {other}")?;
        }
        Ok(())
    }
}

/// Goes down into objects, and into the JSON text of a state, as long as both have one.
fn diverge(path: String, one: Option<Value>, other: Option<Value>, fields: &mut Vec<Field>) {
    match (one, other) {
        (one, other) if one == other => {}
        (Some(Value::Object(one)), Some(Value::Object(mut other))) => {
            let below = |name: &str| match path.is_empty() {
                true => name.to_owned(),
                false => format!("{path}.{name}"),
            };
            for (name, value) in one {
                let twin = other.remove(&name);
                diverge(below(&name), Some(value), twin, fields);
            }
            for (name, value) in other {
                diverge(below(&name), None, Some(value), fields);
            }
        }
        (Some(Value::String(one)), Some(Value::String(other))) if path == "state" => {
            let parsed = |text: &str| serde_json::from_str::<Value>(text).ok();
            match (parsed(&one), parsed(&other)) {
                (Some(one), Some(other)) if one != other => {
                    diverge(path, Some(one), Some(other), fields);
                }
                (_, _) => fields.push(Field { path, one, other }),
            }
        }
        (one, other) => {
            let said = |value: Option<Value>| value.map_or("nothing".to_owned(), |v| v.to_string());
            fields.push(Field { path, one: said(one), other: said(other) });
        }
    }
}

/// What came of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Parity {
    /// Where they differ; of each table the first few.
    pub differences: Vec<Difference>,
    /// Aggregates that were compared.
    pub compared_count: i64,
    /// Aggregates that only one has reached, or that are parked.
    pub left_out_count: usize,
    /// Views that could not be compared, since not the same events are in them.
    pub not_compared: Vec<String>,
}

impl Parity {
    /// Whether everything that could be compared is the same.
    pub fn is_equal(&self) -> bool {
        self.differences.is_empty()
    }
}

/// The checksums of everything that a version holds, in the snapshot of the transaction, or each table in its
/// own without one. Comparable with those of the same definition at the same place, in any database of the same
/// release.
pub async fn checksums(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
) -> Result<Vec<TableDigest>, ParityError> {
    let mut digests = Vec::new();
    for table in &ParityStatements::of(definition).tables {
        digests.push(checksum(connection, table, &Whose::everybody()).await?);
    }
    Ok(digests)
}

/// Compares two versions. Nobody may write either meanwhile: the caller holds the locks of all their
/// checkpoints, or one snapshot.
pub async fn compare(
    connection: &mut PgConnection,
    one: &ProjectionDefinition,
    other: &ProjectionDefinition,
    scope: Scope,
) -> Result<Parity, ParityError> {
    let statements = [ParityStatements::of(one), ParityStatements::of(other)];
    let left_out = left_out(connection, [one, other], &statements).await?;
    let whose = Whose { left_out, only: None };
    compare_tables(connection, &statements, &whose, scope).await
}

/// Which aggregates are compared.
#[derive(Debug, Clone, Default)]
pub(crate) struct Whose {
    /// Not these.
    pub(crate) left_out: Vec<String>,
    /// Of these only; of all when `None`.
    pub(crate) only: Option<Vec<String>>,
}

impl Whose {
    fn everybody() -> Self {
        Self::default()
    }
}

/// Compares the tables of two versions.
pub(crate) async fn compare_tables(
    connection: &mut PgConnection,
    [one, other]: &[ParityStatements; 2],
    whose: &Whose,
    scope: Scope,
) -> Result<Parity, ParityError> {
    let mut parity = Parity { left_out_count: whose.left_out.len(), ..Parity::default() };
    // Whether both hold the same events of everybody, which sums are of. Nobody else asks.
    let has_sums = one.tables.iter().any(|table| table.of == ParityOf::Sums);
    let mut same_events = false;
    for table in &one.tables {
        let is_twin = |twin: &&ParityTable| twin.name == table.name && twin.of == table.of;
        let Some(twin) = other.tables.iter().find(is_twin) else {
            if scope == Scope::Rows {
                parity.not_compared.push(table.name.clone());
            }
            continue;
        };
        let pair = [table, twin];
        match (table.of, scope) {
            (ParityOf::Versions, _) | (ParityOf::States | ParityOf::Rows, Scope::Rows) => {}
            (ParityOf::Sums, Scope::Rows) if same_events => {}
            (ParityOf::Sums, Scope::Rows) => {
                parity.not_compared.push(table.name.clone());
                continue;
            }
            (ParityOf::States | ParityOf::Rows | ParityOf::Sums, Scope::Versions) => continue,
        }
        let [one, other] = digests(connection, pair, whose).await?;
        let is_same = one == other;
        if !is_same {
            parity.differences.extend(differences(connection, pair, whose).await?);
        }
        if table.of == ParityOf::Versions {
            parity.compared_count = one.line_count();
            same_events = match whose {
                Whose { only: Some(_), .. } => false,
                Whose { .. } if !has_sums || scope == Scope::Versions => false,
                Whose { left_out, only: None } if left_out.is_empty() => is_same,
                Whose { only: None, .. } => {
                    let [one, other] = digests(connection, pair, &Whose::everybody()).await?;
                    one == other
                }
            };
        }
    }
    Ok(parity)
}

async fn digests(
    connection: &mut PgConnection,
    [one, other]: [&ParityTable; 2],
    whose: &Whose,
) -> Result<[Digest; 2], ParityError> {
    let one = checksum(connection, one, whose).await?.whole();
    Ok([one, checksum(connection, other, whose).await?.whole()])
}

async fn checksum(
    connection: &mut PgConnection,
    table: &ParityTable,
    whose: &Whose,
) -> Result<TableDigest, ParityError> {
    let rows: Vec<ChecksumColumns> = sqlx::query_as(AssertSqlSafe(table.checksum.clone()))
        .bind(&whose.left_out)
        .bind(&whose.only)
        .fetch_all(connection)
        .await?;
    let digests = rows.into_iter().map(|(partition, line_count, one, other)| {
        let sums = [one.parse().ok()?, other.parse().ok()?];
        Some((partition, Digest { line_count, sums }))
    });
    let partitions = digests.collect::<Option<_>>().ok_or(ParityError::Senseless)?;
    Ok(TableDigest { name: table.name.clone(), of: table.of, partitions })
}

async fn differences(
    connection: &mut PgConnection,
    [one, other]: [&ParityTable; 2],
    whose: &Whose,
) -> Result<Vec<Difference>, ParityError> {
    let rows: Vec<DifferenceColumns> = sqlx::query_as(AssertSqlSafe(one.differences(other)))
        .bind(&whose.left_out)
        .bind(&whose.only)
        .bind(DIFFERENCE_COUNT_MAX)
        .fetch_all(connection)
        .await?;
    let table = &one.name;
    let named = |(key, one, other)| Difference { table: table.clone(), key, one, other };
    Ok(rows.into_iter().map(named).collect())
}

/// Aggregates that cannot be the same: parked, or with events that only one version has reached.
async fn left_out(
    connection: &mut PgConnection,
    definitions: [&ProjectionDefinition; 2],
    statements: &[ParityStatements; 2],
) -> Result<Vec<String>, ParityError> {
    let mut checkpoints = Vec::new();
    for definition in definitions {
        let key = key_of(definition);
        let stored = checkpoint::stored(connection, &key).await?;
        if stored.len() != usize::from(definition.partition_count().get()) {
            return Err(ParityError::NoCheckpoint(key.to_string()));
        }
        checkpoints.push(stored);
    }
    let common = common(&checkpoints[0], &checkpoints[1]);
    let mut left_out = BTreeSet::new();
    for ((definition, statements), common) in definitions.into_iter().zip(statements).zip(common) {
        left_out.extend(parked(connection, definition).await?);
        let beyond = sqlx::query_scalar::<_, String>(AssertSqlSafe(statements.beyond.clone()))
            .bind(common)
            .bind(LEFT_OUT_COUNT_MAX + 1)
            .fetch_all(&mut *connection)
            .await?;
        left_out.extend(beyond);
    }
    match i64::try_from(left_out.len()) {
        Ok(..=LEFT_OUT_COUNT_MAX) => Ok(left_out.into_iter().collect()),
        Ok(_) | Err(_) => Err(ParityError::TooFarApart),
    }
}

async fn parked(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
) -> Result<Vec<String>, ParityError> {
    let key = key_of(definition);
    let parked = sqlx::query_scalar!(
        "select aggregate_id from parked where projection = $1 and version = $2 limit $3",
        key.projection.as_str(),
        key.version_column(),
        LEFT_OUT_COUNT_MAX + 1,
    );
    Ok(parked.fetch_all(connection).await?)
}

/// What both have reached, by partition of each. Where their numbers of partitions differ, nobody knows
/// which partition of the one has the aggregates of which of the other.
fn common(one: &[Held], other: &[Held]) -> [Vec<i64>; 2] {
    let position = |held: &Held| held.mark.position.as_i64();
    if one.len() == other.len() {
        let least = one.iter().zip(other).map(|(one, other)| position(one).min(position(other)));
        let least: Vec<i64> = least.collect();
        return [least.clone(), least];
    }
    let least = one.iter().chain(other).map(position).min().unwrap_or_default();
    [vec![least; one.len()], vec![least; other.len()]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chain::Mark;
    use consistency::{Epoch, EventId, Position};

    fn at(positions: &[u64]) -> Vec<Held> {
        let held = |(partition, at): (usize, &u64)| Held {
            partition: partition as u16,
            epoch: Epoch::FIRST,
            mark: Mark { position: Position::new(*at).unwrap(), id: EventId::NIL },
            fence: 0,
        };
        positions.iter().enumerate().map(held).collect()
    }

    #[test]
    fn partitions_are_compared_up_to_what_both_have_reached() {
        assert_eq!(common(&at(&[5, 9]), &at(&[7, 8])), [vec![5, 8], vec![5, 8]]);
        assert_eq!(common(&at(&[5, 9]), &at(&[7])), [vec![5, 5], vec![5]]);
    }

    #[test]
    fn a_difference_says_which_fields_differ() {
        let difference = |one: Option<&str>, other: Option<&str>| Difference {
            table: "light".to_owned(),
            key: "l-1".to_owned(),
            one: one.map(str::to_owned),
            other: other.map(str::to_owned),
        };
        let field = |path: &str, one: &str, other: &str| Field {
            path: path.to_owned(),
            one: one.to_owned(),
            other: other.to_owned(),
        };
        let rows = difference(
            Some(r#"{"version":3,"data":{"lit":true,"at":[1]}}"#),
            Some(r#"{"version":2,"data":{"lit":true,"at":[2],"by":null}}"#),
        );
        let fields = rows.fields();
        assert_eq!(fields.len(), 3);
        for field in [
            field("data.at", "[1]", "[2]"),
            field("data.by", "nothing", "null"),
            field("version", "3", "2"),
        ] {
            assert!(fields.contains(&field), "{field:?}");
        }
        let states = difference(
            Some(r#"{"state":"{\"lit\":true}"}"#),
            Some(r#"{"state":"{\"lit\":false}"}"#),
        );
        assert_eq!(states.fields(), [field("state.lit", "true", "false")]);
        let torn = difference(Some(r#"{"state":"{}"}"#), Some(r#"{"state":"torn"}"#));
        assert_eq!(torn.fields(), [field("state", "{}", "torn")]);
        let gone = difference(Some("{}"), None);
        assert_eq!(gone.to_string(), "l-1 of light, {}, but nothing");
    }

    #[test]
    fn digests_add_up_in_any_order() {
        let one = Digest { line_count: 1, sums: [i128::MAX, 3] };
        let other = Digest { line_count: 2, sums: [4, -5] };
        assert_eq!(one.with(other), other.with(one));
        assert_eq!(one.with(other).line_count(), 3);
        assert_ne!(one.with(other), one.with(one));
        assert_eq!(other.to_string(), "2:0000000000000004fffffffffffffffb");
    }
}
