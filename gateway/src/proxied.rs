//! Services that keep their own data, behind the gateway. A read is held to its caller's token before
//! the service is asked, and again when it answers, if it says what it read. A write goes to the
//! primary's service, which appends through our API and hands back the token that it got.

mod answer;
mod backend;
mod config;
mod forward;
mod headers;
mod lines;
mod read;

use bytes::Bytes;
use consistency::{Name, Policy};
use http::{Method, StatusCode, header};
use hyper::body::{Body as HttpBody, Incoming};
use projection::Domain;

use self::backend::{Asked, Backend, BackendError};
use crate::{
    answer::Answer,
    body::{Body, BodyBounds, Bounded, Fault},
    error::Error,
    gateway::{Gateway, Role},
    request::{self, Call},
    service,
};

pub use config::RouteConfig;

/// The routes, the longest prefix first.
#[derive(Debug, Default)]
pub struct Routes(Vec<Route>);

/// One of them.
#[derive(Debug)]
pub struct Route {
    config: RouteConfig,
    projection: Name,
    policy: Policy,
    read_methods: Vec<Method>,
    backend: Backend,
}

/// Why a route cannot be.
#[derive(Debug, thiserror::Error)]
pub enum RouteError {
    /// The domain has no such projection.
    #[error("route {prefix} names projection {projection}, which the domain does not have")]
    Projection {
        /// The route.
        prefix: String,
        /// What it names.
        projection: Name,
    },
    /// Two lead away from one path.
    #[error("there are two routes {0}")]
    Twice(String),
    /// It was not checked with the configuration.
    #[error("route {0} makes no sense")]
    Malformed(String),
}

impl Routes {
    /// As configured. `policy` is the chain of routes that have none.
    pub fn new(configs: &[RouteConfig], domain: &Domain, policy: &str) -> Result<Self, RouteError> {
        let mut routes: Vec<Route> = configs
            .iter()
            .map(|config| Route::new(config, domain, policy))
            .collect::<Result<_, _>>()?;
        routes.sort_by_key(|route| std::cmp::Reverse(route.config.prefix.len()));
        let mut pairs = routes.windows(2);
        match pairs.find(|pair| pair[0].config.prefix == pair[1].config.prefix) {
            Some(pair) => Err(RouteError::Twice(pair[0].config.prefix.clone())),
            None => Ok(Self(routes)),
        }
    }

    /// Where a path leads.
    pub fn find(&self, path: &str) -> Option<&Route> {
        self.0.iter().find(|route| config::is_below(path, &route.config.prefix))
    }
}

impl Route {
    fn new(config: &RouteConfig, domain: &Domain, policy: &str) -> Result<Self, RouteError> {
        let malformed = || RouteError::Malformed(config.prefix.clone());
        let (prefix, projection) = (config.prefix.clone(), config.projection.clone());
        if !domain.projections().iter().any(|known| *known.name() == projection) {
            return Err(RouteError::Projection { prefix, projection });
        }
        let policy = Policy::parse(config.policy.as_deref().unwrap_or(policy));
        Ok(Self {
            projection,
            policy: policy.map_err(|_| malformed())?,
            read_methods: config.methods().ok_or_else(malformed)?,
            backend: Backend::new(config).ok_or_else(malformed)?,
            config: config.clone(),
        })
    }

    /// Whether a request writes, by its method or by its path.
    pub fn writes(&self, method: &Method, path: &str) -> bool {
        !self.config.reads(&self.read_methods, method, path)
    }

    fn request_bounds(&self) -> BodyBounds {
        let config = &self.config;
        BodyBounds { bytes_max: config.request_bytes_max, pause_max: config.pause_max.get() }
    }

    fn answer_bounds(&self) -> BodyBounds {
        let config = &self.config;
        BodyBounds { bytes_max: config.answer_bytes_max, pause_max: config.pause_max.get() }
    }
}

