//! The way to the primary: pooled HTTP/2, a budget of requests under way, and a breaker that leaves a
//! primary alone that does not answer.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use consistency::{LogPosition, Name};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, header, uri::Scheme,
};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use process::config::Secret;
use tokio::{sync::Semaphore, time::Instant};

use crate::{config::PrimaryConfig, hop, request};

/// Answers larger than this are not passed on.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How often a connection is asked whether it is alive, and how long it may take to say so. A cut
/// link swallows what is sent, and a dead connection must not swallow the next requests as well.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// What is kept of a deadline for the answer's way through both processes.
const ANSWER_MARGIN: Duration = Duration::from_millis(20);
const PING_TIMEOUT: Duration = Duration::from_secs(2);

/// Why the primary did not answer.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// As many requests are under way as may.
    #[error("as many requests to the primary are under way as may")]
    NoBudget,
    /// It failed too often just now.
    #[error("the primary is left alone after repeated failures")]
    Open,
    /// No connection; nothing was sent.
    #[error("the primary cannot be connected to")]
    Connect(#[source] hyper_util::client::legacy::Error),
    /// The connection was lost after something may have been sent.
    #[error("the connection to the primary was lost")]
    Lost(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// It did not answer in time.
    #[error("the primary did not answer in time")]
    Deadline,
    /// Its answer is too large.
    #[error("the answer of the primary is too large")]
    TooLarge,
    /// The request cannot be written.
    #[error("the request cannot be forwarded")]
    Malformed(#[from] http::Error),
}

impl ForwardError {
    /// Whether the primary may have acted on the request.
    pub fn may_have_acted(&self) -> bool {
        match self {
            Self::NoBudget | Self::Open | Self::Connect(_) | Self::Malformed(_) => false,
            Self::Lost(_) | Self::Deadline | Self::TooLarge => true,
        }
    }
}

/// What is sent to the primary.
#[derive(Debug)]
pub struct Outgoing<'a> {
    /// The method.
    pub method: &'a Method,
    /// Path and query.
    pub path_and_query: String,
    /// The headers, those of regions aside.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// When the answer is due.
    pub deadline: Instant,
}

/// What the primary answered.
#[derive(Debug)]
pub struct Reply {
    /// Its status.
    pub status: StatusCode,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Bytes,
    /// How long it took.
    pub took: Duration,
    /// The log's head when it answered.
    pub head: Option<LogPosition>,
}

/// The primary as seen from a region.
#[derive(Debug)]
pub struct Upstream {
    client: Client<HttpConnector, Full<Bytes>>,
    authority: http::uri::Authority,
    name: Name,
    region: HeaderValue,
    credential: HeaderValue,
    budget: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    breaker: Mutex<Breaker>,
    trip_ms: AtomicU32,
    failures_max: u32,
    open_for: Duration,
}

#[derive(Debug, Default)]
struct Breaker {
    failures: u32,
    open_until: Option<Instant>,
}

/// Why a region cannot know its way to the primary.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The URL has no host.
    #[error("the primary's URL has no host")]
    Url,
    /// The credential cannot be sent in a header.
    #[error("the regions' credential cannot be sent in a header")]
    Credential,
}

