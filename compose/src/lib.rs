//! The local topology as plain processes: NATS servers, Postgres clusters and the WAN between them, in temporary
//! folders and on free ports. Tests start single servers with it, the `local` runner starts three regions.
//!
//! Whatever is started here ends with the value that owns it, and with this process should it be killed.

pub mod demo;
pub mod docker;
pub mod error;
mod folder;
pub mod local;
pub mod nats;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod tools;

pub use error::Error;
