//! What a request can come to instead of its answer, told apart by what the caller can do.

use consistency::{LogPosition, Name, Token, Version};

use crate::currency::WaitRefused;

/// Why a request is not answered as it wished.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request makes no sense; the text says where.
    #[error("bad request: {0}")]
    BadRequest(String),
    /// A token that is none, or not ours.
    #[error("invalid token: {0}")]
    InvalidToken(&'static str),
    /// A token that another release or another key sealed.
    #[error("token of an unknown key or format")]
    TokenUnknownKey,
    /// The log lost what the token names.
    #[error("the log lost a write that the token names")]
    WriteLost {
        /// What the caller goes on with: the start of the newest epoch, and what its other tokens say.
        fresh: Token,
    },
    /// The sender did not prove who it is.
    #[error("unauthorized: {0}")]
    Unauthorized(Challenge),
    /// Callers' tokens cannot be verified at the moment.
    #[error("the keys that tell who calls are not known here yet")]
    AuthUnavailable,
    /// The caller asks too often.
    #[error("more requests than one caller may send")]
    RateLimited {
        /// When it may come again, in milliseconds.
        retry_after_ms: u32,
    },
    /// There is nothing by this path.
    #[error("nothing is found by this path")]
    NotFound,
    /// There is no such view.
    #[error("there is no view {0}")]
    UnknownView(String),
    /// The path takes other methods.
    #[error("the path takes {0}")]
    MethodNotAllowed(&'static str),
    /// The body is not JSON by its own account.
    #[error("the body must be application/json")]
    UnsupportedMediaType,
    /// The body or an event is too large.
    #[error("too large: {0}")]
    TooLarge(String),
    /// The aggregate is not at the version that was expected.
    #[error("the aggregate is at version {current}")]
    VersionConflict {
        /// Its version.
        current: Version,
        /// Where its last event stands.
        at: LogPosition,
    },
    /// Writes to aggregates of this type say which version they are meant for, and this one does not.
    #[error("a write to an aggregate of type {0} takes If-Match, or If-None-Match for the first")]
    PreconditionRequired(Name),
    /// Another request used the key before.
    #[error("the idempotency key was used by a request with another body")]
    IdempotencyMismatch,
    /// A rule of the domain forbids it.
    #[error("rule {rule} is broken: {detail}")]
    RuleViolated {
        /// The rule's name.
        rule: &'static str,
        /// What broke it.
        detail: String,
        /// Where the aggregate's last event stands.
        at: LogPosition,
    },
    /// Not current, and nothing that the caller allows helps.
    #[error("the region has not caught up")]
    ReplicationPending(Lag),
    /// An event of the aggregate could not be applied.
    #[error("an event that the read needs could not be applied")]
    Parked(Lag),
    /// As many reads wait as may.
    #[error("as many reads wait as may")]
    WaitersFull,
    /// More work than is taken on.
    #[error("more requests than are taken on")]
    Overloaded,
    /// The primary, or its log, cannot be reached; nothing was done.
    #[error("the primary cannot be reached: {detail}")]
    PrimaryUnreachable {
        /// Which part of the way.
        detail: &'static str,
        /// Why.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// The request was forwarded here, and here is not the primary.
    #[error("this region is not the primary")]
    NotPrimary,
    /// A protocol that is not passed on.
    #[error("not supported: {0}")]
    NotSupported(&'static str),
    /// The request was here before.
    #[error("the request went in a circle")]
    LoopDetected,
    /// The service behind a route cannot be reached; nothing was done.
    #[error("the service behind this path cannot be reached")]
    UpstreamUnreachable {
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The service behind a route answered what cannot be passed on.
    #[error("the service behind this path cannot be passed on: {0}")]
    UpstreamAnswer(&'static str),
    /// The service behind a route did not answer in time.
    #[error("the service behind this path did not answer in time")]
    UpstreamTimeout,
    /// A write that may have been done or not.
    #[error("the outcome of the write is unknown")]
    OutcomeUnknown {
        /// Why.
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    /// Our own fault.
    #[error("internal error")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// What the sender of a request would have to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Challenge {
    /// The regions' credential.
    Region,
    /// A bearer token; `Some` says what was wrong with the one it showed.
    Bearer(Option<&'static str>),
    /// To come through the load balancer, named by it.
    Balancer,
}

impl std::fmt::Display for Challenge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Region => f.write_str("only regions may ask for this"),
            Self::Bearer(None) => f.write_str("a bearer token is needed"),
            Self::Bearer(Some(why)) => write!(f, "the bearer token is not taken, {why}"),
            Self::Balancer => f.write_str("the load balancer in front did not say who asks"),
        }
    }
}

impl From<WaitRefused> for Error {
    fn from(refused: WaitRefused) -> Self {
        match refused {
            WaitRefused::Full => Self::WaitersFull,
            WaitRefused::CallerFull => Self::RateLimited { retry_after_ms: 1000 },
        }
    }
}

impl Error {
    /// The primary cannot be reached.
    pub fn unreachable(
        detail: &'static str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Self {
        Self::PrimaryUnreachable { detail, source: Some(Box::new(source)) }
    }
}

/// How far the region is from what was asked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lag {
    /// What was asked for.
    pub demand: Option<LogPosition>,
    /// The smallest watermark of what matters.
    pub applied: Option<LogPosition>,
    /// How far the read models are behind, as far as clocks tell.
    pub lag_ms: Option<u64>,
    /// When it is expected, in milliseconds.
    pub estimate_ms: Option<u32>,
}

impl Lag {
    /// How many events lie between, as far as positions tell.
    pub fn events(&self) -> Option<u64> {
        let (demand, applied) = (self.demand?, self.applied?);
        (demand.epoch == applied.epoch).then(|| demand.position.since(applied.position))
    }

    /// When to come again, in milliseconds.
    pub fn retry_after_ms(&self) -> u32 {
        const SHORTEST: u32 = 100;
        const LONGEST: u32 = 30_000;
        self.estimate_ms.unwrap_or(1_000).clamp(SHORTEST, LONGEST)
    }
}
