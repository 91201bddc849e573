//! Retries what an older binary did not know.

use std::collections::BTreeSet;

use projection::ProjectionDefinition;
use sqlx::PgPool;

use super::{Actor, DeadLetterError, parked_for, retry};
use crate::announce::Announcer;
use crate::config::ApplyConfig;
use crate::health::chain_of;
use crate::start::key_of;

/// Reasons that another binary may do away with: the kinds of
/// [`projection::ProjectionError::newer_binary_may_know`].
const REASONS: [&str; 2] = ["unknown-event-type", "unknown-schema-version"];

/// Retries every aggregate of a version that is parked for an event type or a schema version that was
/// not known. What is still not known stays as it is.
pub async fn retry_newly_known(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    config: &ApplyConfig,
    announcer: &Announcer,
) -> Result<(), DeadLetterError> {
    let key = key_of(definition);
    let reasons = REASONS.map(str::to_owned);
    for aggregate in parked_for(pool, &key, Some(&reasons)).await? {
        match retry(pool, definition, &aggregate, config, &Actor::projector()).await {
            Ok(retried) => {
                let (held, at) = (retried.held, retried.held.mark.position);
                let touched = BTreeSet::from([aggregate.key()]);
                announcer.announce(&key, &held, at, at, &touched).await;
            }
            Err(error @ (DeadLetterError::Database(_) | DeadLetterError::Checkpoint(_))) => {
                return Err(error);
            }
            // An operator was quicker.
            Err(DeadLetterError::NotParked { .. }) => {}
            // One that cannot be read must not keep the others, nor the start.
            Err(
                error @ (DeadLetterError::NoCheckpoint(_)
                | DeadLetterError::OtherType { .. }
                | DeadLetterError::NotFirst { .. }
                | DeadLetterError::Letter { .. }
                | DeadLetterError::Name(_)
                | DeadLetterError::StateChanged),
            ) => {
                let error = chain_of(&error);
                tracing::warn!(version = %key, %aggregate, error, "letters cannot be retried");
            }
        }
    }
    Ok(())
}
