//! Pages of other origins (CORS): exactly those that are named, and what they may see.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, Uri, header};
use process::config::Period;
use serde::Deserialize;
use tower_http::cors::CorsLayer;

use crate::{forward, request, token_carrier::CONSISTENCY_TOKEN};

/// `[cors]`: without it only pages of the gateway's own origin read its answers.
#[derive(Debug, Clone, Deserialize)]
pub struct CorsConfig {
    /// Such as `https://app.example.com`: scheme, host and port, to the letter.
    pub origins: Vec<String>,
    /// Headers that requests may have beyond those of this gateway.
    #[serde(default)]
    pub request_headers: Vec<String>,
    /// How long a browser may remember what it was told.
    #[serde(default = "max_age_default")]
    pub max_age: Period,
}

const fn max_age_default() -> Period {
    Period::from_secs(600)
}

impl CorsConfig {
    /// What is wrong with it.
    pub fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        if self.origins.is_empty() {
            mistakes.push("cors.origins: must name at least one".to_owned());
        }
        for origin in self.origins.iter().filter(|origin| !is_origin(origin)) {
            let said = "is no origin like https://app.example.com";
            mistakes.push(format!("cors.origins: {origin:?} {said}"));
        }
        let wrong = self.request_headers.iter();
        let wrong = wrong.filter(|name| name.parse::<HeaderName>().is_err());
        mistakes.extend(wrong.map(|name| format!("cors.request_headers: {name:?} is no header")));
        mistakes
    }

    /// The layer that answers browsers. They may send the cookie along.
    pub fn layer(&self) -> CorsLayer {
        let origins = self.origins.iter().filter_map(|origin| HeaderValue::from_str(origin).ok());
        let more = self.request_headers.iter().filter_map(|name| name.parse::<HeaderName>().ok());
        CorsLayer::new()
            .allow_origin(origins.collect::<Vec<_>>())
            .allow_credentials(true)
            .allow_methods([
                Method::GET,
                Method::HEAD,
                Method::POST,
                Method::PUT,
                Method::PATCH,
                Method::DELETE,
            ])
            .allow_headers(SENT.into_iter().chain(more).collect::<Vec<_>>())
            .expose_headers(SHOWN)
            .max_age(Duration::from_secs(self.max_age.get().as_secs()))
    }
}

const SENT: [HeaderName; 12] = [
    header::ACCEPT,
    header::AUTHORIZATION,
    header::CONTENT_TYPE,
    header::IF_MATCH,
    header::IF_NONE_MATCH,
    CONSISTENCY_TOKEN,
    request::CONSISTENCY_POLICY,
    request::PREFER,
    request::IDEMPOTENCY_KEY,
    request::REQUEST_ID,
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("tracestate"),
];

const SHOWN: [HeaderName; 11] = [
    CONSISTENCY_TOKEN,
    forward::CONSISTENCY_STATUS,
    header::ETAG,
    header::LOCATION,
    header::RETRY_AFTER,
    header::WWW_AUTHENTICATE,
    request::IDEMPOTENCY_REPLAYED,
    request::PREFERENCE_APPLIED,
    request::REQUEST_ID,
    HeaderName::from_static("cache-status"),
    HeaderName::from_static("server-timing"),
];

/// As browsers write it: nothing behind the port, no upper case.
fn is_origin(text: &str) -> bool {
    let Ok(uri) = text.parse::<Uri>() else { return false };
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return false };
    matches!(scheme, "http" | "https")
        && !authority.as_str().contains('@')
        && text == format!("{scheme}://{authority}")
        && text == text.to_ascii_lowercase()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        for good in ["https://app.example.com", "http://localhost:3000"] {
            assert!(is_origin(good), "{good}");
        }
        let bad =
            ["*", "null", "https://a.example/", "https://A.example", "ftp://a", "https://u@a"];
        for bad in bad {
            assert!(!is_origin(bad), "{bad}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let config = CorsConfig {
            origins: vec!["*".to_owned()],
            request_headers: vec!["a b".to_owned()],
            max_age: max_age_default(),
        };
        let mistakes = config.mistakes().join("\n");
        assert!(mistakes.contains("\"*\"") && mistakes.contains("\"a b\""), "{mistakes}");
        let nowhere = CorsConfig { origins: Vec::new(), ..config };
        assert!(nowhere.mistakes().join("\n").contains("at least one"));
    }
}
