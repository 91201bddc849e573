//! The stable types of problems, each with its status and what it says.

use http::StatusCode;

/// Makes the enum and everything that there is one of for each type, so that none can be forgotten.
macro_rules! kinds {
    ($($variant:ident $status:ident $name:literal $about:literal,)+) => {
        /// The type of a problem. Clients branch on it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind {
            $(#[doc = $about] $variant,)+
        }

        impl Kind {
            /// Every type there is.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The status that it comes with.
            pub const fn status(self) -> StatusCode {
                match self { $(Self::$variant => StatusCode::$status,)+ }
            }

            /// The last part of its URI.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// What it says, for the API's description.
            pub const fn about(self) -> &'static str {
                match self { $(Self::$variant => $about,)+ }
            }
        }
    };
}

kinds! {
    BadRequest BAD_REQUEST "bad-request" "The request makes no sense; `detail` says where.",
    InvalidToken BAD_REQUEST "invalid-token" "The token is not one of this log, or was changed.",
    TokenUnknownKey BAD_REQUEST "token-unknown-key"
        "The token is of a key or a format that is not known here, not yet or not any more.",
    WriteLost CONFLICT "write-lost"
        "The log lost a write that the token names. The answer's token is one to go on with.",
    Unauthorized UNAUTHORIZED "unauthorized" "The caller did not prove who it is.",
    AuthUnavailable SERVICE_UNAVAILABLE "auth-unavailable"
        "The keys that tell who calls are not known here yet.",
    RateLimited TOO_MANY_REQUESTS "rate-limited" "The caller asks too often, or waits too often at once.",
    NotFound NOT_FOUND "not-found" "There is nothing by this path.",
    UnknownView NOT_FOUND "unknown-view" "There is no such view.",
    MethodNotAllowed METHOD_NOT_ALLOWED "method-not-allowed" "The path takes other methods.",
    UnsupportedMediaType UNSUPPORTED_MEDIA_TYPE "unsupported-media-type"
        "The body does not call itself `application/json`.",
    TooLarge PAYLOAD_TOO_LARGE "too-large" "The body or an event is too large.",
    VersionConflict PRECONDITION_FAILED "version-conflict"
        "The aggregate is not at the version that was expected; `epoch` and `version` say where it is.",
    PreconditionRequired PRECONDITION_REQUIRED "precondition-required"
        "Writes to aggregates of this type must say which version they are meant for.",
    IdempotencyMismatch UNPROCESSABLE_ENTITY "idempotency-mismatch"
        "The idempotency key was used by a request with another body.",
    RuleViolated UNPROCESSABLE_ENTITY "rule-violated" "A rule of the domain forbids it; `rule` names it.",
    ReplicationPending SERVICE_UNAVAILABLE "replication-pending"
        "The region has not caught up with the token, and nothing that the caller allows helps.",
    Parked SERVICE_UNAVAILABLE "parked" "An event that the answer needs could not be applied.",
    WaitersFull SERVICE_UNAVAILABLE "waiters-full" "As many requests wait as may.",
    Overloaded SERVICE_UNAVAILABLE "overloaded" "More requests than are taken on.",
    PrimaryUnreachable SERVICE_UNAVAILABLE "primary-unreachable"
        "The primary, or its log, cannot be reached; nothing was done.",
    NotPrimary MISDIRECTED_REQUEST "not-primary" "The request was sent here, and here is not the primary.",
    NotSupported NOT_IMPLEMENTED "not-supported" "A protocol or a method that is not passed on.",
    LoopDetected LOOP_DETECTED "loop-detected" "The request was here before.",
    UpstreamUnreachable BAD_GATEWAY "upstream-unreachable"
        "The service behind this path cannot be reached; nothing was done.",
    UpstreamAnswer BAD_GATEWAY "upstream-answer"
        "The service behind this path answered what cannot be passed on.",
    UpstreamTimeout GATEWAY_TIMEOUT "upstream-timeout"
        "The service behind this path did not answer in time.",
    OutcomeUnknown SERVICE_UNAVAILABLE "outcome-unknown"
        "The write may have been done or not: send it again with the same idempotency key.",
    Internal INTERNAL_SERVER_ERROR "internal" "Our own fault.",
}
