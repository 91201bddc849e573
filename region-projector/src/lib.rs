//! The projector of one region: folds the log into the region's own read models.
//!
//! Events come from the region's mirror of the primary's stream ([`reader`]), join an unbroken
//! [`chain`], and are handed to the partitions of each version of each projection. A [`partition`]
//! applies what has arrived in one transaction with its [`checkpoint`], and [`announce`]s it to the
//! region's gateways. The [`engine`] of a version takes partitions over and starts anew when the
//! database is not as it was left; the [`mirror`] is watched and nudged.
//!
//! What cannot be applied waits among the [`dead_letters`]; too much of it trips the [`breaker`]. An
//! [`operator`] deals with both from the command line.
//!
//! A binary names its domain and calls [`Projector::start`].

pub mod activity;
pub mod announce;
pub mod attempt;
pub mod backfill;
pub mod breaker;
pub mod chain;
pub mod checkpoint;
pub mod config;
pub mod dead_letters;
pub mod engine;
pub mod epochs;
pub mod health;
pub mod lease;
pub mod log;
pub mod mirror;
pub mod operator;
pub mod parity;
pub mod partition;
pub mod pause;
pub mod reader;
pub mod rebuild;
pub mod retry;
mod service;
pub mod sharing;
pub mod snapshot;
pub mod start;
pub mod status;
pub mod switch;
pub mod telemetry;
pub mod verify;
pub mod versions;

pub use config::ProjectorConfig;
pub use service::Projector;
pub use start::StartError;
