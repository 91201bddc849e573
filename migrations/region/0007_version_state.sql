-- A version is numbered by the region, and built by rules that a binary declares under a number of their
-- own: the same rules may build again what was built before.
alter table projection_version
    -- The rules' own number; null where it is the version's.
    add column definition integer check (definition > 0),
    -- What becomes of it. A number is never given twice, so a version that was dropped keeps its row.
    add column state text not null default 'ready'
        check (state in ('building', 'ready', 'retired', 'dropped')),
    add column state_since timestamptz not null default now(),
    add constraint projection_version_active_is_ready check (not active or state = 'ready');
