-- Appending under an idempotency key: the key is looked up and written in the same call as the events,
-- under the lock of the head, so repeats that run at once are answered like later ones.
--
-- append_events stays as it is for releases that do not know this table.

-- The first answer to each request that gave a key and was appended. Only what was appended is kept: a
-- request that changed nothing may be made again.
create table idempotency (
    -- SHA-256 of who asked, by which method, on which path.
    scope_hash bytea not null check (octet_length(scope_hash) = 32),
    key_hash bytea not null check (octet_length(key_hash) = 32),
    -- SHA-256 of what was asked; another request under the same key is refused.
    request_hash bytea not null check (octet_length(request_hash) = 32),
    -- Which rules made the answer's bytes out of the columns below.
    answer_format smallint not null check (answer_format > 0),
    aggregate_type text not null,
    aggregate_id text not null,
    epoch integer not null,
    first_version bigint not null,
    first_position bigint not null,
    event_ids uuid[] not null,
    committed_at timestamptz not null,
    primary key (scope_hash, key_hash)
);

-- For pruning, oldest first.
create index idempotency_committed_at on idempotency (committed_at);

-- As append_events, with an idempotency key for each command, null where there is none. The four arrays
-- are empty when no command has one.
--
-- Answers one row a command. The outcome is one of
--   appended: epoch, version and position of its first event;
--   lost: those of the aggregate's last event, or the log's epoch and zeros when it has none;
--   replayed: the first answer under the key, with the aggregate and the ids of its events;
--   mismatched: the key was used by another request; the numbers are that request's.
create function append_events_once(
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
    -- The first command under the same key: where the key's first answer is kept below. Null without.
    key_slots integer[];
    -- By key slot: the first answer as of the commands handled so far.
    first_answers idempotency[];
    new_answers idempotency[] := '{}';
    -- By command: its answer.
    outcomes text[];
    answer_epochs integer[];
    answer_versions bigint[];
    answer_positions bigint[];
    repeated_answers idempotency[];
    -- By event: its place; position null when its command was not appended.
    new_versions bigint[];
    new_positions bigint[];
    slot integer;
    key_slot integer;
    answer idempotency;
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

    if cardinality(key_hashes) > 0 then
        select
            array_agg(k.slot order by k.number),
            array_agg(f.answer order by k.number)
        into key_slots, first_answers
        from (
            select
                u.scope_hash, u.key_hash, u.number,
                case when u.key_hash is not null
                    then min(u.number) over (partition by u.scope_hash, u.key_hash)
                end as slot
            from unnest(scope_hashes, key_hashes) with ordinality as u (scope_hash, key_hash, number)
        ) as k
        left join lateral (
            select i as answer
            from idempotency as i
            where i.scope_hash = k.scope_hash and i.key_hash = k.key_hash
            limit 1
        ) as f on true;
    end if;

    for number in 1..cardinality(aggregate_types) loop
        slot := slots[number];
        key_slot := key_slots[number];
        -- Null when there is no key, or no answer under it.
        answer := first_answers[key_slot];
        if answer.request_hash is not null then
            if answer.request_hash = request_hashes[number] then
                outcomes[number] := 'replayed';
            else
                outcomes[number] := 'mismatched';
            end if;
            answer_epochs[number] := answer.epoch;
            answer_versions[number] := answer.first_version;
            answer_positions[number] := answer.first_position;
            repeated_answers[number] := answer;
        elsif expected_versions[number] is null
            or (expected_versions[number] = last_versions[slot]
                and (expected_versions[number] = 0
                    or expected_epochs[number] = last_epochs[slot]))
        then
            outcomes[number] := 'appended';
            answer_epochs[number] := head.epoch;
            answer_versions[number] := last_versions[slot] + 1;
            answer_positions[number] := next_position + 1;
            if key_slot is not null then
                answer := row(
                    scope_hashes[number], key_hashes[number], request_hashes[number],
                    answer_formats[number], aggregate_types[number], aggregate_ids[number],
                    head.epoch, answer_versions[number], answer_positions[number],
                    event_ids[event_number + 1 : event_number + event_counts[number]], now_at
                )::idempotency;
                first_answers[key_slot] := answer;
                new_answers := new_answers || answer;
            end if;
        else
            outcomes[number] := 'lost';
            answer_epochs[number] := last_epochs[slot];
            answer_versions[number] := last_versions[slot];
            answer_positions[number] := last_positions[slot];
        end if;
        if outcomes[number] = 'appended' then
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

    if cardinality(new_answers) > 0 then
        insert into idempotency select n.* from unnest(new_answers) as n;
    end if;

    return query
    select
        a.number::integer, a.outcome, a.epoch, a.version, a.position,
        (extract(epoch from now_at) * 1000000)::bigint, repeated_answers[a.number]
    from unnest(outcomes, answer_epochs, answer_versions, answer_positions)
        with ordinality as a (outcome, epoch, version, position, number);
end;
$$;
