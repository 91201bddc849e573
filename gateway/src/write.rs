//! Writes: appended at the primary, forwarded from everywhere else.

mod command;
mod once;

use consistency::{
    AggregateId, Claim, EventId, LogPosition, Name, Position, SchemaVersion, Version,
};
use event_store::{
    Append, AppendError, Appended, EventStore, Expected, Idempotency, InvalidAppend, NewEvent, Once,
};
use http::{StatusCode, header};
use process::trace::SpanKind;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use crate::{
    answer::{Answer, claim_of},
    epochs,
    error::Error,
    forward,
    gateway::{Gateway, Role},
    openapi::terms,
    request::{self, Call},
    status::{Outcome, Said},
    trace,
};

pub use command::command;
pub use once::KEY_BYTES_MAX as IDEMPOTENCY_KEY_BYTES_MAX;

/// The body of an append.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
pub struct Body {
    events: Vec<BodyEvent>,
}

/// An event to be appended.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(inline)]
struct BodyEvent {
    #[schemars(with = "terms::Name")]
    r#type: Name,
    /// The first unless said.
    #[serde(default = "first")]
    #[schemars(with = "terms::SchemaVersion")]
    schema_version: SchemaVersion,
    #[schemars(with = "terms::Anything")]
    data: Box<RawValue>,
}

fn first() -> SchemaVersion {
    SchemaVersion::FIRST
}

/// `POST /v1/aggregates/{type}/{id}/events`.
pub async fn append(gateway: &Gateway, call: &Call, kind: &str, id: &str) -> Result<Answer, Error> {
    let aggregate = request::aggregate(kind, id)?;
    let store = match &gateway.role {
        Role::Region(upstream) => return forward::whole(gateway, upstream, call).await,
        Role::Primary(store) => store,
    };
    let key = once::key(call)?;
    let refused = match append_here(gateway, store, call, aggregate, key).await {
        // What its first request did is told also where nothing can be done now.
        Err(error @ (Error::PreconditionRequired(_) | Error::PrimaryUnreachable { .. })) => error,
        done => return done,
    };
    match once::answered(gateway, store, call, key.as_ref()).await {
        Ok(Some(first)) => Ok(first),
        Err(mismatch @ Error::IdempotencyMismatch) => Err(mismatch),
        Ok(None) | Err(_) => Err(refused),
    }
}

async fn append_here(
    gateway: &Gateway,
    store: &EventStore,
    call: &Call,
    aggregate: AggregateId,
    key: Option<Idempotency>,
) -> Result<Answer, Error> {
    let expected = call.expected()?;
    demand_condition(gateway, &aggregate, expected)?;
    let body: Body = serde_json::from_slice(call.json_body()?)
        .map_err(|error| Error::BadRequest(format!("the body is not an append: {error}")))?;
    let events = body.events.into_iter().map(|event| NewEvent {
        id: EventId::new(Uuid::now_v7()),
        event_type: event.r#type,
        schema_version: event.schema_version,
        data: String::from(Box::<str>::from(event.data)),
    });
    let append = appending(aggregate, expected, events.collect());
    commit(gateway, store, call, append, key).await
}

/// The append of a request: its ids and its trace.
fn appending(aggregate: AggregateId, expected: Expected, events: Vec<NewEvent>) -> Append {
    let request_id = Uuid::now_v7();
    Append {
        aggregate,
        expected,
        events,
        correlation_id: request_id,
        causation_id: request_id,
        idempotency_key_hash: None,
        traceparent: None,
    }
}

/// Refuses a write that does not say which version it is meant for, where it has to.
fn demand_condition(
    gateway: &Gateway,
    aggregate: &AggregateId,
    expected: Expected,
) -> Result<(), Error> {
    let required = gateway.config.write.if_match_required.contains(aggregate.kind());
    match expected {
        Expected::Any if required => Err(Error::PreconditionRequired(aggregate.kind().clone())),
        Expected::Any | Expected::MustNotExist | Expected::Last { .. } => Ok(()),
    }
}

