//! Letters that were not known to the binary that parked them, and are to this one.

use std::collections::BTreeSet;

use consistency::{AggregateId, Name, SchemaVersion, header};
use projection::ProjectionDefinition;
use sqlx::PgConnection;

use super::DeadLetterError;
use crate::start::key_of;

/// Reasons that another binary may do away with: the kinds of
/// [`projection::ProjectionError::newer_binary_may_know`].
const REASONS: [&str; 2] = ["unknown-event-type", "unknown-schema-version"];

/// The aggregates of these partitions that are parked at an event which was not known, and is by now.
/// As many as the breaker lets be parked.
pub async fn newly_known(
    connection: &mut PgConnection,
    definition: &ProjectionDefinition,
    partitions: &BTreeSet<u16>,
) -> Result<Vec<AggregateId>, DeadLetterError> {
    let key = key_of(definition);
    let partitions: Vec<i32> = partitions.iter().copied().map(i32::from).collect();
    let rows = sqlx::query!(
        r#"select parked.aggregate_id, letter.headers->>$6 as "event_type?",
               letter.headers->>$7 as "schema_version?"
           from parked join dead_letter as letter using (projection, version, position)
           where parked.projection = $1 and parked.version = $2 and parked.aggregate_type = $3
               and parked.partition = any($4) and parked.reason = any($5)
           order by parked.position"#,
        key.projection.as_str(),
        key.version_column(),
        definition.aggregate_type().as_str(),
        &partitions,
        &REASONS.map(str::to_owned),
        header::EVENT_TYPE,
        header::SCHEMA_VERSION,
    )
    .fetch_all(connection)
    .await?;
    let known = rows.into_iter().filter(|row| {
        let (event_type, schema) = (row.event_type.as_deref(), row.schema_version.as_deref());
        is_known(definition, event_type, schema).unwrap_or(false)
    });
    let kind = definition.aggregate_type();
    let aggregates = known.map(|row| AggregateId::new(kind.clone(), row.aggregate_id));
    Ok(aggregates.collect::<Result<_, _>>()?)
}

fn is_known(
    definition: &ProjectionDefinition,
    event_type: Option<&str>,
    schema: Option<&str>,
) -> Option<bool> {
    let event_type = Name::new(event_type?).ok()?;
    let schema = SchemaVersion::new(schema?.parse().ok()?)?;
    Some(definition.knows(&event_type, schema))
}
