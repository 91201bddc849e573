//! Views: what a caller reads by name.

use std::sync::Arc;

use consistency::Name;
use serde_json::{Map, Value};

use crate::fold::guarded;

/// What a row says in a field that it lacks, made of what it says elsewhere. Pure, and what the rules make
/// of the state as well.
pub type LaterValue = fn(&Map<String, Value>) -> Value;

/// A field that a view has got since its definition was first used.
#[derive(Debug, Clone)]
pub struct LaterField {
    pub(crate) name: &'static str,
    pub(crate) value: LaterValue,
}

impl LaterField {
    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

impl PartialEq for LaterField {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for LaterField {}

/// How the rows of a view are keyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ViewKind {
    /// At most one row for each aggregate, keyed by its id. Nothing but that aggregate's events make
    /// it, so it can prove itself by its version.
    Row,
    /// Any number of items under a key that the projection chooses, ordered by the position of their
    /// aggregate's first event, which never changes.
    List,
    /// Sums and maxima over many aggregates under a key.
    Rollup,
    /// At most one row for each aggregate, found by what is in it, in the order of the position of
    /// their aggregate's first event.
    Search(SearchFields),
}

/// The fields of a search view's rows that they are found by. Each becomes a column of its table that
/// the database makes of the row. Filters are named after the fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SearchFields {
    /// Texts whose words are looked for, whatever the language.
    pub words: &'static [&'static str],
    /// A whole number with a least and a most.
    pub number: &'static str,
    /// A text to be met exactly.
    pub label: &'static str,
}

/// One view of a projection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ViewDefinition {
    name: Name,
    kind: ViewKind,
    later: Arc<[LaterField]>,
}

impl ViewDefinition {
    pub(crate) fn new(name: Name, kind: ViewKind, later: Arc<[LaterField]>) -> Self {
        Self { name, kind, later }
    }

    /// Fields that older rows lack, until they are filled in.
    pub fn later_fields(&self) -> &[LaterField] {
        &self.later
    }

    /// A row's JSON with every later field: those that it lacks come last, in the order in which they
    /// were declared. What is no object stays as it is.
    pub fn complete(&self, data: String) -> String {
        if self.later.is_empty() {
            return data;
        }
        let Ok(Value::Object(mut row)) = serde_json::from_str(&data) else { return data };
        let mut text = data;
        for LaterField { name, value } in &*self.later {
            if row.contains_key(*name) {
                continue;
            }
            // A panic of the domain's code must not cost the row.
            let made = guarded(|| Ok(value(&row))).unwrap_or(Value::Null);
            let end = text.rfind('}').unwrap_or_default();
            let comma = if row.is_empty() { "" } else { "," };
            text.truncate(end);
            text.push_str(&format!("{comma}{}:{made}}}", Value::from(*name)));
            row.insert((*name).to_owned(), made);
        }
        text
    }

    /// What callers read it by.
    pub fn name(&self) -> &Name {
        &self.name
    }

    /// How it is keyed.
    pub fn kind(&self) -> ViewKind {
        self.kind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(later: &[LaterField]) -> ViewDefinition {
        ViewDefinition::new(Name::new("light").unwrap(), ViewKind::Row, later.into())
    }

    #[test]
    fn what_a_row_lacks_comes_last_and_what_it_has_stays() {
        let double =
            LaterField { name: "double", value: |row| (row["n"].as_i64().unwrap() * 2).into() };
        let next =
            LaterField { name: "next", value: |row| (row["double"].as_i64().unwrap() + 1).into() };
        let view = view(&[double, next]);
        let complete = |data: &str| view.complete(data.to_owned());
        assert_eq!(complete(r#"{"n":2}"#), r#"{"n":2,"double":4,"next":5}"#);
        assert_eq!(complete(r#"{"n":2,"double":7}"#), r#"{"n":2,"double":7,"next":8}"#);
        assert_eq!(complete(r#"{ "n": 2 } "#), r#"{ "n": 2 ,"double":4,"next":5}"#);
        assert_eq!(complete(r#"{"double":1,"next":null}"#), r#"{"double":1,"next":null}"#);
        assert_eq!(complete("7"), "7");
        // The row has no number: the rules panic, and the field is empty.
        assert_eq!(complete("{}"), r#"{"double":null,"next":null}"#);
        assert_eq!(self::view(&[]).complete("{}".to_owned()), "{}");
    }
}
