-- What a gathered commit mostly consists of, with less to do for it: one look for the last events of all aggregates,
-- one insert, and one row to answer, where each command had a row of its own and the events went through two sorted
-- copies on their way.
--
-- append_events_chained stays for the commands that have to be told apart, and for releases that do not know this one.

-- Appends commands of one event and without a key, each on an aggregate of its own. Two commands on one aggregate
-- violate a constraint, and append nothing. Errors are those of append_events_chained.
--
-- Answers one row, whose arrays have a member for each command. Those that are not lost stand one after another
-- from head_position + 1 on, in head_epoch, and have the version after the one in last_versions. A lost one has a
-- member in lost_epochs and lost_positions that is not null: with the one in last_versions, its aggregate's last
-- event, or the log's epoch and zeros when it has none. Both are null when none is lost.
create function append_events_each_alone(
    seen_epoch integer,
    seen_position bigint,
    judged_epoch integer,
    in_log_id uuid,
    in_batch_id uuid,
    aggregate_types text[],
    aggregate_ids text[],
    expected_epochs integer[],
    expected_versions bigint[],
    event_ids uuid[],
    event_types text[],
    schema_versions smallint[],
    correlation_ids uuid[],
    causation_ids uuid[],
    -- Empty when none has one, and so are the traceparents.
    idempotency_key_hashes bytea[],
    traceparents text[],
    event_data text[],
    -- As the log was before.
    out head_epoch integer,
    out head_position bigint,
    out head_event_id uuid,
    out committed_at_micros bigint,
    out last_versions bigint[],
    out lost_epochs integer[],
    out lost_positions bigint[]
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
    are_lost boolean[];
    -- Of those that are not lost.
    new_versions bigint[];
    event_count integer;
begin
    select * into head from log_head where one for update;
    if not found or head.log_id <> in_log_id then
        raise exception 'this database does not hold log %', in_log_id using errcode = 'TM002';
    end if;
    if head.refused_because is not null then
        raise exception '%', head.refused_because using errcode = 'TM001';
    end if;
    if (head.epoch, head.position) < (seen_epoch, seen_position) then
        raise exception 'the log ends at %.%, but it was seen to end at %.%: it lost its tail',
            head.epoch, head.position, seen_epoch, seen_position using errcode = 'TM005';
    end if;
    if head.epoch <> judged_epoch then
        raise exception 'the log is in epoch %', head.epoch using errcode = 'TM004';
    end if;
    if exists (select from abandoned_append as a where a.batch_id = in_batch_id) then
        raise exception 'this append was given up' using errcode = 'TM003';
    end if;
    now_at := clock_timestamp();
    head_epoch := head.epoch;
    head_position := head.position;
    head_event_id := head.event_id;
    committed_at_micros := (extract(epoch from now_at) * 1000000)::bigint;

    select
        array_agg(c.last_version), array_agg(c.last_version + 1), array_agg(c.is_lost),
        array_agg(case when c.is_lost then c.last_epoch end),
        array_agg(case when c.is_lost then c.last_position end)
    into last_versions, new_versions, are_lost, lost_epochs, lost_positions
    from (
        select
            coalesce(l.epoch, head.epoch) as last_epoch,
            coalesce(l.version, 0) as last_version,
            coalesce(l.position, 0) as last_position,
            u.expected_version is not null
                and (u.expected_version <> coalesce(l.version, 0)
                    or (u.expected_version <> 0
                        and u.expected_epoch is distinct from l.epoch)) as is_lost
        from unnest(
            aggregate_types, aggregate_ids, expected_epochs, expected_versions
        ) with ordinality as u (type, id, expected_epoch, expected_version, number)
        left join lateral (
            select e.epoch, e.version, e.position
            from event as e
            where e.aggregate_type = u.type and e.aggregate_id = u.id
            order by e.version desc
            limit 1
        ) as l on true
        order by u.number
    ) as c;

    if true = any (are_lost) then
        -- The others come to stand where all would have.
        select
            array_agg(e.aggregate_type), array_agg(e.aggregate_id), array_agg(e.version),
            array_agg(e.id), array_agg(e.event_type), array_agg(e.schema_version),
            array_agg(e.correlation_id), array_agg(e.causation_id),
            array_agg(e.idempotency_key_hash), array_agg(e.traceparent), array_agg(e.data)
        into
            aggregate_types, aggregate_ids, new_versions, event_ids, event_types, schema_versions,
            correlation_ids, causation_ids, idempotency_key_hashes, traceparents, event_data
        from (
            select u.*
            from unnest(
                are_lost, aggregate_types, aggregate_ids, new_versions, event_ids, event_types,
                schema_versions, correlation_ids, causation_ids, idempotency_key_hashes,
                traceparents, event_data
            ) with ordinality as u (
                is_lost, aggregate_type, aggregate_id, version, id, event_type, schema_version,
                correlation_id, causation_id, idempotency_key_hash, traceparent, data, number
            )
            where not u.is_lost
            order by u.number
        ) as e;
    else
        lost_epochs := null;
        lost_positions := null;
    end if;

    event_count := cardinality(event_ids);
    -- Nil when all are lost.
    if event_count > 0 then
        insert into event (
            position, epoch, id, previous_id, aggregate_type, aggregate_id, version, event_type,
            schema_version, committed_at, correlation_id, causation_id, idempotency_key_hash,
            traceparent, data
        )
        select
            head.position + e.number, head.epoch, e.id,
            coalesce(event_ids[e.number - 1], head.event_id), e.aggregate_type, e.aggregate_id,
            e.version, e.event_type, e.schema_version, now_at, e.correlation_id, e.causation_id,
            e.idempotency_key_hash, e.traceparent, e.data::json
        from unnest(
            aggregate_types, aggregate_ids, new_versions, event_ids, event_types, schema_versions,
            correlation_ids, causation_ids, idempotency_key_hashes, traceparents, event_data
        ) with ordinality as e (
            aggregate_type, aggregate_id, version, id, event_type, schema_version, correlation_id,
            causation_id, idempotency_key_hash, traceparent, data, number
        );
        update log_head
        set position = head.position + event_count, event_id = event_ids[event_count]
        where one;
    end if;
end;
$$;
