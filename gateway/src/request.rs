//! What every route wants to know of a request, decoded once.

use std::{borrow::Cow, fmt, net::SocketAddr, ops::Deref};

use bytes::Bytes;
use consistency::{
    AggregateId, Epoch, EpochHistory, LogPosition, Name, Policy, Position, Preference, Token,
    TokenStatus, Version,
};
use event_store::Expected;
use http::{HeaderMap, HeaderName, HeaderValue, Method, header, request::Parts, uri::Authority};
use process::server::ServerLimits;
use tokio::time::Instant;
use uuid::{NoContext, Timestamp, Uuid};

use crate::{auth::Caller, error::Error, hop, token_carrier::Presented};

/// The chain that a caller asks for.
pub const CONSISTENCY_POLICY: HeaderName = HeaderName::from_static("consistency-policy");
/// RFC 7240.
pub const PREFER: HeaderName = HeaderName::from_static("prefer");
/// What of `Prefer` was followed.
pub const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
/// Ours when the caller has none.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Scoped by caller, method and path.
pub const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// `true` on an answer that was given before, to the first request under its key.
pub const IDEMPOTENCY_REPLAYED: HeaderName = HeaderName::from_static("idempotency-replayed");

/// A request.
#[derive(Debug)]
pub struct Call {
    /// Its method.
    pub method: Method,
    /// Its path, as sent.
    pub path: String,
    /// Its query, as sent.
    pub query: Option<String>,
    /// Its headers; those of regions only when they are to be believed.
    pub headers: HeaderMap,
    /// Its body, whole.
    pub body: Bytes,
    /// Names it in logs and in its answer.
    pub id: RequestId,
    /// When it came.
    pub began: Instant,
    /// When its answer is due.
    pub deadline: Instant,
    /// It comes from another region or from a projector of ours.
    pub trusted: bool,
    /// A region forwarded it.
    pub hop: bool,
    /// Who sent it, as far as the connection tells.
    pub peer: Option<SocketAddr>,
    /// The protocol that it came by.
    pub version: http::Version,
    /// The host that it is for, where the protocol does not say it in a header.
    pub authority: Option<Authority>,
    /// What its caller has written and seen.
    pub token: Token,
    /// Who asks.
    pub caller: Caller,
    /// Its caller's token could not be read and cannot be mended by the caller: only the primary's
    /// newest state is safe.
    pub unreadable_cookie: bool,
}

/// Judges what was presented. What cannot be taken is refused, never taken for no token.
pub fn token_of(presented: Presented, history: &EpochHistory) -> Result<(Token, bool), Error> {
    let current = history.current();
    match presented.status {
        TokenStatus::Absent => Ok((Token::new(current), false)),
        TokenStatus::Valid(token)
        | TokenStatus::OlderEpoch(token)
        | TokenStatus::NewerEpoch(token) => Ok((token, false)),
        TokenStatus::Lost(fresh) => Err(Error::WriteLost { fresh }),
        TokenStatus::Malformed => Err(Error::InvalidToken("it is not a token")),
        TokenStatus::Forged => Err(Error::InvalidToken("its seal does not fit")),
        TokenStatus::UnknownKey(_) | TokenStatus::UnknownFormat(_) | TokenStatus::OtherLog
            if presented.by_cookie_only =>
        {
            Ok((Token::new(current), true))
        }
        TokenStatus::UnknownKey(_) | TokenStatus::UnknownFormat(_) => Err(Error::TokenUnknownKey),
        TokenStatus::OtherLog => Err(Error::InvalidToken("it is of another log")),
    }
}

/// Refuses more headers than are taken, counted as HTTP/2 counts them.
pub fn check_headers(headers: &HeaderMap, limits: &ServerLimits) -> Result<(), Error> {
    const OVERHEAD_BYTES: usize = 32;
    let each = |(name, value): (&HeaderName, &HeaderValue)| {
        name.as_str().len() + value.len() + OVERHEAD_BYTES
    };
    let (bytes_max, count_max) = (limits.header_bytes_max, limits.header_count_max);
    if (bytes_max as usize) < headers.iter().map(each).sum() {
        return Err(Error::BadRequest(format!("the headers have more than {bytes_max} bytes")));
    }
    let too_many = || Error::BadRequest(format!("there are more than {count_max} headers"));
    (headers.len() <= count_max).then_some(()).ok_or_else(too_many)
}

