//! One version of a projection: takes its share of the partitions, lets them run, and starts anew when
//! its share changes or the database turns out not to be what memory says.

mod letters;
mod session;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use consistency::{Adoption, Epoch, EpochHistory, LogPosition, Position};
use process::postgres::AtHand;
use projection::ProjectionDefinition;
use sqlx::PgConnection;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::announce::Announcer;
use crate::attempt::{Attempt, bounded};
use crate::breaker::{self, Trip};
use crate::chain::Broken;
use crate::checkpoint::{self, CheckpointError, Held, VersionKey};
use crate::config::ApplyConfig;
use crate::dead_letters::DeadLetterError;
use crate::epochs::{self, Epochs};
use crate::health::{Health, Part, chain_of};
use crate::log::LogClient;
use crate::reader::tail::Tail;
use crate::retry::Backoff;
use crate::sharing::rows::{self, Snapshot};
use crate::sharing::{Sharing, split::Moves};
use crate::start::key_of;
use crate::status::Status;
use crate::telemetry::Telemetry;

/// What an engine works with. All versions share it, but for `connections` and `config`.
#[derive(Clone)]
pub struct Shared {
    /// The region's database; a pool of the version's own, so that one that is stuck has no other's
    /// connections.
    pub connections: AtHand,
    /// The epochs whose newest is read.
    pub history: EpochHistory,
    /// The end of its stream.
    pub tail: Tail,
    /// Where newer ones are learnt.
    pub epochs: Epochs,
    /// The primary's log.
    pub log: LogClient,
    /// Events of one page.
    pub page_events_max: usize,
    /// Events that are read from the log at most because the stream has them no more.
    pub bridge_events_max: u64,
    /// Where the stream begins.
    pub begins: watch::Receiver<Position>,
    /// Whether the mirror is stalled.
    pub stalled: watch::Receiver<bool>,
    /// How often the log is asked for more while it is.
    pub poll_interval: Duration,
    /// Where announcements go.
    pub announcer: Announcer,
    /// Who else is there.
    pub sharing: Sharing,
    /// What was reached.
    pub status: Status,
    /// What is wrong.
    pub health: Health,
    /// What is counted.
    pub telemetry: Arc<Telemetry>,
    /// Bounds and intervals.
    pub config: ApplyConfig,
    /// What was begun gets so long to end once a stop is asked for.
    pub drain_max: Duration,
}

/// One version of a projection.
pub struct Engine {
    key: VersionKey,
    definition: ProjectionDefinition,
    shared: Shared,
}

/// What is to be done, as far as the database shows.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Aim {
    /// These partitions are to be applied here.
    Apply(BTreeSet<u16>),
    /// Nothing is, since an operator has paused the projection.
    Paused,
    /// Nothing is, since too much would be parked for a reason.
    Tripped(String),
}

/// Partitions that are held, with what memory knows of them.
type Holdings = BTreeMap<u16, Held>;

