//! Reads the region's stream in order and hands every partition its events.
//!
//! Nothing is handed on that does not join the chain. When the stream cannot tell what comes next (a
//! hole, an unreadable message, a mirror that is stalled), the primary's log is read over HTTP up to
//! there; until that succeeds no partition moves.

pub mod pull;
pub mod tail;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use consistency::{CommittedAt, Event, Position};
use projection::ProjectionDefinition;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::chain::{Broken, Chain, Link, Mark};
use crate::checkpoint::VersionKey;
use crate::health::{Health, Part, chain_of};
use crate::log::{LogClient, LogError};
use crate::retry::Backoff;
use crate::status::Status;
use crate::telemetry::{FetchReason, Telemetry};
use pull::{PullError, Read};
use tail::Tail;

/// A stretch of the log, unbroken from the chunk before it, as one partition sees it.
#[derive(Debug)]
pub struct Chunk {
    /// The partition's own events of the stretch, in order.
    pub events: Vec<Event>,
    /// The last event of the stretch, whosever it is.
    pub through: Mark,
    /// When that one was committed.
    pub committed_at: CommittedAt,
    /// The place that it takes among what is read and not applied; given back when it is dropped.
    pub room: Option<OwnedSemaphorePermit>,
}

/// Why reading ended.
#[derive(Debug)]
pub enum Ended {
    /// It was asked to, or nobody listens any more.
    Stopped,
    /// What is read is not the log that was applied.
    Broken(Broken),
}

/// Why reading paused; it starts again at the end of the chain.
#[derive(Debug, thiserror::Error)]
enum Paused {
    #[error("the stream cannot be read")]
    Stream(#[from] Arc<PullError>),
    #[error("the log cannot be read")]
    Log(#[from] LogError),
    #[error("the log has no events after position {0} that the stream has")]
    Short(Position),
    #[error(
        "{missing} events are missing in the stream, more than primary_log.bridge_events_max, {max}"
    )]
    TooFar { missing: u64, max: u64 },
    #[error("the chain is broken")]
    Broken(#[from] Broken),
    #[error("nobody listens")]
    Deaf,
}

/// What a reader reads, and for whom.
pub struct Reader {
    /// The version that it reads for.
    pub key: VersionKey,
    /// Events of other aggregate types only move the partitions on.
    pub definition: ProjectionDefinition,
    /// One sender for each partition that is held here. Events of the others are passed over.
    pub partitions: BTreeMap<u16, mpsc::Sender<Chunk>>,
    /// The stream of the chain's epoch.
    pub tail: Tail,
    /// The primary's log.
    pub log: LogClient,
    /// Events of one page.
    pub page_events_max: usize,
    /// Events that are read from the log at most because the stream has them no more.
    pub bridge_events_max: u64,
    /// Bytes of events that wait for all partitions together at most.
    pub queue_bytes_max: u32,
    /// What is left of those.
    pub room: Arc<Semaphore>,
    /// Where the stream begins.
    pub begins: watch::Receiver<Position>,
    /// What was read so far.
    pub chain: Chain,
    /// Whether the mirror is stalled.
    pub stalled: watch::Receiver<bool>,
    /// How often the log is asked for more while the mirror is stalled.
    pub poll_interval: Duration,
    /// Where what is known goes.
    pub status: Status,
    /// Where what is wrong goes.
    pub health: Health,
    /// What is counted.
    pub telemetry: Arc<Telemetry>,
    /// Pauses after an error.
    pub backoff: Backoff,
    /// Whether a trouble was reported that is not taken back yet.
    pub troubled: bool,
}

impl Reader {
    /// Reads until it is stopped or the chain breaks.
    pub async fn run(mut self, stop: CancellationToken) -> Ended {
        let mut intake = self.tail.intake();
        loop {
            let step = tokio::select! {
                biased;
                // No more intake once the end is near.
                () = stop.cancelled() => return Ended::Stopped,
                // What an epoch kept of its past is not on its stream.
                () = std::future::ready(()), if self.chain.end().position < self.chain.starts_after() => {
                    self.read_past_epochs().await
                }
                // A stalled mirror brings nothing, so the log is read instead until it moves again.
                () = stalled(&mut self.stalled) => {
                    intake.leave();
                    self.follow_log().await
                }
                // It has lost what comes next, and says nothing while nothing new happens.
                begins = begins_after(&mut self.begins, self.chain.end().position) => {
                    self.fetch(begins.previous(), FetchReason::Retention).await
                }
                read = intake.next(self.chain.end().position) => match read {
                    Ok(reads) => self.join(reads).await,
                    Err(error) => Err(error.into()),
                },
            };
            if let Some(head) = intake.head() {
                self.status.raise_head(self.chain.epoch(), head);
            }
            match step {
                Ok(()) => self.recovered(),
                Err(Paused::Broken(broken)) => return Ended::Broken(broken),
                Err(Paused::Deaf) => return Ended::Stopped,
                Err(
                    paused @ (Paused::Stream(_)
                    | Paused::Log(_)
                    | Paused::Short(_)
                    | Paused::TooFar { .. }),
                ) => {
                    intake.leave();
                    if stop.run_until_cancelled(self.pause(&paused)).await.is_none() {
                        return Ended::Stopped;
                    }
                }
            }
        }
    }

