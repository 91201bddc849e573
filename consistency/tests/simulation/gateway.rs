//! The gateway of one region: what it was told, what it keeps, and how it judges one read.

use consistency::{
    Announcement, Claim, Coherence, CoherenceScope, Demand, Epoch, Evidence, IdleProof,
    LogPosition, Parked, Raise, Scope, Token, Verdict, judge, watermark,
};

use super::{
    database::Database,
    log::{AGGREGATE_COUNT, PARTITION_COUNT, at, key, partition_of, position, version},
    oracle::Answer,
    projector::PROJECTION_VERSION,
    rules::{Rule, Rules},
};

/// What a read asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Row(usize),
    List,
    Rollup,
}

impl What {
    pub fn scope(self) -> Scope {
        match self {
            What::Row(aggregate) => Scope::Row(key(aggregate)),
            What::List | What::Rollup => Scope::Everything,
        }
    }

    pub fn partitions(self, rules: Rules) -> std::ops::Range<usize> {
        match self {
            What::Row(aggregate) => partition_of(aggregate)..partition_of(aggregate) + 1,
            What::Rollup if !rules.hold(Rule::EveryPartitionMattersToRollup) => 0..1,
            What::List | What::Rollup => 0..PARTITION_COUNT,
        }
    }
}

/// A row in memory, or the knowledge that there is none.
#[derive(Debug, Clone)]
pub struct Entry {
    aggregate: usize,
    read_at: LogPosition,
    answer: Answer,
}

#[derive(Debug)]
pub struct Gateway {
    told: [Option<LogPosition>; PARTITION_COUNT],
    proofs: [Option<IdleProof>; PARTITION_COUNT],
    memory: [Coherence; PARTITION_COUNT],
    kept: [Option<Entry>; AGGREGATE_COUNT],
    /// Read, and not inserted into memory yet.
    pub late: Vec<Entry>,
}

impl Gateway {
    pub fn new() -> Self {
        let memory = |partition: usize| {
            let scope = CoherenceScope {
                epoch: Epoch::FIRST,
                version: PROJECTION_VERSION,
                partition: partition as u16,
            };
            Coherence::new(scope, AGGREGATE_COUNT)
        };
        Self {
            told: [None; PARTITION_COUNT],
            proofs: [None; PARTITION_COUNT],
            memory: std::array::from_fn(memory),
            kept: std::array::from_fn(|_| None),
            late: Vec::new(),
        }
    }

    pub fn hear(&mut self, rules: Rules, hint: &Announcement) {
        let partition = usize::from(hint.partition);
        let memory = &self.memory[partition];
        if rules.hold(Rule::JumpRaisesFloor) || hint.from <= memory.chain() {
            memory.hear(hint);
        } else {
            memory.raise(Raise::Chain(hint.to));
        }
        self.told[partition] = self.told[partition].max(Some(hint.reached()));
        if self.proofs[partition].is_none_or(|proof| proof.proven <= hint.reached()) {
            self.proofs[partition] = Some(hint.proof());
        }
    }

    /// Reads the checkpoints, since hints have been silent.
    pub fn poll(&mut self, rules: Rules, database: &Database) {
        for partition in 0..PARTITION_COUNT {
            let Some(checkpoint) = database.checkpoints[partition] else { continue };
            self.told[partition] = self.told[partition].max(Some(at(checkpoint)));
            if rules.hold(Rule::JumpRaisesFloor) {
                self.memory[partition].jump(position(checkpoint));
            } else {
                self.memory[partition].raise(Raise::Chain(position(checkpoint)));
            }
        }
    }

    /// The answer from memory, when it is usable for the demand.
    pub fn recall(&self, what: What, demand: &Demand) -> Option<Answer> {
        let What::Row(aggregate) = what else { return None };
        let entry = self.kept[aggregate].as_ref()?;
        let memory = &self.memory[partition_of(aggregate)];
        let usable = memory.is_usable(&key(aggregate), entry.read_at, demand.at());
        let asked = demand.min_version().map_or(0, |asked| asked.get());
        let exists = entry.answer.reports.is_some();
        let met = asked == 0 || exists && asked <= entry.answer.shown[aggregate].unwrap_or(0);
        (usable && met).then(|| entry.answer.clone())
    }

    /// What would be kept of an answer that was read from a snapshot.
    pub fn entry(
        &self,
        rules: Rules,
        what: What,
        snapshot: &Database,
        answer: &Answer,
    ) -> Option<Entry> {
        let What::Row(aggregate) = what else { return None };
        let read_at = at(snapshot.checkpoints[partition_of(aggregate)]?);
        let keeps =
            snapshot.parked[aggregate].is_none() || !rules.hold(Rule::ParkedAnswerIsNotKept);
        keeps.then(|| Entry { aggregate, read_at, answer: answer.clone() })
    }

    pub fn keep(&mut self, entry: Entry) {
        let aggregate = entry.aggregate;
        self.kept[aggregate] = Some(entry);
    }