/// Why a turn ended.
#[derive(Debug, thiserror::Error)]
enum TurnError {
    #[error("checkpoints cannot be taken over")]
    Checkpoint(#[from] CheckpointError),
    #[error("{found} checkpoints for {expected} partitions")]
    Incomplete { found: usize, expected: usize },
    #[error("the process was taken for dead")]
    NotIn,
    #[error("the database is not as it was left")]
    Displaced,
    #[error("letters cannot be retried")]
    Letters(#[from] DeadLetterError),
    #[error("stopped before too much is parked")]
    Tripped(#[from] Trip),
    #[error("the log is not the one that was applied")]
    Broken(#[from] Broken),
    #[error("checkpoints are of epoch {found}, which is not known here yet")]
    Newer { found: Epoch },
    #[error(
        "events up to {stored} are applied, but epoch {epoch} kept nothing above {kept} of that epoch: \
         the read models hold what the log lost. Rebuild the projection, and switch to what is built"
    )]
    Beyond { epoch: Epoch, stored: LogPosition, kept: Position },
}

impl From<sqlx::Error> for TurnError {
    fn from(error: sqlx::Error) -> Self {
        Self::Checkpoint(error.into())
    }
}

impl Engine {
    /// Of one version.
    pub fn new(definition: ProjectionDefinition, shared: Shared) -> Self {
        Self { key: key_of(&definition), definition, shared }
    }

    /// Runs until it is stopped. After an end that another try may mend, what memory does not know any
    /// more is taken over again from the stored checkpoints; a broken chain waits for an operator.
    pub async fn run(self, stop: CancellationToken) {
        let Shared { config, health, telemetry, .. } = &self.shared;
        let mut backoff = Backoff::new(config.retry_pause_min, config.retry_pause_max);
        let mut seen = self.shared.sharing.seen();
        let mut held = Holdings::new();
        telemetry.begun(&self.key);
        while let Some(aim) = self.next_aim(&mut seen, &stop).await {
            let turn = self.turn(&aim, &mut held, &stop).await;
            let error = match turn {
                Ok(()) => {
                    backoff.reset();
                    continue;
                }
                Err(TurnError::Tripped(trip)) => match self.trip(&trip).await {
                    Ok(()) => continue,
                    Err(error) => error,
                },
                Err(error) => error,
            };
            let part = part_of(&error);
            health.unwell(part, &self.key, chain_of(&error));
            if part == Part::Chain {
                // It may be that the log goes on in another epoch: then that is read instead of this.
                self.shared.epochs.look();
                tracing::error!(
                    version = %self.key,
                    error = chain_of(&error),
                    "stopped: an operator has to decide"
                );
                return stop.cancelled().await;
            }
            telemetry.restarted(&self.key);
            if stop.run_until_cancelled(backoff.pause()).await.is_none() {
                return;
            }
        }
    }

    /// What is to be done now; waits for the first look at the database. `None` when it is stopped.
    async fn next_aim(
        &self,
        seen: &mut watch::Receiver<Option<Arc<Snapshot>>>,
        stop: &CancellationToken,
    ) -> Option<Aim> {
        let looked = seen.wait_for(Option::is_some);
        let looked = stop.run_until_cancelled(looked).await?.ok()?;
        (!stop.is_cancelled()).then(|| self.aim(looked.as_deref()))
    }

    fn aim(&self, seen: Option<&Snapshot>) -> Aim {
        let Some(seen) = seen else { return Aim::Apply(BTreeSet::new()) };
        let Self { key, definition, shared } = self;
        let name = (key.projection.to_string(), key.version_column());
        if seen.paused.contains(&name.0) {
            return Aim::Paused;
        }
        if let Some(reason) = seen.tripped.get(&name) {
            return Aim::Tripped(reason.clone());
        }
        let partition_count = definition.partition_count().get();
        if let Some(by_hand) = &shared.config.partitions {
            return Aim::Apply(by_hand.below(partition_count));
        }
        let Some(split) = seen.splits.get(&name) else { return Aim::Apply(BTreeSet::new()) };
        let me = shared.sharing.process();
        let salt = consistency::fnv1a_32(key.to_string().as_bytes());
        let Moves { take, give } = split.moves(me, partition_count, salt);
        let held = split.held_by(me);
        Aim::Apply(held.difference(&give).chain(&take).copied().collect())
    }

    /// Ends when there is something else to be done than `aim`.
    async fn aim_changed(&self, aim: &Aim) {
        let mut seen = self.shared.sharing.seen();
        // Without its keeper nothing changes any more but by a stop.
        if seen.wait_for(|seen| self.aim(seen.as_deref()) != *aim).await.is_err() {
            std::future::pending().await
        }
    }

    async fn turn(
        &self,
        aim: &Aim,
        held: &mut Holdings,
        stop: &CancellationToken,
    ) -> Result<(), TurnError> {
        match aim {
            Aim::Apply(wanted) => {
                self.settle(wanted, held).await?;
                // What is under way when it is stopped is taken back.
                let retried = stop.run_until_cancelled(self.retry_letters(held)).await;
                retried.unwrap_or(Ok(()))?;
                self.shared.health.well(Part::Database, &self.key);
                self.shared.health.well(Part::Chain, &self.key);
                self.session(aim, held, stop).await
            }
            Aim::Paused => {
                let reason = "paused by an operator";
                self.rest(aim, (Part::Paused, reason), stop).await;
                Ok(())
            }
            Aim::Tripped(reason) => {
                let said = format!("stopped before too much is parked for reason {reason}");
                self.shared.telemetry.stopped(&self.key, reason, true);
                self.rest(aim, (Part::Breaker, &said), stop).await;
                self.shared.telemetry.stopped(&self.key, reason, false);
                Ok(())
            }
        }
    }

    /// Until an operator resumes.
    async fn rest(&self, aim: &Aim, (part, reason): (Part, &str), stop: &CancellationToken) {
        let health = &self.shared.health;
        health.unwell(part, &self.key, reason);
        tracing::warn!(version = %self.key, reason, "nothing is applied until an operator resumes");
        if stop.run_until_cancelled(self.aim_changed(aim)).await.is_some() {
            tracing::info!(version = %self.key, "resumed");
        }
        health.well(part, &self.key);
    }

    /// Says in the database that the version has stopped, and waits until that is seen.
    async fn trip(&self, trip: &Trip) -> Result<(), TurnError> {
        let Shared { connections, config, sharing, .. } = &self.shared;
        tracing::error!(version = %self.key, error = %trip, "stopped: an operator has to decide");
        let said = async {
            let mut attempt = Attempt::begin(connections).await?;
            let mut transaction = sqlx::Connection::begin(&mut *attempt).await?;
            let is_accepted = breaker::trip(&mut transaction, &self.key, trip).await?;
            rows::notify(&mut transaction).await?;
            transaction.commit().await?;
            attempt.finish();
            Ok::<_, sqlx::Error>(is_accepted)
        };
        let is_accepted = bounded(config.attempt_timeout, Box::pin(said)).await?;
        if !is_accepted {
            sharing.look();
            let mut seen = sharing.seen();
            let applied = |seen: &Option<Arc<Snapshot>>| {
                matches!(self.aim(seen.as_deref()), Aim::Paused | Aim::Tripped(_))
            };
            // Whoever resumes at once may be quicker than the look.
            let _ = timeout(config.retry_pause_max.get(), seen.wait_for(applied)).await;
        }
        Ok(())
    }

    /// Takes what is wanted and free, and gives up what is not wanted any more; it has come to rest.
    /// What memory knows of a partition that stays is as good as before.
    async fn settle(&self, wanted: &BTreeSet<u16>, held: &mut Holdings) -> Result<(), TurnError> {
        let settled = self.try_settle(wanted, held);
        let settled = bounded(self.shared.config.attempt_timeout, Box::pin(settled)).await?;
        *held = settled;
        Ok(())
    }

    async fn try_settle(
        &self,
        wanted: &BTreeSet<u16>,
        held: &Holdings,
    ) -> Result<Holdings, TurnError> {
        let Shared { connections, sharing, config, .. } = &self.shared;
        let mut attempt = Attempt::begin(connections).await?;
        let mut transaction = sqlx::Connection::begin(&mut *attempt).await?;
        let me = sharing.process();
        let mine = if config.partitions.is_some() {
            rows::seize(&mut transaction, me, &self.key, wanted).await?;
            wanted.clone()
        } else if let Some(mine) = rows::settle(&mut transaction, me, &self.key, wanted).await? {
            mine
        } else {
            sharing.look();
            return Err(TurnError::NotIn);
        };
        let mut settled = match self.adopt(&mut transaction).await? {
            // Memory knows nothing of the checkpoints as they are now.
            Adoption::InPlace => Holdings::new(),
            Adoption::Here | Adoption::Beyond { .. } | Adoption::Newer(_) => held.clone(),
        };
        settled.retain(|partition, _| mine.contains(partition));
        let missing: BTreeSet<u16> =
            mine.into_iter().filter(|partition| !settled.contains_key(partition)).collect();
        let taken = checkpoint::take(&mut transaction, &self.key, &missing).await?;
        if taken.len() != missing.len() {
            return Err(TurnError::Incomplete { found: taken.len(), expected: missing.len() });
        }
        transaction.commit().await?;
        attempt.finish();
        if !taken.is_empty() {
            tracing::info!(version = %self.key, partitions = ?missing, "partitions taken over");
        }
        settled.extend(taken.into_iter().map(|held| (held.partition, held)));
        Ok(settled)
    }

    /// Has all checkpoints of the version count in the epoch that is read, those of others too.
    async fn adopt(&self, connection: &mut PgConnection) -> Result<Adoption, TurnError> {
        let history = &self.shared.history;
        match epochs::adopt(connection, &self.key, history).await? {
            Adoption::Beyond { stored, kept } => {
                Err(TurnError::Beyond { epoch: history.current(), stored, kept })
            }
            Adoption::Newer(found) => Err(TurnError::Newer { found }),
            fit @ (Adoption::Here | Adoption::InPlace) => Ok(fit),
        }
    }
}

fn part_of(error: &TurnError) -> Part {
    match error {
        TurnError::Letters(_)
        | TurnError::Checkpoint(_)
        | TurnError::Incomplete { .. }
        | TurnError::NotIn
        | TurnError::Tripped(_)
        | TurnError::Displaced => Part::Database,
        TurnError::Broken(_) | TurnError::Newer { .. } | TurnError::Beyond { .. } => Part::Chain,
    }
}
