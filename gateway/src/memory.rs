//! Rows that were read before, kept for as long as nothing is known to have changed them.
//!
//! What may be shown is judged by [`Coherence`], one for each partition: entries are never removed,
//! they stop being usable. So a hit costs no lock and no question, and an old read that arrives after
//! its row was changed is harmless. Only rows keyed by their aggregate are kept, and that there is
//! none; an answer with something parked in it is not.
//!
//! A [`Shelf`] is one version of a projection in one epoch. When the database shows another, a new
//! shelf takes its place, which knows nothing of what was kept on the old one.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use consistency::{
    AggregateId, AggregateKey, Announcement, Coherence, CoherenceScope, Demand, Epoch, LogPosition,
    Name, Position, Version,
};
use foldhash::fast::RandomState;
use http::HeaderValue;
use moka::sync::Cache;

use crate::currency::Observation;

/// What an entry weighs beside its body: its key, its place in the cache, its tag.
const OVERHEAD_BYTES: usize = 320;

/// Names a view among all that a projection feeds: a version of the projection, and the view's place
/// in it.
pub type ViewPlace = (u32, usize);

/// The rows that are kept.
#[derive(Debug)]
pub struct Memory {
    /// `None` when nothing is kept. Its keys are hashes already, so a quick hasher spreads them as well as any.
    entries: Option<Cache<EntryKey, Arc<Kept>, RandomState>>,
    shelves: BTreeMap<Name, ArcSwapOption<Shelf>>,
    slot_count: usize,
    generations: AtomicU64,
}

/// Names an entry among those of all shelves there ever were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct EntryKey {
    generation: u64,
    view: ViewPlace,
    aggregate: AggregateKey,
}

/// One version of a projection in one epoch: what is known of its partitions.
#[derive(Debug)]
pub struct Shelf {
    generation: u64,
    epoch: Epoch,
    version: u32,
    partitions: Box<[Partition]>,
}

#[derive(Debug)]
struct Partition {
    coherence: Coherence,
    /// Where the poll before found it.
    polled: AtomicU64,
}

/// An answer that is kept.
#[derive(Debug, PartialEq, Eq)]
pub struct Kept {
    /// The stored checkpoint that it was read at.
    pub read_at: LogPosition,
    /// The partition that the checkpoint is of.
    pub partition: u16,
    /// Whose row it is: keys in memory are short hashes.
    pub aggregate: AggregateId,
    /// The row; `None` when there was none.
    pub row: Option<KeptRow>,
}

/// A row, ready to be sent.
#[derive(Debug, PartialEq, Eq)]
pub struct KeptRow {
    /// The aggregate's version.
    pub version: Version,
    /// The aggregate's newest event.
    pub at: LogPosition,
    /// The body of an answer.
    pub body: Bytes,
    /// Its tag.
    pub tag: HeaderValue,
}

/// What memory says to a read.
#[derive(Debug, PartialEq, Eq)]
pub enum Recalled {
    /// The answer.
    Hit(Arc<Kept>),
    /// There is an entry, and it may have changed since or is not known to have reached the demand.
    Stale,
    /// There is no entry.
    Miss,
    /// Nothing is kept here.
    Off,
}

/// How a checkpoint came to be known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A read of rows saw it.
    Read,
    /// All checkpoints were read.
    Poll,
}

impl Memory {
    /// For these projections. At most about `bytes_max` bytes are kept, none when it is zero.
    /// `slot_count` is for each partition, as of [`Coherence::new`].
    pub fn new(
        projections: impl IntoIterator<Item = Name>,
        bytes_max: u64,
        slot_count: usize,
    ) -> Self {
        let entries = (0 < bytes_max).then(|| {
            let weigh = |_: &EntryKey, kept: &Arc<Kept>| {
                u32::try_from(kept.weight_bytes()).unwrap_or(u32::MAX)
            };
            let builder = Cache::builder().max_capacity(bytes_max).weigher(weigh);
            builder.build_with_hasher(RandomState::default())
        });
        let shelves = projections.into_iter().map(|name| (name, ArcSwapOption::empty())).collect();
        Self { entries, shelves, slot_count, generations: AtomicU64::new(0) }
    }

    /// What is known of a projection now. To be taken before rows are read that shall be kept.
    pub fn shelf(&self, projection: &Name) -> Option<Arc<Shelf>> {
        self.entries.as_ref()?;
        self.shelves.get(projection)?.load_full()
    }

    /// The answer to a read of `aggregate`'s row in the view at this place, when it is kept and may
    /// be shown to who demands this.
    pub fn recall(
        &self,
        projection: &Name,
        view: ViewPlace,
        aggregate: &AggregateId,
        demand: &Demand,
        key: AggregateKey,
    ) -> Recalled {
        let Some(entries) = &self.entries else { return Recalled::Off };
        let shelf = self.shelves.get(projection).map(ArcSwapOption::load);
        let Some(shelf) = shelf.as_deref().and_then(Option::as_deref) else {
            return Recalled::Miss;
        };
        let found = entries.get(&EntryKey { generation: shelf.generation, view, aggregate: key });
        match found.filter(|kept| kept.aggregate == *aggregate) {
            None => Recalled::Miss,
            Some(kept) if shelf.shows(&kept, &key, demand) => Recalled::Hit(kept),
            Some(_) => Recalled::Stale,
        }
    }

