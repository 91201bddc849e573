//! The HTTP API of the proxies.

use std::convert::Infallible;
use std::sync::Weak;

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{ACCEPT_PAUSE, Inner, Proxies, Proxy, ProxyError, Toxic};

const BODY_BYTES_MAX: usize = 64 * 1024;

/// What each connection of the API needs.
#[derive(Clone)]
pub(super) struct Api {
    pub(super) proxies: Weak<Inner>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Api {
    /// Answers until the proxies are stopped or dropped.
    pub(super) async fn serve(self, listener: TcpListener) {
        loop {
            let accepted = tokio::select! {
                biased;
                // Without proxies there is nothing to answer for.
                () = self.stop.cancelled() => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => drop(self.tasks.spawn(self.clone().connection(stream))),
                Err(error) => {
                    tracing::warn!(error = %error, "could not take a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn connection(self, stream: TcpStream) {
        let proxies = self.proxies;
        let service = service_fn(move |request| {
            let proxies = proxies.upgrade().map(|inner| Proxies { inner });
            async move {
                let answer = match proxies {
                    Some(proxies) => answer(&proxies, request).await,
                    None => Err(Refusal::Proxy(ProxyError::NoSuchProxy)),
                };
                Ok::<_, Infallible>(answer.unwrap_or_else(Refusal::into_response))
            }
        });
        let server = auto::Builder::new(TokioExecutor::new());
        let connection = server.serve_connection(TokioIo::new(stream), service);
        tokio::select! {
            biased;
            () = self.stop.cancelled() => {}
            // A client that goes away in the middle of an order has nothing more to be told.
            _ = connection => {}
        }
    }
}

/// Why an order was not carried out.
enum Refusal {
    Proxy(ProxyError),
    NoSuchPath,
    BadBody(String),
}

impl From<ProxyError> for Refusal {
    fn from(error: ProxyError) -> Self {
        Refusal::Proxy(error)
    }
}

impl Refusal {
    fn into_response(self) -> Response<Full<Bytes>> {
        let (status, error) = match self {
            Refusal::NoSuchPath => (StatusCode::NOT_FOUND, "no such path or method".to_owned()),
            Refusal::BadBody(detail) => (StatusCode::BAD_REQUEST, detail),
            Refusal::Proxy(error) => (status_of(&error), error.to_string()),
        };
        json_response(status, &json!({ "error": error, "status": status.as_u16() }))
    }
}

fn status_of(error: &ProxyError) -> StatusCode {
    match error {
        ProxyError::NoSuchProxy | ProxyError::NoSuchToxic => StatusCode::NOT_FOUND,
        ProxyError::ProxyExists | ProxyError::ToxicExists => StatusCode::CONFLICT,
        ProxyError::Listen { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

#[derive(Deserialize)]
struct NewProxy {
    name: String,
    listen: String,
    upstream: String,
    #[serde(default = "yes")]
    enabled: bool,
}

fn yes() -> bool {
    true
}

#[derive(Deserialize)]
struct ProxyChange {
    enabled: Option<bool>,
}

type Answer = Result<Response<Full<Bytes>>, Refusal>;

async fn answer(proxies: &Proxies, request: Request<Incoming>) -> Answer {
    let method = request.method().clone();
    let path = request.uri().path().trim_matches('/').to_owned();
    let segments: Vec<&str> = path.split('/').collect();
    let body = Limited::new(request.into_body(), BODY_BYTES_MAX).collect().await;
    let body = body.map_err(|error| Refusal::BadBody(error.to_string()))?.to_bytes();
    match (method, segments.as_slice()) {
        (Method::GET, ["version"]) => Ok(ok(&json!({ "version": env!("CARGO_PKG_VERSION") }))),
        (Method::POST, ["reset"]) => {
            proxies.reset().await?;
            Ok(no_content())
        }
        (Method::GET, ["proxies"]) => {
            let all = proxies.lock().values().cloned().collect::<Vec<_>>();
            let by_name = all.iter().map(|proxy| (proxy.name.clone(), describe(proxy)));
            Ok(ok(&by_name.collect::<serde_json::Map<_, _>>().into()))
        }
        (Method::POST, ["proxies"]) => create(proxies, &body).await,
        (Method::GET, ["proxies", name]) => Ok(ok(&describe(&*proxies.get(name)?))),
        (Method::POST | Method::PATCH, ["proxies", name]) => {
            let ProxyChange { enabled } = parse(&body)?;
            if let Some(enabled) = enabled {
                proxies.set_enabled(name, enabled).await?;
            }
            Ok(ok(&describe(&*proxies.get(name)?)))
        }
        (Method::DELETE, ["proxies", name]) => {
            proxies.delete(name).await?;
            Ok(no_content())
        }
        (method, ["proxies", name, "toxics", rest @ ..]) => {
            let proxy = proxies.get(name)?;
            toxics(proxies, &proxy, &method, rest, &body)
        }
        _ => Err(Refusal::NoSuchPath),
    }
}

async fn create(proxies: &Proxies, body: &[u8]) -> Answer {
    let NewProxy { name, listen, upstream, enabled } = parse(body)?;
    proxies.create(&name, &listen, &upstream).await?;
    if !enabled {
        proxies.set_enabled(&name, false).await?;
    }
    Ok(json_response(StatusCode::CREATED, &describe(&*proxies.get(&name)?)))
}

fn toxics(proxies: &Proxies, proxy: &Proxy, method: &Method, path: &[&str], body: &[u8]) -> Answer {
    match (method, path) {
        (&Method::GET, []) => {
            Ok(ok(&json!(proxy.toxics().iter().map(describe_toxic).collect::<Vec<_>>())))
        }
        (&Method::POST, []) => {
            let toxic = parse::<Toxic>(body)?.named();
            proxies.add_toxic(&proxy.name, toxic.clone())?;
            Ok(ok(&describe_toxic(&toxic)))
        }
        (&Method::GET, [toxic]) => Ok(ok(&describe_toxic(&find(proxy, toxic)?))),
        (&Method::POST | &Method::PATCH, [toxic]) => change(proxy, toxic, body),
        (&Method::DELETE, [toxic]) => {
            proxies.remove_toxic(&proxy.name, toxic)?;
            Ok(no_content())
        }
        _ => Err(Refusal::NoSuchPath),
    }
}

/// A change names the attributes only; the rest of the toxic stays.
fn change(proxy: &Proxy, name: &str, body: &[u8]) -> Answer {
    let order: Value = parse(body)?;
    let mut changed = describe_toxic(&find(proxy, name)?);
    let attributes = order.get("attributes").and_then(Value::as_object);
    for (attribute, value) in attributes.into_iter().flatten() {
        changed["attributes"][attribute] = value.clone();
    }
    let toxic: Toxic =
        serde_json::from_value(changed).map_err(|error| Refusal::BadBody(error.to_string()))?;
    proxy.change_toxics(|toxics| {
        let old = toxics.iter_mut().find(|toxic| toxic.name == name);
        *old.ok_or(ProxyError::NoSuchToxic)? = toxic.clone();
        Ok(())
    })?;
    Ok(ok(&describe_toxic(&toxic)))
}

fn find(proxy: &Proxy, name: &str) -> Result<Toxic, ProxyError> {
    proxy.toxics().into_iter().find(|toxic| toxic.name == name).ok_or(ProxyError::NoSuchToxic)
}

fn describe(proxy: &Proxy) -> Value {
    let (to_upstream, from_upstream) = proxy.counters.bytes();
    let connections = proxy.counters.connections.load(std::sync::atomic::Ordering::Relaxed);
    json!({
        "name": proxy.name,
        "listen": proxy.listen(),
        "upstream": proxy.upstream,
        "enabled": proxy.is_enabled(),
        "toxics": proxy.toxics().iter().map(describe_toxic).collect::<Vec<_>>(),
        // Ours: what has passed, to see that a link is used.
        "bytes": { "upstream": to_upstream, "downstream": from_upstream },
        "connections": connections,
    })
}

/// Toxiproxy's clients expect the share of connections a toxic acts on; here it is always all of them.
fn describe_toxic(toxic: &Toxic) -> Value {
    let mut value = json!(toxic);
    value["toxicity"] = json!(1.0);
    value
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Refusal> {
    serde_json::from_slice(body).map_err(|error| Refusal::BadBody(error.to_string()))
}

fn ok(body: &Value) -> Response<Full<Bytes>> {
    json_response(StatusCode::OK, body)
}

fn no_content() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

fn json_response(status: StatusCode, body: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body.to_string()));
    *response.status_mut() = status;
    let json = header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
