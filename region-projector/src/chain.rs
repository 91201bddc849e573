//! Whether what is read joins what was read before.
//!
//! Positions are dense and every event names its predecessor, so a reader can prove that nothing was
//! left out between two events, and that nobody rewrote the past that a checkpoint vouches for.

use std::collections::BTreeMap;

use consistency::{Epoch, EpochHistory, Event, EventId, Position};

/// One event of the log, by its place and its id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// Where it stands.
    pub position: Position,
    /// Which one it is; [`EventId::NIL`] at zero.
    pub id: EventId,
}

impl Mark {
    /// Before the first event of the log.
    pub const START: Self = Self { position: Position::ZERO, id: EventId::NIL };

    /// The mark of an event.
    pub fn of(event: &Event) -> Self {
        Self { position: event.at.position, id: event.id }
    }
}

/// How an event joins the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// It is the next one, and the chain now ends with it.
    Next,
    /// It was read before.
    Seen,
    /// Events between the chain's end and it are missing. Nobody knows whose they are, so nothing may
    /// pass them.
    Hole,
}

/// What was read is not the log that was applied. Reading on would apply another past on top of this
/// one, so it needs an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// An event of another epoch.
    #[error(
        "event at position {position} is of epoch {found}, but of epoch {expected} in the log read here"
    )]
    Epoch {
        /// Where.
        position: Position,
        /// The epoch that it bears in the log that is read.
        expected: Epoch,
        /// The event's.
        found: Epoch,
    },
    /// An event that names another predecessor than the one that was read.
    #[error("event at position {position} follows {found}, but {expected} was read before it")]
    Predecessor {
        /// Where.
        position: Position,
        /// What was read before it.
        expected: EventId,
        /// What it names.
        found: EventId,
    },
    /// Another event than the one that a checkpoint was stored at.
    #[error("position {position} holds event {found}, but {expected} was applied from it")]
    Replaced {
        /// Where.
        position: Position,
        /// What a checkpoint, or the chain, vouches for.
        expected: EventId,
        /// What is there.
        found: EventId,
    },
}

/// The unbroken part of the log that this reader has seen.
#[derive(Debug)]
pub struct Chain {
    epochs: EpochHistory,
    end: Mark,
    /// Checkpoints further on, to be met by what is read.
    ahead: BTreeMap<Position, EventId>,
}

impl Chain {
    /// Begins at the lowest of the marks that checkpoints vouch for, and will compare the others as
    /// it passes them.
    /// The log is that of the newest epoch; what came before it bears older numbers.
    pub fn new(
        epochs: EpochHistory,
        marks: impl IntoIterator<Item = Mark>,
    ) -> Result<Self, Broken> {
        let mut ahead = BTreeMap::new();
        for mark in marks {
            match ahead.insert(mark.position, mark.id) {
                Some(other) if other != mark.id => {
                    let Mark { position, id } = mark;
                    return Err(Broken::Replaced { position, expected: other, found: id });
                }
                Some(_) | None => {}
            }
        }
        let lowest = ahead.pop_first().map(|(position, id)| Mark { position, id });
        Ok(Self { epochs, end: lowest.unwrap_or(Mark::START), ahead })
    }

    /// The last event that joined.
    pub fn end(&self) -> Mark {
        self.end
    }

    /// The epoch that is read.
    pub fn epoch(&self) -> Epoch {
        self.epochs.current()
    }

    /// The last position that is not on the epoch's stream.
    pub fn starts_after(&self) -> Position {
        self.epochs.current_starts_after()
    }

    /// Joins the event to the chain when it is the next one.
    pub fn join(&mut self, event: &Event) -> Result<Link, Broken> {
        let mark = Mark::of(event);
        let expected = self.epochs.epoch_of(mark.position);
        if event.at.epoch != expected {
            let (position, found) = (mark.position, event.at.epoch);
            return Err(Broken::Epoch { position, expected, found });
        }
        if mark.position < self.end.position {
            return Ok(Link::Seen);
        }
        if mark.position == self.end.position {
            return self.end.check(mark).map(|()| Link::Seen);
        }
        if mark.position != self.end.position.next() {
            return Ok(Link::Hole);
        }
        if event.previous_id != self.end.id {
            let (position, found) = (mark.position, event.previous_id);
            return Err(Broken::Predecessor { position, expected: self.end.id, found });
        }
        if let Some(id) = self.ahead.get(&mark.position) {
            Mark { position: mark.position, id: *id }.check(mark)?;
            self.ahead.remove(&mark.position);
        }
        self.end = mark;
        Ok(Link::Next)
    }
}

impl Mark {
    /// Whether what is found at the same place is this event.
    fn check(self, found: Self) -> Result<(), Broken> {
        let Self { position, id: expected } = self;
        if found.id == expected {
            Ok(())
        } else {
            Err(Broken::Replaced { position, expected, found: found.id })
        }
    }
}

