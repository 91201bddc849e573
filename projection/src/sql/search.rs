//! The table of a search view: rows, and columns that the database makes of them.

use std::sync::Arc;

use super::{Naming, SearchStatements, ViewStatements, delete_rows, read, upsert_rows};
use crate::SearchFields;

/// Generated columns, so that a row and what it is found by cannot differ.
pub(super) fn create(table: &str, fields: SearchFields, key: &str) -> Arc<str> {
    let SearchFields { words, number, label } = fields;
    let text = |field: &&str| format!("coalesce(data->>'{field}', '')");
    let words: Vec<String> = words.iter().map(text).collect();
    let words = words.join(" || ' ' || ");
    format!(
        r#"create table if not exists "{table}" (
            aggregate_id text {key},
            version bigint not null,
            epoch integer not null,
            position bigint not null,
            data json not null,
            words tsvector not null
                generated always as (to_tsvector('simple', {words})) stored,
            number bigint generated always as ((data->>'{number}')::bigint) stored,
            label text generated always as (data->>'{label}') stored
        ) with (fillfactor = 80)"#
    )
    .into()
}

pub(super) fn index_name(table: &str) -> String {
    format!("{table}_words")
}

pub(super) fn create_index(table: &str) -> Arc<str> {
    let index = index_name(table);
    format!(r#"create index if not exists "{index}" on "{table}" using gin (words)"#).into()
}

pub(super) fn statements(naming: &Naming<'_>, table: &str, state_table: &str) -> ViewStatements {
    ViewStatements::Search(SearchStatements {
        delete: delete_rows(table),
        upsert: upsert_rows(table),
        read: read::search(naming, table, state_table).into(),
    })
}
