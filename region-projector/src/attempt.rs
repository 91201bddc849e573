//! Tries at the database that end in time.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use process::config::Period;
use process::postgres::{AtHand, Taken};
use sqlx::PgConnection;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// A connection for one try. Unless the try is finished the connection is closed and not handed back:
/// nobody knows what a server that did not answer is still doing on it, and the pool would wait for
/// that answer before it gave the place to another.
#[derive(Debug)]
pub struct Attempt {
    connection: Option<Taken>,
}

impl Attempt {
    /// Takes a connection.
    pub async fn begin(connections: &AtHand) -> Result<Self, sqlx::Error> {
        Ok(Self { connection: Some(connections.take().await?) })
    }

    /// The connection itself.
    pub fn connection(&mut self) -> &mut PgConnection {
        self
    }

    /// The server has answered everything: the connection is as good as before.
    pub fn finish(mut self) {
        if let Some(connection) = self.connection.take() {
            connection.keep();
        }
    }
}

impl Deref for Attempt {
    type Target = PgConnection;

    fn deref(&self) -> &PgConnection {
        self.connection.as_deref().expect("it is taken out by those who own the attempt only")
    }
}

impl DerefMut for Attempt {
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.connection.as_deref_mut().expect("it is taken out by those who own the attempt only")
    }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if let Some(connection) = self.connection.take() {
            connection.close();
        }
    }
}

/// Gives the database a bounded time. A server that vanished without a word would otherwise be waited
/// for until the network gives up on it. What was begun may still come to pass: the outcome is
/// unknown.
pub async fn bounded<T, E: From<sqlx::Error>>(
    deadline: Period,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    timeout(deadline.get(), work).await.unwrap_or_else(|_| Err(late()))
}

/// The same, and less time once a stop is asked for: whoever stops waits only so long.
pub async fn bounded_until<T, E: From<sqlx::Error>>(
    deadline: Period,
    (stop, patience): (&CancellationToken, Duration),
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let given_up = async {
        stop.cancelled().await;
        sleep(patience).await;
    };
    tokio::select! {
        biased;
        // What is done is done, however late.
        done = bounded(deadline, work) => done,
        () = given_up => Err(late()),
    }
}

fn late<E: From<sqlx::Error>>() -> E {
    sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stop_shortens_what_is_waited_for() {
        let began = tokio::time::Instant::now();
        let stop = CancellationToken::new();
        stop.cancel();
        let never = std::future::pending::<Result<(), sqlx::Error>>();
        let patience = Duration::from_secs(2);
        let ended = bounded_until(Period::from_secs(30), (&stop, patience), never).await;
        assert!(matches!(ended, Err(sqlx::Error::Io(_))));
        assert_eq!(began.elapsed(), patience);
        let done = async { Ok::<_, sqlx::Error>(1) };
        assert_eq!(
            bounded_until(Period::from_secs(30), (&stop, patience), done).await.ok(),
            Some(1)
        );
    }
}
