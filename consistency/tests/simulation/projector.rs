//! The projectors of one region: workers over partitions, their commits, and what they announce.

use std::collections::BTreeSet;

use consistency::{Announcement, Epoch, Name};

use super::{
    database::Database,
    log::{AGGREGATE_COUNT, Log, PARTITION_COUNT, key, partition_of, position},
    oracle::Violation,
    rules::{Rule, Rules},
};

/// Workers that may hold one partition, one of them the rightful one.
pub const WORKER_COUNT: usize = 2;
pub const PROJECTION_VERSION: u32 = 1;

/// What a worker remembers. All of it may be out of date.
#[derive(Debug, Clone)]
struct Worker {
    partition: usize,
    alive: bool,
    fence: u64,
    stored: u64,
    proven: u64,
    parked: [Option<u64>; AGGREGATE_COUNT],
    batch: Option<Batch>,
}

/// A batch that is folded and not committed yet.
#[derive(Debug, Clone)]
struct Batch {
    from: u64,
    begins: u64,
    to: u64,
}

/// How a commit ends, as its worker sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Known,
    /// It is committed, and its worker is told of a broken connection.
    Unknown,
    /// It is committed, and its worker dies before the announcement.
    Crash,
}

#[derive(Debug)]
pub struct Projector {
    pub database: Database,
    /// Every state that the database committed, oldest first; a standby may be at any.
    copies: Vec<Database>,
    /// Events up to here have left for this region; those in `holes` did not arrive.
    pub arrived: u64,
    pub holes: BTreeSet<u64>,
    /// Whether a binary that can apply the poison is deployed.
    pub cured: bool,
    pub hints: Vec<Announcement>,
    workers: Vec<Worker>,
    /// Letters that an operator's retry has read, when it does so outside of a transaction.
    retrying: Option<(usize, Vec<u64>)>,
}

impl Projector {
    pub fn new() -> Self {
        let worker = |at: usize| Worker {
            partition: at / WORKER_COUNT,
            alive: at.is_multiple_of(WORKER_COUNT),
            fence: 1,
            stored: 0,
            proven: 0,
            parked: [None; AGGREGATE_COUNT],
            batch: None,
        };
        Self {
            database: Database::new(),
            copies: vec![Database::new()],
            arrived: 0,
            holes: BTreeSet::new(),
            cured: false,
            hints: Vec::new(),
            workers: (0..PARTITION_COUNT * WORKER_COUNT).map(worker).collect(),
            retrying: None,
        }
    }

    /// Brings one more event here, or loses it on the way.
    pub fn arrive(&mut self, log: &Log, lost: bool) {
        if self.arrived < log.head() {
            self.arrived += 1;
            if lost {
                self.holes.insert(self.arrived);
            }
        }
    }

    /// Reads on: finds the next batch of at most `event_count` events, or proves that there is none.
    pub fn plan(
        &mut self,
        rules: Rules,
        log: &Log,
        worker: usize,
        event_count: usize,
        store: bool,
    ) {
        let limit = match self.holes.first() {
            Some(hole) if rules.hold(Rule::HoleStopsEveryPartition) => self.arrived.min(hole - 1),
            Some(_) | None => self.arrived,
        };
        let holes = &self.holes;
        let worker = &mut self.workers[worker];
        if !worker.alive || worker.batch.is_some() {
            return;
        }
        let begins = worker.proven;
        let mut own = log
            .range(begins, limit, worker.partition)
            .filter(|event| !holes.contains(&event.position))
            .map(|event| event.position);
        let last = own.by_ref().take(event_count).last();
        let to = if own.next().is_some() { last.unwrap_or(begins) } else { limit.max(begins) };
        if last.is_some() || store && worker.stored < to {
            worker.batch = Some(Batch { from: worker.stored, begins, to });
        } else if begins < to {
            worker.proven = to;
            let (partition, stored) = (worker.partition, worker.stored);
            self.announce(log, partition, (begins, to), stored, Some(Vec::new()));
        }
    }

    /// Commits a worker's batch, unless somebody else has taken its place.
    pub fn commit(
        &mut self,
        rules: Rules,
        log: &Log,
        worker: usize,
        outcome: Outcome,
    ) -> Result<(), Violation> {
        let Worker { partition, alive, fence, batch: Some(batch), parked, .. } =
            self.workers[worker].clone()
        else {
            return Ok(());
        };
        let under_fence = rules.hold(Rule::CheckpointMovesUnderFence);
        let fenced_off = under_fence && self.database.fences[partition] != fence;
        let moved = under_fence
            && rules.hold(Rule::CheckpointMovesFromPosition)
            && self.database.checkpoints[partition] != Some(batch.from);
        if !alive || fenced_off || moved {
            self.reload(worker);
            return Ok(());
        }
        let before = self.database.clone();
        let mut after = before.clone();
        let reads_again =
            rules.hold(Rule::ParkedIsReadInTransaction) && rules.hold(Rule::RetryRaisesFence);
        let remembered = if reads_again { before.parked } else { parked };
        for event in log.range(batch.begins, batch.to, partition) {
            if self.holes.contains(&event.position) {
                continue;
            }
            let parked = remembered[event.aggregate].or(after.parked[event.aggregate]).is_some();
            after.take(event, parked, self.cured)?;
        }
        after.checkpoints[partition] = Some(batch.to);
        self.store(log, after, !self.holes.is_empty())?;
        let keys = self.keys_of(rules, log, partition, &batch, &before);
        let worker = &mut self.workers[worker];
        match outcome {
            Outcome::Known => {
                worker.batch = None;
                worker.stored = batch.to;
                worker.proven = batch.to;
                worker.parked = self.database.parked;
                self.announce(log, partition, (batch.begins, batch.to), batch.to, Some(keys));
            }
            Outcome::Unknown => {}
            Outcome::Crash => worker.alive = false,
        }
        Ok(())
    }

