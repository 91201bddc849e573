//! What this region has applied, as far as this process knows: the watermarks of every projection,
//! and the reads that wait for them.
//!
//! Nothing here is proof. It chooses what to do with a read; what leaves is judged again by the
//! checkpoints that were read with the rows.

mod board;

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use consistency::{Announcement, LogPosition, Name};
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};

pub use board::{Observation, Partitions, Standing};

use self::board::Board;
use crate::waiters::WaiterKey;

/// The currency of a region.
#[derive(Debug)]
pub struct Currency {
    boards: BTreeMap<Name, Mutex<Board>>,
    head: Mutex<LogPosition>,
    waiter_count: AtomicUsize,
    waiters_max: usize,
    changes: watch::Sender<()>,
    expecting_count: Arc<AtomicUsize>,
}

/// Held by one who waits for the region to catch up without being among its waiters.
#[derive(Debug)]
pub struct Expecting(Arc<AtomicUsize>);

impl Drop for Expecting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// As many reads wait as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitersFull;

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Waited {
    /// The watermark is there.
    Satisfied,
    /// The time is over.
    TimedOut,
}

impl Currency {
    /// Knows nothing yet of these projections.
    pub fn new(projections: impl IntoIterator<Item = Name>, waiters_max: usize) -> Self {
        let now = Instant::now();
        let boards =
            projections.into_iter().map(|name| (name, Mutex::new(Board::new(now)))).collect();
        Self {
            boards,
            head: Mutex::new(LogPosition::ORIGIN),
            waiter_count: AtomicUsize::new(0),
            waiters_max,
            changes: watch::Sender::new(()),
            expecting_count: Arc::default(),
        }
    }

    /// The names of the projections.
    pub fn projections(&self) -> impl Iterator<Item = &Name> {
        self.boards.keys()
    }