/// Names a request: visible ASCII, ready to be sent.
#[derive(Debug, Clone)]
pub struct RequestId(HeaderValue);

impl RequestId {
    /// The id that the caller gave the request, when it can be printed; else a new one.
    pub fn of(headers: &HeaderMap) -> Self {
        let printable = |id: &&HeaderValue| {
            (1..=64).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
        };
        let given = headers.get(REQUEST_ID).filter(printable).cloned();
        Self(given.unwrap_or_else(Self::fresh))
    }

    /// In the order of time, but for those of one millisecond: to keep that, all processors would have to
    /// take a lock.
    fn fresh() -> HeaderValue {
        let id = Uuid::new_v7(Timestamp::now(NoContext));
        let text = id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).as_bytes().to_vec();
        HeaderValue::try_from(text).expect("a hyphenated id is visible ASCII")
    }

    /// As a header's value.
    pub fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl Deref for RequestId {
    type Target = str;

    fn deref(&self) -> &str {
        self.0.to_str().expect("it is visible ASCII")
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self)
    }
}

/// When the answer is due: the server's bound, or sooner when the forwarding region says so.
pub fn deadline(headers: &HeaderMap, began: Instant, bound: std::time::Duration) -> Instant {
    let left = headers.get(hop::DEADLINE_MS).and_then(|value| value.to_str().ok());
    let left = left.and_then(|ms| ms.parse().ok()).map(std::time::Duration::from_millis);
    began + left.map_or(bound, |left| left.min(bound))
}

/// What the caller wants done when the read is not current.
#[derive(Debug, Clone)]
pub struct Wish {
    /// The chain.
    pub policy: Policy,
    /// What of `Prefer` was followed.
    pub applied: Preference,
}

impl Call {
    /// Milliseconds until the answer is due.
    pub fn left_ms(&self) -> u32 {
        let left = self.deadline.saturating_duration_since(Instant::now());
        u32::try_from(left.as_millis()).unwrap_or(u32::MAX)
    }

    /// What it asks for, as sent.
    pub fn path_and_query(&self) -> String {
        let query = self.query.as_ref().map_or_else(String::new, |query| format!("?{query}"));
        format!("{}{query}", self.path)
    }

    /// The value of a query parameter, decoded; the first when there are several.
    pub fn parameter(&self, name: &str) -> Result<Option<String>, Error> {
        let Some(query) = &self.query else { return Ok(None) };
        let found = query
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .find(|(key, _)| *key == name);
        found.map(|(_, value)| decoded(&value.replace('+', " ")).map(Cow::into_owned)).transpose()
    }

    /// A query parameter that is a number.
    pub fn number(&self, name: &'static str) -> Result<Option<u64>, Error> {
        let wrong = |_| Error::BadRequest(format!("{name} must be a whole number"));
        self.parameter(name)?.map(|text| text.parse().map_err(wrong)).transpose()
    }

    /// Refuses parameters that would be passed over.
    pub fn only_parameters(&self, known: &[&str]) -> Result<(), Error> {
        let Some(query) = &self.query else { return Ok(()) };
        let names = query.split('&').filter(|pair| !pair.is_empty());
        let mut names = names.map(|pair| pair.split_once('=').map_or(pair, |(name, _)| name));
        match names.find(|name| !known.contains(name)) {
            Some(name) => Err(Error::BadRequest(format!("there is no parameter {name:?} here"))),
            None => Ok(()),
        }
    }

