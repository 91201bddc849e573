//! The epochs of the log as this region knows them, and what becomes of checkpoints in a new one.
//!
//! The primary is asked now and then, and at once when something is met that does not belong to the
//! epoch that is read. What it tells is stored before anything counts in it, so that the region's
//! gateways and its other projectors know it too, and a start without the primary goes on where the last
//! one was.

use std::sync::Arc;

use consistency::{Adoption, Epoch, EpochHistory, LogPosition, Position};
use process::config::Period;
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Notify, watch};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::checkpoint::{CheckpointError, VersionKey, log_position};
use crate::health::{Health, Part, chain_of};
use crate::log::{LogClient, LogError};

const WHO: &str = "epochs";

/// Why the epochs are not known.
#[derive(Debug, thiserror::Error)]
pub enum EpochError {
    /// The primary did not tell.
    #[error("the primary's epochs cannot be read")]
    Log(#[from] LogError),
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// They do not rise one by one.
    #[error("the epochs do not rise one by one")]
    Disordered,
}

/// What is known. Cheap to clone, shared by all clones.
#[derive(Debug, Clone)]
pub struct Epochs {
    known: watch::Receiver<EpochHistory>,
    wake: Arc<Notify>,
}

impl Epochs {
    /// The epochs known now.
    pub fn known(&self) -> EpochHistory {
        self.known.borrow().clone()
    }

    /// Something was met that is not of the epoch that is read: the primary is asked again.
    pub fn look(&self) {
        self.wake.notify_one();
    }

    /// Ends when a newer epoch is known than the newest of `history`.
    pub async fn newer_than(&self, history: &EpochHistory) {
        let mut known = self.known.clone();
        let newer = known.wait_for(|known| history.current() < known.current());
        if newer.await.is_err() {
            // Nobody learns any more: the process ends.
            std::future::pending().await
        }
    }
}

/// Learns epochs.
pub struct Learner {
    pool: PgPool,
    log: LogClient,
    every: Period,
    health: Health,
    known: watch::Sender<EpochHistory>,
    wake: Arc<Notify>,
}

impl Learner {
    /// Asks the primary `every` so often. `stored` is what the region knew before.
    pub fn new(
        pool: PgPool,
        log: LogClient,
        every: Period,
        health: Health,
        stored: EpochHistory,
    ) -> (Self, Epochs) {
        let (known, seen) = watch::channel(stored);
        let wake = Arc::new(Notify::new());
        let epochs = Epochs { known: seen, wake: Arc::clone(&wake) };
        (Self { pool, log, every, health, known, wake }, epochs)
    }

    /// Learns until it is stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut ticks = interval(self.every.get());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                // What is learnt now would not be used.
                () = stop.cancelled() => return,
                () = self.wake.notified() => ticks.reset(),
                _ = ticks.tick() => {}
            }
            if stop.run_until_cancelled(self.learn()).await.is_none() {
                return;
            }
        }
    }

    /// Asks once. Without an answer, what another process of the region has learnt is known at least.
    pub async fn learn(&self) {
        match self.try_learn().await {
            Ok(()) => self.health.well(Part::Log, WHO),
            Err(error) => self.health.unwell(Part::Log, WHO, chain_of(&error)),
        }
    }

    async fn try_learn(&self) -> Result<(), EpochError> {
        let told = self.log.epochs().await;
        let mut connection = self.pool.acquire().await?;
        if let Ok(told) = &told {
            store(&mut connection, told).await?;
        }
        let stored = stored(&mut connection).await?;
        self.known.send_if_modified(|known| {
            let is_newer = known.current() < stored.current();
            if is_newer {
                let (epoch, after) = (stored.current(), stored.current_starts_after());
                tracing::warn!(%epoch, %after, "a newer epoch is known");
                *known = stored;
            }
            is_newer
        });
        told?;
        Ok(())
    }
}

/// Every epoch after the first that the region has stored.
pub async fn stored(connection: &mut PgConnection) -> Result<EpochHistory, EpochError> {
    let rows = sqlx::query!(
        "select epoch, starts_after from adopted_epoch where epoch > 1 order by epoch"
    )
    .fetch_all(connection)
    .await?;
    let starts = rows
        .into_iter()
        .map(|row| Some((Epoch::from_i32(row.epoch)?, Position::from_i64(row.starts_after)?)));
    let starts: Option<Vec<_>> = starts.collect();
    starts.and_then(EpochHistory::new).ok_or(EpochError::Disordered)
}

/// Keeps what the primary told.
pub(crate) async fn store(
    connection: &mut PgConnection,
    told: &[(Epoch, Position)],
) -> Result<(), sqlx::Error> {
    let numbers: Vec<i32> = told.iter().map(|(epoch, _)| epoch.as_i32()).collect();
    let starts: Vec<i64> = told.iter().map(|(_, start)| start.as_i64()).collect();
    sqlx::query!(
        "insert into adopted_epoch (epoch, starts_after)
         select * from unnest($1::integer[], $2::bigint[]) on conflict do nothing",
        &numbers,
        &starts,
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Brings the checkpoints of a version into the newest epoch of `history`, all of them or none. Whoever
/// applied in an older one can commit no more: its fence is not the checkpoint's.
pub async fn adopt(
    connection: &mut PgConnection,
    key: &VersionKey,
    history: &EpochHistory,
) -> Result<Adoption, CheckpointError> {
    // Nearly always there is nothing to be done, and nobody has to wait for a lock to know that.
    let stored = sqlx::query!(
        "select partition, epoch, position from checkpoint
         where projection = $1 and version = $2 order by partition",
        key.projection.as_str(),
        key.version_column(),
    )
    .fetch_all(&mut *connection)
    .await?;
    let stored = stored.into_iter().map(|row| log_position(row.partition, row.epoch, row.position));
    if history.adoption(stored.collect::<Result<Vec<LogPosition>, _>>()?) == Adoption::Here {
        return Ok(Adoption::Here);
    }
    let locked = sqlx::query!(
        "select partition, epoch, position from checkpoint
         where projection = $1 and version = $2 order by partition for update",
        key.projection.as_str(),
        key.version_column(),
    )
    .fetch_all(&mut *connection)
    .await?;
    let locked = locked.into_iter().map(|row| log_position(row.partition, row.epoch, row.position));
    let adoption = history.adoption(locked.collect::<Result<Vec<LogPosition>, _>>()?);
    match adoption {
        Adoption::InPlace => {
            let epoch = history.current();
            sqlx::query!(
                "update checkpoint set epoch = $3, fence = fence + 1
                 where projection = $1 and version = $2 and epoch < $3",
                key.projection.as_str(),
                key.version_column(),
                epoch.as_i32(),
            )
            .execute(connection)
            .await?;
            tracing::warn!(version = %key, %epoch, "checkpoints count in a newer epoch");
        }
        Adoption::Here | Adoption::Beyond { .. } | Adoption::Newer(_) => {}
    }
    Ok(adoption)
}
