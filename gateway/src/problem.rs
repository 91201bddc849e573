//! Errors as `application/problem+json` (RFC 9457). The types are stable: clients branch on them.

use std::error::Error as _;

use bytes::Bytes;
use consistency::{Name, Token};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde_json::{Map, Value, json};

use crate::{
    answer::{Answer, read_of},
    error::{Challenge, Error, Lag},
};

/// Answers an error: the one place where that is done. What went wrong inside is logged here, once;
/// the caller sees a type, a sentence and the request's id.
pub fn answer(error: &Error, region: &Name, request_id: &str) -> Answer {
    let (status, kind) = status_and_type(error);
    if status.is_server_error() {
        let cause = error.source().map(causes).unwrap_or_default();
        tracing::warn!(%error, cause, kind, request_id, "request failed");
    }
    let mut body = Map::new();
    body.insert("type".into(), format!("/problems/{kind}").into());
    body.insert("title".into(), title(kind).into());
    body.insert("status".into(), status.as_u16().into());
    body.insert("detail".into(), error.to_string().into());
    body.insert("request_id".into(), request_id.into());
    let mut headers = HeaderMap::new();
    members(error, region, &mut body, &mut headers);
    let body = Bytes::from(Value::Object(body).to_string());
    let mut answer = Answer::typed(status, "application/problem+json", body);
    answer.headers.extend(headers);
    answer.shows = shown(error);
    answer
}

