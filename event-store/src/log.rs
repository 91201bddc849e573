//! Reading the log.

use consistency::{
    AggregateId, Epoch, EpochHistory, Event, EventId, LogId, LogPosition, Name, Position,
    SchemaVersion, Traceparent, Version,
};
use sqlx::PgExecutor;
use uuid::Uuid;

use crate::ReadError;
use crate::moment::Moment;
use crate::refusal::{Refusal, RefusalKind};

/// The end of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Head {
    /// Identity of the log.
    pub log_id: LogId,
    /// Epoch and position of the last event; position zero when there is none.
    pub at: LogPosition,
    /// Id of the last event; [`EventId::NIL`] when there is none.
    pub event_id: EventId,
    /// Why appends are refused; `None` when they are taken.
    pub refused_because: Option<String>,
    /// The same as one of a few kinds.
    pub refused_kind: Option<RefusalKind>,
}

/// The end of one aggregate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AggregateHead {
    /// Version of its last event; zero when it has none.
    pub version: Version,
    /// Epoch and position of its last event; position zero of the log's epoch when it has none.
    pub at: LogPosition,
}

/// `None` when the log has not been opened yet.
pub(crate) async fn head(executor: impl PgExecutor<'_>) -> Result<Option<Head>, ReadError> {
    let row = sqlx::query!(
        "select log_id, epoch, position, event_id, refused_because, refused_kind from log_head"
    )
    .fetch_optional(executor)
    .await?;
    row.map(|row| {
        Ok(Head {
            log_id: LogId::new(row.log_id),
            at: log_position(row.epoch, row.position)?,
            event_id: EventId::new(row.event_id),
            refused_kind: row
                .refused_because
                .is_some()
                .then(|| RefusalKind::from_column(row.refused_kind.as_deref())),
            refused_because: row.refused_because,
        })
    })
    .transpose()
}

pub(crate) async fn epochs(executor: impl PgExecutor<'_>) -> Result<EpochHistory, ReadError> {
    let rows = sqlx::query!("select epoch, starts_after from epoch where epoch > 1 order by epoch")
        .fetch_all(executor)
        .await?;
    let starts: Result<Vec<_>, ReadError> = rows
        .into_iter()
        .map(|row| {
            let at = log_position(row.epoch, row.starts_after)?;
            Ok((at.epoch, at.position))
        })
        .collect();
    EpochHistory::new(starts?).ok_or(corrupt(0, "epochs do not rise one by one"))
}

pub(crate) async fn aggregate_head(
    executor: impl PgExecutor<'_>,
    aggregate: &AggregateId,
) -> Result<AggregateHead, ReadError> {
    let row = sqlx::query!(
        r#"select coalesce(last.epoch, head.epoch) as "epoch!",
                  coalesce(last.position, 0) as "position!",
                  coalesce(last.version, 0) as "version!"
           from log_head as head
           left join lateral (
               select epoch, position, version from event
               where aggregate_type = $1 and aggregate_id = $2
               order by version desc
               limit 1
           ) as last on true"#,
        aggregate.kind().as_str(),
        aggregate.id(),
    )
    .fetch_one(executor)
    .await?;
    Ok(AggregateHead {
        version: version(row.position, row.version)?,
        at: log_position(row.epoch, row.position)?,
    })
}

/// How much one read answers with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limit {
    pub events: u32,
    /// Of data; a first event always fits.
    pub bytes: i64,
}

impl Limit {
    /// Whether more events may follow than these, which is what a read within this limit found. One of
    /// fewer bytes than any bound on them, and of fewer events than were asked for, is the last: asking
    /// once more would cost a trip for each fold.
    pub(crate) fn may_have_cut(self, found: &[Event]) -> bool {
        const BYTES_WHOLE: usize = 64 * 1024;
        let bytes: usize = found.iter().map(|event| event.data.len()).sum();
        self.events as usize <= found.len() || BYTES_WHOLE < bytes
    }
}

/// The events of one aggregate from a version on, in order.
pub(crate) async fn read_aggregate(
    executor: impl PgExecutor<'_>,
    aggregate: &AggregateId,
    from: Version,
    limit: Limit,
) -> Result<Vec<Event>, ReadError> {
    let rows = sqlx::query_as!(
        Row,
        r#"select position, epoch, id, previous_id, aggregate_type, aggregate_id, version,
                  event_type, schema_version,
                  committed_at as "committed_at: Moment",
                  correlation_id, causation_id, idempotency_key_hash, traceparent,
                  data::text as "data!"
           from (
               select *,
                      sum(octet_length(data::text)) over so_far as bytes_so_far,
                      row_number() over so_far as nth
               from event
               where aggregate_type = $1 and aggregate_id = $2 and version >= $3
               window so_far as (order by version rows unbounded preceding)
               order by version
               limit $4
           ) as candidate
           where bytes_so_far <= $5 or nth = 1
           order by version"#,
        aggregate.kind().as_str(),
        aggregate.id(),
        from.as_i64(),
        i64::from(limit.events),
        limit.bytes,
    )
    .fetch_all(executor)
    .await?;
    rows.into_iter().map(Row::into_event).collect()
}

