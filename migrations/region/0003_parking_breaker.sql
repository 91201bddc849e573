-- Versions that stopped because too many of their aggregates would be parked for one reason.
create table parking_breaker (
    projection text not null,
    version integer not null,
    -- The one that they would be parked for.
    reason text not null,
    -- As many as would be parked, had the version not stopped.
    parked_count bigint not null,
    tripped_at timestamptz not null default clock_timestamp(),
    -- As many as an operator has accepted by resuming: only those beyond count against the bound.
    accepted_count bigint not null default 0,
    primary key (projection, version, reason)
);
