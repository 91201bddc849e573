//! Schemas of bodies: what is answered shares definitions, what is asked stands alone.

use schemars::{JsonSchema, Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value};

/// Where definitions stand in the document.
const DEFINITIONS: &str = "/components/schemas";

/// Makes schemas.
pub struct Schemas {
    answered: SchemaGenerator,
    asked: SchemaGenerator,
}

impl Default for Schemas {
    fn default() -> Self {
        let settings = || {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = DEFINITIONS.into();
                settings.meta_schema = None;
            })
        };
        // The same type may be taken in more forms than it is answered in, under one name.
        let alone = settings().with(|settings| settings.inline_subschemas = true);
        Self {
            answered: settings().for_serialize().into_generator(),
            asked: alone.for_deserialize().into_generator(),
        }
    }
}

impl Schemas {
    /// Of a type that is answered.
    pub fn answered<T: JsonSchema>(&mut self) -> Value {
        self.answered_as(SchemaGenerator::subschema_for::<T>)
    }

    /// The same, by its maker.
    pub fn answered_as(&mut self, schema: impl Fn(&mut SchemaGenerator) -> Schema) -> Value {
        schema(&mut self.answered).to_value()
    }

    /// Of a type that is asked with.
    pub fn asked<T: JsonSchema>(&mut self) -> Value {
        self.asked_as(SchemaGenerator::subschema_for::<T>)
    }

    /// The same, by its maker.
    pub fn asked_as(&mut self, schema: impl Fn(&mut SchemaGenerator) -> Schema) -> Value {
        schema(&mut self.asked).to_value()
    }

    /// All definitions. A type that contains itself has one even where schemas stand alone.
    pub fn finish(mut self) -> Map<String, Value> {
        let mut all = self.asked.take_definitions(true);
        all.extend(self.answered.take_definitions(true));
        all
    }
}

/// Puts `part` where `pointer` leads; nothing happens when it leads nowhere.
pub fn with(mut schema: Value, pointer: &str, part: Value) -> Value {
    if let Some(place) = schema.pointer_mut(pointer) {
        *place = part;
    }
    schema
}
