-- An append alone is one plain statement, as long as nobody else moves the head while it waits for it: what it
-- saw of the log when it began is then still so. Giving up a lost call moves the head as well.

alter table log_head add column settled bigint not null default 0;

comment on column log_head.settled is 'How often the outcome of a lost call was looked up.';

-- As before, but the head shows that it was here.
create or replace function settle_append(in_log_id uuid, in_batch_id uuid, event_ids uuid[])
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
    update log_head as h set settled = h.settled + 1 where h.log_id = in_log_id;
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
