//! The epoch's stream: created when it is not there, and compared with the log before anything is
//! published to it.

use std::time::Duration;

use async_nats::jetstream::context::{Context, GetStreamErrorKind};
use async_nats::jetstream::stream::{
    Compression, Config, DiscardPolicy, RetentionPolicy, StorageType, Stream,
};
use async_nats::jetstream::{ErrorCode, stream};
use consistency::{Epoch, EventId, LogPosition, MESSAGE_ID_HEADER, Position, stream_name};
use uuid::Uuid;

use super::session::SessionError;
use crate::RelayConfig;

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
    Contradiction(String),
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
    let contradiction = |text: String| Comparison::Contradiction(text);
    let Some(position) = Position::new(sequence).filter(|position| *position <= head.position)
    else {
        return contradiction(format!(
            "stream {name} ends at {sequence}, ahead of the log, which ends at {head}"
        ));
    };
    if position < incarnation.starts_after {
        let start = incarnation.starts_after;
        return contradiction(format!(
            "stream {name} ends at {sequence}, before its epoch, which starts after {start}"
        ));
    }
    let Some(in_log) = id_in_log else {
        return contradiction(format!("the log has no event at {sequence}, where {name} ends"));
    };
    match end.event_id {
        Some(on_stream) if on_stream != in_log => contradiction(format!(
            "stream {name} has event {on_stream} at {sequence}, the log has {in_log}"
        )),
        Some(_) | None => {
            Comparison::Continue(LogPosition::new(incarnation.epoch, position), in_log)
        }
    }
}

/// The epoch's stream, with the configured retention.
pub(super) async fn ensure(
    context: &Context,
    incarnation: Incarnation,
    config: &RelayConfig,
) -> Result<Stream, SessionError> {
    let wanted = stream_config(incarnation, config);
    match context.get_stream(&wanted.name).await {
        Ok(stream) => {
            adopt_retention(context, &stream, &wanted).await?;
            Ok(stream)
        }
        Err(error) if is_not_found(&error.kind()) => {
            tracing::info!(stream = wanted.name, "creating the stream");
            context.create_stream(wanted).await.map_err(SessionError::stream)
        }
        Err(error) => Err(SessionError::stream(error)),
    }
}

/// Where the stream ends now.
pub(super) async fn end(stream: &Stream) -> Result<StreamEnd, SessionError> {
    let state = stream.get_info().await.map_err(SessionError::stream)?.state;
    let sequence = state.last_sequence;
    if state.messages == 0 {
        return Ok(StreamEnd { sequence, event_id: None });
    }
    let last = stream.get_raw_message(sequence).await.map_err(SessionError::stream)?;
    let id = last.headers.get(MESSAGE_ID_HEADER).and_then(|id| id.as_str().parse::<Uuid>().ok());
    Ok(StreamEnd { sequence, event_id: Some(id.map_or(EventId::NIL, EventId::new)) })
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

/// Age and size are the operator's to change; the rest of a stream is fixed with its creation.
async fn adopt_retention(
    context: &Context,
    stream: &Stream,
    wanted: &Config,
) -> Result<(), SessionError> {
    let found = &stream.cached_info().config;
    if found.max_age == wanted.max_age && found.max_bytes == wanted.max_bytes {
        return Ok(());
    }
    let updated =
        stream::Config { max_age: wanted.max_age, max_bytes: wanted.max_bytes, ..found.clone() };
    context.update_stream(updated).await.map_err(SessionError::stream)?;
    Ok(())
}

fn is_not_found(kind: &GetStreamErrorKind) -> bool {
    matches!(
        kind,
        GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND
    )
}
