//! Takes a snapshot in.

use std::path::Path;

use consistency::{Adoption, EpochHistory, Name, PartitionCount};
use projection::sql::CopyTable;
use projection::{Domain, ProjectionDefinition};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, PgPool};
use uuid::Uuid;

use super::file::{Piece, Pieces, Snapshot};
use super::{Header, SnapshotError, listed, patient};
use crate::checkpoint::VersionKey;
use crate::epochs;
use crate::lease;
use crate::log::LogClient;
use crate::sharing::rows;
use crate::start::{self, key_of};
use crate::switch::lock_versions;
use crate::versions::{self, VersionState};

/// Where a snapshot is taken in.
#[derive(Debug, Clone, Copy)]
pub struct Import<'a> {
    /// The region's database.
    pub pool: &'a PgPool,
    /// The rules.
    pub domain: &'a Domain,
    /// The log that the region reads.
    pub log_id: Uuid,
    /// Where the primary tells its epochs.
    pub log: &'a LogClient,
    /// Whether another version may be there already: then this one is to take over later.
    pub beside: bool,
}

/// What was taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The number that it has here.
    pub key: VersionKey,
    /// Whether gateways read it at once, since there was nothing else.
    pub is_active: bool,
    /// Lines of all tables.
    pub line_count: u64,
}

impl Import<'_> {
    /// Takes a snapshot in, all of it or nothing. The projectors go on from there.
    pub async fn run(&self, path: &Path) -> Result<Imported, SnapshotError> {
        let snapshot = Snapshot::open(path)?;
        let header = &snapshot.header;
        if header.log_id != self.log_id {
            let (found, expected) = (header.log_id, self.log_id);
            return Err(SnapshotError::OtherLog { found, expected });
        }
        let rules = self.rules(header)?;
        let history = start::make_ready(self.pool, self.log_id).await?;
        let history = self.learn(history).await?;
        check_epochs(header, &history)?;
        let mut connection = patient(self.pool).await?;
        let mut transaction = connection.begin().await?;
        let imported = self.take_in(&mut transaction, &snapshot, rules).await?;
        transaction.commit().await?;
        connection.close().await?;
        Ok(imported)
    }

    fn rules(&self, header: &Header) -> Result<&ProjectionDefinition, SnapshotError> {
        let rules = self.domain.projection(&header.projection, header.definition);
        let rules = rules.filter(|rules| !rules.is_on_demand());
        rules.ok_or_else(|| SnapshotError::UnknownDefinition {
            projection: header.projection.clone(),
            definition: header.definition,
        })
    }

    /// A new region knows no epochs yet. Without the primary, what is known has to do.
    async fn learn(&self, known: EpochHistory) -> Result<EpochHistory, SnapshotError> {
        match self.log.epochs().await {
            Ok(told) => {
                let mut connection = self.pool.acquire().await?;
                epochs::store(&mut connection, &told).await?;
                Ok(epochs::stored(&mut connection).await?)
            }
            Err(error) => {
                tracing::warn!(%error, "the primary does not tell its epochs");
                Ok(known)
            }
        }
    }

    async fn take_in(
        &self,
        connection: &mut PgConnection,
        snapshot: &Snapshot,
        rules: &ProjectionDefinition,
    ) -> Result<Imported, SnapshotError> {
        let header = &snapshot.header;
        if !lease::try_within(connection, &header.projection).await? {
            return Err(SnapshotError::Busy(header.projection.clone()));
        }
        let (key, is_active) = self.introduce(connection, header).await?;
        let partition_count = PartitionCount::new(header.partition_count)
            .ok_or(SnapshotError::Damaged("its number of partitions"))?;
        let definition = rules.instance(key.version, partition_count)?;
        let tables = CopyTable::all(&definition)
            .ok_or_else(|| SnapshotError::Custom(header.projection.clone()))?;
        if listed(&tables) != header.tables {
            return Err(SnapshotError::OtherTables);
        }
        let is_index = |statement: &&std::sync::Arc<str>| statement.starts_with("create index");
        let create = &definition.statements().create;
        for statement in create.iter().filter(|statement| !is_index(statement)) {
            sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut *connection).await?;
        }
        let mut pieces = snapshot.pieces()?;
        let mut line_count = 0;
        for table in &tables {
            line_count += fill(connection, table, &mut pieces).await?;
        }
        for statement in create.iter().filter(is_index) {
            sqlx::query(AssertSqlSafe(statement.clone())).execute(&mut *connection).await?;
        }
        put_checkpoints(connection, &key_of(&definition), header).await?;
        rows::notify(connection).await?;
        Ok(Imported { key, is_active, line_count })
    }

    /// Gives the version its number. The first of a projection is read at once.
    async fn introduce(
        &self,
        connection: &mut PgConnection,
        header: &Header,
    ) -> Result<(VersionKey, bool), SnapshotError> {
        let projection = Name::new(header.projection.as_str())
            .map_err(|_| SnapshotError::Damaged("its projection has no name"))?;
        lock_versions(connection, projection.as_str()).await?;
        let all = versions::of_projection(connection, projection.as_str()).await?;
        let mut present = all.iter().filter(|version| version.state != VersionState::Dropped);
        if let Some(version) = present.next().filter(|_| !self.beside) {
            return Err(SnapshotError::Exists(version.key.clone()));
        }
        let is_active = !all.iter().any(|version| version.state == VersionState::Active);
        let newest = all.iter().map(|version| version.key.version).max();
        let version = newest.map_or(header.definition, |newest| newest + 1);
        let key = VersionKey { projection, version };
        sqlx::query!(
            "insert into projection_version (projection, version, partition_count, active, definition)
             values ($1, $2, $3, $4, $5)",
            key.projection.as_str(),
            key.version_column(),
            i32::from(header.partition_count),
            is_active,
            i32::try_from(header.definition).unwrap_or(i32::MAX),
        )
        .execute(connection)
        .await?;
        Ok((key, is_active))
    }
}