    /// Keeps what was read while `shelf` was the newest; `version` is the version of the projection
    /// whose tables it was read from. `false` when it belongs elsewhere or something newer is there.
    pub fn keep(&self, shelf: &Shelf, view: ViewPlace, version: u32, kept: Kept) -> bool {
        let Some(entries) = &self.entries else { return false };
        let belongs = version == shelf.version && kept.read_at.epoch == shelf.epoch;
        if !belongs || shelf.partitions.len() <= usize::from(kept.partition) {
            return false;
        }
        let aggregate = kept.aggregate.key();
        let key = EntryKey { generation: shelf.generation, view, aggregate };
        if entries.get(&key).is_some_and(|known| kept.read_at < known.read_at) {
            return false;
        }
        entries.insert(key, Arc::new(kept));
        true
    }

    /// Takes an announcement in. To be done before anybody is told that the region has moved on.
    pub fn hear(&self, said: &Announcement) {
        let Some(shelf) = self.shelf(&said.projection) else { return };
        let partition = shelf.partitions.get(usize::from(said.partition));
        if let Some(partition) = partition.filter(|_| said.is_coherent()) {
            partition.coherence.hear(said);
        }
    }

    /// A snapshot of the database showed these checkpoints. One of another version, or of a newer
    /// epoch, begins a new shelf.
    pub fn observed(&self, projection: &Name, seen: &Observation, source: Source) {
        let (Some(_), Some(shelf)) = (&self.entries, self.shelves.get(projection)) else { return };
        let epoch = seen.checkpoints.iter().filter_map(|(_, at)| *at).map(|at| at.epoch).max();
        let Some(epoch) = epoch else { return };
        let fits = |known: &Arc<Shelf>| known.version == seen.version && epoch <= known.epoch;
        let current = shelf.load_full().filter(fits).unwrap_or_else(|| {
            let made = Arc::new(self.fresh_shelf(seen, epoch));
            let replaced = |known: &Option<Arc<Shelf>>| {
                let known = known.as_ref().filter(|known| fits(known));
                Some(Arc::clone(known.unwrap_or(&made)))
            };
            // Somebody else's may have come first.
            let before = shelf.rcu(replaced);
            before.filter(fits).unwrap_or(made)
        });
        for (partition, at) in &seen.checkpoints {
            let partition = current.partitions.get(usize::from(*partition));
            if let (Some(partition), Some(at)) = (partition, at) {
                partition.stands_at(*at, source);
            }
        }
    }

    fn fresh_shelf(&self, seen: &Observation, epoch: Epoch) -> Shelf {
        let partitions = (0..seen.partition_count).map(|partition| {
            let scope = CoherenceScope { epoch, version: seen.version, partition };
            let coherence = Coherence::new(scope, self.slot_count);
            Partition { coherence, polled: AtomicU64::new(0) }
        });
        Shelf {
            generation: self.generations.fetch_add(1, Ordering::Relaxed),
            epoch,
            version: seen.version,
            partitions: partitions.collect(),
        }
    }
}

impl Shelf {
    /// Whether an entry answers the demand. By the scheme when the chain has come that far; wherever
    /// the chain stands when the row proves by its own version that it holds the caller's write.
    fn shows(&self, kept: &Kept, key: &AggregateKey, demand: &Demand) -> bool {
        let Some(partition) = self.partitions.get(usize::from(kept.partition)) else {
            return false;
        };
        let version = kept.row.as_ref().map(|row| row.version);
        let has = |asked: Version| version.is_some_and(|version| asked <= version);
        let proves_itself =
            demand.at().epoch == kept.read_at.epoch && demand.shortcut().is_some_and(has);
        let untouched = LogPosition::new(self.epoch, Position::ZERO);
        let at = if proves_itself { untouched } else { demand.at() };
        demand.min_version().is_none_or(has) && partition.coherence.is_usable(key, kept.read_at, at)
    }
}

impl Partition {
    /// Announcements tell of every step, so a checkpoint that is ahead of them is mostly about to be
    /// announced, and to jump there would make every entry useless for nothing. A chain that has not
    /// come by the next poll to where the last one found the partition has missed something.
    fn stands_at(&self, at: LogPosition, source: Source) {
        if at.epoch != self.coherence.scope().epoch {
            return;
        }
        let chain = self.coherence.chain();
        let is_late = match source {
            Source::Read => false,
            Source::Poll => chain.get() < self.polled.swap(at.position.get(), Ordering::AcqRel),
        };
        if is_late || chain == Position::ZERO {
            self.coherence.jump(at.position);
        }
    }
}

impl Kept {
    /// What it shows: the row's own last position, or the checkpoint at which there was none.
    pub fn shown(&self) -> LogPosition {
        self.row.as_ref().map_or(self.read_at, |row| row.at)
    }

    fn weight_bytes(&self) -> usize {
        let body = self.row.as_ref().map_or(0, |row| row.body.len());
        OVERHEAD_BYTES + body + self.aggregate.id().len()
    }
}

#[cfg(test)]
mod tests;
