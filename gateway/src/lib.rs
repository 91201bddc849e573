//! The read-your-writes gateway of one region.
//!
//! A read is decided on one page, `read`: what the caller's token demands is compared with what
//! memory says this region has applied (`currency`); the caller's policy says what to do when that
//! is not enough; and before an answer leaves, it is judged again by the checkpoints that were read in
//! the same snapshot as its rows (`read_models`). A write is appended to the log at the primary
//! (`write`) and forwarded from everywhere else (`forward`). A user's own service is behind a route
//! (`proxied`), and who waits for the region to catch up may listen instead (`events`). `service` turns a request into a
//! call and finishes its answer: every answer carries a token.

mod aggregates;
mod answer;
mod body;
mod auth;
pub mod config;
mod cors;
mod doors;
mod currency;
mod epochs;
mod error;
mod events;
mod feed;
mod fold;
mod forward;
mod gather;
mod gateway;
mod hop;
mod inspect;
mod internal;
mod log_rate;
mod log_stream;
mod memory;
mod openapi;
pub mod operator;
mod overview;
mod pending;
mod problem;
mod prospects;
mod proxied;
mod rate_limit;
mod read;
mod read_models;
mod request;
mod service;
mod start;
mod status;
mod telemetry;
mod token_carrier;
mod trace;
mod turns;
mod upstream;
mod versions;
mod waiters;
mod write;

pub use config::GatewayConfig;
pub use inspect::{Inspected, inspect};
pub use start::{Running, StartError, start};
