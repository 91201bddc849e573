//! The tables of a version as streams of lines, out of one database and into another.

use super::Naming;
use crate::{ProjectionDefinition, ProjectionKind, ViewKind};

/// One table of a version, in the text format of COPY.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CopyTable {
    /// `state`, the view, or one of the fixed tables with a colon before its name.
    pub name: String,
    /// In their order.
    pub columns: Vec<String>,
    /// Streams its lines out.
    pub copy_out: String,
    /// Takes them in.
    pub copy_in: String,
    /// Of a fixed table: makes the temporary table that lines are taken into, and moves them on from there.
    pub by_way_of: Option<[String; 2]>,
}

const PARKED: &[&str] =
    &["aggregate_type", "aggregate_id", "partition", "epoch", "position", "reason", "parked_at"];
const LETTER: &[&str] =
    &["position", "aggregate_type", "aggregate_id", "headers", "data", "error", "created_at"];
const DECISION: &[&str] = &[
    "decided_at",
    "actor",
    "decision",
    "aggregate_type",
    "aggregate_id",
    "position",
    "letter_count",
    "stopped_by",
    "headers",
    "data",
];

impl CopyTable {
    /// All of a version's; `None` for a custom projection, of whose tables nothing is known.
    pub fn all(definition: &ProjectionDefinition) -> Option<Vec<Self>> {
        let statements = definition.statements();
        let mut tables = statements.tables();
        let state = ["aggregate_id", "partition", "version", "epoch", "position"];
        let state = [&state[..], &["created_position", "state"]].concat();
        let mut all = vec![Self::own("state", tables.next()?, &state)];
        for (view, table) in definition.views().iter().zip(tables) {
            let columns = match (view.kind(), definition.kind()) {
                (ViewKind::Row | ViewKind::Search(_), _) => {
                    vec!["aggregate_id", "version", "epoch", "position", "data"]
                }
                (ViewKind::List, _) => vec!["list_key", "created_position", "aggregate_id", "data"],
                (ViewKind::Rollup, ProjectionKind::Rollup(rollup)) => {
                    let fixed = ["key", "partition", "epoch", "position"];
                    fixed.into_iter().chain(rollup.column_names()).collect()
                }
                (ViewKind::Rollup, ProjectionKind::Document(_) | ProjectionKind::Custom(_)) => {
                    return None;
                }
            };
            all.push(Self::own(view.name().as_str(), table, &columns));
        }
        let naming = Naming {
            projection: definition.name(),
            version: definition.version(),
            aggregate_type: definition.aggregate_type(),
        };
        match definition.kind() {
            ProjectionKind::Document(_) | ProjectionKind::Rollup(_) => {}
            ProjectionKind::Custom(_) => return None,
        }
        for (table, columns) in
            [("parked", PARKED), ("dead_letter", LETTER), ("letter_decision", DECISION)]
        {
            all.push(Self::fixed(&naming, table, columns));
        }
        Some(all)
    }

    fn own(name: &str, table: &str, columns: &[&str]) -> Self {
        let listed = listed(columns);
        Self {
            name: name.to_owned(),
            columns: owned(columns),
            copy_out: format!(r#"copy "{table}" ({listed}) to stdout"#),
            copy_in: format!(r#"copy "{table}" ({listed}) from stdin"#),
            by_way_of: None,
        }
    }

    /// The lines of one version in a table of all versions. Their version may have another number where they
    /// are taken in, so they do not name it.
    fn fixed(naming: &Naming<'_>, table: &str, columns: &[&str]) -> Self {
        let Naming { projection, version, .. } = naming;
        let (listed, way) = (listed(columns), format!("tidemark_copy_{table}"));
        Self {
            name: format!(":{table}"),
            columns: owned(columns),
            copy_out: format!(
                "copy (select {listed} from {table}
                    where projection = '{projection}' and version = {version}) to stdout"
            ),
            copy_in: format!(r#"copy pg_temp.{way} ({listed}) from stdin"#),
            by_way_of: Some([
                format!(
                    "create temporary table {way} on commit drop
                    as select {listed} from {table} with no data"
                ),
                format!(
                    "insert into {table} (projection, version, {listed})
                    select '{projection}', {version}, {listed} from pg_temp.{way}"
                ),
            ]),
        }
    }
}

fn owned(columns: &[&str]) -> Vec<String> {
    columns.iter().map(|column| (*column).to_owned()).collect()
}

fn listed(columns: &[&str]) -> String {
    let quoted: Vec<String> = columns.iter().map(|column| format!("\"{column}\"")).collect();
    quoted.join(", ")
}
