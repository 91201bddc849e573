//! States of long aggregates: read together with the events that follow, and kept in the background.

use std::time::Duration;

use consistency::{AggregateId, Event, EventId, FoldName, FoldSnapshot, Version};
use sqlx::{PgExecutor, PgPool};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::ReadError;
use crate::log::{self, Limit, Row, corrupt, log_position};
use crate::moment::Moment;

/// Most states that wait to be kept. One that finds no room is made again by a later fold.
pub(crate) const SNAPSHOTS_WAITING_MAX: usize = 16;

/// What an aggregate's state is folded from.
#[derive(Debug)]
pub struct Tail {
    /// The state to begin with; `None` to begin with nothing.
    pub snapshot: Option<FoldSnapshot>,
    /// What follows it, in order.
    pub events: Vec<Event>,
    /// How many events were read, the snapshot's own and those of a vain attempt among them.
    pub events_read: u32,
    /// Whether the aggregate may have more events than these.
    pub is_cut: bool,
    /// The digest of what was found and not used.
    pub unusable: Option<[u8; 32]>,
}

/// A state that is to be kept.
#[derive(Debug)]
pub struct Keep {
    /// Of what.
    pub aggregate: AggregateId,
    /// Made by which rules.
    pub fold: FoldName,
    /// The state.
    pub snapshot: FoldSnapshot,
    /// The digest of one that was found unusable and is to make room, however new it says it is.
    pub replaces: Option<[u8; 32]>,
}

/// What a query found: the snapshot, and events from its own on if the log has one of that version.
struct Found {
    snapshot: Option<(FoldSnapshot, Vec<u8>)>,
    events: Vec<Event>,
}

/// The newest usable snapshot and the events after it, at most `limit`.
pub(crate) async fn read_tail(
    pool: &PgPool,
    aggregate: &AggregateId,
    fold: &FoldName,
    limit: Limit,
) -> Result<Tail, ReadError> {
    let Found { snapshot, mut events } = find(pool, aggregate, fold, limit).await?;
    let events_read = events.len() as u32;
    let is_cut = limit.may_have_cut(&events);
    let Some((snapshot, digest)) = snapshot else {
        return Ok(Tail { snapshot: None, events, events_read, is_cut, unusable: None });
    };
    let is_whole = digest == snapshot.digest(fold, aggregate);
    if is_whole && events.first().is_some_and(|first| snapshot.ends_with(first)) {
        events.remove(0);
        return Ok(Tail { snapshot: Some(snapshot), events, events_read, is_cut, unusable: None });
    }
    tracing::warn!(
        aggregate_type = %aggregate.kind(),
        aggregate_id = aggregate.id(),
        fold = fold.text(),
        is_whole,
        "a snapshot is not of this log, the aggregate is folded from its first event"
    );
    let unusable = digest.try_into().ok();
    if events.first().is_none_or(|first| first.version == Version::ZERO.next()) {
        return Ok(Tail { snapshot: None, events, events_read, is_cut, unusable });
    }
    let tail = read_on(pool, aggregate, Version::ZERO.next(), limit).await?;
    Ok(Tail { unusable, events_read: events_read + tail.events_read, ..tail })
}

/// The aggregate's events from a version on.
pub(crate) async fn read_on(
    pool: &PgPool,
    aggregate: &AggregateId,
    from: Version,
    limit: Limit,
) -> Result<Tail, ReadError> {
    let events = log::read_aggregate(pool, aggregate, from, limit).await?;
    let events_read = events.len() as u32;
    let is_cut = limit.may_have_cut(&events);
    Ok(Tail { snapshot: None, events, events_read, is_cut, unusable: None })
}

/// One statement: the snapshot, and the events from its own on, or from the first when there is none, or
/// when the log has no event of its version any more.
async fn find(
    executor: impl PgExecutor<'_>,
    aggregate: &AggregateId,
    fold: &FoldName,
    limit: Limit,
) -> Result<Found, ReadError> {
    let rows = sqlx::query_as!(
        TailRow,
        r#"with snapshot as (
               select version, epoch, position, event_id, created_position, state, digest
               from fold_snapshot
               where aggregate_type = $1 and aggregate_id = $2 and fold = $5 and fold_version = $6
           )
           select candidate.position, candidate.epoch, id, previous_id, aggregate_type, aggregate_id,
                  candidate.version, event_type, schema_version,
                  committed_at as "committed_at: Moment",
                  correlation_id, causation_id, idempotency_key_hash, traceparent,
                  data::text as "data!",
                  snapshot.version as "snapshot_version?", snapshot.epoch as "snapshot_epoch?", snapshot.position as "snapshot_position?",
                  snapshot.event_id as "snapshot_event_id?",
                  snapshot.created_position as "snapshot_created?",
                  snapshot.state as "snapshot_state?", snapshot.digest as "snapshot_digest?"
           from (
               select *,
                      sum(octet_length(data::text)) over so_far as bytes_so_far,
                      row_number() over so_far as nth
               from event
               where aggregate_type = $1 and aggregate_id = $2
                   and version >= coalesce(
                       (select snapshot.version from snapshot
                        where exists (
                            select from event as own
                            where own.aggregate_type = $1 and own.aggregate_id = $2
                                and own.version = snapshot.version
                        )),
                       1
                   )
               window so_far as (order by version rows unbounded preceding)
               order by version
               limit $3
           ) as candidate
           left join snapshot on nth = 1
           where bytes_so_far <= $4 or nth = 1
           order by candidate.version"#,
        aggregate.kind().as_str(),
        aggregate.id(),
        i64::from(limit.events),
        limit.bytes,
        fold.text(),
        i32::try_from(fold.version).unwrap_or(i32::MAX),
    )
    .fetch_all(executor)
    .await?;
    let snapshot = rows.first().map(TailRow::snapshot).transpose()?.flatten();
    let events = rows.into_iter().map(|row| row.event().into_event());
    Ok(Found { snapshot, events: events.collect::<Result<_, _>>()? })
}

