//! A lease in the log's database, by that database's clock. It keeps one process at work; correctness
//! never rests on it.

use std::time::Duration;

use sqlx::PgPool;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

#[derive(Debug)]
pub(crate) struct Lease {
    pool: PgPool,
    name: &'static str,
    holder: Uuid,
    duration: Duration,
}

impl Lease {
    pub(crate) fn new(pool: PgPool, name: &'static str, holder: Uuid, duration: Duration) -> Self {
        Self { pool, name, holder, duration }
    }

    /// Takes or prolongs it; `false` when another holds it. An answer that takes longer than the lease
    /// lasts is none.
    pub(crate) async fn hold(&self) -> Result<bool, sqlx::Error> {
        timeout(self.duration, self.try_hold()).await.unwrap_or_else(|_| {
            let late = std::io::Error::from(std::io::ErrorKind::TimedOut);
            Err(sqlx::Error::Io(late))
        })
    }

    async fn try_hold(&self) -> Result<bool, sqlx::Error> {
        let held = sqlx::query!(
            "insert into lease (name, holder, expires_at)
             values ($1, $2, clock_timestamp() + make_interval(secs => $3))
             on conflict (name) do update
             set holder = excluded.holder, expires_at = excluded.expires_at
             where lease.holder = excluded.holder or lease.expires_at < clock_timestamp()",
            self.name,
            self.holder,
            self.duration.as_secs_f64(),
        )
        .execute(&self.pool)
        .await?;
        Ok(held.rows_affected() == 1)
    }

    /// Prolongs it in time, again and again; ends when it is lost.
    pub(crate) async fn keep(&self) {
        let mut held_at = Instant::now();
        loop {
            sleep(self.renewal_interval()).await;
            match self.hold().await {
                Ok(true) => held_at = Instant::now(),
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(lease = self.name, %error, "could not prolong a lease");
                    if held_at.elapsed() > self.duration {
                        return;
                    }
                }
            }
        }
    }

    /// How often to prolong it, or to try to take it.
    pub(crate) fn renewal_interval(&self) -> Duration {
        self.duration / 3
    }

    /// Gives it up, so that another need not wait for it to expire.
    pub(crate) async fn release(&self) -> Result<(), sqlx::Error> {
        sqlx::query!("delete from lease where name = $1 and holder = $2", self.name, self.holder)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