    /// The chain for a view whose own is `shipped`. `Consistency-Policy` says it whole; `Prefer` bends
    /// the view's own.
    pub fn wish(&self, shipped: &Policy) -> Result<Wish, Error> {
        if self.unreadable_cookie {
            let policy = Policy::new(vec![consistency::Step::Primary]);
            let policy = policy.expect("a chain may have one step");
            return Ok(Wish { policy, applied: Preference::default() });
        }
        if let Some(text) = self.joined(&CONSISTENCY_POLICY)? {
            let policy = Policy::parse(&text)
                .map_err(|error| Error::BadRequest(format!("Consistency-Policy {error}")))?;
            return Ok(Wish { policy, applied: Preference::default() });
        }
        let applied =
            self.joined(&PREFER)?.map(|text| Preference::parse(&text)).unwrap_or_default();
        Ok(Wish { policy: shipped.preferring(applied), applied })
    }

    /// What an append may expect of its aggregate: `If-Match` with one of our tags, or
    /// `If-None-Match: *`.
    pub fn expected(&self) -> Result<Expected, Error> {
        let matched = self.joined(&header::IF_MATCH)?;
        let unmatched = self.joined(&header::IF_NONE_MATCH)?;
        match (matched, unmatched) {
            (None, None) => Ok(Expected::Any),
            (None, Some(star)) if star.trim() == "*" => Ok(Expected::MustNotExist),
            (Some(tag), None) => aggregate_tag(&tag)
                .map(|(epoch, version)| Expected::Last { epoch, version })
                .ok_or_else(|| {
                    Error::BadRequest("If-Match takes one \"<epoch>.<version>\"".into())
                }),
            (None, Some(_)) => Err(Error::BadRequest("If-None-Match takes * here".into())),
            (Some(_), Some(_)) => {
                Err(Error::BadRequest("If-Match and If-None-Match exclude each other".into()))
            }
        }
    }

    /// Whether `If-None-Match` of a read names this tag.
    pub fn has_tag(&self, tag: &str) -> bool {
        let values = self.headers.get_all(header::IF_NONE_MATCH).iter();
        let mut tags = values.filter_map(|value| value.to_str().ok()).flat_map(|v| v.split(','));
        tags.any(|given| {
            let given = given.trim();
            given == "*" || given.strip_prefix("W/").unwrap_or(given) == tag
        })
    }

    /// The body must call itself JSON.
    pub fn json_body(&self) -> Result<&[u8], Error> {
        let kind = self.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let kind = kind.and_then(|kind| kind.split(';').next()).unwrap_or_default().trim();
        let is_json = kind.eq_ignore_ascii_case("application/json");
        if is_json { Ok(&self.body) } else { Err(Error::UnsupportedMediaType) }
    }

    /// All values of a header as one list; `None` when there is none.
    fn joined(&self, name: &HeaderName) -> Result<Option<String>, Error> {
        let values: Result<Vec<&str>, _> =
            self.headers.get_all(name).iter().map(HeaderValue::to_str).collect();
        let values = values.map_err(|_| Error::BadRequest(format!("{name} is not text")))?;
        Ok((!values.is_empty()).then(|| values.join(", ")))
    }
}

impl Call {
    /// Reads the parts that all routes share. Who sent it is not among them.
    pub fn new(
        parts: Parts,
        token: (Token, bool),
        trusted: bool,
        times: (Instant, Instant),
    ) -> Self {
        let Parts { method, uri, version, headers, .. } = parts;
        Self {
            peer: None,
            version,
            authority: uri.authority().cloned(),
            method,
            path: uri.path().to_owned(),
            query: uri.query().map(ToOwned::to_owned),
            id: RequestId::of(&headers),
            caller: if trusted { Caller::passed_on(&headers) } else { Caller::Unknown },
            hop: trusted && headers.contains_key(hop::HOP),
            headers,
            body: Bytes::new(),
            began: times.0,
            deadline: times.1,
            trusted,
            token: token.0,
            unreadable_cookie: token.1,
        }
    }
}

/// A path segment or a parameter without its percent signs.
pub fn decoded(text: &str) -> Result<Cow<'_, str>, Error> {
    if !text.contains('%') {
        return Ok(Cow::Borrowed(text));
    }
    let malformed = || Error::BadRequest("a percent sign is followed by two hex digits".to_owned());
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let (Some(high), Some(low)) = (rest.next(), rest.next()) else {
                return Err(malformed());
            };
            let digit = |byte: u8| char::from(byte).to_digit(16).ok_or_else(malformed);
            bytes.push((digit(high)? * 16 + digit(low)?) as u8);
        } else {
            bytes.push(byte);
        }
    }
    let text = String::from_utf8(bytes);
    text.map(Cow::Owned).map_err(|_| Error::BadRequest("the URL is not UTF-8".to_owned()))
}

