//! When a row that is kept in memory may be shown: the scheme, without the rows.
//!
//! A [`Coherence`] stands for one partition of one version of a projection in one epoch. It knows the
//! end of the unbroken *chain* of announcements, a *floor*, and for every row the last position at
//! which the row may have changed, in a fixed array of *slots* that rows share by their hash. An entry
//! that was read at checkpoint R shows the row as it is at P when the chain has reached P and neither
//! the row's slot nor the floor is above R: then no event of `(R, P]` touched the row.
//!
//! Nothing is ever removed and nobody locks. That is sound only because of two orders: a writer
//! raises floor, slots, chain; a reader loads the chain before slot and floor. So a reader who sees a
//! chain also sees every change that the chain has passed. Values only rise, therefore several
//! writers may run at once, and an old entry that is inserted after its invalidation is harmless.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::{AggregateKey, Announcement, Epoch, LogPosition, Position};

/// What one [`Coherence`] speaks of. Announcements of anything else say nothing about its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CoherenceScope {
    /// The epoch that its positions count in.
    pub epoch: Epoch,
    /// The version of the projection.
    pub version: u32,
    /// The partition.
    pub partition: u16,
}

/// One store of a writer. What an announcement does is a sequence of these, so that a test can let a
/// reader in between any two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Raise {
    /// No entry read before this is usable.
    Floor(Position),
    /// No entry read before `position` of a row in `slot` is usable.
    Slot {
        /// Index of the slot.
        slot: usize,
        /// Where its rows may have changed.
        position: Position,
    },
    /// All changes up to this have been told.
    Chain(Position),
}

/// What is known of the changes of one partition's rows.
#[derive(Debug)]
pub struct Coherence {
    scope: CoherenceScope,
    chain: AtomicU64,
    floor: AtomicU64,
    slots: Box<[AtomicU64]>,
}

impl Coherence {
    /// Knows nothing yet: entries are usable by nobody who demands a position above zero.
    /// `slot_count` is raised to 1 at least; 8 bytes are kept for each.
    pub fn new(scope: CoherenceScope, slot_count: usize) -> Self {
        let slots = (0..slot_count.max(1)).map(|_| AtomicU64::new(0)).collect();
        Self { scope, chain: AtomicU64::new(0), floor: AtomicU64::new(0), slots }
    }

    /// What it speaks of.
    pub fn scope(&self) -> CoherenceScope {
        self.scope
    }

    /// Whether an entry for the row of `key`, read at the stored checkpoint `read_at`, shows the row as
    /// it is at `demand` or later.
    pub fn is_usable(&self, key: &AggregateKey, read_at: LogPosition, demand: LogPosition) -> bool {
        let chain = self.chain();
        self.is_usable_after(chain, key, read_at, demand)
    }

    /// The second half of [`Self::is_usable`]: judges by a chain that was loaded before.
    pub fn is_usable_after(
        &self,
        chain: Position,
        key: &AggregateKey,
        read_at: LogPosition,
        demand: LogPosition,
    ) -> bool {
        let asks_for_nothing =
            demand.position == Position::ZERO && demand.epoch <= self.scope.epoch;
        let reached =
            asks_for_nothing || demand.epoch == self.scope.epoch && demand.position <= chain;
        reached
            && read_at.epoch == self.scope.epoch
            && self.slot(self.slot_of(key.hint())) <= read_at.position
            && self.floor() <= read_at.position
    }

    /// Takes an announcement in. `false` when it speaks of something else, or of nothing that makes
    /// sense, and was passed over.
    pub fn hear(&self, announcement: &Announcement) -> bool {
        match self.raises(announcement) {
            None => false,
            Some(raises) => {
                raises.into_iter().for_each(|raise| self.raise(raise));
                true
            }
        }
    }

    /// Learned by other means than the next announcement that the partition stands at `position`: at
    /// the start, after a reconnect, from a poll of the checkpoints.
    pub fn jump(&self, position: Position) {
        self.jump_raises(position).into_iter().for_each(|raise| self.raise(raise));
    }

