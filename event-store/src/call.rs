//! The call of the append function, and what its errors mean.

use std::sync::Arc;

use consistency::{CommittedAt, Epoch, EventId, LogPosition, Version};
use sqlx::PgConnection;
use sqlx::postgres::{PgDatabaseError, PgSeverity};
use uuid::Uuid;

use crate::append::{Append, Appended, Command};
use crate::commit::Answer;
use crate::idempotency::{self, Once, Repeat};
use crate::refusal::{Refusal, RefusalKind};
use crate::{AppendError, ReadError, log};

/// Errors that the append function raises by itself; see its migration.
const REFUSED: &str = "TM001";
const OTHER_LOG: &str = "TM002";
const EPOCH_OVER: &str = "TM004";
const TAIL_LOST: &str = "TM005";

/// What the log must still be for commands to be appended to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guard {
    /// It ends here or later.
    pub seen: LogPosition,
    /// It is in this epoch.
    pub judged: Option<Epoch>,
}

/// What the append function answers.
pub(crate) struct Called {
    /// To each command in order.
    pub answers: Vec<Answer>,
    /// The event that the log ended with before.
    pub before: EventId,
}

/// Commits the commands in one statement, whatever they are.
pub(crate) async fn append_events(
    connection: &mut PgConnection,
    log_id: Uuid,
    batch_id: Uuid,
    expected: Guard,
    commands: &[Arc<Command>],
) -> Result<Called, sqlx::Error> {
    let columns = Commands::of(commands);
    let keys = Keys::of(commands);
    let events = Events::of(commands);
    let rows = sqlx::query_as!(
        Row,
        r#"select outcome as "outcome!", at_epoch as "epoch!", at_version as "version!",
                  at_position as "position!", committed_at_micros as "committed_at_micros!",
                  (first_answer).answer_format as answer_format,
                  (first_answer).aggregate_type as aggregate_type,
                  (first_answer).aggregate_id as aggregate_id,
                  (first_answer).event_ids as event_ids,
                  (extract(epoch from (first_answer).committed_at) * 1000000)::bigint
                      as answered_at_micros,
                  last_event_id as "before!"
           from append_events_chained(
               false, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17,
               $18, $19, $20, $21, $22, $23, $24
           )
           order by command_number"#,
        expected.seen.epoch.as_i32(),
        expected.seen.position.as_i64(),
        expected.judged.map(Epoch::as_i32) as _,
        log_id,
        batch_id,
        columns.aggregate_types as _,
        columns.aggregate_ids as _,
        columns.expected_epochs as _,
        columns.expected_versions as _,
        &columns.event_counts,
        &events.ids,
        events.aggregate_types as _,
        events.aggregate_ids as _,
        events.event_types as _,
        &events.schema_versions,
        &events.correlation_ids,
        &events.causation_ids,
        events.idempotency_key_hashes as _,
        events.traceparents as _,
        events.data as _,
        keys.scopes as _,
        keys.keys as _,
        keys.requests as _,
        keys.answer_formats as _,
    )
    .fetch_all(connection)
    .await?;
    let before = rows.first().map_or(EventId::NIL, |row| EventId::new(row.before));
    let answers = rows.into_iter().zip(commands).map(|(row, command)| row.answer(&command.append));
    let answers = answers.collect::<Result<_, ReadError>>();
    Ok(Called { answers: answers.map_err(|error| sqlx::Error::Decode(error.into()))?, before })
}

/// What the append function answers to one command.
struct Row {
    outcome: String,
    epoch: i32,
    version: i64,
    position: i64,
    committed_at_micros: i64,
    answer_format: Option<i16>,
    aggregate_type: Option<String>,
    aggregate_id: Option<String>,
    event_ids: Option<Vec<Uuid>>,
    answered_at_micros: Option<i64>,
    before: Uuid,
}

