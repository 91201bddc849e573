-- What operators, and binaries that know more, decided on dead letters, and who.
create table letter_decision (
    id bigint generated always as identity primary key,
    decided_at timestamptz not null default clock_timestamp(),
    actor text not null,
    decision text not null check (decision in ('retry', 'discard')),
    projection text not null,
    version integer not null,
    aggregate_type text not null,
    aggregate_id text not null,
    -- Where the first letter stood that was decided on; null when there was none.
    position bigint,
    -- Letters that are letters no more.
    letter_count bigint not null,
    -- Why the next one still is; null when the aggregate is not parked any more.
    stopped_by text,
    -- The event that was given up; null for a retry.
    headers jsonb,
    data text
);

create index letter_decision_aggregate
    on letter_decision (projection, version, aggregate_type, aggregate_id);
