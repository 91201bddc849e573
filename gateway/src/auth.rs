//! Who may call: decided before anything else of a request is looked at.

mod balancer;
mod caller;
mod config;
mod jwt;
mod keys;

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use futures::future::{BoxFuture, Either};
use http::{HeaderMap, Request};
use process::{admin::Readiness, config::Secret, server::Peer};
use tokio_util::sync::CancellationToken;
use tower::{Layer, Service};

pub use caller::Caller;
pub use config::{AuthConfig, AuthMode, JwtConfig, TrustedHeaderConfig};
pub use keys::KeysError;

use self::{balancer::Balancer, jwt::Verifier};
use crate::{
    error::{Challenge, Error},
    hop,
};

/// The body of a request in front of the doors, with who sent it.
#[derive(Debug)]
pub struct Arrived<B> {
    /// Who.
    pub peer: Peer,
    /// The body.
    pub body: B,
}

/// The body of a request behind the doors: nothing else gets to the service.
#[derive(Debug)]
pub struct Admitted<B> {
    /// What the doors made of the request.
    pub entry: Entry,
    /// The body.
    pub body: B,
}

/// What the doors made of a request.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Who sent it.
    pub peer: Peer,
    /// It comes from another region or from a projector of ours.
    pub trusted: bool,
    /// Who asks, or why nobody is let in.
    pub caller: Result<Caller, Refusal>,
}

/// Why a request is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Its sender did not prove who it is.
    Stranger(Challenge),
    /// The keys that would tell are not known.
    KeysUnknown,
    /// The caller asks too often.
    TooOften {
        /// When it may come again, in milliseconds.
        retry_after_ms: u32,
    },
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Stranger(challenge) => Self::Unauthorized(challenge),
            Refusal::KeysUnknown => Self::AuthUnavailable,
            Refusal::TooOften { retry_after_ms } => Self::RateLimited { retry_after_ms },
        }
    }
}

/// Knows callers.
#[derive(Debug)]
pub struct Doorkeeper {
    credential: Secret,
    callers: Callers,
}

#[derive(Debug)]
enum Callers {
    Unknown,
    Jwt(Box<Verifier>),
    Balancer(Balancer),
}

/// Why nobody can be told from anybody.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// The chosen mode lacks its section.
    #[error("auth.{0} is missing")]
    Section(&'static str),
    /// The keys cannot be had.
    #[error("the keys of callers' tokens are not usable")]
    Keys(#[from] KeysError),
}

impl Doorkeeper {
    /// As configured. Keys in a file are read at once, those behind a URL by [`Self::keep_fresh`].
    pub fn open(config: &AuthConfig, credential: Secret) -> Result<Self, AuthError> {
        let callers = match config.mode {
            AuthMode::None => Callers::Unknown,
            AuthMode::Jwt => {
                let jwt = config.jwt.as_ref().ok_or(AuthError::Section("jwt"))?;
                Callers::Jwt(Box::new(Verifier::open(jwt)?))
            }
            AuthMode::TrustedHeader => {
                let header = config.trusted_header.as_ref();
                Callers::Balancer(Balancer::new(
                    header.ok_or(AuthError::Section("trusted_header"))?,
                ))
            }
        };
        Ok(Self { credential, callers })
    }

    /// Says in `readiness` that there are no keys yet, where there are to be some.
    pub fn expect_keys(&self, readiness: &Readiness) {
        if let Callers::Jwt(verifier) = &self.callers {
            verifier.expect_keys(readiness);
        }
    }

    /// Keeps the keys fresh until `stop`, and says in `readiness` whether there are any.
    pub async fn keep_fresh(&self, readiness: &Readiness, stop: CancellationToken) {
        match &self.callers {
            Callers::Unknown | Callers::Balancer(_) => {}
            Callers::Jwt(verifier) => verifier.keep_fresh(readiness, stop).await,
        }
    }

    /// Decides on one request, unless its token has to be verified. What only regions and the balancer may say
    /// is gone afterwards, unless it was they who said it.
    fn admit_at_once(&self, headers: &mut HeaderMap, peer: Peer) -> Option<Entry> {
        let trusted = hop::authenticate(headers, &self.credential);
        if trusted {
            return Some(Entry { peer, trusted, caller: Ok(Caller::passed_on(headers)) });
        }
        let caller = match &self.callers {
            Callers::Unknown => Ok(Caller::Unknown),
            Callers::Balancer(balancer) => balancer.caller(headers, peer),
            // Its keys may have to be fetched.
            Callers::Jwt(_) => return None,
        };
        Some(Entry { peer, trusted, caller })
    }

    /// Decides on a request that [`Self::admit_at_once`] left open.
    async fn verified(&self, headers: &HeaderMap, peer: Peer) -> Entry {
        let caller = match &self.callers {
            Callers::Jwt(verifier) => verifier.caller(headers).await,
            Callers::Unknown | Callers::Balancer(_) => Err(Refusal::Stranger(Challenge::Region)),
        };
        Entry { peer, trusted: false, caller }
    }
}

/// Puts a [`Doorkeeper`] in front of a service, whose requests come with an [`Entry`] each.
#[derive(Debug, Clone)]
pub struct AuthLayer(pub Arc<Doorkeeper>);

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { doorkeeper: Arc::clone(&self.0), inner }
    }
}

/// What [`AuthLayer`] makes.
#[derive(Debug, Clone)]
pub struct Auth<S> {
    doorkeeper: Arc<Doorkeeper>,
    inner: S,
}

impl<S, B> Service<Request<Arrived<B>>> for Auth<S>
where
    S: Service<Request<Admitted<B>>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, BoxFuture<'static, Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Arrived<B>>) -> Self::Future {
        let (mut parts, Arrived { peer, body }) = request.into_parts();
        if let Some(entry) = self.doorkeeper.admit_at_once(&mut parts.headers, peer) {
            let admitted = Request::from_parts(parts, Admitted { entry, body });
            return Either::Left(self.inner.call(admitted));
        }
        let doorkeeper = Arc::clone(&self.doorkeeper);
        // The one that is ready goes, its clone stays.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        Either::Right(Box::pin(async move {
            let entry = doorkeeper.verified(&parts.headers, peer).await;
            inner.call(Request::from_parts(parts, Admitted { entry, body })).await
        }))
    }
}
