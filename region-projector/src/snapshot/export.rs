//! Takes a snapshot.

use std::path::Path;

use futures::TryStreamExt as _;
use projection::ProjectionDefinition;
use projection::sql::CopyTable;
use sqlx::{Connection as _, PgConnection, PgPool};

use super::file::Writer;
use super::{Checkpoint, Header, SnapshotError, listed, patient};
use crate::start::key_of;

/// Writes a version to a file, as one snapshot of the database has it. Projectors and gateways go on
/// meanwhile.
pub async fn export(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    region: &str,
    path: &Path,
) -> Result<Header, SnapshotError> {
    let tables = CopyTable::all(definition)
        .ok_or_else(|| SnapshotError::Custom(definition.name().to_string()))?;
    let mut connection = patient(pool).await?;
    let mut transaction = connection.begin().await?;
    sqlx::query("set transaction isolation level repeatable read, read only")
        .execute(&mut *transaction)
        .await?;
    let header = header(&mut transaction, definition, region, &tables).await?;
    let mut writer = Writer::create(path, &header)?;
    for table in &tables {
        let mut lines = transaction.copy_out_raw(&table.copy_out).await?;
        while let Some(line) = lines.try_next().await? {
            writer.lines(&line)?;
        }
        drop(lines);
        writer.end_table()?;
    }
    writer.finish()?;
    transaction.rollback().await?;
    connection.close().await?;
    Ok(header)
}

async fn header(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    region: &str,
    tables: &[CopyTable],
) -> Result<Header, SnapshotError> {
    let key = key_of(definition);
    let now = sqlx::query!(
        r#"select log_id, to_char(now() at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') as "at!"
           from log_identity"#
    )
    .fetch_optional(&mut *connection)
    .await?;
    let rows = sqlx::query!(
        r#"select partition, epoch, position, event_id,
               (extract(epoch from committed_at) * 1000000)::bigint as committed_at_us
           from checkpoint where projection = $1 and version = $2 order by partition"#,
        key.projection.as_str(),
        key.version_column(),
    );
    let rows = rows.fetch_all(connection).await?.into_iter();
    let checkpoints = rows.map(|row| Checkpoint {
        partition: row.partition,
        epoch: row.epoch,
        position: row.position,
        event_id: row.event_id,
        committed_at_us: row.committed_at_us,
    });
    let checkpoints: Vec<Checkpoint> = checkpoints.collect();
    let partition_count = definition.partition_count().get();
    let now = now.filter(|_| checkpoints.len() == usize::from(partition_count));
    let now = now.ok_or_else(|| SnapshotError::NoCheckpoint(key.clone()))?;
    Ok(Header {
        log_id: now.log_id,
        region: region.to_owned(),
        exported_at: now.at,
        projection: key.projection.to_string(),
        definition: definition.declared_version(),
        version: key.version,
        partition_count,
        checkpoints,
        tables: listed(tables),
    })
}
