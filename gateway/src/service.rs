//! One request from its first header to its finished answer.

use std::{
    convert::Infallible,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use consistency::{Judged, Token};
use futures::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::{Body as _, Incoming};
use matchit::{Match, Router};
use tokio::time::Instant;

use crate::{
    aggregates,
    answer::Answer,
    auth::{Admitted, Entry},
    body::Body,
    epochs,
    error::Error,
    events,
    forward::CONSISTENCY_STATUS,
    gateway::{Gateway, Role},
    hop, internal, openapi, overview, problem, proxied, read,
    request::{self, Call, REQUEST_ID, RequestId},
    status::Outcome,
    telemetry::RequestKind,
    token_carrier::CONSISTENCY_TOKEN,
    trace, write,
};

/// Where a request's time went.
pub const SERVER_TIMING: http::HeaderName = http::HeaderName::from_static("server-timing");
const VARY: &str = "Consistency-Token, Cookie, Consistency-Policy, Prefer";

/// What a path names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    AggregateEvents,
    Aggregate,
    Command,
    Row,
    Search,
    Currency,
    CurrencyEvents,
    OpenApi,
    InternalLog,
    InternalAggregate,
    InternalEpochs,
}

impl Route {
    /// Every route, with its pattern.
    pub const ALL: [(&str, Self); 11] = [
        ("/v1/aggregates/{type}/{id}/events", Self::AggregateEvents),
        ("/v1/aggregates/{type}/{id}", Self::Aggregate),
        ("/v1/commands/{command}", Self::Command),
        ("/v1/views/{view}/{key}", Self::Row),
        ("/v1/views/{view}", Self::Search),
        ("/v1/currency", Self::Currency),
        (events::PATH, Self::CurrencyEvents),
        (openapi::PATH, Self::OpenApi),
        ("/internal/log", Self::InternalLog),
        ("/internal/log/{type}/{id}", Self::InternalAggregate),
        ("/internal/epochs", Self::InternalEpochs),
    ];

    /// As written, for metrics.
    fn pattern(route: Option<Self>) -> &'static str {
        let known = Self::ALL.iter().find(|(_, known)| Some(*known) == route);
        known.map_or("other", |(pattern, _)| pattern)
    }

    /// The methods that it takes, as `Allow` names them.
    pub const fn methods(self) -> &'static str {
        match self {
            Self::AggregateEvents => "GET, HEAD, POST",
            Self::Command => "POST",
            Self::Aggregate
            | Self::Row
            | Self::Search
            | Self::Currency
            | Self::CurrencyEvents
            | Self::OpenApi
            | Self::InternalLog
            | Self::InternalAggregate
            | Self::InternalEpochs => "GET, HEAD",
        }
    }
}

/// Answers requests. Cheap to clone, which every request does.
#[derive(Clone)]
pub struct Service(Arc<Served>);

struct Served {
    gateway: Arc<Gateway>,
    routes: Router<Route>,
    document: Bytes,
}

impl Service {
    /// Over a gateway.
    pub fn new(gateway: Arc<Gateway>) -> Self {
        let mut routes = Router::new();
        for (pattern, route) in Route::ALL {
            routes.insert(pattern, route).expect("our patterns do not conflict");
        }
        let document = openapi::document(&gateway.config, &gateway.domain);
        Self(Arc::new(Served { gateway, routes, document }))
    }