impl Upstream {
    /// As the gateway of `region`.
    pub fn new(
        config: &PrimaryConfig,
        region: &Name,
        credential: &Secret,
    ) -> Result<Self, UpstreamError> {
        let url: Uri = config.url.parse().map_err(|_| UpstreamError::Url)?;
        let authority = url.authority().cloned().ok_or(UpstreamError::Url)?;
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(config.connect_timeout.get()));
        let client = Client::builder(TokioExecutor::new())
            .http2_only(true)
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .http2_keep_alive_interval(PING_INTERVAL)
            .http2_keep_alive_timeout(PING_TIMEOUT)
            .http2_keep_alive_while_idle(true)
            .build(connector);
        Ok(Self {
            client,
            authority,
            name: config.name.clone(),
            region: HeaderValue::from_str(region.as_str()).map_err(|_| UpstreamError::Url)?,
            credential: hop::credential(credential).ok_or(UpstreamError::Credential)?,
            budget: Arc::new(Semaphore::new(config.forwards_max)),
            reads: Arc::new(Semaphore::new(config.forwarded_reads_max)),
            breaker: Mutex::default(),
            trip_ms: AtomicU32::new(0),
            failures_max: config.breaker_failures_max.max(1),
            open_for: config.breaker_open.get(),
        })
    }

    /// The primary's region.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Whether a read would be sent now.
    pub fn is_available(&self, now: Instant) -> bool {
        let room = 0 < self.budget.available_permits() && 0 < self.reads.available_permits();
        room && !self.is_open(now)
    }

    /// How long a request is expected to take; `None` before the first.
    pub fn trip_ms(&self) -> Option<u32> {
        Some(self.trip_ms.load(Ordering::Relaxed)).filter(|ms| 0 < *ms)
    }

    /// Sends a request of a caller, marked as forwarded. Reads have a budget of their own: they may
    /// wait at the primary, and must not wait in the way of writes.
    pub async fn forward(&self, mut outgoing: Outgoing<'_>) -> Result<Reply, ForwardError> {
        outgoing.headers.insert(hop::HOP, self.region.clone());
        let _permit = match outgoing.method.is_safe() {
            true => Some(self.reads.try_acquire().map_err(|_| ForwardError::NoBudget)?),
            false => None,
        };
        self.send(outgoing).await
    }

    /// Sends a request of our own.
    pub async fn send(&self, outgoing: Outgoing<'_>) -> Result<Reply, ForwardError> {
        if self.is_open(Instant::now()) {
            return Err(ForwardError::Open);
        }
        let permit = self.budget.try_acquire().map_err(|_| ForwardError::NoBudget)?;
        let replied = self.send_within(outgoing).await;
        drop(permit);
        self.note(&replied);
        replied
    }

    async fn send_within(&self, outgoing: Outgoing<'_>) -> Result<Reply, ForwardError> {
        let began = Instant::now();
        let deadline = outgoing.deadline;
        let request = self.request(outgoing, began)?;
        let exchange = async {
            let response = self.client.request(request).await.map_err(|error| {
                if error.is_connect() {
                    ForwardError::Connect(error)
                } else {
                    ForwardError::Lost(Box::new(error))
                }
            })?;
            let (parts, body) = response.into_parts();
            let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|error| {
                if error.is::<LengthLimitError>() {
                    ForwardError::TooLarge
                } else {
                    ForwardError::Lost(error)
                }
            })?;
            Ok::<_, ForwardError>((parts, body.to_bytes()))
        };
        // A client that takes a moment to notice the deadline must not make us late.
        let exchanged = tokio::time::timeout_at(deadline, exchange).await;
        let (parts, body) = exchanged.map_err(|_| ForwardError::Deadline)??;
        let head = parts.headers.get(hop::HEAD).and_then(|head| head.to_str().ok());
        Ok(Reply {
            status: parts.status,
            head: head.and_then(request::log_position),
            headers: parts.headers,
            body,
            took: began.elapsed(),
        })
    }

    fn request(
        &self,
        outgoing: Outgoing<'_>,
        now: Instant,
    ) -> Result<Request<Full<Bytes>>, ForwardError> {
        let uri = Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(self.authority.clone())
            .path_and_query(outgoing.path_and_query)
            .build()?;
        // What it takes to bring the answer home is not there to be waited away at the primary.
        let trip = Duration::from_millis(u64::from(self.trip_ms().unwrap_or(0)));
        let left = outgoing.deadline.saturating_duration_since(now);
        let left = left.saturating_sub(trip + ANSWER_MARGIN).max(ANSWER_MARGIN);
        let mut request = Request::new(Full::new(outgoing.body));
        *request.method_mut() = outgoing.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = outgoing.headers;
        let headers = request.headers_mut();
        headers.insert(hop::CREDENTIAL, self.credential.clone());
        headers.insert(hop::DEADLINE_MS, HeaderValue::from(left.as_millis() as u64));
        Ok(request)
    }

    fn is_open(&self, now: Instant) -> bool {
        let breaker = self.breaker.lock().unwrap_or_else(PoisonError::into_inner);
        breaker.open_until.is_some_and(|until| now < until)
    }

    fn note(&self, replied: &Result<Reply, ForwardError>) {
        let mut breaker = self.breaker.lock().unwrap_or_else(PoisonError::into_inner);
        match replied {
            Ok(_) => {
                if self.failures_max <= breaker.failures {
                    tracing::info!(region = %self.name, "the primary answers again");
                }
                *breaker = Breaker::default();
            }
            Err(ForwardError::Connect(_) | ForwardError::Lost(_) | ForwardError::Deadline) => {
                breaker.failures = breaker.failures.saturating_add(1);
                if self.failures_max <= breaker.failures {
                    if breaker.failures == self.failures_max {
                        tracing::warn!(region = %self.name, "the primary does not answer");
                    }
                    breaker.open_until = Some(Instant::now() + self.open_for);
                }
            }
            Err(
                ForwardError::NoBudget
                | ForwardError::Open
                | ForwardError::TooLarge
                | ForwardError::Malformed(_),
            ) => {}
        }
    }

    /// A trip was seen to take so long. The newest counts a quarter.
    pub fn saw_trip(&self, took: Duration) {
        let sample = u32::try_from(took.as_millis()).unwrap_or(u32::MAX).max(1);
        let known = self.trip_ms.load(Ordering::Relaxed);
        let mixed = if known == 0 { sample } else { known - known / 4 + sample / 4 };
        self.trip_ms.store(mixed.max(1), Ordering::Relaxed);
    }
}

/// The headers of a caller that the primary needs.
pub fn passed_on(headers: &HeaderMap) -> HeaderMap {
    const PASSED: [HeaderName; 8] = [
        header::ACCEPT,
        header::CONTENT_TYPE,
        header::IF_MATCH,
        header::IF_NONE_MATCH,
        request::IDEMPOTENCY_KEY,
        HeaderName::from_static("traceparent"),
        HeaderName::from_static("tracestate"),
        request::PREFER,
    ];
    let mut passed = HeaderMap::new();
    for name in PASSED {
        for value in headers.get_all(&name) {
            passed.append(name.clone(), value.clone());
        }
    }
    passed
}
