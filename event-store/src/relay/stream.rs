//! The epoch's stream: created when it is not there, and compared with the log before anything is
//! published to it.

use std::time::Duration;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{
    Context, GetStreamErrorKind, UpdateStreamError, UpdateStreamErrorKind,
};
use async_nats::jetstream::stream::{
    Compression, Config, DiscardPolicy, LastRawMessageErrorKind, RetentionPolicy, StorageType,
    Stream,
};
use consistency::{Epoch, EventId, LogPosition, MESSAGE_ID_HEADER, Position, stream_name};
use uuid::Uuid;

use super::session::SessionError;
use crate::RelayConfig;
use crate::refusal::{Refusal, RefusalKind};

/// Positions are what keeps doubles out; remembering ids for longer costs memory for nothing.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(1);

/// An epoch of the log and the last position that it kept of its past.
#[derive(Debug, Clone, Copy)]
pub(super) struct Incarnation {
    pub epoch: Epoch,
    pub starts_after: Position,
}

/// Where a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StreamEnd {
    pub sequence: u64,
    /// Id of the last message; `None` when the stream has no message left. A message without a proper
    /// id is not one of ours and shows as the nil id.
    pub event_id: Option<EventId>,
}

/// What is to be done with a stream that ends there.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    /// Publish what the log has after this position, whose event has this id.
    Continue(LogPosition, EventId),
    /// The log lost its tail, or somebody else published: an operator has to look.
    Contradiction(Refusal),
}

/// Compares the end of the stream with the end of the log, read later, and with the id of the log's
/// event at the stream's last sequence ([`EventId::NIL`] at position zero).
pub(super) fn compare(
    end: StreamEnd,
    incarnation: Incarnation,
    head: LogPosition,
    id_in_log: Option<EventId>,
) -> Comparison {
    let name = stream_name(incarnation.epoch);
    let sequence = end.sequence;
    let Some(position) = Position::new(sequence).filter(|position| *position <= head.position)
    else {
        return Comparison::Contradiction(Refusal {
            kind: RefusalKind::StreamAhead,
            because: format!(
                "stream {name} ends at {sequence}, ahead of the log, which ends at {head}"
            ),
        });
    };
    if position < incarnation.starts_after {
        let start = incarnation.starts_after;
        return Comparison::Contradiction(Refusal {
            kind: RefusalKind::StreamDifferent,
            because: format!(
                "stream {name} ends at {sequence}, before its epoch, which starts after {start}"
            ),
        });
    }
    let Some(in_log) = id_in_log else {
        return Comparison::Contradiction(Refusal {
            kind: RefusalKind::StreamAhead,
            because: format!("the log has no event at {sequence}, where {name} ends"),
        });
    };
    match end.event_id {
        Some(on_stream) if on_stream != in_log => {
            Comparison::Contradiction(different(incarnation.epoch, sequence, on_stream, in_log))
        }
        Some(_) | None => {
            Comparison::Continue(LogPosition::new(incarnation.epoch, position), in_log)
        }
    }
}

/// The epoch's stream, if there is one.
pub(super) async fn find(context: &Context, epoch: Epoch) -> Result<Option<Stream>, SessionError> {
    match context.get_stream(stream_name(epoch)).await {
        Ok(stream) => Ok(Some(stream)),
        Err(error) if is_not_found(&error.kind()) => Ok(None),
        Err(error) => Err(SessionError::stream(error)),
    }
}

/// Creates the epoch's stream.
pub(super) async fn create(
    context: &Context,
    incarnation: Incarnation,
    config: &RelayConfig,
) -> Result<Stream, SessionError> {
    let wanted = stream_config(incarnation, config);
    tracing::info!(stream = wanted.name, "creating the stream");
    context.create_stream(wanted).await.map_err(SessionError::stream)
}

/// Takes the events' subjects from the stream of an epoch that is over, since two streams cannot share
/// them. Its messages stay for those who still read them; nobody may publish to what it gets instead.
pub(super) async fn retire(context: &Context, stream: &Stream) -> Result<(), SessionError> {
    let found = &stream.cached_info().config;
    let subjects = vec![format!("retired.{}.>", found.name)];
    if found.subjects == subjects {
        return Ok(());
    }
    tracing::info!(stream = found.name, "retiring the stream");
    let retired = Config { subjects, ..found.clone() };
    context.update_stream(retired).await.map_err(SessionError::stream)?;
    Ok(())
}

/// Where the stream ends now.
pub(super) async fn end(stream: &Stream) -> Result<StreamEnd, SessionError> {
    let state = stream.get_info().await.map_err(SessionError::stream)?.state;
    let sequence = state.last_sequence;
    if state.messages == 0 {
        return Ok(StreamEnd { sequence, event_id: None });
    }
    let event_id = id_at(stream, sequence).await?;
    let event_id =
        event_id.ok_or(SessionError::LostPlace("the stream shrank while it was read"))?;
    Ok(StreamEnd { sequence, event_id: Some(event_id) })
}

