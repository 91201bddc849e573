-- What a gathered commit mostly consists of has a way of its own: commands of one event and without a key, each on
-- an aggregate of its own. Telling others apart, step by step, took as long as writing the events.
--
-- append_events_once_guarded stays as it is for releases that do not know this function.

-- As append_events_once_guarded. each_alone promises that there is one event and no key to a command, and no
-- second command on its aggregate; a broken promise violates a constraint, and appends nothing.
--
-- last_event_id is that of the event which the log ended with before: what the first of the new ones follows.
create function append_events_chained(
    each_alone boolean,
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
    first_answer idempotency,
    last_event_id uuid
)
language plpgsql
-- A plan made while the log was empty is kept by the session and would read all of a grown one.
set enable_seqscan = off
set enable_bitmapscan = off
-- What is short and repeated is not worth compiling, and switched off scans look dear enough to be.
set jit = off
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
        if each_alone
            and not exists (select from abandoned_append as a where a.batch_id = in_batch_id)
        then
            now_at := clock_timestamp();
            committed_at_micros := (extract(epoch from now_at) * 1000000)::bigint;
            last_event_id := head.event_id;
            if cardinality(event_ids) = 1 then
                command_number := 1;
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
            return query
            with judged as (
                select
                    c.*,
                    coalesce(l.epoch, head.epoch) as last_epoch,
                    coalesce(l.version, 0) as last_version,
                    coalesce(l.position, 0) as last_position,
                    c.expected_version is null
                        or (c.expected_version = coalesce(l.version, 0)
                            and (c.expected_version = 0 or c.expected_epoch = l.epoch)) as wins
                from unnest(
                    aggregate_types, aggregate_ids, expected_epochs, expected_versions, event_ids,
                    event_types, schema_versions, correlation_ids, causation_ids,
                    idempotency_key_hashes, traceparents, event_data
                ) with ordinality as c (
                    aggregate_type, aggregate_id, expected_epoch, expected_version, id, event_type,
                    schema_version, correlation_id, causation_id, idempotency_key_hash, traceparent,
                    data, number
                )
                left join lateral (
                    select e.epoch, e.version, e.position
                    from event as e
                    where e.aggregate_type = c.aggregate_type and e.aggregate_id = c.aggregate_id
                    order by e.version desc
                    limit 1
                ) as l on true
            ), placed as materialized (
                select
                    j.*,
                    head.position + count(*) filter (where j.wins) over so_far as new_position
                from judged as j
                window so_far as (order by j.number rows unbounded preceding)
            ), winners as materialized (
                select p.*, lag(p.id) over (order by p.number) as before
                from placed as p
                where p.wins
            ), written as (
                insert into event (
                    position, epoch, id, previous_id, aggregate_type, aggregate_id, version,
                    event_type, schema_version, committed_at, correlation_id, causation_id,
                    idempotency_key_hash, traceparent, data
                )
                select
                    w.new_position, head.epoch, w.id, coalesce(w.before, head.event_id),
                    w.aggregate_type, w.aggregate_id, w.last_version + 1, w.event_type,
                    w.schema_version, now_at, w.correlation_id, w.causation_id,
                    w.idempotency_key_hash, w.traceparent, w.data::json
                from winners as w
            ), moved as (
                update log_head
                set position = newest.new_position, event_id = newest.id
                from (
                    select w.new_position, w.id from winners as w order by w.number desc limit 1
                ) as newest
                where one
            )
            select
                p.number::integer,
                case when p.wins then 'appended' else 'lost' end,
                case when p.wins then head.epoch else p.last_epoch end,
                case when p.wins then p.last_version + 1 else p.last_version end,
                case when p.wins then p.new_position else p.last_position end,
                append_events_chained.committed_at_micros,
                null::idempotency,
                head.event_id
            from placed as p
            order by p.number;
            return;
        end if;
    end if;
    return query select o.*, head.event_id from append_events_once(
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
    ) as o;
end;
$$;