#[cfg(test)]
mod tests {
    use consistency::{AggregateId, CommittedAt, LogPosition, Name, SchemaVersion, Version};
    use uuid::Uuid;

    use super::*;

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    fn id(value: u128) -> EventId {
        EventId::new(Uuid::from_u128(value))
    }

    fn mark(value: u64) -> Mark {
        Mark { position: position(value), id: id(value.into()) }
    }

    /// The event at `place`, whose id is its position.
    fn event(place: u64) -> Event {
        Event {
            at: LogPosition::new(Epoch::FIRST, position(place)),
            id: id(place.into()),
            previous_id: id((place - 1).into()),
            aggregate: AggregateId::new(Name::new("order").unwrap(), "o-1").unwrap(),
            version: Version::new(place).unwrap(),
            event_type: Name::new("OrderPlaced").unwrap(),
            schema_version: SchemaVersion::FIRST,
            committed_at: CommittedAt::from_unix_micros(0),
            correlation_id: Uuid::nil(),
            causation_id: Uuid::nil(),
            idempotency_key_hash: None,
            traceparent: None,
            data: "{}".to_owned(),
        }
    }

    #[test]
    fn events_join_one_by_one_from_the_lowest_checkpoint() {
        let mut chain = Chain::new(EpochHistory::first(), [mark(7), mark(3), mark(3)]).unwrap();
        assert_eq!(chain.end(), mark(3));
        assert_eq!(chain.join(&event(3)), Ok(Link::Seen));
        assert_eq!(chain.join(&event(4)), Ok(Link::Next));
        assert_eq!(chain.join(&event(2)), Ok(Link::Seen));
        assert_eq!(chain.join(&event(6)), Ok(Link::Hole));
        assert_eq!(chain.end(), mark(4), "a hole moves nothing");
    }

    #[test]
    fn the_first_event_follows_nothing() {
        let mut chain = Chain::new(EpochHistory::first(), []).unwrap();
        let forged = Event { previous_id: id(99), ..event(1) };
        assert!(matches!(chain.join(&forged), Err(Broken::Predecessor { .. })));
        assert_eq!(chain.join(&event(1)), Ok(Link::Next));
    }

    #[test]
    fn an_event_with_another_predecessor_breaks_the_chain() {
        let mut chain = Chain::new(EpochHistory::first(), [mark(3)]).unwrap();
        let forged = Event { previous_id: id(99), ..event(4) };
        let (expected, found) = (id(3), id(99));
        let broken = Broken::Predecessor { position: position(4), expected, found };
        assert_eq!(chain.join(&forged), Err(broken));
    }

    #[test]
    fn an_event_of_another_epoch_breaks_the_chain() {
        let mut chain = Chain::new(EpochHistory::first(), [mark(3)]).unwrap();
        let mut newer = event(4);
        newer.at.epoch = Epoch::new(2).unwrap();
        assert!(matches!(chain.join(&newer), Err(Broken::Epoch { .. })));
    }

    #[test]
    fn events_that_an_epoch_kept_of_its_past_bear_older_numbers() {
        let second = Epoch::new(2).unwrap();
        let epochs = EpochHistory::new(vec![(second, position(4))]).unwrap();
        let of_second = |place| {
            let mut event = event(place);
            event.at.epoch = second;
            event
        };
        let mut chain = Chain::new(epochs, [mark(3)]).unwrap();
        assert_eq!((chain.epoch(), chain.starts_after()), (second, position(4)));
        assert!(matches!(chain.join(&of_second(4)), Err(Broken::Epoch { .. })));
        assert_eq!(chain.join(&event(4)), Ok(Link::Next));
        assert!(matches!(chain.join(&event(5)), Err(Broken::Epoch { .. })), "what was lost");
        assert_eq!(chain.join(&of_second(5)), Ok(Link::Next));
    }

    #[test]
    fn an_event_replaced_under_a_checkpoint_further_on_is_noticed() {
        let other = Mark { position: position(5), id: id(99) };
        let mut chain = Chain::new(EpochHistory::first(), [mark(3), other]).unwrap();
        assert_eq!(chain.join(&event(4)), Ok(Link::Next));
        assert!(matches!(chain.join(&event(5)), Err(Broken::Replaced { .. })));
        let twice = Chain::new(EpochHistory::first(), [mark(5), other]);
        assert!(matches!(twice, Err(Broken::Replaced { .. })), "two checkpoints disagree");
    }

    #[test]
    fn another_event_at_the_end_of_the_chain_is_noticed() {
        let mut chain = Chain::new(EpochHistory::first(), [mark(3)]).unwrap();
        let replaced = Event { id: id(99), ..event(3) };
        assert!(matches!(chain.join(&replaced), Err(Broken::Replaced { .. })));
    }
}
