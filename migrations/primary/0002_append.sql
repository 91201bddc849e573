-- Appending: one gathered commit is one call of append_events, so the row lock on the head lives inside
-- the server and no client can hold it. Read committed is required: each statement after the lock must
-- see what was committed before it.

-- Calls whose outcome was unknown to their client and that were found not to have run. Such a call may
-- still be on its way; when it arrives it must do nothing, since its client was told so.
create table abandoned_append (
    batch_id uuid primary key,
    abandoned_at timestamptz not null default clock_timestamp()
);

-- Appends several commands in order. A command that loses (its aggregate is not as expected) leaves the
-- others alone. Arrays of commands come first, then arrays of all their events in the same order.
--
-- expected_versions: null for any, 0 for an aggregate without events, else the last event's version,
-- which must be of the epoch in expected_epochs.
--
-- Answers one row a command. Appended: epoch, version and position of its first event. Lost: those of
-- the aggregate's last event, or the log's epoch and zeros when it has none.
create function append_events(
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
    event_data text[]
) returns table (
    command_number integer,
    is_appended boolean,
    at_epoch integer,
    at_version bigint,
    at_position bigint,
    committed_at_micros bigint
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
    now_at timestamptz;
    -- The first command on the same aggregate: where the aggregate's state is kept below.
    slots integer[];
    -- By slot: the aggregate's last event as of the commands handled so far.
    last_epochs integer[];
    last_versions bigint[];
    last_positions bigint[];
    -- By command: its answer.
    wins boolean[];
    answer_epochs integer[];
    answer_versions bigint[];
    answer_positions bigint[];
    -- By event: its place; position null when its command lost.
    new_versions bigint[];
    new_positions bigint[];
    slot integer;
    event_number integer := 0;
    last_event_number integer;
    next_position bigint;
begin
    select * into head from log_head where one for update;
    if not found or head.log_id <> in_log_id then
        raise exception 'this database does not hold log %', in_log_id using errcode = 'TM002';
    end if;
    if head.refused_because is not null then
        raise exception '%', head.refused_because using errcode = 'TM001';
    end if;
    if exists (select from abandoned_append as a where a.batch_id = in_batch_id) then
        raise exception 'this append was given up' using errcode = 'TM003';
    end if;
    now_at := clock_timestamp();
    next_position := head.position;

    select
        array_agg(c.slot order by c.number),
        array_agg(coalesce(l.epoch, head.epoch) order by c.number),
        array_agg(coalesce(l.version, 0) order by c.number),
        array_agg(coalesce(l.position, 0) order by c.number)
    into slots, last_epochs, last_versions, last_positions
    from (
        select u.type, u.id, u.number, min(u.number) over (partition by u.type, u.id) as slot
        from unnest(aggregate_types, aggregate_ids) with ordinality as u (type, id, number)
    ) as c
    left join lateral (
        select e.epoch, e.version, e.position
        from event as e
        where e.aggregate_type = c.type and e.aggregate_id = c.id
        order by e.version desc
        limit 1
    ) as l on true;

    for number in 1..cardinality(aggregate_types) loop
        slot := slots[number];
        wins[number] := expected_versions[number] is null
            or (expected_versions[number] = last_versions[slot]
                and (expected_versions[number] = 0
                    or expected_epochs[number] = last_epochs[slot]));
        if wins[number] then
            answer_epochs[number] := head.epoch;
            answer_versions[number] := last_versions[slot] + 1;
            answer_positions[number] := next_position + 1;
            for nth in 1..event_counts[number] loop
                new_versions[event_number + nth] := last_versions[slot] + nth;
                new_positions[event_number + nth] := next_position + nth;
            end loop;
            next_position := next_position + event_counts[number];
            last_epochs[slot] := head.epoch;
            last_versions[slot] := last_versions[slot] + event_counts[number];
            last_positions[slot] := next_position;
            last_event_number := event_number + event_counts[number];
        else
            answer_epochs[number] := last_epochs[slot];
            answer_versions[number] := last_versions[slot];
            answer_positions[number] := last_positions[slot];
            for nth in 1..event_counts[number] loop
                new_versions[event_number + nth] := null;
                new_positions[event_number + nth] := null;
            end loop;
        end if;
        event_number := event_number + event_counts[number];
    end loop;

    if last_event_number is not null then
        insert into event (
            position, epoch, id, previous_id, aggregate_type, aggregate_id, version, event_type,
            schema_version, committed_at, correlation_id, causation_id, idempotency_key_hash,
            traceparent, data
        )
        select
            e.position, head.epoch, e.id,
            coalesce(lag(e.id) over (order by e.position), head.event_id),
            e.aggregate_type, e.aggregate_id, e.version, e.event_type, e.schema_version, now_at,
            e.correlation_id, e.causation_id, e.idempotency_key_hash, e.traceparent, e.data::json
        from unnest(
            new_positions, new_versions, event_ids, event_aggregate_types, event_aggregate_ids,
            event_types, schema_versions, correlation_ids, causation_ids, idempotency_key_hashes,
            traceparents, event_data
        ) as e (
            position, version, id, aggregate_type, aggregate_id, event_type, schema_version,
            correlation_id, causation_id, idempotency_key_hash, traceparent, data
        )
        where e.position is not null;

        update log_head set position = next_position, event_id = event_ids[last_event_number]
        where one;
    end if;

    return query
    select
        a.number::integer, a.wins, a.epoch, a.version, a.position,
        (extract(epoch from now_at) * 1000000)::bigint
    from unnest(wins, answer_epochs, answer_versions, answer_positions)
        with ordinality as a (wins, epoch, version, position, number);
end;
$$;

-- Settles a call of append_events whose outcome its client does not know: answers the events that were
-- committed, or, when there are none, makes sure that there will be none.
--
-- The head is updated, not only locked. The lock waits for the call if it is running; the update makes
-- the answer wait, as the call would have, for a synchronous standby.
create function settle_append(in_log_id uuid, in_batch_id uuid, event_ids uuid[])
returns table (
    event_id uuid,
    at_epoch integer,
    at_version bigint,
    at_position bigint,
    committed_at_micros bigint
)
language plpgsql
as $$
begin
    update log_head as h set epoch = h.epoch where h.log_id = in_log_id;
    if not found then
        raise exception 'this database does not hold log %', in_log_id using errcode = 'TM002';
    end if;
    return query
    select
        e.id, e.epoch, e.version, e.position,
        (extract(epoch from e.committed_at) * 1000000)::bigint
    from event as e
    where e.id = any (event_ids)
    order by e.position;
    if not found then
        -- A lost call arrives while its connection lives, which is minutes; a day is beyond doubt.
        delete from abandoned_append as a
        where a.abandoned_at < clock_timestamp() - interval '1 day';
        insert into abandoned_append (batch_id) values (in_batch_id) on conflict do nothing;
    end if;
end;
$$;