fn status_and_type(error: &Error) -> (StatusCode, &'static str) {
    match error {
        Error::BadRequest(_) => (StatusCode::BAD_REQUEST, "bad-request"),
        Error::InvalidToken(_) => (StatusCode::BAD_REQUEST, "invalid-token"),
        Error::TokenUnknownKey => (StatusCode::BAD_REQUEST, "token-unknown-key"),
        Error::WriteLost { .. } => (StatusCode::CONFLICT, "write-lost"),
        Error::Unauthorized(_) => (StatusCode::UNAUTHORIZED, "unauthorized"),
        Error::AuthUnavailable => (StatusCode::SERVICE_UNAVAILABLE, "auth-unavailable"),
        Error::RateLimited { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate-limited"),
        Error::NotFound => (StatusCode::NOT_FOUND, "not-found"),
        Error::UnknownView(_) => (StatusCode::NOT_FOUND, "unknown-view"),
        Error::MethodNotAllowed(_) => (StatusCode::METHOD_NOT_ALLOWED, "method-not-allowed"),
        Error::UnsupportedMediaType => {
            (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported-media-type")
        }
        Error::TooLarge(_) => (StatusCode::PAYLOAD_TOO_LARGE, "too-large"),
        Error::VersionConflict { .. } => (StatusCode::PRECONDITION_FAILED, "version-conflict"),
        Error::PreconditionRequired(_) => {
            (StatusCode::PRECONDITION_REQUIRED, "precondition-required")
        }
        Error::IdempotencyMismatch => (StatusCode::UNPROCESSABLE_ENTITY, "idempotency-mismatch"),
        Error::RuleViolated { .. } => (StatusCode::UNPROCESSABLE_ENTITY, "rule-violated"),
        Error::ReplicationPending(_) => (StatusCode::SERVICE_UNAVAILABLE, "replication-pending"),
        Error::Parked(_) => (StatusCode::SERVICE_UNAVAILABLE, "parked"),
        Error::WaitersFull => (StatusCode::SERVICE_UNAVAILABLE, "waiters-full"),
        Error::Overloaded => (StatusCode::SERVICE_UNAVAILABLE, "overloaded"),
        Error::PrimaryUnreachable { .. } => {
            (StatusCode::SERVICE_UNAVAILABLE, "primary-unreachable")
        }
        Error::NotPrimary => (StatusCode::MISDIRECTED_REQUEST, "not-primary"),
        Error::NotSupported(_) => (StatusCode::NOT_IMPLEMENTED, "not-supported"),
        Error::LoopDetected => (StatusCode::LOOP_DETECTED, "loop-detected"),
        Error::UpstreamUnreachable { .. } => (StatusCode::BAD_GATEWAY, "upstream-unreachable"),
        Error::UpstreamAnswer(_) => (StatusCode::BAD_GATEWAY, "upstream-answer"),
        Error::UpstreamTimeout => (StatusCode::GATEWAY_TIMEOUT, "upstream-timeout"),
        Error::OutcomeUnknown { .. } => (StatusCode::SERVICE_UNAVAILABLE, "outcome-unknown"),
        Error::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
    }
}

fn title(kind: &str) -> String {
    let mut words = kind.replace('-', " ");
    if let Some(first) = words.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    words
}

fn members(error: &Error, region: &Name, body: &mut Map<String, Value>, headers: &mut HeaderMap) {
    match error {
        Error::ReplicationPending(lag) | Error::Parked(lag) => {
            body.extend(lag_members(lag, region));
            retry_after(lag.retry_after_ms(), headers);
        }
        Error::WaitersFull
        | Error::Overloaded
        | Error::AuthUnavailable
        | Error::PrimaryUnreachable { .. }
        | Error::UpstreamUnreachable { .. } => {
            body.insert("region".into(), region.as_str().into());
            body.insert("retry_after_ms".into(), 1000.into());
            retry_after(1000, headers);
        }
        Error::OutcomeUnknown { .. } => {
            body.insert("region".into(), region.as_str().into());
            retry_after(1000, headers);
        }
        Error::VersionConflict { current, at } => {
            body.insert("version".into(), current.get().into());
            body.insert("epoch".into(), at.epoch.get().into());
            let etag = HeaderValue::from_str(&format!("\"{}.{current}\"", at.epoch));
            headers.extend(etag.ok().map(|etag| (header::ETAG, etag)));
        }
        Error::RuleViolated { rule, .. } => {
            body.insert("rule".into(), (*rule).into());
        }
        Error::MethodNotAllowed(methods) => {
            headers.insert(header::ALLOW, HeaderValue::from_static(methods));
        }
        Error::RateLimited { retry_after_ms } => {
            body.insert("region".into(), region.as_str().into());
            body.insert("retry_after_ms".into(), (*retry_after_ms).into());
            retry_after(*retry_after_ms, headers);
        }
        Error::Unauthorized(challenge) => {
            let asked = match challenge {
                Challenge::Bearer(None) => "Bearer realm=\"tidemark\"",
                Challenge::Bearer(Some(_)) => "Bearer realm=\"tidemark\", error=\"invalid_token\"",
                Challenge::Region | Challenge::Balancer => "Tidemark",
            };
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(asked));
        }
        Error::NotPrimary => {
            body.insert("region".into(), region.as_str().into());
        }
        Error::BadRequest(_)
        | Error::InvalidToken(_)
        | Error::TokenUnknownKey
        | Error::WriteLost { .. }
        | Error::NotFound
        | Error::UnknownView(_)
        | Error::UnsupportedMediaType
        | Error::TooLarge(_)
        | Error::PreconditionRequired(_)
        | Error::IdempotencyMismatch
        | Error::NotSupported(_)
        | Error::LoopDetected
        | Error::UpstreamAnswer(_)
        | Error::UpstreamTimeout
        | Error::Internal(_) => {}
    }
}

/// What a caller who is too early is told, in a problem and in a 202 alike.
pub fn lag_members(lag: &Lag, region: &Name) -> Map<String, Value> {
    let members = [
        ("demand", lag.demand.map(|at| json!(at.position))),
        ("applied", lag.applied.map(|at| json!(at.position))),
        ("epoch", lag.demand.map(|at| json!(at.epoch))),
        ("lag_events", lag.events().map(|events| json!(events))),
        ("lag_ms", lag.lag_ms.map(|ms| json!(ms))),
        ("estimate_ms", lag.estimate_ms.map(|ms| json!(ms))),
        ("retry_after_ms", Some(json!(lag.retry_after_ms()))),
        ("region", Some(json!(region))),
    ];
    let known = members.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    known.collect()
}

/// `Retry-After` has whole seconds; the body has the finer hint.
pub fn retry_after(ms: u32, headers: &mut HeaderMap) {
    headers.insert(header::RETRY_AFTER, HeaderValue::from(ms.div_ceil(1000).max(1)));
}

/// An error that shows state shows the aggregate's last position; others show nothing.
fn shown(error: &Error) -> Option<Token> {
    match error {
        Error::VersionConflict { at, .. } | Error::RuleViolated { at, .. } => Some(read_of(*at)),
        Error::WriteLost { fresh } => Some(fresh.clone()),
        Error::BadRequest(_)
        | Error::InvalidToken(_)
        | Error::TokenUnknownKey
        | Error::Unauthorized(_)
        | Error::AuthUnavailable
        | Error::RateLimited { .. }
        | Error::NotFound
        | Error::UnknownView(_)
        | Error::MethodNotAllowed(_)
        | Error::UnsupportedMediaType
        | Error::TooLarge(_)
        | Error::PreconditionRequired(_)
        | Error::IdempotencyMismatch
        | Error::ReplicationPending(_)
        | Error::Parked(_)
        | Error::WaitersFull
        | Error::Overloaded
        | Error::PrimaryUnreachable { .. }
        | Error::NotPrimary
        | Error::NotSupported(_)
        | Error::LoopDetected
        | Error::UpstreamUnreachable { .. }
        | Error::UpstreamAnswer(_)
        | Error::UpstreamTimeout
        | Error::OutcomeUnknown { .. }
        | Error::Internal(_) => None,
    }
}

fn causes(first: &(dyn std::error::Error + 'static)) -> String {
    let chain = std::iter::successors(Some(first), |error: &&(dyn std::error::Error + 'static)| {
        (*error).source()
    });
    chain.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}
