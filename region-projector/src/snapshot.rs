//! A version of a projection as a file: everything that a region needs to go on from where another one stood.
//!
//! It is taken in one snapshot of the database, and holds checkpoints, states, rows, sums, parked aggregates
//! with their letters, and what was decided on letters. Whoever takes it in reads the log from there
//! on, so a new region needs neither the beginning of the stream nor the time to fold it.

mod export;
pub mod file;
mod import;

use std::io;
use std::path::PathBuf;

use consistency::{Epoch, LogPosition, Position};
use projection::DomainError;
use projection::sql::CopyTable;
use serde::{Deserialize, Serialize};
use sqlx::{Connection as _, PgConnection, PgPool};
use uuid::Uuid;

use crate::checkpoint::{Senseless, VersionKey, log_position};
use crate::epochs::EpochError;
use crate::start::StartError;

pub use export::export;
pub use import::{Import, Imported};

/// Why there is no snapshot, or why it is not taken in. Nothing was changed then.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The file.
    #[error("file {path} cannot be read or written")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no snapshot.
    #[error("this is no snapshot")]
    Foreign,
    /// A newer release wrote it.
    #[error("the snapshot is of format {0}, this binary knows format {known}", known = file::FORMAT)]
    UnknownFormat(u32),
    /// Some of it is missing, or not as it was written.
    #[error("the snapshot is damaged: {0}")]
    Damaged(&'static str),
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// The database cannot be made ready.
    #[error("the database cannot be made ready")]
    Start(#[from] StartError),
    /// The epochs make no sense.
    #[error("the epochs cannot be read")]
    Epochs(#[from] EpochError),
    /// Nobody has applied anything.
    #[error("{0} has no checkpoints")]
    NoCheckpoint(VersionKey),
    /// Only who wrote them knows the tables of a custom projection.
    #[error("{0} is a custom projection, whose tables cannot be copied")]
    Custom(String),
    /// A version cannot have tables.
    #[error("the version cannot have tables of its own")]
    Definition(#[from] DomainError),
    /// Of another log.
    #[error("the snapshot is of log {found}, this region reads {expected}")]
    OtherLog {
        /// Whose events are in it.
        found: Uuid,
        /// Whose events come here.
        expected: Uuid,
    },
    /// Another binary may have it.
    #[error(
        "the rules of the snapshot, {projection} definition {definition}, are not in this binary"
    )]
    UnknownDefinition {
        /// The projection.
        projection: String,
        /// The number of its rules.
        definition: u32,
    },
    /// The rules were changed without a new number.
    #[error("the snapshot has other tables than these rules make")]
    OtherTables,
    /// Of an epoch that the primary has not told of.
    #[error("the snapshot is of epoch {found}, this region knows epoch {known}")]
    NewerEpoch {
        /// Its epoch.
        found: Epoch,
        /// The newest that is known here.
        known: Epoch,
    },
    /// With events that the log lost.
    #[error(
        "the snapshot holds events up to {stored}, and nothing above {kept} of that epoch was kept"
    )]
    PastEpoch {
        /// How far it goes.
        stored: LogPosition,
        /// What is left of its epoch.
        kept: Position,
    },
    /// There is something already.
    #[error(
        "this region has {0} already; take the snapshot in beside it, with --beside, and switch"
    )]
    Exists(VersionKey),
    /// A rebuild is under way.
    #[error("another rebuild or import of {0} is under way")]
    Busy(String),
}

impl From<Senseless> for SnapshotError {
    fn from(_: Senseless) -> Self {
        Self::Damaged("a checkpoint makes no sense")
    }
}

/// What is in a snapshot, before its lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// Whose events are in it.
    pub log_id: Uuid,
    /// Where it was taken.
    pub region: String,
    /// When, by that region's database.
    pub exported_at: String,
    /// Of which projection.
    pub projection: String,
    /// The number that its rules are declared with.
    pub definition: u32,
    /// The number of the version in that region.
    pub version: u32,
    /// Of how many partitions.
    pub partition_count: u16,
    /// How far it goes, by partition.
    pub checkpoints: Vec<Checkpoint>,
    /// The tables whose lines follow.
    pub tables: Vec<Table>,
}

/// How far one partition goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Which.
    pub partition: i32,
    /// The epoch that the position counts in.
    pub epoch: i32,
    /// Every event of the partition at or below is in it, or parked.
    pub position: i64,
    /// The event there, whosever it is; nil at zero.
    pub event_id: Uuid,
    /// When the newest event was committed, in microseconds of Unix time.
    pub committed_at_us: Option<i64>,
}

/// One table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// As [`CopyTable`] names it.
    pub name: String,
    /// In the order of its lines.
    pub columns: Vec<String>,
}

impl Header {
    /// The checkpoints as places in the log.
    pub fn positions(&self) -> Result<Vec<LogPosition>, SnapshotError> {
        let places = self.checkpoints.iter().enumerate().map(|(at, checkpoint)| {
            if usize::try_from(checkpoint.partition) != Ok(at) {
                return Err(SnapshotError::Damaged("its checkpoints are not of its partitions"));
            }
            let Checkpoint { partition, epoch, position, .. } = *checkpoint;
            Ok(log_position(partition, epoch, position)?)
        });
        let places = places.collect::<Result<Vec<_>, _>>()?;
        if places.len() == usize::from(self.partition_count) && !places.is_empty() {
            Ok(places)
        } else {
            Err(SnapshotError::Damaged("its checkpoints are not of its partitions"))
        }
    }
}

fn listed(tables: &[CopyTable]) -> Vec<Table> {
    let listed =
        |table: &CopyTable| Table { name: table.name.clone(), columns: table.columns.clone() };
    tables.iter().map(listed).collect()
}

/// A connection on which whole tables may be copied.
async fn patient(pool: &PgPool) -> Result<PgConnection, sqlx::Error> {
    let mut connection = pool.acquire().await?.detach();
    for bound in ["statement_timeout", "idle_in_transaction_session_timeout"] {
        let set = sqlx::query("select set_config($1, '0', false)").bind(bound);
        if let Err(error) = set.execute(&mut connection).await {
            let _ = connection.close().await;
            return Err(error);
        }
    }
    Ok(connection)
}
