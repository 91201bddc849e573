//! Writes: appended at the primary, forwarded from everywhere else.

mod command;

use consistency::{
    AggregateId, Claim, EventId, LogPosition, Name, SchemaVersion, Traceparent, Version,
};
use event_store::{Append, AppendError, Appended, EventStore, Expected, InvalidAppend, NewEvent};
use http::{HeaderName, StatusCode, header};
use serde::Deserialize;
use serde_json::{json, value::RawValue};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::{
    answer::{Answer, claim_of},
    error::Error,
    forward,
    gateway::{Gateway, Role},
    request::{self, Call, IDEMPOTENCY_KEY},
};

pub use command::command;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const IDEMPOTENCY_KEY_BYTES_MAX: usize = 255;

/// The body of an append.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    events: Vec<BodyEvent>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct BodyEvent {
    r#type: Name,
    #[serde(default = "first")]
    schema_version: SchemaVersion,
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
    let expected = call.expected()?;
    let body: Body = serde_json::from_slice(call.json_body()?)
        .map_err(|error| Error::BadRequest(format!("the body is not an append: {error}")))?;
    let events = body.events.into_iter().map(|event| NewEvent {
        id: EventId::new(Uuid::now_v7()),
        event_type: event.r#type,
        schema_version: event.schema_version,
        data: String::from(Box::<str>::from(event.data)),
    });
    let append = appending(call, aggregate.clone(), expected, events.collect())?;
    let appended = commit(gateway, store, call, append).await?;
    Ok(written(&aggregate, &appended))
}

/// The append of a request: its ids, its trace and the hash of its key.
fn appending(
    call: &Call,
    aggregate: AggregateId,
    expected: Expected,
    events: Vec<NewEvent>,
) -> Result<Append, Error> {
    let traceparent = call.headers.get(TRACEPARENT).and_then(|value| value.to_str().ok());
    let request_id = Uuid::now_v7();
    Ok(Append {
        aggregate,
        expected,
        events,
        correlation_id: request_id,
        causation_id: request_id,
        idempotency_key_hash: idempotency_key_hash(call)?,
        traceparent: traceparent.and_then(Traceparent::parse),
    })
}

/// Scoped by method and path: the same key on another path is another key.
fn idempotency_key_hash(call: &Call) -> Result<Option<[u8; 32]>, Error> {
    let Some(key) = call.headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    if key.is_empty() || IDEMPOTENCY_KEY_BYTES_MAX < key.len() {
        let said = format!("Idempotency-Key has 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes");
        return Err(Error::BadRequest(said));
    }
    let mut hash = Sha256::new();
    for part in [call.method.as_str().as_bytes(), call.path.as_bytes(), key.as_bytes()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    Ok(Some(hash.finalize().into()))
}

/// Appends within the request's deadline. An append that is not over by then may yet be committed.
async fn commit(
    gateway: &Gateway,
    store: &EventStore,
    call: &Call,
    append: Append,
) -> Result<Appended, Error> {
    let committed = match tokio::time::timeout_at(call.deadline, store.append(append)).await {
        Ok(Ok(appended)) => Ok(appended),
        Ok(Err(error)) => Err(refused(error)),
        Err(_) => Err(Error::OutcomeUnknown { source: None }),
    };
    gateway.instruments.appended(match &committed {
        Ok(_) => "appended",
        Err(Error::VersionConflict { .. }) => "conflict",
        Err(_) => "failed",
    });
    if let Ok(appended) = &committed {
        gateway.currency.saw_head(appended.last_position());
    }
    committed
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
        | AppendError::Unavailable(_)) => Error::unreachable(LOG, error),
        error @ AppendError::Rejected(_) => Error::Internal(Box::new(error)),
        error @ AppendError::OutcomeUnknown => {
            Error::OutcomeUnknown { source: Some(Box::new(error)) }
        }
    }
}

/// 201 for the first event of an aggregate, else 200.
fn written(aggregate: &AggregateId, appended: &Appended) -> Answer {
    let version = appended.last_version();
    let at = appended.last_position();
    let events = (0u64..).zip(&appended.event_ids).map(|(nth, id)| {
        json!({
            "position": appended.first_position.plus(nth),
            "version": appended.first_version.plus(nth),
            "id": id,
        })
    });
    let body = json!({
        "aggregate_type": aggregate.kind(),
        "aggregate_id": aggregate.id(),
        "version": version,
        "position": at.position,
        "events": events.collect::<Vec<_>>(),
    });
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
