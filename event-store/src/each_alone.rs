//! Many commands, each of one event and without a key, on an aggregate of its own.
//!
//! That is what a gathered commit mostly consists of. They need not be told apart, so there is one row to answer.

use std::collections::HashSet;
use std::sync::Arc;

use consistency::{CommittedAt, Epoch, EventId};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::append::Command;
use crate::call::{Called, Commands, Events, Guard, appended};
use crate::commit::Answer;
use crate::idempotency::Once;
use crate::{AppendError, ReadError, log};

/// Whether the commands are such. A batch that is said to be and is not appends nothing.
pub(crate) fn is_each_alone(commands: &[Arc<Command>]) -> bool {
    let mut aggregates = HashSet::with_capacity(commands.len());
    commands.iter().map(AsRef::as_ref).all(|Command { append, idempotency, .. }| {
        idempotency.is_none() && append.events.len() == 1 && aggregates.insert(&append.aggregate)
    })
}

/// Commits the commands in one statement.
pub(crate) async fn append_each_alone(
    connection: &mut PgConnection,
    log_id: Uuid,
    batch_id: Uuid,
    expected: Guard,
    commands: &[Arc<Command>],
) -> Result<Called, sqlx::Error> {
    let columns = Commands::of(commands);
    let events = Events::of(commands);
    let row = sqlx::query_as!(
        Row,
        r#"select head_epoch as "head_epoch!", head_position as "head_position!",
                  head_event_id as "head_event_id!",
                  committed_at_micros as "committed_at_micros!",
                  last_versions as "last_versions!",
                  lost_epochs as "lost_epochs: Vec<Option<i32>>",
                  lost_positions as "lost_positions: Vec<Option<i64>>"
           from append_events_each_alone(
               $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17
           )"#,
        expected.seen.epoch.as_i32(),
        expected.seen.position.as_i64(),
        expected.judged.map(Epoch::as_i32) as _,
        log_id,
        batch_id,
        columns.aggregate_types as _,
        columns.aggregate_ids as _,
        columns.expected_epochs as _,
        columns.expected_versions as _,
        &events.ids,
        events.event_types as _,
        &events.schema_versions,
        &events.correlation_ids,
        &events.causation_ids,
        or_empty(events.idempotency_key_hashes) as _,
        or_empty(events.traceparents) as _,
        events.data as _,
    )
    .fetch_one(connection)
    .await?;
    let before = EventId::new(row.head_event_id);
    let answers = row.answers(commands).map_err(|error| sqlx::Error::Decode(error.into()))?;
    Ok(Called { answers, before })
}

/// A column that nobody fills need not be sent.
fn or_empty<T>(column: Vec<Option<T>>) -> Vec<Option<T>> {
    if column.iter().all(Option::is_none) { Vec::new() } else { column }
}

/// What the function answers to all commands.
struct Row {
    head_epoch: i32,
    head_position: i64,
    head_event_id: Uuid,
    committed_at_micros: i64,
    last_versions: Vec<i64>,
    /// `None` when no command is lost, like the positions.
    lost_epochs: Option<Vec<Option<i32>>>,
    lost_positions: Option<Vec<Option<i64>>>,
}

impl Row {
    fn answers(self, commands: &[Arc<Command>]) -> Result<Vec<Answer>, ReadError> {
        let committed_at = CommittedAt::from_unix_micros(self.committed_at_micros);
        let mut end = log::log_position(self.head_epoch, self.head_position)?;
        let lost_epochs = self.lost_epochs.unwrap_or_else(|| vec![None; commands.len()]);
        let lost_positions = self.lost_positions.unwrap_or_else(|| vec![None; commands.len()]);
        if [self.last_versions.len(), lost_epochs.len(), lost_positions.len()]
            .iter()
            .any(|count| *count != commands.len())
        {
            return Err(log::corrupt(self.head_position, "not each command is answered once"));
        }
        let lost = lost_epochs.into_iter().zip(lost_positions);
        let met = self.last_versions.into_iter().zip(lost);
        let answer = |(command, (version, lost)): (&Arc<Command>, _)| {
            let version = log::version(self.head_position, version)?;
            if let (Some(epoch), Some(position)) = lost {
                let at = log::log_position(epoch, position)?;
                return Ok(Err(AppendError::Conflict { current: version, at }));
            }
            end.position = end.position.next();
            let appended = appended(&command.append, end, version.next(), committed_at);
            Ok(Ok(Once::Appended(appended)))
        };
        commands.iter().zip(met).map(answer).collect()
    }
}