    /// Answers one request.
    pub async fn answer(self, request: Request<Admitted<Incoming>>) -> Response<Body> {
        let began = Instant::now();
        let (mut parts, Admitted { entry, body }) = request.into_parts();
        let Served { gateway, routes, .. } = &*self.0;
        let gateway = &**gateway;
        let Entry { peer, trusted, caller } = entry;
        let bound = gateway.config.listen.request_timeout.get();
        let deadline = request::deadline(&parts.headers, began, bound);
        let presented = epochs::open(gateway, &parts.headers, deadline).await;
        let uri = parts.uri.clone();
        let found = routes.at(uri.path()).ok();
        let route = found.as_ref().map(|found| *found.value);
        let proxied = if route.is_none() { gateway.routes.find(uri.path()) } else { None };
        let label = if proxied.is_some() { "proxied" } else { Route::pattern(route) };
        let method = method_label(&parts.method);
        let is_head = parts.method == Method::HEAD;
        let by_path = proxied.is_some_and(|route| route.writes(&parts.method, uri.path()));
        let is_write = by_path || !parts.method.is_safe();
        let traces = &gateway.instruments.traces;
        let mut span = trace::of_request(traces, &mut parts.headers, Route::pattern(route), method);
        let wants_cookie = presented.wants_cookie;
        let admitted = caller.map_err(Error::from).and_then(|caller| {
            request::check_headers(&parts.headers, &gateway.config.listen.limits)?;
            Ok((caller, request::token_of(presented, &gateway.history())?))
        });
        let unreadable = matches!(&admitted, Ok((_, (_, true))));
        let mut refused = Vec::new();
        let (request_id, known, answered) = match admitted {
            Err(error) => {
                refused.extend(parts.headers.get_all(CONSISTENCY_TOKEN).iter().cloned());
                (RequestId::of(&parts.headers), None, Err(error))
            }
            Ok((caller, token)) => {
                let mut call = Call::new(parts, token, trusted, (began, deadline));
                (call.caller, call.peer) = (caller, Some(peer.0));
                let answered = self.dispatch(&mut call, body, found).await;
                (call.id, Some(call.token), answered)
            }
        };
        let refusal = |error| problem::answer(&error, &gateway.config.region, &request_id);
        let answer = carried_over(gateway, answered.unwrap_or_else(refusal));
        let has_acted = is_write && answer.status.is_success();
        // What the primary answered it has judged itself.
        let judged_here = known.as_ref().filter(|_| is_made_here(gateway, &answer));
        let fits = epochs::fits(gateway, judged_here, answer.shows.as_ref(), has_acted);
        let answer = fits.await.map_or_else(refusal, |()| answer);
        let finishing = Finishing {
            gateway,
            wants_cookie,
            refused,
            known,
            unreadable,
            is_write,
            trusted,
            request_id,
            began,
        };
        if let Some(said) = &answer.said {
            span.set("tidemark.outcome", said.outcome.as_str());
        }
        let mut response = finishing.finish(answer);
        if is_head {
            *response.body_mut() = Body::empty();
        }
        let status = response.status().as_u16();
        span.set("http.response.status_code", i64::from(status));
        let kind = RequestKind { route: label, method, status };
        gateway.instruments.answered(kind, began.elapsed());
        response
    }

