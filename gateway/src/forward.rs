//! Asking the primary on behalf of a caller: one hop, never two.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use process::trace::SpanKind;
use tokio::time::Instant;

use crate::{
    answer::Answer,
    body::Body,
    error::Error,
    gateway::Gateway,
    hop,
    request::{CONSISTENCY_POLICY, Call, IDEMPOTENCY_REPLAYED, PREFER, PREFERENCE_APPLIED},
    status::{Outcome, Said},
    telemetry::Forwarded,
    token_carrier::CONSISTENCY_TOKEN,
    trace,
    upstream::{ForwardError, Outgoing, Reply, Upstream, passed_on},
};

/// What an answer says of how it came to be.
pub const CONSISTENCY_STATUS: HeaderName = HeaderName::from_static("consistency-status");

/// Why a read has to go on to the next step of its chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Nobody could answer.
    Failed,
    /// An event could not be applied there either.
    Parked,
}

/// Asks the primary to read. `policy` is what the primary does when it is not current either.
pub async fn read(
    gateway: &Gateway,
    upstream: &Upstream,
    call: &Call,
    policy: &'static str,
) -> Result<Answer, Fallback> {
    let mut headers = outgoing_headers(gateway, call);
    // What the caller wants done was decided here; there it would be decided twice.
    headers.remove(PREFER);
    headers.insert(CONSISTENCY_POLICY, HeaderValue::from_static(policy));
    let replied = exchange(gateway, upstream, call, headers).await;
    let reply = replied.map_err(|error| {
        tracing::debug!(%error, request_id = &*call.id, "read not forwarded");
        Fallback::Failed
    })?;
    if reply.status.is_server_error() || reply.status == StatusCode::MISDIRECTED_REQUEST {
        let parked = problem_type(&reply).is_some_and(|kind| kind.ends_with("/parked"));
        return Err(if parked { Fallback::Parked } else { Fallback::Failed });
    }
    let said = said(gateway, upstream, call, &reply.headers);
    Ok(Answer { said, ..answer(gateway, reply) })
}

/// Asks the primary to write, or to read what only it has. A write is never sent twice.
pub async fn whole(gateway: &Gateway, upstream: &Upstream, call: &Call) -> Result<Answer, Error> {
    let headers = outgoing_headers(gateway, call);
    let is_safe = call.method.is_safe();
    match exchange(gateway, upstream, call, headers).await {
        Ok(reply) => {
            let said = said(gateway, upstream, call, &reply.headers);
            // Every write is done at the primary: a caller of this region is told that it was sent there.
            let said = said.map(|said| match is_safe {
                true => said,
                false => Said { outcome: Outcome::Forwarded, ..said },
            });
            Ok(Answer { said, ..answer(gateway, reply) })
        }
        Err(error) if error.may_have_acted() && !is_safe => {
            Err(Error::OutcomeUnknown { source: Some(Box::new(error)) })
        }
        Err(error) => Err(Error::unreachable("the way to its region is cut or full", error)),
    }
}

async fn exchange(
    gateway: &Gateway,
    upstream: &Upstream,
    call: &Call,
    mut headers: HeaderMap,
) -> Result<Reply, ForwardError> {
    let began = Instant::now();
    let mut span = trace::within(gateway, call, "forward", SpanKind::Client);
    trace::continued(&span, &mut headers);
    let outgoing = Outgoing {
        method: &call.method,
        path_and_query: call.path_and_query(),
        headers,
        body: Body::from(call.body.clone()),
        deadline: call.deadline,
        // Paths of ours write by no other methods.
        only_reads: call.method.is_safe(),
    };
    let replied = upstream.forward(outgoing).await;
    if replied.is_err() {
        span.fail("not answered");
    }
    let ended = if replied.is_ok() { Forwarded::Answered } else { Forwarded::Failed };
    gateway.instruments.forwarded(began.elapsed(), ended);
    if let Ok(Reply { head: Some(head), .. }) = &replied {
        gateway.currency.saw_head(*head);
    }
    replied
}

fn outgoing_headers(gateway: &Gateway, call: &Call) -> HeaderMap {
    let mut headers = passed_on(&call.headers);
    headers.insert(CONSISTENCY_TOKEN, gateway.carrier.header(&call.token));
    headers.extend(call.caller.header().map(|name| (hop::CALLER, name)));
    headers.insert(crate::request::REQUEST_ID, call.id.header());
    headers
}

/// The primary's answer as ours: its status and body, the headers that say something about the body,
/// and what it shows.
fn answer(gateway: &Gateway, reply: Reply) -> Answer {
    const KEPT: [HeaderName; 8] = [
        header::CONTENT_TYPE,
        header::ETAG,
        header::LOCATION,
        header::RETRY_AFTER,
        header::ALLOW,
        header::WWW_AUTHENTICATE,
        PREFERENCE_APPLIED,
        IDEMPOTENCY_REPLAYED,
    ];
    let mut answer = Answer::empty(reply.status);
    for name in KEPT {
        answer.headers.extend(reply.headers.get(&name).map(|value| (name, value.clone())));
    }
    answer.shows = gateway.carrier.open_answer(&reply.headers, &gateway.history());
    if answer.shows.is_none() {
        // Sealed by a key or in a format that is not known here yet. It says more than we can: it goes
        // on as it is, and is not replaced by one that would forget it.
        let sealed = reply.headers.get(CONSISTENCY_TOKEN);
        answer.headers.extend(sealed.map(|sealed| (CONSISTENCY_TOKEN, sealed.clone())));
    }
    answer.timing.forward = reply.took;
    answer.body = Body::from(reply.body);
    answer
}

/// Why an answer is not all that it could be.
const REASONS: [&str; 2] = ["behind", "parked"];

/// `stale`, `primary` and `unverified` stay what they are on the way, with why they are; all else was forwarded.
pub fn said(
    gateway: &Gateway,
    upstream: &Upstream,
    call: &Call,
    headers: &HeaderMap,
) -> Option<Said> {
    let there = headers.get(CONSISTENCY_STATUS)?.to_str().ok()?;
    let reason = there.split(';').find_map(|part| part.strip_prefix("reason="));
    let reason = reason.and_then(|said| REASONS.into_iter().find(|known| *known == said));
    let (outcome, reason) = match there.split(';').next() {
        Some("stale") => (Outcome::Stale, Some(reason.unwrap_or("parked"))),
        Some("primary") => (Outcome::Primary, None),
        Some("unverified") => (Outcome::Unverified, reason),
        Some(_) | None => (Outcome::Forwarded, None),
    };
    let position = there.split(';').find_map(|part| part.strip_prefix("position="));
    let epoch = gateway.history().current();
    let at = position
        .and_then(|position| position.parse().ok())
        .and_then(consistency::Position::new)
        .map(|position| consistency::LogPosition::new(epoch, position));
    let ms = u64::try_from(call.began.elapsed().as_millis()).unwrap_or(u64::MAX);
    Some(Said { outcome, ms, region: upstream.name().clone(), at, reason })
}

fn problem_type(reply: &Reply) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Problem {
        r#type: String,
    }
    serde_json::from_slice::<Problem>(&reply.body).ok().map(|problem| problem.r#type)
}
