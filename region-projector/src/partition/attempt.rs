//! One try of a batch: one transaction, which is a single statement where nothing stands against it.

use std::collections::BTreeSet;

use projection::ProjectionKind;
use sqlx::{Connection as _, PgConnection};

use super::ahead::Queue;
use super::batch::{Batch, Failed, Findings, reconsider};
use super::plan::{self, Condemned, Known, Plan};
use super::{Partition, Running, parking, write};
use crate::attempt::Attempt;
use crate::breaker;
use crate::chain::Mark;
use crate::checkpoint::{self, CheckpointError, Held};

/// In a batch of more events it is the rows that take the time, and not the round trips.
const SHORT_EVENTS_MAX: usize = 100;

impl Running {
    /// One try.
    pub(super) async fn attempt(
        &mut self,
        batch: &Batch,
        findings: &Findings,
        mut folded: Option<Box<Plan>>,
        mut queue: Option<&mut Queue>,
    ) -> Result<Box<Plan>, Failed> {
        let Partition { definition, connections, .. } = &self.partition;
        let mut attempt = Attempt::begin(connections).await?;
        // A custom projection writes by itself, under the lock.
        let is_short = batch.events.len() <= SHORT_EVENTS_MAX
            && !matches!(definition.kind(), ProjectionKind::Custom(_));
        if is_short && findings.are_none() {
            let (folded, queue) = (folded.take(), queue.as_deref_mut());
            if let Some(plan) = self.short_way(&mut attempt, batch, folded, queue).await? {
                attempt.finish();
                return Ok(plan);
            }
        }
        self.long_way(attempt, batch, findings, folded, queue).await
    }

    /// Reads, decides, and then locks, writes and commits in one statement. `None` when it cannot be done
    /// that way, and nothing was.
    async fn short_way(
        &mut self,
        connection: &mut PgConnection,
        batch: &Batch,
        folded: Option<Box<Plan>>,
        mut queue: Option<&mut Queue>,
    ) -> Result<Option<Box<Plan>>, Failed> {
        let Partition { key, definition, held, telemetry, .. } = &self.partition;
        let is_folded = folded.is_some();
        let plan = match folded {
            Some(plan) => plan,
            None => Box::new(self.plan_ahead(connection, batch).await?),
        };
        if !plan.parks_nothing() {
            return Ok(None);
        }
        if let Some(queue) = &mut queue {
            queue.fold_ahead(&self.partition, batch, &plan, &self.remembered, self.size.get());
        }
        let to = (batch.through, batch.committed_at);
        let done = write::apply(connection, definition, held, to, &batch.events, &plan.writes);
        if done.await? {
            if is_folded {
                telemetry.folded_ahead(key);
            }
            return Ok(Some(plan));
        }
        // Somebody may have come between, whoever it was.
        self.remembered.clear();
        if let Some(queue) = queue {
            queue.throw_away();
        }
        Ok(None)
    }

    async fn plan_ahead(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
    ) -> Result<Plan, sqlx::Error> {
        let Partition { definition, held, .. } = &self.partition;
        let mut known = Known::default();
        let unknown = known.recall(&batch.events, &self.remembered);
        if !unknown.is_empty() {
            known.extend(write::load(connection, definition, unknown).await?);
        }
        let none = Condemned::new();
        Ok(plan::plan(definition, held.partition, &batch.events, &mut known, &none))
    }

