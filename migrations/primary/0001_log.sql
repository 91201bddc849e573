-- The log: event store and outbox in one, in the primary's database.
--
-- A position is assigned under the row lock of log_head, inside the append function, so positions
-- are dense and in commit order. Nothing else may write these tables.

create table log_head (
    -- One row only.
    one boolean primary key default true check (one),
    log_id uuid not null,
    epoch integer not null check (epoch > 0),
    position bigint not null check (position >= 0),
    -- Id of the event at position; nil before the first.
    event_id uuid not null,
    -- Why appends are refused; null when they are taken.
    refused_because text
);

create table epoch (
    epoch integer primary key check (epoch > 0),
    -- The last position of the past that this epoch kept.
    starts_after bigint not null check (starts_after >= 0),
    opened_at timestamptz not null default clock_timestamp()
);

create table event (
    position bigint primary key,
    epoch integer not null,
    id uuid not null unique,
    previous_id uuid not null,
    aggregate_type text not null,
    aggregate_id text not null,
    version bigint not null check (version > 0),
    event_type text not null,
    schema_version smallint not null check (schema_version > 0),
    -- The clock is read once for each append, so the events of one append share it.
    committed_at timestamptz not null,
    correlation_id uuid not null,
    causation_id uuid not null,
    idempotency_key_hash bytea,
    traceparent text,
    -- json, not jsonb: the bytes are published as they were given.
    data json not null,
    unique (aggregate_type, aggregate_id, version)
);

create table lease (
    name text primary key,
    holder uuid not null,
    -- By this database's clock.
    expires_at timestamptz not null
);
