-- What the projector of a region keeps beside the tables of its views.
--
-- Tables of views and states are made by the projection engine, one set for each version of a
-- projection, and named <projection>_v<version>_...; only these are fixed.

create table projection_version (
    projection text not null,
    version integer not null check (version > 0),
    partition_count integer not null check (partition_count between 1 and 1024),
    -- The version that gateways read.
    active boolean not null,
    created_at timestamptz not null default clock_timestamp(),
    primary key (projection, version)
);

-- At most one version of a projection is read.
create unique index projection_version_active on projection_version (projection) where active;

create table checkpoint (
    projection text not null,
    version integer not null,
    partition integer not null,
    epoch integer not null check (epoch > 0),
    -- Every event of the partition at or below this is in the rows, or parked.
    position bigint not null check (position >= 0),
    -- Id of the event at position, whosever it is; nil at zero. What is read next must name it.
    event_id uuid not null,
    -- Raised by whoever takes the partition over, so that the one before can commit no more.
    fence bigint not null,
    -- Commit time of the newest event at or below position, by the primary's clock; for lag only.
    committed_at timestamptz,
    primary key (projection, version, partition),
    foreign key (projection, version) references projection_version (projection, version)
);

-- An aggregate of which an event could not be applied, nor any later one.
create table parked (
    projection text not null,
    version integer not null,
    aggregate_type text not null,
    aggregate_id text not null,
    partition integer not null,
    -- The first event that is not applied.
    epoch integer not null,
    position bigint not null,
    reason text not null,
    parked_at timestamptz not null default clock_timestamp(),
    primary key (projection, version, aggregate_type, aggregate_id)
);

create table dead_letter (
    projection text not null,
    version integer not null,
    position bigint not null,
    aggregate_type text not null,
    aggregate_id text not null,
    -- The event's headers and data, enough to apply it again.
    headers jsonb not null,
    data text not null,
    error text not null,
    created_at timestamptz not null default clock_timestamp(),
    primary key (projection, version, position)
);

create index dead_letter_aggregate
    on dead_letter (projection, version, aggregate_type, aggregate_id, position);

-- The epochs that this region has adopted, copied from the primary.
create table adopted_epoch (
    epoch integer primary key check (epoch > 0),
    starts_after bigint not null check (starts_after >= 0)
);
