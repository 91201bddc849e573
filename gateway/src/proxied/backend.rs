//! The user's own service in this region.

use std::{error::Error as StdError, sync::Arc};

use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
    uri::{PathAndQuery, Scheme},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};

use super::{
    config::RouteConfig,
    lines::{Answered, LineError, Lines},
};
use crate::{
    body::{Body, Fault},
    upstream::is_timeout,
};

/// Why the service did not answer.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// As many requests are under way as may.
    #[error("as many requests to the service are under way as may")]
    NoBudget,
    /// No connection; nothing was sent.
    #[error("the service cannot be connected to")]
    Connect(#[source] Box<dyn StdError + Send + Sync>),
    /// The connection was lost after something may have been sent.
    #[error("the connection to the service was lost")]
    Lost(#[source] hyper::Error),
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

impl BackendError {
    /// The connection failed, and not because something took too long: another one may do.
    fn is_of_connection(&self) -> bool {
        match self {
            Self::Connect(error) => !is_timeout(&**error),
            Self::Lost(error) => !is_timeout(error),
            Self::NoBudget | Self::Body(_) | Self::Deadline | Self::Malformed(_) => false,
        }
    }
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
    pub body: Answered,
    /// What the exchange takes of the budget, until the body is over.
    pub held: OwnedSemaphorePermit,
}

/// The way to it.
#[derive(Debug)]
pub struct Backend {
    lines: Lines,
    host: HeaderValue,
    budget: Arc<Semaphore>,
}

impl Backend {
    /// Of a route; `None` when its URL is none.
    pub fn new(config: &RouteConfig) -> Option<Self> {
        let authority = config.authority()?;
        // As a client that leaves out the port that everybody expects.
        let port = authority.port_u16().filter(|port| *port != 80);
        let port = port.map_or_else(String::new, |port| format!(":{port}"));
        let host = HeaderValue::try_from(format!("{}{port}", authority.host())).ok()?;
        let address = Uri::builder().scheme(Scheme::HTTP).authority(authority).path_and_query("/");
        let lines = Lines::new(address.build().ok()?, config.connect_timeout.get());
        let budget = Arc::new(Semaphore::new(config.requests_max.min(Semaphore::MAX_PERMITS)));
        Some(Self { lines, host, budget })
    }

    /// Asks, and if the connection was to blame once more, where `again` says that it is safe to.
    pub async fn ask<'a>(
        &self,
        asked: Asked<'a>,
        again: impl FnOnce() -> Option<Asked<'a>>,
    ) -> Result<Served, BackendError> {
        let held = Arc::clone(&self.budget).try_acquire_owned();
        let held = held.map_err(|_| BackendError::NoBudget)?;
        let deadline = asked.deadline;
        let answered = tokio::time::timeout_at(deadline, self.exchange(asked, again)).await;
        let (parts, body) = answered.unwrap_or(Err(BackendError::Deadline))?.into_parts();
        let (status, version, headers) = (parts.status, parts.version, parts.headers);
        Ok(Served { status, version, headers, body, held })
    }

    async fn exchange<'a>(
        &self,
        asked: Asked<'a>,
        again: impl FnOnce() -> Option<Asked<'a>>,
    ) -> Result<Response<Answered>, BackendError> {
        let error = match self.send(asked).await {
            Err(error) if error.is_of_connection() => error,
            answered => return answered,
        };
        let Some(again) = again() else { return Err(error) };
        tracing::debug!(%error, "asked the service once more");
        self.send(again).await
    }

    async fn send(&self, mut asked: Asked<'_>) -> Result<Response<Answered>, BackendError> {
        let fault = asked.body.watch();
        let path_and_query = PathAndQuery::try_from(asked.path_and_query);
        let mut request = Request::new(asked.body);
        *request.method_mut() = asked.method.clone();
        *request.uri_mut() = path_and_query.map_err(http::Error::from)?.into();
        *request.headers_mut() = asked.headers;
        request.headers_mut().insert(header::HOST, self.host.clone());
        self.lines.send(request).await.map_err(|error| match (fault.get(), error) {
            (Some(fault), _) => BackendError::Body(*fault),
            (None, LineError::Connect(error)) => BackendError::Connect(error),
            (None, LineError::Lost(error)) => BackendError::Lost(error),
        })
    }
}
