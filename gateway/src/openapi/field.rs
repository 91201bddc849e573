//! Headers, of requests and of answers.

use http::{HeaderName, header};
use serde_json::{Map, Value, json};

use crate::{
    config::GatewayConfig,
    forward::CONSISTENCY_STATUS,
    request::{
        CONSISTENCY_POLICY, IDEMPOTENCY_KEY, IDEMPOTENCY_REPLAYED, PREFER, PREFERENCE_APPLIED,
        REQUEST_ID,
    },
    service::SERVER_TIMING,
    status::CACHE_STATUS,
    token_carrier::CONSISTENCY_TOKEN,
    write::IDEMPOTENCY_KEY_BYTES_MAX,
};

/// What every answer has.
const ALWAYS: [HeaderName; 5] =
    [CONSISTENCY_TOKEN, REQUEST_ID, SERVER_TIMING, header::CACHE_CONTROL, header::SET_COOKIE];

/// References to the headers of an answer: its own, and those that every answer has.
pub fn headers(own: &[HeaderName]) -> Map<String, Value> {
    let reference = |name: &HeaderName| json!({ "$ref": format!("#/components/headers/{name}") });
    ALWAYS.iter().chain(own).map(|name| (written(name), reference(name))).collect()
}

/// A reference to a header of requests.
pub fn parameter(name: &HeaderName) -> Value {
    json!({ "$ref": format!("#/components/parameters/{name}") })
}

/// As people write it.
fn written(name: &HeaderName) -> String {
    let words = name.as_str().split('-').map(|word| {
        let (first, rest) = word.split_at(word.len().min(1));
        format!("{}{rest}", first.to_ascii_uppercase())
    });
    words.collect::<Vec<_>>().join("-")
}

/// Headers of answers.
pub fn answered(config: &GatewayConfig) -> Map<String, Value> {
    let text = |about: &str, required| {
        json!({
            "description": about, "required": required, "schema": { "type": "string" },
        })
    };
    let seconds = json!({ "type": "integer", "minimum": 1 });
    let cookie = if config.token.cookie { "The token's cookie twin." } else { "Not set here." };
    let described = [
        (CONSISTENCY_TOKEN, text("What the caller knows now, sealed.", false)),
        (REQUEST_ID, text("Names the request in logs.", true)),
        (SERVER_TIMING, text("Where the time went.", true)),
        (header::CACHE_CONTROL, text("`private, no-cache`, or `no-store`.", true)),
        (header::SET_COOKIE, text(cookie, false)),
        (
            CONSISTENCY_STATUS,
            text(
                "How the answer came to be: `local`, `waited`, `forwarded`, \
            `pending`, `stale`, `primary` or `unverified`, with parameters.",
                true,
            ),
        ),
        (CACHE_STATUS, text("What rows kept in memory were good for (RFC 9211).", false)),
        (PREFERENCE_APPLIED, text("What of `Prefer` was followed.", false)),
        (IDEMPOTENCY_REPLAYED, text("`true` on the first answer, given again.", false)),
        (header::ETAG, text("Tag of what is shown.", true)),
        (header::LOCATION, text("Where the new aggregate is.", true)),
        (header::VARY, text("What the answer depends on.", true)),
        (header::ALLOW, text("What the path takes.", true)),
        (header::WWW_AUTHENTICATE, text("How to prove who one is.", true)),
        (
            header::RETRY_AFTER,
            json!({
                "description": "When to come again, in seconds.", "schema": seconds,
            }),
        ),
    ];
    described.into_iter().map(|(name, header)| (name.to_string(), header)).collect()
}

/// Headers of requests.
pub fn asked() -> Map<String, Value> {
    let described = [
        (
            CONSISTENCY_TOKEN,
            "What the caller has written and seen: tokens of earlier answers.",
            json!({ "type": "string", "pattern": "^[A-Za-z0-9_-]+(, ?[A-Za-z0-9_-]+)*$" }),
        ),
        (
            REQUEST_ID,
            "Names the request in logs.",
            json!({ "type": "string", "minLength": 1, "maxLength": 64, "pattern": "^[!-~]+$" }),
        ),
        (
            CONSISTENCY_POLICY,
            "What to do when the region is behind the token: a chain of `wait`, \
            `forward`, `pending`, `primary` and `eventual`.",
            json!({ "type": "string", "examples": ["wait;ms=250, forward, pending"] }),
        ),
        (
            PREFER,
            "`wait=2` and `respond-async` (RFC 7240).",
            json!({ "type": "string", "examples": ["wait=2, respond-async"] }),
        ),
        (
            header::IF_NONE_MATCH,
            "Reads: 304 when the tag is still right. Writes: `*`, the aggregate \
            must not exist yet.",
            json!({ "type": "string" }),
        ),
        (
            header::IF_MATCH,
            "The tag `\"<epoch>.<version>\"` that the aggregate must be at.",
            json!({ "type": "string", "pattern": "^\"[1-9][0-9]*\\.[0-9]+\"$" }),
        ),
        (
            IDEMPOTENCY_KEY,
            "A write under it happens once; a repeat gets the first answer.",
            json!({
                "type": "string",
                "minLength": 1,
                "maxLength": IDEMPOTENCY_KEY_BYTES_MAX,
                "pattern": "^[!-~]+$",
            }),
        ),
    ];
    let parameter = |(name, about, schema): (HeaderName, &str, Value)| {
        let described = json!({
            "name": written(&name), "in": "header", "description": about, "schema": schema,
        });
        (name.to_string(), described)
    };
    described.into_iter().map(parameter).collect()
}
