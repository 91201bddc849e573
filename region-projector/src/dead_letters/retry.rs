//! Applies the letters of an aggregate, in order.

use consistency::{AggregateId, Event, Position};
use projection::ProjectionDefinition;
use serde::Serialize;
use sqlx::{Connection, PgConnection, PgPool};

use super::decision::{Actor, Outcome, record};
use super::{DeadLetter, DeadLetterError, event_of, letters, open, park_at, remove, unpark};
use crate::attempt::bounded;
use crate::checkpoint::{Held, VersionKey};
use crate::config::ApplyConfig;
use crate::health::chain_of;
use crate::partition::failure::{Failure, classify};
use crate::partition::plan::{self, Condemned};
use crate::partition::write;
use crate::start::key_of;

/// What a retry did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Retried {
    /// The partition as it was taken over; its checkpoint has not moved.
    pub held: Held,
    /// Letters that are applied, or were before, and are letters no more.
    pub applied_count: usize,
    /// What failed again; `None` when the aggregate is not parked any more.
    pub stopped: Option<StillParked>,
}

/// The letter that failed again. It and the later ones are where they were.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StillParked {
    /// Where its event stands in the log.
    pub position: Position,
    /// Why, out of a closed set.
    pub reason: &'static str,
    /// Why, for operators.
    pub error: String,
}

/// Applies the letters of a parked aggregate in one transaction and un-parks it, or goes as far as it
/// can. The caller announces the aggregate's key. Every page of letters has the deadline of an attempt.
pub async fn retry(
    pool: &PgPool,
    definition: &ProjectionDefinition,
    aggregate: &AggregateId,
    config: &ApplyConfig,
    actor: &Actor,
) -> Result<Retried, DeadLetterError> {
    let mut connection = pool.acquire().await?;
    let mut transaction = connection.begin().await?;
    let held = bounded(config.attempt_timeout, open(&mut transaction, definition, aggregate));
    let held = held.await?;
    let key = key_of(definition);
    let first = letters(&mut transaction, &key, aggregate, 1).await?;
    let mut retrying = Retrying { definition, aggregate, held, connection: &mut transaction };
    let mut applied_count = 0;
    let stopped = loop {
        let page = retrying.page(config.batch_events_max);
        match bounded(config.attempt_timeout, page).await? {
            Page::End => break None,
            Page::Applied(count) => applied_count += count,
            Page::Stopped(count, stopped) => {
                applied_count += count;
                break Some(stopped);
            }
        }
    };
    let outcome = Outcome::Retried {
        position: first.first().map(|letter| letter.position),
        applied_count,
        stopped_by: stopped.as_ref().map(|stopped| stopped.reason),
    };
    record(&mut transaction, actor, &key, aggregate, outcome).await?;
    transaction.commit().await?;
    match &stopped {
        None => tracing::info!(version = %key, %aggregate, applied_count, "aggregate un-parked"),
        Some(StillParked { position, reason, .. }) => {
            tracing::warn!(version = %key, %aggregate, %position, reason, "aggregate still parked");
        }
    }
    Ok(Retried { held, applied_count, stopped })
}

enum Page {
    /// No letter is left.
    End,
    /// So many were applied.
    Applied(usize),
    /// The one after so many was not.
    Stopped(usize, StillParked),
}

/// How far a run of events came.
struct Run {
    applied_count: usize,
    refused: Option<Refused>,
}

/// Why the next event is not applied.
struct Refused {
    reason: &'static str,
    error: String,
}

struct Retrying<'a> {
    definition: &'a ProjectionDefinition,
    aggregate: &'a AggregateId,
    held: Held,
    connection: &'a mut PgConnection,
}

impl Retrying<'_> {
    async fn page(&mut self, count_max: usize) -> Result<Page, DeadLetterError> {
        let key = key_of(self.definition);
        let count_max = i64::try_from(count_max).unwrap_or(i64::MAX);
        let letters = letters(self.connection, &key, self.aggregate, count_max).await?;
        if letters.is_empty() {
            unpark(self.connection, &key, self.aggregate).await?;
            return Ok(Page::End);
        }
        let events = letters.iter().map(event_of).collect::<Result<Vec<_>, _>>()?;
        let Run { applied_count, refused } = self.apply(&events).await?;
        let applied: Vec<i64> = letters.iter().map(|letter| letter.position).collect();
        remove(self.connection, &key, &applied[..applied_count]).await?;
        let Some((refused, event)) = refused.zip(events.get(applied_count)) else {
            return Ok(Page::Applied(applied_count));
        };
        let Refused { reason, error } = refused;
        park_at(self.connection, &key, event, reason).await?;
        explain(self.connection, &key, &letters[applied_count], &error).await?;
        let position = event.at.position;
        Ok(Page::Stopped(applied_count, StillParked { position, reason, error }))
    }

    /// All at once as the worker would; one by one when nothing comes of it, to find out which is at
    /// fault: the database may refuse all for one of them, and a sum may be too large for all.
    async fn apply(&mut self, events: &[Event]) -> Result<Run, DeadLetterError> {
        match self.attempt(events).await? {
            Ok(run) if run.refused.is_none() || 0 < run.applied_count => return Ok(run),
            Ok(Run { refused: Some(refused), .. }) | Err(refused) if events.len() <= 1 => {
                return Ok(Run { applied_count: 0, refused: Some(refused) });
            }
            Ok(_) | Err(_) => {}
        }
        for (applied_count, event) in events.iter().enumerate() {
            let refused = match self.attempt(std::slice::from_ref(event)).await? {
                Ok(run) => run.refused,
                Err(refused) => Some(refused),
            };
            if refused.is_some() {
                return Ok(Run { applied_count, refused });
            }
        }
        Ok(Run { applied_count: events.len(), refused: None })
    }

    /// Writes what the events do, or nothing when the database refuses it.
    async fn attempt(&mut self, events: &[Event]) -> Result<Result<Run, Refused>, DeadLetterError> {
        let (key, partition) = (key_of(self.definition), self.held.partition);
        let mut savepoint = self.connection.begin().await?;
        let mut known = write::load(&mut savepoint, self.definition, events).await?;
        known.parked.clear();
        let mut plan =
            plan::plan(self.definition, partition, events, &mut known, &Condemned::new());
        let letters = std::mem::take(&mut plan.letters);
        let parking = std::mem::take(&mut plan.parkings).into_iter().next();
        let refused = parking.zip(letters.first()).map(|(parking, letter)| Refused {
            reason: parking.reason,
            error: letter.error.clone(),
        });
        let run = Run { applied_count: events.len() - letters.len(), refused };
        match write::write(&mut savepoint, &key, self.definition, partition, &plan).await {
            Ok(true) => {}
            Ok(false) => return Err(DeadLetterError::StateChanged),
            Err(error) => {
                return match classify(&error) {
                    Failure::Permanent(reason) => {
                        savepoint.rollback().await?;
                        Ok(Err(Refused { reason, error: chain_of(&error) }))
                    }
                    Failure::Transient(_) => Err(error.into()),
                };
            }
        }
        savepoint.commit().await?;
        Ok(Ok(run))
    }
}

/// Says at the letter why it failed this time.
async fn explain(
    connection: &mut PgConnection,
    key: &VersionKey,
    letter: &DeadLetter,
    error: &str,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "update dead_letter set error = $4
         where projection = $1 and version = $2 and position = $3",
        key.projection.as_str(),
        key.version_column(),
        letter.position,
        error.replace('\0', "\u{fffd}"),
    )
    .execute(connection)
    .await?;
    Ok(())
}
