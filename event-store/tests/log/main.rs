//! The log on a real Postgres and its stream on a real NATS server.

mod append;
mod relay;
mod settle;
mod support;
mod wire;
