-- Which kind of contradiction had appends refused, for metrics; null when an operator said so by hand.
alter table log_head add column refused_kind text;
