//! A projection from its declaration to its tables, as a developer and the engine use it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod declaration;
mod document;
mod lights;
mod notes;
mod postgres;
mod readme;
mod summary;
