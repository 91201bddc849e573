//! The rules of Tidemark, and nothing else: no clock, no randomness, no network, no database.
//!
//! A write names a [`Position`] in the global log. Its caller carries a [`Token`] that says what the
//! caller has written and seen. A read turns the token into a [`Demand`]; what a region has applied
//! answers it with a [`Verdict`]; a [`Policy`] turns the verdict into a [`Decision`]. Everything that
//! branches on consistency is in this crate, so that the services only do as they are told and the
//! simulation can try every order of events without a socket.
//!
//! Read the modules in the order below; each stands on those before it.

mod position;
mod aggregate;
mod event;
mod admission;
mod epoch;
mod token;
mod demand;
mod currency;
mod announcement;
mod coherence;
mod pace;
mod snapshot;
mod policy;
mod decision;

pub use admission::{Admission, admit};
pub use aggregate::{
    AGGREGATE_ID_BYTES_MAX, AggregateId, AggregateKey, NAME_BYTES_MAX, Name, NameError,
    PartitionCount, STREAM_SLOT_COUNT, fnv1a_32,
};
pub use announcement::{Announcement, AnnouncementSeal, SEAL_HEADER};
pub use coherence::{Coherence, CoherenceScope, Raise};
pub use currency::{Evidence, IdleProof, Parked, Verdict, judge, watermark};
pub use decision::{Budget, Chain, Decision, Place, Refusal, decide};
pub use demand::{Demand, Scope};
pub use epoch::{Adoption, EpochHistory, Judged};
pub use event::{
    CommittedAt, Event, EventError, EventId, MESSAGE_ID_HEADER, SchemaVersion, Traceparent, header,
    stream_name,
};
pub use pace::Pace;
pub use policy::{POLICY_STEP_COUNT_MAX, Policy, PolicyError, Preference, Step};
pub use position::{Epoch, LogPosition, Position, Version};
pub use snapshot::{FoldKind, FoldName, FoldSnapshot, is_snapshot_due};
pub use token::{
    CLAIM_COUNT_MAX, Claim, Key, KeyError, KeyId, KeyRing, LogId, TOKEN_CHARS_MAX, Token,
    TokenStatus, Unverified,
};
