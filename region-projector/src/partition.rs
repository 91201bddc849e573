//! One partition: takes what has arrived, applies it in one transaction, says so.

mod ahead;
mod attempt;
mod batch;
pub mod failure;
pub(crate) mod gap;
pub(crate) mod parking;
pub mod plan;
mod poison;
mod remembered;
mod size;
pub mod write;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use consistency::{AggregateKey, CommittedAt, Position};
use process::postgres::AtHand;
use projection::ProjectionDefinition;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::announce::Announcer;
use crate::attempt::{Attempt, bounded, bounded_until};
use crate::breaker::Trip;
use crate::chain::Mark;
use crate::checkpoint::{self, Held, VersionKey};
use crate::config::ApplyConfig;
use crate::health::{Health, Part, chain_of};
use crate::log::LogClient;
use crate::reader::Chunk;
use crate::retry::Backoff;
use crate::status::{self, Status};
use crate::telemetry::{Outcome, Telemetry};
use ahead::{Queue, Taken};
use batch::{Applied, Batch, Failed, Findings};
use failure::{Failure, classify};
use plan::Plan;
use remembered::Remembered;
use size::BatchSize;

/// Why a partition ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// It was asked to.
    Stopped,
    /// The database is not as this partition left it: another holder, or another past. What memory
    /// says is worth nothing, and everything starts from the stored checkpoints again.
    Displaced,
    /// Too much would have been parked. What it was to apply is as it was.
    Tripped(Trip),
}

/// A partition that has ended.
#[derive(Debug, Clone, Copy)]
pub struct Rest {
    /// What it holds, as far as it knows. Worth nothing unless it was asked to end.
    pub held: Held,
    /// Why it ended.
    pub left: Left,
}

/// What a partition needs.
pub struct Partition {
    /// The version that it is a part of.
    pub key: VersionKey,
    /// Its rules.
    pub definition: ProjectionDefinition,
    /// What it holds.
    pub held: Held,
    /// To the region's database.
    pub connections: AtHand,
    /// The primary's log, for what is missing.
    pub log: LogClient,
    /// Those of the version that write at the same time. Whoever waits for its turn holds nothing.
    pub writers: Arc<Semaphore>,
    /// Where it announces.
    pub announcer: Announcer,
    /// Where it says what it has reached.
    pub status: Status,
    /// Where it says what is wrong.
    pub health: Health,
    /// What is counted.
    pub telemetry: Arc<Telemetry>,
    /// Bounds and intervals.
    pub config: ApplyConfig,
    /// What was begun gets so long to end once a stop is asked for.
    pub drain_max: Duration,
}

impl Partition {
    /// Applies what comes until it is stopped or displaced.
    pub async fn run(self, chunks: mpsc::Receiver<Chunk>, stop: CancellationToken) -> Rest {
        let mut running = Running::new(self);
        running.begin().await;
        let left = running.work(chunks, &stop).await;
        Rest { held: running.partition.held, left }
    }

    fn name(&self) -> String {
        format!("{} partition {}", self.key, self.held.partition)
    }
}

/// A proof by reading that is not stored yet.
#[derive(Debug, Clone, Copy)]
struct Unstored {
    through: Mark,
    committed_at: CommittedAt,
}

struct Running {
    partition: Partition,
    name: String,
    /// How far everything is applied or read past; the stored checkpoint or beyond.
    watermark: Position,
    unstored: Option<Unstored>,
    store_at: Instant,
    size: BatchSize,
    remembered: Remembered,
}

impl Running {
    fn new(partition: Partition) -> Self {
        let watermark = partition.held.mark.position;
        let name = partition.name();
        let config = &partition.config;
        let size = BatchSize::new(config.batch_events_max, config.batch_ms_max);
        let partition_count = partition.definition.partition_count().get();
        let remembered =
            Remembered::new(config.remembered_bytes_max / usize::from(partition_count));
        let store_at = Instant::now();
        Self { partition, name, watermark, unstored: None, store_at, size, remembered }
    }

    async fn work(&mut self, chunks: mpsc::Receiver<Chunk>, stop: &CancellationToken) -> Left {
        let mut queue = Queue::new(chunks);
        loop {
            let events_max = self.size.get();
            let step = tokio::select! {
                biased;
                // What was begun is done by now; what waits is read again by the next holder.
                () = stop.cancelled() => break,
                // Before new work, or a partition that always reads past others' events never stores.
                () = self.store_due() => self.store_idle().await,
                taken = queue.next(&self.partition.config, events_max) => match taken {
                    Taken::Batch(batch, folded) => self.take(batch, folded, &mut queue, stop).await,
                    Taken::Ended => break,
                    Taken::Lost => Err(Left::Displaced),
                },
            };
            match step {
                Ok(()) => {}
                Err(Left::Stopped) => break,
                Err(left @ (Left::Displaced | Left::Tripped(_))) => return left,
            }
        }
        // What was read past is proven, and stored it spares the next holder reading it again.
        self.store_idle().await.err().unwrap_or(Left::Stopped)
    }

