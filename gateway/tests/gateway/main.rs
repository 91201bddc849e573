//! Gateways of two regions over real Postgres and NATS, with a projector that does what it is told.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test where it stands")]

mod bad_input;
mod commands;
mod described;
mod doors;
mod ends;
mod epochs;
mod events;
mod example;
mod faults;
mod folds;
mod forwarding;
mod flood;
mod hints;
mod issuer;
mod lists;
mod matrix;
mod log_over_http;
mod memory;
mod on_demand;
mod once;
mod policies;
mod projector;
mod proxied;
mod reads;
mod rotation;
mod search;
mod sent_once;
mod shop;
mod tls;
mod tokens;
mod versions;
mod waiting;
mod world;
mod writers;
mod writes;
