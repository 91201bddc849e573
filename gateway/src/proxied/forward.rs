//! Requests on a route that the primary region answers, with bodies that stream both ways.

use http::{HeaderValue, StatusCode};
use tokio::time::Instant;

use super::{Route, fault, headers, passed};
use crate::{
    answer::Answer,
    body::Body,
    error::Error,
    forward::{self, Fallback},
    gateway::Gateway,
    hop,
    request::{CONSISTENCY_POLICY, Call, PREFER},
    telemetry::Forwarded,
    token_carrier::CONSISTENCY_TOKEN,
    upstream::{ForwardError, Outgoing, Streamed, Upstream},
};

/// Asks the primary's service to write.
pub async fn write(
    gateway: &Gateway,
    upstream: &Upstream,
    route: &Route,
    call: &Call,
    body: Body,
) -> Result<Answer, Error> {
    let replied = exchange(gateway, upstream, call, body, None).await;
    match replied {
        Ok(streamed) => answer(gateway, route, streamed),
        Err(ForwardError::Body(broken)) => Err(fault(broken)),
        Err(error) if error.may_have_acted() => {
            Err(Error::OutcomeUnknown { source: Some(Box::new(error)) })
        }
        Err(error) => Err(Error::unreachable("the way to its region is cut or full", error)),
    }
}

/// Asks the primary to read. `policy` is what it does when it is not current either.
pub async fn read(
    gateway: &Gateway,
    upstream: &Upstream,
    route: &Route,
    call: &Call,
    policy: &'static str,
) -> Result<Answer, Fallback> {
    let body = Body::from(call.body.clone());
    let replied = exchange(gateway, upstream, call, body, Some(policy)).await;
    let streamed = replied.map_err(|error| {
        tracing::debug!(%error, request_id = &*call.id, "read not forwarded");
        Fallback::Failed
    })?;
    let said = forward::said(gateway, upstream, call, &streamed.headers);
    // Without it the gateway over there speaks, and not the service behind it.
    let helpless = streamed.status.is_server_error()
        || matches!(streamed.status, StatusCode::MISDIRECTED_REQUEST | StatusCode::NOT_FOUND);
    if said.is_none() && helpless {
        return Err(Fallback::Failed);
    }
    let took = streamed.took;
    let mut answer = answer(gateway, route, streamed).map_err(|_| Fallback::Failed)?;
    answer.said = said;
    answer.timing.forward = took;
    Ok(answer)
}

async fn exchange(
    gateway: &Gateway,
    upstream: &Upstream,
    call: &Call,
    body: Body,
    policy: Option<&'static str>,
) -> Result<Streamed, ForwardError> {
    let began = Instant::now();
    let mut headers = headers::outgoing(gateway, call);
    headers.extend(call.caller.header().map(|name| (hop::CALLER, name)));
    if let Some(policy) = policy {
        // What the caller wants done was decided here; there it would be decided twice.
        headers.remove(PREFER);
        headers.insert(CONSISTENCY_POLICY, HeaderValue::from_static(policy));
    }
    let outgoing = Outgoing {
        method: &call.method,
        path_and_query: call.path_and_query(),
        headers,
        body,
        deadline: call.deadline,
        // Only reads have a chain. A read by its path is one of any method, which may change something.
        only_reads: policy.is_some() && call.method.is_safe(),
    };
    let replied = upstream.forward_streamed(outgoing).await;
    let ended = if replied.is_ok() { Forwarded::Answered } else { Forwarded::Failed };
    gateway.instruments.forwarded(began.elapsed(), ended);
    if let Ok(Streamed { head: Some(head), .. }) = &replied {
        gateway.currency.saw_head(*head);
    }
    replied
}

/// The primary's answer as ours.
fn answer(gateway: &Gateway, route: &Route, streamed: Streamed) -> Result<Answer, Error> {
    let Streamed { status, version, headers, body, held, .. } = streamed;
    let shows = gateway.carrier.open_answer(&headers, &gateway.history());
    let body = passed(body, status, route.answer_bounds(), held)?;
    // When it says more than we can, it goes on as it is.
    let sealed = headers.get(CONSISTENCY_TOKEN).filter(|_| shows.is_none()).cloned();
    let mut passed_on = headers::answered(gateway, headers, version);
    passed_on.extend(sealed.map(|sealed| (CONSISTENCY_TOKEN, sealed)));
    Ok(Answer { headers: passed_on, body, shows, ..Answer::empty(status) })
}
