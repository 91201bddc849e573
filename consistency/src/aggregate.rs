//! What an event belongs to: its aggregate, and the slots and partitions that follow from its id.

use std::fmt;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The log's stream spreads aggregates of one type over this many subjects.
pub const STREAM_SLOT_COUNT: u32 = 64;
/// Longest aggregate id, in bytes.
pub const AGGREGATE_ID_BYTES_MAX: usize = 128;
/// Longest name of an aggregate type, event type, projection or view, in bytes.
pub const NAME_BYTES_MAX: usize = 64;

/// Why a name or an id was refused. The text is safe to show to a caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Empty or longer than its bound.
    #[error("must have 1 to {max} bytes, has {length}")]
    Length {
        /// What was given.
        length: usize,
        /// The bound.
        max: usize,
    },
    /// A character outside the set.
    #[error("may not contain {0:?}")]
    Character(char),
}

/// A name chosen by a developer: a letter, then letters, digits, `-` or `_`. It is part of NATS
/// subjects, table names and headers, so nothing else is let in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks length and characters.
    pub fn new(text: impl Into<String>) -> Result<Self, NameError> {
        let text = text.into();
        check_length(&text, NAME_BYTES_MAX)?;
        let strange = |(at, c): &(usize, char)| {
            !(c.is_ascii_alphabetic() || *at > 0 && (c.is_ascii_digit() || "-_".contains(*c)))
        };
        match text.char_indices().find(strange) {
            Some((_, c)) => Err(NameError::Character(c)),
            None => Ok(Self(text)),
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Name {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        Self::new(text)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One aggregate: its type and its id. The id is visible ASCII without `/`, so that it fits a header,
/// a path segment and a log line unchanged.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AggregateId {
    kind: Name,
    id: String,
}

impl AggregateId {
    /// Checks the id's length and characters.
    pub fn new(kind: Name, id: impl Into<String>) -> Result<Self, NameError> {
        let id = id.into();
        check_length(&id, AGGREGATE_ID_BYTES_MAX)?;
        match id.chars().find(|c| !c.is_ascii_graphic() || *c == '/') {
            Some(c) => Err(NameError::Character(c)),
            None => Ok(Self { kind, id }),
        }
    }

    /// The aggregate's type.
    pub fn kind(&self) -> &Name {
        &self.kind
    }

    /// The id within the type.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The short name that tokens and announcements carry.
    pub fn key(&self) -> AggregateKey {
        let mut hash = Sha256::new();
        hash.update(self.kind.as_str());
        hash.update([0]);
        hash.update(&self.id);
        let digest = hash.finalize();
        let mut key = [0; 12];
        key.copy_from_slice(&digest[..12]);
        AggregateKey(key)
    }

    /// The stream subject that its events are published under: `events.<type>.<slot>`.
    pub fn subject(&self) -> String {
        format!("events.{}.{}", self.kind, fnv1a_32(self.id.as_bytes()) % STREAM_SLOT_COUNT)
    }
}

impl fmt::Display for AggregateId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind, self.id)
    }
}

/// The first 12 bytes of SHA-256 over type, a zero byte and id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AggregateKey([u8; 12]);

impl AggregateKey {
    /// From the bytes of a token.
    pub const fn from_bytes(bytes: [u8; 12]) -> Self {
        Self(bytes)
    }

    /// The bytes of a token.
    pub const fn as_bytes(&self) -> &[u8; 12] {
        &self.0
    }

    /// The short hash that announcements name a changed row by. Two rows that share one are both
    /// taken for changed, which costs a query and nothing else.
    pub fn hint(&self) -> u64 {
        self.0[..8].iter().fold(0, |hint, byte| hint << 8 | u64::from(*byte))
    }
}

/// How many partitions a version of a projection has; fixed for the life of that version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct PartitionCount(u16);

impl PartitionCount {
    /// `None` for zero and above 1024.
    pub const fn new(count: u16) -> Option<Self> {
        if count == 0 || count > 1024 { None } else { Some(Self(count)) }
    }

    /// The plain number.
    pub const fn get(self) -> u16 {
        self.0
    }

    /// The partition that an aggregate's events belong to: FNV-1a of the id, modulo the count.
    pub fn partition_of(self, aggregate_id: &str) -> u16 {
        (fnv1a_32(aggregate_id.as_bytes()) % u32::from(self.0)) as u16
    }
}

impl TryFrom<u16> for PartitionCount {
    type Error = &'static str;

    fn try_from(count: u16) -> Result<Self, Self::Error> {
        Self::new(count).ok_or("a partition count is from 1 to 1024")
    }
}

impl From<PartitionCount> for u16 {
    fn from(count: PartitionCount) -> u16 {
        count.0
    }
}

/// FNV-1a, 32 bits (Fowler, Noll, Vo). NATS uses the same for its `partition` mapping.
pub fn fnv1a_32(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

fn check_length(text: &str, max: usize) -> Result<(), NameError> {
    let length = text.len();
    if length == 0 || length > max { Err(NameError::Length { length, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fnv1a_matches_its_published_vectors() {
        assert_eq!(fnv1a_32(b""), 0x811c_9dc5);
        assert_eq!(fnv1a_32(b"a"), 0xe40c_292c);
        assert_eq!(fnv1a_32(b"foobar"), 0xbf9c_f968);
    }

    #[test]
    fn a_name_cannot_reach_out_of_its_subject_or_table() {
        for bad in ["", "a.b", "a b", "a>", "*", "1a", "a;drop", "é", &"a".repeat(65)] {
            assert!(Name::new(bad).is_err(), "{bad:?}");
        }
        for good in ["order", "OrderPlaced", "orders-by-status", "a_1"] {
            assert!(Name::new(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn an_id_cannot_carry_spaces_control_characters_or_slashes() {
        let kind = Name::new("order").unwrap();
        for bad in ["", "a b", "a\nb", "a/b", "\u{7f}", "ü", &"x".repeat(129)] {
            assert!(AggregateId::new(kind.clone(), bad).is_err(), "{bad:?}");
        }
        assert!(AggregateId::new(kind, "0192-a:b.c~d@e").is_ok());
    }

    #[test]
    fn type_and_id_cannot_be_shifted_into_each_other() {
        let key = |kind, id| AggregateId::new(Name::new(kind).unwrap(), id).unwrap().key();
        assert_ne!(key("order", "s1"), key("orders", "1"));
    }
}