impl Row {
    fn answer(self, append: &Append) -> Result<Answer, ReadError> {
        let at = log::log_position(self.epoch, self.position)?;
        let version = log::version(self.position, self.version)?;
        let committed_at = CommittedAt::from_unix_micros(self.committed_at_micros);
        match self.outcome.as_str() {
            "appended" => Ok(Ok(Once::Appended(appended(append, at, version, committed_at)))),
            "lost" => Ok(Err(AppendError::Conflict { current: version, at })),
            "mismatched" => Ok(Ok(Once::Repeated(Repeat::Mismatched))),
            "replayed" => Ok(Ok(Once::Repeated(self.replayed()?))),
            _ => Err(log::corrupt(self.position, "the outcome of an append has no such name")),
        }
    }

    fn replayed(self) -> Result<Repeat, ReadError> {
        let missing = log::corrupt(self.position, "a first answer lacks a member");
        let columns = (self.answer_format, self.aggregate_type, self.aggregate_id);
        let (Some(answer_format), Some(aggregate_type), Some(aggregate_id)) = columns else {
            return Err(missing);
        };
        let (Some(event_ids), Some(committed_at_micros)) =
            (self.event_ids, self.answered_at_micros)
        else {
            return Err(missing);
        };
        let answer = idempotency::Answered {
            answer_format,
            aggregate_type,
            aggregate_id,
            epoch: self.epoch,
            first_version: self.version,
            first_position: self.position,
            event_ids,
            committed_at_micros,
        };
        Ok(Repeat::Replayed(answer.into_first_answer()?))
    }
}

/// The commands of a batch, a column each.
#[derive(Default)]
pub(crate) struct Commands<'a> {
    pub aggregate_types: Vec<&'a str>,
    pub aggregate_ids: Vec<&'a str>,
    pub expected_epochs: Vec<Option<i32>>,
    pub expected_versions: Vec<Option<i64>>,
    event_counts: Vec<i32>,
}

impl<'a> Commands<'a> {
    pub fn of(commands: &'a [Arc<Command>]) -> Self {
        let mut columns = Self::default();
        for Command { append, .. } in commands.iter().map(AsRef::as_ref) {
            let (epoch, version) = append.expected.columns();
            let event_count = i32::try_from(append.events.len())
                .expect("an append's events were counted against a far smaller bound");
            columns.aggregate_types.push(append.aggregate.kind().as_str());
            columns.aggregate_ids.push(append.aggregate.id());
            columns.expected_epochs.push(epoch);
            columns.expected_versions.push(version);
            columns.event_counts.push(event_count);
        }
        columns
    }
}

/// The idempotency keys of a batch, a column each; empty when no command has one, so that appends
/// without keys do not pay for them.
#[derive(Default)]
struct Keys<'a> {
    scopes: Vec<Option<&'a [u8]>>,
    keys: Vec<Option<&'a [u8]>>,
    requests: Vec<Option<&'a [u8]>>,
    answer_formats: Vec<Option<i16>>,
}

impl<'a> Keys<'a> {
    fn of(commands: &'a [Arc<Command>]) -> Self {
        let mut columns = Self::default();
        if commands.iter().all(|command| command.idempotency.is_none()) {
            return columns;
        }
        for command in commands {
            let key = command.idempotency.as_ref();
            columns.scopes.push(key.map(|key| key.scope.as_slice()));
            columns.keys.push(key.map(|key| key.key.as_slice()));
            columns.requests.push(key.map(|key| key.request.as_slice()));
            columns.answer_formats.push(key.map(|key| key.answer_format.as_i16()));
        }
        columns
    }
}

/// The events of a batch, a column each.
#[derive(Default)]
pub(crate) struct Events<'a> {
    pub ids: Vec<Uuid>,
    aggregate_types: Vec<&'a str>,
    aggregate_ids: Vec<&'a str>,
    pub event_types: Vec<&'a str>,
    pub schema_versions: Vec<i16>,
    pub correlation_ids: Vec<Uuid>,
    pub causation_ids: Vec<Uuid>,
    pub idempotency_key_hashes: Vec<Option<&'a [u8]>>,
    pub traceparents: Vec<Option<&'a str>>,
    pub data: Vec<&'a str>,
}

