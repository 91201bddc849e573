//! Opening a new epoch: the operator's way on when log and stream contradict each other.

use consistency::{Epoch, LogId, LogPosition, Position};
use sqlx::{PgConnection, PgPool};

use crate::ReadError;
use crate::log::{self, Head, log_position};

/// Where a new epoch is to begin, as the operator says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewEpoch {
    /// The last position of the past that is kept.
    pub after: Position,
    /// Whether to open it although appends are taken.
    pub force: bool,
    /// What to do with events above `after`.
    pub above: Above,
}

/// What to do with events above the last position that is kept of the past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Above {
    /// Open nothing: the operator is mistaken about where the log ends.
    Refuse,
    /// They become the new epoch's first. For a log that lost its tail and grew on before that was
    /// noticed: the positions were used twice, so only a new epoch can tell one use from the other. Tokens
    /// for them from the old epoch count as lost, as the other use's have to.
    Carry,
}

/// Why no epoch was opened. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum NewEpochError {
    /// The database holds another log.
    #[error("the database holds log {found}, not {wanted}")]
    OtherLog {
        /// The id in the database.
        found: LogId,
        /// The id that was asked for.
        wanted: LogId,
    },
    /// Nothing is wrong with the log.
    #[error("the log takes appends; a new epoch is for one that refuses them")]
    NotRefused,
    /// There are events above the position.
    #[error("the log goes on after {after}, up to {head}")]
    GoesOn {
        /// Where the epoch was to begin.
        after: Position,
        /// Where the log ends.
        head: LogPosition,
    },
    /// The log ends before the position. Positions have no holes.
    #[error("the log ends at {head}, before {after}")]
    EndsBefore {
        /// Where the epoch was to begin.
        after: Position,
        /// Where the log ends.
        head: LogPosition,
    },
    /// The log could not be read or written.
    #[error("the log's database could not open an epoch")]
    Database(#[from] ReadError),
}

impl From<sqlx::Error> for NewEpochError {
    fn from(error: sqlx::Error) -> Self {
        Self::Database(ReadError::Unavailable(error))
    }
}

/// An epoch as the log has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedEpoch {
    /// Its number.
    pub epoch: Epoch,
    /// The last position that it kept of its past; zero for the first.
    pub starts_after: Position,
    /// When it was opened, by the database's clock, as RFC 3339 writes it in UTC.
    pub opened_at: String,
}

/// The end of the log and its epochs, oldest first, the first included. `None` when the database holds
/// no log yet.
pub async fn list_epochs(pool: &PgPool) -> Result<Option<(Head, Vec<OpenedEpoch>)>, ReadError> {
    let Some(head) = log::head(pool).await? else { return Ok(None) };
    let rows = sqlx::query!(
        r#"select epoch, starts_after,
                  to_char(opened_at at time zone 'utc', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') as "opened_at!"
           from epoch order by epoch"#
    )
    .fetch_all(pool)
    .await?;
    let epochs = rows.into_iter().map(|row| {
        let at = log_position(row.epoch, row.starts_after)?;
        let opened_at = row.opened_at;
        Ok(OpenedEpoch { epoch: at.epoch, starts_after: at.position, opened_at })
    });
    Ok(Some((head, epochs.collect::<Result<_, ReadError>>()?)))
}

/// Opens a new epoch in one transaction, has appends taken again, and answers the end of the log. No
/// event is deleted. The relay then retires the stream of the epoch before and begins another.
pub async fn open_epoch(
    pool: &PgPool,
    log_id: LogId,
    new: NewEpoch,
) -> Result<LogPosition, NewEpochError> {
    let mut transaction = pool.begin().await?;
    // What is read below stays true until the end: nobody appends without this lock.
    sqlx::query!("select from log_head where one for update").execute(&mut *transaction).await?;
    let head = log::head(&mut *transaction).await?.ok_or_else(log::no_head)?;
    if head.log_id != log_id {
        return Err(NewEpochError::OtherLog { found: head.log_id, wanted: log_id });
    }
    check(new, &head)?;
    let epoch = open(&mut transaction, new.after).await?;
    transaction.commit().await?;
    tracing::warn!(%epoch, after = %new.after, "opened a new epoch");
    Ok(LogPosition::new(epoch, head.at.position))
}

fn check(new: NewEpoch, head: &Head) -> Result<(), NewEpochError> {
    let NewEpoch { after, force, above } = new;
    let head_at = head.at;
    if head.refused_because.is_none() && !force {
        return Err(NewEpochError::NotRefused);
    }
    if head_at.position < after {
        return Err(NewEpochError::EndsBefore { after, head: head_at });
    }
    match above {
        Above::Refuse if after < head_at.position => {
            Err(NewEpochError::GoesOn { after, head: head_at })
        }
        Above::Refuse | Above::Carry => Ok(()),
    }
}

async fn open(connection: &mut PgConnection, after: Position) -> Result<Epoch, NewEpochError> {
    let head = sqlx::query!(
        "update log_head set epoch = epoch + 1, refused_because = null, refused_kind = null
         where one
         returning epoch, position",
    )
    .fetch_one(&mut *connection)
    .await?;
    sqlx::query!(
        "insert into epoch (epoch, starts_after) values ($1, $2)",
        head.epoch,
        after.as_i64()
    )
    .execute(&mut *connection)
    .await?;
    sqlx::query!("update event set epoch = $1 where position > $2", head.epoch, after.as_i64())
        .execute(&mut *connection)
        .await?;
    // A repeat gets the claim of the first answer, which would be lost in the epoch that the first was
    // given in: what it names goes on in the new one.
    sqlx::query!(
        "update idempotency set epoch = $1
         where first_position + cardinality(event_ids) - 1 > $2",
        head.epoch,
        after.as_i64()
    )
    .execute(&mut *connection)
    .await?;
    Ok(log_position(head.epoch, head.position)?.epoch)
}
