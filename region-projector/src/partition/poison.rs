//! Finds the aggregates whose rows the database refuses, and the first event of each that makes such.

use std::collections::BTreeSet;

use consistency::Event;
use sqlx::{Connection as _, PgConnection};

use super::failure::{Failure, classify};
use super::plan::{self, Condemned, Refusal};
use super::{Batch, Findings, Partition, Running, write};
use crate::attempt::{Attempt, bounded};
use crate::health::chain_of;

impl Running {
    /// Halves the batch's aggregates until those are found whose rows the database refuses, then
    /// applies the events of each one by one: what is parked is the same however they were batched.
    pub(super) async fn find_poison(
        &self,
        batch: &Batch,
        findings: &Findings,
    ) -> Result<Condemned, sqlx::Error> {
        let all: BTreeSet<&str> = batch.events.iter().map(|event| event.aggregate.id()).collect();
        let open = |id: &&str| !findings.condemned.contains_key(*id);
        let mut found = Condemned::new();
        let mut suspects: Vec<Vec<&str>> = vec![all.into_iter().filter(open).collect()];
        while let Some(mut group) = suspects.pop() {
            let events = findings.events(batch);
            let events = events.filter(|event| group.contains(&event.aggregate.id())).collect();
            // At once, to see whether it is any of them.
            let Some(refusal) = self.probe(&[events]).await? else { continue };
            match group.as_slice() {
                [] => {}
                [culprit] => {
                    let events = findings.events(batch);
                    let events = events.filter(|event| event.aggregate.id() == *culprit);
                    let each: Vec<Vec<&Event>> = events.map(|event| vec![event]).collect();
                    let first = match each.len() {
                        0 | 1 => Some(refusal),
                        _ => self.probe(&each).await?,
                    };
                    found.extend(first.map(|refusal| ((*culprit).to_owned(), refusal)));
                }
                [_, ..] => {
                    let other_half = group.split_off(group.len() / 2);
                    suspects.extend([group, other_half]);
                }
            }
        }
        Ok(found)
    }

    /// Writes what these events would, one run after the other, and takes it back. Says which run is
    /// the first to be refused, by its first event, and why.
    async fn probe(&self, runs: &[Vec<&Event>]) -> Result<Option<Refusal>, sqlx::Error> {
        bounded(self.partition.config.attempt_timeout, async {
            let mut attempt = Attempt::begin(&self.partition.connections).await?;
            let mut transaction = attempt.connection().begin().await?;
            for run in runs {
                let Some(first) = run.first() else { continue };
                let Err(error) = self.try_run(&mut transaction, run).await else { continue };
                let Failure::Permanent(reason) = classify(&error) else { return Err(error) };
                transaction.rollback().await?;
                attempt.finish();
                let error = chain_of(&error);
                return Ok(Some(Refusal { at: first.at.position, reason, error }));
            }
            transaction.rollback().await?;
            attempt.finish();
            Ok(None)
        })
        .await
    }

    async fn try_run(
        &self,
        connection: &mut PgConnection,
        run: &[&Event],
    ) -> Result<bool, sqlx::Error> {
        let Partition { key, definition, held, .. } = &self.partition;
        let events = || run.iter().copied();
        let mut known = write::load(connection, definition, events()).await?;
        let none = Condemned::new();
        let plan = plan::plan(definition, held.partition, events(), &mut known, &none);
        write::write(connection, key, definition, held.partition, &plan).await
    }
}