    /// Whatever may wait is boxed, so that a request that is answered at once is small.
    async fn dispatch(
        &self,
        call: &mut Call,
        body: Incoming,
        found: Option<Match<'_, '_, &Route>>,
    ) -> Result<Answer, Error> {
        let Served { gateway, document, .. } = &*self.0;
        let gateway = &**gateway;
        let _permit = gateway.requests.try_acquire().map_err(|_| Error::Overloaded)?;
        hop::is_for_us(gateway, call)?;
        if call.token.epoch() <= gateway.history().current() {
            // Nobody but us seals tokens, so the log has been there.
            let seen =
                consistency::LogPosition::new(call.token.epoch(), call.token.largest_position());
            gateway.currency.saw_head(seen);
        }
        refuse_upgrade(call)?;
        let Some(found) = found else {
            let route = gateway.routes.find(&call.path).ok_or(Error::NotFound)?;
            return Box::pin(proxied::answer(gateway, route, call, body)).await;
        };
        let route = *found.value;
        let parameter = |name| found.params.get(name).unwrap_or_default();
        let is_read = matches!(call.method, Method::GET | Method::HEAD);
        let is_write = call.method == Method::POST;
        if is_write {
            call.body = Box::pin(read_body(gateway, call, body)).await?;
        }
        match route {
            Route::AggregateEvents if is_read => {
                let (kind, id) = (parameter("type"), parameter("id"));
                Box::pin(aggregates::events(gateway, call, kind, id)).await
            }
            Route::AggregateEvents if is_write => {
                may_write(gateway, call)?;
                let (kind, id) = (parameter("type"), parameter("id"));
                Box::pin(write::append(gateway, call, kind, id)).await
            }
            Route::Command if is_write => {
                may_write(gateway, call)?;
                Box::pin(write::command(gateway, call, parameter("command"))).await
            }
            Route::Aggregate if is_read => {
                let (kind, id) = (parameter("type"), parameter("id"));
                Box::pin(aggregates::state(gateway, call, kind, id)).await
            }
            // A search has no key: what it finds is said in the query.
            Route::Row | Route::Search if is_read => {
                read::view(gateway, call, parameter("view"), parameter("key")).await
            }
            Route::Currency if is_read => overview::answer(gateway, call),
            Route::CurrencyEvents if is_read => events::listen(&self.0.gateway, call),
            Route::OpenApi if is_read => openapi::answer(call, document),
            Route::InternalLog if is_read => Box::pin(internal::log(gateway, call)).await,
            Route::InternalAggregate if is_read => {
                let (kind, id) = (parameter("type"), parameter("id"));
                Box::pin(internal::aggregate(gateway, call, kind, id)).await
            }
            Route::InternalEpochs if is_read => Box::pin(internal::epochs(gateway, call)).await,
            Route::AggregateEvents
            | Route::Command
            | Route::Aggregate
            | Route::Row
            | Route::Search
            | Route::Currency
            | Route::CurrencyEvents
            | Route::OpenApi
            | Route::InternalLog
            | Route::InternalAggregate
            | Route::InternalEpochs => Err(Error::MethodNotAllowed(route.methods())),
        }
    }
}

impl tower::Service<Request<Admitted<Incoming>>> for Service {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Admitted<Incoming>>) -> Self::Future {
        Box::pin(self.clone().answer(request).map(Ok))
    }
}

/// A primary that has not heard of an epoch that a caller has is not the primary any more.
pub fn may_write(gateway: &Gateway, call: &Call) -> Result<(), Error> {
    let is_primary = matches!(gateway.role, Role::Primary(_));
    let deposed = is_primary && gateway.history().current() < call.token.epoch();
    if deposed { Err(Error::NotPrimary) } else { Ok(()) }
}

/// A connection stays what it is. Who merely offers HTTP/2 in the clear is answered without.
fn refuse_upgrade(call: &Call) -> Result<(), Error> {
    let offered = call.headers.get_all(header::UPGRADE).iter();
    let other = offered.into_iter().any(|to| !to.as_bytes().eq_ignore_ascii_case(b"h2c"));
    if other || call.method == Method::CONNECT {
        return Err(Error::NotSupported("upgrades, such as to WebSocket, are not passed on"));
    }
    if call.method == Method::TRACE {
        return Err(Error::NotSupported("TRACE"));
    }
    Ok(())
}

/// All of a body that is kept in memory.
pub async fn read_body(gateway: &Gateway, call: &Call, body: Incoming) -> Result<Bytes, Error> {
    let max = gateway.config.listen.body_bytes_max;
    let too_large = || Error::TooLarge(format!("a body has at most {max} bytes"));
    if body.size_hint().lower() > max as u64 {
        return Err(too_large());
    }
    let collecting = Limited::new(body, max).collect();
    match tokio::time::timeout_at(call.deadline, collecting).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(Error::BadRequest("the body broke off".to_owned())),
        Err(_) => Err(Error::BadRequest("the body did not arrive in time".to_owned())),
    }
}

fn method_label(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        "PATCH" => "PATCH",
        "OPTIONS" => "OPTIONS",
        _ => "_OTHER",
    }
}

/// What every answer carries.
struct Finishing<'a> {
    gateway: &'a Gateway,
    wants_cookie: bool,
    /// The tokens of a request that was not let in, as they came.
    refused: Vec<HeaderValue>,
    /// What the caller knew; `None` when its token was refused.
    known: Option<Token>,
    /// Its cookie cannot be read here, and it cannot mend it.
    unreadable: bool,
    is_write: bool,
    trusted: bool,
    request_id: RequestId,
    began: Instant,
}

