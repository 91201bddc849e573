//! One partition: takes what has arrived, applies it in one transaction, says so.

mod ahead;
pub mod failure;
pub(crate) mod gap;
pub(crate) mod parking;
pub mod plan;
mod poison;
mod size;
pub mod write;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use consistency::{AggregateKey, CommittedAt, Event, Position};
use projection::ProjectionDefinition;
use sqlx::{Connection as _, PgConnection, PgPool};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::announce::Announcer;
use crate::attempt::{Attempt, bounded, bounded_until};
use crate::breaker::{self, Trip};
use crate::chain::Mark;
use crate::checkpoint::{self, CheckpointError, Held, VersionKey};
use crate::config::ApplyConfig;
use crate::health::{Health, Part, chain_of};
use crate::log::LogClient;
use crate::reader::{Chunk, bytes_of};
use crate::retry::Backoff;
use crate::status::{self, Status};
use crate::telemetry::{FetchReason, Outcome, Telemetry};
use ahead::{Queue, Taken};
use failure::{Failure, classify};
use gap::Healed;
use plan::{Condemned, Gap, Plan};
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
    /// The region's database.
    pub pool: PgPool,
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

/// What has arrived and is applied at once.
#[derive(Debug)]
pub struct Batch {
    /// The partition's events, in log order.
    pub events: Vec<Event>,
    /// The last event that was read, whosever it is.
    pub through: Mark,
    /// When that one was committed.
    pub committed_at: CommittedAt,
    /// The place that the events take among what is not applied.
    room: Option<OwnedSemaphorePermit>,
}

impl Batch {
    /// Takes what else has arrived, up to bounds that the last chunk may pass.
    fn gather(
        first: Chunk,
        chunks: &mut mpsc::Receiver<Chunk>,
        config: &ApplyConfig,
        events_max: usize,
    ) -> Self {
        let Chunk { events, through, committed_at, room } = first;
        let mut bytes: usize = events.iter().map(bytes_of).sum();
        let mut batch = Self { events, through, committed_at, room };
        while batch.events.len() < events_max
            && bytes < config.batch_bytes_max
            && let Ok(chunk) = chunks.try_recv()
        {
            bytes += chunk.events.iter().map(bytes_of).sum::<usize>();
            match (&mut batch.room, chunk.room) {
                (Some(held), Some(more)) => held.merge(more),
                (held @ None, more) => *held = more,
                (Some(_), None) => {}
            }
            batch.events.extend(chunk.events);
            batch.through = chunk.through;
            batch.committed_at = chunk.committed_at;
        }
        batch
    }

    /// Whether it has an event of an aggregate.
    fn is_of(&self, aggregate_id: &str) -> bool {
        self.events.iter().any(|event| event.aggregate.id() == aggregate_id)
    }

    /// The first events and the rest. The first go as far as their last event: nothing of the partition
    /// lies between.
    fn cut(mut self, count: usize) -> (Self, Self) {
        let later = self.events.split_off(count);
        let room = self.room.take();
        let rest = Self { events: later, room, ..self };
        if let Some(last) = self.events.last() {
            (self.through, self.committed_at) = (Mark::of(last), last.committed_at);
        }
        (self, rest)
    }
}

/// What earlier tries of a batch have found out.
#[derive(Debug, Default)]
struct Findings {
    condemned: Condemned,
    healed: Healed,
}

impl Findings {
    /// The events to apply: those of the batch, but what the log says where that is known better.
    fn events<'a>(&'a self, batch: &'a Batch) -> impl Iterator<Item = &'a Event> + Clone {
        let read = batch.events.iter();
        let read = read.filter(|event| !self.healed.contains_key(event.aggregate.id()));
        read.chain(self.healed.values().flatten())
    }
}

/// What became of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Applied {
    Committed,
    /// It may be too much at once.
    NotAtOnce,
}

/// Why an attempt did not commit.
#[derive(Debug)]
enum Failed {
    Displaced,
    Tripped(Trip),
    /// Events are missing that the log may have.
    Gaps(Vec<Gap>),
    /// Sums leave their bounds when all is added up at once.
    TooMuch,
    /// What was folded ahead does not fit what is stored.
    Stale,
    Database(sqlx::Error),
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(error)
    }
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
}

