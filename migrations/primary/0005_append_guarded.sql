-- Appending to the log that the caller knows. Two things may have happened to it behind the caller's back,
-- and both are looked at under the lock of the head, in the same call as the append.
--
-- append_events_once stays as it is for releases that do not know this function.

-- As append_events_once, but appends nothing to a log
--   that ends before a place where the caller has seen it end: it lost its tail, and what is appended
--   would take positions that were told already (TM005);
--   that is in another epoch than the one the caller's requests were judged in, null for any: what they
--   have written and seen may not be in it (TM004).
create function append_events_once_guarded(
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
