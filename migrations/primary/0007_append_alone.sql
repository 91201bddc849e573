-- A command that is appended alone, as where there is little to do, needs none of what tells many apart.
-- Planning and running that took longer than the rest of its commit.

-- As before, for callers before and after.
create or replace function append_events_once_guarded(
    seen_epoch integer,
    seen_position bigint,
    judged_epoch integer,
    in_log_id uuid,
    in_batch_id uuid,
    aggregate_types text[],
    aggregate_ids text[],
    expected_epochs integer[],
    expected_versions bigint[],
    event_counts integer[],
    event_ids uuid[],
    event_aggregate_types text[],
    event_aggregate_ids text[],
    event_types text[],
    schema_versions smallint[],
    correlation_ids uuid[],
    causation_ids uuid[],
    idempotency_key_hashes bytea[],
    traceparents text[],
    event_data text[],
    scope_hashes bytea[],
    key_hashes bytea[],
    request_hashes bytea[],
    answer_formats smallint[]
) returns table (
    command_number integer,
    outcome text,
    at_epoch integer,
    at_version bigint,
    at_position bigint,
    committed_at_micros bigint,
    first_answer idempotency
)
language plpgsql
as $$
declare
    head log_head;
    last_epoch integer;
    last_version bigint;
    last_position bigint;
    now_at timestamptz;
begin
    select * into head from log_head where one for update;
    -- Whatever else is wrong is said below, an earlier refusal included.
    if found and head.log_id = in_log_id and head.refused_because is null then
        if (head.epoch, head.position) < (seen_epoch, seen_position) then
            raise exception 'the log ends at %.%, but it was seen to end at %.%: it lost its tail',
                head.epoch, head.position, seen_epoch, seen_position using errcode = 'TM005';
        end if;
        if head.epoch <> judged_epoch then
            raise exception 'the log is in epoch %', head.epoch using errcode = 'TM004';
        end if;
        if cardinality(event_ids) = 1 and cardinality(aggregate_ids) = 1
            and cardinality(key_hashes) = 0
            and not exists (select from abandoned_append as a where a.batch_id = in_batch_id)
        then
            now_at := clock_timestamp();
            command_number := 1;
            committed_at_micros := (extract(epoch from now_at) * 1000000)::bigint;
            select e.epoch, e.version, e.position
            into last_epoch, last_version, last_position
            from event as e
            where e.aggregate_type = aggregate_types[1] and e.aggregate_id = aggregate_ids[1]
            order by e.version desc
            limit 1;
            if not found then
                last_epoch := head.epoch;
                last_version := 0;
                last_position := 0;
            end if;
            if expected_versions[1] is null
                or (expected_versions[1] = last_version
                    and (last_version = 0 or expected_epochs[1] = last_epoch))
            then
                outcome := 'appended';
                at_epoch := head.epoch;
                at_version := last_version + 1;
                at_position := head.position + 1;
                insert into event (
                    position, epoch, id, previous_id, aggregate_type, aggregate_id, version,
                    event_type, schema_version, committed_at, correlation_id, causation_id,
                    idempotency_key_hash, traceparent, data
                ) values (
                    at_position, at_epoch, event_ids[1], head.event_id, aggregate_types[1],
                    aggregate_ids[1], at_version, event_types[1], schema_versions[1], now_at,
                    correlation_ids[1], causation_ids[1], idempotency_key_hashes[1],
                    traceparents[1], event_data[1]::json
                );
                update log_head set position = at_position, event_id = event_ids[1] where one;
            else
                outcome := 'lost';
                at_epoch := last_epoch;
                at_version := last_version;
                at_position := last_position;
            end if;
            return next;
            return;
        end if;
    end if;
    return query select * from append_events_once(
        in_log_id,
        in_batch_id,
        aggregate_types,
        aggregate_ids,
        expected_epochs,
        expected_versions,
        event_counts,
        event_ids,
        event_aggregate_types,
        event_aggregate_ids,
        event_types,
        schema_versions,
        correlation_ids,
        causation_ids,
        idempotency_key_hashes,
        traceparents,
        event_data,
        scope_hashes,
        key_hashes,
        request_hashes,
        answer_formats
    );
end;
$$;
