//! The way to the primary: pooled HTTP/2, a budget of requests under way, and a breaker that leaves a
//! primary alone that does not answer.

mod breaker;

use std::{
    error::Error as StdError,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use consistency::{LogPosition, Name};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri, Version, header,
    uri::Scheme,
};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::Client,
    rt::{TokioExecutor, TokioTimer},
};
use process::{
    client::{self, Connector, Protocols},
    config::Secret,
    tls::TlsError,
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use self::breaker::{Breaker, Pass, Turned};
use crate::{
    body::{Body, Fault},
    config::PrimaryConfig,
    hop, request,
};

/// Answers larger than this are not passed on.
const ANSWER_BYTES_MAX: usize = 16 * 1024 * 1024;
/// How often a connection is asked whether it is alive, and how long it may take to say so. A cut
/// link swallows what is sent, and a dead connection must not swallow the next requests as well.
const PING_INTERVAL: Duration = Duration::from_secs(1);
/// What is kept of a deadline for the answer's way through both processes.
const ANSWER_MARGIN: Duration = Duration::from_millis(20);
const PING_TIMEOUT: Duration = Duration::from_secs(2);
/// Below the time for which the primary's listener keeps an idle connection.
const STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(15);

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
    /// The request's own body broke off on its way.
    #[error("{0}")]
    Body(Fault),
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
            Self::Lost(_) | Self::Body(_) | Self::Deadline | Self::TooLarge => true,
        }
    }

    /// The connection failed, and not because something took too long: another one may do.
    fn is_of_connection(&self) -> bool {
        match self {
            Self::Connect(error) => !is_timeout(error),
            Self::Lost(error) => !is_timeout(&**error),
            Self::NoBudget
            | Self::Open
            | Self::Body(_)
            | Self::Deadline
            | Self::TooLarge
            | Self::Malformed(_) => false,
        }
    }
}

/// Whether something took too long, somewhere in the chain of causes.
pub fn is_timeout(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(cause) = next {
        let io = cause.downcast_ref::<io::Error>();
        let http = cause.downcast_ref::<hyper::Error>();
        if io.is_some_and(|io| io.kind() == io::ErrorKind::TimedOut)
            || http.is_some_and(hyper::Error::is_timeout)
        {
            return true;
        }
        next = cause.source();
    }
    false
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
    pub body: Body,
    /// When the answer is due.
    pub deadline: Instant,
    /// It changes nothing, so that it may be sent twice. A method does not say so by itself: on a route it
    /// may be the path that tells what writes.
    pub only_reads: bool,
}

impl Outgoing<'_> {
    /// The same once more, where it may be sent twice.
    fn again(&self) -> Option<Self> {
        let body = self.body.whole().filter(|_| self.only_reads)?.clone();
        Some(Self {
            method: self.method,
            path_and_query: self.path_and_query.clone(),
            headers: self.headers.clone(),
            body: Body::from(body),
            deadline: self.deadline,
            only_reads: self.only_reads,
        })
    }
}

/// An answer of the primary whose body is on its way.
#[derive(Debug)]
pub struct Streamed {
    /// Its status.
    pub status: StatusCode,
    /// The protocol.
    pub version: Version,
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body.
    pub body: Incoming,
    /// How long its head took.
    pub took: Duration,
    /// The log's head when it answered.
    pub head: Option<LogPosition>,
    /// What the exchange takes of the budget, until the body is over.
    pub held: Held,
}

/// Parts of a budget.
pub type Held = Vec<OwnedSemaphorePermit>;

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
    client: Client<Connector, Body>,
    /// For bodies that stream: a connection each, since one that nobody reads would hold up all others
    /// on a connection that they share.
    streams: Client<Connector, Body>,
    scheme: Scheme,
    authority: http::uri::Authority,
    name: Name,
    asked: HeaderValue,
    region: HeaderValue,
    credential: HeaderValue,
    budget: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    stream_budget: Arc<Semaphore>,
    breaker: Breaker,
    trip_ms: AtomicU32,
}

