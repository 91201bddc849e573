//! Three regions: their NATS servers alone, and the whole. One binary, so that those who wait, wait together.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod currency;
mod epochs;
mod operating;
mod readme;
mod replay;
mod stack;
mod topology;
mod trace;
