//! Commands: the state of the aggregate is folded from the log, the domain decides on events, and
//! they are appended only if the aggregate has not moved meanwhile.

use consistency::{AggregateId, EventId, Version};
use event_store::{EventStore, Expected, Idempotency, NewEvent};
use http::{StatusCode, header};
use projection::{CommandError, Folded, NewEventData, Prepared};
use uuid::Uuid;

use super::{Written, appending, commit, demand_condition, once, said, tag};
use crate::{
    answer::{Answer, read_of},
    error::Error,
    fold::{self, Rules},
    forward,
    gateway::{Gateway, Role},
    request::{self, Call},
};

/// `POST /v1/commands/{Command}`.
pub async fn command(gateway: &Gateway, call: &Call, name: &str) -> Result<Answer, Error> {
    let name = request::decoded(name)?;
    let definition = gateway.domain.command(&name).ok_or(Error::NotFound)?;
    let store = match &gateway.role {
        Role::Region(upstream) => return forward::whole(gateway, upstream, call).await,
        Role::Primary(store) => store,
    };
    let asked = call.expected()?;
    let key = once::key(call)?;
    let body = call.json_body()?;
    // The rules would refuse the repeat of what they allowed.
    if let Some(answer) = once::answered(gateway, store, call, key.as_ref()).await? {
        return Ok(answer);
    }
    let nowhere = consistency::LogPosition::ORIGIN;
    let prepared = definition.prepare(body).map_err(|error| broken(error, nowhere))?;
    demand_condition(gateway, prepared.target(), asked)?;
    let without = match run(gateway, store, call, &prepared, (asked, key)).await {
        Ok(Ran::Appended(answer)) => return Ok(answer),
        Ok(Ran::Unchanged(answer)) => Ok(answer),
        Err(error @ (Error::RuleViolated { .. } | Error::VersionConflict { .. })) => Err(error),
        Err(error) => return Err(error),
    };
    // What stood in the way may be the first request under the key, committed after it was asked for.
    let repeated = once::answered(gateway, store, call, key.as_ref()).await?;
    repeated.map_or(without, Ok)
}

/// What a command came to that its rules allow.
enum Ran {
    /// There are new events, now or since the first request under the same key.
    Appended(Answer),
    /// There was nothing to be done.
    Unchanged(Answer),
}

/// Decides and appends, again and again while others are quicker.
async fn run(
    gateway: &Gateway,
    store: &EventStore,
    call: &Call,
    prepared: &Prepared,
    (asked, key): (Expected, Option<Idempotency>),
) -> Result<Ran, Error> {
    for _ in 0..gateway.config.write.command_attempts_max {
        let state = folded(gateway, store, call, prepared.target()).await?;
        meets(&state, asked)?;
        let events = decided(gateway, store, call, prepared, &state).await?;
        if events.is_empty() {
            let said = said(gateway, call, state.at());
            return Ok(Ran::Unchanged(unchanged(prepared.target(), &state).saying(said)));
        }
        let append = appending(prepared.target().clone(), at_version(&state), events);
        match commit(gateway, store, call, append, key).await {
            Ok(answer) => return Ok(Ran::Appended(answer)),
            // Somebody else was quicker. Decide again on what they made of it, unless the caller
            // named the version that it decided on itself.
            Err(Error::VersionConflict { .. }) if asked == Expected::Any => {}
            Err(error) => return Err(error),
        }
    }
    // The caller expects nothing of the aggregate, so there is no version to tell it of.
    Err(Error::Overloaded)
}

async fn decided(
    gateway: &Gateway,
    store: &EventStore,
    call: &Call,
    prepared: &Prepared,
    state: &Folded,
) -> Result<Vec<NewEvent>, Error> {
    let mut found = Vec::with_capacity(prepared.lookups().len());
    for aggregate in prepared.lookups() {
        found.push(folded(gateway, store, call, aggregate).await?);
    }
    let events = prepared.run(state, &found).map_err(|error| broken(error, state.at()))?;
    let new = |event: NewEventData| NewEvent {
        id: EventId::new(Uuid::now_v7()),
        event_type: event.event_type,
        schema_version: event.schema_version,
        data: event.data,
    };
    Ok(events.into_iter().map(new).collect())
}

async fn folded(
    gateway: &Gateway,
    store: &EventStore,
    call: &Call,
    aggregate: &AggregateId,
) -> Result<Folded, Error> {
    let definition = gateway.domain.aggregate(aggregate.kind().as_str()).ok_or(Error::NotFound)?;
    let folding = fold::aggregate(gateway, store, aggregate, Rules::Aggregate(definition));
    match tokio::time::timeout_at(call.deadline, folding).await {
        Ok(Ok(folded)) => Ok(folded),
        Ok(Err(error)) => Err(fold::unfolded(error)),
        Err(_) => Err(Error::PrimaryUnreachable { detail: "its log is slow", source: None }),
    }
}

/// What the caller expects of the aggregate is checked before its rules are, since the rules speak
/// of a state that the caller has not seen.
fn meets(state: &Folded, asked: Expected) -> Result<(), Error> {
    let met = match asked {
        Expected::Any => true,
        Expected::MustNotExist => state.version() == Version::ZERO,
        Expected::Last { epoch, version } => {
            state.version() == version && state.at().epoch == epoch
        }
    };
    let conflict = Error::VersionConflict { current: state.version(), at: state.at() };
    if met { Ok(()) } else { Err(conflict) }
}

fn at_version(state: &Folded) -> Expected {
    if state.version() == Version::ZERO {
        Expected::MustNotExist
    } else {
        Expected::Last { epoch: state.at().epoch, version: state.version() }
    }
}

fn broken(error: CommandError, at: consistency::LogPosition) -> Error {
    match error {
        CommandError::Malformed(detail) => Error::BadRequest(detail),
        CommandError::RuleViolated(rule) => {
            Error::RuleViolated { rule: rule.rule, detail: rule.detail, at }
        }
        error @ CommandError::Unwritable(_) => Error::Internal(Box::new(error)),
    }
}

/// The command found that there is nothing to be done.
fn unchanged(aggregate: &AggregateId, state: &Folded) -> Answer {
    let body = Written {
        aggregate_type: aggregate.kind(),
        aggregate_id: aggregate.id(),
        version: state.version(),
        position: state.at().position,
        events: Vec::new(),
    };
    Answer::json(StatusCode::OK, &body)
        .with_header(header::ETAG, &tag(state.at(), state.version()))
        .showing(read_of(state.at()))
}
