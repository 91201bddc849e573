//! A client of the gateways, whole: it keeps the token of each answer and sends it with the next request.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use serde_json::Value;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

const TOKEN: &str = "consistency-token";
const STATUS: &str = "consistency-status";
const POLICY: &str = "consistency-policy";
const IDEMPOTENCY_KEY: &str = "idempotency-key";
const REQUEST_DEADLINE: Duration = Duration::from_secs(20);

/// How long a write that is refused for now is sent again.
const WRITE_DEADLINE: Duration = Duration::from_secs(30);

/// Why a request got no answer, or the network could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum CallerError {
    /// No answer came.
    #[error("no answer")]
    Http(#[from] reqwest::Error),
    /// The WAN did not follow an order.
    #[error("the proxy refused")]
    Proxy(#[from] crate::proxy::ProxyError),
}

/// One caller with what it has written and seen, as the gateways told it.
#[derive(Debug, Clone)]
pub struct Caller {
    http: reqwest::Client,
    url: String,
    token: Option<String>,
}

/// What came back.
#[derive(Debug, Clone)]
pub struct Answer {
    /// HTTP status.
    pub status: StatusCode,
    /// What the gateway did, as in `waited;ms=38;region=eu-west;position=12`.
    pub consistency: String,
    /// The caller's new token.
    pub token: Option<String>,
    /// When to ask again.
    pub retry_after: Option<String>,
    /// The body; null when it was not JSON.
    pub body: Value,
    /// From the request to the whole answer.
    pub took: Duration,
}

impl Caller {
    /// A caller of the gateway at `url` that has not seen anything yet.
    pub fn new(url: String) -> Result<Self, CallerError> {
        let http = reqwest::Client::builder().timeout(REQUEST_DEADLINE).no_proxy().build()?;
        Ok(Caller { http, url, token: None })
    }

    /// Runs a command of the domain.
    pub async fn command(&mut self, name: &str, input: &Value) -> Result<Answer, CallerError> {
        self.send(self.posting(name, input)).await
    }

    /// Runs a command of the domain, once: it is sent again under the same key while the answer is to ask later,
    /// whether it was refused or nobody knows what became of it.
    pub async fn write(&mut self, name: &str, input: &Value) -> Result<Answer, CallerError> {
        let start = Instant::now();
        let key = format!("\"{}\"", Uuid::now_v7());
        loop {
            let request = self.posting(name, input).header(IDEMPOTENCY_KEY, &key);
            let mut answer = self.send(request).await?;
            answer.took = start.elapsed();
            match answer.pause() {
                Some(pause) if answer.took < WRITE_DEADLINE => sleep(pause).await,
                _ => return Ok(answer),
            }
        }
    }

    /// Reads a path; `policy` says what to do when the answer is not current here, empty for the gateway's choice.
    pub async fn get(&mut self, path: &str, policy: &str) -> Result<Answer, CallerError> {
        let mut request = self.http.get(format!("{}{path}", self.url));
        if !policy.is_empty() {
            request = request.header(POLICY, policy);
        }
        self.send(request).await
    }

    /// A caller of the same gateway with no token.
    pub fn stranger(&self) -> Self {
        Caller { token: None, ..self.clone() }
    }

    /// A caller of the same gateway with a token that nobody has minted.
    pub fn forger(&self) -> Self {
        let forge = |token: &String| {
            let middle = token.len() / 2;
            let other = if token[middle..].starts_with('A') { "B" } else { "A" };
            format!("{}{other}{}", &token[..middle], &token[middle + 1..])
        };
        Caller { token: self.token.as_ref().map(forge), ..self.clone() }
    }

    /// Goes on where another caller is: takes its token.
    pub fn adopt(&mut self, other: &Caller) {
        self.token.clone_from(&other.token);
    }

    fn posting(&self, name: &str, input: &Value) -> reqwest::RequestBuilder {
        self.http.post(format!("{}/v1/commands/{name}", self.url)).json(input)
    }

    async fn send(&mut self, request: reqwest::RequestBuilder) -> Result<Answer, CallerError> {
        let start = Instant::now();
        let request = match &self.token {
            Some(token) => request.header(TOKEN, token),
            None => request,
        };
        let response = request.send().await?;
        let text = |headers: &HeaderMap, name: &str| {
            headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let headers = response.headers();
        let mut answer = Answer {
            status: response.status(),
            consistency: text(headers, STATUS).unwrap_or_default(),
            token: text(headers, TOKEN),
            retry_after: text(headers, header::RETRY_AFTER.as_str()),
            body: Value::Null,
            took: Duration::ZERO,
        };
        let body = response.bytes().await?;
        answer.body = serde_json::from_slice(&body).unwrap_or_default();
        answer.took = start.elapsed();
        // An answer without a token has shown nothing new.
        if answer.token.is_some() {
            self.token.clone_from(&answer.token);
        }
        Ok(answer)
    }
}

impl Answer {
    /// The first word of `Consistency-Status`.
    pub fn word(&self) -> &str {
        self.consistency.split([';', ',']).next().unwrap_or_default().trim()
    }

    /// A parameter of the first item of `Consistency-Status`.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        let first = self.consistency.split(',').next()?;
        first.split(';').find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='))
    }

    /// The version of the row that was shown, or of the aggregate that was written.
    pub fn version(&self) -> Option<u64> {
        self.body["version"].as_u64()
    }

    /// How long to wait before the same is asked once more, when that is what the answer says.
    fn pause(&self) -> Option<Duration> {
        let seconds = self.retry_after.as_ref()?.parse().ok()?;
        (self.status == StatusCode::SERVICE_UNAVAILABLE).then(|| Duration::from_secs(seconds))
    }

    /// The last word of a problem's type.
    pub fn problem(&self) -> &str {
        let kind = self.body["type"].as_str().unwrap_or_default();
        kind.rsplit(['/', ':', '#']).next().unwrap_or_default()
    }
}
