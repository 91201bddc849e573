//! Which problems an operation can come to.

use std::collections::BTreeMap;

use http::StatusCode;
use serde_json::{Value, json};

use super::{field::headers, operation::Facets};
use crate::{
    config::{AuthMode, GatewayConfig},
    problem::{Kind, PROBLEM_JSON},
};

/// Whether an operation with these facets can come to it.
fn arises(kind: Kind, facets: Facets, config: &GatewayConfig) -> bool {
    let Facets { waits, may_be_absent, takes_body, writes, commands, at_primary, .. } = facets;
    let Facets { listens, within, proxied, kept, .. } = facets;
    let callers_are_known = config.auth.mode != AuthMode::None;
    match kind {
        // Whatever is asked for: the token and the headers are looked at first.
        Kind::BadRequest
        | Kind::InvalidToken
        | Kind::TokenUnknownKey
        | Kind::WriteLost
        | Kind::Overloaded
        | Kind::NotSupported
        | Kind::Internal => true,
        Kind::Unauthorized => callers_are_known || within,
        Kind::AuthUnavailable => config.auth.mode == AuthMode::Jwt,
        Kind::RateLimited => config.rate_limit.is_some() || waits && callers_are_known,
        Kind::NotFound => may_be_absent,
        Kind::UnknownView => listens,
        // Of an operation that is described the path takes the method.
        Kind::MethodNotAllowed => false,
        // Of a row when it is to have a version that its aggregate has not.
        Kind::VersionConflict => writes || kept,
        Kind::UnsupportedMediaType | Kind::PreconditionRequired | Kind::IdempotencyMismatch => {
            writes
        }
        Kind::TooLarge => takes_body,
        Kind::RuleViolated => commands,
        Kind::ReplicationPending => waits,
        // What is folded from the log meets the event that could not be applied.
        Kind::Parked => waits || commands || at_primary && may_be_absent,
        Kind::WaitersFull => waits || listens,
        Kind::PrimaryUnreachable => waits || at_primary || within,
        Kind::NotPrimary => at_primary || within || proxied,
        Kind::OutcomeUnknown => writes || proxied,
        Kind::LoopDetected
        | Kind::UpstreamUnreachable
        | Kind::UpstreamAnswer
        | Kind::UpstreamTimeout => proxied,
    }
}

/// The problems of an operation, by their status.
pub fn by_status(facets: Facets, config: &GatewayConfig) -> BTreeMap<u16, Vec<Kind>> {
    let mut found: BTreeMap<u16, Vec<Kind>> = BTreeMap::new();
    for kind in Kind::ALL.iter().filter(|kind| arises(**kind, facets, config)) {
        found.entry(kind.status().as_u16()).or_default().push(*kind);
    }
    found
}

/// One type alone, as the document lists them all.
pub fn one(kind: Kind) -> Value {
    response(kind.status(), &[kind])
}

/// The answer with one status, whichever of `kinds` it is.
pub fn response(status: StatusCode, kinds: &[Kind]) -> Value {
    let about = kinds.iter().map(|kind| format!("`{}`: {}", kind.name(), kind.about()));
    let types: Vec<String> =
        kinds.iter().map(|kind| format!("/problems/{}", kind.name())).collect();
    let own = match status {
        StatusCode::UNAUTHORIZED => vec![http::header::WWW_AUTHENTICATE],
        StatusCode::METHOD_NOT_ALLOWED => vec![http::header::ALLOW],
        StatusCode::PRECONDITION_FAILED => vec![http::header::ETAG],
        StatusCode::TOO_MANY_REQUESTS
        | StatusCode::SERVICE_UNAVAILABLE
        | StatusCode::BAD_GATEWAY => {
            vec![http::header::RETRY_AFTER]
        }
        _ => Vec::new(),
    };
    json!({
        "description": about.collect::<Vec<_>>().join("\n\n"),
        "headers": headers(&own),
        "content": { PROBLEM_JSON: { "schema": {
            "allOf": [
                { "$ref": "#/components/schemas/Problem" },
                { "properties": { "type": { "enum": types }, "status": { "const": status.as_u16() } } },
            ],
        } } },
    })
}