/// The aggregate that a path names.
pub fn aggregate(kind: &str, id: &str) -> Result<AggregateId, Error> {
    let kind = Name::new(decoded(kind)?)
        .map_err(|error| Error::BadRequest(format!("the aggregate type {error}")))?;
    AggregateId::new(kind, decoded(id)?)
        .map_err(|error| Error::BadRequest(format!("the aggregate id {error}")))
}

/// A tag of the form `"<epoch>.<version>"`.
fn aggregate_tag(tag: &str) -> Option<(Epoch, Version)> {
    let inner = tag.trim().strip_prefix('"')?.strip_suffix('"')?;
    let (epoch, version) = inner.split_once('.')?;
    Some((Epoch::new(epoch.parse().ok()?)?, Version::new(version.parse().ok()?)?))
}

/// A position of the form `<epoch>.<position>`.
pub fn log_position(text: &str) -> Option<LogPosition> {
    let (epoch, position) = text.split_once('.')?;
    let epoch = Epoch::new(epoch.parse().ok()?)?;
    Some(LogPosition::new(epoch, Position::new(position.parse().ok()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(query: &str, headers: &[(HeaderName, &str)]) -> Call {
        let mut request = http::Request::get(format!("http://host/v1/x?{query}"));
        for (name, value) in headers {
            request = request.header(name, *value);
        }
        let (parts, ()) = request.body(()).unwrap().into_parts();
        let now = Instant::now();
        Call::new(parts, (Token::new(Epoch::FIRST), false), false, (now, now))
    }

    #[test]
    fn an_expectation_reads_one_of_our_tags() {
        let expected = |header: HeaderName, value: &str| call("", &[(header, value)]).expected();
        let last = Expected::Last { epoch: Epoch::FIRST, version: Version::new(7).unwrap() };
        assert_eq!(expected(header::IF_MATCH, "\"1.7\"").unwrap(), last);
        assert_eq!(expected(header::IF_NONE_MATCH, "*").unwrap(), Expected::MustNotExist);
        for bad in ["*", "\"7\"", "1.7", "\"1.7\", \"1.8\"", "\"0.7\"", "W/\"1.7\""] {
            assert!(expected(header::IF_MATCH, bad).is_err(), "{bad}");
        }
        assert!(expected(header::IF_NONE_MATCH, "\"1.7\"").is_err());
    }

    #[test]
    fn a_policy_header_wins_over_prefer() {
        let shipped = Policy::shipped();
        let prefer = (PREFER, "wait=2, respond-async");
        let wish = call("", std::slice::from_ref(&prefer)).wish(&shipped).unwrap();
        assert_eq!(wish.policy.to_string(), "wait;ms=2000, pending");
        let both = call("", &[prefer, (CONSISTENCY_POLICY, "forward")]).wish(&shipped).unwrap();
        assert_eq!(both.policy.to_string(), "forward");
        assert!(both.applied.is_empty());
        assert!(call("", &[(CONSISTENCY_POLICY, "hope")]).wish(&shipped).is_err());
    }

    #[test]
    fn parameters_are_decoded_and_unknown_ones_refused() {
        let call = call("limit=5&cursor=a%2Fb+c", &[]);
        assert_eq!(call.number("limit").unwrap(), Some(5));
        assert_eq!(call.parameter("cursor").unwrap().as_deref(), Some("a/b c"));
        assert!(call.number("cursor").is_err());
        assert!(call.only_parameters(&["limit", "cursor"]).is_ok());
        assert!(call.only_parameters(&["limit"]).is_err());
        for bad in ["%", "%2", "%zz", "%ff"] {
            assert!(decoded(bad).is_err(), "{bad}");
        }
    }
}
