-- States of long aggregates, folded from the log, so that reading one need not begin at its first event.
-- Nothing is lost with a row: whoever misses it folds the events again.
create table fold_snapshot (
    aggregate_type text not null,
    aggregate_id text not null,
    -- Which rules made it, and their version: what other rules made is never used.
    fold text not null,
    fold_version integer not null check (fold_version > 0),
    -- The last event that is in it. It is used only while the log has this event at this place.
    version bigint not null check (version > 0),
    epoch integer not null,
    position bigint not null,
    event_id uuid not null,
    -- Where the first of its events stands.
    created_position bigint not null,
    -- Null when the aggregate had no state.
    state text,
    -- SHA-256 of all the rest.
    digest bytea not null check (octet_length(digest) = 32),
    primary key (aggregate_type, aggregate_id, fold, fold_version)
);
