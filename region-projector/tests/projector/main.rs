//! A projector on real servers.

#![allow(clippy::unwrap_used, missing_docs, reason = "a test may fail loudly")]

mod apply;
mod backfilling;
mod custom;
mod deploy;
mod epochs;
mod faults;
mod gaps;
mod hot_keys;
mod letters;
mod limits;
mod log;
mod mirroring;
mod operating;
mod parity;
mod processes;
mod reading;
mod rebuilding;
mod refusals;
mod rollups;
mod search;
mod sharing;
mod snapshots;
mod slow_log;
mod switching;
mod tails;
mod tally;
mod tls;
mod verifying;
mod world;
