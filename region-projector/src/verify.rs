//! Whether a view holds what the log says: folds the log again, by the same rules, and compares.
//!
//! The fold goes into temporary tables of one connection, which compares them with the view's own in one
//! snapshot, at the checkpoints of that snapshot. So events may go on arriving, memory holds a page of
//! events, and the view's tables are only read.

mod sample;
mod scratch;

use std::collections::{BTreeMap, HashSet};

use consistency::{Epoch, Event, Position};
use projection::{DomainError, ProjectionDefinition};
use serde::Serialize;
use sqlx::{Connection as _, PgConnection, PgPool};

use crate::checkpoint::{self, CheckpointError, VersionKey};
use crate::dead_letters::DeadLetterError;
use crate::epochs::{self, EpochError};
use crate::log::{LogClient, LogError};
use crate::parity::{Parity, ParityError, Scope, Whose, compare_tables};
use crate::start::key_of;
use scratch::Scratch;

/// Once the fold is so close behind the view, the rest is folded while the snapshot is held.
const CLOSE_POSITIONS: i64 = 10_000;
/// A view that moves faster than the fold is not waited for longer than so many rounds.
const ROUND_COUNT_MAX: usize = 8;

/// How much is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Everything.
    Whole,
    /// So many aggregates that the view has, and as many places of the log; no sums.
    Sample(u32),
}

