//! A million reads of rows that change under them, while announcements are lost, doubled and told out
//! of order, subscriptions begin again, versions are switched and databases are set back. The oracle is
//! what was committed before a read began: an answer that does not show it is stale.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64},
    },
};

use super::*;

const PARTITIONS: u16 = 4;
const ROWS: u64 = 64;
const READERS: u64 = 2;
/// Reads between two commits.
const READS_PER_COMMIT: u64 = 25;

/// xorshift64*.
struct Dice(u64);

impl Dice {
    fn below(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % sides
    }

    fn one_in(&mut self, sides: u64) -> bool {
        self.below(sides) == 0
    }
}

/// A row in the store: where it last changed, and whether it is there.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    at: u64,
    exists: bool,
}

struct Batch {
    from: u64,
    to: u64,
    changes: Vec<(u64, bool)>,
}

/// A partition of the region's database.
#[derive(Default)]
struct Stored {
    log: Vec<Batch>,
    applied: usize,
    rows: HashMap<u64, Row>,
}

impl Stored {
    fn checkpoint(&self) -> u64 {
        self.applied.checked_sub(1).map_or(0, |last| self.log[last].to)
    }

    fn apply_next(&mut self) -> (u64, u64, Vec<u64>) {
        let Batch { from, to, changes } = &self.log[self.applied];
        for (id, exists) in changes {
            self.rows.insert(*id, Row { at: *to, exists: *exists });
        }
        self.applied += 1;
        (*from, *to, changes.iter().map(|(id, _)| *id).collect())
    }

    /// As a database that lost its last commits.
    fn go_back(&mut self, batches: usize) {
        let applied = self.applied.saturating_sub(batches);
        (self.applied, self.rows) = (0, HashMap::new());
        while self.applied < applied {
            self.apply_next();
        }
    }
}

struct World {
    memory: Memory,
    partitions: [Mutex<Stored>; PARTITIONS as usize],
    /// Where each row was last changed, told only after the commit.
    committed: [AtomicU64; ROWS as usize],
    /// The version that is read.
    active: AtomicU32,
    reads: AtomicU64,
    ended: AtomicBool,
    /// What becomes of the keys of an announcement on its way.
    names: fn(Vec<u64>) -> Vec<u64>,
}

#[derive(Debug, Default)]
struct Outcome {
    hits: u64,
    stale: u64,
}

impl World {
    fn new(names: fn(Vec<u64>) -> Vec<u64>) -> Self {
        Self {
            memory: Memory::new([name()], 1 << 20, 32),
            partitions: Default::default(),
            committed: std::array::from_fn(|_| AtomicU64::new(0)),
            active: AtomicU32::new(1),
            reads: AtomicU64::new(0),
            ended: AtomicBool::new(false),
            names,
        }
    }

    fn partition(&self, of: u64) -> &Mutex<Stored> {
        &self.partitions[(of % u64::from(PARTITIONS)) as usize]
    }

    /// Commits batches, one of some partition at a time, and tells of them in its own unreliable way.
    fn write(&self, mut dice: Dice) {
        let mut untold = VecDeque::new();
        let mut next_commit = 0;
        while !self.ended.load(Ordering::Acquire) {
            if self.reads.load(Ordering::Relaxed) < next_commit {
                std::thread::yield_now();
                continue;
            }
            next_commit = self.reads.load(Ordering::Relaxed) + READS_PER_COMMIT;
            let partition = dice.below(PARTITIONS.into());
            untold.push_back(self.commit(partition, &mut dice));
            self.tell(&mut untold, &mut dice);
            if dice.one_in(40) {
                self.observe(Source::Poll);
            }
            if dice.one_in(200) {
                self.active.fetch_add(1, Ordering::AcqRel);
                self.observe(Source::Read);
            }
        }
    }

    fn commit(&self, partition: u64, dice: &mut Dice) -> Announcement {
        let mut stored = self.partition(partition).lock().unwrap();
        if dice.one_in(60) {
            stored.go_back(3);
        }
        if stored.applied == stored.log.len() {
            let from = stored.checkpoint();
            let changed = (0..=dice.below(3)).map(|_| {
                let id = dice.below(ROWS / u64::from(PARTITIONS)) * u64::from(PARTITIONS);
                (id + partition, !dice.one_in(5))
            });
            let changes = changed.collect();
            stored.log.push(Batch { from, to: from + 1 + dice.below(4), changes });
        }
        let (from, to, ids) = stored.apply_next();
        for id in &ids {
            self.committed[*id as usize].fetch_max(to, Ordering::AcqRel);
        }
        let version = self.active.load(Ordering::Acquire);
        announcement(version, partition as u16, from, to, &(self.names)(ids))
    }

