-- Which log this region's read models are folded from, so that they are never continued from another.
create table log_identity (
    -- One row only.
    one boolean primary key default true check (one),
    log_id uuid not null
);
