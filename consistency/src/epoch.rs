//! What a token of another epoch is worth here.

use crate::{Epoch, Position, Token};

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
        let later = self.starts.iter().filter(|(epoch, _)| token.epoch() < *epoch);
        let kept = later.map(|(_, start)| *start).min().unwrap_or(Position::MAX);
        if token.largest_position() <= kept {
            Judged::Carried(token.carried_to(current))
        } else {
            Judged::Lost(token)
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

    #[test]
    fn a_history_with_a_missing_epoch_is_refused() {
        assert_eq!(EpochHistory::new(vec![(epoch(3), position(1))]), None);
    }
}
