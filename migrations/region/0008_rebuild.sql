-- How far a rebuild has come beyond its checkpoints, so that it goes on after it was killed.
create table rebuild (
    projection text not null,
    version integer not null,
    -- Where the fold of the log is to end; whatever comes after is for the projectors.
    target_epoch integer not null,
    target_position bigint not null,
    -- Folding writes states; filling makes the views' rows of them; indexing is the end.
    phase text not null check (phase in ('folding', 'filling', 'indexing')),
    started_at timestamptz not null default clock_timestamp(),
    primary key (projection, version),
    foreign key (projection, version) references projection_version (projection, version)
);

-- Ranges of the state table whose rows are in the views.
create table rebuild_range (
    projection text not null,
    version integer not null,
    -- Its first block; a block is 8 KiB of the state table.
    first_block bigint not null,
    primary key (projection, version, first_block)
);