    /// The stores of [`Self::hear`], in their order; `None` when it would pass the announcement over.
    ///
    /// An announcement that does not join the chain leaves changes untold between the two, so it
    /// moves the floor with the chain. One that lies behind the chain still names its keys: an
    /// operator's retry changes rows without moving the checkpoint.
    pub fn raises(&self, announcement: &Announcement) -> Option<Vec<Raise>> {
        let Announcement { from, to, .. } = *announcement;
        if !self.speaks_of(announcement) || to < from {
            return None;
        }
        let joins = from <= self.chain();
        Some(match &announcement.keys {
            Some(keys) if joins => {
                let slots = keys.iter().map(|hint| self.slot_of(*hint));
                slots
                    .map(|slot| Raise::Slot { slot, position: to })
                    .chain([Raise::Chain(to)])
                    .collect()
            }
            Some(_) | None => vec![Raise::Floor(to), Raise::Chain(to)],
        })
    }

    /// The stores of [`Self::jump`], in their order. Nothing when the chain is there already: what was
    /// announced up to there has been told.
    pub fn jump_raises(&self, position: Position) -> Vec<Raise> {
        if position <= self.chain() {
            return Vec::new();
        }
        vec![Raise::Floor(position), Raise::Chain(position)]
    }

    /// Does one store.
    ///
    /// Each is a read-modify-write with release order. A reader that acquires the chain therefore
    /// sees what its writer raised before it, and what any earlier writer did, since a chain of
    /// read-modify-writes passes on the releases it has overwritten.
    pub fn raise(&self, raise: Raise) {
        let (cell, position) = match raise {
            Raise::Floor(position) => (&self.floor, position),
            Raise::Slot { slot, position } => (&self.slots[slot % self.slots.len()], position),
            Raise::Chain(position) => (&self.chain, position),
        };
        cell.fetch_max(position.get(), Ordering::AcqRel);
    }

    /// The end of the unbroken chain of announcements.
    pub fn chain(&self) -> Position {
        loaded(&self.chain)
    }

    /// No entry read before this is usable.
    pub fn floor(&self) -> Position {
        loaded(&self.floor)
    }

    /// The last position at which a row of the slot may have changed.
    pub fn slot(&self, slot: usize) -> Position {
        loaded(&self.slots[slot % self.slots.len()])
    }

    /// The slot of a key, by its [`AggregateKey::hint`].
    pub fn slot_of(&self, hint: u64) -> usize {
        // The remainder is below the length, which is a usize.
        (hint % self.slots.len() as u64) as usize
    }

    fn speaks_of(&self, announcement: &Announcement) -> bool {
        let Announcement { epoch, version, partition, .. } = *announcement;
        self.scope == CoherenceScope { epoch, version, partition }
    }
}