/// Whether the log that is read here still has everything that is in the snapshot.
fn check_epochs(header: &Header, history: &EpochHistory) -> Result<(), SnapshotError> {
    match history.adoption(header.positions()?) {
        Adoption::Here | Adoption::InPlace => Ok(()),
        Adoption::Newer(found) => {
            Err(SnapshotError::NewerEpoch { found, known: history.current() })
        }
        Adoption::Beyond { stored, kept } => Err(SnapshotError::PastEpoch { stored, kept }),
    }
}

/// Copies the lines of one table, and says how many.
async fn fill(
    connection: &mut PgConnection,
    table: &CopyTable,
    pieces: &mut Pieces,
) -> Result<u64, SnapshotError> {
    if let Some([make, _]) = &table.by_way_of {
        sqlx::query(AssertSqlSafe(make.clone())).execute(&mut *connection).await?;
    }
    let mut copy = connection.copy_in_raw(&table.copy_in).await?;
    let expected = loop {
        match pieces.next_piece() {
            Ok(Piece::Lines(lines)) => {
                copy.send(lines).await?;
            }
            Ok(Piece::End(line_count)) => break line_count,
            Err(error) => {
                copy.abort("the snapshot is damaged").await?;
                return Err(error);
            }
        }
    };
    let copied = copy.finish().await?;
    if copied != expected {
        return Err(SnapshotError::Damaged("a table has another number of lines"));
    }
    if let Some([_, hand_on]) = &table.by_way_of {
        sqlx::query(AssertSqlSafe(hand_on.clone())).execute(&mut *connection).await?;
    }
    Ok(copied)
}

async fn put_checkpoints(
    connection: &mut PgConnection,
    key: &VersionKey,
    header: &Header,
) -> Result<(), SnapshotError> {
    for checkpoint in &header.checkpoints {
        sqlx::query!(
            "insert into checkpoint
                 (projection, version, partition, epoch, position, event_id, fence, committed_at)
             values ($1, $2, $3, $4, $5, $6, 0,
                 timestamptz 'epoch' + $7::bigint * interval '1 microsecond')",
            key.projection.as_str(),
            key.version_column(),
            checkpoint.partition,
            checkpoint.epoch,
            checkpoint.position,
            checkpoint.event_id,
            checkpoint.committed_at_us,
        )
        .execute(&mut *connection)
        .await?;
    }
    Ok(())
}
