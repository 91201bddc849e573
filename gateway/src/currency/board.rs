//! The watermarks of one projection, and who waits for them.

use std::time::Duration;

use consistency::{Announcement, IdleProof, LogPosition, Pace, Position, watermark};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    turns::{Release, Turn},
    waiters::{WaiterKey, Waiters},
};

/// Which partitions matter to a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Partitions {
    /// The one of a row's aggregate.
    One(u16),
    /// All.
    All,
}

/// What memory knows of a projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Standing {
    /// The version that is read; `None` before the first snapshot.
    pub version: Option<u32>,
    /// The smallest watermark of the partitions that matter.
    pub watermark: Option<LogPosition>,
}

/// Checkpoints of one snapshot.
#[derive(Debug, Clone)]
pub struct Observation {
    /// [`super::Currency::moment`] before the snapshot was taken.
    pub moment: u64,
    /// The active version.
    pub version: u32,
    /// How many partitions it has.
    pub partition_count: u16,
    /// Partitions and their checkpoints.
    pub checkpoints: Vec<(u16, Option<LogPosition>)>,
}

#[derive(Debug)]
pub(super) struct Board {
    /// What the moments of `pace` count from.
    began: Instant,
    version: Option<u32>,
    marks: Vec<Mark>,
    waiters: Waiters,
    /// Counts announcements, so that an older snapshot is told from a newer one.
    moment: u64,
    pace: Pace,
}

#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    checkpoint: Option<LogPosition>,
    proof: Option<IdleProof>,
    changed: u64,
    heard_at: Option<Instant>,
}

impl Mark {
    fn reached(&self) -> Option<LogPosition> {
        watermark(self.checkpoint, self.proof)
    }
}

impl Board {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            began: now,
            version: None,
            marks: Vec::new(),
            waiters: Waiters::default(),
            moment: 0,
            pace: Pace::default(),
        }
    }

    pub(super) fn standing(&self, partitions: Partitions) -> Standing {
        Standing { version: self.version, watermark: self.reached(partitions) }
    }

    pub(super) fn catch_up_ms(
        &self,
        partitions: Partitions,
        to: LogPosition,
        now: Instant,
    ) -> Option<u32> {
        let backlog = to.position.since(self.reached(partitions)?.position);
        self.pace.catch_up_ms(now - self.began, waited_for(partitions), backlog)
    }

    pub(super) fn worth_waiting_ms(
        &self,
        partitions: Partitions,
        to: LogPosition,
        trip_ms: u32,
        now: Instant,
    ) -> u32 {
        let reached = self.reached(partitions).map_or(Position::ZERO, |mark| mark.position);
        let backlog = to.position.since(reached);
        self.pace.worth_waiting_ms(now - self.began, waited_for(partitions), backlog, trip_ms)
    }

    /// A read that needs `at` was found to come too soon.
    pub(super) fn asked(&mut self, partitions: Partitions, at: LogPosition, now: Instant) {
        if self.reached(partitions).is_none_or(|reached| reached < at) {
            self.pace.asked(now - self.began, waited_for(partitions), at);
        }
    }

    pub(super) fn moment(&self) -> u64 {
        self.moment
    }

    pub(super) fn waiter_count(&self) -> usize {
        self.waiters.count()
    }

    /// How long the most silent partition has been: each may be announced by another process.
    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        let heard = self.marks.iter().map(|mark| mark.heard_at).min().flatten();
        heard.map_or(Duration::MAX, |heard| now.duration_since(heard))
    }

    pub(super) fn heard(&mut self, said: &Announcement, now: Instant) -> Vec<Release> {
        // What another version did says nothing about the tables that are read.
        if self.version != Some(said.version) || !said.is_coherent() {
            return Vec::new();
        }
        let Some(mark) = self.marks.get_mut(usize::from(said.partition)) else {
            return Vec::new();
        };
        self.moment += 1;
        mark.heard_at = Some(now);
        let proof = said.proof();
        mark.changed = self.moment;
        mark.checkpoint = mark.checkpoint.max(Some(proof.stored));
        if mark.proof.is_none_or(|known| known.proven < proof.proven) {
            mark.proof = Some(proof);
        }
        self.pace.advanced(now - self.began, said.to);
        self.release(said.partition, now)
    }

    pub(super) fn observed(&mut self, seen: &Observation, now: Instant) -> Vec<Release> {
        if self.version != Some(seen.version) {
            let count = usize::from(seen.partition_count);
            self.version = Some(seen.version);
            self.marks = vec![Mark::default(); count];
            self.moment += 1;
            self.pace.changed_tables();
        }
        let mut released = Vec::new();
        for (partition, checkpoint) in &seen.checkpoints {
            let Some(mark) = self.marks.get_mut(usize::from(*partition)) else { continue };
            // A snapshot may show less than is known: when it is older than what was heard since, or
            // when the database went back. Only the second is news.
            let is_newer = mark.changed <= seen.moment;
            mark.checkpoint = if is_newer { *checkpoint } else { mark.checkpoint.max(*checkpoint) };
            if let Some(reached) = mark.reached() {
                self.pace.advanced(now - self.began, reached.position);
            }
            released.extend(self.release(*partition, now));
        }
        released
    }

    pub(super) fn watermark(
        &self,
        version: u32,
        partition: u16,
        checkpoint: Option<LogPosition>,
    ) -> Option<LogPosition> {
        let mark = self.marks.get(usize::from(partition));
        let proof = mark.filter(|_| self.version == Some(version)).and_then(|mark| mark.proof);
        watermark(checkpoint, proof)
    }

    pub(super) fn register(
        &mut self,
        partitions: Partitions,
        at: LogPosition,
    ) -> Option<(WaiterKey, oneshot::Receiver<Turn>)> {
        if self.reached(partitions).is_some_and(|reached| at <= reached) {
            return None;
        }
        Some(self.waiters.add(waited_for(partitions), at))
    }

    /// `false` when it was released already.
    pub(super) fn leave(&mut self, partitions: Partitions, key: WaiterKey) -> bool {
        self.waiters.remove(waited_for(partitions), key)
    }

    pub(super) fn give_up(&mut self) {
        self.waiters.give_up();
    }

    fn reached(&self, partitions: Partitions) -> Option<LogPosition> {
        match partitions {
            Partitions::One(partition) => self.marks.get(usize::from(partition))?.reached(),
            Partitions::All => self.marks.iter().map(Mark::reached).min().flatten(),
        }
    }

    fn release(&mut self, partition: u16, now: Instant) -> Vec<Release> {
        let one = self.reached(Partitions::One(partition));
        let all = self.reached(Partitions::All);
        for (whose, mark) in [(Some(partition), one), (None, all)] {
            if let Some(mark) = mark {
                self.pace.reached(now - self.began, whose, mark);
            }
        }
        let released = one.map(|mark| self.waiters.release(Some(partition), mark));
        let released_all = all.map(|mark| self.waiters.release(None, mark));
        released
            .into_iter()
            .chain(released_all)
            .flat_map(std::collections::BTreeMap::into_values)
            .collect()
    }
}

fn waited_for(partitions: Partitions) -> Option<u16> {
    match partitions {
        Partitions::One(partition) => Some(partition),
        Partitions::All => None,
    }
}
