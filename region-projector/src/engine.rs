//! One version of a projection: takes its partitions over, lets them run, and starts anew when the
//! database turns out not to be what memory says.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::Context;
use consistency::{Epoch, Position};
use projection::ProjectionDefinition;
use sqlx::PgPool;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::announce::Announcer;
use crate::breaker::{self, Trip};
use crate::chain::{Broken, Chain};
use crate::checkpoint::{self, CheckpointError, Held, VersionKey};
use crate::config::ApplyConfig;
use crate::dead_letters::{self, DeadLetterError};
use crate::health::{Health, Part, chain_of};
use crate::log::LogClient;
use crate::partition::{Left, Partition};
use crate::reader::pull::Bounds;
use crate::reader::{Chunk, Ended, Reader};
use crate::retry::{Backoff, bounded};
use crate::start::key_of;
use crate::status::Status;
use crate::telemetry::Telemetry;

/// What all versions share.
#[derive(Clone)]
pub struct Shared {
    /// The region's database.
    pub pool: PgPool,
    /// The region's NATS server.
    pub context: Context,
    /// The stream of `epoch`.
    pub stream: String,
    /// The epoch that is read.
    pub epoch: Epoch,
    /// The primary's log.
    pub log: LogClient,
    /// Events of one page.
    pub page_events_max: usize,
    /// What one request to the stream brings at most.
    pub pull_bounds: Bounds,
    /// Events that are read from the log at most because the stream has them no more.
    pub bridge_events_max: u64,
    /// Where the stream begins.
    pub begins: watch::Receiver<Position>,
    /// Whether the mirror is stalled.
    pub stalled: watch::Receiver<bool>,
    /// How often the log is asked for more while it is.
    pub poll_interval: Duration,
    /// Where announcements go.
    pub announcer: Announcer,
    /// What was reached.
    pub status: Status,
    /// What is wrong.
    pub health: Health,
    /// What is counted.
    pub telemetry: Arc<Telemetry>,
    /// Bounds and intervals.
    pub config: ApplyConfig,
}