    /// Whoever listens learns where this holder begins.
    async fn begin(&mut self) {
        self.reached(None);
        self.count_parked().await;
        self.announce(self.watermark, &BTreeSet::new()).await;
    }

    async fn take(
        &mut self,
        mut batch: Batch,
        folded: Option<Box<Plan>>,
        queue: &mut Queue,
        stop: &CancellationToken,
    ) -> Result<(), Left> {
        if batch.through.position <= self.watermark {
            return Ok(());
        }
        // Other partitions may be behind this one, and the reader starts with the last of them.
        batch.events.retain(|event| event.at.position > self.watermark);
        if batch.events.is_empty() {
            self.read_past(&batch).await;
            Ok(())
        } else {
            self.apply(batch, folded, queue, stop).await
        }
    }

    /// Reading past `through` without an event of ours proves it: said soon, stored in a while.
    async fn read_past(&mut self, batch: &Batch) {
        let from = self.watermark;
        let Batch { through, committed_at, .. } = *batch;
        self.watermark = through.position;
        self.unstored = Some(Unstored { through, committed_at });
        self.reached(Some(committed_at));
        self.announce(from, &BTreeSet::new()).await;
    }

    async fn store_due(&self) {
        match self.unstored {
            Some(_) => tokio::time::sleep_until(self.store_at).await,
            None => std::future::pending().await,
        }
    }

    async fn store_idle(&mut self) -> Result<(), Left> {
        let Some(Unstored { through, committed_at }) = self.unstored else { return Ok(()) };
        self.store_at = Instant::now() + self.partition.config.idle_store_interval.get();
        // When the others are busy, or stuck, there is time: nobody waits for what is stored.
        let Ok(_turn) = Arc::clone(&self.partition.writers).try_acquire_owned() else {
            return Ok(());
        };
        let deadline = self.partition.config.attempt_timeout;
        match bounded(deadline, self.try_store(through, committed_at)).await {
            Ok(()) => {
                self.partition.health.well(Part::Database, &self.name);
                self.stored(through, committed_at);
                Ok(())
            }
            Err(Failed::Tripped(trip)) => Err(Left::Tripped(trip)),
            Err(Failed::Database(error)) => {
                self.partition.health.unwell(Part::Database, &self.name, chain_of(&error));
                Ok(())
            }
            // A checkpoint that moves alone meets neither gap nor sum.
            Err(Failed::Displaced | Failed::Gaps(_) | Failed::TooMuch | Failed::Stale) => {
                Err(Left::Displaced)
            }
        }
    }

    async fn try_store(&self, to: Mark, committed_at: CommittedAt) -> Result<(), Failed> {
        let Partition { key, held, connections, .. } = &self.partition;
        let mut attempt = Attempt::begin(connections).await?;
        let at = Some(committed_at);
        if !checkpoint::advance(&mut attempt, key, held, to, at).await? {
            self.explain(&mut attempt, to).await?;
        }
        attempt.finish();
        Ok(())
    }

    /// Applies a batch, however often it takes.
    async fn apply(
        &mut self,
        batch: Batch,
        mut folded: Option<Box<Plan>>,
        queue: &mut Queue,
        stop: &CancellationToken,
    ) -> Result<(), Left> {
        let mut parts = vec![batch];
        while let Some(part) = parts.pop() {
            let events_max = self.size.get();
            if events_max < part.events.len() {
                folded = None;
                let (first, rest) = part.cut(events_max);
                parts.extend([rest, first]);
                continue;
            }
            let next = parts.is_empty().then_some(&mut *queue);
            match self.apply_at_once(&part, folded.take(), next, stop).await? {
                Applied::Committed => {}
                Applied::NotAtOnce => {
                    queue.throw_away();
                    let half_count = part.events.len() / 2;
                    let (half, rest) = part.cut(half_count);
                    parts.extend([rest, half]);
                }
            }
        }
        Ok(())
    }

