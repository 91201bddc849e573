//! States kept of long aggregates, and when one may stand for the events that it was made of.

use sha2::{Digest, Sha256};

use crate::{AggregateId, Event, EventId, LogPosition, Name, Position, Version};

/// Whose rules made a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FoldKind {
    /// Those of an aggregate type, which commands are decided by.
    Aggregate,
    /// Those of a projection.
    Projection,
}

/// Names the rules that made a state. Other rules have another version, so that a state made by one is
/// never taken for a state made by the other.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FoldName {
    /// Whose they are.
    pub kind: FoldKind,
    /// What they are called.
    pub name: Name,
    /// Their version, from 1.
    pub version: u32,
}

impl FoldName {
    /// Kind and name in one text, for a database column. No two folds of one version share it.
    pub fn text(&self) -> String {
        let kind = match self.kind {
            FoldKind::Aggregate => "aggregate",
            FoldKind::Projection => "projection",
        };
        format!("{kind} {}", self.name)
    }
}

/// The state of an aggregate after one of its events, kept so that those before need not be read.
///
/// It may be used when the log still has that very event at that very place ([`Self::ends_with`]): an
/// event names its predecessor in the log, so whoever has it has all before it. A log that lost its tail,
/// and an epoch that took the event over, have it no more, or elsewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoldSnapshot {
    /// The number of events in it.
    pub version: Version,
    /// Where the newest of them stands.
    pub at: LogPosition,
    /// Its id.
    pub event_id: EventId,
    /// Where the first of them stands.
    pub created: Position,
    /// JSON; `None` when the aggregate had no state.
    pub state: Option<String>,
}

impl FoldSnapshot {
    /// A hash of all of it and of what it is of: a row that was changed, or put under another name,
    /// has another one.
    pub fn digest(&self, fold: &FoldName, aggregate: &AggregateId) -> [u8; 32] {
        let numbers = [
            u64::from(fold.version),
            self.version.get(),
            u64::from(self.at.epoch.get()),
            self.at.position.get(),
            self.created.get(),
            u64::from(self.state.is_some()),
        ];
        let texts = [
            fold.text(),
            aggregate.kind().to_string(),
            aggregate.id().to_owned(),
            self.event_id.to_string(),
        ];
        let mut hash = Sha256::new();
        for number in numbers {
            hash.update(number.to_be_bytes());
        }
        let state = self.state.as_deref().unwrap_or_default();
        for text in texts.iter().map(String::as_str).chain([state]) {
            // Each text's length goes before it, so that no two lists read alike.
            hash.update((text.len() as u64).to_be_bytes());
            hash.update(text);
        }
        hash.finalize().into()
    }

    /// Whether `event`, as the log has it now, is the last one in it.
    pub fn ends_with(&self, event: &Event) -> bool {
        self.version == event.version && self.at == event.at && self.event_id == event.id
    }
}

/// Whether a fold that read so many events is worth a snapshot, with one asked for every `interval`
/// events. An interval of zero asks for none.
pub const fn is_snapshot_due(events_read: u32, interval: u32) -> bool {
    0 < interval && interval <= events_read
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;
    use crate::Epoch;

    fn name(version: u32) -> FoldName {
        FoldName { kind: FoldKind::Aggregate, name: Name::new("order").expect("a name"), version }
    }

    fn snapshot() -> FoldSnapshot {
        FoldSnapshot {
            version: Version::ZERO.next(),
            at: LogPosition::new(Epoch::FIRST, Position::ZERO.next()),
            event_id: EventId::new(Uuid::from_u128(1)),
            created: Position::ZERO.next(),
            state: Some("{}".to_owned()),
        }
    }

    #[test]
    fn every_part_of_a_snapshot_and_of_its_name_is_in_its_digest() {
        let of =
            |id: &str| AggregateId::new(Name::new("order").expect("a name"), id).expect("an id");
        let plain = snapshot().digest(&name(1), &of("o-1"));
        assert_eq!(snapshot().digest(&name(1), &of("o-1")), plain);
        let elsewhere = LogPosition::new(Epoch::FIRST, Position::ZERO);
        let other_epoch =
            LogPosition::new(Epoch::new(2).expect("above zero"), snapshot().at.position);
        let changed = [
            FoldSnapshot { version: Version::ZERO, ..snapshot() },
            FoldSnapshot { at: elsewhere, ..snapshot() },
            FoldSnapshot { at: other_epoch, ..snapshot() },
            FoldSnapshot { event_id: EventId::NIL, ..snapshot() },
            FoldSnapshot { created: Position::ZERO, ..snapshot() },
            FoldSnapshot { state: Some("{ }".to_owned()), ..snapshot() },
            FoldSnapshot { state: Some(String::new()), ..snapshot() },
            FoldSnapshot { state: None, ..snapshot() },
        ];
        let mut digests: Vec<_> =
            changed.iter().map(|changed| changed.digest(&name(1), &of("o-1"))).collect();
        digests.push(snapshot().digest(&name(2), &of("o-1")));
        digests.push(snapshot().digest(&name(1), &of("o-2")));
        let projection = FoldName { kind: FoldKind::Projection, ..name(1) };
        digests.push(snapshot().digest(&projection, &of("o-1")));
        digests.push(plain);
        let different: std::collections::BTreeSet<_> = digests.iter().collect();
        assert_eq!(different.len(), digests.len());
    }

    #[test]
    fn a_snapshot_is_due_after_so_many_events_and_never_when_none_are_asked_for() {
        let due: Vec<bool> = [0, 499, 500, 501].map(|read| is_snapshot_due(read, 500)).into();
        assert_eq!(due, [false, false, true, true]);
        assert!(!is_snapshot_due(0, 0) && !is_snapshot_due(u32::MAX, 0));
    }
}
