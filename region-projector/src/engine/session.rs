//! A reader and the partitions that it feeds, from their checkpoints to the first change of anything.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::{Aim, Engine, Holdings, Shared, TurnError};
use crate::attempt::{Attempt, bounded};
use crate::chain::Chain;
use crate::checkpoint::{self, CheckpointError, Held};
use crate::health::{Part, chain_of};
use crate::partition::{Left, Partition, Rest};
use crate::reader::{Chunk, Ended, Reader};
use crate::retry::Backoff;

impl Engine {
    /// Until it is stopped, the aim is another one, or a partition cannot go on. Leaves in `held` what is
    /// still known of the partitions: they have come to rest. A partition that joins later may be behind
    /// the others, so every session reads from the lowest checkpoint of all its partitions.
    pub(super) async fn session(
        &self,
        aim: &Aim,
        held: &mut Holdings,
        stop: &CancellationToken,
    ) -> Result<(), TurnError> {
        self.shared.status.forget(&self.key);
        if held.is_empty() {
            // Others have them all.
            let _ = stop.run_until_cancelled(self.aim_changed(aim)).await;
            return Ok(());
        }
        let chain = Chain::new(self.shared.history.clone(), held.values().map(|held| held.mark))?;
        tracing::info!(version = %self.key, from = %chain.end().position, "reading");
        let over = stop.child_token();
        let (mut senders, mut partitions) = (BTreeMap::new(), JoinSet::new());
        let writers = Arc::new(Semaphore::new(self.shared.config.writers_max));
        for (partition, held) in std::mem::take(held) {
            let (sender, chunks) = mpsc::channel::<Chunk>(self.shared.config.queue_chunks_max);
            senders.insert(partition, sender);
            partitions.spawn(self.partition(held, &writers).run(chunks, over.clone()));
        }
        let mut reader = Owned(tokio::spawn(self.reader(chain, senders).run(over.clone())));
        let mut rested = Rested::default();
        let outcome = tokio::select! {
            biased;
            // A partition ends first only when it cannot go on, or all do since they were stopped.
            first = partitions.join_next() => match rested.note(first, held) {
                Ok(()) if stop.is_cancelled() => Ok(()),
                // Nobody stopped it: the reader has ended, and knows why.
                Ok(()) => why((&mut reader.0).await, &mut partitions, &mut rested, held).await,
                Err(error) => Err(error),
            },
            ended = &mut reader.0 => why(ended, &mut partitions, &mut rested, held).await,
            // Partitions are to go to others, or to come here, or an operator has stopped everything.
            () = self.aim_changed(aim) => Ok(()),
            // Displaces whoever holds their partitions.
            never = self.look_at_letters() => match never {},
            // Only notices what nobody else would while nothing is written.
            () = self.went_back() => {
                rested.forget_all = true;
                Err(TurnError::Displaced)
            }
        };
        over.cancel();
        while let Some(left) = partitions.join_next().await {
            // The first reason counts; a partition that ends badly now is only not known any more.
            let _ = rested.note(Some(left), held);
        }
        if rested.forget_all {
            held.clear();
        }
        // It may be waiting for a log across the ocean, and holds nothing worth waiting for.
        reader.0.abort();
        outcome
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
        let mut attempt = Attempt::begin(&self.shared.connections).await?;
        let stored = checkpoint::stored(&mut attempt, &self.key).await?;
        attempt.finish();
        Ok(stored)
    }

    fn partition(&self, held: Held, writers: &Arc<Semaphore>) -> Partition {
        let Shared {
            connections,
            log,
            announcer,
            status,
            health,
            telemetry,
            config,
            drain_max,
            ..
        } = &self.shared;
        Partition {
            key: self.key.clone(),
            definition: self.definition.clone(),
            held,
            connections: connections.clone(),
            writers: Arc::clone(writers),
            log: log.clone(),
            announcer: announcer.clone(),
            status: status.clone(),
            health: health.clone(),
            telemetry: Arc::clone(telemetry),
            config: *config,
            drain_max: *drain_max,
        }
    }

    fn reader(&self, chain: Chain, partitions: BTreeMap<u16, mpsc::Sender<Chunk>>) -> Reader {
        let shared = self.shared.clone();
        let Shared { tail, log, stalled, status, health, telemetry, config, .. } = shared;
        Reader {
            key: self.key.clone(),
            definition: self.definition.clone(),
            partitions,
            tail,
            log,
            page_events_max: shared.page_events_max,
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

/// How partitions have come to rest.
#[derive(Default)]
struct Rested {
    /// Nothing that memory says is worth anything.
    forget_all: bool,
}

impl Rested {
    /// Notes what is known of a partition that has ended, unless that is nothing any more. An error when
    /// it did not end because it was asked to.
    fn note(
        &mut self,
        ended: Option<Result<Rest, JoinError>>,
        held: &mut Holdings,
    ) -> Result<(), TurnError> {
        match ended {
            Some(Ok(Rest { held: now, left: Left::Stopped })) => {
                held.insert(now.partition, now);
                Ok(())
            }
            Some(Ok(Rest { left: Left::Tripped(trip), .. })) => Err(trip.into()),
            Some(Ok(Rest { left: Left::Displaced, .. })) => Err(TurnError::Displaced),
            Some(Err(_)) => {
                self.forget_all = true;
                Err(TurnError::Displaced)
            }
            None => Ok(()),
        }
    }
}

/// Why a session is over whose reader has ended. What it handed on before the chain broke is sound:
/// the partitions finish it.
async fn why(
    ended: Result<Ended, JoinError>,
    partitions: &mut JoinSet<Rest>,
    rested: &mut Rested,
    held: &mut Holdings,
) -> Result<(), TurnError> {
    match ended {
        Ok(Ended::Stopped) => {
            // Nobody listened any more: one of them has a reason.
            let mut outcome = Ok(());
            while let Some(left) = partitions.join_next().await {
                outcome = outcome.and(rested.note(Some(left), held));
            }
            outcome
        }
        Ok(Ended::Broken(broken)) => {
            while let Some(left) = partitions.join_next().await {
                let _ = rested.note(Some(left), held);
            }
            Err(broken.into())
        }
        Err(_) => Err(TurnError::Displaced),
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