/// Why a region cannot know its way to the primary.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The URL has no host.
    #[error("the primary's URL has no host")]
    Url,
    /// Its certificate could not be verified.
    #[error("tls to the primary cannot be set up")]
    Tls(#[from] TlsError),
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
        let roots = config.tls_ca.as_deref();
        let timeout = config.connect_timeout.get();
        let connector = client::connector(&url, roots, timeout, Protocols::Http2)?;
        let client = Client::builder(TokioExecutor::new())
            .http2_only(true)
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .http2_keep_alive_interval(PING_INTERVAL)
            .http2_keep_alive_timeout(PING_TIMEOUT)
            .http2_keep_alive_while_idle(true)
            .build(connector);
        let apart = client::connector(&url, roots, timeout, Protocols::Http1)?;
        let streams = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(STREAM_IDLE_TIMEOUT)
            .build(apart);
        Ok(Self {
            client,
            streams,
            scheme: url.scheme().cloned().unwrap_or(Scheme::HTTP),
            authority,
            name: config.name.clone(),
            asked: HeaderValue::from_str(config.name.as_str()).map_err(|_| UpstreamError::Url)?,
            region: HeaderValue::from_str(region.as_str()).map_err(|_| UpstreamError::Url)?,
            credential: hop::credential(credential).ok_or(UpstreamError::Credential)?,
            budget: Arc::new(Semaphore::new(config.forwards_max)),
            reads: Arc::new(Semaphore::new(config.forwarded_reads_max)),
            stream_budget: Arc::new(Semaphore::new(config.forwarded_streams_max)),
            breaker: Breaker::new(config.breaker_failures_max, config.breaker_open.get()),
            trip_ms: AtomicU32::new(0),
        })
    }

    /// The primary's region.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// Whether a read would be sent now.
    pub fn is_available(&self, now: Instant) -> bool {
        let room = 0 < self.budget.available_permits() && 0 < self.reads.available_permits();
        room && self.breaker.is_passable(now)
    }

    /// How long a request is expected to take; `None` before the first.
    pub fn trip_ms(&self) -> Option<u32> {
        Some(self.trip_ms.load(Ordering::Relaxed)).filter(|ms| 0 < *ms)
    }

    /// Sends a request of a caller, marked as forwarded. Reads have a budget of their own: they may
    /// wait at the primary, and must not wait in the way of writes.
    pub async fn forward(&self, outgoing: Outgoing<'_>) -> Result<Reply, ForwardError> {
        let mut held = vec![taken(&self.budget)?];
        if outgoing.only_reads {
            held.push(taken(&self.reads)?);
        }
        let (deadline, outgoing) = (outgoing.deadline, self.marked(outgoing));
        let exchange = async { whole(self.exchange(&self.client, outgoing, held).await?).await };
        self.tried(deadline, exchange).await
    }

    /// The same, and bodies come as they are sent. Streams have a budget of their own too, since they last
    /// as long as their readers like.
    pub async fn forward_streamed(&self, outgoing: Outgoing<'_>) -> Result<Streamed, ForwardError> {
        let held = vec![taken(&self.stream_budget)?];
        let (deadline, outgoing) = (outgoing.deadline, self.marked(outgoing));
        self.tried(deadline, self.exchange(&self.streams, outgoing, held)).await
    }

    /// Sends a request of our own.
    pub async fn send(&self, outgoing: Outgoing<'_>) -> Result<Reply, ForwardError> {
        let held = vec![taken(&self.budget)?];
        let deadline = outgoing.deadline;
        let exchange = async { whole(self.exchange(&self.client, outgoing, held).await?).await };
        self.tried(deadline, exchange).await
    }

    fn marked<'a>(&self, mut outgoing: Outgoing<'a>) -> Outgoing<'a> {
        outgoing.headers.insert(hop::HOP, self.region.clone());
        outgoing
    }

    /// Lets the breaker know how an exchange ends.
    async fn tried<T>(
        &self,
        deadline: Instant,
        exchange: impl Future<Output = Result<T, ForwardError>>,
    ) -> Result<T, ForwardError> {
        let pass = self.breaker.pass(Instant::now()).ok_or(ForwardError::Open)?;
        // A client that takes a moment to notice the deadline must not make us late.
        let replied = tokio::time::timeout_at(deadline, exchange).await;
        let replied = replied.unwrap_or(Err(ForwardError::Deadline));
        self.note(pass, replied.as_ref().err());
        replied
    }

    /// Sends, once more if it may be and the connection was to blame.
    async fn exchange(
        &self,
        client: &Client<Connector, Body>,
        outgoing: Outgoing<'_>,
        held: Held,
    ) -> Result<Streamed, ForwardError> {
        let began = Instant::now();
        let again = outgoing.again();
        let response = match (self.request_once(client, outgoing).await, again) {
            (Err(error), Some(again)) if error.is_of_connection() => {
                tracing::debug!(%error, "asked the primary once more");
                self.request_once(client, again).await?
            }
            (response, _) => response?,
        };
        let (parts, body) = response.into_parts();
        let head = parts.headers.get(hop::HEAD).and_then(|head| head.to_str().ok());
        Ok(Streamed {
            status: parts.status,
            version: parts.version,
            head: head.and_then(request::log_position),
            headers: parts.headers,
            body,
            took: began.elapsed(),
            held,
        })
    }

    async fn request_once(
        &self,
        client: &Client<Connector, Body>,
        mut outgoing: Outgoing<'_>,
    ) -> Result<http::Response<Incoming>, ForwardError> {
        let fault = outgoing.body.watch();
        let request = self.request(outgoing, Instant::now())?;
        client.request(request).await.map_err(|error| match fault.get() {
            Some(fault) => ForwardError::Body(*fault),
            None if error.is_connect() => ForwardError::Connect(error),
            None => ForwardError::Lost(Box::new(error)),
        })
    }

    fn request(&self, outgoing: Outgoing<'_>, now: Instant) -> Result<Request<Body>, ForwardError> {
        let uri = Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query(outgoing.path_and_query)
            .build()?;
        // What it takes to bring the answer home is not there to be waited away at the primary.
        let trip = Duration::from_millis(u64::from(self.trip_ms().unwrap_or(0)));
        let left = outgoing.deadline.saturating_duration_since(now);
        let left = left.saturating_sub(trip + ANSWER_MARGIN).max(ANSWER_MARGIN);
        let mut request = Request::new(outgoing.body);
        *request.method_mut() = outgoing.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = outgoing.headers;
        let headers = request.headers_mut();
        headers.insert(hop::CREDENTIAL, self.credential.clone());
        headers.insert(hop::ASKED, self.asked.clone());
        headers.insert(hop::DEADLINE_MS, HeaderValue::from(left.as_millis() as u64));
        Ok(request)
    }

    fn note(&self, pass: Pass<'_>, error: Option<&ForwardError>) {
        let turned = match error {
            None => pass.succeeded(),
            Some(ForwardError::Connect(_) | ForwardError::Lost(_)) => pass.failed(Instant::now()),
            Some(ForwardError::Deadline) => pass.late(Instant::now()),
            // Nothing was found out about the primary.
            Some(
                ForwardError::NoBudget
                | ForwardError::Open
                | ForwardError::Body(_)
                | ForwardError::TooLarge
                | ForwardError::Malformed(_),
            ) => Turned::Unchanged,
        };
        match turned {
            Turned::Unchanged => {}
            Turned::Opened => tracing::warn!(region = %self.name, "the primary does not answer"),
            Turned::Closed => tracing::info!(region = %self.name, "the primary answers again"),
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

fn taken(budget: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, ForwardError> {
    Arc::clone(budget).try_acquire_owned().map_err(|_| ForwardError::NoBudget)
}

async fn whole(streamed: Streamed) -> Result<Reply, ForwardError> {
    let Streamed { status, headers, body, took, head, held, .. } = streamed;
    let began = Instant::now();
    let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|error| {
        if error.is::<LengthLimitError>() {
            ForwardError::TooLarge
        } else {
            ForwardError::Lost(error)
        }
    })?;
    drop(held);
    Ok(Reply { status, headers, body: body.to_bytes(), took: took + began.elapsed(), head })
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::body::BodyError;

    #[test]
    fn only_what_reads_and_is_here_as_a_whole_is_sent_twice() {
        let outgoing = |only_reads, body| Outgoing {
            method: &Method::GET,
            path_and_query: "/".to_owned(),
            headers: HeaderMap::new(),
            body,
            deadline: Instant::now(),
            only_reads,
        };
        let whole = || Body::from(Bytes::from("tide"));
        let coming = || {
            let never = futures::stream::pending::<Result<_, BodyError>>();
            Body::stream(http_body_util::StreamBody::new(never))
        };
        assert!(outgoing(true, whole()).again().is_some());
        assert!(outgoing(true, coming()).again().is_none());
        assert!(outgoing(false, whole()).again().is_none());
    }
}
