//! One command by itself: a plain statement, which does nothing if anybody else moved the head meanwhile.
//!
//! Most of what the append function does is for commands that come together and for saying what is wrong.
//! The statement says neither: it appends, or whoever called it calls the function.

use consistency::{CommittedAt, Epoch, EventId};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::append::Command;
use crate::call::{Called, Guard, appended};
use crate::idempotency::Once;
use crate::log;

/// Appends the command's only event; it has no idempotency key. `None` means that nothing was appended.
pub(crate) async fn append_alone(
    connection: &mut PgConnection,
    log_id: Uuid,
    batch_id: Uuid,
    expected: Guard,
    Command { append, .. }: &Command,
) -> Result<Option<Called>, sqlx::Error> {
    let [event] = append.events.as_slice() else { return Ok(None) };
    let (expected_epoch, expected_version) = append.expected.columns();
    let row = sqlx::query_file!(
        "src/alone.sql",
        expected.seen.epoch.as_i32(),
        expected.seen.position.as_i64(),
        expected.judged.map(Epoch::as_i32) as _,
        log_id,
        batch_id,
        append.aggregate.kind().as_str(),
        append.aggregate.id(),
        expected_epoch as _,
        expected_version as _,
        event.id.get(),
        event.event_type.as_str(),
        event.schema_version.as_i16(),
        append.correlation_id,
        append.causation_id,
        append.idempotency_key_hash.as_ref().map(<[u8; 32]>::as_slice) as _,
        append.traceparent.as_ref().map(|traceparent| traceparent.as_str()) as _,
        event.data,
    )
    .fetch_optional(connection)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let decode = || {
        let at = log::log_position(row.epoch, row.position)?;
        let version = log::version(row.position, row.version)?;
        let committed_at = CommittedAt::from_unix_micros(row.committed_at_micros);
        Ok(appended(append, at, version, committed_at))
    };
    let appended = decode().map_err(|error: crate::ReadError| sqlx::Error::Decode(error.into()))?;
    let before = EventId::new(row.previous_id);
    Ok(Some(Called { answers: vec![Ok(Once::Appended(appended))], before }))
}