    /// Another worker takes a partition over.
    pub fn take_over(&mut self, worker: usize) {
        let partition = self.workers[worker].partition;
        self.database.fences[partition] += 1;
        self.copies.push(self.database.clone());
        self.workers[worker].fence = self.database.fences[partition];
        self.reload(worker);
    }

    /// The database is lost, and one that is `copies_back` commits behind takes its place.
    pub fn fail_over(&mut self, copies_back: usize) {
        self.copies.truncate(self.copies.len().saturating_sub(copies_back).max(1));
        self.database = self.copies.last().expect("the first is always kept").clone();
    }

    /// An operator tries the dead letters of an aggregate again.
    pub fn retry(&mut self, rules: Rules, log: &Log, aggregate: usize) -> Result<(), Violation> {
        if self.database.parked[aggregate].is_none() || !self.cured {
            return Ok(());
        }
        let now = self.database.letters_of(log, aggregate);
        let letters = if rules.hold(Rule::RetryIsOneTransaction) {
            now
        } else {
            match self.retrying.take() {
                Some((retried, read)) if retried == aggregate => read,
                Some(_) | None => {
                    self.retrying = Some((aggregate, now));
                    return Ok(());
                }
            }
        };
        let mut after = self.database.clone();
        after.parked[aggregate] = None;
        after.redeem(log, &letters, self.cured)?;
        let locks = rules.hold(Rule::RetryIsOneTransaction) && rules.hold(Rule::RetryRaisesFence);
        self.operate(log, after, aggregate, locks)
    }

    /// An operator gives up the event that parked an aggregate, and applies the later ones.
    pub fn discard(&mut self, rules: Rules, log: &Log, aggregate: usize) -> Result<(), Violation> {
        let letters = self.database.letters_of(log, aggregate);
        let [first, later @ ..] = letters.as_slice() else { return Ok(()) };
        let mut after = self.database.clone();
        after.parked[aggregate] = None;
        after.letters.remove(first);
        if rules.hold(Rule::DiscardAdvancesVersion) {
            after.documents[aggregate].version = log.at(*first).version;
            after.documents[aggregate].discarded += 1;
        }
        if rules.hold(Rule::DiscardAdvancesPosition) {
            after.documents[aggregate].position = *first;
        }
        after.redeem(log, later, self.cured)?;
        self.operate(log, after, aggregate, true)
    }

    /// Everything arrives and is applied: what a reader who waits hopes for.
    pub fn catch_up(&mut self, rules: Rules, log: &Log) -> Result<(), Violation> {
        self.arrived = log.head();
        self.holes.clear();
        for partition in 0..PARTITION_COUNT {
            let worker = partition * WORKER_COUNT;
            self.take_over(worker);
            self.plan(rules, log, worker, usize::MAX, false);
            self.commit(rules, log, worker, Outcome::Known)?;
        }
        Ok(())
    }

    fn operate(
        &mut self,
        log: &Log,
        mut after: Database,
        aggregate: usize,
        locks: bool,
    ) -> Result<(), Violation> {
        let partition = partition_of(aggregate);
        if locks {
            after.fences[partition] += 1;
        }
        self.store(log, after, false)?;
        let here = self.database.checkpoints[partition].unwrap_or(0);
        self.announce(log, partition, (here, here), here, Some(vec![key(aggregate).hint()]));
        Ok(())
    }

    /// `incomplete`: a hole was passed over, which only readers can tell.
    fn store(&mut self, log: &Log, after: Database, incomplete: bool) -> Result<(), Violation> {
        self.database = after;
        self.copies.push(self.database.clone());
        if incomplete { Ok(()) } else { self.database.check(log) }
    }

    fn reload(&mut self, worker: usize) {
        let database = &self.database;
        let worker = &mut self.workers[worker];
        let partition = worker.partition;
        worker.alive = worker.fence == database.fences[partition];
        worker.batch = None;
        worker.stored = database.checkpoints[partition].unwrap_or(0);
        worker.proven = worker.stored;
        worker.parked = database.parked;
    }

    fn keys_of(
        &self,
        rules: Rules,
        log: &Log,
        partition: usize,
        batch: &Batch,
        before: &Database,
    ) -> Vec<u64> {
        let after = &self.database;
        let touched = log.range(batch.begins, batch.to, partition).filter(|event| {
            let (was, is) = (before.documents[event.aggregate], after.documents[event.aggregate]);
            let nets = (was.list, is.list) != (None, None);
            let lettered = after.letters.contains(&event.position);
            (rules.hold(Rule::AnnouncementNamesEveryKey) || nets)
                && (rules.hold(Rule::AnnouncementNamesParked) || !lettered)
        });
        touched.map(|event| key(event.aggregate).hint()).collect()
    }

    fn announce(
        &mut self,
        log: &Log,
        partition: usize,
        (from, to): (u64, u64),
        stored: u64,
        keys: Option<Vec<u64>>,
    ) {
        self.hints.push(Announcement {
            region: "region".to_owned(),
            epoch: Epoch::FIRST,
            projection: Name::new("documents").expect("letters make a name"),
            version: PROJECTION_VERSION,
            partition: partition as u16,
            from: position(from),
            to: position(to),
            stored: position(stored),
            head: position(log.head()),
            keys,
        });
    }
}