/// Answers a request on a route.
pub async fn answer(
    gateway: &Gateway,
    route: &Route,
    call: &mut Call,
    body: Incoming,
) -> Result<Answer, Error> {
    refuse(gateway, call)?;
    if let Some(timeout) = route.config.timeout {
        call.deadline = request::deadline(&call.headers, call.began, timeout.get());
    }
    if route.writes(&call.method, &call.path) {
        write(gateway, route, call, body).await
    } else {
        // It may have to be asked for twice, here and at the primary.
        call.body = service::read_body(gateway, call, body).await?;
        read::answer(gateway, route, call).await
    }
}

/// What cannot be passed on, and what would go in a circle.
fn refuse(gateway: &Gateway, call: &Call) -> Result<(), Error> {
    let kind = call.headers.get(header::CONTENT_TYPE).map(|kind| kind.as_bytes());
    if kind.is_some_and(|kind| kind.to_ascii_lowercase().starts_with(b"application/grpc")) {
        return Err(Error::NotSupported("gRPC is not passed on"));
    }
    if headers::came_back(gateway, &call.headers) {
        return Err(Error::LoopDetected);
    }
    // What reads and what writes is told by the path, so there must be one way to write it.
    for segment in call.path.split('/') {
        if matches!(&*request::decoded(segment)?, "." | "..") {
            return Err(Error::BadRequest("the path has dots for segments".to_owned()));
        }
    }
    Ok(())
}

/// At the primary: to its service. Elsewhere: to the primary. Never sent twice.
async fn write(
    gateway: &Gateway,
    route: &Route,
    call: &Call,
    body: Incoming,
) -> Result<Answer, Error> {
    service::may_write(gateway, call)?;
    let bounds = route.request_bounds();
    if bounds.bytes_max < body.size_hint().lower() {
        return Err(fault(Fault::TooLarge { bytes_max: bounds.bytes_max }));
    }
    let is_empty = body.is_end_stream();
    let body = if is_empty { Body::empty() } else { Body::stream(Bounded::new(body, bounds, ())) };
    match &gateway.role {
        Role::Region(upstream) => forward::write(gateway, upstream, route, call, body).await,
        Role::Primary(_) => {
            let asked = Asked {
                method: &call.method,
                path_and_query: &call.path_and_query(),
                headers: headers::outgoing(gateway, call),
                body,
                deadline: call.deadline,
            };
            let served = route.backend.ask(asked, || None).await.map_err(unwritten)?;
            answer::of_service(gateway, route, served)
        }
    }
}

fn fault(fault: Fault) -> Error {
    match fault {
        Fault::TooLarge { .. } => Error::TooLarge(fault.to_string()),
        Fault::BrokenOff => Error::BadRequest(fault.to_string()),
    }
}

/// The service did not answer a write.
fn unwritten(error: BackendError) -> Error {
    match error {
        error @ (BackendError::Lost(_) | BackendError::Deadline) => {
            Error::OutcomeUnknown { source: Some(Box::new(error)) }
        }
        error @ (BackendError::NoBudget
        | BackendError::Connect(_)
        | BackendError::Body(_)
        | BackendError::Malformed(_)) => unanswered(error),
    }
}

/// The service did not answer.
fn unanswered(error: BackendError) -> Error {
    match error {
        BackendError::NoBudget => Error::Overloaded,
        BackendError::Body(broken) => fault(broken),
        BackendError::Deadline => Error::UpstreamTimeout,
        error @ (BackendError::Connect(_) | BackendError::Lost(_) | BackendError::Malformed(_)) => {
            Error::UpstreamUnreachable { source: Box::new(error) }
        }
    }
}

/// A body on its way to the caller, unless it is known to be too large.
fn passed<B, H>(body: B, status: StatusCode, bounds: BodyBounds, held: H) -> Result<Body, Error>
where
    B: HttpBody<Data = Bytes, Error = hyper::Error> + Send + Unpin + 'static,
    H: Send + Unpin + 'static,
{
    if bounds.bytes_max < body.size_hint().lower() {
        return Err(Error::UpstreamAnswer("its answer is too large"));
    }
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Error::UpstreamAnswer("it changes protocols unasked"));
    }
    let is_empty = body.is_end_stream();
    Ok(if is_empty { Body::empty() } else { Body::stream(Bounded::new(body, bounds, held)) })
}
