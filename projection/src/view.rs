//! Views: what a caller reads by name.

use consistency::Name;

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
}

impl ViewDefinition {
    pub(crate) fn new(name: Name, kind: ViewKind) -> Self {
        Self { name, kind }
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
