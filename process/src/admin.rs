//! The listener for those who run the service: `/livez`, `/readyz`, `/metrics`, `/status`.

mod readiness;

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

pub use readiness::{Condition, Readiness};

use crate::{
    config::Secret,
    server::{self, ServerLimits},
    telemetry::Metrics,
};

/// Where the listener is.
#[derive(Debug, Clone, Deserialize)]
pub struct AdminConfig {
    /// Loopback unless there is a reason and a credential.
    pub address: SocketAddr,
    /// When set, everything but the two probes wants it as a bearer token.
    pub credential: Option<Secret>,
}

impl AdminConfig {
    /// What is wrong with it, for [`crate::config::Config::mistakes`].
    pub fn mistakes(&self) -> Vec<String> {
        let open = !self.address.ip().is_loopback() && self.credential.is_none();
        let said = "admin.credential: must be set when admin.address is not a loopback address";
        open.then(|| said.to_owned()).into_iter().collect()
    }
}

/// Answers a request that the listener itself does not know. `None`: neither do I.
pub type Operations = Arc<
    dyn Fn(Request<Bytes>) -> futures::future::BoxFuture<'static, Option<Response<Full<Bytes>>>>
        + Send
        + Sync,
>;

/// What the listener shows.
#[derive(Clone)]
pub struct Admin {
    /// Whether the instance should get work.
    pub readiness: Readiness,
    /// What it measures.
    pub metrics: Metrics,
    /// The body of `/status`.
    pub status: Arc<dyn Fn() -> serde_json::Value + Send + Sync>,
    /// The operator's API of the service, when it has one.
    pub operations: Option<Operations>,
}

const BODY_BYTES_MAX: usize = 64 * 1024;

/// Serves until `stop` is cancelled.
pub async fn serve(
    listener: TcpListener,
    credential: Option<Secret>,
    admin: Admin,
    stop: CancellationToken,
) {
    let limits = ServerLimits { connections_max: 64, streams_max: 16, ..ServerLimits::default() };
    let shared = Arc::new((admin, credential));
    let answer = move |request, _| {
        let shared = Arc::clone(&shared);
        async move { answer(&shared.0, shared.1.as_ref(), request).await }
    };
    server::serve(listener, limits, answer, stop).await;
}

async fn answer(
    admin: &Admin,
    credential: Option<&Secret>,
    request: Request<Incoming>,
) -> Response<Full<Bytes>> {
    let probe = matches!(request.uri().path(), "/livez" | "/readyz");
    if !probe && !credential.is_none_or(|secret| is_presented(secret, &request)) {
        return text(StatusCode::UNAUTHORIZED, "a bearer credential is needed\n".to_owned());
    }
    let lag_ms_max = query_number(request.uri().query(), "lag_ms_max");
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/livez") => text(StatusCode::OK, "alive\n".to_owned()),
        (&Method::GET, "/readyz") => {
            let report = admin.readiness.report(lag_ms_max);
            let status =
                if report.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json(status, &report)
        }
        (&Method::GET, "/metrics") => text(StatusCode::OK, admin.metrics.render()),
        (&Method::GET, "/status") => json(StatusCode::OK, &(admin.status)()),
        _ => operate(admin, request).await,
    }
}

async fn operate(admin: &Admin, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let unknown = || text(StatusCode::NOT_FOUND, "no such operation\n".to_owned());
    let Some(operations) = &admin.operations else { return unknown() };
    let (head, body) = request.into_parts();
    match Limited::new(body, BODY_BYTES_MAX).collect().await {
        Ok(body) => {
            let request = Request::from_parts(head, body.to_bytes());
            operations(request).await.unwrap_or_else(unknown)
        }
        Err(_) => text(StatusCode::PAYLOAD_TOO_LARGE, "the body is too large\n".to_owned()),
    }
}

fn is_presented(secret: &Secret, request: &Request<Incoming>) -> bool {
    let presented = request.headers().get(header::AUTHORIZATION);
    presented
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .is_some_and(|presented| secret.matches(presented))
}

fn query_number(query: Option<&str>, name: &str) -> Option<u64> {
    let pairs = query?.split('&').filter_map(|pair| pair.split_once('='));
    pairs.filter(|(key, _)| *key == name).find_map(|(_, value)| value.parse().ok())
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    response(status, "text/plain; charset=utf-8", body)
}

fn json(status: StatusCode, body: &impl serde::Serialize) -> Response<Full<Bytes>> {
    let body = serde_json::to_string(body).expect("a report has text keys only");
    response(status, "application/json", body)
}

fn response(status: StatusCode, kind: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
