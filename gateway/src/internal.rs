//! What regions read at the primary: the log itself, and its epochs.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use consistency::{AggregateId, Epoch, Event, Name, Position, Version};
use event_store::EventStore;
use http::StatusCode;
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use crate::{
    answer::Answer,
    error::{Challenge, Error},
    gateway::{Gateway, Role},
    hop,
    log_stream::{self, Stretch},
    request::{Call, decoded},
};

/// Events of one page.
pub const EVENTS_MAX: u64 = 5_000;
/// The same when the region does not say.
pub const EVENTS_DEFAULT: u64 = 1_000;
/// The media type of events, one a line.
pub const LINES: &str = "application/x-ndjson";
/// A page ends early when it has so many bytes; its reader asks again from where it ended.
const PAGE_BYTES_MAX: usize = 32 * 1024 * 1024;

#[derive(Serialize)]
struct Line<'a> {
    headers: BTreeMap<&'static str, String>,
    data: &'a str,
}

/// `GET /internal/log?epoch=&after=&limit=`: one event a line, in position order. Of an epoch that is over,
/// what every later one kept. Streamed to who accepts the compact form; a plain page to everybody else.
pub async fn log(gateway: &Gateway, call: &Call) -> Result<Answer, Error> {
    let store = trusted_store(gateway, call)?;
    let after = Position::new(call.number("after")?.unwrap_or(0));
    let after = after.ok_or_else(|| Error::BadRequest("after is too large".to_owned()))?;
    let limit = call.number("limit")?.unwrap_or(EVENTS_DEFAULT).clamp(1, EVENTS_MAX);
    let unread = |error| Error::unreachable("its log cannot be read", error);
    let epoch = epoch_asked(call, store.head().await.map_err(unread)?.at.epoch)?;
    if log_stream::is_asked_for(&call.headers) {
        let stretch = Stretch {
            store: store.clone(),
            rate: Arc::clone(&gateway.log_rate),
            region: region(call),
            epoch,
            after,
            left: limit as u32,
            deadline: call.deadline,
        };
        return stretch.answer().await;
    }
    let events = store.read_range(after, limit as u32).await.map_err(unread)?;
    paced(gateway, call, page(epoch, &events)?).await
}

/// `GET /internal/log/{type}/{id}?epoch=&from_version=&limit=`: events of one aggregate, one a line, in
/// the order of their versions.
pub async fn aggregate(
    gateway: &Gateway,
    call: &Call,
    kind: &str,
    id: &str,
) -> Result<Answer, Error> {
    let store = trusted_store(gateway, call)?;
    let malformed = |error| Error::BadRequest(format!("the aggregate {error}"));
    let kind = Name::new(decoded(kind)?).map_err(malformed)?;
    let aggregate = AggregateId::new(kind, decoded(id)?).map_err(malformed)?;
    let from = Version::new(call.number("from_version")?.unwrap_or(1));
    let from = from.ok_or_else(|| Error::BadRequest("from_version is too large".to_owned()))?;
    let limit = call.number("limit")?.unwrap_or(EVENTS_DEFAULT).clamp(1, EVENTS_MAX);
    let unread = |error| Error::unreachable("its log cannot be read", error);
    let epoch = epoch_asked(call, store.head().await.map_err(unread)?.at.epoch)?;
    let events = store.read_aggregate(&aggregate, from, limit as u32).await.map_err(unread)?;
    paced(gateway, call, page(epoch, &events)?).await
}

/// The region that asks, as it calls itself.
fn region(call: &Call) -> String {
    let named = call.headers.get(hop::REGION).and_then(|region| region.to_str().ok());
    named.unwrap_or_default().to_owned()
}

/// Holds a page back until its region may have it.
async fn paced(gateway: &Gateway, call: &Call, page: Answer) -> Result<Answer, Error> {
    let bytes = page.body.whole().map_or(0, Bytes::len);
    let ready = gateway.log_rate.take(&region(call), bytes, Instant::now(), call.deadline);
    sleep_until(ready.ok_or(Error::Overloaded)?).await;
    Ok(page)
}

/// What a later epoch took over bears its number: it may stand where another event was in this one.
fn page(epoch: Epoch, events: &[Event]) -> Result<Answer, Error> {
    let mut page = Vec::new();
    for event in events.iter().filter(|event| event.at.epoch <= epoch) {
        if PAGE_BYTES_MAX < page.len() {
            break;
        }
        page.extend(line(event)?);
    }
    Ok(Answer::typed(StatusCode::OK, LINES, Bytes::from(page)))
}

/// The epoch that is asked for, the newest unless said. One that is not known here was opened elsewhere.
fn epoch_asked(call: &Call, newest: Epoch) -> Result<Epoch, Error> {
    let Some(asked) = call.number("epoch")? else { return Ok(newest) };
    let asked = u32::try_from(asked).ok().and_then(Epoch::new).filter(|asked| *asked <= newest);
    asked.ok_or_else(|| Error::BadRequest(format!("the log is in epoch {newest}")))
}

/// `GET /internal/epochs`: every epoch after the first, with the last position that it kept.
pub async fn epochs(gateway: &Gateway, call: &Call) -> Result<Answer, Error> {
    let store = trusted_store(gateway, call)?;
    let unread = |error| Error::unreachable("its log cannot be read", error);
    store.head().await.map_err(unread)?;
    let history = store.epochs().await.map_err(unread)?;
    gateway.learn_history(history.clone());
    Ok(Answer::json(StatusCode::OK, &history.starts()))
}

fn trusted_store<'a>(gateway: &'a Gateway, call: &Call) -> Result<&'a EventStore, Error> {
    if !call.trusted {
        return Err(Error::Unauthorized(Challenge::Region));
    }
    match &gateway.role {
        Role::Primary(store) => Ok(store),
        Role::Region(_) => Err(Error::NotPrimary),
    }
}

fn line(event: &Event) -> Result<Vec<u8>, Error> {
    let line = Line { headers: event.headers().into_iter().collect(), data: &event.data };
    let mut bytes = serde_json::to_vec(&line).map_err(|error| Error::Internal(Box::new(error)))?;
    bytes.push(b'\n');
    Ok(bytes)
}