    /// A tenth is lost, a tenth is told twice, a tenth waits and is told after later ones.
    fn tell(&self, untold: &mut VecDeque<Announcement>, dice: &mut Dice) {
        while let Some(said) = untold.pop_front() {
            match dice.below(10) {
                0 => {}
                1 => {
                    self.memory.hear(&said);
                    self.memory.hear(&said);
                }
                2 if untold.len() < 4 => {
                    untold.push_back(said);
                    return;
                }
                _ => self.memory.hear(&said),
            }
        }
        if dice.one_in(100) {
            // The subscription begins again: what is told meanwhile is not heard.
            untold.clear();
        }
    }

    fn observe(&self, source: Source) {
        let checkpoint = |stored: &Mutex<Stored>| stored.lock().unwrap().checkpoint();
        let checkpoints: Vec<u64> = self.partitions.iter().map(checkpoint).collect();
        let version = self.active.load(Ordering::Acquire);
        self.memory.observed(&name(), &observation(version, &checkpoints), source);
    }

    fn read(&self, read_count: u64, mut dice: Dice) -> Outcome {
        let mut outcome = Outcome::default();
        let mut late = None;
        for _ in 0..read_count {
            let id = dice.below(ROWS);
            let must_show = self.committed[id as usize].load(Ordering::Acquire);
            match recall(&self.memory, id, &demand(must_show)) {
                Recalled::Hit(kept) => {
                    let shown = kept.shown();
                    outcome.hits += 1;
                    outcome.stale += u64::from(shown < at(must_show));
                }
                Recalled::Stale | Recalled::Miss => {
                    let insert = self.look(id);
                    // Some are held up on their way from the database.
                    let insert = if dice.one_in(4) { late.replace(insert) } else { Some(insert) };
                    if let Some((Some(shelf), version, kept)) = insert {
                        self.memory.keep(&shelf, (1, 0), version, kept);
                    }
                }
                Recalled::Off => panic!("memory is on"),
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
        outcome
    }

    fn look(&self, id: u64) -> (Option<Arc<Shelf>>, u32, Kept) {
        let shelf = self.memory.shelf(&name());
        let version = self.active.load(Ordering::Acquire);
        let stored = self.partition(id).lock().unwrap();
        let (checkpoint, row) = (stored.checkpoint(), stored.rows.get(&id).copied());
        drop(stored);
        let partition = (id % u64::from(PARTITIONS)) as u16;
        let seen = Observation {
            checkpoints: vec![(partition, Some(at(checkpoint)))],
            ..observation(version, &[])
        };
        self.memory.observed(&name(), &seen, Source::Read);
        let row_at = row.filter(|row| row.exists).map(|row| row.at);
        (shelf, version, kept(id, partition, checkpoint, row_at))
    }
}

fn stress(read_count: u64, names: fn(Vec<u64>) -> Vec<u64>) -> Outcome {
    let seed = u64::from(std::process::id()) + 1;
    println!("seed {seed}");
    let world = World::new(names);
    std::thread::scope(|scope| {
        scope.spawn(|| world.write(Dice(seed)));
        let readers: Vec<_> = (1..=READERS)
            .map(|reader| {
                let (world, dice) = (&world, Dice(seed + reader * 7919));
                scope.spawn(move || world.read(read_count / READERS, dice))
            })
            .collect();
        let outcomes = readers.into_iter().map(|reader| reader.join().unwrap());
        let total = outcomes.fold(Outcome::default(), |total, outcome| Outcome {
            hits: total.hits + outcome.hits,
            stale: total.stale + outcome.stale,
        });
        world.ended.store(true, Ordering::Release);
        total
    })
}

#[test]
fn a_million_reads_are_never_answered_with_the_past() {
    let outcome = stress(1_000_000, |ids| ids);
    assert_eq!(outcome.stale, 0, "{outcome:?}");
    assert!(
        300_000 < outcome.hits,
        "memory must have answered for this to say anything: {outcome:?}"
    );
}

/// An announcement that names no row raises no slot, so that the check of the slots passes whatever
/// was changed.
#[test]
fn without_the_check_of_the_slots_the_past_is_shown() {
    let outcome = stress(100_000, |_| Vec::new());
    assert!(0 < outcome.stale, "{outcome:?}");
}