/// Appends within the request's deadline, once if there is a key. An append that is not over by then
/// may yet be committed.
async fn commit(
    gateway: &Gateway,
    store: &EventStore,
    call: &Call,
    append: Append,
    key: Option<Idempotency>,
) -> Result<Answer, Error> {
    let aggregate = append.aggregate.clone();
    // What the caller wrote before may not be in an epoch that is opened meanwhile.
    let judged = call.token.epoch();
    let store = store.judged_in(judged);
    let span = trace::within(gateway, call, "append", SpanKind::Internal);
    // What becomes of the events in every region comes under their append.
    let append = Append { traceparent: trace::parent_of_events(&span, &call.headers), ..append };
    let appending = async {
        match key {
            None => store.append(append).await.map(Once::Appended),
            Some(key) => {
                let marked = Append { idempotency_key_hash: Some(once::mark(&key)), ..append };
                store.append_once(marked, key).await
            }
        }
    };
    let ended = tokio::time::timeout_at(call.deadline, appending).await;
    drop(span);
    let committed = match ended {
        Ok(Ok(Once::Repeated(repeat))) => return once::repeated(gateway, call, repeat),
        Ok(Ok(Once::Appended(appended))) if appended.epoch == judged => Ok(appended),
        // Carried into another epoch before its answer was looked up; a repeat is judged there.
        Ok(Ok(Once::Appended(_))) => Err(Error::OutcomeUnknown { source: None }),
        Ok(Err(AppendError::EpochOver)) => {
            if let Err(error) = epochs::learn(gateway, &store).await {
                tracing::debug!(%error, "epochs not read");
            }
            Err(refused(AppendError::EpochOver))
        }
        Ok(Err(error)) => Err(refused(error)),
        Err(_) => Err(Error::OutcomeUnknown { source: None }),
    };
    gateway.instruments.appended(match &committed {
        Ok(_) => "appended",
        Err(Error::VersionConflict { .. }) => "conflict",
        Err(_) => "failed",
    });
    let appended = committed?;
    gateway.currency.saw_head(appended.last_position());
    let at = appended.last_position();
    Ok(written(&aggregate, &appended).saying(said(gateway, call, at)))
}

/// A write is done at the primary, whoever asked for it.
fn said(gateway: &Gateway, call: &Call, at: LogPosition) -> Said {
    Said {
        outcome: Outcome::Primary,
        ms: u64::try_from(call.began.elapsed().as_millis()).unwrap_or(u64::MAX),
        region: gateway.config.region.clone(),
        at: Some(at),
        reason: None,
    }
}

fn refused(error: AppendError) -> Error {
    const LOG: &str = "its log takes no appends now";
    match error {
        AppendError::Invalid(
            invalid @ (InvalidAppend::TooLarge { .. } | InvalidAppend::TooLargeTogether { .. }),
        ) => Error::TooLarge(invalid.to_string()),
        AppendError::Invalid(
            invalid @ (InvalidAppend::NoEvents
            | InvalidAppend::TooManyEvents { .. }
            | InvalidAppend::RepeatedId { .. }
            | InvalidAppend::Data { .. }),
        ) => Error::BadRequest(invalid.to_string()),
        AppendError::Conflict { current, at } => Error::VersionConflict { current, at },
        AppendError::Overloaded => Error::Overloaded,
        error @ (AppendError::Stopping
        | AppendError::Refused { .. }
        | AppendError::EpochOver
        | AppendError::Unavailable(_)) => Error::unreachable(LOG, error),
        error @ AppendError::Rejected(_) => Error::Internal(Box::new(error)),
        error @ AppendError::OutcomeUnknown => {
            Error::OutcomeUnknown { source: Some(Box::new(error)) }
        }
    }
}

