//! What every request of the public listener passes before its path is looked at: TLS, other origins,
//! who asks, and how often.

use std::{convert::Infallible, sync::Arc};

use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use process::{
    admin::Readiness,
    tls::{ServerTls, TlsError},
};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tower::{Layer as _, Service, ServiceExt as _, util::option_layer};
use tower_http::cors::CorsLayer;

use crate::{
    auth::{AuthError, AuthLayer, Doorkeeper},
    config::{CorsConfig, GatewayConfig},
    rate_limit::{Limiter, RateLimitLayer},
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
    ) -> impl Fn(Request<Incoming>) -> BoxFuture<'static, Response<B>> + Clone
    where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        S: Clone + Send + Sync + 'static,
        S::Future: Send,
        B: Default + Send + 'static,
    {
        let limited = option_layer(self.limiter.map(RateLimitLayer)).layer(service);
        let known = AuthLayer(self.keeper).layer(limited);
        let all = option_layer(self.cors).layer(known);
        move |request| {
            let answered = all.clone().oneshot(request);
            Box::pin(async move { answered.await.unwrap_or_else(|never| match never {}) })
        }
    }
}
