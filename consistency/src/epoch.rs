//! What a token, a checkpoint or an event of another epoch is worth here.

use crate::{Epoch, LogPosition, Position, Token};

/// The epochs that this process knows of, and where each later one begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EpochHistory {
    /// Epochs after the first, oldest first, each with the last position that it kept of its past.
    starts: Vec<(Epoch, Position)>,
}

/// A token judged against the history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Judged {
    /// Of the current epoch.
    Current(Token),
    /// Of an older epoch, and all it names was kept: it counts in the current epoch.
    Carried(Token),
    /// Of an older epoch, and it names something that a later epoch did not keep.
    Lost(Token),
    /// Of an epoch that is not known here yet.
    Newer(Token),
}

/// What becomes of checkpoints when the current epoch is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adoption {
    /// They count in the current epoch.
    Here,
    /// Some are of an older epoch, and all that they vouch for was kept: they count in the current one
    /// as they stand.
    InPlace,
    /// One vouches for something that a later epoch did not keep: what was made of it is not of this
    /// log, and cannot be told from the rest.
    Beyond {
        /// The checkpoint.
        stored: LogPosition,
        /// The last position of its epoch that every later one kept.
        kept: Position,
    },
    /// One is of an epoch that is not known here yet.
    Newer(Epoch),
}

impl EpochHistory {
    /// A log that never had another epoch.
    pub fn first() -> Self {
        Self { starts: Vec::new() }
    }

    /// `starts`: every epoch after the first with the position it starts after. `None` unless epochs
    /// rise one by one from 2.
    pub fn new(starts: Vec<(Epoch, Position)>) -> Option<Self> {
        let in_order = starts.iter().zip(2u32..).all(|((epoch, _), number)| epoch.get() == number);
        in_order.then_some(Self { starts })
    }

    /// Epochs after the first, oldest first, each with the last position that it kept of its past.
    pub fn starts(&self) -> &[(Epoch, Position)] {
        &self.starts
    }

    /// The newest epoch known here.
    pub fn current(&self) -> Epoch {
        self.starts.last().map_or(Epoch::FIRST, |(epoch, _)| *epoch)
    }

    /// The last position of the past that the current epoch kept; zero for the first epoch.
    pub fn current_starts_after(&self) -> Position {
        self.starts.last().map_or(Position::ZERO, |(_, start)| *start)
    }

    /// A position of an older epoch is lost when it is above the start of *any* later epoch: after
    /// two failovers either boundary alone gives the wrong answer.
    pub fn judge(&self, token: Token) -> Judged {
        let current = self.current();
        if token.epoch() == current {
            return Judged::Current(token);
        }
        if current < token.epoch() {
            return Judged::Newer(token);
        }
        if token.largest_position() <= self.kept_of(token.epoch()) {
            Judged::Carried(token.carried_to(current))
        } else {
            Judged::Lost(token)
        }
    }

    /// The last position of an epoch that every later one kept; [`Position::MAX`] when there is none
    /// later.
    pub fn kept_of(&self, epoch: Epoch) -> Position {
        let later = self.starts.iter().filter(|(later, _)| epoch < *later);
        later.map(|(_, start)| *start).min().unwrap_or(Position::MAX)
    }

    /// The epoch that the event at a position bears in the current log: an epoch takes all that comes
    /// after its start, be it written in it or carried into it.
    pub fn epoch_of(&self, position: Position) -> Epoch {
        let newest = self.starts.iter().rev().find(|(_, start)| *start < position);
        newest.map_or(Epoch::FIRST, |(epoch, _)| *epoch)
    }

    /// Whether read models that have stored these checkpoints can go on in the current epoch. All must
    /// be fit for it: rows of several partitions are read together.
    pub fn adoption(&self, stored: impl IntoIterator<Item = LogPosition>) -> Adoption {
        stored.into_iter().map(|stored| self.adoption_of(stored)).fold(
            Adoption::Here,
            |all, one| match (all, one) {
                (decided @ (Adoption::Beyond { .. } | Adoption::Newer(_)), _) => decided,
                (Adoption::InPlace, Adoption::Here) => Adoption::InPlace,
                (Adoption::Here | Adoption::InPlace, one) => one,
            },
        )
    }

    fn adoption_of(&self, stored: LogPosition) -> Adoption {
        let current = self.current();
        let kept = self.kept_of(stored.epoch);
        if current < stored.epoch {
            Adoption::Newer(stored.epoch)
        } else if stored.epoch == current {
            Adoption::Here
        } else if stored.position <= kept {
            Adoption::InPlace
        } else {
            Adoption::Beyond { stored, kept }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    fn epoch(value: u32) -> Epoch {
        Epoch::new(value).unwrap()
    }

    #[test]
    fn a_position_above_any_later_start_is_lost() {
        let history = |first, second| {
            EpochHistory::new(vec![(epoch(2), position(first)), (epoch(3), position(second))])
                .unwrap()
        };
        let token = || Token::new(Epoch::FIRST).with_read(position(1));
        assert!(
            matches!(history(1, 0).judge(token()), Judged::Lost(_)),
            "the newest start is lower"
        );
        assert!(matches!(history(0, 1).judge(token()), Judged::Lost(_)), "the next start is lower");
        let Judged::Carried(carried) = history(1, 1).judge(token()) else { panic!("kept by both") };
        assert_eq!((carried.epoch(), carried.read_position()), (epoch(3), position(1)));
    }

    #[test]
    fn an_epoch_from_the_future_is_not_judged_by_its_position() {
        let token = Token::new(epoch(2));
        assert_eq!(EpochHistory::first().judge(token.clone()), Judged::Newer(token));
    }

    fn at(number: u32, value: u64) -> LogPosition {
        LogPosition::new(epoch(number), position(value))
    }

    #[test]
    fn checkpoints_at_or_below_every_later_start_are_adopted_in_place_and_others_never() {
        let history =
            EpochHistory::new(vec![(epoch(2), position(6)), (epoch(3), position(4))]).unwrap();
        assert_eq!(history.adoption([]), Adoption::Here);
        assert_eq!(history.adoption([at(3, 0), at(3, 90)]), Adoption::Here);
        assert_eq!(history.adoption([at(1, 4), at(3, 9), at(2, 0)]), Adoption::InPlace);
        let beyond = Adoption::Beyond { stored: at(1, 5), kept: position(4) };
        assert_eq!(history.adoption([at(1, 5)]), beyond, "the newest start is lower");
        assert_eq!(history.adoption([at(3, 9), at(1, 5), at(1, 1)]), beyond, "one is enough");
        assert_eq!(history.adoption([at(1, 1), at(4, 1)]), Adoption::Newer(epoch(4)));
    }

    #[test]
    fn an_event_bears_the_newest_epoch_that_starts_before_it() {
        let history = |second, third| {
            EpochHistory::new(vec![(epoch(2), position(second)), (epoch(3), position(third))])
                .unwrap()
        };
        let epochs = |history: EpochHistory| {
            (1..=8).map(|at| history.epoch_of(position(at)).get()).collect::<Vec<_>>()
        };
        assert_eq!(epochs(history(2, 5)), [1, 1, 2, 2, 2, 3, 3, 3]);
        assert_eq!(epochs(history(5, 2)), [1, 1, 3, 3, 3, 3, 3, 3], "carried on from epoch 2");
        assert_eq!(epochs(EpochHistory::first()), [1; 8]);
    }

    #[test]
    fn a_history_with_a_missing_epoch_is_refused() {
        assert_eq!(EpochHistory::new(vec![(epoch(3), position(1))]), None);
    }
}
