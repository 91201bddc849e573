-- The log has a database of its own, at the primary only.
create database tidemark_log;
