//! What can go wrong when a server is started or stopped.

use std::path::PathBuf;
use std::time::Duration;

/// Why a server could not be started, stopped or used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program the topology needs is not installed.
    #[error("{program} not found in {}: run compose/setup.sh", searched.join(", "))]
    ToolMissing {
        /// The program's file name.
        program: String,
        /// The folders that were looked at.
        searched: Vec<String>,
    },
    /// One of our own programs is not where Cargo would put it.
    #[error("{} is not there: build it with `cargo build --workspace --bins`", path.display())]
    NotBuilt {
        /// Where it should be.
        path: PathBuf,
    },
    /// The process runs as root, and there is no `postgres` user to drop to.
    #[error(
        "postgres refuses to run as root and there is no user 'postgres': run compose/setup.sh"
    )]
    NoPostgresUser,
    /// No port of the range is free.
    #[error("no free port left between {first} and {last}")]
    NoFreePort {
        /// First port of the range.
        first: u16,
        /// Last port of the range.
        last: u16,
    },
    /// A file or process operation failed.
    #[error("could not {what}")]
    Io {
        /// The operation, as the end of "could not".
        what: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A helper program ended with an error.
    #[error("{command} failed: {output}")]
    Command {
        /// The program's file name.
        command: String,
        /// What it wrote.
        output: String,
    },
    /// A server ended while it was still starting.
    #[error("{name} ended before it was ready; the end of {}:\n{tail}", log.display())]
    Ended {
        /// The server's name.
        name: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// A server did not reach the awaited state in time.
    #[error("{name} was not {awaited} within {deadline:?}; the end of {}:\n{tail}", log.display())]
    Deadline {
        /// The server's name.
        name: String,
        /// The state that was awaited, as the end of "was not".
        awaited: &'static str,
        /// How long it was given.
        deadline: Duration,
        /// Its log file.
        log: PathBuf,
        /// The last lines of the log.
        tail: String,
    },
    /// The proxies refused an order.
    #[error("the proxy refused")]
    Proxy(#[from] crate::proxy::ProxyError),
    /// The operation needs the server in the other state.
    #[error("{name} is {state}")]
    State {
        /// The server's name.
        name: String,
        /// The state it is in, which forbids the operation.
        state: &'static str,
    },
}

impl Error {
    /// Wraps an operating system error; `what` reads as the end of "could not".
    pub fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Error {
        move |source| Error::Io { what: what.into(), source }
    }
}
