//! The user's own service in this region.

use std::{sync::Arc, time::Duration};

use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version, uri::Scheme};
use hyper::body::Incoming;
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::config::RouteConfig;
use crate::{
    body::{Body, Fault},
    upstream::is_timeout,
};

/// Idle connections that are kept for the next requests.
const IDLE_CONNECTIONS_MAX: usize = 128;
/// Shorter than services usually keep theirs, so that few requests meet one that is being closed.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);

/// Why the service did not answer.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// As many requests are under way as may.
    #[error("as many requests to the service are under way as may")]
    NoBudget,
    /// No connection; nothing was sent.
    #[error("the service cannot be connected to")]
    Connect(#[source] hyper_util::client::legacy::Error),
    /// The connection was lost after something may have been sent.
    #[error("the connection to the service was lost")]
    Lost(#[source] hyper_util::client::legacy::Error),
    /// The request's own body broke off.
    #[error("{0}")]
    Body(Fault),
    /// It did not answer in time.
    #[error("the service did not answer in time")]
    Deadline,
    /// The request cannot be written.
    #[error("the request cannot be passed on")]
    Malformed(#[from] http::Error),
}

/// What is asked of it.
#[derive(Debug)]
pub struct Asked<'a> {
    /// The method.
    pub method: &'a Method,
    /// Path and query.
    pub path_and_query: &'a str,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Body,
    /// When the answer's head is due.
    pub deadline: Instant,
}

/// Its answer; the body is on its way.
#[derive(Debug)]
pub struct Served {
    /// The status.
    pub status: StatusCode,
    /// The protocol.
    pub version: Version,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Incoming,
    /// What the exchange takes of the budget, until the body is over.
    pub held: OwnedSemaphorePermit,
}

/// The way to it.
#[derive(Debug)]
pub struct Backend {
    client: Client<HttpConnector, Body>,
    authority: http::uri::Authority,
    budget: Arc<Semaphore>,
}

impl Backend {
    /// Of a route; `None` when its URL is none.
    pub fn new(config: &RouteConfig) -> Option<Self> {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(config.connect_timeout.get()));
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(connector);
        let budget = Arc::new(Semaphore::new(config.requests_max.min(Semaphore::MAX_PERMITS)));
        Some(Self { client, authority: config.authority()?, budget })
    }

    /// Asks, once more if it is safe to and the connection was to blame.
    pub async fn ask(&self, asked: Asked<'_>) -> Result<Served, BackendError> {
        let held = Arc::clone(&self.budget).try_acquire_owned();
        let held = held.map_err(|_| BackendError::NoBudget)?;
        let deadline = asked.deadline;
        let answered = tokio::time::timeout_at(deadline, self.exchange(asked)).await;
        let (parts, body) = answered.unwrap_or(Err(BackendError::Deadline))?.into_parts();
        let (status, version, headers) = (parts.status, parts.version, parts.headers);
        Ok(Served { status, version, headers, body, held })
    }

    async fn exchange(&self, asked: Asked<'_>) -> Result<Response<Incoming>, BackendError> {
        let again = asked.again();
        match (self.send(asked).await, again) {
            (Err(BackendError::Connect(error) | BackendError::Lost(error)), Some(again))
                if !is_timeout(&error) =>
            {
                tracing::debug!(%error, "asked the service once more");
                self.send(again).await
            }
            (answered, _) => answered,
        }
    }

    async fn send(&self, mut asked: Asked<'_>) -> Result<Response<Incoming>, BackendError> {
        let fault = asked.body.watch();
        let uri = Uri::builder()
            .scheme(Scheme::HTTP)
            .authority(self.authority.clone())
            .path_and_query(asked.path_and_query)
            .build()?;
        let mut request = Request::new(asked.body);
        *request.method_mut() = asked.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = asked.headers;
        self.client.request(request).await.map_err(|error| match fault.get() {
            Some(fault) => BackendError::Body(*fault),
            None if error.is_connect() => BackendError::Connect(error),
            None => BackendError::Lost(error),
        })
    }
}

impl Asked<'_> {
    fn again(&self) -> Option<Self> {
        let body = self.body.whole().filter(|_| self.method.is_safe())?.clone();
        Some(Self {
            method: self.method,
            path_and_query: self.path_and_query,
            headers: self.headers.clone(),
            body: Body::from(body),
            deadline: self.deadline,
        })
    }
}
