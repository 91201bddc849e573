//! What a token asks of a read.

use crate::{AggregateKey, LogPosition, Position, Token, Version};

/// What a read depends on, and so which partitions and which of the token's claims matter to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A row keyed by its aggregate: made by nothing but that aggregate's events.
    Row(AggregateKey),
    /// Anything else: a list, a rollup, a search. Any event may have made it.
    Everything,
}

/// How new the world must be that a read shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Demand {
    at: LogPosition,
    shortcut: Option<Version>,
    min_version: Option<Version>,
    named: Named,
}

/// Which aggregates the caller wrote: a parked one among them must not be passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Named {
    Only(Vec<AggregateKey>),
    /// The token dropped claims, so it may have been any.
    Any,
}

impl Demand {
    /// The demand of a caller who has written and seen nothing.
    pub fn none() -> Self {
        Self {
            at: LogPosition::ORIGIN,
            shortcut: None,
            min_version: None,
            named: Named::Only(Vec::new()),
        }
    }

    /// What `token` asks of a read of `scope`.
    ///
    /// A row keyed by aggregate A owes the newest thing read and the claim on A, since nothing but
    /// A's events makes it. Anything else owes the largest position of all.
    pub fn of(token: &Token, scope: Scope) -> Self {
        let named = if token.claims_dropped() {
            Named::Any
        } else {
            Named::Only(token.claims().iter().map(|claim| claim.aggregate).collect())
        };
        let (position, shortcut) = match scope {
            Scope::Everything => (token.largest_position(), None),
            Scope::Row(aggregate) => match token.claim_on(&aggregate) {
                None => (token.read_position(), None),
                Some(claim) if claim.position < token.read_position() => {
                    (token.read_position(), None)
                }
                // Nothing was read after the claim was made: the row may prove itself by its version.
                Some(claim) => (claim.position, Some(claim.version)),
            },
        };
        Self { at: LogPosition::new(token.epoch(), position), shortcut, min_version: None, named }
    }

    /// Also asks that the row has a version of at least this. Met by the version only.
    pub fn with_min_version(self, version: Version) -> Self {
        Self { min_version: Some(version), ..self }
    }

    /// Also asks for everything at or below `at`: a cursor's page, or the head at a linearizable read.
    pub fn with_position(self, at: LogPosition) -> Self {
        if self.at < at { Self { at, shortcut: None, ..self } } else { self }
    }

    /// Every event at or below this must be in the answer, as far as the read depends on it.
    pub fn at(&self) -> LogPosition {
        self.at
    }

    /// The position within the demand's epoch.
    pub fn position(&self) -> Position {
        self.at.position
    }

    /// The version by which a row proves that it holds every event that is demanded of it, wherever
    /// the watermark stands. Only when the claim is as new as everything the holder read.
    pub fn shortcut(&self) -> Option<Version> {
        self.shortcut
    }

    /// The version the caller asked for by hand.
    pub fn min_version(&self) -> Option<Version> {
        self.min_version
    }

    /// Whether the caller wrote `aggregate`, or may have.
    pub fn names(&self, aggregate: &AggregateKey) -> bool {
        match &self.named {
            Named::Any => true,
            Named::Only(keys) => keys.contains(aggregate),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Claim, Epoch};

    fn position(value: u64) -> Position {
        Position::new(value).unwrap()
    }

    fn claim(id: u8, version: u64, at: u64) -> Claim {
        Claim {
            aggregate: AggregateKey::from_bytes([id; 12]),
            version: Version::new(version).unwrap(),
            position: position(at),
        }
    }

    #[test]
    fn a_row_owes_its_own_claim_and_what_was_read_but_not_other_claims() {
        let token = Token::new(Epoch::FIRST)
            .with_read(position(5))
            .with_claim(claim(1, 2, 7))
            .with_claim(claim(2, 1, 9));
        let own = Demand::of(&token, Scope::Row(AggregateKey::from_bytes([1; 12])));
        assert_eq!((own.position(), own.shortcut()), (position(7), Version::new(2)));
        let other = Demand::of(&token, Scope::Row(AggregateKey::from_bytes([3; 12])));
        assert_eq!((other.position(), other.shortcut()), (position(5), None));
        assert_eq!(Demand::of(&token, Scope::Everything).position(), position(9));
    }

    #[test]
    fn a_claim_older_than_what_was_read_proves_nothing_by_its_version() {
        let token = Token::new(Epoch::FIRST).with_read(position(8)).with_claim(claim(1, 2, 7));
        let demand = Demand::of(&token, Scope::Row(AggregateKey::from_bytes([1; 12])));
        assert_eq!((demand.position(), demand.shortcut()), (position(8), None));
    }

    #[test]
    fn a_token_that_dropped_claims_may_have_written_anything() {
        let all = (1..=5)
            .fold(Token::new(Epoch::FIRST), |token, n| token.with_claim(claim(n, 1, n.into())));
        let demand = Demand::of(&all, Scope::Everything);
        assert!(demand.names(&AggregateKey::from_bytes([77; 12])));
        let one =
            Demand::of(&Token::new(Epoch::FIRST).with_claim(claim(1, 1, 1)), Scope::Everything);
        assert!(one.names(&AggregateKey::from_bytes([1; 12])));
        assert!(!one.names(&AggregateKey::from_bytes([77; 12])));
    }
}
