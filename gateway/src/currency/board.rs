//! The watermarks of one projection, and who waits for them.

use std::time::Duration;

use consistency::{Announcement, IdleProof, LogPosition, watermark};
use tokio::{sync::oneshot, time::Instant};

use crate::{
    pace::Pace,
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

#[derive(Debug, Default)]
pub(super) struct Board {
    version: Option<u32>,
    marks: Vec<Mark>,
    waiters: Waiters,
    /// Counts announcements, so that an older snapshot is told from a newer one.
    moment: u64,
    heard_at: Option<Instant>,
    pace: Pace,
}

#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    checkpoint: Option<LogPosition>,
    proof: Option<IdleProof>,
    changed: u64,
}

impl Mark {
    fn reached(&self) -> Option<LogPosition> {
        watermark(self.checkpoint, self.proof)
    }
}

impl Board {
    pub(super) fn standing(&self, partitions: Partitions) -> Standing {
        Standing { version: self.version, watermark: self.reached(partitions) }
    }

    pub(super) fn catch_up_ms(&self, partitions: Partitions, to: LogPosition) -> Option<u32> {
        let reached = self.reached(partitions)?;
        self.pace.catch_up_ms(to.position.since(reached.position))
    }

    pub(super) fn moment(&self) -> u64 {
        self.moment
    }

    pub(super) fn waiter_count(&self) -> usize {
        self.waiters.count()
    }

    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        self.heard_at.map_or(Duration::MAX, |heard| now.duration_since(heard))
    }

    pub(super) fn waited(&mut self, ms: u32, satisfied: bool) {
        self.pace.waited(ms, satisfied);
    }

    pub(super) fn heard(&mut self, said: &Announcement, now: Instant) -> Vec<oneshot::Sender<()>> {
        // What another version did says nothing about the tables that are read.
        if self.version != Some(said.version) || !said.is_coherent() {
            return Vec::new();
        }
        let Some(mark) = self.marks.get_mut(usize::from(said.partition)) else {
            return Vec::new();
        };
        self.moment += 1;
        self.heard_at = Some(now);
        let proof = said.proof();
        mark.changed = self.moment;
        mark.checkpoint = mark.checkpoint.max(Some(proof.stored));
        if mark.proof.is_none_or(|known| known.proven < proof.proven) {
            mark.proof = Some(proof);
        }
        self.pace.advanced(now, said.to, said.head);
        self.release(said.partition)
    }

    pub(super) fn observed(
        &mut self,
        seen: &Observation,
        now: Instant,
    ) -> Vec<oneshot::Sender<()>> {
        if self.version != Some(seen.version) {
            let count = usize::from(seen.partition_count);
            self.version = Some(seen.version);
            self.marks = vec![Mark::default(); count];
            self.moment += 1;
        }
        let mut released = Vec::new();
        for (partition, checkpoint) in &seen.checkpoints {
            let Some(mark) = self.marks.get_mut(usize::from(*partition)) else { continue };
            // A snapshot may show less than is known: when it is older than what was heard since, or
            // when the database went back. Only the second is news.
            let is_newer = mark.changed <= seen.moment;
            mark.checkpoint = if is_newer { *checkpoint } else { mark.checkpoint.max(*checkpoint) };
            if let Some(reached) = mark.reached() {
                self.pace.advanced(now, reached.position, reached.position.next());
            }
            released.extend(self.release(*partition));
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
    ) -> Option<(WaiterKey, oneshot::Receiver<()>)> {
        if self.reached(partitions).is_some_and(|reached| at <= reached) {
            return None;
        }
        Some(self.waiters.add(waited_for(partitions), at))
    }

    pub(super) fn leave(&mut self, partitions: Partitions, key: WaiterKey) {
        self.waiters.remove(waited_for(partitions), key);
    }

    fn reached(&self, partitions: Partitions) -> Option<LogPosition> {
        match partitions {
            Partitions::One(partition) => self.marks.get(usize::from(partition))?.reached(),
            Partitions::All => self.marks.iter().map(Mark::reached).min().flatten(),
        }
    }

    fn release(&mut self, partition: u16) -> Vec<oneshot::Sender<()>> {
        let one = self.reached(Partitions::One(partition));
        let all = self.reached(Partitions::All);
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