impl Finishing<'_> {
    fn finish(mut self, mut answer: Answer) -> Response<Body> {
        if self.unreadable {
            answer.shows = self.in_place_of_unreadable(&answer);
            self.known = None;
        }
        let Answer { status, headers, body, shows, said, timing } = answer;
        let mut response = Response::new(body);
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        let headers = response.headers_mut();
        let is_read = said.is_some() && !self.is_write;
        let cacheable = is_read && matches!(status, StatusCode::OK | StatusCode::NOT_MODIFIED);
        // A service that wants less than that gets it.
        let forbidden = headers.get(header::CACHE_CONTROL).is_some_and(forbids_storing);
        let caching = if cacheable && !forbidden { "private, no-cache" } else { "no-store" };
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static(caching));
        if cacheable {
            headers.append(header::VARY, HeaderValue::from_static(VARY));
        }
        if let Some(said) = said {
            headers.insert(CONSISTENCY_STATUS, said.header());
        }
        headers.insert(SERVER_TIMING, timing.header(self.began.elapsed()));
        headers.insert(REQUEST_ID, self.request_id.header());
        if self.trusted {
            set(headers, hop::HEAD, self.gateway.head().to_string());
        }
        self.carry_token(shows, headers);
        response
    }

    /// What takes the place of a cookie that cannot be read, once the primary has answered as of its
    /// head: everything up to that head, and whatever was written before. `None` for any other answer,
    /// which must not set a cookie that knows less than the one it replaces.
    fn in_place_of_unreadable(&self, answer: &Answer) -> Option<Token> {
        let shows = answer.shows.clone()?;
        let is_read = answer.said.as_ref().is_some_and(|said| said.outcome == Outcome::Primary);
        let is_written = self.is_write && answer.status.is_success();
        let head = self.gateway.head();
        let seen = Token::new(head.epoch).with_read(head.position).with_claims_forgotten();
        (is_read || is_written).then(|| seen.merge(shows))
    }

    /// The merge of what was sent and what is shown. A token that was refused is handed back as it
    /// came when another gateway may know what to do with it: replacing it by a fresh one would lose
    /// the caller's writes without a word.
    fn carry_token(self, shows: Option<Token>, headers: &mut HeaderMap) {
        let carrier = &self.gateway.carrier;
        match (self.known, shows) {
            // The primary's own, which cannot be opened here yet.
            _ if headers.contains_key(CONSISTENCY_TOKEN) => {}
            (Some(known), shows) => {
                let token = match shows {
                    Some(shows) => known.merge(shows),
                    None => known,
                };
                carrier.attach(&token, self.wants_cookie, headers);
            }
            (None, Some(fresh)) => carrier.attach(&fresh, self.wants_cookie, headers),
            (None, None) => {
                for value in self.refused {
                    headers.append(CONSISTENCY_TOKEN, value);
                }
            }
        }
    }
}

/// What an answer shows as it counts in the newest epoch. A row or a repeated write may be of an older
/// one, and what the caller knows was brought to the newest: a merge would keep only that.
fn carried_over(gateway: &Gateway, answer: Answer) -> Answer {
    let carried = |shows| match gateway.history().judge(shows) {
        Judged::Current(token)
        | Judged::Carried(token)
        | Judged::Lost(token)
        | Judged::Newer(token) => token,
    };
    Answer { shows: answer.shows.map(carried), ..answer }
}

/// Whether it shows what this region has, and not what the primary was asked for.
fn is_made_here(gateway: &Gateway, answer: &Answer) -> bool {
    match (&gateway.role, &answer.said) {
        (Role::Primary(_), _) => true,
        (Role::Region(_), Some(said)) => said.region == gateway.config.region,
        (Role::Region(_), None) => false,
    }
}

fn forbids_storing(caching: &HeaderValue) -> bool {
    caching.to_str().is_ok_and(|caching| caching.to_ascii_lowercase().contains("no-store"))
}

fn set(headers: &mut HeaderMap, name: http::HeaderName, value: String) {
    if let Ok(value) = HeaderValue::try_from(value) {
        headers.insert(name, value);
    }
}
