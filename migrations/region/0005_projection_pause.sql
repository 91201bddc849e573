-- Projections that an operator has paused: nothing of them is applied, whoever holds their partitions.
create table projection_pause (
    projection text primary key,
    paused_at timestamptz not null default clock_timestamp()
);
