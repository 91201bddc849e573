//! What a domain's JSON looks like, as JSON Schema: what the API's description is made of.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::Fold;

/// Makes the schema of one type. Types that it names become definitions of the generator, which knows
/// whether they are read or written.
pub type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// The schemas that a domain was given, beside those of its commands.
#[derive(Debug, Clone, Default)]
pub struct Schemas {
    views: BTreeMap<String, SchemaOf>,
    aggregates: BTreeMap<String, AggregateSchemas>,
}

/// The schemas of one aggregate type.
#[derive(Debug, Clone, Copy)]
pub struct AggregateSchemas {
    /// Its state.
    pub state: SchemaOf,
    /// Its events, with serde's external tags.
    pub event: SchemaOf,
}

impl Schemas {
    pub(crate) fn view<T: JsonSchema>(&mut self, view: &str) {
        self.views.insert(view.to_owned(), SchemaGenerator::subschema_for::<T>);
    }

    pub(crate) fn aggregate<F>(&mut self, kind: &str)
    where
        F: Fold<State: JsonSchema, Event: JsonSchema>,
    {
        let schemas = AggregateSchemas {
            state: SchemaGenerator::subschema_for::<F::State>,
            event: SchemaGenerator::subschema_for::<F::Event>,
        };
        self.aggregates.insert(kind.to_owned(), schemas);
    }

    /// What `data` of a view's rows looks like, when the domain says so.
    pub fn of_view(&self, view: &str) -> Option<SchemaOf> {
        self.views.get(view).copied()
    }

    /// What an aggregate's state and events look like, when the domain says so.
    pub fn of_aggregate(&self, kind: &str) -> Option<AggregateSchemas> {
        self.aggregates.get(kind).copied()
    }

    /// The views and the aggregate types that are named.
    pub(crate) fn names(&self) -> (impl Iterator<Item = &str>, impl Iterator<Item = &str>) {
        (self.views.keys().map(String::as_str), self.aggregates.keys().map(String::as_str))
    }
}