    pub fn judge(
        &self,
        rules: Rules,
        what: What,
        token: &Token,
        demand: &Demand,
        snapshot: &Database,
    ) -> Verdict {
        let marks = what.partitions(rules).map(|partition| self.mark(rules, partition, snapshot));
        let evidence = Evidence {
            watermark: marks.min().unwrap_or(None),
            row_version: row_version(what, snapshot),
            parked: parked(rules, what, snapshot),
        };
        if let (false, What::Row(aggregate)) =
            (rules.hold(Rule::ShortcutOnlyWhenNothingNewerWasRead), what)
            && let Some(claim) = token.claim_on(&key(aggregate))
            && evidence.row_version.is_some_and(|has| claim.version <= has)
            && demand.min_version().is_none()
            && evidence.parked.is_empty()
        {
            return Verdict::Current;
        }
        judge(demand, what.scope(), &evidence)
    }

    fn mark(&self, rules: Rules, partition: usize, snapshot: &Database) -> Option<LogPosition> {
        let checkpoint = match snapshot.checkpoints[partition] {
            Some(checkpoint) => Some(at(checkpoint)),
            None if rules.hold(Rule::MissingCheckpointIsNotCurrent) => None,
            None => Some(at(u64::from(u32::MAX))),
        };
        if !rules.hold(Rule::SnapshotIsJudged) {
            return checkpoint
                .map(|stored| self.told[partition].map_or(stored, |told| stored.max(told)));
        }
        let proof = self.proofs[partition];
        if rules.hold(Rule::ProofNamesItsCheckpoint) {
            watermark(checkpoint, proof)
        } else {
            checkpoint.map(|stored| proof.map_or(stored, |proof| stored.max(proof.proven)))
        }
    }

    /// What a snapshot shows.
    pub fn show(&self, rules: Rules, what: What, snapshot: &Database) -> Answer {
        let mut shown = [None; AGGREGATE_COUNT];
        let mut reports = None;
        let covers = match what {
            What::Row(aggregate) => {
                let document = snapshot.documents[aggregate];
                shown[aggregate] = Some(document.version);
                let checkpoint = snapshot.checkpoints[partition_of(aggregate)].unwrap_or(0);
                if document.list.is_some() {
                    let own = rules.hold(Rule::ReportedPositionIsRows);
                    reports = Some(if own { document.position } else { checkpoint });
                    document.position
                } else {
                    checkpoint
                }
            }
            What::List | What::Rollup => {
                shown = snapshot.documents.map(|document| Some(document.version));
                everything_covers(rules, what, snapshot)
            }
        };
        Answer { shown, parked: snapshot.parked, covers, reports, stale: None }
    }
}

fn everything_covers(rules: Rules, what: What, snapshot: &Database) -> u64 {
    if what == What::List && !rules.hold(Rule::ListTokenIsLargestCheckpoint) {
        snapshot.checkpoints.iter().flatten().copied().min().unwrap_or(0)
    } else if what == What::Rollup && !rules.hold(Rule::RollupTokenIsLargestCheckpoint) {
        snapshot.rollup_last
    } else {
        snapshot.largest_checkpoint()
    }
}

fn row_version(what: What, snapshot: &Database) -> Option<consistency::Version> {
    let What::Row(aggregate) = what else { return None };
    let document = snapshot.documents[aggregate];
    document.list.map(|_| version(document.version))
}

fn parked(rules: Rules, what: What, snapshot: &Database) -> Vec<Parked> {
    let touched = |aggregate: &usize| match what {
        What::Row(row) => {
            let exists = snapshot.documents[row].list.is_some();
            row == *aggregate && (exists || rules.hold(Rule::ParkedIsFoundWithoutRow))
        }
        What::List | What::Rollup => true,
    };
    let parked = (0..AGGREGATE_COUNT).filter(touched).filter_map(|aggregate| {
        let position = position(snapshot.parked[aggregate]?);
        Some(Parked { aggregate: key(aggregate), position })
    });
    parked.collect()
}

/// What a token asks, through the naive variants of the rules that are taken away.
pub fn demand_of(rules: Rules, token: &Token, scope: Scope) -> Demand {
    if let (false, Scope::Row(aggregate)) = (rules.hold(Rule::RowOwesWhatWasRead), scope)
        && let Some(claim) = token.claim_on(&aggregate)
    {
        return Demand::of(&Token::new(token.epoch()).with_claim(*claim), scope);
    }
    if rules.hold(Rule::DroppedClaimsAreRemembered) {
        return Demand::of(token, scope);
    }
    let bare = Token::new(token.epoch()).with_read(token.read_position());
    Demand::of(&token.claims().iter().copied().fold(bare, Token::with_claim), scope)
}

/// A claim joins a token.
pub fn with_claim(rules: Rules, token: Token, claim: Claim) -> Token {
    if rules.hold(Rule::DroppedClaimRaisesReadPosition) {
        return token.with_claim(claim);
    }
    let joined = token.clone().with_claim(claim);
    let bare = Token::new(token.epoch()).with_read(token.read_position());
    joined.claims().iter().copied().fold(bare, Token::with_claim)
}
