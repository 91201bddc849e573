//! Whose a table of the region's database is, by its name.

use sqlx::PgConnection;

use super::{Version, VersionState};
use crate::checkpoint::VersionKey;

/// A table and what it takes on disk, its indexes included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Its name.
    pub name: String,
    /// Bytes.
    pub bytes: i64,
}

/// Tables whose names are those of a version's, whichever: `<projection>_v<version>_...`.
pub async fn all(connection: &mut PgConnection) -> Result<Vec<Table>, sqlx::Error> {
    sqlx::query_as!(
        Table,
        r#"select relname::text as "name!", pg_total_relation_size(oid) as "bytes!"
           from pg_class where relkind = 'r' and relnamespace = current_schema()::regnamespace
               and relname ~ '^[a-z0-9_]+_v[0-9]+_'
           order by relname"#
    )
    .fetch_all(connection)
    .await
}

/// Whether a table has the name of one of a version's.
fn fits(table: &str, key: &VersionKey) -> bool {
    table.starts_with(&prefix(key))
}

fn prefix(key: &VersionKey) -> String {
    format!("{}_v{}_", key.projection, key.version).replace('-', "_")
}

/// The version that a table is of. Where the names of two begin alike it is the longer one's.
pub fn owner<'v>(table: &str, versions: &'v [Version]) -> Option<&'v Version> {
    let fitting = versions.iter().filter(|version| fits(table, &version.key));
    fitting.max_by_key(|version| prefix(&version.key).len())
}

/// Tables of a projection that is known here, but of no version that is still there.
pub fn orphans(tables: &[Table], versions: &[Version]) -> Vec<Table> {
    let is_orphan = |table: &&Table| {
        let is_left = |version: &Version| version.state == VersionState::Dropped;
        let of_nobody = || versions.iter().any(|known| is_numbered(&table.name, known));
        owner(&table.name, versions).map_or_else(of_nobody, is_left)
    };
    tables.iter().filter(is_orphan).cloned().collect()
}

/// Whether a table has the name of a version's of the same projection, whatever its number.
fn is_numbered(table: &str, of: &Version) -> bool {
    let projection = of.key.projection.as_str().replace('-', "_");
    let rest = table.strip_prefix(&format!("{projection}_v"));
    let rest = rest.map(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit()));
    rest.is_some_and(|rest| rest.starts_with('_'))
}

#[cfg(test)]
mod tests {
    use consistency::{Name, PartitionCount};

    use super::*;

    fn version(projection: &str, number: u32, state: VersionState) -> Version {
        Version {
            key: VersionKey { projection: Name::new(projection).unwrap(), version: number },
            definition: 1,
            partition_count: PartitionCount::new(1).unwrap(),
            state,
        }
    }

    fn table(name: &str) -> Table {
        Table { name: name.to_owned(), bytes: 0 }
    }

    #[test]
    fn a_table_is_of_the_version_whose_name_it_bears_and_never_of_one_that_only_begins_alike() {
        let versions = [
            version("a", 1, VersionState::Active),
            version("a-v1", 2, VersionState::Active),
            version("a", 11, VersionState::Active),
        ];
        let of = |name| owner(name, &versions).map(|version| version.key.to_string());
        assert_eq!(of("a_v1_state").as_deref(), Some("a v1"));
        assert_eq!(of("a_v1_v2_state").as_deref(), Some("a-v1 v2"));
        assert_eq!(of("a_v11_state").as_deref(), Some("a v11"));
        assert_eq!(of("b_v1_state"), None);
    }

    #[test]
    fn only_tables_of_projections_that_are_known_can_be_orphans() {
        let versions =
            [version("a", 1, VersionState::Active), version("a", 2, VersionState::Dropped)];
        let tables = ["a_v1_state", "a_v2_state", "a_v3_state", "their_v1_table"].map(table);
        assert_eq!(orphans(&tables, &versions), ["a_v2_state", "a_v3_state"].map(table));
    }
}
