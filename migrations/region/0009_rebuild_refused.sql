-- Aggregates of a range whose rows could not be made, or that the database refuses: they are folded once
-- more, event by event.
alter table rebuild_range add column refused text[] not null default '{}';
