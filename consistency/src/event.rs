//! An event as the log holds it, and the message it becomes on the stream.
//!
//! The message is a pure function of the row: publishing a row twice, years apart, from another
//! process gives the same headers and the same data. That is what lets a lost stream be rebuilt number for number.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use uuid::fmt::Hyphenated;

use crate::{AggregateId, Epoch, LogPosition, Name, NameError, Position, Version};

/// The header by which the server drops a message that it already has.
pub const MESSAGE_ID_HEADER: &str = "Nats-Msg-Id";

/// As many headers of an event as there can be.
const HEADER_COUNT_MAX: usize = 14;

/// Names of the headers that every message of the stream carries. `traceparent` and the last two of
/// `Tidemark-` are there only when the event has them.
pub mod header {
    /// Incarnation of the log.
    pub const EPOCH: &str = "Tidemark-Epoch";
    /// Place in the log; equals the stream sequence.
    pub const POSITION: &str = "Tidemark-Position";
    /// Id of the event before this one in the log; nil for the first.
    pub const PREVIOUS_ID: &str = "Tidemark-Previous-Id";
    /// Type of the aggregate.
    pub const AGGREGATE_TYPE: &str = "Tidemark-Aggregate-Type";
    /// Id of the aggregate.
    pub const AGGREGATE_ID: &str = "Tidemark-Aggregate-Id";
    /// The event's number in its aggregate.
    pub const VERSION: &str = "Tidemark-Version";
    /// Type of the event.
    pub const EVENT_TYPE: &str = "Tidemark-Event-Type";
    /// Version of the event's schema.
    pub const SCHEMA_VERSION: &str = "Tidemark-Schema-Version";
    /// When the append ran, in microseconds since 1970, by the primary database's clock.
    pub const COMMITTED_AT: &str = "Tidemark-Committed-At";
    /// Id shared by everything that follows from one outer request.
    pub const CORRELATION_ID: &str = "Tidemark-Correlation-Id";
    /// Id of what directly caused the event.
    pub const CAUSATION_ID: &str = "Tidemark-Causation-Id";
    /// SHA-256 of the idempotency key, in hex.
    pub const IDEMPOTENCY_KEY_HASH: &str = "Tidemark-Idempotency-Key-Hash";
    /// W3C trace context of the request that appended the event.
    pub const TRACEPARENT: &str = "traceparent";
}

/// The stream that holds the events of one epoch.
pub fn stream_name(epoch: Epoch) -> String {
    format!("EVENTS-{epoch}")
}

/// Names one event, made before its commit so that a commit of unknown outcome can be looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventId(Uuid);

impl EventId {
    /// What the first event of a log names as its predecessor.
    pub const NIL: Self = Self(Uuid::nil());

    /// Wraps an id that the caller made.
    pub const fn new(id: Uuid) -> Self {
        Self(id)
    }

