//! Letters that an older binary could not read, applied by one that can.
//!
//! Whoever takes a partition over applies those that it knows, before anything else. What an older process
//! beside a newer one parks in the partitions that it holds is looked at now and then: the newer one
//! applies it under the lock of the checkpoint, as an operator would, and the older one goes on with what
//! it then reads there. It parks the aggregate again at the next event that it does not know, which waits
//! for the next look, so the two of them meet once in an interval at most.

use std::collections::BTreeSet;
use std::convert::Infallible;

use consistency::AggregateId;
use tokio::time::{Instant, MissedTickBehavior, interval_at};

use super::{Engine, Holdings, Shared};
use crate::attempt::{Attempt, bounded};
use crate::checkpoint::Held;
use crate::dead_letters::{self, Actor, DeadLetterError};
use crate::health::chain_of;

impl Engine {
    /// Applies what this binary knows of the letters of partitions that are held and have come to rest.
    pub(super) async fn retry_letters(&self, held: &mut Holdings) -> Result<(), DeadLetterError> {
        if held.is_empty() {
            return Ok(());
        }
        for aggregate in self.newly_known(held.keys().copied().collect()).await? {
            if let Some(taken) = self.retry_letters_of(&aggregate).await? {
                // Its fence is higher than the one that is remembered.
                held.insert(taken.partition, taken);
            }
        }
        Ok(())
    }

    /// Applies what this binary knows of all letters, every now and then.
    pub(super) async fn look_at_letters(&self) -> Infallible {
        let every = self.shared.config.letters_look_interval.get();
        let mut ticks = interval_at(Instant::now() + every, every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // Whoever looks at the checkpoints says what is wrong with the database.
            if let Err(error) = self.retry_all_letters().await {
                tracing::debug!(error = chain_of(&error), "letters not looked at");
            }
        }
    }

    async fn retry_all_letters(&self) -> Result<(), DeadLetterError> {
        let all = 0..self.definition.partition_count().get();
        for aggregate in self.newly_known(all.collect()).await? {
            self.retry_letters_of(&aggregate).await?;
        }
        Ok(())
    }

    /// Says what has become of the partition, unless nothing was done.
    async fn retry_letters_of(
        &self,
        aggregate: &AggregateId,
    ) -> Result<Option<Held>, DeadLetterError> {
        let Shared { connections, config, announcer, .. } = &self.shared;
        let actor = Actor::projector();
        let retried =
            dead_letters::retry(connections.pool(), &self.definition, aggregate, config, &actor);
        match Box::pin(retried).await {
            Ok(retried) => {
                let (taken, at) = (retried.held, retried.held.mark.position);
                announcer.announce(&self.key, &taken, at, at, &[aggregate.key()].into()).await;
                Ok(Some(taken))
            }
            Err(error @ (DeadLetterError::Database(_) | DeadLetterError::Checkpoint(_))) => {
                Err(error)
            }
            // An operator was quicker.
            Err(DeadLetterError::NotParked { .. }) => Ok(None),
            // One that cannot be read must keep neither the others nor the partition.
            Err(
                error @ (DeadLetterError::NoCheckpoint(_)
                | DeadLetterError::OtherType { .. }
                | DeadLetterError::NotFirst { .. }
                | DeadLetterError::Letter { .. }
                | DeadLetterError::Name(_)
                | DeadLetterError::Log(_)
                | DeadLetterError::TooMuchMissing { .. }
                | DeadLetterError::StateChanged),
            ) => {
                let error = chain_of(&error);
                tracing::warn!(version = %self.key, %aggregate, error, "letters cannot be retried");
                Ok(None)
            }
        }
    }

    async fn newly_known(
        &self,
        partitions: BTreeSet<u16>,
    ) -> Result<Vec<AggregateId>, DeadLetterError> {
        let Shared { connections, config, .. } = &self.shared;
        let looked = async {
            let mut attempt = Attempt::begin(connections).await?;
            let known =
                dead_letters::newly_known(&mut attempt, &self.definition, &partitions).await?;
            attempt.finish();
            Ok(known)
        };
        bounded(config.attempt_timeout, Box::pin(looked)).await
    }
}
