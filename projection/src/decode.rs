//! Events as a domain's enum: the event type names the variant, the data are its content.

use std::collections::BTreeMap;
use std::fmt;

use consistency::{Event, Name, SchemaVersion};
use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, IgnoredAny, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{ProjectionError, Upcasters};

/// Decodes an event, brought to its newest schema first.
pub(crate) fn decode<E: DeserializeOwned>(
    event: &Event,
    upcasters: &Upcasters,
) -> Result<E, ProjectionError> {
    let event_type = event.event_type.as_str();
    let decoded = match upcasters.upcast(event)? {
        Some(data) => E::deserialize(Tagged { event_type, data }),
        None => {
            let mut data = serde_json::Deserializer::from_str(&event.data);
            E::deserialize(Tagged { event_type, data: &mut data })
                .and_then(|decoded| data.end().map(|()| decoded).map_err(DecodeError::Data))
        }
    };
    decoded.map_err(|error| match error {
        DecodeError::UnknownType => ProjectionError::UnknownEventType(event.event_type.clone()),
        DecodeError::Data(error) => ProjectionError::Decode(error),
    })
}

/// Whether events of a type and a schema version can be decoded, as far as their names say.
pub(crate) fn is_known<E: DeserializeOwned>(
    event_type: &Name,
    schema_version: SchemaVersion,
    upcasters: &Upcasters,
) -> bool {
    // The variant is chosen before its content is looked at.
    let tagged = Tagged { event_type: event_type.as_str(), data: serde_json::Value::Null };
    schema_version <= upcasters.current(event_type.as_str())
        && !matches!(E::deserialize(tagged), Err(DecodeError::UnknownType))
}

/// The event type and the data of an event, in the order of the fields of its variant.
pub(crate) fn encode<E: Serialize>(event: &E) -> Result<(String, String), serde_json::Error> {
    let text = serde_json::to_string(event)?;
    if text.starts_with('"') {
        // A variant without content.
        return Ok((serde_json::from_str(&text)?, "{}".to_owned()));
    }
    // Raw, so that numbers and order stay as they were written.
    let mut tagged: BTreeMap<String, &RawValue> = serde_json::from_str(&text)?;
    match (tagged.pop_first(), tagged.is_empty()) {
        (Some((event_type, data)), true) => Ok((event_type, data.get().to_owned())),
        (Some(_), false) | (None, _) => Err(de::Error::custom("not an externally tagged enum")),
    }
}

/// An enum whose tag and content come from different places.
struct Tagged<'a, D> {
    event_type: &'a str,
    data: D,
}

#[derive(Debug)]
enum DecodeError {
    UnknownType,
    Data(serde_json::Error),
}

impl fmt::Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownType => f.write_str("event type is not known"),
            Self::Data(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for DecodeError {}

impl de::Error for DecodeError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Data(de::Error::custom(message))
    }

    // Only the tag is read with this error; an enum inside of the data fails with serde_json's own.
    fn unknown_variant(_: &str, _: &'static [&'static str]) -> Self {
        Self::UnknownType
    }
}

impl<'de, D> Deserializer<'de> for Tagged<'_, D>
where
    D: Deserializer<'de, Error = serde_json::Error>,
{
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        visitor.visit_enum(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

impl<'de, D> de::EnumAccess<'de> for Tagged<'_, D>
where
    D: Deserializer<'de, Error = serde_json::Error>,
{
    type Error = DecodeError;
    type Variant = Content<D>;

    fn variant_seed<V: DeserializeSeed<'de>>(
        self,
        seed: V,
    ) -> Result<(V::Value, Content<D>), DecodeError> {
        let variant = seed.deserialize(StrDeserializer::<DecodeError>::new(self.event_type))?;
        Ok((variant, Content(self.data)))
    }
}

/// What follows the tag.
struct Content<D>(D);

impl<'de, D> de::VariantAccess<'de> for Content<D>
where
    D: Deserializer<'de, Error = serde_json::Error>,
{
    type Error = DecodeError;

    // A variant without content takes any: a projection may not care for what an event says.
    fn unit_variant(self) -> Result<(), DecodeError> {
        IgnoredAny::deserialize(self.0).map(|_| ()).map_err(DecodeError::Data)
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(
        self,
        seed: T,
    ) -> Result<T::Value, DecodeError> {
        seed.deserialize(self.0).map_err(DecodeError::Data)
    }

    fn tuple_variant<V: Visitor<'de>>(
        self,
        length: usize,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.0.deserialize_tuple(length, visitor).map_err(DecodeError::Data)
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        self.0.deserialize_struct("event", fields, visitor).map_err(DecodeError::Data)
    }
}
