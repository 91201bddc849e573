//! What both services share, and nothing that knows of events: configuration, telemetry, shutdown,
//! connections to NATS, Postgres and other HTTP servers, TLS, an HTTP server with bounds, and the admin listener on top of it.

pub mod admin;
pub mod client;
pub mod config;
pub mod nats;
pub mod postgres;
pub mod server;
pub mod shutdown;
pub mod telemetry;
pub mod tls;
pub mod trace;
