//! Reads the log once for all partitions of a rebuild.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_nats::jetstream;
use consistency::{Position, stream_name};
use sqlx::Connection as _;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::begin::Job;
use super::fold::Folding;
use super::progress::Phase;
use super::{RebuildError, Work};
use crate::chain::Chain;
use crate::checkpoint::{self, Held};
use crate::health::Health;
use crate::reader::pull::{Bounds, Stream};
use crate::reader::tail::{self, Tail};
use crate::reader::{Chunk, Ended, Reader};
use crate::retry::Backoff;
use crate::service::stream_watch;

/// Events that one request to the stream brings at most.
const PULL_EVENTS_MAX: usize = 5000;

impl Work {
    /// Folds everything up to the job's target, and stores it.
    pub(super) async fn fold(&self, job: &Job) -> Result<(), RebuildError> {
        let held = self.take(job).await?;
        let reached = held.iter().map(|held| held.mark.position).min().unwrap_or_default();
        self.progress.begin(Phase::Folding, reached.get(), job.target.get());
        if job.target <= reached {
            return Ok(());
        }
        let over = CancellationToken::new();
        let _ends = over.clone().drop_guard();
        let (stalled, stalled_seen) = watch::channel(false);
        let (begins, begins_seen) = watch::channel(Position::ZERO);
        let health = Health::default();
        let known = (self.status.clone(), health.clone(), Arc::clone(&self.telemetry));
        let told = (stalled, begins);
        let watching = stream_watch(&self.config, &self.client, &job.history, told, known);
        let mut tasks = JoinSet::new();
        tasks.spawn(watching.run(over.clone()));
        let (tail, tail_reader) = tail::of(self.stream(job));
        tasks.spawn(tail_reader.run(over.clone()));
        let chain = Chain::new(job.history.clone(), held.iter().map(|held| held.mark))?;
        let mut senders = BTreeMap::new();
        let mut workers = JoinSet::new();
        let count = held.len();
        let mut marks = Vec::new();
        // Who has stored it all before listens to nobody, and a reader that meets one who does not would end.
        for held in held.into_iter().filter(|held| held.mark.position < job.target) {
            let (sender, chunks) = mpsc::channel::<Chunk>(self.config.apply.queue_chunks_max);
            senders.insert(held.partition, sender);
            let (folding, mark) = self.folding(job, held, count);
            marks.push(mark);
            workers.spawn(folding.run(chunks));
        }
        tasks.spawn(follow(marks, self.progress.clone()));
        let room = self.config.rebuild.queue_bytes_max;
        let reader = self.reader(job, chain, (tail, senders), (stalled_seen, begins_seen), room);
        let mut reader = tokio::spawn(reader.run(over.clone()));
        let mut reading = true;
        loop {
            tokio::select! {
                biased;
                done = workers.join_next() => match done {
                    Some(done) => done??,
                    None => break,
                },
                // Those who have heard enough end first; a reader whom nobody hears is done.
                ended = &mut reader, if reading => match ended? {
                    Ended::Stopped => reading = false,
                    Ended::Broken(broken) => return Err(broken.into()),
                },
            }
        }
        reader.abort();
        self.progress.set(job.target.get());
        Ok(())
    }

    /// Whoever held the partitions before can store nothing more.
    async fn take(&self, job: &Job) -> Result<Vec<Held>, RebuildError> {
        let all = (0..job.definition.partition_count().get()).collect();
        let mut connection = self.pool.acquire().await?;
        let mut transaction = connection.begin().await?;
        let held = checkpoint::take(&mut transaction, &job.key, &all).await?;
        transaction.commit().await?;
        if held.len() == all.len() {
            Ok(held)
        } else {
            Err(RebuildError::Displaced(job.key.clone()))
        }
    }

    fn folding(
        &self,
        job: &Job,
        held: Held,
        partition_count: usize,
    ) -> (Folding, watch::Receiver<Position>) {
        let (reached, mark) = watch::channel(held.mark.position);
        let limits = self.config.rebuild;
        let folding = Folding {
            key: job.key.clone(),
            definition: job.definition.clone(),
            held,
            pool: self.pool.clone(),
            config: limits,
            states_bytes_max: limits.states_bytes_max / partition_count,
            // Less than all have room for, so that nobody waits for events that have no place.
            batch_bytes_max: limits.queue_bytes_max as usize / (2 * partition_count),
            parked_aggregates_max: self
                .config
                .apply_to(job.key.projection.as_str())
                .parked_aggregates_max,
            target: job.target,
            reached,
        };
        (folding, mark)
    }

    fn stream(&self, job: &Job) -> Stream {
        let bytes_max = self.config.nats.pull_bytes_max;
        Stream {
            context: jetstream::new(self.client.clone()),
            name: stream_name(job.history.current()),
            bounds: Bounds { batch: PULL_EVENTS_MAX, bytes_max },
        }
    }

    fn reader(
        &self,
        job: &Job,
        chain: Chain,
        (tail, partitions): (Tail, BTreeMap<u16, mpsc::Sender<Chunk>>),
        (stalled, begins): (watch::Receiver<bool>, watch::Receiver<Position>),
        room: u32,
    ) -> Reader {
        let apply = &self.config.apply;
        let limits = &self.config.primary_log;
        Reader {
            key: job.key.clone(),
            definition: job.definition.clone(),
            partitions,
            tail,
            log: self.log.clone(),
            page_events_max: limits.page_events_max,
            // Whoever rebuilds wants all of it, wherever it is to be had.
            bridge_events_max: u64::MAX,
            queue_bytes_max: room,
            room: Arc::new(Semaphore::new(room as usize)),
            begins,
            chain,
            stalled,
            poll_interval: limits.poll_interval.get(),
            status: self.status.clone(),
            health: Health::default(),
            telemetry: Arc::clone(&self.telemetry),
            backoff: Backoff::new(apply.retry_pause_min, apply.retry_pause_max),
            troubled: false,
        }
    }
}

/// Shows how far the last of the partitions is, until they have all ended.
async fn follow(mut marks: Vec<watch::Receiver<Position>>, progress: super::progress::Progress) {
    loop {
        let reached = marks.iter().map(|mark| *mark.borrow()).min().unwrap_or_default();
        progress.set(reached.get());
        marks.sort_by_key(|mark| *mark.borrow());
        let slowest = marks.first_mut();
        let Some(slowest) = slowest else { return };
        if slowest.changed().await.is_err() {
            return;
        }
    }
}