fn loaded(cell: &AtomicU64) -> Position {
    Position::new(cell.load(Ordering::Acquire)).expect("only positions are stored")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;
    use crate::Name;

    const SCOPE: CoherenceScope = CoherenceScope { epoch: Epoch::FIRST, version: 1, partition: 0 };

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    fn at(value: u64) -> LogPosition {
        LogPosition::new(Epoch::FIRST, position(value))
    }

    fn key(id: u8) -> AggregateKey {
        AggregateKey::from_bytes([id; 12])
    }

    fn announcement(from: u64, to: u64, keys: Option<&[u8]>) -> Announcement {
        Announcement {
            region: "eu-west".to_owned(),
            epoch: SCOPE.epoch,
            projection: Name::new("orders").unwrap(),
            version: SCOPE.version,
            partition: SCOPE.partition,
            from: position(from),
            to: position(to),
            stored: position(to),
            head: position(to),
            keys: keys.map(|keys| keys.iter().map(|id| key(*id).hint()).collect()),
        }
    }

    fn memory() -> Coherence {
        Coherence::new(SCOPE, 256)
    }

    #[test]
    fn an_entry_is_usable_up_to_the_chain_until_its_row_is_touched() {
        let memory = memory();
        assert!(!memory.is_usable(&key(1), at(0), at(1)), "nothing is known yet");
        assert!(memory.hear(&announcement(0, 5, Some(&[1]))));
        assert!(memory.is_usable(&key(1), at(5), at(5)));
        assert!(!memory.is_usable(&key(1), at(4), at(5)), "read before the row was touched");
        assert!(memory.is_usable(&key(2), at(0), at(5)), "its row was not touched");
        assert!(!memory.is_usable(&key(2), at(5), at(6)), "past the chain");
    }

    #[test]
    fn what_is_moved_by_anything_but_the_next_announcement_raises_the_floor() {
        let gap = memory();
        assert!(gap.hear(&announcement(3, 5, Some(&[1]))));
        assert!(!gap.is_usable(&key(2), at(4), at(5)));
        assert!(gap.is_usable(&key(2), at(5), at(5)));
        let polled = memory();
        polled.jump(position(5));
        assert!(!polled.is_usable(&key(2), at(4), at(5)));
        assert!(polled.is_usable(&key(2), at(5), at(5)));
        let crowded = memory();
        assert!(crowded.hear(&announcement(0, 5, None)));
        assert!(!crowded.is_usable(&key(2), at(4), at(5)), "too many keys to list");
    }

    #[test]
    fn a_change_behind_the_chain_is_still_taken_in() {
        let memory = memory();
        assert!(memory.hear(&announcement(0, 5, Some(&[]))));
        assert!(memory.is_usable(&key(1), at(4), at(5)));
        assert!(memory.hear(&announcement(5, 5, Some(&[1]))));
        assert!(!memory.is_usable(&key(1), at(4), at(5)));
        memory.jump(position(3));
        assert!(memory.is_usable(&key(2), at(1), at(5)), "a poll behind the chain changes nothing");
    }

    #[test]
    fn what_speaks_of_something_else_changes_nothing() {
        let memory = memory();
        let ours = || announcement(0, 5, Some(&[1]));
        let other_epoch = Announcement { epoch: Epoch::new(2).unwrap(), ..ours() };
        let other_version = Announcement { version: 2, ..ours() };
        let other_partition = Announcement { partition: 1, ..ours() };
        let backwards = Announcement { from: position(6), ..ours() };
        for strange in [other_epoch, other_version, other_partition, backwards] {
            assert!(!memory.hear(&strange));
        }
        assert_eq!((memory.chain(), memory.floor()), (Position::ZERO, Position::ZERO));
        memory.jump(position(9));
        let newer = LogPosition::new(Epoch::new(2).unwrap(), position(1));
        assert!(!memory.is_usable(&key(1), at(9), newer), "a demand of another epoch");
        assert!(!memory.is_usable(&key(1), newer, at(9)), "an entry of another epoch");
    }

    #[test]
    fn a_writer_raises_floor_then_slots_then_chain() {
        let memory = memory();
        let order = memory.raises(&announcement(0, 5, Some(&[1]))).unwrap();
        assert!(matches!(order[..], [Raise::Slot { .. }, Raise::Chain(_)]));
        assert!(matches!(memory.jump_raises(position(5))[..], [Raise::Floor(_), Raise::Chain(_)]));
    }

    /// The row changes at every position. The database's content is the checkpoint itself, so an entry
    /// read at R and used for P shows R, and every use with R < P is a lie.
    #[test]
    fn threads_that_read_while_others_announce_are_never_shown_the_past() {
        const LAST: u64 = 20_000;
        let memory = memory();
        let committed = AtomicU64::new(0);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        let mut usable_count = 0_u64;
                        let mut round = 0_u64;
                        while !done.load(Ordering::Acquire) || round < 100 {
                            let entry = committed.load(Ordering::Acquire);
                            let chain = memory.chain().get();
                            for demand in [chain, chain + 1, entry + 1] {
                                let usable = memory.is_usable(&key(1), at(entry), at(demand));
                                assert!(!usable || demand <= entry, "{entry} shown for {demand}");
                                usable_count += u64::from(usable);
                            }
                            round += 1;
                        }
                        usable_count
                    })
                })
                .collect();
            for to in 1..=LAST {
                committed.store(to, Ordering::Release);
                assert!(memory.hear(&announcement(to - 1, to, Some(&[1]))));
            }
            done.store(true, Ordering::Release);
            let used: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
            assert!(used > 0, "no reader ever found its entry usable");
        });
        assert_eq!(memory.chain(), position(LAST));
    }
}