    /// Lock, read, decide, write, commit.
    async fn long_way(
        &self,
        mut attempt: Attempt,
        batch: &Batch,
        findings: &Findings,
        folded: Option<Box<Plan>>,
        queue: Option<&mut Queue>,
    ) -> Result<Box<Plan>, Failed> {
        let Partition { key, definition, held, config, .. } = &self.partition;
        let mut transaction = attempt.connection().begin().await?;
        let (through, is_folded) = (batch.through, folded.is_some());
        // First, so that everything else is written under the lock of its row. A database that failed over
        // may hand out a fence again; then the place that the checkpoint stands at tells who came first, and
        // with it what is parked.
        let Some(plan) = self.open(&mut transaction, batch, findings, folded).await? else {
            transaction.rollback().await?;
            self.explain(&mut attempt, through).await?;
            let plan = self.plan(&mut attempt, batch, findings).await?;
            attempt.finish();
            return Ok(Box::new(plan));
        };
        if let Some(failed) = reconsider(&plan, batch, findings) {
            transaction.rollback().await?;
            attempt.finish();
            return Err(failed);
        }
        let bound = config.parked_aggregates_max;
        if let Some(trip) = breaker::check(&mut transaction, key, &plan.parkings, bound).await? {
            transaction.rollback().await?;
            attempt.finish();
            return Err(Failed::Tripped(trip));
        }
        if let Some(queue) = queue {
            queue.fold_ahead(&self.partition, batch, &plan, &self.remembered, self.size.get());
        }
        if !write::write(&mut transaction, key, definition, held.partition, &plan).await? {
            transaction.rollback().await?;
            if is_folded {
                return Err(Failed::Stale);
            }
            tracing::warn!(partition = self.name, "states are not as they were read");
            return Err(Failed::Displaced);
        }
        transaction.commit().await?;
        attempt.finish();
        Ok(plan)
    }

    /// Moves the checkpoint on and plans. `None` when it is not where we left it.
    async fn open(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
        findings: &Findings,
        folded: Option<Box<Plan>>,
    ) -> Result<Option<Box<Plan>>, Failed> {
        let Partition { key, definition, held, .. } = &self.partition;
        let events = findings.events(batch);
        if folded.is_some() || events.clone().next().is_none() {
            let at = Some(batch.committed_at);
            if !checkpoint::advance(connection, key, held, batch.through, at).await? {
                return Ok(None);
            }
            return Ok(Some(match folded {
                Some(plan) => self.still_open(connection, batch, plan).await?,
                None => Box::new(self.plan(connection, batch, findings).await?),
            }));
        }
        let to = (batch.through, batch.committed_at);
        let known = write::open(connection, definition, held, to, events.clone()).await?;
        Ok(known.map(|mut known| {
            let condemned = &findings.condemned;
            Box::new(plan::plan(definition, held.partition, events, &mut known, condemned))
        }))
    }

    /// What was folded ahead, unless an aggregate of it is parked by now.
    async fn still_open(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
        folded: Box<Plan>,
    ) -> Result<Box<Plan>, Failed> {
        let Partition { key, definition, telemetry, .. } = &self.partition;
        let ids: BTreeSet<&str> = batch.events.iter().map(|event| event.aggregate.id()).collect();
        let ids: Vec<String> = ids.into_iter().map(str::to_owned).collect();
        let kind = definition.aggregate_type().as_str();
        if parking::parked(connection, key, kind, &ids).await?.is_empty() {
            telemetry.folded_ahead(key);
            Ok(folded)
        } else {
            Err(Failed::Stale)
        }
    }

    async fn plan(
        &self,
        connection: &mut PgConnection,
        batch: &Batch,
        findings: &Findings,
    ) -> Result<Plan, sqlx::Error> {
        let Partition { definition, held, .. } = &self.partition;
        let events = findings.events(batch);
        let mut known = write::load(connection, definition, events.clone()).await?;
        Ok(plan::plan(definition, held.partition, events, &mut known, &findings.condemned))
    }

    /// The checkpoint was not where we left it. It is all right only when an earlier try, whose
    /// outcome was unknown, moved it to where this one would have.
    pub(super) async fn explain(
        &self,
        connection: &mut PgConnection,
        to: Mark,
    ) -> Result<(), Failed> {
        let Partition { key, held, .. } = &self.partition;
        let stored = match checkpoint::stored(connection, key).await {
            Ok(stored) => stored,
            Err(CheckpointError::Database(error)) => return Err(Failed::Database(error)),
            Err(CheckpointError::Senseless(_)) => return Err(Failed::Displaced),
        };
        if stored.contains(&Held { mark: to, ..*held }) { Ok(()) } else { Err(Failed::Displaced) }
    }
}