/// One version of a projection.
pub struct Engine {
    key: VersionKey,
    definition: ProjectionDefinition,
    shared: Shared,
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("checkpoints cannot be taken over")]
    Checkpoint(#[from] CheckpointError),
    #[error("{found} checkpoints for {expected} partitions")]
    Incomplete { found: usize, expected: u16 },
    #[error("the database is not as it was left")]
    Displaced,
    #[error("letters cannot be retried")]
    Letters(#[from] DeadLetterError),
    #[error("stopped before too much is parked")]
    Tripped(#[from] Trip),
    #[error("the log is not the one that was applied")]
    Broken(#[from] Broken),
    #[error("checkpoints are of epoch {found}, but epoch {expected} is read")]
    Epoch { found: Epoch, expected: Epoch },
}

impl From<sqlx::Error> for SessionError {
    fn from(error: sqlx::Error) -> Self {
        Self::Checkpoint(error.into())
    }
}

impl Engine {
    /// Of one version.
    pub fn new(definition: ProjectionDefinition, shared: Shared) -> Self {
        Self { key: key_of(&definition), definition, shared }
    }

    /// Runs until it is stopped. After an end that another try may mend, everything is taken over
    /// again from the stored checkpoints; a broken chain and a breaker wait for an operator.
    pub async fn run(self, stop: CancellationToken) {
        let Shared { config, health, telemetry, .. } = &self.shared;
        let mut backoff = Backoff::new(config.retry_pause_min, config.retry_pause_max);
        let mut letters_retried = false;
        telemetry.begun(&self.key);
        loop {
            let error = match self.begin(&mut letters_retried, &stop).await {
                Ok(()) => return,
                Err(error) => error,
            };
            let part = match &error {
                SessionError::Tripped(trip) => match self.await_resume(trip, &stop).await {
                    Some(()) => continue,
                    None => return,
                },
                SessionError::Letters(_)
                | SessionError::Checkpoint(_)
                | SessionError::Incomplete { .. }
                | SessionError::Displaced => Part::Database,
                SessionError::Broken(_) | SessionError::Epoch { .. } => Part::Chain,
            };
            health.unwell(part, &self.key, chain_of(&error));
            if part == Part::Chain {
                tracing::error!(
                    version = %self.key,
                    error = chain_of(&error),
                    "stopped: an operator has to decide"
                );
                return stop.cancelled().await;
            }
            telemetry.restarted(&self.key);
            if stop.run_until_cancelled(backoff.pause()).await.is_none() {
                return;
            }
        }
    }

    /// A session, and before the first of them what an older binary could not apply.
    async fn begin(
        &self,
        letters_retried: &mut bool,
        stop: &CancellationToken,
    ) -> Result<(), SessionError> {
        if !*letters_retried {
            let Shared { pool, config, announcer, .. } = &self.shared;
            let retried =
                dead_letters::retry_newly_known(pool, &self.definition, config, announcer);
            match stop.run_until_cancelled(retried).await {
                Some(retried) => retried?,
                None => return Ok(()),
            }
            *letters_retried = true;
        }
        self.session(stop).await
    }

    /// Until an operator accepts what would be parked; `None` when it is stopped before.
    async fn await_resume(&self, trip: &Trip, stop: &CancellationToken) -> Option<()> {
        let Shared { pool, config, health, telemetry, .. } = &self.shared;
        let who = format!("{} breaker", self.key);
        health.unwell(Part::Breaker, &self.key, trip);
        telemetry.stopped(&self.key, trip.reason, true);
        tracing::error!(version = %self.key, error = %trip, "stopped: an operator has to decide");
        let mut ticks = interval(config.verify_interval.get());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            stop.run_until_cancelled(ticks.tick()).await?;
            let look = Box::pin(async {
                let mut connection = pool.acquire().await?;
                breaker::is_accepted(&mut connection, &self.key, trip).await
            });
            let accepted = bounded(config.attempt_timeout, look);
            match stop.run_until_cancelled(accepted).await? {
                Ok(true) => break,
                Ok(false) => health.well(Part::Database, &who),
                Err(error) => health.unwell(Part::Database, &who, chain_of(&error)),
            }
        }
        health.well(Part::Database, &who);
        health.well(Part::Breaker, &self.key);
        telemetry.stopped(&self.key, trip.reason, false);
        tracing::info!(version = %self.key, reason = trip.reason, "resumed");
        Some(())
    }

    /// From taking the partitions over to the first of them that cannot go on.
    async fn session(&self, stop: &CancellationToken) -> Result<(), SessionError> {
        let held = bounded(self.shared.config.attempt_timeout, self.take()).await?;
        self.shared.health.well(Part::Database, &self.key);
        let chain = Chain::new(self.shared.epoch, held.iter().map(|held| held.mark))?;
        tracing::info!(version = %self.key, from = %chain.end().position, "partitions taken over");
        let over = stop.child_token();
        let mut senders = BTreeMap::new();
        let mut partitions = JoinSet::new();
        for held in held {
            let (sender, chunks) = mpsc::channel::<Chunk>(self.shared.config.queue_chunks_max);
            senders.insert(held.partition, sender);
            partitions.spawn(self.partition(held).run(chunks, over.clone()));
        }
        let reader = tokio::spawn(self.reader(chain, senders).run(over.clone()));
        let mut reader = Owned(reader);
        let outcome = tokio::select! {
            biased;
            // A partition ends first only when it cannot go on, or all do since they were stopped.
            left = partitions.join_next() => match left {
                Some(Ok(Left::Stopped)) | None if stop.is_cancelled() => Ok(()),
                // Nobody stopped them: the reader has ended, and knows why.
                Some(Ok(Left::Stopped)) | None => why((&mut reader.0).await, &mut partitions).await,
                Some(Ok(Left::Tripped(trip))) => Err(trip.into()),
                Some(Ok(Left::Displaced) | Err(_)) => Err(SessionError::Displaced),
            },
            ended = &mut reader.0 => why(ended, &mut partitions).await,
            // Only notices what nobody else would while nothing is written.
            () = self.went_back() => Err(SessionError::Displaced),
        };
        over.cancel();
        let mut displaced = false;
        while let Some(left) = partitions.join_next().await {
            displaced |= !matches!(left, Ok(Left::Stopped));
        }
        // It may be waiting for a log across the ocean, and holds nothing worth waiting for.
        reader.0.abort();
        match outcome {
            Ok(()) if !stop.is_cancelled() || displaced => Err(SessionError::Displaced),
            outcome => outcome,
        }
    }

    async fn take(&self) -> Result<Vec<Held>, SessionError> {
        let mut connection = self.shared.pool.acquire().await?;
        let held = checkpoint::take(&mut connection, &self.key).await?;
        self.shared.status.forget(&self.key);
        let expected = self.definition.partition_count().get();
        let complete = held.iter().map(|held| held.partition).eq(0..expected);
        if !complete {
            return Err(SessionError::Incomplete { found: held.len(), expected });
        }
        let epoch = self.shared.epoch;
        match held.iter().find(|held| held.epoch != epoch) {
            Some(held) => Err(SessionError::Epoch { found: held.epoch, expected: epoch }),
            None => Ok(held),
        }
    }

    /// Ends when the stored checkpoints are older than memory, or someone else's: a database that was
    /// set back loses what memory still vouches for. Memory is read first, so that a commit between
    /// the two looks at most newer.
    async fn went_back(&self) {
        let mut ticks = interval(self.shared.config.verify_interval.get());
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let who = format!("{} checkpoints", self.key);
        loop {
            ticks.tick().await;
            let remembered = self.shared.status.held(&self.key);
            match bounded(self.shared.config.attempt_timeout, self.stored()).await {
                Ok(stored) if stands(&remembered, &stored) => {
                    self.shared.health.well(Part::Database, &who);
                }
                Ok(_) => {
                    tracing::warn!(version = %self.key, "stored checkpoints are not as they were left");
                    self.shared.health.well(Part::Database, &who);
                    return;
                }
                Err(error) => self.shared.health.unwell(Part::Database, &who, chain_of(&error)),
            }
        }
    }

    async fn stored(&self) -> Result<Vec<Held>, CheckpointError> {
        let mut connection = self.shared.pool.acquire().await?;
        checkpoint::stored(&mut connection, &self.key).await
    }

    fn partition(&self, held: Held) -> Partition {
        let Shared { pool, log, announcer, status, health, telemetry, config, .. } = &self.shared;
        Partition {
            key: self.key.clone(),
            definition: self.definition.clone(),
            held,
            pool: pool.clone(),
            log: log.clone(),
            announcer: announcer.clone(),
            status: status.clone(),
            health: health.clone(),
            telemetry: Arc::clone(telemetry),
            config: *config,
        }
    }

    fn reader(&self, chain: Chain, partitions: BTreeMap<u16, mpsc::Sender<Chunk>>) -> Reader {
        let shared = self.shared.clone();
        let Shared { context, stream, log, stalled, status, health, telemetry, config, .. } =
            shared;
        Reader {
            key: self.key.clone(),
            definition: self.definition.clone(),
            partitions,
            context,
            stream,
            log,
            page_events_max: shared.page_events_max,
            pull_bounds: shared.pull_bounds,
            bridge_events_max: shared.bridge_events_max,
            queue_bytes_max: config.queue_bytes_max,
            room: Arc::new(Semaphore::new(config.queue_bytes_max as usize)),
            begins: shared.begins,
            chain,
            stalled,
            poll_interval: shared.poll_interval,
            status,
            health,
            telemetry,
            backoff: Backoff::new(config.retry_pause_min, config.retry_pause_max),
            // What an earlier session reported is taken back by the first success of this one.
            troubled: true,
        }
    }
}

/// A task that ends with whoever waits for it.
struct Owned<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Whether everything that memory vouches for is stored, and still ours.
fn stands(remembered: &[Held], stored: &[Held]) -> bool {
    remembered.iter().all(|ours| {
        stored.iter().any(|theirs| {
            theirs.partition == ours.partition
                && theirs.fence == ours.fence
                && theirs.epoch == ours.epoch
                && ours.mark.position <= theirs.mark.position
        })
    })
}

/// Why a session is over whose reader has ended. What it handed on before the chain broke is sound:
/// the partitions finish it.
async fn why(
    ended: Result<Ended, JoinError>,
    partitions: &mut JoinSet<Left>,
) -> Result<(), SessionError> {
    match ended {
        Ok(Ended::Stopped) => Ok(()),
        Ok(Ended::Broken(broken)) => {
            while partitions.join_next().await.is_some() {}
            Err(broken.into())
        }
        Err(_) => Err(SessionError::Displaced),
    }
}
