//! The log on a real Postgres and its stream on a real NATS server.

#![allow(clippy::unwrap_used, reason = "a failed step fails the test where it stands")]

mod alone;
mod append;
mod cluster;
mod contract;
mod epoch;
mod lead;
mod once;
mod processes;
mod region;
mod relay;
mod settle;
mod snapshots;
mod stream;
mod support;
mod trips;
mod wire;
mod writer;
