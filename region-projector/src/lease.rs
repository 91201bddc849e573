//! At most one rebuild of a projection at a time.
//!
//! A lock of the database's that hangs on a connection and goes with it, so nothing is left to run out
//! when a process is killed. It only keeps two from working in vain: whoever takes a version's
//! partitions over raises their fences, and with an old fence nothing is committed.

use sqlx::{PgConnection, PgPool, Postgres, pool::PoolConnection};

/// Makes the lock another one than whatever else a database is used for.
const SPACE: &str = "tidemark rebuild ";

/// The right to rebuild a projection, until it is dropped.
#[derive(Debug)]
pub struct Lease {
    connection: PoolConnection<Postgres>,
}

impl Lease {
    /// Takes it. `None` when somebody else has it.
    pub async fn take(pool: &PgPool, projection: &str) -> Result<Option<Self>, sqlx::Error> {
        let mut connection = pool.acquire().await?;
        let name = format!("{SPACE}{projection}");
        let taken = sqlx::query_scalar!(
            r#"select pg_try_advisory_lock(hashtextextended($1, 0)) as "taken!""#,
            name
        );
        let taken = taken.fetch_one(&mut *connection).await?;
        Ok(taken.then_some(Self { connection }))
    }

    /// Ends when the connection is lost, and the lease with it.
    pub async fn lost(&mut self, every: std::time::Duration) -> sqlx::Error {
        loop {
            tokio::time::sleep(every).await;
            let asked = sqlx::query!(r#"select 1 as "one""#).fetch_one(&mut *self.connection).await;
            if let Err(error) = asked {
                return error;
            }
        }
    }

    /// Gives it back.
    pub async fn release(self) {
        // Closed rather than handed back: the lock is the connection's.
        let connection = self.connection.detach();
        if let Err(error) = sqlx::Connection::close(connection).await {
            tracing::debug!(%error, "the lease ends with its connection");
        }
    }
}

/// Whether nobody has it; then nobody gets it until the transaction ends.
pub async fn try_within(
    connection: &mut PgConnection,
    projection: &str,
) -> Result<bool, sqlx::Error> {
    let name = format!("{SPACE}{projection}");
    sqlx::query_scalar!(
        r#"select pg_try_advisory_xact_lock(hashtextextended($1, 0)) as "free!""#,
        name
    )
    .fetch_one(connection)
    .await
}
