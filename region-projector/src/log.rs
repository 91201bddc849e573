//! The primary's log over HTTP: what a region reads when its mirror cannot tell.

mod compact;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use consistency::{AggregateId, Epoch, Event, EventError, LogPosition, Position, Version};
use http::{HeaderMap, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, LengthLimitError, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use process::client::{self, Connector, Protocols};
use process::config::Secret;
use process::tls::TlsError;
use serde::Deserialize;
use tokio::time::timeout;

use crate::config::PrimaryLogConfig;

/// The regions' credential.
const CREDENTIAL_HEADER: &str = "tidemark-credential";
/// The region that reads.
const REGION_HEADER: &str = "tidemark-region";
/// Milliseconds that are left for the answer: a page that takes longer is cut short by its sender.
const DEADLINE_HEADER: &str = "tidemark-deadline-ms";
/// The log's head when the page was read, as `<epoch>.<position>`.
const HEAD_HEADER: &str = "tidemark-head";
/// The largest page that is taken.
const PAGE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// The most epochs a log may have.
const EPOCHS_BYTES_MAX: usize = 64 * 1024;

/// Why the log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The address in the configuration cannot be used.
    #[error("the log's address is malformed")]
    Address(#[from] http::Error),
    /// TLS cannot be set up.
    #[error("tls to the primary cannot be set up")]
    Tls(#[from] TlsError),
    /// The primary cannot be reached.
    #[error("the primary cannot be reached")]
    Unreachable(#[from] hyper_util::client::legacy::Error),
    /// It did not answer in time.
    #[error("the primary did not answer in time")]
    Deadline,
    /// It answered, but not with the log.
    #[error("the primary answered {0}")]
    Status(StatusCode),
    /// The answer broke off.
    #[error("the answer broke off")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The answer is larger than a page may be.
    #[error("the answer is too large")]
    TooLarge,
    /// The answer is not what was agreed.
    #[error("the answer is malformed")]
    Malformed(#[from] serde_json::Error),
    /// A line of it is not an event.
    #[error("a line of the answer is not an event")]
    Event(#[from] EventError),
}

/// A piece of the log.
#[derive(Debug)]
pub struct Page {
    /// Events in position order.
    pub events: Vec<Event>,
    /// The log's head at that time, when the primary said so.
    pub head: Option<LogPosition>,
}

/// Where the log is.
#[derive(Debug, Clone)]
pub struct LogClient {
    http: Client<Connector, Empty<Bytes>>,
    base: String,
    credential: Secret,
    deadline: Duration,
    region: String,
    /// Events of the largest page that is asked for: fewer after one that took too long or was too large,
    /// more again after each that did not. Shared by all clones.
    page_events: Arc<AtomicUsize>,
}

#[derive(Deserialize)]
struct Line {
    headers: HashMap<String, String>,
    data: String,
}

impl LogClient {
    /// As configured.
    pub fn new(config: &PrimaryLogConfig) -> Result<Self, LogError> {
        let (url, deadline) = (config.url.expose(), config.deadline.get());
        let uri = url.parse::<Uri>().map_err(http::Error::from)?;
        let roots = config.tls_ca.as_deref();
        let connector = client::connector(&uri, roots, deadline, Protocols::Any)?;
        let http = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(30))
            .build(connector);
        let base = url.trim_end_matches('/').to_owned();
        let credential = config.credential.clone();
        let page_events = Arc::new(AtomicUsize::new(usize::MAX));
        Ok(Self { http, base, credential, deadline, region: String::new(), page_events })
    }

    /// The same for a region that says its name, and so has a rate of its own.
    pub fn of_region(self, region: &str) -> Self {
        Self { region: region.to_owned(), ..self }
    }

    /// At most `limit` events after a position, fewer when so many were too slow to fetch before.
    pub async fn read(
        &self,
        epoch: Epoch,
        after: Position,
        limit: usize,
    ) -> Result<Page, LogError> {
        let allowed = self.page_events.load(Ordering::Relaxed);
        let limit = limit.min(allowed);
        let path = format!("/internal/log?epoch={epoch}&after={after}&limit={limit}");
        let got = self.get(&path, PAGE_BYTES_MAX).await;
        self.page_events.store(next_page(allowed, limit, got.as_ref().err()), Ordering::Relaxed);
        let (headers, body) = got?;
        let kind = headers.get(header::CONTENT_TYPE);
        let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let events = match kind.is_some_and(|kind| kind == compact::MEDIA_TYPE) {
            true => compact::events(lines)?,
            false => lines.map(event).collect::<Result<_, _>>()?,
        };
        Ok(Page { events, head: head_of_answer(&headers) })
    }

    /// A page of the events of an aggregate from a version on; empty when there are none.
    pub async fn read_aggregate(
        &self,
        epoch: Epoch,
        aggregate: &AggregateId,
        from: Version,
    ) -> Result<Vec<Event>, LogError> {
        let (kind, id) = (aggregate.kind(), utf8_percent_encode(aggregate.id(), NON_ALPHANUMERIC));
        let path = format!("/internal/log/{kind}/{id}?epoch={epoch}&from_version={from}");
        let (_, body) = self.get(&path, PAGE_BYTES_MAX).await?;
        let lines = body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        lines.map(event).collect()
    }

    /// Every epoch after the first, with the last position that it kept of its past.
    pub async fn epochs(&self) -> Result<Vec<(Epoch, Position)>, LogError> {
        let (_, body) = self.get("/internal/epochs", EPOCHS_BYTES_MAX).await?;
        Ok(serde_json::from_slice(&body)?)
    }

    async fn get(&self, path: &str, bytes_max: usize) -> Result<(HeaderMap, Bytes), LogError> {
        let answered = timeout(self.deadline, self.exchange(path, bytes_max)).await;
        answered.map_err(|_| LogError::Deadline)?
    }

    async fn exchange(&self, path: &str, bytes_max: usize) -> Result<(HeaderMap, Bytes), LogError> {
        let uri = Uri::try_from(format!("{}{path}", self.base)).map_err(http::Error::from)?;
        let request = Request::get(uri)
            .header(CREDENTIAL_HEADER, self.credential.expose())
            .header(REGION_HEADER, &self.region)
            .header(DEADLINE_HEADER, (self.deadline / 4 * 3).as_millis().to_string())
            .header(header::ACCEPT, compact::MEDIA_TYPE)
            .body(Empty::new())?;
        let response = self.http.request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(LogError::Status(response.status()));
        }
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, bytes_max).collect().await;
        let body = body.map_err(|error| match error.downcast::<LengthLimitError>() {
            Ok(_) => LogError::TooLarge,
            Err(error) => LogError::Body(error),
        })?;
        Ok((parts.headers, body.to_bytes()))
    }
}

/// Events of the next page at most, after one of so many, of those that were allowed, came or did not.
fn next_page(allowed: usize, asked: usize, error: Option<&LogError>) -> usize {
    match error {
        None if asked < allowed => allowed,
        None => allowed.saturating_mul(2),
        Some(LogError::Deadline | LogError::TooLarge | LogError::Body(_)) => (asked / 2).max(1),
        Some(
            LogError::Address(_)
            | LogError::Tls(_)
            | LogError::Unreachable(_)
            | LogError::Status(_)
            | LogError::Malformed(_)
            | LogError::Event(_),
        ) => allowed,
    }
}

fn head_of_answer(headers: &HeaderMap) -> Option<LogPosition> {
    headers.get(HEAD_HEADER).and_then(|head| head.to_str().ok()).and_then(head_of)
}

fn event(line: &[u8]) -> Result<Event, LogError> {
    let Line { headers, data } = serde_json::from_slice(line)?;
    let find = |name: &'static str| headers.get(name).map(String::as_str);
    Ok(Event::from_message(find, data.into_bytes())?)
}

fn head_of(text: &str) -> Option<LogPosition> {
    let (epoch, position) = text.split_once('.')?;
    let epoch = Epoch::new(epoch.parse().ok()?)?;
    Some(LogPosition::new(epoch, Position::new(position.parse().ok()?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_is_an_epoch_and_a_position() {
        let head = LogPosition::new(Epoch::FIRST, Position::new(42).unwrap());
        assert_eq!(head_of("1.42"), Some(head));
        for strange in ["", "1", "0.4", "1.-4", "1.4.2", "one.four"] {
            assert_eq!(head_of(strange), None, "{strange}");
        }
    }

    #[test]
    fn a_page_that_was_too_slow_is_asked_for_smaller_and_grows_again() {
        let slow = Some(&LogError::Deadline);
        assert_eq!(next_page(usize::MAX, 1000, slow), 500);
        assert_eq!(next_page(1, 1, slow), 1);
        assert_eq!(next_page(500, 500, None), 1000);
        assert_eq!(next_page(500, 3, None), 500, "fewer were wanted");
        assert_eq!(next_page(usize::MAX, 1000, None), usize::MAX);
        assert_eq!(next_page(500, 20, Some(&LogError::Status(StatusCode::BAD_GATEWAY))), 500);
    }

    #[test]
    fn a_line_that_is_no_event_is_an_error() {
        assert!(matches!(event(b"{}"), Err(LogError::Malformed(_))));
        assert!(matches!(event(br#"{"headers":{},"data":"{}"}"#), Err(LogError::Event(_))));
    }
}
