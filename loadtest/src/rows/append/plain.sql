-- The log's columns and indexes, with positions from a sequence.
create table plain_event (
    position bigint generated always as identity primary key,
    id uuid not null unique,
    aggregate_type text not null,
    aggregate_id text not null,
    version bigint not null,
    event_type text not null,
    schema_version smallint not null,
    committed_at timestamptz not null default clock_timestamp(),
    correlation_id uuid not null,
    causation_id uuid not null,
    data json not null,
    unique (aggregate_type, aggregate_id, version)
);