/// Why a view could not be verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The database.
    #[error("the database refused")]
    Database(#[from] sqlx::Error),
    /// Checkpoints.
    #[error("the checkpoints cannot be read")]
    Checkpoint(#[from] CheckpointError),
    /// Epochs.
    #[error("the region's epochs cannot be read")]
    Epochs(#[from] EpochError),
    /// The log.
    #[error("the primary's log cannot be read")]
    Log(#[from] LogError),
    /// The log is shorter than what was applied.
    #[error("the log has nothing after position {0}, but the view has")]
    Short(Position),
    /// The log left something out.
    #[error("the log goes on at position {found} after {after}")]
    Hole {
        /// What came.
        found: Position,
        /// Where it was to go on.
        after: Position,
    },
    /// Nobody has applied anything.
    #[error("{0} has no checkpoints")]
    NoCheckpoint(VersionKey),
    /// Only who wrote a custom projection knows what in its tables follows from events; and tables need names.
    #[error("it cannot be folded into tables beside its own")]
    Tables(#[from] DomainError),
    /// An event that was given up.
    #[error("a discarded event cannot be passed over")]
    Discarded(#[from] DeadLetterError),
    /// The comparison.
    #[error("what was folded cannot be compared")]
    Parity(#[from] ParityError),
    /// A state in the temporary tables is not as it was left.
    #[error("the fold lost its own state")]
    Lost,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Where the view stood, by partition.
    pub positions: Vec<i64>,
    /// Events that were folded.
    pub event_count: u64,
    /// Where fold (`one`) and view (`other`) differ.
    pub parity: Parity,
    /// Aggregates whose events cannot be folded, though the view has not parked them, and why.
    pub unfoldable: BTreeMap<String, String>,
}

impl Verified {
    /// Whether the view holds what the log says, as far as it was compared.
    pub fn is_sound(&self) -> bool {
        self.parity.is_equal() && self.unfoldable.is_empty()
    }
}

/// What of the log a view has applied, at one moment.
#[derive(Debug, Clone)]
struct Extents {
    epoch: Epoch,
    positions: Vec<i64>,
    /// The first position that is not applied, by the id of the aggregate.
    parked: BTreeMap<String, i64>,
    discarded: HashSet<i64>,
}

impl Extents {
    async fn read(
        connection: &mut PgConnection,
        definition: &ProjectionDefinition,
    ) -> Result<Self, VerifyError> {
        let key = key_of(definition);
        let stored = checkpoint::stored(connection, &key).await?;
        if stored.len() != usize::from(definition.partition_count().get()) {
            return Err(VerifyError::NoCheckpoint(key));
        }
        let parked = sqlx::query!(
            "select aggregate_id, position from parked where projection = $1 and version = $2",
            key.projection.as_str(),
            key.version_column(),
        );
        let parked = parked.fetch_all(&mut *connection).await?.into_iter();
        let discarded = sqlx::query_scalar!(
            r#"select position as "position!" from letter_decision
               where projection = $1 and version = $2
                 and decision = 'discard' and position is not null"#,
            key.projection.as_str(),
            key.version_column(),
        );
        Ok(Self {
            epoch: epochs::stored(connection).await?.current(),
            positions: stored.iter().map(|held| held.mark.position.as_i64()).collect(),
            parked: parked.map(|row| (row.aggregate_id, row.position)).collect(),
            discarded: discarded.fetch_all(connection).await?.into_iter().collect(),
        })
    }

    /// Whether the view has applied an event, or passed it over.
    fn hold(&self, definition: &ProjectionDefinition, event: &Event) -> bool {
        let Some(partition) = definition.partition_of(&event.aggregate) else { return false };
        let position = event.at.position.as_i64();
        let reached = self.positions.get(usize::from(partition)).copied().unwrap_or_default();
        let parked = self.parked.get(event.aggregate.id()).copied().unwrap_or(i64::MAX);
        position <= reached && position < parked
    }

    fn end(&self) -> i64 {
        self.positions.iter().copied().max().unwrap_or_default()
    }
}

/// What is verified, and from where.
#[derive(Debug, Clone, Copy)]
pub struct Verify<'a> {
    /// The region's database.
    pub pool: &'a PgPool,
    /// The primary's log.
    pub log: &'a LogClient,
    /// The version, over its own tables.
    pub definition: &'a ProjectionDefinition,
    /// Events of one page of the log.
    pub page_events_max: usize,
}

impl Verify<'_> {
    /// Folds and compares.
    pub async fn run(&self, extent: Extent) -> Result<Verified, VerifyError> {
        let mut connection = self.pool.acquire().await?.detach();
        // The snapshot waits for pages of the log, and a comparison reads whole tables.
        for bound in ["statement_timeout", "idle_in_transaction_session_timeout"] {
            sqlx::query("select set_config($1, '0', false)")
                .bind(bound)
                .execute(&mut connection)
                .await?;
        }
        let scratch = Scratch::create(&mut connection, self.definition).await?;
        let verified = match extent {
            Extent::Whole => self.whole(&mut connection, scratch).await,
            Extent::Sample(count) => self.sample(&mut connection, scratch, count).await,
        }?;
        connection.close().await?;
        Ok(verified)
    }

    async fn whole(
        &self,
        connection: &mut PgConnection,
        mut scratch: Scratch,
    ) -> Result<Verified, VerifyError> {
        let first = Extents::read(connection, self.definition).await?;
        let mut reached = Extents { positions: vec![0; first.positions.len()], ..first };
        for _ in 0..ROUND_COUNT_MAX {
            let wanted = Extents::read(connection, self.definition).await?;
            let distance = wanted.end() - reached.end();
            self.fold(connection, &mut scratch, &mut reached, wanted).await?;
            if distance < CLOSE_POSITIONS {
                break;
            }
        }
        let mut transaction = connection.begin().await?;
        sqlx::query("set transaction isolation level repeatable read")
            .execute(&mut *transaction)
            .await?;
        let wanted = Extents::read(&mut transaction, self.definition).await?;
        self.fold(&mut transaction, &mut scratch, &mut reached, wanted.clone()).await?;
        let verified = self.compare(&mut transaction, scratch, &wanted, None).await?;
        transaction.rollback().await?;
        Ok(verified)
    }

    /// Folds what lies between two extents.
    async fn fold(
        &self,
        connection: &mut PgConnection,
        scratch: &mut Scratch,
        reached: &mut Extents,
        wanted: Extents,
    ) -> Result<(), VerifyError> {
        // What was parked or is not any more, was folded up to another place than the view has it at.
        let is_moved = |(id, at): &(&String, &i64)| wanted.parked.get(*id) != Some(*at);
        scratch.moved.extend(reached.parked.iter().filter(is_moved).map(|(id, _)| id.clone()));
        let begin = reached.positions.iter().copied().min().unwrap_or_default();
        let (mut after, end) = (position(begin), position(wanted.end()));
        let mut page = self.page(&wanted, after, end).await?;
        while !page.is_empty() {
            after = page.last().map_or(end, |event| event.at.position);
            page.retain(|event| {
                wanted.hold(self.definition, event) && !reached.hold(self.definition, event)
            });
            let folded = scratch.fold(connection, &page, &wanted.discarded);
            let (folded, next) = tokio::join!(folded, self.page(&wanted, after, end));
            folded?;
            page = next?;
            tracing::debug!(%after, %end, "folded");
        }
        *reached = wanted;
        Ok(())
    }

    /// The next events up to a position, without a hole; none once it is reached.
    async fn page(
        &self,
        wanted: &Extents,
        after: Position,
        end: Position,
    ) -> Result<Vec<Event>, VerifyError> {
        if end <= after {
            return Ok(Vec::new());
        }
        let page = self.log.read(wanted.epoch, after, self.page_events_max).await?;
        let mut events = page.events;
        let mut last = after;
        for event in &events {
            if event.at.position.previous() != last {
                return Err(VerifyError::Hole { found: event.at.position, after: last });
            }
            last = event.at.position;
        }
        if events.is_empty() {
            return Err(VerifyError::Short(after));
        }
        events.retain(|event| event.at.position <= end);
        Ok(events)
    }

    async fn compare(
        &self,
        connection: &mut PgConnection,
        scratch: Scratch,
        at: &Extents,
        only: Option<Vec<String>>,
    ) -> Result<Verified, VerifyError> {
        let mut left_out = scratch.moved.clone();
        left_out.extend(scratch.unfoldable.keys().cloned());
        let whose = Whose { left_out: left_out.into_iter().collect(), only };
        let statements = scratch.beside(self.definition);
        let parity = compare_tables(connection, &statements, &whose, Scope::Rows).await?;
        Ok(Verified {
            positions: at.positions.clone(),
            event_count: scratch.event_count,
            parity,
            unfoldable: scratch.unfoldable,
        })
    }
}

fn position(column: i64) -> Position {
    Position::from_i64(column).unwrap_or(Position::ZERO)
}
