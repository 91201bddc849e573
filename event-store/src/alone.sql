/* append_events, of one command with one event and no key */
with seen as materialized (
    select event_id, xmin as writer from log_head where one
),
last as materialized (
    select epoch, version
    from event
    where aggregate_type = $6 and aggregate_id = $7
    order by version desc
    limit 1
),
moved as (
    update log_head as head
    set position = head.position + 1, event_id = $10
    from seen
    where
        head.one
        and head.log_id = $4
        and head.refused_because is null
        -- Looked at again after a wait for the lock, unlike all else that was seen: nobody wrote the head since,
        -- be it only to give this call up.
        and head.xmin = seen.writer
        and (head.epoch, head.position) >= ($1::integer, $2::bigint)
        and ($3::integer is null or head.epoch = $3)
        and not exists (select from abandoned_append where batch_id = $5)
        and (
            $9::bigint is null
            or (
                $9 = coalesce((select version from last), 0)
                and ($9 = 0 or $8::integer = (select epoch from last))
            )
        )
    returning head.epoch, head.position, seen.event_id as previous_id, clock_timestamp() as now_at
)
insert into event (
    position, epoch, id, previous_id, aggregate_type, aggregate_id, version, event_type,
    schema_version, committed_at, correlation_id, causation_id, idempotency_key_hash, traceparent,
    data
)
select
    moved.position, moved.epoch, $10, moved.previous_id, $6, $7,
    coalesce((select version from last), 0) + 1, $11, $12, moved.now_at, $13, $14, $15, $16,
    $17::text::json
from moved
returning
    epoch, version, position, (extract(epoch from committed_at) * 1000000)::bigint
    as "committed_at_micros!", previous_id