impl<'a> Events<'a> {
    pub fn of(commands: &'a [Arc<Command>]) -> Self {
        let mut columns = Self::default();
        for Command { append, .. } in commands.iter().map(AsRef::as_ref) {
            for event in &append.events {
                columns.ids.push(event.id.get());
                columns.aggregate_types.push(append.aggregate.kind().as_str());
                columns.aggregate_ids.push(append.aggregate.id());
                columns.event_types.push(event.event_type.as_str());
                columns.schema_versions.push(event.schema_version.as_i16());
                columns.correlation_ids.push(append.correlation_id);
                columns.causation_ids.push(append.causation_id);
                columns
                    .idempotency_key_hashes
                    .push(append.idempotency_key_hash.as_ref().map(<[u8; 32]>::as_slice));
                columns
                    .traceparents
                    .push(append.traceparent.as_ref().map(|traceparent| traceparent.as_str()));
                columns.data.push(&event.data);
            }
        }
        columns
    }
}

/// The answer to an append whose first event stands there.
pub(crate) fn appended(
    append: &Append,
    at: LogPosition,
    first_version: Version,
    committed_at: CommittedAt,
) -> Appended {
    Appended {
        epoch: at.epoch,
        first_version,
        first_position: at.position,
        committed_at,
        event_ids: append.events.iter().map(|event| event.id).collect(),
    }
}

fn database_error(error: &sqlx::Error) -> Option<&PgDatabaseError> {
    error.as_database_error().and_then(|error| error.try_downcast_ref())
}

/// Whether the server itself said that the transaction ended without a commit. A server that goes away
/// (`FATAL`) may have committed before, and so may one whose answer was lost.
pub(crate) fn was_rolled_back(error: &sqlx::Error) -> bool {
    const STATEMENT_COMPLETION_UNKNOWN: &str = "40003";
    database_error(error).is_some_and(|error| {
        error.severity() == PgSeverity::Error && error.code() != STATEMENT_COMPLETION_UNKNOWN
    })
}

/// Whether the error comes from what was appended and not from the state the database is in.
pub(crate) fn blames_the_append(error: &sqlx::Error) -> bool {
    const DATA_EXCEPTION: &str = "22";
    const INTEGRITY_CONSTRAINT_VIOLATION: &str = "23";
    database_error(error).is_some_and(|error| {
        let code = error.code();
        code.starts_with(DATA_EXCEPTION) || code.starts_with(INTEGRITY_CONSTRAINT_VIOLATION)
    })
}

/// Whether a command was judged in another epoch. Of a batch, only those that were are to be told.
pub(crate) fn is_epoch_over(error: &sqlx::Error) -> bool {
    database_error(error).is_some_and(|error| error.code() == EPOCH_OVER)
}

/// What the log says when it ends before a place where it was seen to end.
pub(crate) fn tail_lost(error: &sqlx::Error) -> Option<Refusal> {
    let error = database_error(error).filter(|error| error.code() == TAIL_LOST)?;
    Some(Refusal { kind: RefusalKind::TailLost, because: error.message().to_owned() })
}

/// What the caller is told when nothing was committed.
pub(crate) fn failure(error: sqlx::Error) -> AppendError {
    match database_error(&error) {
        Some(refusal) if [REFUSED, OTHER_LOG, TAIL_LOST].contains(&refusal.code()) => {
            AppendError::Refused { reason: refusal.message().to_owned() }
        }
        Some(_) if is_epoch_over(&error) => AppendError::EpochOver,
        Some(_) if blames_the_append(&error) => AppendError::Rejected(Arc::new(error)),
        Some(_) | None => AppendError::Unavailable(Arc::new(error)),
    }
}