/// The id of the event at a position; nil at zero, `None` past the end.
pub(crate) async fn event_id_at(
    executor: impl PgExecutor<'_>,
    position: Position,
) -> Result<Option<EventId>, ReadError> {
    if position == Position::ZERO {
        return Ok(Some(EventId::NIL));
    }
    let id = sqlx::query_scalar!("select id from event where position = $1", position.as_i64())
        .fetch_optional(executor)
        .await?;
    Ok(id.map(EventId::new))
}

/// Has appends refused from now on, unless they are refused already or the epoch is over.
pub(crate) async fn refuse(
    executor: impl PgExecutor<'_>,
    epoch: Epoch,
    refusal: &Refusal,
) -> Result<(), ReadError> {
    sqlx::query!(
        "update log_head set refused_because = $2, refused_kind = $3
         where epoch = $1 and refused_because is null",
        epoch.as_i32(),
        refusal.because,
        refusal.kind.as_str(),
    )
    .execute(executor)
    .await?;
    Ok(())
}

/// The events after a position, in order.
pub(crate) async fn read_range(
    executor: impl PgExecutor<'_>,
    after: Position,
    limit: Limit,
) -> Result<Vec<Event>, ReadError> {
    let rows = sqlx::query_as!(
        Row,
        r#"select position, epoch, id, previous_id, aggregate_type, aggregate_id, version,
                  event_type, schema_version,
                  committed_at as "committed_at: Moment",
                  correlation_id, causation_id, idempotency_key_hash, traceparent,
                  data::text as "data!"
           from (
               select *,
                      sum(octet_length(data::text)) over (
                          order by position rows unbounded preceding
                      ) as bytes_so_far
               from event
               where position > $1
               order by position
               limit (select $2::bigint)
           ) as candidate
           where bytes_so_far <= $3 or position - 1 = $1
           order by position"#,
        after.as_i64(),
        i64::from(limit.events),
        limit.bytes,
    )
    .fetch_all(executor)
    .await?;
    rows.into_iter().map(Row::into_event).collect()
}

pub(crate) struct Row {
    pub position: i64,
    pub epoch: i32,
    pub id: Uuid,
    pub previous_id: Uuid,
    pub aggregate_type: String,
    pub aggregate_id: String,
    pub version: i64,
    pub event_type: String,
    pub schema_version: i16,
    pub committed_at: Moment,
    pub correlation_id: Uuid,
    pub causation_id: Uuid,
    pub idempotency_key_hash: Option<Vec<u8>>,
    pub traceparent: Option<String>,
    pub data: String,
}

impl Row {
    pub(crate) fn into_event(self) -> Result<Event, ReadError> {
        let at = self.position;
        let name = |text: String, what| Name::new(text).map_err(|_| corrupt(at, what));
        let kind = name(self.aggregate_type, "aggregate type")?;
        let schema_version = u16::try_from(self.schema_version).ok().and_then(SchemaVersion::new);
        let hash = self.idempotency_key_hash.map(<[u8; 32]>::try_from).transpose();
        let traceparent = match self.traceparent {
            None => None,
            Some(text) => Some(Traceparent::parse(&text).ok_or(corrupt(at, "traceparent"))?),
        };
        Ok(Event {
            at: log_position(self.epoch, at)?,
            id: EventId::new(self.id),
            previous_id: EventId::new(self.previous_id),
            aggregate: AggregateId::new(kind, self.aggregate_id)
                .map_err(|_| corrupt(at, "aggregate id"))?,
            version: version(at, self.version)?,
            event_type: name(self.event_type, "event type")?,
            schema_version: schema_version.ok_or(corrupt(at, "schema version"))?,
            committed_at: self.committed_at.0,
            correlation_id: self.correlation_id,
            causation_id: self.causation_id,
            idempotency_key_hash: hash.map_err(|_| corrupt(at, "idempotency key hash"))?,
            traceparent,
            data: self.data,
        })
    }
}

pub(crate) fn log_position(epoch: i32, position: i64) -> Result<LogPosition, ReadError> {
    let epoch = Epoch::from_i32(epoch).ok_or(corrupt(position, "epoch"))?;
    let position = Position::from_i64(position).ok_or(corrupt(0, "position"))?;
    Ok(LogPosition::new(epoch, position))
}

pub(crate) fn version(position: i64, version: i64) -> Result<Version, ReadError> {
    Version::from_i64(version).ok_or(corrupt(position, "version"))
}

pub(crate) fn corrupt(position: i64, what: &'static str) -> ReadError {
    ReadError::Corrupt { position: Position::from_i64(position).unwrap_or_default(), what }
}

/// The log was dropped while it was in use.
pub(crate) fn no_head() -> ReadError {
    corrupt(0, "the log has no head")
}

/// Makes the database the log of `log_id` unless it holds a log already; answers the log it holds.
pub(crate) async fn open(pool: &sqlx::PgPool, log_id: LogId) -> Result<Head, ReadError> {
    sqlx::query!(
        "with opened as (
             insert into log_head (log_id, epoch, position, event_id)
             values ($1, 1, 0, '00000000-0000-0000-0000-000000000000')
             on conflict do nothing
             returning epoch
         )
         insert into epoch (epoch, starts_after) select epoch, 0 from opened
         on conflict do nothing",
        log_id.get(),
    )
    .execute(pool)
    .await?;
    head(pool).await?.ok_or_else(no_head)
}