/// What was appended. A struct, because its members keep their order.
#[derive(Serialize, JsonSchema)]
pub struct Written<'a> {
    #[schemars(with = "terms::Name")]
    aggregate_type: &'a Name,
    #[schemars(with = "terms::AggregateId")]
    aggregate_id: &'a str,
    /// Of its last event.
    #[schemars(with = "terms::Version")]
    version: Version,
    /// Of its last event.
    #[schemars(with = "terms::Position")]
    position: Position,
    /// The new ones; none when a command found that there was nothing to be done.
    events: Vec<WrittenEvent<'a>>,
}

#[derive(Serialize, JsonSchema)]
struct WrittenEvent<'a> {
    #[schemars(with = "terms::Position")]
    position: Position,
    #[schemars(with = "terms::Version")]
    version: Version,
    #[schemars(with = "terms::EventId")]
    id: &'a EventId,
}

/// 201 for the first event of an aggregate, else 200.
///
/// These are the rules of [`AnswerFormat::FIRST`](event_store::AnswerFormat::FIRST): status, headers and
/// body are a pure function of what was appended, so a repeat is answered byte for byte like the first.
/// They are never changed; other ones get another format.
fn written(aggregate: &AggregateId, appended: &Appended) -> Answer {
    let version = appended.last_version();
    let at = appended.last_position();
    let events = (0u64..).zip(&appended.event_ids).map(|(nth, id)| WrittenEvent {
        position: appended.first_position.plus(nth),
        version: appended.first_version.plus(nth),
        id,
    });
    let body = Written {
        aggregate_type: aggregate.kind(),
        aggregate_id: aggregate.id(),
        version,
        position: at.position,
        events: events.collect(),
    };
    let is_new = appended.first_version == Version::ZERO.next();
    let answer = if is_new {
        let location = format!("/v1/aggregates/{}/{}", aggregate.kind(), aggregate.id());
        Answer::json(StatusCode::CREATED, &body).with_header(header::LOCATION, &location)
    } else {
        Answer::json(StatusCode::OK, &body)
    };
    let claim = Claim { aggregate: aggregate.key(), version, position: at.position };
    answer.with_header(header::ETAG, &tag(at, version)).showing(claim_of(at, claim))
}

/// The tag of an aggregate's state.
pub fn tag(at: LogPosition, version: Version) -> String {
    format!("\"{}.{version}\"", at.epoch)
}

#[cfg(test)]
mod tests {
    use consistency::{CommittedAt, Epoch};

    use super::*;

    #[test]
    fn the_first_answer_format_is_made_of_these_bytes() {
        let aggregate = AggregateId::new(Name::new("order").unwrap(), "o-1").unwrap();
        let appended = |first_version| Appended {
            epoch: Epoch::FIRST,
            first_version: Version::new(first_version).unwrap(),
            first_position: Position::new(41).unwrap(),
            committed_at: CommittedAt::from_unix_micros(0),
            event_ids: vec![EventId::new(Uuid::from_u128(1)), EventId::new(Uuid::from_u128(2))],
        };
        let first = written(&aggregate, &appended(1));
        assert_eq!(first.status, StatusCode::CREATED);
        assert_eq!(first.headers[header::LOCATION], "/v1/aggregates/order/o-1");
        assert_eq!(first.headers[header::ETAG], "\"1.2\"");
        let body = concat!(
            r#"{"aggregate_type":"order","aggregate_id":"o-1","version":2,"position":42,"events":["#,
            r#"{"position":41,"version":1,"id":"00000000-0000-0000-0000-000000000001"},"#,
            r#"{"position":42,"version":2,"id":"00000000-0000-0000-0000-000000000002"}]}"#,
        );
        assert_eq!(first.body.whole().unwrap(), body);
        let later = written(&aggregate, &appended(7));
        assert_eq!((later.status, later.headers.get(header::LOCATION)), (StatusCode::OK, None));
    }
}