    /// In one transaction, however often it takes, unless it may be that it is too much for one: too
    /// large for the time that a statement gets, or refused though no single aggregate is at fault.
    async fn apply_at_once(
        &mut self,
        batch: &Batch,
        mut folded: Option<Box<Plan>>,
        mut queue: Option<&mut Queue>,
        stop: &CancellationToken,
    ) -> Result<Applied, Left> {
        let config = self.partition.config;
        let mut backoff = Backoff::new(config.retry_pause_min, config.retry_pause_max);
        let mut findings = Findings::default();
        loop {
            let Some(turn) = stop.run_until_cancelled(self.turn()).await else {
                return Err(Left::Stopped);
            };
            let began = Instant::now();
            let patience = (stop, self.partition.drain_max);
            let attempt = self.attempt(batch, &findings, folded.take(), queue.as_deref_mut());
            let attempt = Box::pin(attempt);
            let tried = bounded_until(config.attempt_timeout, patience, attempt).await;
            if tried.is_err() {
                self.remembered.clear();
                if let Some(queue) = &mut queue {
                    queue.throw_away();
                }
            }
            let error = match tried {
                Ok(plan) => {
                    self.committed(batch, &plan, began).await;
                    return Ok(Applied::Committed);
                }
                Err(Failed::Displaced) => return Err(Left::Displaced),
                Err(Failed::Tripped(trip)) => return Err(Left::Tripped(trip)),
                Err(Failed::TooMuch) => return Ok(Applied::NotAtOnce),
                Err(Failed::Stale) => continue,
                Err(Failed::Gaps(gaps)) => {
                    // Others may write while the log is asked.
                    drop(turn);
                    let healing = self.heal(&gaps, batch, &mut findings);
                    match stop.run_until_cancelled(healing).await {
                        Some(()) => continue,
                        None => return Err(Left::Stopped),
                    }
                }
                Err(Failed::Database(error)) => error,
            };
            let reason = match classify(&error) {
                Failure::Transient(reason) => reason,
                Failure::Permanent(reason) => match self.find_poison(batch, &findings).await {
                    Ok(found) if !found.is_empty() => {
                        findings.condemned.extend(found);
                        continue;
                    }
                    // Nothing of ours is at fault, or the search itself failed: visibly, again.
                    Ok(_) | Err(_) => reason,
                },
            };
            drop(turn);
            self.partition.telemetry.retried(&self.partition.key, reason);
            self.partition.health.unwell(Part::Database, &self.name, chain_of(&error));
            if stop.run_until_cancelled(backoff.pause()).await.is_none() {
                return Err(Left::Stopped);
            }
            if failure::may_be_too_much(reason) && 1 < batch.events.len() {
                return Ok(Applied::NotAtOnce);
            }
        }
    }

    /// Waits until it may write.
    async fn turn(&self) -> OwnedSemaphorePermit {
        let turn = Arc::clone(&self.partition.writers).acquire_owned().await;
        turn.expect("nobody closes it")
    }

    async fn committed(&mut self, batch: &Batch, plan: &Plan, began: Instant) {
        let from = self.watermark;
        self.remember(plan);
        self.size.committed(batch.events.len(), began.elapsed());
        self.stored(batch.through, batch.committed_at);
        let (version, partition) = (&self.partition.key, self.partition.held.partition);
        let committed = batch.through.position.get();
        tracing::debug!(%version, partition, committed, "batch committed");
        self.announce(from, &plan.touched).await;
        let Partition { key, held, telemetry, health, status, .. } = &self.partition;
        let ids = batch.events.iter().map(|event| event.aggregate.id());
        status.applied(key, Instant::now(), ids);
        let (letters, duplicates) = (plan.letters.len(), plan.duplicate_count);
        telemetry.batch(key, began.elapsed().as_secs_f64());
        telemetry.events(key, Outcome::DeadLettered, letters);
        telemetry.events(key, Outcome::Duplicate, duplicates);
        let applied = batch.events.len().saturating_sub(letters + duplicates);
        telemetry.events(key, Outcome::Applied, applied);
        telemetry.spans(key, held.partition, &batch.events, began.elapsed());
        health.well(Part::Database, &self.name);
        for parking in &plan.parkings {
            telemetry.parked(key, parking.reason);
            let (aggregate, position) = (&parking.aggregate, parking.at.position);
            tracing::warn!(%aggregate, %position, reason = parking.reason, "aggregate parked");
        }
        // An earlier try whose reply was lost may have parked them: then only letters are left here.
        if !plan.letters.is_empty() {
            self.count_parked().await;
        }
    }

    fn remember(&mut self, plan: &Plan) {
        for (id, state) in plan.states_of(|_| true) {
            self.remembered.keep(id, state);
        }
        // Whoever takes up what is parked finds it stored.
        for parking in &plan.parkings {
            self.remembered.forget(parking.aggregate.id());
        }
    }

    /// The checkpoint is at `to` now.
    fn stored(&mut self, to: Mark, committed_at: CommittedAt) {
        self.partition.held.mark = to;
        self.watermark = to.position;
        self.unstored = None;
        self.reached(Some(committed_at));
    }

    fn reached(&self, committed_at: Option<CommittedAt>) {
        let Partition { key, held, status, .. } = &self.partition;
        status.reach(key, *held, self.watermark, committed_at, status::now());
    }

    async fn announce(&self, from: Position, touched: &BTreeSet<AggregateKey>) {
        let Partition { key, held, announcer, .. } = &self.partition;
        announcer.announce(key, held, from, self.watermark, touched).await;
    }

    /// Only for display, so an error is left to those who meet it in earnest.
    async fn count_parked(&self) {
        let Partition { key, held, connections, status, health, config, .. } = &self.partition;
        let count = bounded(config.attempt_timeout, async {
            let mut attempt = Attempt::begin(connections).await?;
            let count = parking::count(&mut attempt, key, held.partition).await?;
            attempt.finish();
            Ok::<_, sqlx::Error>(count)
        });
        let Ok(count) = count.await else { return };
        status.set_parked(key, held.partition, count);
        match count {
            0 => health.well(Part::Parked, &self.name),
            _ => health.unwell(Part::Parked, &self.name, format!("{count} aggregates")),
        }
    }
}
