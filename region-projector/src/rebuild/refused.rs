//! Aggregates whose rows could not be made of their last state, or that the database refuses. They are
//! folded once more, event by event, and parked at the first that is at fault, as a projector would.

use consistency::{Event, Position, Version};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::begin::Job;
use super::{RebuildError, Work};
use crate::breaker;
use crate::checkpoint::{self, Held};
use crate::health::chain_of;
use crate::partition::failure::{Failure, classify};
use crate::partition::plan::{self, Condemned, Refusal};
use crate::partition::write;

impl Work {
    /// Folds them one by one.
    pub(super) async fn mend_refused(&self, job: &Job) -> Result<(), RebuildError> {
        let refused = sqlx::query_scalar!(
            r#"select unnest(refused) as "id!" from rebuild_range
               where projection = $1 and version = $2"#,
            job.key.projection.as_str(),
            job.key.version_column(),
        );
        for id in refused.fetch_all(&self.pool).await? {
            Box::pin(self.mend(job, &id)).await?;
        }
        Ok(())
    }

    async fn mend(&self, job: &Job, id: &str) -> Result<(), RebuildError> {
        let kind = job.definition.aggregate_type().clone();
        let aggregate = consistency::AggregateId::new(kind, id)
            .map_err(|_| RebuildError::Displaced(job.key.clone()))?;
        let partition = job.definition.partition_for(&aggregate);
        let mut connection = self.pool.acquire().await?;
        let mut transaction = connection.begin().await?;
        let held = checkpoint::take_one(&mut transaction, &job.key, partition).await?;
        let held = held.ok_or_else(|| RebuildError::Displaced(job.key.clone()))?;
        let delete = sqlx::query(AssertSqlSafe(job.bulk.delete_state.clone())).bind(id);
        delete.execute(&mut *transaction).await?;
        for event in self.events_of(job, &aggregate, held.mark.position).await? {
            self.apply_one(&mut transaction, job, &held, &event).await?;
        }
        transaction.commit().await?;
        Ok(())
    }

    /// Everything that the log has of an aggregate up to a position.
    async fn events_of(
        &self,
        job: &Job,
        aggregate: &consistency::AggregateId,
        through: Position,
    ) -> Result<Vec<Event>, RebuildError> {
        let epoch = job.history.current();
        let mut events: Vec<Event> = Vec::new();
        loop {
            let from = events.last().map_or(Version::ZERO, |last| last.version).next();
            let page = self.log.read_aggregate(epoch, aggregate, from).await?;
            let count = events.len();
            events.extend(page.into_iter().take_while(|event| event.at.position <= through));
            if events.len() == count {
                return Ok(events);
            }
        }
    }

    async fn apply_one(
        &self,
        connection: &mut PgConnection,
        job: &Job,
        held: &Held,
        event: &Event,
    ) -> Result<(), RebuildError> {
        let mut condemned = Condemned::new();
        loop {
            let mut savepoint = connection.begin().await?;
            match self.try_one(&mut savepoint, job, held, event, &condemned).await {
                Ok(()) => {
                    savepoint.commit().await?;
                    return Ok(());
                }
                Err(RebuildError::Database(error)) if condemned.is_empty() => {
                    let Failure::Permanent(reason) = classify(&error) else {
                        return Err(error.into());
                    };
                    savepoint.rollback().await?;
                    let refusal =
                        Refusal { at: event.at.position, reason, error: chain_of(&error) };
                    condemned.insert(event.aggregate.id().to_owned(), refusal);
                }
                Err(error) => return Err(error),
            }
        }
    }

    async fn try_one(
        &self,
        connection: &mut PgConnection,
        job: &Job,
        held: &Held,
        event: &Event,
        condemned: &Condemned,
    ) -> Result<(), RebuildError> {
        let (key, definition) = (&job.key, &job.definition);
        let mut known = write::load(connection, definition, [event]).await?;
        let plan = plan::plan(definition, held.partition, [event], &mut known, condemned);
        let bound = self.config.apply_to(key.projection.as_str()).parked_aggregates_max;
        if let Some(trip) = breaker::check(connection, key, &plan.parkings, bound).await? {
            return Err(RebuildError::Tripped { key: key.clone(), trip });
        }
        let written = write::write(connection, key, definition, held.partition, &plan).await?;
        if written { Ok(()) } else { Err(RebuildError::Displaced(key.clone())) }
    }
}