    /// The id as the database holds it.
    pub const fn get(self) -> Uuid {
        self.0
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Version of an event type's schema, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct SchemaVersion(u16);

impl SchemaVersion {
    /// What a schema starts with.
    pub const FIRST: Self = Self(1);

    /// `None` for zero and above 32767, which a database column cannot hold.
    pub const fn new(version: u16) -> Option<Self> {
        if version == 0 || version > i16::MAX as u16 { None } else { Some(Self(version)) }
    }

    /// The plain number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// For a database column.
    pub const fn as_i16(self) -> i16 {
        self.0 as i16
    }

    /// The next schema of the same event type.
    pub const fn next(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }
}

impl TryFrom<u16> for SchemaVersion {
    type Error = &'static str;

    fn try_from(version: u16) -> Result<Self, Self::Error> {
        Self::new(version).ok_or("a schema version is from 1 to 32767")
    }
}

impl From<SchemaVersion> for u16 {
    fn from(version: SchemaVersion) -> u16 {
        version.0
    }
}

/// Microseconds since 1970 by the primary database's clock. For display and lag, never for order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CommittedAt(i64);

impl CommittedAt {
    /// Wraps a reading of the database's clock.
    pub const fn from_unix_micros(micros: i64) -> Self {
        Self(micros)
    }

    /// Microseconds since 1970.
    pub const fn unix_micros(self) -> i64 {
        self.0
    }
}

/// A W3C `traceparent`, version 00.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Traceparent(String);

impl Traceparent {
    /// `None` unless it is `00-<32 hex>-<16 hex>-<2 hex>` in lower case with ids that are not zero.
    pub fn parse(text: &str) -> Option<Self> {
        let parts: Vec<&str> = text.split('-').collect();
        let [version, trace, parent, flags] = parts.as_slice() else { return None };
        let hex = |part: &str, length| {
            part.len() == length
                && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let zero = |part: &str| part.bytes().all(|b| b == b'0');
        let well_formed = *version == "00" && hex(trace, 32) && hex(parent, 16) && hex(flags, 2);
        (well_formed && !zero(trace) && !zero(parent)).then(|| Self(text.to_owned()))
    }

    /// The header's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Traceparent {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text).ok_or("not a version 00 traceparent")
    }
}

impl From<Traceparent> for String {
    fn from(parent: Traceparent) -> Self {
        parent.0
    }
}

/// One event of the log, whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// Epoch and position.
    pub at: LogPosition,
    /// Its own id.
    pub id: EventId,
    /// The id of the event at the position before; [`EventId::NIL`] for the first of the log.
    pub previous_id: EventId,
    /// What it belongs to.
    pub aggregate: AggregateId,
    /// Its number in the aggregate.
    pub version: Version,
    /// Its type, which names the shape of `data`.
    pub event_type: Name,
    /// The version of that shape.
    pub schema_version: SchemaVersion,
    /// When the append ran.
    pub committed_at: CommittedAt,
    /// Shared by everything that follows from one outer request.
    pub correlation_id: Uuid,
    /// What directly caused it.
    pub causation_id: Uuid,
    /// SHA-256 of the idempotency key it was appended with.
    pub idempotency_key_hash: Option<[u8; 32]>,
    /// The trace it was appended in.
    pub traceparent: Option<Traceparent>,
    /// JSON, kept to the byte.
    pub data: String,
}

/// A message of the stream that is not an event of ours.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// A header that every event has is not there.
    #[error("header {0} is missing")]
    Missing(&'static str),
    /// A header does not hold what its name says.
    #[error("header {0} is malformed")]
    Malformed(&'static str),
    /// A name or id breaks its bounds.
    #[error("header {name} breaks its bounds")]
    Name {
        /// Which header.
        name: &'static str,
        /// How.
        source: NameError,
    },
    /// The payload is not UTF-8, so it cannot be JSON.
    #[error("payload is not UTF-8")]
    Payload(#[from] std::string::FromUtf8Error),
}

impl Event {
    /// The message's headers, in a fixed order.
    pub fn headers(&self) -> Vec<(&'static str, String)> {
        let mut headers = Vec::with_capacity(HEADER_COUNT_MAX);
        self.each_header(|name, value| headers.push((name, value.text())));
        headers
    }

    fn each_header(&self, mut header: impl FnMut(&'static str, Value<'_>)) {
        header(MESSAGE_ID_HEADER, Value::Id(self.id.get()));
        header(header::EPOCH, Value::Number(self.at.epoch.get().into()));
        header(header::POSITION, Value::Number(self.at.position.get()));
        header(header::PREVIOUS_ID, Value::Id(self.previous_id.get()));
        header(header::AGGREGATE_TYPE, Value::Text(self.aggregate.kind().as_str()));
        header(header::AGGREGATE_ID, Value::Text(self.aggregate.id()));
        header(header::VERSION, Value::Number(self.version.get()));
        header(header::EVENT_TYPE, Value::Text(self.event_type.as_str()));
        header(header::SCHEMA_VERSION, Value::Number(self.schema_version.get().into()));
        header(header::COMMITTED_AT, Value::Micros(self.committed_at.unix_micros()));
        header(header::CORRELATION_ID, Value::Id(self.correlation_id));
        header(header::CAUSATION_ID, Value::Id(self.causation_id));
        if let Some(hash) = &self.idempotency_key_hash {
            header(header::IDEMPOTENCY_KEY_HASH, Value::Hash(hash));
        }
        if let Some(parent) = &self.traceparent {
            header(header::TRACEPARENT, Value::Text(parent.as_str()));
        }
    }

    /// Reads a message back. `header` looks one up by its name.
    pub fn from_message<'a>(
        header: impl Fn(&'static str) -> Option<&'a str>,
        payload: Vec<u8>,
    ) -> Result<Self, EventError> {
        let text = |name| header(name).ok_or(EventError::Missing(name));
        let name =
            |name| Name::new(text(name)?).map_err(|source| EventError::Name { name, source });
        let kind = name(header::AGGREGATE_TYPE)?;
        let id = text(header::AGGREGATE_ID)?;
        let aggregate = AggregateId::new(kind, id)
            .map_err(|source| EventError::Name { name: header::AGGREGATE_ID, source })?;
        let uuid = |name| parsed::<Uuid>(name, text(name)?);
        let optional = |name, parse: &dyn Fn(&str) -> bool| match header(name) {
            Some(text) if parse(text) => Ok(Some(text)),
            Some(_) => Err(EventError::Malformed(name)),
            None => Ok(None),
        };
        let hash = optional(header::IDEMPOTENCY_KEY_HASH, &|text| from_hex(text).is_some())?;
        let parent = optional(header::TRACEPARENT, &|text| Traceparent::parse(text).is_some())?;
        let number = |name| parsed::<u64>(name, text(name)?);
        Ok(Self {
            at: LogPosition::new(
                Epoch::new(parsed(header::EPOCH, text(header::EPOCH)?)?)
                    .ok_or(EventError::Malformed(header::EPOCH))?,
                Position::new(number(header::POSITION)?)
                    .ok_or(EventError::Malformed(header::POSITION))?,
            ),
            id: EventId::new(uuid(MESSAGE_ID_HEADER)?),
            previous_id: EventId::new(uuid(header::PREVIOUS_ID)?),
            aggregate,
            version: Version::new(number(header::VERSION)?)
                .ok_or(EventError::Malformed(header::VERSION))?,
            event_type: name(header::EVENT_TYPE)?,
            schema_version: SchemaVersion::new(parsed(
                header::SCHEMA_VERSION,
                text(header::SCHEMA_VERSION)?,
            )?)
            .ok_or(EventError::Malformed(header::SCHEMA_VERSION))?,
            committed_at: CommittedAt(parsed(header::COMMITTED_AT, text(header::COMMITTED_AT)?)?),
            correlation_id: uuid(header::CORRELATION_ID)?,
            causation_id: uuid(header::CAUSATION_ID)?,
            idempotency_key_hash: hash.and_then(from_hex),
            traceparent: parent.and_then(Traceparent::parse),
            data: String::from_utf8(payload)?,
        })
    }

    /// Bytes that the message takes of the server's `max_payload`, which counts headers as well.
    pub fn message_bytes(&self) -> usize {
        const PREAMBLE: usize = "NATS/1.0\r\n\r\n".len();
        const EXPECTED_SEQUENCE: usize =
            "Nats-Expected-Last-Sequence: 18446744073709551615\r\n".len();
        let mut headers = 0;
        self.each_header(|name, value| headers += name.len() + value.bytes() + 4);
        PREAMBLE + EXPECTED_SEQUENCE + headers + self.data.len()
    }
}

/// What a header says. Every append is measured before its events are messages, so how long the text
/// would be is known without making it.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Text(&'a str),
    Number(u64),
    Micros(i64),
    Id(Uuid),
    Hash(&'a [u8; 32]),
}

impl Value<'_> {
    fn text(self) -> String {
        match self {
            Self::Text(text) => text.to_owned(),
            Self::Number(number) => number.to_string(),
            Self::Micros(micros) => micros.to_string(),
            // As `Display` would write it, without its detours: every event has four of them.
            Self::Id(id) => id.hyphenated().encode_lower(&mut Uuid::encode_buffer()).to_owned(),
            Self::Hash(hash) => to_hex(hash),
        }
    }

    /// Bytes of the text.
    fn bytes(self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Number(number) => digit_count(number),
            Self::Micros(micros) => usize::from(micros < 0) + digit_count(micros.unsigned_abs()),
            Self::Id(_) => Hyphenated::LENGTH,
            Self::Hash(hash) => 2 * hash.len(),
        }
    }
}

fn digit_count(number: u64) -> usize {
    number.checked_ilog10().map_or(1, |tens| tens as usize + 1)
}

fn parsed<T: std::str::FromStr>(name: &'static str, text: &str) -> Result<T, EventError> {
    text.parse().map_err(|_| EventError::Malformed(name))
}

fn to_hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(b"0123456789abcdef"[usize::from(digit)])).collect()
}

fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn event() -> Event {
        Event {
            at: LogPosition::new(Epoch::FIRST, Position::new(7).unwrap()),
            id: EventId::new(Uuid::from_u128(1)),
            previous_id: EventId::NIL,
            aggregate: AggregateId::new(Name::new("order").unwrap(), "o-1").unwrap(),
            version: Version::new(2).unwrap(),
            event_type: Name::new("OrderShipped").unwrap(),
            schema_version: SchemaVersion::FIRST,
            committed_at: CommittedAt::from_unix_micros(1_700_000_000_000_000),
            correlation_id: Uuid::from_u128(2),
            causation_id: Uuid::from_u128(3),
            idempotency_key_hash: Some([0xab; 32]),
            traceparent: Traceparent::parse(
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            ),
            data: r#"{"b":1, "a":2}"#.to_owned(),
        }
    }

    fn read_back(headers: &[(&'static str, String)], data: &str) -> Result<Event, EventError> {
        let find = |name| headers.iter().find(|(n, _)| *n == name).map(|(_, value)| value.as_str());
        Event::from_message(find, data.as_bytes().to_vec())
    }

    #[test]
    fn an_event_survives_the_stream_to_the_byte() {
        let event = event();
        assert_eq!(read_back(&event.headers(), &event.data).unwrap(), event);
        let bare = Event { idempotency_key_hash: None, traceparent: None, ..event };
        assert_eq!(read_back(&bare.headers(), &bare.data).unwrap(), bare);
    }

    #[test]
    fn a_missing_or_mangled_header_is_named() {
        let event = event();
        for at in 0..event.headers().len() {
            let mut headers = event.headers();
            headers[at].1 = "\u{1}".to_owned();
            assert!(read_back(&headers, "{}").is_err(), "{} mangled", headers[at].0);
        }
        for at in 0..12 {
            let mut headers = event.headers();
            let (name, _) = headers.remove(at);
            assert!(matches!(read_back(&headers, "{}"), Err(EventError::Missing(n)) if n == name));
        }
    }

    /// The block of headers as it is sent, with the longest position that the server can be told to expect.
    fn block(event: &Event) -> String {
        let mut block = format!("NATS/1.0\r\nNats-Expected-Last-Sequence: {}\r\n", u64::MAX);
        for (name, value) in event.headers() {
            block += &format!("{name}: {value}\r\n");
        }
        block + "\r\n"
    }

    #[test]
    fn a_number_is_measured_as_it_is_written() {
        let powers = (0..20).map(|exponent| 10u64.pow(exponent));
        let edges = powers.flat_map(|power| [power - 1, power, power + 1]);
        for number in edges.chain([u64::MAX]) {
            let written = Value::Number(number);
            assert_eq!(written.bytes(), written.text().len(), "{number}");
            for micros in [number.cast_signed(), number.cast_signed().wrapping_neg()] {
                let written = Value::Micros(micros);
                assert_eq!(written.bytes(), written.text().len(), "{micros}");
            }
        }
    }

    proptest! {
        #[test]
        fn what_is_measured_are_the_headers(
            (epoch, position, version) in (1..=i32::MAX as u32, 0..=i64::MAX as u64, 0..=i64::MAX as u64),
            (kind, id, event_type) in ("[a-z]{1,64}", "[!-.0-~]{1,128}", "[A-Z]{1,64}"),
            (schema, micros, hash) in (1..=i16::MAX as u16, any::<i64>(), any::<Option<[u8; 32]>>()),
            is_traced in any::<bool>(),
            data in ".*",
        ) {
            let event = Event {
                at: LogPosition::new(Epoch::new(epoch).unwrap(), Position::new(position).unwrap()),
                aggregate: AggregateId::new(Name::new(kind).unwrap(), id).unwrap(),
                version: Version::new(version).unwrap(),
                event_type: Name::new(event_type).unwrap(),
                schema_version: SchemaVersion::new(schema).unwrap(),
                committed_at: CommittedAt::from_unix_micros(micros),
                idempotency_key_hash: hash,
                traceparent: event().traceparent.filter(|_| is_traced),
                data,
                ..event()
            };
            prop_assert_eq!(event.message_bytes(), block(&event).len() + event.data.len());
            prop_assert_eq!(read_back(&event.headers(), &event.data).unwrap(), event);
        }
    }

    #[test]
    fn a_traceparent_of_zeros_or_another_version_is_refused() {
        assert!(
            Traceparent::parse("00-00000000000000000000000000000000-b7ad6b7169203331-01").is_none()
        );
        assert!(
            Traceparent::parse("01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").is_none()
        );
        assert!(
            Traceparent::parse("00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01").is_none()
        );
    }
}
