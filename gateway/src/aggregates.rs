//! Aggregates as the log has them: their state, and their events. Answered at the primary.

use consistency::{
    CommittedAt, Event, EventId, LogPosition, Name, Position, SchemaVersion, Version,
};
use event_store::{EventStore, ReadError};
use http::{StatusCode, header};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::value::RawValue;

use crate::{
    answer::{Answer, read_of},
    error::Error,
    fold::{self, Rules},
    forward,
    gateway::{Gateway, Role},
    openapi::terms,
    problem,
    request::{self, Call},
    status::{Outcome, Said},
    write,
};

/// The state of an aggregate, folded from all its events. Its bytes are passed on as they are: numbers
/// keep their digits.
#[derive(Serialize, JsonSchema)]
#[schemars(inline)]
pub struct StateBody<'a> {
    #[schemars(with = "terms::Name")]
    aggregate_type: &'a Name,
    #[schemars(with = "terms::AggregateId")]
    aggregate_id: &'a str,
    #[schemars(with = "terms::Version")]
    version: Version,
    #[schemars(with = "terms::Position")]
    position: Position,
    #[schemars(with = "terms::Anything")]
    state: &'a RawValue,
}

/// Events of an aggregate in the order of their versions.
#[derive(Serialize, JsonSchema)]
pub struct EventsBody<'a> {
    events: Vec<EventBody<'a>>,
    /// Where the next page begins; null at the end.
    #[schemars(with = "Option<terms::Version>")]
    next_from_version: Option<Version>,
}

/// An event as it was committed, of the schema that it had then.
#[derive(Serialize, JsonSchema)]
#[schemars(rename = "CommittedEvent")]
struct EventBody<'a> {
    #[schemars(with = "terms::Position")]
    position: Position,
    #[schemars(with = "terms::Version")]
    version: Version,
    #[schemars(with = "terms::EventId")]
    id: EventId,
    #[schemars(with = "terms::Name")]
    r#type: &'a Name,
    #[schemars(with = "terms::SchemaVersion")]
    schema_version: SchemaVersion,
    #[schemars(with = "i64")]
    committed_at_unix_micros: CommittedAt,
    #[schemars(with = "terms::Anything")]
    data: &'a RawValue,
}

/// Events of one page.
pub const EVENTS_MAX: u64 = 500;
/// The same when the caller does not say.
pub const EVENTS_DEFAULT: u64 = 100;

/// `GET /v1/aggregates/{type}/{id}`.
pub async fn state(gateway: &Gateway, call: &Call, kind: &str, id: &str) -> Result<Answer, Error> {
    call.only_parameters(&[])?;
    let aggregate = request::aggregate(kind, id)?;
    let store = match &gateway.role {
        Role::Region(upstream) => return forward::whole(gateway, upstream, call).await,
        Role::Primary(store) => store,
    };
    let definition = gateway.domain.aggregate(aggregate.kind().as_str()).ok_or(Error::NotFound)?;
    let reading = async {
        let head = head_for(store, call).await?;
        let rules = Rules::Aggregate(definition);
        let folded = fold::aggregate(gateway, store, &aggregate, rules).await;
        Ok((head, folded.map_err(fold::unfolded)?))
    };
    let (head, folded) = within(call, reading).await?;
    let at = if folded.version() == Version::ZERO { head } else { folded.at() };
    let state = definition.state_json(&folded).map_err(|e| Error::Internal(Box::new(e)))?;
    let tag = write::tag(folded.at(), folded.version());
    let answer = match state {
        None => problem::answer(&Error::NotFound, &gateway.config.region, &call.id),
        Some(_) if call.has_tag(&tag) => {
            Answer::empty(StatusCode::NOT_MODIFIED).with_header(header::ETAG, &tag)
        }
        Some(state) => {
            let body = StateBody {
                aggregate_type: aggregate.kind(),
                aggregate_id: aggregate.id(),
                version: folded.version(),
                position: folded.at().position,
                state: &state,
            };
            Answer::json(StatusCode::OK, &body).with_header(header::ETAG, &tag)
        }
    };
    Ok(answer.saying(said(gateway, call, at)).showing(read_of(at)))
}

/// `GET /v1/aggregates/{type}/{id}/events`.
pub async fn events(gateway: &Gateway, call: &Call, kind: &str, id: &str) -> Result<Answer, Error> {
    call.only_parameters(&["from_version", "limit"])?;
    let aggregate = request::aggregate(kind, id)?;
    let from = call.number("from_version")?.unwrap_or(1);
    let from = Version::new(from)
        .ok_or_else(|| Error::BadRequest("from_version is too large".to_owned()))?;
    let limit = call.number("limit")?.unwrap_or(EVENTS_DEFAULT);
    if !(1..=EVENTS_MAX).contains(&limit) {
        return Err(Error::BadRequest(format!("limit must be from 1 to {EVENTS_MAX}")));
    }
    let store = match &gateway.role {
        Role::Region(upstream) => return forward::whole(gateway, upstream, call).await,
        Role::Primary(store) => store,
    };
    let reading = async {
        let head = head_for(store, call).await?;
        let end = store.aggregate_head(&aggregate).await.map_err(unread)?.version;
        let events = store.read_aggregate(&aggregate, from, limit as u32).await;
        Ok((head, end, events.map_err(unread)?))
    };
    let (head, end, events) = within(call, reading).await?;
    // A page may be shorter than asked for when its events are large.
    let next = events.last().map(|last| last.version.next()).filter(|next| *next <= end);
    let at = events.last().map_or(head, |last| last.at);
    let listed = events.iter().map(shown).collect::<Result<Vec<_>, _>>();
    let listed = listed.map_err(|error| Error::Internal(Box::new(error)))?;
    let body = EventsBody { events: listed, next_from_version: next };
    let answer = Answer::json(StatusCode::OK, &body);
    Ok(answer.saying(said(gateway, call, at)).showing(read_of(at)))
}

fn shown(event: &Event) -> Result<EventBody<'_>, serde_json::Error> {
    Ok(EventBody {
        position: event.at.position,
        version: event.version,
        id: event.id,
        r#type: &event.event_type,
        schema_version: event.schema_version,
        committed_at_unix_micros: event.committed_at,
        data: serde_json::from_str(&event.data)?,
    })
}

/// The head before the read, which is what the absence of events shows. A token beyond it names what
/// this log does not have: nothing read here would be what its holder has seen.
async fn head_for(store: &EventStore, call: &Call) -> Result<LogPosition, Error> {
    let head = store.head().await.map_err(unread)?.at;
    let demand = LogPosition::new(call.token.epoch(), call.token.largest_position());
    if head < demand {
        let lag = crate::error::Lag {
            demand: Some(demand),
            applied: Some(head),
            ..crate::error::Lag::default()
        };
        return Err(Error::ReplicationPending(lag));
    }
    Ok(head)
}

fn unread(error: ReadError) -> Error {
    Error::unreachable("its log cannot be read", error)
}

async fn within<T>(
    call: &Call,
    reading: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let slow = || Error::PrimaryUnreachable { detail: "its log is slow", source: None };
    tokio::time::timeout_at(call.deadline, reading).await.unwrap_or_else(|_| Err(slow()))
}

fn said(gateway: &Gateway, call: &Call, at: LogPosition) -> Said {
    Said {
        outcome: Outcome::Primary,
        ms: u64::try_from(call.began.elapsed().as_millis()).unwrap_or(u64::MAX),
        region: gateway.config.region.clone(),
        at: Some(at),
        reason: None,
    }
}
