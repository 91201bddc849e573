//! The read model of one region: rows, checkpoints, dead letters, and what must be true of them.

use std::collections::BTreeSet;

use consistency::{Admission, admit};

use super::{
    log::{AGGREGATE_COUNT, Change, Log, LogEvent, PARTITION_COUNT, partition_of, version},
    oracle::{Promise, Violation},
};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Document {
    pub version: u64,
    pub position: u64,
    pub created: u64,
    pub list: Option<u8>,
    /// Events that an operator discarded; they count in the version.
    pub discarded: u64,
    /// Events that the rollup has counted.
    pub counted: u64,
}

/// All that one transaction sees. A copy is a snapshot.
#[derive(Debug, Clone)]
pub struct Database {
    pub checkpoints: [Option<u64>; PARTITION_COUNT],
    pub fences: [u64; PARTITION_COUNT],
    pub documents: [Document; AGGREGATE_COUNT],
    pub parked: [Option<u64>; AGGREGATE_COUNT],
    pub letters: BTreeSet<u64>,
    /// Position of the last batch that wrote the rollup, whatever its partition.
    pub rollup_last: u64,
}

impl Database {
    pub fn new() -> Self {
        Self {
            checkpoints: [Some(0); PARTITION_COUNT],
            fences: [1; PARTITION_COUNT],
            documents: [Document::default(); AGGREGATE_COUNT],
            parked: [None; AGGREGATE_COUNT],
            letters: BTreeSet::new(),
            rollup_last: 0,
        }
    }

    /// What a reader of a dropped version finds.
    pub fn dropped(&self, checkpoints_too: bool) -> Self {
        let checkpoints = if checkpoints_too { [None; PARTITION_COUNT] } else { self.checkpoints };
        Self { checkpoints, ..Self::new() }
    }

    pub fn largest_checkpoint(&self) -> u64 {
        self.checkpoints.iter().flatten().copied().max().unwrap_or(0)
    }

    /// Takes one event in, given whether its aggregate counts as parked. A document passes over what
    /// it has; a rollup cannot tell, and counts.
    pub fn take(&mut self, event: &LogEvent, parked: bool, cured: bool) -> Result<(), Violation> {
        if parked {
            self.letters.insert(event.position);
            return Ok(());
        }
        let document = &mut self.documents[event.aggregate];
        match admit(version(document.version), version(event.version)) {
            Admission::Gap => {
                let text = format!("{event:?} does not follow {document:?}");
                return Err(Violation::new(Promise::Stuck, text));
            }
            Admission::Apply if event.poison && !cured => {
                self.parked[event.aggregate] = Some(event.position);
                self.letters.insert(event.position);
                return Ok(());
            }
            Admission::Apply => apply(document, event),
            Admission::Duplicate => {}
        }
        document.counted += 1;
        self.rollup_last = event.position;
        Ok(())
    }

    /// Applies dead letters of an aggregate in their order, and parks it again at the first that fails.
    pub fn redeem(&mut self, log: &Log, letters: &[u64], cured: bool) -> Result<(), Violation> {
        for letter in letters {
            let event = log.at(*letter);
            self.letters.remove(letter);
            let parked = self.parked[event.aggregate].is_some();
            self.take(event, parked, cured)?;
        }
        Ok(())
    }

    pub fn letters_of(&self, log: &Log, aggregate: usize) -> Vec<u64> {
        let all = self.letters.iter().copied();
        all.filter(|letter| log.at(*letter).aggregate == aggregate).collect()
    }

    /// Every event at or below its partition's checkpoint is applied once, or is a dead letter of a
    /// parked aggregate.
    pub fn check(&self, log: &Log) -> Result<(), Violation> {
        for (aggregate, document) in self.documents.iter().enumerate() {
            if document.counted + document.discarded > document.version {
                let text = format!("aggregate {aggregate} was counted twice: {document:?}");
                return Err(Violation::new(Promise::G4, text));
            }
            let Some(checkpoint) = self.checkpoints[partition_of(aggregate)] else { continue };
            for event in log.events_of(aggregate).filter(|event| event.position <= checkpoint) {
                let applied = event.version <= document.version;
                let parked = self.letters.contains(&event.position)
                    && self.parked[aggregate].is_some_and(|first| first <= event.position);
                if applied == parked {
                    let text = format!(
                        "at checkpoint {checkpoint} {event:?} applied: {applied}, parked: {parked}"
                    );
                    return Err(Violation::new(Promise::G7, text));
                }
            }
        }
        Ok(())
    }
}

fn apply(document: &mut Document, event: &LogEvent) {
    document.version = event.version;
    document.position = event.position;
    if document.created == 0 {
        document.created = event.position;
    }
    document.list = match event.change {
        Change::Into(list) => Some(list),
        Change::Delete => None,
    };
}
