//! Idempotency keys: the first answer under a key is the answer to every repeat.
//!
//! The key is looked up and written by the call that appends, under the lock of the log's head. So of
//! two repeats that run at once, in whichever processes, one appends and the other is answered like it.

use std::time::Duration;

use consistency::{AggregateId, CommittedAt, EventId, Name};
use sqlx::{PgExecutor, PgPool};
use tokio::time::{interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::append::Appended;
use crate::log::{corrupt, log_position, version};
use crate::{ReadError, StoreConfig};

/// Between two batches of pruning: appends come first.
const PRUNE_PAUSE: Duration = Duration::from_millis(50);

/// A request that is to be done once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idempotency {
    /// SHA-256 of who asks, by which method, on which path. The same key in another scope is another.
    pub scope: [u8; 32],
    /// SHA-256 of the key that the caller gave.
    pub key: [u8; 32],
    /// SHA-256 of what is asked. Another request under the same key is refused.
    pub request: [u8; 32],
    /// By which rules the caller will make the answer's bytes, if this is the first request.
    pub answer_format: AnswerFormat,
}

/// Names the rules that make an answer's bytes out of a [`FirstAnswer`]. Those rules are a pure function
/// and are never changed, only succeeded by others, so a repeat is answered byte for byte like the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerFormat(i16);

impl AnswerFormat {
    /// The first rules.
    pub const FIRST: Self = Self(1);

    /// `None` for zero and above 32767, which a database column cannot hold.
    pub const fn new(number: u16) -> Option<Self> {
        if number == 0 || number > i16::MAX as u16 { None } else { Some(Self(number as i16)) }
    }

    /// The plain number.
    pub const fn get(self) -> u16 {
        self.0 as u16
    }

    /// For a database column.
    pub(crate) const fn as_i16(self) -> i16 {
        self.0
    }

    fn from_i16(number: i16) -> Option<Self> {
        u16::try_from(number).ok().and_then(Self::new)
    }
}

/// What came of an append under a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Once {
    /// It was the first under its key and is in the log now.
    Appended(Appended),
    /// The key was used before. Nothing was appended.
    Repeated(Repeat),
}

/// What a key that was used before says to a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Repeat {
    /// The request is the same: this is its answer.
    Replayed(FirstAnswer),
    /// The request is another one.
    Mismatched,
}

/// All that the first answer was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FirstAnswer {
    /// What was appended to.
    pub aggregate: AggregateId,
    /// What the first request was told, the same to the last member.
    pub appended: Appended,
    /// The rules that made the first answer's bytes.
    pub answer_format: AnswerFormat,
}

/// A first answer as the database holds it.
pub(crate) struct Answered {
    pub answer_format: i16,
    pub aggregate_type: String,
    pub aggregate_id: String,
    pub epoch: i32,
    pub first_version: i64,
    pub first_position: i64,
    pub event_ids: Vec<Uuid>,
    pub committed_at_micros: i64,
}

impl Answered {
    pub(crate) fn into_first_answer(self) -> Result<FirstAnswer, ReadError> {
        let position = self.first_position;
        let at = log_position(self.epoch, position)?;
        let kind = Name::new(self.aggregate_type);
        let kind = kind.map_err(|_| corrupt(position, "aggregate type of a first answer"))?;
        let aggregate = AggregateId::new(kind, self.aggregate_id);
        let answer_format = AnswerFormat::from_i16(self.answer_format);
        Ok(FirstAnswer {
            aggregate: aggregate
                .map_err(|_| corrupt(position, "aggregate id of a first answer"))?,
            appended: Appended {
                epoch: at.epoch,
                first_version: version(position, self.first_version)?,
                first_position: at.position,
                committed_at: CommittedAt::from_unix_micros(self.committed_at_micros),
                event_ids: self.event_ids.into_iter().map(EventId::new).collect(),
            },
            answer_format: answer_format.ok_or(corrupt(position, "format of a first answer"))?,
        })
    }
}

/// What the key says, if it was used.
pub(crate) async fn find(
    executor: impl PgExecutor<'_>,
    idempotency: &Idempotency,
) -> Result<Option<Repeat>, ReadError> {
    let row = sqlx::query!(
        r#"select request_hash, answer_format, aggregate_type, aggregate_id, epoch, first_version,
                  first_position, event_ids,
                  (extract(epoch from committed_at) * 1000000)::bigint as "committed_at_micros!"
           from idempotency
           where scope_hash = $1 and key_hash = $2"#,
        &idempotency.scope[..],
        &idempotency.key[..],
    )
    .fetch_optional(executor)
    .await?;
    let Some(row) = row else { return Ok(None) };
    if row.request_hash != idempotency.request {
        return Ok(Some(Repeat::Mismatched));
    }
    let answer = Answered {
        answer_format: row.answer_format,
        aggregate_type: row.aggregate_type,
        aggregate_id: row.aggregate_id,
        epoch: row.epoch,
        first_version: row.first_version,
        first_position: row.first_position,
        event_ids: row.event_ids,
        committed_at_micros: row.committed_at_micros,
    };
    Ok(Some(Repeat::Replayed(answer.into_first_answer()?)))
}

/// Forgets keys when they are old enough, in small batches. Ends when it is told to.
pub(crate) async fn prune(pool: PgPool, config: StoreConfig, stop: CancellationToken) {
    let mut due = interval(config.prune_interval);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            _ = due.tick() => {}
        }
        while !stop.is_cancelled() {
            // Dropped in the middle it would cost its connection; it is bounded instead.
            match timeout(config.statement_wait_max, prune_batch(&pool, &config)).await {
                Ok(Ok(count)) if count < u64::from(config.prune_rows_max) => break,
                Ok(Ok(_)) => sleep(PRUNE_PAUSE).await,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "could not prune idempotency keys");
                    break;
                }
                Err(_) => {
                    tracing::warn!("pruning idempotency keys took too long");
                    break;
                }
            }
        }
    }
}

async fn prune_batch(pool: &PgPool, config: &StoreConfig) -> Result<u64, sqlx::Error> {
    let pruned = sqlx::query!(
        "with due as materialized (
             select ctid as place from idempotency
             where committed_at < statement_timestamp() - make_interval(secs => $1)
             order by committed_at
             limit $2
             for update skip locked
         )
         delete from idempotency using due where ctid = due.place",
        config.idempotency_age_max.as_secs_f64(),
        i64::from(config.prune_rows_max),
    )
    .execute(pool)
    .await?;
    Ok(pruned.rows_affected())
}
