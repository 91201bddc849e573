//! An answer before it is finished: the token, and what every answer carries, are added in one place.

use bytes::Bytes;
use consistency::{Claim, LogPosition, Token};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use serde::Serialize;

use crate::{
    body::Body,
    status::{Said, Timing},
};

/// The type of most bodies.
pub const JSON: &str = "application/json";

/// Room for what most answers carry in the end.
const HEADER_COUNT: usize = 12;

/// What a route comes to.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: StatusCode,
    /// Headers that only this route knows.
    pub headers: HeaderMap,
    /// The body.
    pub body: Body,
    /// What it shows of the world, to be merged with what the caller knew.
    pub shows: Option<Token>,
    /// How it came to be; reads, and writes that were done.
    pub said: Option<Said>,
    /// Where its time went.
    pub timing: Timing,
}

/// The token of who sees the world at `at`.
pub fn read_of(at: LogPosition) -> Token {
    Token::new(at.epoch).with_read(at.position)
}

/// The token of who wrote `claim` in the epoch of `at`.
pub fn claim_of(at: LogPosition, claim: Claim) -> Token {
    Token::new(at.epoch).with_claim(claim)
}

impl Answer {
    /// With a body of JSON.
    pub fn json(status: StatusCode, body: &impl Serialize) -> Self {
        let body = serde_json::to_vec(body).expect("our answers have text keys only");
        Self::typed(status, JSON, Bytes::from(body))
    }

    /// With a body of some type.
    pub fn typed(status: StatusCode, kind: &'static str, body: Bytes) -> Self {
        let mut answer = Self { body: Body::from(body), ..Self::empty(status) };
        answer.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
        answer
    }

    /// Without a body.
    pub fn empty(status: StatusCode) -> Self {
        Self {
            status,
            headers: HeaderMap::with_capacity(HEADER_COUNT),
            body: Body::empty(),
            shows: None,
            said: None,
            timing: Timing::default(),
        }
    }

    /// Shows what `token` says.
    pub fn showing(self, token: Token) -> Self {
        Self { shows: Some(token), ..self }
    }

    /// Came to be as `said`.
    pub fn saying(self, said: Said) -> Self {
        Self { said: Some(said), ..self }
    }

    /// Has a header. A value that cannot be one is left out.
    pub fn with_header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }
}