impl Running {
    fn new(partition: Partition) -> Self {
        let watermark = partition.held.mark.position;
        let name = partition.name();
        let config = &partition.config;
        let size = BatchSize::new(config.batch_events_max, config.batch_ms_max);
        Self { partition, name, watermark, unstored: None, store_at: Instant::now(), size }
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

    /// Reading past `through` without an event of ours proves it: said at once, stored in a while.
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
        let Partition { key, held, pool, .. } = &self.partition;
        let mut attempt = Attempt::begin(pool).await?;
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
            if let (Err(_), Some(queue)) = (&tried, &mut queue) {
                queue.throw_away();
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

    /// Asks the log for what is missing, as long as it may take. Where that does not help, what was
    /// read stands, and its aggregate is parked.
    async fn heal(&self, gaps: &[Gap], batch: &Batch, findings: &mut Findings) {
        let config = self.partition.config;
        let until = Instant::now() + config.gap_wait_max.get();
        for gap in gaps {
            let id = gap.aggregate.id();
            let fetched = self.fetch(gap, batch.through.position, until).await;
            let events = fetched.unwrap_or_else(|| {
                tracing::warn!(partition = self.name, aggregate = %gap.aggregate, "gap is not filled");
                let read = batch.events.iter().filter(|event| event.aggregate.id() == id);
                read.cloned().collect()
            });
            findings.healed.insert(id.to_owned(), events);
        }
    }

    async fn fetch(&self, gap: &Gap, through: Position, until: Instant) -> Option<Vec<Event>> {
        let Partition { log, held, health, telemetry, config, .. } = &self.partition;
        let mut backoff = Backoff::new(config.retry_pause_min, config.retry_pause_max);
        loop {
            match gap::fetch(log, held.epoch, gap, through, config.gap_events_max).await {
                Ok(events) => {
                    health.well(Part::Log, &self.name);
                    telemetry.fetched(FetchReason::Gap, events.iter().flatten().count() as u64);
                    return events;
                }
                Err(error) if Instant::now() < until => {
                    health.unwell(Part::Log, &self.name, chain_of(&error));
                    backoff.pause().await;
                }
                Err(_) => {
                    // It is not asked any more, so nobody would say that it answers again.
                    health.well(Part::Log, &self.name);
                    return None;
                }
            }
        }
    }

    /// Waits until it may write.
    async fn turn(&self) -> OwnedSemaphorePermit {
        let turn = Arc::clone(&self.partition.writers).acquire_owned().await;
        turn.expect("nobody closes it")
    }

    /// One try: lock, read, decide, write, commit.
    async fn attempt(
        &self,
        batch: &Batch,
        findings: &Findings,
        folded: Option<Box<Plan>>,
        queue: Option<&mut Queue>,
    ) -> Result<Box<Plan>, Failed> {
        let Partition { key, definition, held, pool, config, .. } = &self.partition;
        let mut attempt = Attempt::begin(pool).await?;
        let mut transaction = attempt.connection().begin().await?;
        let (through, at) = (batch.through, Some(batch.committed_at));
        // First, so that everything else is read and written under the lock of its row: a database
        // that failed over may hand out a fence again, and then only the lock tells what is parked.
        if !checkpoint::advance(&mut transaction, key, held, through, at).await? {
            transaction.rollback().await?;
            self.explain(&mut attempt, through).await?;
            let plan = self.plan(&mut attempt, batch, findings).await?;
            attempt.finish();
            return Ok(Box::new(plan));
        }
        let is_folded = folded.is_some();
        let plan = match folded {
            Some(plan) => self.still_open(&mut transaction, batch, plan).await?,
            None => Box::new(self.plan(&mut transaction, batch, findings).await?),
        };
        if let Some(failed) = reconsider(&plan, batch, findings) {
            transaction.rollback().await?;
            attempt.finish();
            return Err(failed);
        }
        let bound = config.parked_aggregates_max;
        if let Some(trip) = breaker::check(&mut transaction, key, &plan.parkings, bound).await? {
            transaction.rollback().await?;
            attempt.finish();
            return Err(Failed::Tripped(trip));
        }
        if let Some(queue) = queue {
            queue.fold_ahead(&self.partition, batch, &plan, self.size.get());
        }
        if !write::write(&mut transaction, key, definition, held.partition, &plan).await? {
            transaction.rollback().await?;
            if is_folded {
                return Err(Failed::Stale);
            }
            tracing::warn!(partition = self.name, "states are not as they were read");
            return Err(Failed::Displaced);
        }
        transaction.commit().await?;
        attempt.finish();
        Ok(plan)
    }

    /// What was folded ahead, unless an aggregate of it is parked by now.
    async fn still_open(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
        folded: Box<Plan>,
    ) -> Result<Box<Plan>, Failed> {
        let Partition { key, definition, telemetry, .. } = &self.partition;
        let ids: BTreeSet<&str> = batch.events.iter().map(|event| event.aggregate.id()).collect();
        let ids: Vec<String> = ids.into_iter().map(str::to_owned).collect();
        let kind = definition.aggregate_type().as_str();
        if parking::parked(connection, key, kind, &ids).await?.is_empty() {
            telemetry.folded_ahead(key);
            Ok(folded)
        } else {
            Err(Failed::Stale)
        }
    }

    async fn plan(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
        findings: &Findings,
    ) -> Result<Plan, sqlx::Error> {
        let Partition { key, definition, held, .. } = &self.partition;
        let events = findings.events(batch);
        let mut known = write::load(connection, key, definition, events.clone()).await?;
        Ok(plan::plan(definition, held.partition, events, &mut known, &findings.condemned))
    }

    /// The checkpoint was not where we left it. It is all right only when an earlier try, whose
    /// outcome was unknown, moved it to where this one would have.
    async fn explain(&self, connection: &mut PgConnection, to: Mark) -> Result<(), Failed> {
        let Partition { key, held, .. } = &self.partition;
        let stored = match checkpoint::stored(connection, key).await {
            Ok(stored) => stored,
            Err(CheckpointError::Database(error)) => return Err(Failed::Database(error)),
            Err(CheckpointError::Senseless(_)) => return Err(Failed::Displaced),
        };
        if stored.contains(&Held { mark: to, ..*held }) { Ok(()) } else { Err(Failed::Displaced) }
    }

    async fn committed(&mut self, batch: &Batch, plan: &Plan, began: Instant) {
        let from = self.watermark;
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
        let Partition { key, held, pool, status, health, config, .. } = &self.partition;
        let count = bounded(config.attempt_timeout, async {
            let mut attempt = Attempt::begin(pool).await?;
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

/// Why a plan is not carried out: something else may spare what it would park.
fn reconsider(plan: &Plan, batch: &Batch, findings: &Findings) -> Option<Failed> {
    let asked = |gap: &&Gap| findings.healed.contains_key(gap.aggregate.id());
    let gaps: Vec<Gap> = plan.gaps.iter().filter(|gap| !asked(gap)).cloned().collect();
    if !gaps.is_empty() {
        return Some(Failed::Gaps(gaps));
    }
    (plan.overflowed && 1 < batch.events.len()).then_some(Failed::TooMuch)
}