    /// The largest position that the log is known to have reached.
    pub fn head(&self) -> LogPosition {
        *self.head.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody who must know has seen the log at `at`.
    pub fn saw_head(&self, at: LogPosition) {
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = *head < at;
        *head = (*head).max(at);
        drop(head);
        if is_news {
            self.tell();
        }
    }

    /// Tells of every change from now on.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }

    /// There may be something new for those who listen.
    pub fn tell(&self) {
        // Nearly always nobody does, and this is called for nearly every read.
        if 0 < self.changes.receiver_count() {
            self.changes.send_replace(());
        }
    }

    /// While this is held checkpoints are polled when hints are silent.
    pub fn expecting(&self) -> Expecting {
        self.expecting_count.fetch_add(1, Ordering::Relaxed);
        Expecting(Arc::clone(&self.expecting_count))
    }

    /// What is known of the partitions that matter to a read.
    pub fn standing(&self, projection: &Name, partitions: Partitions) -> Standing {
        self.with(projection, |board| board.standing(partitions))
    }

    /// How long until `to` is reached, in milliseconds, if that can be told.
    pub fn catch_up_ms(
        &self,
        projection: &Name,
        partitions: Partitions,
        to: LogPosition,
    ) -> Option<u32> {
        self.with(projection, |board| board.catch_up_ms(partitions, to, Instant::now()))
    }

    /// How long a read of `to` does best to wait before a trip to the primary.
    pub fn worth_waiting_ms(
        &self,
        projection: &Name,
        partitions: Partitions,
        to: LogPosition,
        trip_ms: u32,
    ) -> u32 {
        let now = Instant::now();
        self.with(projection, |board| board.worth_waiting_ms(partitions, to, trip_ms, now))
    }

    /// A read of `at` was found to come too soon. How long it would have had to wait is learnt from, whatever
    /// becomes of it.
    pub fn asked(&self, projection: &Name, partitions: Partitions, at: LogPosition) {
        self.with(projection, |board| board.asked(partitions, at, Instant::now()));
    }

    /// A projector says that it moved on.
    pub fn heard(&self, said: &Announcement, now: Instant) {
        if self.boards.contains_key(&said.projection) && said.is_coherent() {
            self.saw_head(LogPosition::new(said.epoch, said.head));
            let released = self.with(&said.projection, |board| board.heard(said, now));
            wake(released);
            self.tell();
        }
    }

    /// A snapshot of the database showed these checkpoints.
    pub fn observed(&self, projection: &Name, seen: &Observation, now: Instant) {
        let is_heard = 0 < self.changes.receiver_count();
        let (released, moved) = self.with(projection, |board| {
            // Only worth finding out for somebody who listens.
            let standing = |board: &Board| is_heard.then(|| board.standing(Partitions::All));
            let before = standing(board);
            let released = board.observed(seen, now);
            (released, before != standing(board))
        });
        wake(released);
        if moved {
            self.tell();
        }
    }

    /// The watermark that a stored checkpoint of a snapshot amounts to, with what is proven beyond.
    pub fn watermark(
        &self,
        projection: &Name,
        version: u32,
        partition: u16,
        checkpoint: Option<LogPosition>,
    ) -> Option<LogPosition> {
        self.with(projection, |board| board.watermark(version, partition, checkpoint))
    }

    /// To be taken before a snapshot is, so that [`Self::observed`] can tell what it is older than.
    pub fn moment(&self, projection: &Name) -> u64 {
        self.with(projection, |board| board.moment())
    }

    /// Whether someone waits while hints of the projection are silent.
    pub fn wants_poll(&self, silence_max: Duration, now: Instant) -> bool {
        let expected = 0 < self.expecting_count.load(Ordering::Relaxed);
        self.boards.keys().any(|name| {
            self.with(name, |board| {
                (expected || 0 < board.waiter_count()) && silence_max < board.silent_for(now)
            })
        })
    }

    /// Whether nothing was heard of the projection for so long that memory may be behind.
    pub fn is_silent(&self, projection: &Name, silence_max: Duration, now: Instant) -> bool {
        self.with(projection, |board| silence_max < board.silent_for(now))
    }

    /// How many reads wait.
    pub fn waiter_count(&self) -> usize {
        self.waiter_count.load(Ordering::Relaxed)
    }

    /// Waits until the partitions that matter have reached `at`, or until `until`. Check and
    /// registration are one step; whoever drops this leaves at once.
    pub async fn wait(
        &self,
        projection: &Name,
        partitions: Partitions,
        at: LogPosition,
        until: Instant,
    ) -> Result<Waited, WaitersFull> {
        let registered = self.with(projection, |board| board.register(partitions, at));
        let Some((key, released)) = registered else { return Ok(Waited::Satisfied) };
        // Leaves the set when it is dropped, on every way out of here.
        let waiter = Waiter::new(self, projection, partitions, key)?;
        let waited = tokio::select! {
            biased;
            // Both at once counts as satisfied.
            released = released => if released.is_ok() { Waited::Satisfied } else { Waited::TimedOut },
            () = tokio::time::sleep_until(until) => Waited::TimedOut,
        };
        drop(waiter);
        Ok(waited)
    }

    fn with<T>(&self, projection: &Name, act: impl FnOnce(&mut Board) -> T) -> T {
        let board = self.boards.get(projection).expect("views name projections of the domain");
        act(&mut board.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Releases outside of the lock.
fn wake(released: Vec<oneshot::Sender<()>>) {
    for waiter in released {
        // Who hung up meanwhile does not miss it.
        let _ = waiter.send(());
    }
}

struct Waiter<'a> {
    currency: &'a Currency,
    projection: &'a Name,
    partitions: Partitions,
    key: WaiterKey,
}

impl<'a> Waiter<'a> {
    fn new(
        currency: &'a Currency,
        projection: &'a Name,
        partitions: Partitions,
        key: WaiterKey,
    ) -> Result<Self, WaitersFull> {
        let before = currency.waiter_count.fetch_add(1, Ordering::Relaxed);
        let waiter = Self { currency, projection, partitions, key };
        if before < currency.waiters_max { Ok(waiter) } else { Err(WaitersFull) }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.currency.with(self.projection, |board| board.leave(self.partitions, self.key));
        self.currency.waiter_count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