    fn recovered(&mut self) {
        if !std::mem::take(&mut self.troubled) {
            return;
        }
        self.backoff.reset();
        self.health.well(Part::Stream, &self.key);
        self.health.well(Part::Log, &self.key);
    }

    async fn pause(&mut self, paused: &Paused) {
        let part = match paused {
            Paused::Stream(_) => Part::Stream,
            Paused::Log(_)
            | Paused::Short(_)
            | Paused::TooFar { .. }
            | Paused::Broken(_)
            | Paused::Deaf => Part::Log,
        };
        self.troubled = true;
        self.health.unwell(part, &self.key, chain_of(paused));
        self.backoff.pause().await;
    }

    /// Joins what was read to the chain and hands it on, with what the log has for the holes.
    async fn join(&mut self, reads: Vec<Read>) -> Result<(), Paused> {
        let mut stretch = Stretch::default();
        let joined = self.join_each(&mut stretch, reads).await;
        // Also when it went no further: what has joined the chain is not read again.
        self.dispatch(&mut stretch).await?;
        joined
    }

    async fn join_each(&mut self, stretch: &mut Stretch, reads: Vec<Read>) -> Result<(), Paused> {
        for read in reads {
            match read {
                Read::Event(event) => match self.chain.join(&event)? {
                    Link::Next => self.add(stretch, event),
                    Link::Seen => {}
                    Link::Hole => {
                        self.dispatch(stretch).await?;
                        self.fetch(event.at.position.previous(), FetchReason::Hole).await?;
                        self.join_event(stretch, event)?;
                    }
                },
                Read::Unreadable { position, .. } if position <= self.chain.end().position => {}
                Read::Unreadable { position, reason } => {
                    tracing::warn!(%position, reason, "message of the stream is not an event");
                    self.dispatch(stretch).await?;
                    self.fetch(position, FetchReason::Unreadable).await?;
                }
            }
        }
        Ok(())
    }

    /// Joins an event that nothing may be missing before any more.
    fn join_event(&mut self, stretch: &mut Stretch, event: Arc<Event>) -> Result<(), Paused> {
        match self.chain.join(&event)? {
            Link::Next => self.add(stretch, event),
            Link::Seen => {}
            Link::Hole => return Err(Paused::Short(self.chain.end().position)),
        }
        Ok(())
    }

    /// Reads the log from the end of the chain up to `through`, and hands it on page by page.
    async fn fetch(&mut self, through: Position, reason: FetchReason) -> Result<(), Paused> {
        let (missing, max) = (through.since(self.chain.end().position), self.bridge_events_max);
        if max < missing {
            return Err(Paused::TooFar { missing, max });
        }
        while self.chain.end().position < through {
            let after = self.chain.end().position;
            let missing = usize::try_from(through.since(after)).unwrap_or(usize::MAX);
            if self.fetch_page(missing.min(self.page_events_max), reason).await? == 0 {
                return Err(Paused::Short(after));
            }
        }
        Ok(())
    }

    /// Hands on the next page of what earlier epochs left.
    async fn read_past_epochs(&mut self) -> Result<(), Paused> {
        let after = self.chain.end().position;
        let missing = self.chain.starts_after().since(after);
        let missing = usize::try_from(missing).unwrap_or(usize::MAX);
        match self.fetch_page(missing.min(self.page_events_max), FetchReason::PastEpoch).await? {
            0 => Err(Paused::Short(after)),
            _ => Ok(()),
        }
    }

