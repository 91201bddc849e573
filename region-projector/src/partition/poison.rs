//! Finds the aggregates whose rows the database refuses.

use std::collections::BTreeSet;

use super::failure::{Failure, classify};
use super::plan::{self, Condemned};
use super::{Batch, Partition, Running, write};
use crate::health::chain_of;
use crate::retry::bounded;

impl Running {
    /// Halves the batch's aggregates until those are found whose rows the database refuses.
    pub(super) async fn find_poison(
        &self,
        batch: &Batch,
        condemned: &Condemned,
    ) -> Result<Condemned, sqlx::Error> {
        let all: BTreeSet<&str> = batch.events.iter().map(|event| event.aggregate.id()).collect();
        let all = all.into_iter().filter(|id| !condemned.contains_key(*id)).collect();
        let mut found = Condemned::new();
        let mut suspects: Vec<Vec<&str>> = vec![all];
        while let Some(mut group) = suspects.pop() {
            let probed = bounded(self.partition.config.attempt_timeout, self.probe(batch, &group));
            let Some(refused) = probed.await? else { continue };
            match group.as_slice() {
                [] => {}
                [culprit] => {
                    found.insert((*culprit).to_owned(), refused);
                }
                [_, ..] => {
                    let other_half = group.split_off(group.len() / 2);
                    suspects.extend([group, other_half]);
                }
            }
        }
        Ok(found)
    }

    /// Writes what some aggregates of the batch would, and takes it back. Says why it was refused.
    async fn probe(
        &self,
        batch: &Batch,
        group: &[&str],
    ) -> Result<Option<(&'static str, String)>, sqlx::Error> {
        let Partition { key, definition, held, pool, .. } = &self.partition;
        let events = || batch.events.iter().filter(|event| group.contains(&event.aggregate.id()));
        let mut connection = pool.acquire().await?;
        let mut known = write::load(&mut connection, key, definition, events()).await?;
        let plan = plan::plan(definition, held.partition, events(), &mut known, &Condemned::new());
        let mut transaction = sqlx::Connection::begin(&mut *connection).await?;
        let written = write::write(&mut transaction, key, definition, held.partition, &plan).await;
        let Err(error) = written else { return transaction.rollback().await.map(|()| None) };
        match classify(&error) {
            Failure::Permanent(reason) => {
                transaction.rollback().await?;
                Ok(Some((reason, chain_of(&error))))
            }
            Failure::Transient(_) => Err(error),
        }
    }
}
