//! Folds the next batch while the last one is written and committed.
//!
//! What is folded ahead rests on states that are not committed yet, and on those that the database
//! shows meanwhile. Nobody else writes a partition's states without raising its fence, so both stand
//! when the last batch commits and the next one finds the checkpoint there. Only what parks nothing is
//! kept: who is parked is read again under the lock.

use std::collections::HashSet;

use process::postgres::AtHand;
use projection::ProjectionDefinition;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::plan::{self, Condemned, Known, Plan};
use super::remembered::Remembered;
use super::{Batch, Partition, write};
use crate::attempt::{Attempt, bounded};
use crate::config::ApplyConfig;
use crate::reader::Chunk;

/// What is to be applied, in the order of the log.
pub struct Queue {
    chunks: mpsc::Receiver<Chunk>,
    /// What has arrived with the first of a batch, and is too much for it.
    rest: Option<Batch>,
    next: Option<Next>,
}

/// A batch that is being folded.
struct Next {
    folding: Folding,
    /// Whether what it rests on has not failed.
    stands: bool,
}

/// Ends with the partition, which would read its events again.
struct Folding(JoinHandle<(Batch, Option<Box<Plan>>)>);

impl Drop for Folding {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What comes next.
pub enum Taken {
    /// A batch, folded when the one before it let it.
    Batch(Batch, Option<Box<Plan>>),
    /// Nothing will come any more.
    Ended,
    /// A batch is gone with the task that folded it.
    Lost,
}

impl Queue {
    /// Of what the reader hands on.
    pub fn new(chunks: mpsc::Receiver<Chunk>) -> Self {
        Self { chunks, rest: None, next: None }
    }

    /// Waits for what comes next. Cancelling loses nothing.
    pub async fn next(&mut self, config: &ApplyConfig, events_max: usize) -> Taken {
        if let Some(next) = &mut self.next {
            let folded = (&mut next.folding.0).await;
            let stands = next.stands;
            self.next = None;
            return match folded {
                Ok((batch, plan)) => Taken::Batch(batch, plan.filter(|_| stands)),
                Err(_) => Taken::Lost,
            };
        }
        if let Some(rest) = self.rest.take() {
            return Taken::Batch(self.within(rest, events_max), None);
        }
        match self.chunks.recv().await {
            Some(chunk) => {
                let batch = Batch::gather(chunk, &mut self.chunks, config, events_max);
                Taken::Batch(self.within(batch, events_max), None)
            }
            None => Taken::Ended,
        }
    }

    /// What is there already.
    fn arrived(&mut self, config: &ApplyConfig, events_max: usize) -> Option<Batch> {
        let batch = match self.rest.take() {
            Some(rest) => rest,
            None => {
                let chunk = self.chunks.try_recv().ok()?;
                Batch::gather(chunk, &mut self.chunks, config, events_max)
            }
        };
        Some(self.within(batch, events_max))
    }

    /// As much of a batch as may be applied at once; the rest comes next.
    fn within(&mut self, batch: Batch, events_max: usize) -> Batch {
        if batch.events.len() <= events_max {
            return batch;
        }
        let (first, rest) = batch.cut(events_max);
        self.rest = Some(rest);
        first
    }

    /// Begins to fold what has arrived, as if `last` with its `plan` were committed.
    pub fn fold_ahead(
        &mut self,
        partition: &Partition,
        last: &Batch,
        plan: &Plan,
        remembered: &Remembered,
        events_max: usize,
    ) {
        if self.next.is_some() {
            return self.throw_away();
        }
        let Some(mut batch) = self.arrived(&partition.config, events_max) else { return };
        batch.events.retain(|event| event.at.position > last.through.position);
        let ids: HashSet<&str> = batch.events.iter().map(|event| event.aggregate.id()).collect();
        let states = plan.states_of(|id| ids.contains(id)).collect();
        let mut known = Known { states, ..Known::default() };
        let unknown = write::ids(known.recall(&batch.events, remembered));
        let unknown = unknown.into_iter().map(str::to_owned).collect();
        let fold = FoldAhead {
            definition: partition.definition.clone(),
            partition: partition.held.partition,
            connections: partition.connections.clone(),
            config: partition.config,
            known,
            unknown,
            is_parked: plan.parkings.iter().any(|parking| batch.is_of(parking.aggregate.id())),
        };
        let folding = Folding(tokio::spawn(async move {
            let plan = fold.run(&batch).await;
            (batch, plan)
        }));
        self.next = Some(Next { folding, stands: true });
    }

    /// What is folded ahead rests on what did not come to pass.
    pub fn throw_away(&mut self) {
        if let Some(next) = &mut self.next {
            next.stands = false;
        }
    }
}

struct FoldAhead {
    definition: ProjectionDefinition,
    partition: u16,
    connections: AtHand,
    config: ApplyConfig,
    /// States that the last batch leaves behind, and those that are remembered.
    known: Known,
    /// Ids of the aggregates that have to be looked up.
    unknown: Vec<String>,
    /// Whether the last batch parks an aggregate of this one.
    is_parked: bool,
}

impl FoldAhead {
    /// `None` when there is nothing to fold, or nothing that may be kept.
    async fn run(mut self, batch: &Batch) -> Option<Box<Plan>> {
        if batch.events.is_empty() || self.is_parked {
            return None;
        }
        if !self.unknown.is_empty() {
            let looked_up = bounded(self.config.attempt_timeout, self.load()).await.ok()?;
            self.known.extend(looked_up);
        }
        let none = Condemned::new();
        let plan =
            plan::plan(&self.definition, self.partition, &batch.events, &mut self.known, &none);
        plan.parks_nothing().then(|| Box::new(plan))
    }

    async fn load(&self) -> Result<Known, sqlx::Error> {
        let mut attempt = Attempt::begin(&self.connections).await?;
        let known = write::load_of(&mut attempt, &self.definition, &self.unknown).await?;
        attempt.finish();
        Ok(known)
    }
}