    /// Hands on what the log has beyond the end of the chain, or waits a little when that is nothing.
    async fn follow_log(&mut self) -> Result<(), Paused> {
        if self.fetch_page(self.page_events_max, FetchReason::Stalled).await? == 0 {
            tokio::time::sleep(self.poll_interval).await;
        }
        Ok(())
    }

    /// Hands on at most `limit` events of the log, and says how many there were.
    async fn fetch_page(&mut self, limit: usize, reason: FetchReason) -> Result<u64, Paused> {
        let after = self.chain.end().position;
        let page = self.log.read(self.chain.epoch(), after, limit).await?;
        if let Some(head) = page.head.filter(|head| head.epoch == self.chain.epoch()) {
            self.status.raise_head(head.epoch, head.position);
        }
        let mut stretch = Stretch::default();
        let mut events = page.events.into_iter().map(Arc::new);
        let joined = events.try_for_each(|event| self.join_event(&mut stretch, event));
        let fetched = self.chain.end().position.since(after);
        if fetched > 0 {
            self.telemetry.fetched(reason, fetched);
            tracing::debug!(version = %self.key, %after, fetched, ?reason, "read from the log");
        }
        // As above, whatever became of the rest of the page.
        self.dispatch(&mut stretch).await?;
        joined.map(|()| fetched)
    }

    fn add(&self, stretch: &mut Stretch, event: Arc<Event>) {
        stretch.began.get_or_insert(event.committed_at);
        stretch.through = Some((Mark::of(&event), event.committed_at));
        let partition = self.definition.partition_of(&event.aggregate);
        if let Some(partition) = partition.filter(|own| self.partitions.contains_key(own)) {
            stretch.events.entry(partition).or_default().push(Arc::unwrap_or_clone(event));
        }
    }

    /// Every partition gets its share, an empty one too: having nothing up to here is what proves
    /// that it misses nothing.
    async fn dispatch(&mut self, stretch: &mut Stretch) -> Result<(), Paused> {
        let Some((through, committed_at)) = stretch.through.take() else { return Ok(()) };
        self.status.raise_head(self.chain.epoch(), through.position);
        let began = stretch.began.take().unwrap_or(committed_at);
        self.status.read(&self.key, began, through.position);
        for (partition, sender) in &self.partitions {
            let events = stretch.events.remove(partition).unwrap_or_default();
            let room = room_for(&self.room, &events, self.queue_bytes_max).await;
            let chunk = Chunk { events, through, committed_at, room };
            sender.send(chunk).await.map_err(|_| Paused::Deaf)?;
        }
        Ok(())
    }
}

/// Events that joined the chain and were not handed on yet.
#[derive(Default)]
struct Stretch {
    events: BTreeMap<u16, Vec<Event>>,
    /// When the first of them was committed.
    began: Option<CommittedAt>,
    through: Option<(Mark, CommittedAt)>,
}

/// Takes the place of these events, which wait until there is some. What is larger than all the place
/// there is waits until it has it for itself.
async fn room_for(
    room: &Arc<Semaphore>,
    events: &[Event],
    bytes_max: u32,
) -> Option<OwnedSemaphorePermit> {
    let bytes: usize = events.iter().map(bytes_of).sum();
    if bytes == 0 {
        return None;
    }
    let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(bytes_max);
    Some(Arc::clone(room).acquire_many_owned(bytes).await.expect("it is never closed"))
}

/// What an event takes of memory, nearly.
pub fn bytes_of(event: &Event) -> usize {
    std::mem::size_of::<Event>() + event.aggregate.id().len() + event.data.len()
}

/// Waits until the stream begins after the event that comes next.
async fn begins_after(begins: &mut watch::Receiver<Position>, end: Position) -> Position {
    let found = begins.wait_for(|begins| end.next() < *begins).await.map(|begins| *begins);
    match found {
        Ok(begins) => begins,
        // The watch is gone with the service.
        Err(_) => std::future::pending().await,
    }
}

/// Waits until the mirror is stalled.
async fn stalled(stalled: &mut watch::Receiver<bool>) {
    if stalled.wait_for(|stalled| *stalled).await.is_err() {
        // The watch is gone with the service: nothing will stall any more.
        std::future::pending().await
    }
}
