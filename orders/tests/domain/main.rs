//! The rules of the domain, without a server.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod invariants;
mod rules;
mod schemas;
mod totals;
mod views;
mod world;