/// An event; beside the first stands the snapshot.
struct TailRow {
    position: i64,
    epoch: i32,
    id: Uuid,
    previous_id: Uuid,
    aggregate_type: String,
    aggregate_id: String,
    version: i64,
    event_type: String,
    schema_version: i16,
    committed_at: Moment,
    correlation_id: Uuid,
    causation_id: Uuid,
    idempotency_key_hash: Option<Vec<u8>>,
    traceparent: Option<String>,
    data: String,
    snapshot_version: Option<i64>,
    snapshot_epoch: Option<i32>,
    snapshot_position: Option<i64>,
    snapshot_event_id: Option<Uuid>,
    snapshot_created: Option<i64>,
    snapshot_state: Option<String>,
    snapshot_digest: Option<Vec<u8>>,
}

impl TailRow {
    /// The snapshot and the digest that stands beside it.
    fn snapshot(&self) -> Result<Option<(FoldSnapshot, Vec<u8>)>, ReadError> {
        let place = (self.snapshot_version, self.snapshot_epoch, self.snapshot_position);
        let rest = (self.snapshot_event_id, self.snapshot_created, &self.snapshot_digest);
        let (
            (Some(version), Some(epoch), Some(position)),
            (Some(event_id), Some(created), Some(digest)),
        ) = (place, rest)
        else {
            return Ok(None);
        };
        let snapshot = FoldSnapshot {
            version: log::version(position, version)?,
            at: log_position(epoch, position)?,
            event_id: EventId::new(event_id),
            created: log_position(epoch, created)?.position,
            state: self.snapshot_state.clone(),
        };
        Ok(Some((snapshot, digest.clone())))
    }

    fn event(self) -> Row {
        Row {
            position: self.position,
            epoch: self.epoch,
            id: self.id,
            previous_id: self.previous_id,
            aggregate_type: self.aggregate_type,
            aggregate_id: self.aggregate_id,
            version: self.version,
            event_type: self.event_type,
            schema_version: self.schema_version,
            committed_at: self.committed_at,
            correlation_id: self.correlation_id,
            causation_id: self.causation_id,
            idempotency_key_hash: self.idempotency_key_hash,
            traceparent: self.traceparent,
            data: self.data,
        }
    }
}

/// Keeps what comes, one after the other. Ends when it is told to; what waits then is dropped.
pub(crate) async fn keep(
    pool: PgPool,
    mut waiting: mpsc::Receiver<Keep>,
    statement_wait_max: Duration,
    stop: CancellationToken,
) {
    loop {
        let next = tokio::select! {
            biased;
            () = stop.cancelled() => return,
            next = waiting.recv() => next,
        };
        let Some(next) = next else { return };
        // Dropped in the middle it would cost its connection; it is bounded instead.
        match timeout(statement_wait_max, write(&pool, &next)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "could not keep a snapshot"),
            Err(_) => tracing::warn!("keeping a snapshot took too long"),
        }
    }
}

/// Writes it unless there is a newer one, and forgets those of rules that are older than the ones before
/// these: a release runs beside its predecessor, not beside that one's.
async fn write(pool: &PgPool, keep: &Keep) -> Result<(), ReadError> {
    let Keep { aggregate, fold, snapshot, replaces } = keep;
    let digest = snapshot.digest(fold, aggregate);
    sqlx::query!(
        "with forgotten as (
             delete from fold_snapshot
             where aggregate_type = $1 and aggregate_id = $2 and fold = $3 and fold_version < $4 - 1
         )
         insert into fold_snapshot as kept (
             aggregate_type, aggregate_id, fold, fold_version, version, epoch, position, event_id,
             created_position, state, digest
         )
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)
         on conflict (aggregate_type, aggregate_id, fold, fold_version) do update
         set version = excluded.version, epoch = excluded.epoch, position = excluded.position,
             event_id = excluded.event_id, created_position = excluded.created_position,
             state = excluded.state, digest = excluded.digest
         where kept.version < excluded.version or kept.digest = $12",
        aggregate.kind().as_str(),
        aggregate.id(),
        fold.text(),
        i32::try_from(fold.version).map_err(|_| corrupt(0, "fold version"))?,
        snapshot.version.as_i64(),
        snapshot.at.epoch.as_i32(),
        snapshot.at.position.as_i64(),
        snapshot.event_id.get(),
        snapshot.created.as_i64(),
        snapshot.state.as_deref(),
        &digest[..],
        replaces.as_ref().map(<[u8; 32]>::as_slice),
    )
    .execute(pool)
    .await?;
    Ok(())
}
