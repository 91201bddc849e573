//! Errors as `application/problem+json` (RFC 9457). The types are stable: clients branch on them.

mod kind;

use std::error::Error as _;

use bytes::Bytes;
use consistency::{Epoch, Name, Position, Token, Version};
use http::{HeaderMap, HeaderValue, header};
use schemars::JsonSchema;
use serde::Serialize;

pub use self::kind::Kind;
use crate::{
    answer::{Answer, read_of},
    error::{Challenge, Error, Lag},
    openapi::terms,
};

/// The type of every problem's body.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// The body of a problem. Members that mean nothing here are left out.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Problem {
    /// One of the stable types, as a path.
    r#type: String,
    /// The type in words.
    title: String,
    /// The status of the answer.
    #[schemars(range(min = 400, max = 599))]
    status: u16,
    /// What happened, for people.
    detail: String,
    /// Names the request in the gateway's logs.
    request_id: String,
    /// The version that an aggregate is at.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<terms::Version>")]
    version: Option<Version>,
    /// The rule that is broken.
    #[serde(skip_serializing_if = "Option::is_none")]
    rule: Option<&'static str>,
    #[serde(flatten)]
    lag: LagMembers,
}

/// What a caller who is too early is told, in a problem and in a 202 alike.
#[derive(Debug, Default, Serialize, JsonSchema)]
pub struct LagMembers {
    /// What was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<terms::Position>")]
    demand: Option<Position>,
    /// What is here.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<terms::Position>")]
    applied: Option<Position>,
    /// The epoch that positions and versions are of.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<terms::Epoch>")]
    epoch: Option<Epoch>,
    /// Events that lie between.
    #[serde(skip_serializing_if = "Option::is_none")]
    lag_events: Option<u64>,
    /// How far the region is behind, in milliseconds, as far as clocks tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    lag_ms: Option<u64>,
    /// When the region is expected to have caught up, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimate_ms: Option<u32>,
    /// When to come again, in milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_after_ms: Option<u32>,
    /// The region that says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<terms::Name>")]
    region: Option<Name>,
}

impl LagMembers {
    /// Of a region that is behind.
    pub fn of(lag: &Lag, region: &Name) -> Self {
        Self {
            demand: lag.demand.map(|at| at.position),
            applied: lag.applied.map(|at| at.position),
            epoch: lag.demand.map(|at| at.epoch),
            lag_events: lag.events(),
            lag_ms: lag.lag_ms,
            estimate_ms: lag.estimate_ms,
            retry_after_ms: Some(lag.retry_after_ms()),
            region: Some(region.clone()),
        }
    }
}

/// Answers an error: the one place where that is done. What went wrong inside is logged here, once;
/// the caller sees a type, a sentence and the request's id.
pub fn answer(error: &Error, region: &Name, request_id: &str) -> Answer {
    let kind = kind_of(error);
    let (status, name) = (kind.status(), kind.name());
    if status.is_server_error() {
        let cause = error.source().map(causes).unwrap_or_default();
        tracing::warn!(%error, cause, kind = name, request_id, "request failed");
    }
    let mut body = Problem {
        r#type: format!("/problems/{name}"),
        title: title(name),
        status: status.as_u16(),
        detail: error.to_string(),
        request_id: request_id.to_owned(),
        version: None,
        rule: None,
        lag: LagMembers::default(),
    };
    let mut headers = HeaderMap::new();
    members(error, region, &mut body, &mut headers);
    let body = serde_json::to_vec(&body).expect("a problem has text keys only");
    let mut answer = Answer::typed(status, PROBLEM_JSON, Bytes::from(body));
    answer.headers.extend(headers);
    answer.shows = shown(error);
    answer
}

const fn kind_of(error: &Error) -> Kind {
    match error {
        Error::BadRequest(_) => Kind::BadRequest,
        Error::InvalidToken(_) => Kind::InvalidToken,
        Error::TokenUnknownKey => Kind::TokenUnknownKey,
        Error::WriteLost { .. } => Kind::WriteLost,
        Error::Unauthorized(_) => Kind::Unauthorized,
        Error::AuthUnavailable => Kind::AuthUnavailable,
        Error::RateLimited { .. } => Kind::RateLimited,
        Error::NotFound => Kind::NotFound,
        Error::UnknownView(_) => Kind::UnknownView,
        Error::MethodNotAllowed(_) => Kind::MethodNotAllowed,
        Error::UnsupportedMediaType => Kind::UnsupportedMediaType,
        Error::TooLarge(_) => Kind::TooLarge,
        Error::VersionConflict { .. } => Kind::VersionConflict,
        Error::PreconditionRequired(_) => Kind::PreconditionRequired,
        Error::IdempotencyMismatch => Kind::IdempotencyMismatch,
        Error::RuleViolated { .. } => Kind::RuleViolated,
        Error::ReplicationPending(_) => Kind::ReplicationPending,
        Error::Parked(_) => Kind::Parked,
        Error::WaitersFull => Kind::WaitersFull,
        Error::Overloaded => Kind::Overloaded,
        Error::PrimaryUnreachable { .. } => Kind::PrimaryUnreachable,
        Error::NotPrimary => Kind::NotPrimary,
        Error::NotSupported(_) => Kind::NotSupported,
        Error::LoopDetected => Kind::LoopDetected,
        Error::UpstreamUnreachable { .. } => Kind::UpstreamUnreachable,
        Error::UpstreamAnswer(_) => Kind::UpstreamAnswer,
        Error::UpstreamTimeout => Kind::UpstreamTimeout,
        Error::OutcomeUnknown { .. } => Kind::OutcomeUnknown,
        Error::Internal(_) => Kind::Internal,
    }
}

fn title(kind: &str) -> String {
    let mut words = kind.replace('-', " ");
    if let Some(first) = words.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    words
}

fn members(error: &Error, region: &Name, body: &mut Problem, headers: &mut HeaderMap) {
    match error {
        Error::ReplicationPending(lag) | Error::Parked(lag) => {
            body.lag = LagMembers::of(lag, region);
            retry_after(lag.retry_after_ms(), headers);
        }
        Error::WaitersFull
        | Error::Overloaded
        | Error::AuthUnavailable
        | Error::PrimaryUnreachable { .. }
        | Error::UpstreamUnreachable { .. } => {
            body.lag.region = Some(region.clone());
            body.lag.retry_after_ms = Some(1000);
            retry_after(1000, headers);
        }
        Error::OutcomeUnknown { .. } => {
            body.lag.region = Some(region.clone());
            retry_after(1000, headers);
        }
        Error::VersionConflict { current, at } => {
            body.version = Some(*current);
            body.lag.epoch = Some(at.epoch);
            let etag = HeaderValue::from_str(&format!("\"{}.{current}\"", at.epoch));
            headers.extend(etag.ok().map(|etag| (header::ETAG, etag)));
        }
        Error::RuleViolated { rule, .. } => {
            body.rule = Some(rule);
        }
        Error::MethodNotAllowed(methods) => {
            headers.insert(header::ALLOW, HeaderValue::from_static(methods));
        }
        Error::RateLimited { retry_after_ms } => {
            body.lag.region = Some(region.clone());
            body.lag.retry_after_ms = Some(*retry_after_ms);
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
            body.lag.region = Some(region.clone());
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
