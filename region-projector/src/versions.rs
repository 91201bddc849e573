//! Versions of projections as the region's database has them.
//!
//! A version is a set of tables with checkpoints, numbered by the region; its number is never given
//! again, not even when it was dropped. The rules that build it are a definition of the binary, which
//! has a number of its own: the same rules may build a second version, to replace a first one that was
//! damaged or to have other partitions.

pub mod discard;
pub mod tables;

use std::fmt;

use consistency::{Name, PartitionCount};
use projection::{Domain, DomainError, ProjectionDefinition};
use serde::{Serialize, Serializer};
use sqlx::PgConnection;

use crate::checkpoint::VersionKey;

/// What becomes of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum VersionState {
    /// A rebuild fills it; nobody tails the log for it.
    Building,
    /// It follows the log, and has never been read.
    Ready,
    /// It follows the log, and gateways read it.
    Active,
    /// It follows the log, and gateways read it once.
    Retired,
    /// Its tables and checkpoints are gone.
    Dropped,
}

impl VersionState {
    /// As it is shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Building => "building",
            Self::Ready => "ready",
            Self::Active => "active",
            Self::Retired => "retired",
            Self::Dropped => "dropped",
        }
    }

    /// From its columns. What a newer binary may have written is left to it.
    fn of(state: &str, active: bool) -> Option<Self> {
        match state {
            "ready" if active => Some(Self::Active),
            "ready" => Some(Self::Ready),
            "building" => Some(Self::Building),
            "retired" => Some(Self::Retired),
            "dropped" => Some(Self::Dropped),
            _ => None,
        }
    }

    /// Whether the region's projectors apply what comes.
    pub fn follows_the_log(self) -> bool {
        match self {
            Self::Ready | Self::Active | Self::Retired => true,
            Self::Building | Self::Dropped => false,
        }
    }
}

impl fmt::Display for VersionState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl Serialize for VersionState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// One version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Version {
    /// Its name.
    pub key: VersionKey,
    /// The number that its rules are declared with.
    pub definition: u32,
    /// How many partitions it was made with.
    pub partition_count: PartitionCount,
    /// What becomes of it.
    pub state: VersionState,
}

impl Version {
    /// Its rules over its own tables; `None` when they are not in this binary.
    pub fn definition_in(
        &self,
        domain: &Domain,
    ) -> Result<Option<ProjectionDefinition>, DomainError> {
        let declared = domain.projection(self.key.projection.as_str(), self.definition);
        let declared = declared.filter(|declared| !declared.is_on_demand());
        declared.map(|rules| rules.instance(self.key.version, self.partition_count)).transpose()
    }
}

/// Every version that there ever was, in the order of projection and number. Those that break their own
/// rules, or are in a state that only a newer binary knows, are left out.
pub async fn all(connection: &mut PgConnection) -> Result<Vec<Version>, sqlx::Error> {
    let rows = sqlx::query!(
        r#"select projection, version, coalesce(definition, version) as "definition!",
               partition_count, state, active
           from projection_version order by projection, version"#
    );
    let rows = rows.fetch_all(connection).await?.into_iter();
    let versions = rows.filter_map(|row| {
        let projection = Name::new(row.projection).ok()?;
        Some(Version {
            key: VersionKey { projection, version: u32::try_from(row.version).ok()? },
            definition: u32::try_from(row.definition).ok()?,
            partition_count: PartitionCount::new(u16::try_from(row.partition_count).ok()?)?,
            state: VersionState::of(&row.state, row.active)?,
        })
    });
    Ok(versions.collect())
}

/// Those of one projection.
pub async fn of_projection(
    connection: &mut PgConnection,
    projection: &str,
) -> Result<Vec<Version>, sqlx::Error> {
    let mut versions = all(connection).await?;
    versions.retain(|version| version.key.projection.as_str() == projection);
    Ok(versions)
}
