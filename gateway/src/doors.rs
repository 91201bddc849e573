//! What every request of the public listener passes before its path is looked at: TLS, other origins,
//! who asks, and how often.

use std::{convert::Infallible, sync::Arc};

use futures::{FutureExt as _, future::Map};
use http::{Request, Response};
use hyper::body::Incoming;
use process::{
    admin::Readiness,
    server::Peer,
    tls::{ServerTls, TlsError},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::{
    Layer as _, Service, ServiceExt as _,
    util::{Either, Oneshot, option_layer},
};
use tower_http::cors::{Cors, CorsLayer};

use crate::{
    auth::{Admitted, Arrived, Auth, AuthError, AuthLayer, Doorkeeper},
    config::{CorsConfig, GatewayConfig},
    rate_limit::{Limiter, RateLimit, RateLimitLayer},
};

/// Why nobody can be let in.
#[derive(Debug, thiserror::Error)]
pub enum DoorsError {
    /// Callers cannot be known.
    #[error("callers cannot be known")]
    Auth(#[from] AuthError),
    /// The listener's certificate is not usable.
    #[error("the listener's certificate is not usable")]
    Tls(#[from] TlsError),
}

/// The doors of the public listener.
#[derive(Debug)]
pub struct Doors {
    /// TLS, unless connections are in the clear.
    pub tls: Option<ServerTls>,
    cors: Option<CorsLayer>,
    keeper: Arc<Doorkeeper>,
    limiter: Option<Arc<Limiter>>,
}

impl Doors {
    /// As configured.
    pub fn open(config: &GatewayConfig) -> Result<Self, DoorsError> {
        let keeper = Doorkeeper::open(&config.auth, config.regions.credential.clone())?;
        Ok(Self {
            tls: config.listen.tls.as_ref().map(ServerTls::open).transpose()?,
            cors: config.cors.as_ref().map(CorsConfig::layer),
            keeper: Arc::new(keeper),
            limiter: config.rate_limit.as_ref().map(|limit| Arc::new(Limiter::new(limit))),
        })
    }

    /// Keeps certificates and keys fresh until `stop`.
    pub fn keep_fresh(
        &self,
        readiness: &Readiness,
        stop: &CancellationToken,
    ) -> Vec<JoinHandle<()>> {
        self.keeper.expect_keys(readiness);
        let tls = self.tls.clone().map(|tls| tokio::spawn(tls.keep_fresh(stop.clone())));
        let (keeper, readiness, stop) = (Arc::clone(&self.keeper), readiness.clone(), stop.clone());
        let keys = tokio::spawn(async move { keeper.keep_fresh(&readiness, stop).await });
        tls.into_iter().chain([keys]).collect()
    }

    /// Puts the doors around a service. Other origins come first, since a browser asks about them without
    /// saying who it is.
    pub fn around<S, B>(
        self,
        service: S,
    ) -> impl Fn(Request<Incoming>, Peer) -> Answering<S, B> + Clone
    where
        S: Service<Request<Admitted<Incoming>>, Response = Response<B>, Error = Infallible>,
        S: Clone + Send + Sync + 'static,
        S::Future: Send,
        B: Default + Send + 'static,
    {
        let limited = option_layer(self.limiter.map(RateLimitLayer)).layer(service);
        let known = AuthLayer(self.keeper).layer(limited);
        let all = option_layer(self.cors).layer(known);
        move |request, peer| {
            let arrived = request.map(|body| Arrived { peer, body });
            all.clone().oneshot(arrived).map(answer as fn(_) -> _)
        }
    }
}

/// A service behind its doors.
type Behind<S> = Either<Cors<Known<S>>, Known<S>>;
type Known<S> = Auth<Either<RateLimit<S>, S>>;
/// The answer to one request, on its way.
type Answering<S, B> = Map<
    Oneshot<Behind<S>, Request<Arrived<Incoming>>>,
    fn(Result<Response<B>, Infallible>) -> Response<B>,
>;

fn answer<B>(answered: Result<Response<B>, Infallible>) -> Response<B> {
    answered.unwrap_or_else(|never| match never {})
}