/// Id of the message under a sequence, nil when it is not one of ours; `None` when there is no such
/// message, or none any more.
pub(super) async fn id_at(stream: &Stream, sequence: u64) -> Result<Option<EventId>, SessionError> {
    let message = match stream.get_raw_message(sequence).await {
        Ok(message) => message,
        Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => return Ok(None),
        Err(error) => return Err(SessionError::stream(error)),
    };
    let id = message.headers.get(MESSAGE_ID_HEADER);
    let id = id.and_then(|id| id.as_str().parse::<Uuid>().ok());
    Ok(Some(id.map_or(EventId::NIL, EventId::new)))
}

/// Says that stream and log hold different events in one place.
pub(super) fn different(
    epoch: Epoch,
    sequence: u64,
    on_stream: EventId,
    in_log: EventId,
) -> Refusal {
    let name = stream_name(epoch);
    Refusal {
        kind: RefusalKind::StreamDifferent,
        because: format!("stream {name} has event {on_stream} at {sequence}, the log has {in_log}"),
    }
}

fn stream_config(incarnation: Incarnation, config: &RelayConfig) -> Config {
    let bytes_max = config.stream_bytes_max.and_then(|bytes| i64::try_from(bytes).ok());
    Config {
        name: stream_name(incarnation.epoch),
        subjects: vec!["events.>".to_owned()],
        retention: RetentionPolicy::Limits,
        discard: DiscardPolicy::Old,
        max_age: config.stream_age_max,
        max_bytes: bytes_max.unwrap_or(-1),
        storage: StorageType::File,
        compression: Some(Compression::S2),
        num_replicas: config.stream_replica_count,
        duplicate_window: DUPLICATE_WINDOW,
        // A hole in the stream is a hole in every region.
        deny_delete: true,
        deny_purge: true,
        first_sequence: Some(incarnation.starts_after.next().get()),
        ..Config::default()
    }
}

/// Has an existing stream kept as it is configured now: age, size, copies, compression, and that nothing is
/// deleted. The rest of a stream is fixed with its creation. A server that refuses (it has too few peers for
/// so many copies, say) is no reason to publish nothing.
pub(super) async fn adopt_retention(
    context: &Context,
    stream: &Stream,
    incarnation: Incarnation,
    config: &RelayConfig,
) -> Result<(), SessionError> {
    let wanted = stream_config(incarnation, config);
    let found = &stream.cached_info().config;
    let updated = Config {
        max_age: wanted.max_age,
        max_bytes: wanted.max_bytes,
        num_replicas: wanted.num_replicas,
        compression: wanted.compression.clone(),
        discard: wanted.discard,
        duplicate_window: wanted.duplicate_window,
        deny_delete: wanted.deny_delete,
        deny_purge: wanted.deny_purge,
        ..found.clone()
    };
    if updated == *found {
        return Ok(());
    }
    tracing::info!(stream = found.name, "changing how the stream keeps events");
    match context.update_stream(updated).await {
        Ok(_) => Ok(()),
        Err(error) if is_refused(&error) => {
            tracing::error!(%error, stream = found.name, "the stream keeps events as before");
            Ok(())
        }
        Err(error) => Err(SessionError::stream(error)),
    }
}

/// The server answered, and the answer is no.
fn is_refused(error: &UpdateStreamError) -> bool {
    matches!(error.kind(), UpdateStreamErrorKind::JetStream(_))
}

fn is_not_found(kind: &GetStreamErrorKind) -> bool {
    matches!(
        kind,
        GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const IN_LOG: EventId = EventId::new(Uuid::from_u128(1));
    const OTHER: EventId = EventId::new(Uuid::from_u128(2));

    fn compared(sequence: u64, event_id: Option<EventId>, head: u64) -> Comparison {
        let starts_after = Position::new(5).unwrap();
        let incarnation = Incarnation { epoch: Epoch::FIRST, starts_after };
        let head = LogPosition::new(Epoch::FIRST, Position::new(head).unwrap());
        let id_in_log = (sequence <= head.position.get()).then_some(IN_LOG);
        compare(StreamEnd { sequence, event_id }, incarnation, head, id_in_log)
    }

    #[test]
    fn a_stream_that_ends_with_the_logs_event_is_continued() {
        let at = LogPosition::new(Epoch::FIRST, Position::new(7).unwrap());
        assert_eq!(compared(7, Some(IN_LOG), 7), Comparison::Continue(at, IN_LOG));
        assert_eq!(compared(7, Some(IN_LOG), 9), Comparison::Continue(at, IN_LOG));
        assert_eq!(compared(7, None, 9), Comparison::Continue(at, IN_LOG), "its events aged");
    }

    #[test]
    fn a_stream_that_the_log_cannot_have_made_is_a_contradiction() {
        for (sequence, event_id, head) in [
            (8, Some(IN_LOG), 7),
            (8, None, 7),
            (7, Some(OTHER), 7),
            (7, Some(OTHER), 9),
            (7, Some(EventId::NIL), 9),
            (4, None, 9),
            (u64::MAX, None, 9),
        ] {
            let comparison = compared(sequence, event_id, head);
            assert!(matches!(comparison, Comparison::Contradiction(_)), "{comparison:?}");
        }
    }
}
