-- Processes that share the partitions of this region's projections.
create table projector_process (
    process uuid primary key,
    -- Where it runs. Whoever comes up under the same name is the same one, started again.
    name text not null unique,
    started_at timestamptz not null default clock_timestamp(),
    -- By this database's clock. Once it has passed, any other process may remove the row, and with it
    -- everything that the process holds.
    expires_at timestamptz not null,
    -- How far the process knows the log to reach; for display only.
    head_epoch integer,
    head_position bigint
);

-- Which versions a process can apply.
create table projector_share (
    process uuid not null references projector_process on delete cascade,
    projection text not null,
    version integer not null,
    -- Its partitions were named by hand: it takes no part in the split of the others.
    by_hand boolean not null,
    primary key (process, projection, version)
);

-- Who applies a partition. A partition without a row is free. That its holder alone commits is the
-- fence's work: whoever takes a lease raises the fence of the checkpoint in the same transaction.
create table partition_lease (
    projection text not null,
    version integer not null,
    partition integer not null,
    process uuid not null references projector_process on delete cascade,
    primary key (projection, version, partition)
);

create index partition_lease_process on partition_lease (process);
