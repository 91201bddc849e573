//! What this region has applied, as far as this process knows: the watermarks of every projection,
//! and the reads that wait for them.
//!
//! Nothing here is proof. It chooses what to do with a read; what leaves is judged again by the
//! checkpoints that were read with the rows.

mod board;
mod head;

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use consistency::{Announcement, LogPosition, Name};
use tokio::{sync::watch, time::Instant};

pub use board::{Observation, Partitions, Standing};

use self::{board::Board, head::Head};
use crate::{
    turns::{Turn, Turns},
    waiters::WaiterKey,
};

/// The currency of a region.
#[derive(Debug)]
pub struct Currency {
    boards: BTreeMap<Name, Mutex<Board>>,
    head: Head,
    waiter_count: AtomicUsize,
    /// How many of them each caller has who is known by a name. Nobody who has none is in it.
    callers: Mutex<HashMap<Arc<str>, usize>>,
    bounds: WaiterBounds,
    turns: Turns,
    draining: AtomicBool,
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

/// How many may wait, and go on.
#[derive(Debug, Clone, Copy)]
pub struct WaiterBounds {
    /// Reads that wait at once.
    pub waiters_max: usize,
    /// Of them those of one caller who is known by a name.
    pub per_caller_max: usize,
    /// Released reads that go on at once.
    pub released_max: usize,
}

/// Why a read may not wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WaitRefused {
    /// As many reads wait as may.
    #[error("as many reads wait as may")]
    Full,
    /// As many reads of this caller wait as may.
    #[error("as many reads of one caller wait as may")]
    CallerFull,
}

/// When a wait ends at the latest.
#[derive(Debug, Clone, Copy)]
pub struct WaitBounds {
    /// While the watermark is not there.
    pub reached: Instant,
    /// For one that was released, until it goes on without a turn.
    pub turn: Instant,
}

impl WaitBounds {
    /// Whoever stands in line leaves it while there is time for one more look at the database.
    pub fn new(reached: Instant, deadline: Instant, query_timeout: Duration) -> Self {
        let turn = deadline.checked_sub(query_timeout);
        Self { reached, turn: turn.map_or(reached, |turn| turn.max(reached)) }
    }
}

/// How a wait ended.
#[derive(Debug)]
pub enum Waited {
    /// The watermark is there. Who was released among many holds its turn until it is done; who came
    /// when it was there already has none.
    Satisfied(Option<Turn>),
    /// The time is over, or the process is ending.
    TimedOut,
}

impl Currency {
    /// Knows nothing yet of these projections.
    pub fn new(projections: impl IntoIterator<Item = Name>, bounds: WaiterBounds) -> Self {
        let now = Instant::now();
        let boards =
            projections.into_iter().map(|name| (name, Mutex::new(Board::new(now)))).collect();
        Self {
            boards,
            head: Head::new(),
            waiter_count: AtomicUsize::new(0),
            callers: Mutex::default(),
            bounds,
            turns: Turns::new(bounds.released_max),
            draining: AtomicBool::new(false),
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
        self.head.get()
    }

    /// Somebody who must know has seen the log at `at`.
    pub fn saw_head(&self, at: LogPosition) {
        if self.head.raise(at) {
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
            self.turns.release(released);
            self.tell();
        }
    }

    /// A snapshot of the database showed these checkpoints.
    pub fn observed(&self, projection: &Name, seen: &Observation, now: Instant) {
        let (released, moved) = self.with(projection, |board| {
            // Only worth finding out for somebody who listens. Whoever begins to do so later looks at the board
            // after this, and finds it as it is then.
            let is_heard = 0 < self.changes.receiver_count();
            let standing = |board: &Board| is_heard.then(|| board.standing(Partitions::All));
            let before = standing(board);
            let released = board.observed(seen, now);
            (released, before != standing(board))
        });
        self.turns.release(released);
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

    /// Waits until the partitions that matter have reached `at`, within its bounds. Check and
    /// registration are one step; whoever drops this leaves at once.
    pub async fn wait(
        &self,
        projection: &Name,
        partitions: Partitions,
        at: LogPosition,
        bounds: WaitBounds,
        caller: Option<&str>,
    ) -> Result<Waited, WaitRefused> {
        let registered = self.with(projection, |board| board.register(partitions, at));
        let Some((key, mut released)) = registered else { return Ok(Waited::Satisfied(None)) };
        // Leaves the set when it is dropped, on every way out of here.
        let mut waiter = Waiter::new(self, projection, partitions, key, caller)?;
        if self.draining.load(Ordering::SeqCst) {
            return Ok(Waited::TimedOut);
        }
        let turn = tokio::select! {
            biased;
            // Both at once counts as satisfied.
            turn = &mut released => turn,
            () = tokio::time::sleep_until(bounds.reached) => {
                if waiter.leave() {
                    return Ok(Waited::TimedOut);
                }
                // It is here, and who went on now would stand in a longer line: thousands may be in this.
                match tokio::time::timeout_at(bounds.turn, released).await {
                    Ok(turn) => turn,
                    Err(_) => return Ok(Waited::Satisfied(None)),
                }
            }
        };
        Ok(turn.map_or(Waited::TimedOut, |turn| Waited::Satisfied(Some(turn))))
    }

    /// Ends all waits, and those that begin from now on, as if their time were over.
    pub fn drain(&self) {
        // Before the sets are emptied: who registers after that sees it.
        self.draining.store(true, Ordering::SeqCst);
        self.boards.keys().for_each(|name| self.with(name, Board::give_up));
    }

    fn with<T>(&self, projection: &Name, act: impl FnOnce(&mut Board) -> T) -> T {
        let board = self.boards.get(projection).expect("views name projections of the domain");
        act(&mut board.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

struct Waiter<'a> {
    currency: &'a Currency,
    projection: &'a Name,
    partitions: Partitions,
    key: WaiterKey,
    caller: Option<Arc<str>>,
}

impl<'a> Waiter<'a> {
    fn new(
        currency: &'a Currency,
        projection: &'a Name,
        partitions: Partitions,
        key: WaiterKey,
        caller: Option<&str>,
    ) -> Result<Self, WaitRefused> {
        let before = currency.waiter_count.fetch_add(1, Ordering::Relaxed);
        let mut waiter = Self { currency, projection, partitions, key, caller: None };
        if currency.bounds.waiters_max <= before {
            return Err(WaitRefused::Full);
        }
        if let Some(name) = caller {
            waiter.caller = Some(currency.admit(name)?);
        }
        Ok(waiter)
    }

    /// `false` when it was released already.
    fn leave(&mut self) -> bool {
        self.currency.with(self.projection, |board| board.leave(self.partitions, self.key))
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.leave();
        self.currency.waiter_count.fetch_sub(1, Ordering::Relaxed);
        if let Some(caller) = &self.caller {
            self.currency.dismiss(caller);
        }
    }
}

impl Currency {
    fn admit(&self, name: &str) -> Result<Arc<str>, WaitRefused> {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((known, _)) = callers.get_key_value(name) {
            let known = Arc::clone(known);
            let count = callers.entry(Arc::clone(&known)).or_default();
            if self.bounds.per_caller_max <= *count {
                return Err(WaitRefused::CallerFull);
            }
            *count += 1;
            return Ok(known);
        }
        let name: Arc<str> = name.into();
        callers.insert(Arc::clone(&name), 1);
        Ok(name)
    }

    fn dismiss(&self, name: &str) {
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = callers.get_mut(name) {
            *count -= 1;
            if *count == 0 {
                callers.remove(name);
            }
        }
    }
}

#[cfg(test)]
mod tests;
