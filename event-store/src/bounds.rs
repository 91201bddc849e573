//! What cannot be published, or read back, must not be committed: the checks before an append.

use std::collections::HashSet;
use std::fmt;

use consistency::{Epoch, Event, EventId, LogPosition, Position, Version};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::append::{Append, NewEvent};
use crate::{InvalidAppend, StoreConfig};

/// The header by which the server refuses a message that is meant for another epoch's stream.
pub(crate) const EXPECTED_STREAM_HEADER: &str = "Nats-Expected-Stream";
/// Bytes of that header in the newest epoch that there can be.
const EXPECTED_STREAM_BYTES: usize = "Nats-Expected-Stream: EVENTS-2147483647\r\n".len();

/// Bytes that the append's messages take on the stream, once it is known to keep its bounds.
pub(crate) fn check(
    append: &Append,
    config: &StoreConfig,
    payload_bytes_max: usize,
) -> Result<usize, InvalidAppend> {
    let count = append.events.len();
    if count == 0 {
        return Err(InvalidAppend::NoEvents);
    }
    if count > config.append_events_max {
        return Err(InvalidAppend::TooManyEvents { count, max: config.append_events_max });
    }
    // Most appends are of one event, which repeats none.
    let is_repeatable = count > 1;
    let mut ids = HashSet::new();
    let mut bytes_together = 0;
    for (index, event) in append.events.iter().enumerate() {
        if is_repeatable && !ids.insert(event.id) {
            return Err(InvalidAppend::RepeatedId { index });
        }
        let bytes = message_bytes_max(append, event);
        if bytes > payload_bytes_max {
            return Err(InvalidAppend::TooLarge { index, bytes, max: payload_bytes_max });
        }
        bytes_together += bytes;
        check_data(index, &event.data)?;
    }
    let max = config.gather_bytes_max;
    if bytes_together > max {
        return Err(InvalidAppend::TooLargeTogether { bytes: bytes_together, max });
    }
    Ok(bytes_together)
}

/// Bytes of the event's message wherever in the log it comes to stand.
fn message_bytes_max(append: &Append, event: &NewEvent) -> usize {
    let newest = Epoch::new(i32::MAX as u32).unwrap_or(Epoch::FIRST);
    let anywhere = Event {
        at: LogPosition::new(newest, Position::MAX),
        id: event.id,
        previous_id: EventId::NIL,
        aggregate: append.aggregate.clone(),
        version: Version::MAX,
        event_type: event.event_type.clone(),
        schema_version: event.schema_version,
        committed_at: consistency::CommittedAt::from_unix_micros(i64::MIN),
        correlation_id: append.correlation_id,
        causation_id: append.causation_id,
        idempotency_key_hash: append.idempotency_key_hash,
        traceparent: append.traceparent.clone(),
        data: String::new(),
    };
    anywhere.message_bytes() + EXPECTED_STREAM_BYTES + event.data.len()
}

fn check_data(index: usize, data: &str) -> Result<(), InvalidAppend> {
    match serde_json::from_str::<Readable>(data) {
        Ok(Readable) => Ok(()),
        Err(error) => Err(InvalidAppend::Data { index, detail: error.to_string() }),
    }
}

/// JSON that every reader of the log can hold: numbers are in range, escapes are characters, nesting is
/// bounded. Checked by walking the text, without building a value.
struct Readable;

impl<'de> Deserialize<'de> for Readable {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Walk)
    }
}

struct Walk;

impl<'de> Visitor<'de> for Walk {
    type Value = Readable;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<Readable, E> {
        Ok(Readable)
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Readable, E> {
        Ok(Readable)
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<Readable, E> {
        Ok(Readable)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Readable, E> {
        Ok(Readable)
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<Readable, E> {
        Ok(Readable)
    }

    fn visit_unit<E: Error>(self) -> Result<Readable, E> {
        Ok(Readable)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Readable, A::Error> {
        while items.next_element::<Readable>()?.is_some() {}
        Ok(Readable)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Readable, A::Error> {
        while members.next_entry::<Readable, Readable>()?.is_some() {}
        Ok(Readable)
    }
}

#[cfg(test)]
mod tests {
    use consistency::stream_name;

    use super::*;

    #[test]
    fn the_longest_name_of_a_stream_is_counted() {
        let newest = Epoch::new(i32::MAX as u32).unwrap();
        let header = format!("{EXPECTED_STREAM_HEADER}: {}\r\n", stream_name(newest));
        assert_eq!(EXPECTED_STREAM_BYTES, header.len());
    }
}
