//! A pool of connections to Postgres with every wait bounded.

mod at_hand;

use std::str::FromStr as _;

use serde::Deserialize;
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};

use crate::config::{Period, SecretUrl};

pub use at_hand::{AtHand, Taken};

/// Which database, and what may be asked of it.
#[derive(Debug, Clone, Deserialize)]
pub struct PostgresConfig {
    /// As in `postgres://user:password@host:5432/database?sslmode=verify-full`.
    pub url: SecretUrl,
    /// Most connections that are open at once.
    #[serde(default = "PostgresConfig::connections_max_default")]
    pub connections_max: u32,
    /// Bound on the wait for a free connection, the making of one included.
    #[serde(default = "PostgresConfig::acquire_timeout_default")]
    pub acquire_timeout: Period,
    /// Bound on one statement, kept by the server.
    #[serde(default = "PostgresConfig::statement_timeout_default")]
    pub statement_timeout: Period,
    /// Bound on doing nothing inside a transaction, kept by the server.
    #[serde(default = "PostgresConfig::idle_in_transaction_timeout_default")]
    pub idle_in_transaction_timeout: Period,
}

impl PostgresConfig {
    /// A database with the bounds that are shipped.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: SecretUrl::new(url),
            connections_max: Self::connections_max_default(),
            acquire_timeout: Self::acquire_timeout_default(),
            statement_timeout: Self::statement_timeout_default(),
            idle_in_transaction_timeout: Self::idle_in_transaction_timeout_default(),
        }
    }

    const fn connections_max_default() -> u32 {
        16
    }

    const fn acquire_timeout_default() -> Period {
        Period::from_secs(2)
    }

    const fn statement_timeout_default() -> Period {
        Period::from_secs(5)
    }

    const fn idle_in_transaction_timeout_default() -> Period {
        Period::from_secs(10)
    }
}

/// A pool that connects when it is first used, so that a process starts without its database.
/// Fails when the URL cannot be read. `name` is what the server shows us under.
pub fn connect(config: &PostgresConfig, name: &str) -> Result<PgPool, sqlx::Error> {
    connect_with(config, name, |options| options)
}

/// The same with options that only the caller knows.
pub fn connect_with(
    config: &PostgresConfig,
    name: &str,
    adjust: impl FnOnce(PgConnectOptions) -> PgConnectOptions,
) -> Result<PgPool, sqlx::Error> {
    let statement_ms = config.statement_timeout.millis().to_string();
    let idle_ms = config.idle_in_transaction_timeout.millis().to_string();
    let options =
        PgConnectOptions::from_str(config.url.expose())?.application_name(name).options([
            ("statement_timeout", statement_ms.as_str()),
            ("idle_in_transaction_session_timeout", idle_ms.as_str()),
        ]);
    Ok(PgPoolOptions::new()
        .max_connections(config.connections_max)
        .acquire_timeout(config.acquire_timeout.get())
        // A dead connection shows itself at its first statement, which costs its caller one error;
        // a round trip before each statement would cost every caller.
        .test_before_acquire(false)
        .connect_lazy_with(adjust(options)))
}
